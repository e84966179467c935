"""How memory grows with the data: images and texts of N and 4 N through a silo's way to its batches.

    python -m bench.datascale                       # 20,000 images, 0.4 GB of text
    python -m bench.datascale --images 100000 --gigabytes 10

Each case runs in a process of its own, all the way: the file is looked at, encoded, and one epoch of batches is made of
it, as a round makes them. Texts run twice: tokenised into the cache, and found there. Beside them stands what holds
everything: all images decoded into one tensor, all rows and tokens in memory; not where that
would take more than half of the machine's.

Peak memory is counted twice: all that is resident, mapped files with it, which the system takes back when it wants to;
and the anonymous part, which it cannot. Both are above what the imports take.
"""

import argparse
import json
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.measure import peak_resident_bytes, provenance, reset_peak
from fedpft.command import run_command
from fedpft.config import ColumnsSection
from fedpft.data import images, rows
from fedpft.data.batches import EncodedDataset, batches
from fedpft.data.images import ImageDataset, ImagePixels
from fedpft.data.samples import read_samples
from fedpft.machine import memory_bytes
from fedpft.tasks import TASKS

RESULT = Path(__file__).parent / "results" / "datascale.json"
LABELS = ("a", "b")
GROWTH = 4
IMAGE_SIDE = 64
PIXELS_SIDE = 112  # that a model sees
WORDS = 5000
WORDS_IN_TEXT = 150
MAX_TOKENS = 256
BATCH = 32
SAMPLED_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """One process.

    data: the data path.
    held_bytes: a file of texts up to this size is held in any case.
    cache: the file for token ids; None for images, and where all is held.
    """

    task: str
    way: str
    data: Path
    processor: Path
    held_bytes: int
    cache: Path | None = None


def measured(case: Case) -> dict[str, Any]:
    """Runs a case in this process."""
    torch.set_num_threads(1)  # a batch is small: several wait for each other, for milliseconds where a core is busy
    task, seconds = TASKS[case.task], dict[str, float]()  # type: ignore[index]
    processor = _processor(case)
    rows.HELD_BYTES = 1 << 60 if case.way == "held" else case.held_bytes
    images.HELD_BYTES = case.held_bytes
    reset_peak()
    with _anonymous() as anonymous:
        before, before_anonymous = peak_resident_bytes(), anonymous[0]
        with _timed(seconds, "look"):
            samples = read_samples(case.data, ColumnsSection(), task.forms, task.reader(LABELS))
        with _timed(seconds, "encode"):
            dataset = task.encode(samples, processor, MAX_TOKENS, cache=case.cache)
            if case.way == "held":
                dataset = _held(dataset)
        with _timed(seconds, "epoch"):
            sizes = [
                len(batch["labels"]) for batch in batches(dataset, batch=BATCH, start=0, count=len(dataset), seed=0)
            ]
    return {
        "task": case.task,
        "way": case.way,
        "samples": sum(sizes),
        "data_bytes": sum(file.stat().st_size for file in case.data.rglob("*"))
        if case.data.is_dir()
        else case.data.stat().st_size,
        "peak_bytes": peak_resident_bytes() - before,
        "peak_anonymous_bytes": anonymous[0] - before_anonymous,
        "seconds": seconds,
    }


def _held(dataset: EncodedDataset) -> EncodedDataset:
    if isinstance(dataset, ImageDataset) and isinstance(dataset.pixel_values, ImagePixels):
        parts = [dataset.pixel_values[part] for part in torch.arange(len(dataset)).split(BATCH)]
        return ImageDataset(torch.cat(parts), dataset.labels)
    return dataset


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - begun


@contextmanager
def _anonymous() -> Iterator[list[int]]:
    """Holds the most anonymous memory so far, looked at every few milliseconds."""
    most, done = [_anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLED_SECONDS):
            most[0] = max(most[0], _anonymous_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


# --- the data ---------------------------------------------------------------------------------------------------------


def write_images(directory: Path, count: int) -> Path:
    """A directory with one directory a label: JPEGs of IMAGE_SIDE pixels, a different one each."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = directory / LABELS[number % len(LABELS)] / f"{number:07d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 255, (IMAGE_SIDE // 8, IMAGE_SIDE // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((IMAGE_SIDE, IMAGE_SIDE)).save(place, quality=85)
    return directory


def write_texts(path: Path, size_bytes: int) -> Path:
    """JSON lines of about so many bytes."""
    generator, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < size_bytes:
            words = " ".join(f"word{number}" for number in generator.choices(range(WORDS), k=WORDS_IN_TEXT))
            written += file.write(json.dumps({"text": words, "label": generator.choice(LABELS)}) + "\n")
    return path


def write_processors(directory: Path) -> dict[str, Path]:
    """task -> where its processor is."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = {"image-classification": directory / "image", "sequence-classification": directory / "text"}
    side = {"height": PIXELS_SIDE, "width": PIXELS_SIDE}
    transformers.ViTImageProcessorPil(size=side).save_pretrained(found["image-classification"])
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *(f"word{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
    ).save_pretrained(found["sequence-classification"])
    return found


def _processor(case: Case) -> Any:
    import transformers

    kind = TASKS[case.task].processor  # type: ignore[index]
    return getattr(transformers, kind).from_pretrained(case.processor)


# --- all cases --------------------------------------------------------------------------------------------------------


def cases(
    root: Path, count: int, text_bytes: int, held_bytes: int, shares: Sequence[int] = (GROWTH, 1)
) -> Iterator[Case]:
    """Each one's data is made when it is its turn; of a kind of which there is to be nothing there are none."""
    processors = write_processors(root / "processors")
    for share in shares if count else ():
        directory = write_images(root / f"images-{share}", count // share)
        for way in _ways("on demand", held=2 * count // share * 3 * PIXELS_SIDE**2 * 4):
            yield Case("image-classification", way, directory, processors["image-classification"], held_bytes)
        shutil.rmtree(directory)
    for share in shares if text_bytes else ():
        path, cache = write_texts(root / f"{share}.jsonl", text_bytes // share), root / f"{share}.safetensors"
        for way in _ways("tokenised", "found", held=5 * text_bytes // share):
            kept = None if way == "held" else cache
            yield Case("sequence-classification", way, path, processors["sequence-classification"], held_bytes, kept)
        path.unlink()
        cache.unlink()


def _ways(*ways: str, held: int) -> tuple[str, ...]:
    """These, and to hold everything, in about so many bytes, if that can be."""
    return (*ways, "held") if held < memory_bytes() / 2 else ways


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """As Markdown."""
    lines = [
        "| data | way | samples | on disk | peak memory | of it anonymous | look s | encode s | epoch s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        sizes = (f"{row[key] / 2**20:,.0f} MiB" for key in ("data_bytes", "peak_bytes", "peak_anonymous_bytes"))
        times = (f"{row['seconds'][phase]:.1f}" for phase in ("look", "encode", "epoch"))
        kind = "images" if row["task"] == "image-classification" else "texts"
        lines.append("| " + " | ".join([kind, row["way"], f"{row['samples']:,}", *sizes, *times]) + " |")
    return lines


def main() -> int:
    """Measures, prints the table, and writes it with its provenance."""
    parser = argparse.ArgumentParser(prog="python -m bench.datascale", description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "--images", type=int, default=20_000, help="of the larger case; the smaller has a quarter; 0: none"
    )
    parser.add_argument("--gigabytes", type=float, default=0.4, help="of text, the same")
    parser.add_argument(
        "--held-mib",
        type=int,
        default=rows.HELD_BYTES >> 20,
        help="texts, and prepared images, up to this size are held",
    )
    parser.add_argument("--larger", action="store_true", help="the larger cases alone")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()

    def command() -> None:
        found: list[dict[str, Any]] = []
        held_bytes = arguments.held_mib << 20
        settings = {
            "image_side": IMAGE_SIDE,
            "pixels_side": PIXELS_SIDE,
            "words_in_text": WORDS_IN_TEXT,
            "batch": BATCH,
            "held_bytes": held_bytes,
        }
        results = {**provenance("cpu"), **settings, "rows": found}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.measure", "transformers"])
        with tempfile.TemporaryDirectory() as root:
            texts, shares = int(arguments.gigabytes * 1e9), (1,) if arguments.larger else (GROWTH, 1)
            for case in cases(Path(root), arguments.images, texts, held_bytes, shares):
                with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as child:
                    found.append(child.submit(measured, case).result())
                print("\n".join(table(found[-1:])[2 if len(found) > 1 else 0 :]), flush=True)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
