"""The owner's own data: what of it is cut, how long its texts are, and which samples stand for all."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from fedpft.config import ServerConfig
from fedpft.data.batches import sample
from fedpft.digests import Digests
from fedpft.errors import DataError
from fedpft.server import rounds
from fedpft.server.construction import Record, load_owner


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    tiny.write_model("bert", tmp_path / "model")
    (tmp_path / "labels.txt").write_bytes("earth\nsea\nciel \u00e9toil\u00e9\n".encode("cp1252"))
    (tmp_path / "public.csv").write_text("text\n" + "the bird moves\n" * 3 + f"{'bird ' * 11}\n")
    (tmp_path / "test.csv").write_bytes(f"text;label\n{'bird ' * 10};ciel\xa0\u00e9toil\u00e9\n".encode("cp1252"))
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "out": tmp_path / "out",
        "model": {"path": tmp_path / "model", "labels": tmp_path / "labels.txt", "max_tokens": 12},
        "federation": {"silos": ["north"]},
        "public_data": tmp_path / "public.csv",
        "test_data": tmp_path / "test.csv",
        "encoding": "cp1252",
    }
    return ServerConfig.model_validate(values)


def test_texts_that_are_cut_are_counted_and_said(config: ServerConfig, caplog: pytest.LogCaptureFixture) -> None:
    owner = load_owner(config, Digests())
    assert owner.test is not None
    assert owner.test.labels is not None
    assert owner.test.labels.tolist() == [2]
    assert (owner.public.cut, owner.test.cut) == (1, 0)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line == f"{config.public_data}: 1 of 4 texts are longer than 12 tokens and are cut"
    assert owner.characters_per_token == (3 * 14 + 55) / (3 * 5 + 13)


def test_every_fault_of_a_file_is_named_at_the_start(config: ServerConfig) -> None:
    config.public_data.write_text("text;source\na;b\n;c\n;d\ne;f\n")
    with pytest.raises(
        DataError, match=r"2 of 4 rows .*public\.csv:3: the text is empty; public\.csv:4: the text"
    ) as caught:
        load_owner(config, Digests())
    assert "bad_rows" not in caught.value.remedy, "only a silo may go on without them"


def test_between_rounds_a_sample_of_the_test_data_stands_for_all_of_it(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(task: object, model: object, test: object, batch: int, chosen: torch.Tensor) -> Any:
        seen.append(chosen)
        return {"accuracy": 0.5}

    monkeypatch.setattr(rounds, "evaluate", evaluate)
    section = config.evaluation.model_copy(update={"samples_per_round": 20})
    run: Any = SimpleNamespace(
        config=config.model_copy(update={"evaluation": section, "seed": 7}),
        owner=SimpleNamespace(test=range(100), model=None),
        built=SimpleNamespace(proxy=SimpleNamespace(model=None)),
        record=Record(),
    )
    for number in (1, 2):
        rounds.Rounds._measure(run, number)
    assert len(seen) == 4
    assert all(torch.equal(each, sample(100, 20, 7, "test")) for each in seen), "the same in every round"
    assert int(seen[0].max()) >= 50
