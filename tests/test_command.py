"""How a command ends: one line, an exit code, and for what nobody foresaw a file with the traceback."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedpft import faults
from fedpft.command import run_command
from fedpft.errors import DataError, FedPFTError, InternalFault, OutOfMemory

SECRET = "Mrs Miller, 1948"


def ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def fail() -> None:
        raise error

    code = run_command(fail)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


@pytest.fixture(autouse=True)
def _own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize(
    "error", [ValueError(f"row 3\n{SECRET}"), KeyError(SECRET), RecursionError(), AssertionError()]
)
def test_an_exception_that_nobody_foresaw_is_one_line_and_a_file_for_its_owner(
    error: Exception, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, line = ending(error, capsys)
    (path,) = tmp_path.glob("traceback-*.txt")
    assert code == InternalFault.exit_code
    assert line.startswith(f"error: a fault of fedpft itself: {type(error).__name__}; its traceback is in {path} -> ")
    assert SECRET not in line, "what an exception says may be data"
    assert path.stat().st_mode & 0o777 == 0o600
    kept = path.read_text()
    assert "in fail" in kept
    assert str(error) in kept


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("key", "lower"), [("work", "limits.max_batch"), ("out", "distillation.batch"), ("", "batch")])
def test_out_of_memory_says_what_to_lower(error: Exception, key: str, lower: str, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"^out of memory: ") as caught, faults.explaining(tmp_path, key):
        raise error
    assert lower in caught.value.remedy
    assert list(tmp_path.glob("traceback-*.txt"))


def test_torch_without_memory_is_out_of_memory(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory), faults.explaining(tmp_path, "work"):
        torch.empty(1 << 60)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE])
def test_a_disk_that_fails_is_named_and_leaves_no_traceback(number: int, tmp_path: Path) -> None:
    for error in (
        OSError(number, os.strerror(number), str(tmp_path / "x")),
        RuntimeError(f"I/O error: something (os error {number})"),  # as safetensors says it
    ):
        with pytest.raises(FedPFTError, match=os.strerror(number).lower()) as caught, faults.explaining(tmp_path):
            raise error
        assert type(caught.value) is FedPFTError
        assert str(tmp_path) in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_too_many_open_files_is_a_limit_to_raise(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = ending(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/x"), capsys)
    assert code == FedPFTError.exit_code
    assert "ulimit -n" in line


def test_a_traceback_that_cannot_be_kept_is_still_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("tempfile.mkstemp", full)
    code, line = ending(ValueError(SECRET), capsys)
    assert code == InternalFault.exit_code
    assert "its traceback could not be written anywhere" in line


def test_what_fails_while_tidying_up_does_not_hide_what_failed_before(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    def work() -> None:
        try:
            raise DataError("data.csv:3: no label", "add one")
        finally:
            with faults.tidying("the connection"):
                raise OSError(errno.EBUSY, "Device or resource busy")

    with pytest.raises(DataError):
        work()
    assert caplog.messages == ["the connection: could not be tidied up (Device or resource busy)"]


def test_a_reader_that_has_enough_ends_the_command_quietly() -> None:
    code = "import sys; from fedpft.command import run_command; sys.exit(run_command(lambda: print('x' * 1000000)))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141
