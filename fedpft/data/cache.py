"""What was tokenised: into memory, or into a file that the next start maps in place of tokenising again.

The file is of the safetensors format, with the tensors of longest elements first. Its metadata are

    key     what the tensors were made of (:func:`key_of`); a file with another one is as good as none
    counts  JSON, whole numbers that belong to them
    sha256  of all bytes of the tensors

Mapped tensors take memory only for what is being looked at, which the system may take back at any time.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedpft import atomic
from fedpft.digests import combined

log = logging.getLogger(__name__)

FORMAT = "1"  # another one for whatever would make other tensors of the same samples
LIBRARIES = ("transformers", "tokenizers")  # whose versions may split texts otherwise
PASSING = ("truncation", "padding")  # in tokenizer.json: what the last call asked for
NAMES = {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}  # of the types, in safetensors
COPIED_AT_ONCE = 8 << 20

Add = Callable[..., None]


@dataclass(frozen=True)
class Kept:
    """Tensors by name, (sum of their pieces,) each, and whole numbers about them."""

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, int]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def keep(
    cache: Path | None, key: Callable[[], str], types: Mapping[str, torch.dtype], make: Callable[[Add], dict[str, int]]
) -> Kept:
    """Makes tensors piece by piece, or finds them as they were made before.

    Args:
        cache: the file for them, written whole or not at all; None: they stay in memory.
        key: of what they are made of; asked for only with a file.
        types: of the tensors, by name.
        make: is given a function that takes the next pieces by name, (m,) each; returns the counts.
    """
    if cache is None:
        pieces: dict[str, list[Tensor]] = {name: [torch.empty(0, dtype=kind)] for name, kind in types.items()}

        def collect(**added: Tensor) -> None:
            for name, piece in added.items():
                pieces[name].append(piece.to(types[name]))

        counts = make(collect)
        return Kept({name: torch.cat(each) for name, each in pieces.items()}, counts)
    wanted = key()
    found = _read(cache, wanted, types)
    if found is None:
        _write(cache, wanted, types, make)
        found = _read(cache, wanted, types)
        assert found is not None, "it was written just now"
    return found


def key_of(values: Iterable[Any], tokenizer: Any, **settings: Any) -> str:
    """The digest of whatever tensors are made of.

    Args:
        values: whatever JSON can say, of each sample in their order.
    """
    known = {name: version(name) for name in LIBRARIES}
    made_by = [FORMAT, known, _fingerprint(tokenizer), settings]
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode())
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


def _fingerprint(tokenizer: Any) -> str:
    """The digest of the files that a tokenizer is saved as."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = {}
        for file in sorted(Path(directory).iterdir()):
            content = file.read_bytes()
            if file.name == "tokenizer.json":
                values = {name: value for name, value in json.loads(content).items() if name not in PASSING}
                content = json.dumps(values).encode()
            files[file.name] = hashlib.sha256(content).hexdigest()
    return combined(files)


# --- the file ---------------------------------------------------------------------------------------------------------


def _read(cache: Path, key: str, types: Mapping[str, torch.dtype]) -> Kept | None:
    """What it holds, mapped; None, with a line in the log, if that is not what is wanted."""
    if not cache.exists():
        return None
    try:
        with safe_open(cache, "pt") as file:
            said = file.metadata() or {}
            if said.get("key") != key:
                log.info("%s: is of other data, another tokenizer or other settings: made anew", cache)
                return None
            tensors = {name: file.get_tensor(name) for name in types}
        if said["sha256"] != _digest(cache) or any(tensors[name].dtype != kind for name, kind in types.items()):
            raise ValueError("its digest is another")
        return Kept(tensors, json.loads(said["counts"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        log.info("%s: is damaged (%s): made anew", cache, " ".join(str(error).split()))
        return None


def _digest(cache: Path) -> str:
    with cache.open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), 1)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(cache: Path, key: str, types: Mapping[str, torch.dtype], make: Callable[[Add], dict[str, int]]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    longest_first = sorted(types, key=lambda name: (-types[name].itemsize, name))
    with ExitStack() as stack:
        # They have no name, so that a process that is killed leaves nothing.
        streams = {name: stack.enter_context(tempfile.TemporaryFile(dir=cache.parent)) for name in longest_first}

        def append(**added: Tensor) -> None:
            for name, piece in added.items():
                streams[name].write(piece.to(types[name]).numpy().tobytes())

        counts = make(append)
        digest, header, end = hashlib.sha256(), dict[str, Any](), 0
        for name, stream in streams.items():
            start, end = end, end + stream.tell()
            header[name] = {
                "dtype": NAMES[types[name]],
                "shape": [(end - start) // types[name].itemsize],
                "data_offsets": [start, end],
            }
            stream.seek(0)
            while block := stream.read(COPIED_AT_ONCE):
                digest.update(block)
        header["__metadata__"] = {"key": key, "counts": json.dumps(counts), "sha256": digest.hexdigest()}
        with atomic.replacing(cache) as path, path.open("wb") as file:
            _write_header(file, header)
            for stream in streams.values():
                stream.seek(0)
                shutil.copyfileobj(stream, file, COPIED_AT_ONCE)
                atomic.release(file.fileno())


def _write_header(file: IO[bytes], header: Mapping[str, Any]) -> None:
    """Its length, and the JSON, to a multiple of 8 bytes."""
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)
