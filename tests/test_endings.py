"""A server and its silo in one process, and what each does when something breaks in the other, or in itself."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedpft import audit
from fedpft.config import ServerConfig, SiloConfig
from fedpft.errors import (
    ConfigError,
    FedPFTError,
    InternalFault,
    LedgerUnusable,
    OutOfMemory,
    QuorumLost,
    RefusedByServer,
)
from fedpft.server import run as server_run
from fedpft.server import service
from fedpft.server.run import run
from fedpft.silo import learner as silo_learner
from fedpft.silo import run as silo_run

SECRET = "Mrs Miller, 1948"
LONG_SECONDS = 60.0  # no test waits so long unless it fails
TEXTS = [f"the {color} {thing} moves" for color in ("red", "green") for thing in ("bird", "fish", "tree")]


@pytest.fixture
def config(fm_directory: Callable[[str], Path], tmp_path: Path) -> ServerConfig:
    (tmp_path / "labels.txt").write_text("\n".join(tiny.LABELS))
    (tmp_path / "public.csv").write_text("text\n" + "\n".join(TEXTS))
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(f"{text},sea" for text in TEXTS))
    values: dict[str, Any] = {
        "out": tmp_path / "out",
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "model": {"path": fm_directory("bert"), "labels": tmp_path / "labels.txt", "max_tokens": 12},
        "distillation": {"steps": 0, "closed_form_samples": 0},
        "alignment": {"every_rounds": 0},
        "training": {"rounds": 1, "batch": 4},
        "federation": {"silos": ["north"], "round_deadline_seconds": LONG_SECONDS},
        "public_data": tmp_path / "public.csv",
    }
    return ServerConfig.model_validate(values)


class Background:
    """A server in a thread of its own; the silo runs in the test's."""

    def __init__(self, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pool, self._monkeypatch, self._begin = pool, monkeypatch, service.FederationServer.start

    def start(self, config: ServerConfig) -> tuple["Future[Any]", str]:
        """The outcome to come, and the server's address."""
        address: Future[str] = Future()

        def started(server: service.FederationServer) -> str:
            address.set_result(self._begin(server))
            return address.result()

        self._monkeypatch.setattr(service.FederationServer, "start", started)
        outcome = self._pool.submit(run, config)
        outcome.add_done_callback(lambda _: address.done() or address.set_result("it ended before"))
        return outcome, address.result(LONG_SECONDS)


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    with ThreadPoolExecutor(1) as pool:
        yield Background(pool, monkeypatch)


def silo(tmp_path: Path, address: str, **changes: Any) -> SiloConfig:
    values = {
        "server": address,
        "insecure_loopback": True,
        "insecure_name": "north",
        "data": {"path": tmp_path / "data.csv"},
        "work": tmp_path / "work",
        "connect_timeout_seconds": 5.0,
    }
    return SiloConfig.model_validate(values | changes)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError(SECRET), InternalFault),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
    ],
)
def test_whatever_fails_in_a_silo_is_one_line_a_file_and_a_goodbye(
    error: Exception,
    kind: Any,
    config: ServerConfig,
    background: Background,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome, address = background.start(config)
    monkeypatch.setattr(silo_learner, "train_round", failing(error))
    with pytest.raises(kind) as caught:
        silo_run.run(silo(tmp_path, address))
    with pytest.raises(QuorumLost, match="north: it left; its own log says why"):
        outcome.result(LONG_SECONDS)
    (path,) = (tmp_path / "work").glob("traceback-*.txt")
    assert str(path) in caught.value.message
    assert SECRET not in str(caught.value)
    assert "train_round" in path.read_text()
    if kind is OutOfMemory:
        assert "limits.max_batch" in caught.value.remedy
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), "why it left stays here"


@pytest.mark.parametrize("error", [KeyError(SECRET), MemoryError()])
def test_whatever_fails_at_the_server_is_one_line_a_file_and_is_told_to_the_silos(
    error: Exception, config: ServerConfig, background: Background, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpft.server.outcome.aggregate", failing(error))
        outcome, address = background.start(config)
        with pytest.raises(
            RefusedByServer, match=f"broke the federation off: the server stopped: {type(error).__name__}"
        ):
            silo_run.run(silo(tmp_path, address))
        with pytest.raises(OutOfMemory if isinstance(error, MemoryError) else InternalFault) as caught:
            outcome.result(LONG_SECONDS)
    (path,) = (tmp_path / "out").glob("traceback-*.txt")
    assert str(path) in caught.value.message
    assert SECRET not in str(caught.value)
    if isinstance(error, MemoryError):
        assert "distillation.batch" in caught.value.remedy


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1),
        (LedgerUnusable("the ledger cannot be written", "make room"), 14),
    ],
    ids=["disk", "ledger"],
)
def test_silos_wait_for_a_server_whose_disk_is_full(
    error: Exception, exit_code: int, config: ServerConfig, background: Background, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedpft.server.outcome.aggregate", failing(error))
            outcome, address = background.start(config)
            waiting = pool.submit(silo_run.run, silo(tmp_path, address, connect_timeout_seconds=LONG_SECONDS))
            with pytest.raises(FedPFTError) as caught:
                outcome.result(LONG_SECONDS)
            assert caught.value.exit_code == exit_code
        outcome, _ = background.start(config.model_copy(update={"listen": address}))
        assert waiting.result(LONG_SECONDS) is None, "the same process goes on to the end"
        outcome.result(LONG_SECONDS)


def test_what_fails_in_the_farewell_does_not_hide_what_failed_before(
    config: ServerConfig, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.FederationServer, "wait_for_silos", failing(ValueError("the first")))
    monkeypatch.setattr(service.FederationServer, "abort", failing(OSError("the second")))
    outcome, _ = background.start(config)
    with pytest.raises(InternalFault, match="ValueError"):
        outcome.result(LONG_SECONDS)


@pytest.mark.parametrize("step", ["measure_worth", "save_product", "write_report", "_curves"])
def test_what_fails_after_the_last_round_is_done_again_without_the_silos(
    step: str, config: ServerConfig, background: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_run, step, failing(ValueError(SECRET)))
        outcome, address = background.start(config)
        silo_run.run(silo(tmp_path, address))
        with pytest.raises(InternalFault, match="ValueError"):
            outcome.result(LONG_SECONDS)
    monkeypatch.setattr(service, "FAREWELL_SECONDS", 0.0)  # nobody is there any more
    again, _ = background.start(config)
    assert len(again.result(LONG_SECONDS)["rounds"]) == 1
    assert (tmp_path / "out/merged/model.safetensors").exists()
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_stops_either_side_before_it_begins(
    device: str, config: ServerConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"device: {device}: "):
        silo_run.run(silo(tmp_path, "127.0.0.1:1", device=device))
    with pytest.raises(ConfigError, match=f"device: {device}: "):
        run(config.model_copy(update={"device": device}))
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()


def test_a_silo_that_was_stopped_takes_part_again_at_once(
    config: ServerConfig, background: Background, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The number that names the work directory stays the same, so that a silo that starts again takes over at once."""
    caplog.set_level(logging.INFO)
    outcome, address = background.start(config)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(silo_learner, "train_round", failing(KeyboardInterrupt()))
        silo_run.run(silo(tmp_path, address))
    silo_run.run(silo(tmp_path, address))
    assert len(outcome.result(LONG_SECONDS)["rounds"]) == 1
    assert "refused" not in [entry.event for entry in audit.read(tmp_path / "out/audit.jsonl")]
