"""Each attack finds what is there in a federation that was made to leak, and nothing where there is nothing."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from fedpft import cli
from fedpft.config import load_simulation_config
from fedpft.data.samples import Samples
from fedpft.errors import ConfigError
from fedpft.leakage import labels, membership, run, shadows, tokens
from fedpft.leakage.membership import Candidates, Scores
from fedpft.leakage.owner import Pair, Thief
from fedpft.leakage.rehearsal import Rehearsal, rehearse
from fedpft.leakage.report import format_report, lead
from fedpft.leakage.run import QUICK, leak
from fedpft.leakage.scores import Finding, auc, auc_error, total_variation, true_positives, true_positives_by_chance
from fedpft.silo.learner import Learner

COMMON = tiny.WORDS[4:11]  # of all texts; each silo has words of its own beside them
OWN = {"north": tiny.WORDS[11:14], "south": tiny.WORDS[14:17]}
MOSTLY = {"north": (8, 1, 1), "south": (1, 1, 8)}  # how often each label is drawn
SILO_ROWS, SERVER_ROWS = 48, 60


def table(path: Path, rows: int, draw: random.Random, words: list[str], weights: tuple[int, ...] = (1, 1, 1)) -> None:
    """Texts with labels that have nothing to do with them: who knows them has seen them."""
    path.parent.mkdir(exist_ok=True)
    lines = ["text,label"]
    for _ in range(rows):
        text = " ".join(draw.choices(words, k=draw.randint(4, 9)))
        lines.append(f"{text},{draw.choices(tiny.LABELS, weights)[0]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    tiny.write_model("bert", root / "model")
    (root / "labels.txt").write_text("\n".join(tiny.LABELS) + "\n", encoding="utf-8")
    draw = random.Random(1)
    for silo, words in OWN.items():
        table(root / "silos" / f"{silo}.csv", SILO_ROWS, draw, COMMON + words)
        table(root / "skewed" / f"{silo}.csv", SILO_ROWS, draw, COMMON + words, MOSTLY[silo])
    for name in ("public", "test"):
        table(root / f"{name}.csv", SERVER_ROWS, draw, COMMON)
    return root


def written(directory: Path, root: Path, **changes: Any) -> Path:
    """A federation that learns its rows by heart."""
    settings: dict[str, Any] = {
        "seed": 5,
        "out": str(directory / "out"),
        "threads": 1,
        "model": {"path": str(root / "model"), "labels": str(root / "labels.txt"), "max_tokens": 12},
        "proxy": {"neurons": 40},
        "distillation": {"closed_form_samples": 16},
        "alignment": {"counts": "silos", "every_rounds": 1, "steps": 2, "batch": 8},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "training": {
            "rounds": 2,
            "local_epochs": 30.0,
            "batch": 8,
            "learning_rate": 0.005,
            "schedule": "constant",
            "logit_adjustment": "none",
        },
        "evaluation": {"every_rounds": 0, "gap_samples": 0},
        "public_data": str(root / "public.csv"),
        "test_data": str(root / "test.csv"),
        "simulation": {"data": str(root / "silos")},
    }
    for section, values in changes.items():
        settings[section] = {**settings[section], **values} if isinstance(values, dict) else values
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "simulation.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}), "utf-8")
    return path


class Attacked:
    """A rehearsal, and what its attacks take."""

    def __init__(self, directory: Path, root: Path, **changes: Any) -> None:
        config = load_simulation_config(written(directory, root, **changes))
        self.run: Rehearsal = rehearse(config, directory / "rehearsal", 0.25)
        self.learner = Learner(self.run.bundle, self.run.settings, "cpu")
        self.rows = run._Rows(self.run, self.learner, QUICK)
        self.scratch = directory / "scratch"

    def membership(
        self, candidates: dict[str, Candidates] | None = None, rounds: int | None = None
    ) -> dict[tuple[str, str], float]:
        """The AUC of each of membership's rows after so many rounds, by (sees, goal)."""
        scores: dict[str, Scores] = {}
        learner = Learner(self.run.bundle, self.run.settings, "cpu")
        for observed in self.run.rounds[:rounds]:
            if observed.snapshot is not None:
                learner.bring_to(observed.version, observed.snapshot)
            wanted = candidates or self.rows.candidates
            membership.score_round(learner, self.run.config, observed, wanted, self.rows.public, scores)
        found = membership.findings(list(scores.values()))
        return {(each.sees, each.goal): each.value for each in found if each.measure == "AUC"}


@pytest.fixture(scope="module")
def leaky(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return Attacked(tmp_path_factory.mktemp("leaky"), inputs)


@pytest.fixture(scope="module")
def skewed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    """Silos with labels that they have mostly, which train little."""
    changes: dict[str, Any] = {"training": {"local_epochs": 3.0}, "simulation": {"data": str(inputs / "skewed")}}
    return Attacked(tmp_path_factory.mktemp("skewed"), inputs, **changes)


BY_LOSS, BY_REFERENCE = "a row trained on, by loss", "a row trained on, by reference"


def test_scores_of_known_cases() -> None:
    members, others = torch.tensor([3.0, 2.0, 2.0]), torch.tensor([1.0, 2.0])
    assert auc(members, others) == pytest.approx((1 + 1 + 0.5 + 1 + 0.5 + 1) / 6 - 0.0, abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - auc(members, others))
    assert true_positives(members, others) == pytest.approx(1 / 3), "none of the others may be above"
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])) == 0.75
    draws = torch.Generator().manual_seed(0)
    aucs = torch.tensor([auc(torch.rand(30, generator=draws), torch.rand(20, generator=draws)) for _ in range(400)])
    assert float(aucs.std()) == pytest.approx(auc_error(30, 20), rel=0.15)


def test_chance_comes_to_what_is_said_of_it() -> None:
    draws = torch.Generator().manual_seed(1)
    rates = torch.tensor(
        [true_positives(torch.rand(300, generator=draws), torch.rand(120, generator=draws)) for _ in range(2000)]
    )
    mean, error = true_positives_by_chance(300, 120)
    assert float(rates.mean()) == pytest.approx(mean, rel=0.1)
    assert float(rates.std()) == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize(("value", "more", "found"), [(0.61, True, True), (0.59, True, False), (0.3, False, True)])
def test_what_chance_can_do_is_no_finding(value: float, more: bool, found: bool) -> None:
    assert Finding("the server", "sums", "a row", "AUC", value, 0.5, 0.05, more).found is found


def test_each_silo_keeps_some_rows_out_of_its_training(leaky: Attacked) -> None:
    data = leaky.run.data
    for silo in OWN:
        trained, out = data.samples(silo), data.held_out(silo)
        assert (len(trained), len(out)) == (36, 12)
        assert not set(trained.lines) & set(out.lines)
        assert data.sizes[silo] == 36
    assert {update.samples for observed in leaky.run.rounds for update in observed.updates} == {30 * 36}


def test_members_of_a_federation_that_learns_by_heart_are_found(leaky: Attacked) -> None:
    found = leaky.membership()
    for sees in ("single updates", "sums"):
        assert found[sees, BY_LOSS] > 0.7, found
        assert found[sees, BY_REFERENCE] > 0.7, found
    assert found["the adapters it receives", BY_REFERENCE] > 0.65, found
    assert ("single inactivity counts", "a row trained on") in found


def test_rows_that_nobody_trained_on_are_told_from_none(leaky: Attacked, tmp_path: Path) -> None:
    draw, parts = random.Random(7), []
    for name in ("one", "two"):
        table(tmp_path / f"{name}.csv", 80, draw, COMMON)
        task, labels_of = leaky.learner.task, leaky.learner.proxy.labels
        samples = task.read_labelled(tmp_path / f"{name}.csv", leaky.run.config.columns, labels_of)
        parts.append(leaky.rows.encoded(samples))
    found = leaky.membership({"north": Candidates(*parts)})
    assert found
    assert all(abs(value - 0.5) < 4 * auc_error(80, 80) for value in found.values()), found


def test_privacy_hides_members(leaky: Attacked, inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    hidden = Attacked(
        tmp_path,
        inputs,
        training={"rounds": 1, "privacy": {"epsilon": 1.0, "delta": 1e-3}},
        alignment={"counts": "public"},
    ).membership()
    plain = leaky.membership(rounds=1)
    assert not any("counts" in sees for sees, _ in hidden)
    for row in (("single updates", BY_REFERENCE), ("sums", BY_REFERENCE)):
        assert hidden[row] < plain[row] - 0.1, (hidden, plain)


@pytest.fixture(scope="module")
def known(skewed: Attacked, tmp_path_factory: pytest.TempPathFactory) -> list[shadows.Shadow]:
    scratch = tmp_path_factory.mktemp("shadows")
    return shadows.train(skewed.learner, skewed.run.config, skewed.run.rounds[0], skewed.rows.labelled, 4, scratch)


def test_shadows_have_rows_as_silos_have_and_shares_of_their_own(known: list[shadows.Shadow]) -> None:
    shares = torch.stack([shadow.shares for shadow in known if shadow.shares is not None])
    assert torch.allclose(shares.sum(1), torch.ones(4, dtype=torch.float64))
    assert float(shares.std(0).min()) > 0.05


def test_labels_and_tokens_of_silos_are_found(skewed: Attacked, known: list[shadows.Shadow]) -> None:
    found = run._what_it_has(skewed.run, skewed.learner, skewed.rows, known)
    shares = [each for each in found if each.goal.startswith("label shares") and each.sees == "single updates"]
    assert len(shares) == 2
    assert all(each.found for each in shares), shares
    words = next(each for each in found if each.goal.startswith("which tokens") and each.sees == "single updates")
    assert words.value > 0.8, words


def test_label_shares_follow_the_heads_rows() -> None:
    """Shadows in which a class's row moves as far as it is frequent."""
    draws = torch.Generator().manual_seed(0)
    start = {"head.weight": torch.zeros(5, 7), "head.bias": torch.zeros(5)}

    def trained(shares: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = torch.nn.functional.normalize(torch.randn(5, 7, generator=draws), dim=1) * shares[:, None].float()
        return {"head.weight": rows, "head.bias": shares.float() - 0.2}

    def drawn() -> torch.Tensor:
        return torch.rand(5, generator=draws, dtype=torch.float64).softmax(0)

    examples = [shadows.Shadow(shares, trained(shares)) for shares in (drawn() for _ in range(12))]
    reader = labels.LabelReader(["head.bias", "head.weight"], start, examples)
    truth = drawn()
    uniform = torch.full_like(truth, 0.2)
    assert total_variation(reader.read(trained(truth)), truth) < 0.5 * total_variation(uniform, truth)
    nothing = reader.read(start)
    assert torch.allclose(nothing, uniform, atol=0.02), "an update that moves nothing tells nothing"


def small_texts(skewed: Attacked, number: int) -> dict[tuple[str, str], float]:
    observed = skewed.run.rounds[number]
    settings = skewed.run.settings
    one_step = settings.training.model_copy(update={"local_epochs": 1.0})
    config = skewed.run.config.model_copy(update={"training": one_step})
    learner = Learner(skewed.run.bundle, settings.model_copy(update={"training": one_step}), "cpu")
    found = tokens.spans(learner, config, observed, skewed.rows.labelled, 4, skewed.scratch)
    return {(each.sees, each.measure): each.value for each in found}


def test_texts_are_read_from_an_update_of_one_step(skewed: Attacked) -> None:
    found = small_texts(skewed, 1)
    assert found["the same, were it a plain gradient", "whole texts"] == 1.0
    assert found["an update of one step", "tokens in their places"] > 0.4, found


def test_no_text_is_read_where_a_has_no_gradient_yet(skewed: Attacked) -> None:
    """In the first round B is 0, so that A does not move."""
    found = small_texts(skewed, 0)
    assert set(found.values()) == {0.0}


def test_a_rehearsal_that_is_over_is_read_again(leaky: Attacked) -> None:
    config = leaky.run.config.model_copy(update={"out": leaky.run.config.out.parent.parent / "out"})
    again = rehearse(config, leaky.run.config.out.parent, 0.25)
    assert [observed.number for observed in again.rounds] == [1, 2]
    assert [observed.version for observed in again.rounds] == [0, 1]
    for one, other in zip(again.rounds, leaky.run.rounds, strict=True):
        assert all(tiny.same_bits(one.start[name], other.start[name]) for name in other.start)


@pytest.mark.parametrize(("proxy", "share"), [(0.7, 0.5), (0.4, 0.0), (1.0, 1.0)])
def test_ability_is_what_is_above_chance(proxy: float, share: float) -> None:
    thief = Thief.__new__(Thief)
    thief._chance = 0.4
    thief._task = run.TASKS["sequence-classification"]
    found = thief.pair(proxy, 1.0)
    assert isinstance(found, Pair)
    assert found.share == pytest.approx(share)
    assert thief.pair(proxy, 0.3).share is None, "the FM has nothing above chance"


def test_command_writes_table_page_and_numbers(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, inputs, training={"local_epochs": 1.0})
    out = tmp_path / "report"
    arguments = ["fedpft", "leakage", "--config", str(path), "--out", str(out), "--quick", "--widths", "0.5", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    assert cli.main() == 0
    found = json.loads((out / "leakage.json").read_text(encoding="utf-8"))
    assert [each["neurons"] for each in found["held"]] == [20, 40]
    for each in found["held"]:
        assert each["parts"]["embeddings"]["proxy"] == each["parts"]["embeddings"]["model"]
        assert each["parts"]["attention"]["proxy"] == each["parts"]["attention"]["model"]
        assert each["parts"]["ffn"]["proxy"] < each["parts"]["ffn"]["model"]
    goals = {each["goal"] for each in found["findings"]}
    assert {"label shares of a silo", BY_LOSS, BY_REFERENCE, "texts, token by token"} <= goals
    page, printed = (out / "leakage.html").read_text(encoding="utf-8"), capsys.readouterr().out
    assert page.count("<svg") == 2
    assert "embeddings" in page
    assert format_report(found) in printed
    assert lead(found) in printed
    for each in found["findings"]:
        assert f"{each['value']:.3f}" in printed


def test_without_test_data_nothing_begins(inputs: Path, tmp_path: Path) -> None:
    config = load_simulation_config(written(tmp_path, inputs, test_data=None))
    with pytest.raises(ConfigError, match="test_data"):
        leak(config, tmp_path / "report", replace(QUICK, widths=()))
    assert not (tmp_path / "report").exists()


def test_silo_of_one_row_has_none_to_hold_out(inputs: Path, tmp_path: Path) -> None:
    table(tmp_path / "silos" / "north.csv", 1, random.Random(0), COMMON)
    config = load_simulation_config(written(tmp_path, inputs, simulation={"data": str(tmp_path / "silos")}))
    with pytest.raises(Exception, match="single row"):
        rehearse(config, tmp_path / "rehearsal", 0.25)


def test_held_out_rows_are_one_data_set_for_a_thief(leaky: Attacked) -> None:
    rows: Samples = leaky.run.data.all_held_out()
    assert len(rows) == 24
    assert rows.targets is not None
    assert len(rows.targets) == 24
