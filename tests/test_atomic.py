"""Directories as they are: mounted, of somebody else, in the way, or on a file system that cannot do much."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fedpft import atomic
from fedpft.errors import ConfigError, DataError, FedPFTError


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
@pytest.mark.parametrize("step", ["rmdir", "unlink", "iterdir"])
def test_what_cannot_be_cleaned_up_does_not_hide_the_error_before(
    step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with atomic.locked(tmp_path / "out", "out"):
            monkeypatch.setattr(Path, step, failing(number))
            raise DataError("data.csv:3: no label", "add one")

    with pytest.raises(DataError, match="no label"):
        work()


def test_a_directory_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    for directory in (tmp_path / "mounted", tmp_path / "new"):
        with pytest.raises(DataError), atomic.locked(directory, "out"):
            raise DataError("data.csv:3: no label", "add one")
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]


def test_a_file_that_cannot_be_removed_does_not_hide_why_it_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with atomic.replacing(tmp_path / "x"):
            monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
            raise DataError("data.csv:3: no label", "add one")

    with pytest.raises(DataError, match="no label"):
        write()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_lock_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", failing(number))
    with pytest.raises(ConfigError, match="file system lacks") as caught, atomic.locked(tmp_path / "out", "out"):
        pass
    assert caught.value.remedy == "give `out` a directory on a local disk"


@pytest.mark.parametrize(("call", "number"), [("os.fsync", errno.EINVAL), ("os.replace", errno.ENOSYS)])
def test_a_file_system_that_cannot_sync_or_rename_is_named_at_the_start(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, failing(number))
    with pytest.raises(ConfigError, match="file system lacks"), atomic.locked(tmp_path / "work", "work"):
        pytest.fail("it was let in")


def test_a_full_disk_is_no_fault_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", failing(errno.ENOSPC))
    with pytest.raises(FedPFTError, match="no space left") as caught, atomic.locked(tmp_path / "work", "work"):
        pytest.fail("it was let in")
    assert type(caught.value) is FedPFTError


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("file", "out: is not a directory"),
        ("below a file", "out: is not a directory"),
        ("link to nowhere", "out: is a link to nowhere"),
        ("below a link to nowhere", "out: is a link to nowhere"),
        ("loop", "out: is a link to nowhere"),
    ],
)
def test_what_is_in_the_way_of_a_directory_is_named(kind: str, says: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if "file" in kind:
        out.write_text("")
    else:
        out.symlink_to(out if kind == "loop" else tmp_path / "nowhere")
    asked = out / "a" / "b" if kind.startswith("below") else out
    with pytest.raises(ConfigError, match=says), atomic.locked(asked, "out"):
        pass


@pytest.mark.parametrize("step", ["mkdir", "open"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_directory_that_cannot_be_made_or_written_to_is_named(
    step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, step, failing(number))
    says = f"out: cannot be written to .{os.strerror(number)}"
    with pytest.raises(ConfigError, match=says) as caught, atomic.locked(tmp_path / "out", "out"):
        pass
    assert "`out`" in caught.value.remedy


def test_a_directory_in_use_is_no_reason_for_another_directory_alone(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with atomic.locked(work, "work"), pytest.raises(ConfigError, match="in use by") as caught, atomic.locked(work, "x"):
        pass
    assert caught.value.remedy.startswith("stop that one;")


def test_bytes_are_written_where_the_advice_on_them_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.posix_fadvise", failing(errno.EINVAL))
    with (tmp_path / "x").open("wb") as file:
        atomic.release(file.fileno())
