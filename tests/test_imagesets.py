"""Images that stay on disk: decoded when a batch wants them, from files, directories of labels and shards."""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn

from fedpft.config import AdapterSection, ColumnsSection, LimitsSection, RoundSettings, TrainingSection
from fedpft.data import images as data_images
from fedpft.data.batches import batches, evaluation_batches
from fedpft.data.images import ImageDataset, ImageFile, ImagePixels, open_image
from fedpft.data.partition import write_split
from fedpft.data.samples import Examination, Samples, image_paths, read_samples, silo_files
from fedpft.errors import ConfigError, DataError
from fedpft.model import adapters
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select
from fedpft.silo.ondisk import DataOnDisk
from fedpft.tasks import FORMS, TASKS
from fedpft.training import train_round

TASK, COLUMNS, LABELS = TASKS["image-classification"], ColumnsSection(), ("cat", "dog")
COUNT = 23
Make = Callable[[], ImageDataset]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def read(path: Path, labels: Sequence[str] = LABELS, **more: Any) -> Samples:
    return read_samples(path, COLUMNS, TASK.forms, TASK.reader(labels), **more)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of COUNT images, in files beside it."""
    for number in range(COUNT):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [f"{number}.png,{LABELS[number % 3 == 0]}\n" for number in range(COUNT)]
    (tmp_path / "data.csv").write_text("image,label\n" + "".join(rows))
    return tmp_path / "data.csv"


def lazy(path: Path) -> ImageDataset:
    dataset = TASK.encode(read(path), tiny.processor("vit"), 1)
    assert isinstance(dataset, ImageDataset)
    assert isinstance(dataset.pixel_values, ImagePixels)
    return dataset


def whole(path: Path) -> ImageDataset:
    """The oracle: all of them decoded into one tensor."""
    samples, processor = read(path), tiny.processor("vit")
    pixels = [
        processor(images=open_image(str(image)).image, return_tensors="pt")["pixel_values"][0].float()
        for image in samples["image"]
    ]
    return ImageDataset(torch.stack(pixels), torch.tensor(samples.targets))


@pytest.fixture(params=[(1, 1), (4, 5), (3, 1000)], ids=str)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many decode, and how many images ahead."""
    count, ahead = request.param
    monkeypatch.setattr(data_images.torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(data_images, "AHEAD", ahead)


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(tiny.same_bits(ours[name], theirs[name]) for name in ours)


# --- decoded when they are wanted -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("start", "count"), [(0, COUNT), (11, 3 * COUNT + 5)])  # the same image twice in the air
def test_batches_are_those_of_images_held_whole(table: Path, start: int, count: int) -> None:
    ours, theirs = (
        list(batches(data, batch=4, start=start, count=count, seed=3)) for data in (lazy(table), whole(table))
    )
    assert len(ours) == len(theirs) == -(-count // 4)
    assert all(same(*pair) for pair in zip(ours, theirs, strict=True))
    ours, theirs = (list(evaluation_batches(data, 5)) for data in (lazy(table), whole(table)))  # type: ignore[misc]
    assert all(torch.equal(a[0], b[0]) and same(a[1], b[1]) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("threads")
def test_adapter_is_that_of_images_held_whole_also_from_the_middle_of_an_epoch(
    table: Path, make_fm: Callable[[str], nn.Module]
) -> None:
    training = TrainingSection(rounds=3, batch=4, local_epochs=0.7)
    settings = RoundSettings(adapter=AdapterSection(rank=2, alpha=6.0), training=training, inactive_below=0.1, seed=0)
    fm, found = make_fm("vit"), []
    for data in (whole(table), lazy(table)):
        model = cut(fm, select(fm, tiny.by_weights()))
        adapters.attach(model, settings.adapter, seed=0)
        for round in (2, 3):  # a process that was started again: it never saw round 1
            result = train_round(
                TASK,
                model,
                data,
                settings,
                silo="north",
                round=round,
                compressed=(),
                count_inactivity=False,
                limits=LimitsSection(max_batch=3),
            )
        found.append(result.adapter)
    assert tiny.changed(*found) == set()


def test_images_are_prepared_before_their_batch_is_asked_for(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_images, "AHEAD", 8)
    prepared = threading.Semaphore(0)

    def prepare(image: Image.Image) -> Tensor:
        prepared.release()
        return torch.zeros(3, 2, 2)

    images = read(table)["image"]
    pixels = ImagePixels(images, prepare)
    lots = pixels.ahead(iter(torch.arange(COUNT).split(4)))
    next(lots)
    for _ in range(12):  # its own four and eight more, none of which was asked for
        assert prepared.acquire(timeout=30)
    lots.close()  # type: ignore[attr-defined]
    assert not pixels._begun, "nobody waits for them any more"
    assert pixels[torch.tensor([5, 5, 0])].shape == (3, 3, 2, 2)


def test_an_image_that_fails_ends_its_own_batch_and_no_earlier_one(table: Path) -> None:
    failing = open_image(table.parent / "9.png").image.tobytes()

    def prepare(image: Image.Image) -> Tensor:
        if image.tobytes() == failing:
            raise RuntimeError("nine")
        return torch.zeros(3, 2, 2)

    made = evaluation_batches(ImageDataset(ImagePixels(read(table)["image"], prepare), None), 4)
    assert [next(made)[0].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(RuntimeError, match="nine"):
        next(made)


@pytest.mark.parametrize("change", ["other", "cut", "gone"])
def test_an_image_that_changed_since_it_was_looked_at_is_named(change: str, table: Path) -> None:
    data, image = lazy(table), table.parent / "9.png"
    match change:
        case "other":
            image.write_bytes(png(99))
        case "cut":
            image.write_bytes(png(9)[:-30])
        case "gone":
            image.unlink()
    what = "cannot be read" if change == "gone" else "changed since it was looked at"
    assert len(data.batch(torch.arange(9))["labels"]) == 9
    with pytest.raises(DataError, match=rf"image .*9\.png {what}") as raised:
        data.batch(torch.arange(12))
    assert raised.value.remedy


def test_an_image_that_was_written_anew_with_the_same_bytes_is_the_same(table: Path) -> None:
    data, image = lazy(table), table.parent / "9.png"
    image.unlink()
    image.write_bytes(png(9))
    assert same(data.batch(torch.arange(COUNT)), whole(table).batch(torch.arange(COUNT)))


# --- a directory with one directory a label ---------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """cat/0 2 deep/4, dog/1 3, and what else lies about."""
    root = tmp_path / "photos"
    for number, name in enumerate(("cat/0.png", "dog/1.PNG", "cat/2.png", "dog/3", "cat/deep/4.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    for name in ("LICENSE", "labels.txt", ".hidden", "cat/.DS_Store", "dog/Thumbs.db"):
        (root / name).write_bytes(b"no image")
    return root


def test_a_directory_gives_the_images_their_labels(directory: Path) -> None:
    samples = read(directory)
    names = [Path(image.path).relative_to(directory).as_posix() for image in samples["image"]]
    assert names == ["cat/0.png", "cat/2.png", "cat/deep/4.png", "dog/1.PNG", "dog/3"]
    assert (samples["label"], samples.targets) == (["cat"] * 3 + ["dog"] * 2, [0, 0, 0, 1, 1])
    assert Examination(directory, COLUMNS, FORMS, first_counts=False).form == ("image", "label")
    public = TASK.read_public(directory, COLUMNS)
    assert (len(public), public.targets) == (5, None)


def test_faults_in_a_directory_name_their_files(directory: Path) -> None:
    (directory / "dog/3").write_bytes(b"no image")
    (directory / "stray.png").write_bytes(png(5))
    (directory / "bird").mkdir()
    (directory / "bird/6.png").write_bytes(png(6))
    with pytest.raises(DataError, match="3 of 7 rows") as raised:
        read(directory)
    for place, what in (
        ("bird/6.png", "label 'bird' is not in the server's label list"),
        ("dog/3", "image .* cannot be read"),
        ("stray.png", "stands in no label's directory"),
    ):
        assert pytest.approx(1) == len([1 for part in raised.value.message.split("; ") if place in part])
        raised.match(rf"{place}: {what}")
    samples = read(directory, bad_rows="skip")
    assert (len(samples), samples.skipped) == (4, 3)


def test_a_directory_is_no_table_for_another_task(directory: Path) -> None:
    text = TASKS["sequence-classification"]
    with pytest.raises(DataError, match="photos: holds images, and text with label is asked for"):
        read_samples(directory, COLUMNS, text.forms, text.reader(LABELS))
    with pytest.raises(DataError, match=r"0\.png: a directory of images says nothing of 'group'"):
        read(directory, group="ward", bad_rows="refuse")


def test_a_label_that_gets_another_name_is_a_change_of_the_data(directory: Path) -> None:
    data = DataOnDisk(directory)
    assert image_paths(directory, COLUMNS) == []
    assert data.changed() is None
    (directory / "dog").rename(directory / "wolf")
    with pytest.raises(DataError, match="changed while it was read"):
        data.check_read()
    assert data.changed() is not None


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos/cat").mkdir(parents=True)
    with pytest.raises(DataError, match="photos: holds no image"):
        read(tmp_path / "photos")


# --- shards -----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.type = len(content), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(entry, io.BytesIO(content))
    return path


def row(key: str, seed: int, **others: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(seed)), *((f"{key}.{kind}", content) for kind, content in others.items())]


def test_shards_give_the_same_batches_as_files(table: Path, tmp_path: Path) -> None:
    labels = read(table)["label"]
    rows = [row(f"train/{number:03d}", number, cls=label.encode()) for number, label in enumerate(labels)]
    for shard in range(2):
        members = [member for each in rows[shard * 12 : shard * 12 + 12] for member in each]
        write_shard(tmp_path / "shards" / f"{shard}.tar", [("._0.png", b""), ("train/", b""), *members])
    one, two = whole(table), lazy(tmp_path / "shards")
    assert len(two) == COUNT
    assert same(one.batch(torch.arange(COUNT).flip(0)), two.batch(torch.arange(COUNT).flip(0)))


@pytest.mark.parametrize(
    "others",
    [
        {"cls": b"dog\n"},
        {"txt": b" dog "},
        {"cls": b"dog", "txt": b"a photo of a dog"},
        {"json": b'{"label": "dog", "width": 7}'},
        {"json": b'{"width": 7}', "txt": b"dog"},
    ],
)
def test_the_label_stands_in_any_of_the_members(others: dict[str, bytes], tmp_path: Path) -> None:
    samples = read(write_shard(tmp_path / "a.tar", row("0", 0, **others)))
    assert samples.targets == [1]
    assert samples["image"][0].size == len(png(0))


def test_a_column_by_which_rows_are_dealt_out_stands_in_the_json(tmp_path: Path) -> None:
    content = json.dumps({"label": "dog", "ward": 7}).encode()
    shard = write_shard(tmp_path / "a.tar", row("0", 0, json=content))
    assert read(shard, group="ward").groups == ["7"]
    with pytest.raises(ConfigError, match=r"a\.tar: holds images that no row of a table can name"):
        write_split(read(shard), {"north": torch.tensor([0])}, tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.cls", b"dog")], "0: there is no image among cls"),
        (row("0", 0), "0.png: there is no label among png"),
        (row("0", 0, cls=b"\xff"), "0.png: 0.cls is not UTF-8"),
        (row("0", 0, cls=b"bird"), "0.png: label 'bird' is not in the server's label list"),
        (row("0", 0, json=b"{"), r"0.png: 0.json is malformed JSON"),
        (row("0", 0, json=b"[]"), "0.png: 0.json is not a JSON object"),
        ([("0.png", b"x"), ("0.cls", b"dog")], "0.png: image .*a.tar:0.png cannot be read"),
        ([*row("0", 0, jpg=b""), ("0.cls", b"dog")], "0: there are several members of one kind"),
        ([*row("1", 1, cls=b"dog"), *row("0", 0), *row("2", 2, cls=b"dog"), ("0.cls", b"dog")], "0: members of other"),
    ],
)
def test_faults_in_a_shard_name_the_member(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [*members, *row("good", 7, cls=b"cat")])
    with pytest.raises(DataError, match=f"a.tar:{message}"):
        read(shard)
    assert len(read(shard, bad_rows="skip")) in (1, 3)


@pytest.mark.parametrize("damage", ["cut", "gzipped", "text", "empty"])
def test_a_damaged_shard_is_a_fault_of_the_file(damage: str, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", row("0", 0, cls=b"cat"))
    match damage:
        case "cut":
            shard.write_bytes(shard.read_bytes()[:600])
        case "gzipped":
            with tarfile.open(shard, "w:gz") as archive:
                archive.addfile(tarfile.TarInfo("0.png"))
        case "text":
            shard.write_text("image,label\n" * 100)
        case "empty":
            shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar: cannot be read as a shard") as raised:
        read(shard)
    assert "not compressed" in raised.value.remedy


def test_a_member_that_was_overwritten_since_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [*row("0", 0, cls=b"cat"), *row("1", 1, cls=b"dog")])
    data = lazy(shard)
    write_shard(shard, [*row("0", 0, cls=b"cat"), *row("1", 5, cls=b"dog")])
    assert len(data.batch(torch.tensor([0]))["labels"]) == 1
    with pytest.raises(DataError, match=r"image .*a\.tar:1\.png changed since it was looked at"):
        data.batch(torch.tensor([1]))


def test_each_simulated_silo_may_have_a_shard(tmp_path: Path) -> None:
    for name in ("north", "south"):
        write_shard(tmp_path / f"{name}.tar", row("0", 0, cls=b"cat"))
    assert [path.stem for path in silo_files(tmp_path)] == ["north", "south"]


def test_where_a_member_stands_is_said_as_tar_says_it() -> None:
    assert str(ImageFile("a.tar", "b/0.png", 512, 9)) == "a.tar:b/0.png"
