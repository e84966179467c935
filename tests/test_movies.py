"""The demo with MPNet-base: who gets which sentences, and that its model is put together."""

import importlib.metadata
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from fedpft.config import ColumnsSection
from fedpft.data.samples import read_label_list
from fedpft.demo import movies
from fedpft.demo.corpora import DemoData
from fedpft.errors import DataError
from fedpft.tasks import TASKS

SILOS = ("north", "south", "east")
SIZES = {"sentences": 20, "test_sentences": 8, "public_sentences": 30}


def write_archive(directory: Path, sentences: int) -> None:
    """The sentences' archive, with so many of each domain; further rows are without a sign, or there already."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in movies.DOMAINS.values():
            lines = [f"{n}\t{2.5 if n % 2 else -1.5}\t{name} sentence {n}" for n in range(sentences)]
            lines += ["8\t0.2\tneither", f"9\t-2.0\t{name} sentence 1"]
            content = "\r\n".join(lines).encode()
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(directory / f"{movies.SENTENCES}.zip", "w") as file:
        file.writestr(f"{movies.SENTENCES}/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())


def write_slices(directory: Path) -> dict[str, Path]:
    """A model's archive in slices, as their packages have them: distribution -> file."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("all-mpnet-base-v2/config.json", '{"model_type": "mpnet"}')
        file.writestr("all-mpnet-base-v2/desktop.ini", "no part of it")
        file.writestr("all-mpnet-base-v2/1_Pooling/config.json", "another")
    content, written = whole.getvalue(), {}
    for number, name in enumerate(movies.SLICES, 1):
        written[name] = directory / name / "input" / f"all-mpnet-base-v2.zip.{number:03d}"
        written[name].parent.mkdir(parents=True)
        written[name].write_bytes(content[len(content) * (number - 1) // 5 : len(content) * number // 5])
    return written


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoData:
    written = write_slices(tmp_path / "installed")
    monkeypatch.setattr(movies, "installed_file", lambda name, _file, _remedy: written[name])
    monkeypatch.setattr(movies, "SHARED", tmp_path)
    write_archive(tmp_path, 40)
    return movies.prepare(tmp_path / "out", silos=SILOS, **SIZES, concentration=5.0, seed=0)


def test_films_are_dealt_out_and_what_is_public_is_of_other_things(data: DemoData) -> None:
    columns, task, labels = ColumnsSection(), TASKS["sequence-classification"], read_label_list(data.labels)
    assert labels == ("negative", "positive")
    parts = [task.read_labelled(path, columns, labels) for path in (*data.silos.values(), data.test)]
    assert sum(len(part["text"]) for part in parts[:-1]) == 20
    assert len(parts[-1]["text"]) == 8
    labelled = [(text, label) for part in parts for text, label in zip(part["text"], part["label"], strict=True)]
    for text, label in labelled:
        assert text.startswith("movieReviewSnippets sentence")
        assert label == ("positive" if int(text.split()[-1]) % 2 else "negative"), "the first of equal sentences counts"
    assert len({text for text, _ in labelled}) == 28
    public = task.read_public(data.public, columns)["text"]
    assert len(set(public)) == 30
    assert not [text for text in public if text.startswith("movie") or text == "neither"]


def test_the_same_seed_gives_the_same_files(data: DemoData, tmp_path: Path) -> None:
    for seed in (0, 1):
        again = movies.prepare(tmp_path / str(seed), silos=SILOS, **SIZES, concentration=5.0, seed=seed)
        for one, other in ((again.test, data.test), (again.public, data.public)):
            assert (one.read_bytes() == other.read_bytes()) is (seed == 0)


def test_asking_for_too_many_is_refused(data: DemoData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="film reviews has 40 different samples, not 41"):
        movies.prepare(tmp_path / "more", silos=SILOS, **(SIZES | {"sentences": 33}), concentration=5.0, seed=0)


def test_the_model_is_joined_from_its_slices_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_slices(tmp_path / "installed")

    class Installed(importlib.metadata.PackagePath):
        def locate(self) -> Path:
            return Path(self)

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [Installed(written[name])])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = movies.model_directory()
    assert [path.name for path in made.iterdir()] == ["config.json"]
    assert json.loads((made / "config.json").read_text(encoding="utf-8")) == {"model_type": "mpnet"}
    (made / "config.json").write_text("as it was left", encoding="utf-8")
    assert (movies.model_directory() / "config.json").read_text(encoding="utf-8") == "as it was left"
    assert [path.name for path in made.parent.iterdir()] == [made.name], "nothing half-made beside it"


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"vaderSentiment-0\.5\.zip is not there") as caught:
        movies.read(tmp_path, "movies")
    assert f"--dest {tmp_path} vaderSentiment==0.5" in caught.value.remedy
    monkeypatch.setattr(movies, "SLICES", ["nobody-has-this"])
    with pytest.raises(DataError, match="nobody-has-this is not installed") as caught:
        movies.prepare(tmp_path / "out", silos=SILOS, **SIZES, concentration=5.0, seed=0)
    assert "requirements-movies.txt" in caught.value.remedy
    assert "--news" in caught.value.remedy


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_an_archive_that_is_torn_is_named(keep: float, tmp_path: Path) -> None:
    write_archive(tmp_path, 40)
    path = tmp_path / f"{movies.SENTENCES}.zip"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match=r"vaderSentiment-0\.5\.zip: cannot be read") as caught:
        movies.read(tmp_path, "movies")
    assert caught.value.remedy.startswith("remove it")


def test_an_archive_with_a_spoiled_byte_is_named(tmp_path: Path) -> None:
    write_archive(tmp_path, 40)
    path = tmp_path / f"{movies.SENTENCES}.zip"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        movies.read(tmp_path, "movies")


@pytest.mark.parametrize("spoiled", [b"", b"mpnet", None], ids=["empty", "other", "a byte of the model"])
def test_slices_that_make_no_archive_are_named(
    spoiled: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_slices(tmp_path)
    first, last = written[movies.SLICES[0]], written[movies.SLICES[-1]]
    if spoiled is None:
        first.write_bytes(first.read_bytes().replace(b"model_type", b"model_tipe"))
    else:
        last.write_bytes(spoiled)
    monkeypatch.setattr(movies, "installed_file", lambda name, _file, _remedy: written[name])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"\.zip\.001 and the slices after it make no archive"):
        movies.model_directory()
    assert not list((tmp_path / "cache").rglob("all-mpnet*"))
