"""Files by their content: hashed again exactly when the file system says that they may be others."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpft import digests
from fedpft.digests import UNREADABLE, Digests, combined, differences


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []
    real = hashlib.file_digest

    def counting(file: Any, kind: str) -> Any:
        names.append(Path(file.name).name)
        return real(file, kind)

    monkeypatch.setattr(digests.hashlib, "file_digest", counting)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are old enough at once."""
    monkeypatch.setattr(digests, "SETTLED_NS", -1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model").write_bytes(b"weights")
    return tmp_path / "model"


def test_a_digest_is_the_sha256_of_the_content(file: Path) -> None:
    assert Digests().of_file(file) == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once_in_a_process(file: Path, hashed: list[str]) -> None:
    found = Digests()
    assert found.of_file(file) == found.of_file(file)
    assert hashed == ["model"]


@pytest.mark.usefixtures("settled")
def test_a_file_is_not_read_again_by_the_next_process(file: Path, hashed: list[str], tmp_path: Path) -> None:
    first = Digests(tmp_path / "cache.json")
    digest = first.of_file(file)
    first.save()
    assert Digests(tmp_path / "cache.json").of_file(file) == digest
    assert hashed == ["model"]


def test_a_file_that_was_just_written_is_not_trusted_by_the_next_process(
    file: Path, hashed: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        found = Digests(tmp_path / "cache.json")
        found.of_file(file)
        found.save()
    assert hashed == ["model", "model"]


def rewritten(path: Path) -> None:
    path.write_bytes(b"WEIGHTS")


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"WEIGHTS")
    os.replace(other, path)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [rewritten, replaced])
@pytest.mark.parametrize("same_process", [True, False])
def test_other_content_of_the_same_size_and_mtime_is_noticed(
    change: Callable[[Path], None], same_process: bool, file: Path, tmp_path: Path
) -> None:
    found = Digests(tmp_path / "cache.json")
    before, times = found.of_file(file), file.stat()
    found.save()
    while file.stat().st_ctime_ns == times.st_ctime_ns:  # until the file system's clock has ticked
        change(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync -t and a restored backup do
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert (found if same_process else Digests(tmp_path / "cache.json")).of_file(file) != before


def test_other_content_within_one_tick_of_the_clock_is_noticed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_signature", lambda status: (status.st_size, status.st_mtime_ns // 10**11, 0, 1))
    monkeypatch.setattr(digests, "SETTLED_NS", 1 << 62)
    found = Digests(tmp_path / "cache.json")
    before = found.of_file(file)
    found.save()
    rewritten(file)
    assert before not in (found.of_file(file), Digests(tmp_path / "cache.json").of_file(file))


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-10],
        lambda text: "[]",
        lambda text: '{"files": 1}',
        lambda text: "[" * 100_000,
        lambda text: text.replace(hashlib.sha256(b"weights").hexdigest(), hashlib.sha256(b"other").hexdigest()),
    ],
)
def test_a_damaged_cache_is_as_good_as_none(
    damage: Callable[[str], str], file: Path, tmp_path: Path, hashed: list[str]
) -> None:
    cache = tmp_path / "cache.json"
    found = Digests(cache)
    found.of_file(file)
    found.save()
    cache.write_text(damage(cache.read_text()))
    assert Digests(cache).of_file(file) == hashlib.sha256(b"weights").hexdigest()
    assert len(hashed) == 2


@pytest.mark.usefixtures("settled")
def test_the_cache_holds_what_was_asked_for_alone(file: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").write_bytes(b"x")
    first = Digests(tmp_path / "cache.json")
    first.of_file(tmp_path / "gone")
    first.save()
    second = Digests(tmp_path / "cache.json")
    second.of_file(file)
    second.save()
    assert list(json.loads((tmp_path / "cache.json").read_text())["files"]) == [str(file)]


def test_what_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = Digests()
    assert {found.of_file(path) for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe")} == {UNREADABLE}
    assert found.of_directory(tmp_path / "nowhere") == {}


def test_a_directory_is_known_by_its_files_names_and_content(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory / "sub").mkdir(parents=True)
        (tmp_path / directory / "sub" / "x").write_bytes(b"1")
        (tmp_path / directory / "y").write_bytes(b"2")
    found = Digests()
    assert found.of_directory(tmp_path / "a") == found.of_directory(tmp_path / "b")
    assert sorted(found.of_directory(tmp_path / "a")) == ["sub/x", "y"]
    assert sorted(found.of_directory(tmp_path / "a", lambda name: name.name != "y")) == ["sub/x"]
    before = combined(found.of_directory(tmp_path / "a"))
    os.rename(tmp_path / "a" / "y", tmp_path / "a" / "z")
    assert combined(found.of_directory(tmp_path / "a")) != before


def test_many_files_have_one_digest_in_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode())
    found = Digests()
    before = found.of_files(paths)
    assert found.of_files(paths[::-1]) != before
    paths[1].unlink()
    assert found.of_files(paths) not in (before, found.of_files(paths[:1]))


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ({"a": "1"}, {"a": "1"}, ""),
        ({"a": "1", "b": "1"}, {"a": "2", "b": "1"}, "a was changed"),
        ({"a": "1"}, {}, "a is gone"),
        ({"a": "1"}, {"a": UNREADABLE}, "a is gone"),
        ({}, {"a": "1"}, "a was added"),
        ({"": "1"}, {"": "2"}, "it was changed"),
        (
            dict.fromkeys("abcde", "1"),
            {"a": "2", "z": "1"},
            "a was changed, b is gone, c is gone and 3 more",
        ),
    ],
)
def test_differences_are_named(before: dict[str, str], after: dict[str, str], text: str) -> None:
    assert differences(before, after, whole="it") == text
