"""What server.yaml and silo.yaml may say, and what a mistake in them ends in."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from fedpft.config import PartitionSection, ServerConfig, dump, load_server_config, load_silo_config, reference
from fedpft.errors import ConfigError

TLS = {"ca": "ca.pem", "certificate": "me.pem", "key": "me.key"}
SERVER: dict[str, Any] = {
    "out": "run",
    "listen": "0.0.0.0:7000",
    "tls": TLS,
    "model": {"path": "../model", "labels": "labels.txt"},
    "federation": {"silos": ["north", "south"]},
    "public_data": "/data/public.csv",
}
SILO: dict[str, Any] = {"server": "example.org:7000", "tls": TLS, "data": {"path": "train.csv"}}
PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` with dotted keys set, or left out where the change is None."""
    copy = yaml.safe_load(yaml.safe_dump(values))
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        section = copy
        for part in path:
            section = section.setdefault(part, {})
        if value is None:
            del section[last]
        else:
            section[last] = value
    return copy


def written(directory: Path, values: Any) -> Path:
    path = directory / "the.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def fault(directory: Path, values: Any, load: Any = load_server_config) -> str:
    with pytest.raises(ConfigError) as raised:
        load(written(directory, values))
    assert raised.value.message.startswith(str(directory / "the.yaml"))
    assert raised.value.remedy
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(str(directory / "the.yaml"))


SECURE = {"federation.secure_aggregation": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tls": None, "insecure_loopback": True, "listen": "127.0.0.1:0"}, "needs tls: by their certificates silos"),
        ({"federation.max_update_norm": 1.0}, "goes without federation.max_update_norm: the server sees no silo's"),
        ({"aggregation.mean": "median", "federation.silos": ["a", "b", "c"]}, "goes without aggregation.mean: median"),
        ({"aggregation.mean": "krum", "aggregation.byzantine": 0, "federation.silos": ["a", "b", "c"]}, "mean: krum"),
        ({"aggregation.weights": "steps"}, "goes without aggregation.weights: steps, which needs every silo's number"),
        ({"training.update_encoding": "int8"}, "goes without training.update_encoding: int8: rounded apart"),
        ({"training.update_encoding": "bfloat16"}, "goes without training.update_encoding: bfloat16"),
        ({"federation.min_silos": 1}, "needs 2 silos or more, and min_silos too: the sum over one is its"),
        ({"federation.silos": ["north"]}, "needs 2 silos or more, and min_silos too"),
        ({"federation.silos": [f"s{n}" for n in range(65)]}, "is for 2 to 64 silos a round, not 65"),
    ],
)
def test_what_secure_aggregation_goes_without_is_refused_with_the_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    said = fault(tmp_path, changed(SERVER, SECURE | changes))
    assert "federation.secure_aggregation " in said
    assert message in said


def test_a_sum_that_could_wrap_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    changes = {"secure_aggregation.most_samples": 1_000_000, "secure_aggregation.max_entry": 100.0}
    said = fault(tmp_path, changed(SERVER, SECURE | changes))
    assert "64 silos x most_samples 1000000 x max_entry 100 = 6.4e+09 could wrap a word of 32 bits" in said


def test_terms_of_secure_aggregation_follow_from_the_file(tmp_path: Path) -> None:
    changes = {"federation.min_silos": 2, "federation.silos": ["a", "b", "c", "d", "e"], "aggregation.weights": "equal"}
    terms = load_server_config(written(tmp_path, changed(SERVER, SECURE | changes))).secure_terms
    assert terms is not None
    assert (terms.min_silos, terms.weights, terms.fraction_bits) == (2, "equal", 8)
    assert [terms.threshold(silos) for silos in (2, 3, 4, 5)] == [2, 2, 3, 3]
    assert load_server_config(written(tmp_path, SERVER)).secure_terms is None


def test_a_large_federation_may_pick_few_silos_a_round(tmp_path: Path) -> None:
    changes = {"federation.silos": [f"s{n}" for n in range(640)], "federation.sample_fraction": 0.1}
    assert load_server_config(written(tmp_path, changed(SERVER, SECURE | changes))).most_picked == 64


def test_relative_paths_start_at_the_files_own_directory(tmp_path: Path) -> None:
    config = load_server_config(written(tmp_path, SERVER))
    assert config.out == tmp_path / "run"
    assert config.model.path == tmp_path / "../model"
    assert config.tls is not None
    assert config.tls.key == tmp_path / "me.key"
    assert config.public_data == Path("/data/public.csv")
    assert config.test_data is None


def test_a_silos_default_work_directory_is_beside_its_file(tmp_path: Path) -> None:
    config = load_silo_config(written(tmp_path, SILO))
    assert config.work == tmp_path / "work"
    assert config.data.path == tmp_path / "train.csv"


def test_relative_paths_do_not_depend_on_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, SILO)
    monkeypatch.chdir(tmp_path)
    assert load_silo_config(Path("the.yaml")).work == tmp_path / "work"


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = load_server_config(written(tmp_path, SERVER))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_what_is_dumped_is_read_as_the_same(tmp_path: Path) -> None:
    config = load_server_config(written(tmp_path, SERVER))
    assert load_server_config(written(tmp_path, dump(config))) == config


TYPOS = [
    ("sed", 3, "unknown key 'sed' -> did you mean 'seed'?"),
    ("model.lables", "a", "unknown key 'model.lables' -> did you mean 'labels'?"),
    ("training.learning-rate", 0.1, "unknown key 'training.learning-rate' -> did you mean 'learning_rate'?"),
    ("adapter.zzz", 1, "unknown key 'adapter.zzz' -> known keys here: rank, alpha, dropout"),
    ("tls.cert", "a", "unknown key 'tls.cert' -> "),
]


def test_a_preset_stands_behind_the_keys_that_are_given(tmp_path: Path) -> None:
    plain = load_server_config(written(tmp_path, SERVER))
    paper = load_server_config(written(tmp_path, changed(SERVER, {"preset": "paper", "training.rounds": 3})))
    assert (plain.proxy.importance, plain.distillation.closed_form_ridge) == ("leverage", "held_out")
    assert (paper.proxy.importance, paper.distillation.closed_form_ridge) == ("weights", 1e-3)
    assert (paper.training.logit_adjustment, paper.aggregation.weights) == ("none", "samples")
    assert (plain.alignment.asks_silos, paper.alignment.asks_silos) == (False, True)
    assert paper.training.rounds == 3
    changes = {"preset": "paper", "proxy.importance": "variance"}
    assert load_server_config(written(tmp_path, changed(SERVER, changes))).proxy.importance == "variance"
    assert load_server_config(written(tmp_path, {**dump(paper)})) == paper


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"preset": "papers"}, "preset"),
        ({"preset": ["paper"]}, "preset"),
        ({"preset": {"paper": 1}}, "preset"),
        ({"preset": "paper", "training": 3}, "training"),
        ({"preset": "paper", "proxy": {"importance": "weight"}}, "proxy.importance"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    assert text in fault(tmp_path, {**SERVER, **changes})


@pytest.mark.parametrize(("key", "value", "text"), TYPOS)
def test_an_unknown_key_is_named_with_what_was_meant(tmp_path: Path, key: str, value: Any, text: str) -> None:
    assert text in fault(tmp_path, changed(SERVER, {key: value}))


@pytest.mark.parametrize("key", ["out", "listen", "model", "model.path", "federation.silos", "public_data"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert f": key '{key}' is missing -> add {key}: " in fault(tmp_path, changed(SERVER, {key: None}))


WRONG = [
    ("seed", "many", ": seed: input should be a valid integer"),
    ("seed", -1, ": seed: input should be greater than or equal to 0, got -1"),
    (
        "adapter.dropout",
        1.5,
        ": adapter.dropout: input should be less than 1, got 1.5 -> adapter.dropout: ",
    ),
    ("training", "fast", ": training: must be a mapping of keys, got 'fast' -> "),
    ("model", ["a"], ": model: must be a mapping of keys, got ['a'] -> "),
    ("federation.silos", "north", ": federation.silos: must be a list, got 'north' -> "),
    ("federation.silos", ["north", 3], ": federation.silos[1]: input should be a valid string, got 3 -> "),
    ("federation.silos", [], ": federation.silos: "),
    ("federation.silos", ["north", "north"], ": federation.silos names a silo twice"),
    ("federation.silos", ["../north"], "'../north' is not a name"),
    ("federation.min_silos", 3, ": federation.min_silos is 3, but only 2 silos are named"),
    ("listen", "here", ": listen: does not have the right form, got 'here' -> listen: host:port"),
    ("listen", "0.0.0.0:70000", "there is no port 70000"),
    ("model.task", "translation", ": model.task: input should be 'sequence-classification', "),
    ("proxy.neurons", "some", ": proxy.neurons: input should be a valid integer"),
    ("proxy.neurons", 0, ": proxy.neurons: input should be greater than or equal to 1, got 0"),
    ("proxy.keep", "layers", ": proxy.layers is needed with proxy.keep: layers"),
    ("encoding", "latin-99", ": encoding: 'latin-99' is no text encoding; Python's names are meant, such as cp1252"),
    ("encoding", "rot13", ": encoding: 'rot13' is no text encoding"),
    ("encoding", 1252, ": encoding: input should be a valid string, got 1252"),
    ("listen", "a..b:70", "a..b cannot be the name of a host"),
    ("out", "a\0b", ": out: holds a NUL, which no path can, got"),
    ("threads", 100_000, ": threads: input should be less than or equal to 1024"),
    ("evaluation", {"batch": 10**30}, ": evaluation.batch: must be at most 1000000000, got"),
    ("federation.round_deadline_seconds", 1e300, ": federation.round_deadline_seconds: must be at most 1000000000"),
    ("model.path", 7, ": model.path: input is not a valid path"),
    ("training.schedule", "step", ": training.schedule: input should be 'linear', 'cosine' or 'constant', got 'step'"),
    ("training.logit_adjustment", "mine", ": training.logit_adjustment: input should be 'none' or 'own', got 'mine'"),
    ("training.proximal", -0.1, ": training.proximal: input should be greater than or equal to 0"),
    ("training.adam_epsilon", 0.0, ": training.adam_epsilon: input should be greater than or equal to 0.0000"),
    ("training.frozen_a", "half", ": training.frozen_a: input should be a valid boolean"),
]


@pytest.mark.parametrize(("key", "value", "text"), WRONG)
def test_a_wrong_value_is_named_with_its_meaning(tmp_path: Path, key: str, value: Any, text: str) -> None:
    assert text in fault(tmp_path, changed(SERVER, {key: value}))


FIVE = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"aggregation.mean": "median"},
            ": aggregation.mean: median needs 3 updates a round, but federation.silos names 2 -> ",
        ),
        (
            {"aggregation.mean": "trimmed", "federation.silos": FIVE, "federation.min_silos": 2},
            ": aggregation.mean: trimmed needs 3 updates a round, but federation.min_silos is 2 -> ",
        ),
        (
            {"aggregation.mean": "krum", "aggregation.byzantine": 2, "federation.silos": FIVE},
            ": aggregation.mean: krum needs 7 updates a round, but federation.silos names 5 -> ",
        ),
        (
            {"aggregation.weights": "steps", "aggregation.mean": "krum"},
            ": aggregation: weights: steps goes with mean: w",
        ),
        ({"aggregation.trimmed_fraction": 0.5}, ": aggregation.trimmed_fraction: input should be less than 0.5"),
        ({"aggregation.learning_rate": 0.0}, ": aggregation.learning_rate: input should be greater than 0"),
        ({"aggregation.optimizer": "sgd"}, ": aggregation.optimizer: input should be 'none', 'momentum', 'adam' or "),
    ],
)
def test_an_aggregation_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    assert text in fault(tmp_path, changed(SERVER, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation.mean": "krum", "federation.silos": FIVE},
        {"aggregation.mean": "median", "federation.silos": FIVE, "federation.min_silos": 3},
        {"aggregation.mean": "trimmed", "aggregation.trimmed_fraction": 0},
        {"aggregation.optimizer": "none", "aggregation.weights": "steps"},
    ],
)
def test_an_aggregation_that_silos_are_enough_for_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    load_server_config(written(tmp_path, changed(SERVER, changes)))


@pytest.mark.parametrize("encoding", ["undefined", "idna", "base64", ""])
def test_a_silos_encoding_must_be_one_of_text_files(encoding: str, tmp_path: Path) -> None:
    text = fault(tmp_path, changed(SILO, {"data.encoding": encoding}), load_silo_config)
    assert ": data.encoding: " in text
    assert "is no text encoding" in text


def test_a_silo_names_its_encoding_and_what_to_do_with_bad_rows(tmp_path: Path) -> None:
    data = {"data.encoding": "Windows-1252", "data.bad_rows": "skip"}
    config = load_silo_config(written(tmp_path, changed(SILO, data)))
    assert (config.data.encoding, config.data.bad_rows) == ("Windows-1252", "skip")
    assert "input should be 'refuse' or 'skip'" in fault(
        tmp_path, changed(SILO, {"data.bad_rows": "drop"}), load_silo_config
    )


def test_bad_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    assert fault(tmp_path, "out: run\nlisten: 'open\n").startswith(":3: ")
    assert fault(tmp_path, "out: run\n\tlisten: a\n").startswith(":2: ")


@pytest.mark.parametrize("text", ["seed: 2024-13-45\n", "seed: " + "[" * 10_000, "seed: " + "9" * 5_000])
def test_yaml_with_a_value_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    assert fault(tmp_path, text).startswith(": not YAML")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert fault(tmp_path, text).startswith(": must be a mapping of keys")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file -> .*--config"):
        load_server_config(tmp_path / "gone.yaml")


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"out: caf\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_server_config(tmp_path / "a.yaml")


# --- transport --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:7000", "localhost:7000"])
def test_insecure_is_allowed_on_loopback(tmp_path: Path, address: str) -> None:
    changes = {"tls": None, "insecure_loopback": True, "listen": address}
    assert load_server_config(written(tmp_path, changed(SERVER, changes))).insecure_loopback


@pytest.mark.parametrize("address", ["0.0.0.0:7000", "127.0.0.1.example.org:7000", "192.168.0.2:7000", "[::]:7000"])
def test_insecure_is_refused_elsewhere(tmp_path: Path, address: str) -> None:
    changes = {"tls": None, "insecure_loopback": True, "listen": address}
    assert "insecure_loopback is for loopback addresses" in fault(tmp_path, changed(SERVER, changes))


def test_a_silo_is_held_to_the_same_rule(tmp_path: Path) -> None:
    changes = {"tls": None, "insecure_loopback": True, "insecure_name": "north"}
    assert "insecure_loopback is for loopback" in fault(tmp_path, changed(SILO, changes), load_silo_config)
    local = changed(SILO, {**changes, "server": "127.0.0.1:7000"})
    assert load_silo_config(written(tmp_path, local)).insecure_name == "north"


def test_a_silo_cannot_dial_port_0(tmp_path: Path) -> None:
    assert "no port 0 to connect to" in fault(tmp_path, changed(SILO, {"server": "fm.org:0"}), load_silo_config)


@pytest.mark.parametrize("changes", [{"tls": None}, {"insecure_loopback": True, "listen": "127.0.0.1:0"}])
def test_exactly_one_transport_is_given(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "exactly one of tls and insecure_loopback" in fault(tmp_path, changed(SERVER, changes))


def test_a_name_goes_with_insecure_loopback_only(tmp_path: Path) -> None:
    assert "insecure_name goes with" in fault(tmp_path, changed(SILO, {"insecure_name": "a"}), load_silo_config)
    changes = {"tls": None, "insecure_loopback": True, "server": "127.0.0.1:1"}
    assert "insecure_name goes with" in fault(tmp_path, changed(SILO, changes), load_silo_config)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_in_step_with_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), f"run: python -m fedpft.config > {PAGE.name}"


def test_the_page_is_printed_by_the_module() -> None:
    command = [sys.executable, "-m", "fedpft.config"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == reference()


def test_the_page_describes_every_field_in_words() -> None:
    for line in reference().splitlines():
        if line.startswith("| `"):
            cells = line.replace("\\|", "/").strip("| ").split(" | ")
            assert len(cells) == 4, line
            assert cells[1] in (
                "section",
                "path",
                "text",
                "list of texts",
                "list of whole numbers",
                "list of numbers",
            ) or cells[1].startswith(("`", "number", "whole number", "list of `")), line
    assert set(ServerConfig.model_fields) <= {line.split("`")[1] for line in reference().splitlines() if "| `" in line}


def test_a_silo_has_no_place_for_a_path_to_the_model(tmp_path: Path) -> None:
    assert "unknown key 'model'" in fault(tmp_path, changed(SILO, {"model.path": "fm"}), load_silo_config)


def test_the_server_has_no_place_for_a_path_to_silo_data(tmp_path: Path) -> None:
    assert "unknown key 'data'" in fault(tmp_path, changed(SERVER, {"data.path": "train.csv"}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "column"}, "kind: column needs `column`, the name of a column of the data file"),
        ({"column": "ward"}, "`column` has no meaning with kind: iid"),
        ({"kind": "shards", "column": "ward"}, "`column` has no meaning with kind: shards"),
        ({"kind": "quantity", "concentration": 0}, "greater than 0"),
        ({"kind": "shards", "shards": 0}, "greater than or equal to 1"),
        ({"kind": "label"}, "'iid', 'dirichlet', 'quantity', 'shards' or 'column'"),
    ],
)
def test_a_partition_that_says_too_little_or_too_much_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        PartitionSection.model_validate(section)


def test_a_column_goes_with_what_can_be_dealt_out_by_it() -> None:
    assert PartitionSection.model_validate({}).kind == "iid"
    for kind in ("column", "dirichlet"):
        assert PartitionSection.model_validate({"kind": kind, "column": "ward"}).column == "ward"


@pytest.mark.parametrize("key", ["distillation.closed_form_probes", "distillation.probe_term", "alignment.probe_term"])
def test_probes_need_lora(key: str, tmp_path: Path) -> None:
    assert f"{key} is about LoRA, of which there is none with adapter.rank: 0" in fault(
        tmp_path, changed(SERVER, {key: 0.1, "adapter.rank": 0})
    )
    load_server_config(written(tmp_path, changed(SERVER, {key: 0.1})))
    load_server_config(written(tmp_path, changed(SERVER, {key: 0.0, "adapter.rank": 0})))


def test_a_ridge_is_a_number_or_held_out(tmp_path: Path) -> None:
    for ridge in ("held_out", 0.5):
        config = load_server_config(written(tmp_path, changed(SERVER, {"distillation.closed_form_ridge": ridge})))
        assert config.distillation.closed_form_ridge == ridge
    for ridge in ("best", 0.0):
        assert "distillation.closed_form_ridge" in fault(
            tmp_path, changed(SERVER, {"distillation.closed_form_ridge": ridge})
        )


def test_layers_by_themselves_know_no_logits(tmp_path: Path) -> None:
    settings = {"distillation.local": True, "distillation.logit_term": 0.1}
    assert "local: true goes without logit_term" in fault(tmp_path, changed(SERVER, settings))
