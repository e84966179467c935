"""What a silo keeps on disk, so that it can be stopped or killed at any point: the directory `work` of silo.yaml.

    lock                            held while a silo runs here
    id                              made up at random, by which the server tells one work directory from another
    audit.jsonl                     what left and what arrived (fedpft/audit.py); never deleted
    federation.json                 which federation the following belongs to, and its settings
    proxy-<digest>/                 the proxy as it was when the federation began
    cache/tokens.safetensors        the data's token ids (fedpft/data/cache.py); made anew if it is not there
    incoming/<sha256>.part          files on their way in
    received/<sha256>.safetensors   adapter and patch that the present round starts from
    update.json                     of the last update; the files next to it are there whole as long as it is
    update.safetensors              the last update
    update-residual.safetensors     what was rounded off it
    residual-<round>.safetensors    the same, of the last update that counted: goes into the next one
    vector.safetensors              with secure aggregation what was sent in its place: the update under masks
    opened.json                     of which silos this one last helped to open a sum
    entered.json                    with silo_privacy what this silo last put into sums, and the key of its noise

An update is complete here before the server hears of it, so that a silo that is killed later offers the same bytes
again. Only once the update counts does its residual take the place of the former one.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedpft import atomic
from fedpft.config import RoundSettings, SecureTerms, ShareSection
from fedpft.errors import CheckpointError
from fedpft.silo.connection import Enrolment
from fedpft.wire import transfer
from fedpft.wire.tensors import Group, TensorFile, read_tensors, write_tensors
from fedpft.wire.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Joined(_Record):
    """The federation that this silo takes part in.

    proxy: Enrolment.proxy_digest.
    name: of the silo; empty in what an earlier version wrote.
    data: digest of the data that it last began with (data.py); empty before, and in what an earlier version wrote.
    """

    run_id: str
    proxy: str
    settings: RoundSettings
    name: str = ""
    data: str = ""


class Update(_Record):
    """A round's result.

    start: SHA-256 of the adapter that the round started from.
    sha256: of update.safetensors.
    counted: whether the server said that it counts.
    weight: of the silo in a secure sum.
    """

    round: int
    proxy_version: int
    start: str
    samples: int
    metrics: dict[str, float]
    sha256: str
    counted: bool = False
    weight: float = 0.0

    def answers(self, train: pb.Train) -> bool:
        """Whether training in this round would give the same update once more."""
        return (self.round, self.proxy_version, self.start) == (
            train.round,
            train.proxy_version,
            train.adapter.sha256.hex(),
        )


class Opened(_Record):
    """The last sum that this silo helped to open: of which run and round, over which silos."""

    run_id: str
    round: int
    survivors: frozenset[str]


class Entered(_Record):
    """What this silo last put into sums with noise of its own on it (docs/privacy.md, Whole silos).

    silos: all that took part in the round's attempts at a sum.
    update: SHA-256 of update.safetensors.
    noise: the key of the noise, in hexadecimal digits; as secret as the update beside it.
    """

    run_id: str
    round: int
    silos: frozenset[str]
    update: str
    terms: SecureTerms
    noise: str


Sums = TypeVar("Sums", Opened, Entered)


class Work:
    """The directory; one process at a time (:func:`opened`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens_path = path / "cache" / "tokens.safetensors"
        self.update_path = path / "update.safetensors"
        self._update_file: transfer.Payload | None = None
        self._vector_path, self._opened_path = path / "vector.safetensors", path / "opened.json"
        self._entered_path = path / "entered.json"
        self._update_json, self._update_residual = path / "update.json", path / "update-residual.safetensors"

    def joined(self) -> Joined | None:
        """The federation that the files here belong to; None if there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValidationError, UnicodeDecodeError):
            return Joined.model_validate_json((self.path / "federation.json").read_text(encoding="utf-8"))
        return None

    def proxy_path(self, joined: Joined) -> Path:
        """Where the proxy of a federation is, or will be."""
        return self.path / f"proxy-{joined.proxy}"

    def join(self, enrolment: Enrolment, name: str) -> None:
        """Deletes what belongs to another federation than the one of the enrolment, or to another silo."""
        former = self.joined()
        joined = Joined(run_id=enrolment.run_id, proxy=enrolment.proxy_digest, settings=enrolment.settings, name=name)
        if former is not None and former.name not in ("", name):
            log.warning("%s was the work directory of %s: its last update is not sent", self.path, former.name)
            former = None
        if former is not None and (former.run_id, former.proxy) == (joined.run_id, joined.proxy):
            joined = joined.model_copy(update={"data": former.data})
        else:
            proxies = set(self.path.glob("proxy-*")) - {self.proxy_path(joined)}
            for directory in (*proxies, self.path / "incoming", self.path / "received"):
                shutil.rmtree(directory, ignore_errors=True)
            self.drop_update()
            for path in self._residuals().values():
                path.unlink()
        if former != joined:
            self._write_joined(joined)

    def note_data(self, digest: str) -> None:
        """The data that this silo, which has joined, begins with."""
        joined = self.joined()
        if joined is not None and joined.data != digest:
            self._write_joined(joined.model_copy(update={"data": digest}))

    def received(self, file: pb.File) -> tuple[Path, str]:
        """Directory and name of a file that a round needs."""
        return self.path / "received", f"{file.sha256.hex()}.safetensors"

    def keep_received(self, files: list[pb.File]) -> None:
        """Deletes what was received, wholly or in part, but is none of these files."""
        for directory in (self.path / "incoming", self.path / "received"):
            for path in directory.glob("*"):
                if path.stem not in {file.sha256.hex() for file in files}:
                    path.unlink()

    def update(self, share: ShareSection) -> Update | None:
        """The last update, if it is as it was written and may still leave; otherwise it is deleted."""
        if not self._update_json.exists():
            return None
        try:
            update = Update.model_validate_json(self._update_json.read_text(encoding="utf-8"))
            self._update_file = transfer.payload(self.update_path)
            intact = self._update_file.sha256.hex() == update.sha256
        except (FileNotFoundError, ValidationError, UnicodeDecodeError):
            intact = False
        if not intact:
            log.warning("%s is not as it was written: dropped", self.update_path)
        elif not update.metrics.keys() <= set(share.metrics) or (not share.inactivity and self._has_inactivity()):
            log.info("%s holds more than silo.yaml shares now: dropped", self.update_path)
        else:
            return update
        self.drop_update()
        return None

    @property
    def update_file(self) -> transfer.Payload:
        """The last update's file, as `update` found it or `keep_update` wrote it."""
        assert self._update_file is not None
        return self._update_file

    def keep_update(
        self,
        train: pb.Train,
        groups: Mapping[Group, Mapping[str, Tensor]],
        residual: Mapping[str, Tensor],
        *,
        samples: int,
        metrics: dict[str, float],
        weight: float = 0.0,
    ) -> Update:
        """Writes a round's result in the place of the last one."""
        self.drop_update()
        if residual:
            write_tensors(self._update_residual, {"residual": residual})
        write_tensors(self.update_path, groups)
        self._update_file = transfer.payload(self.update_path)
        update = Update(
            round=train.round,
            proxy_version=train.proxy_version,
            start=train.adapter.sha256.hex(),
            samples=samples,
            metrics=metrics,
            sha256=self._update_file.sha256.hex(),
            weight=weight,
        )
        self._write(update)
        return update

    def count_update(self, update: Update) -> None:
        """The update counts: what was rounded off it is for the next one."""
        if update.counted:
            return
        with contextlib.suppress(FileNotFoundError):  # nothing was rounded off, or this was done before a kill
            os.replace(self._update_residual, self.path / f"residual-{update.round}.safetensors")
            atomic.sync(self.path)
        for round, path in self._residuals().items():
            if round < update.round:
                path.unlink()
        self._write(update.model_copy(update={"counted": True}))

    def drop_update(self) -> None:
        """Deletes the last update; what was rounded off it is lost with it, unless it counted."""
        for path in (self._update_json, self._update_residual, self.update_path):
            path.unlink(missing_ok=True)

    def start_path(self, update: Update) -> Path:
        """The adapter that an update started from, which is kept as long as its round is on."""
        return self.path / "received" / f"{update.start}.safetensors"

    def keep_vector(self, words: Tensor) -> transfer.Payload:
        """What is sent of an update in secure aggregation: (L,) int32."""
        write_tensors(self._vector_path, {"masked": {"words": words}})
        return transfer.payload(self._vector_path)

    def drop_vector(self) -> None:
        """Of an attempt that is over."""
        self._vector_path.unlink(missing_ok=True)

    def opened(self, run_id: str) -> Opened | None:
        """The last sum of a run that this silo helped to open; CheckpointError if that cannot be told any more."""
        return _of_sums(self._opened_path, Opened, run_id)

    def keep_opened(self, opened: Opened) -> None:
        """On disk before the first share leaves."""
        if self.opened(opened.run_id) != opened:
            atomic.write_text(self._opened_path, opened.model_dump_json(indent=1))

    def entered(self, run_id: str) -> Entered | None:
        """What this silo last put into a run's sums; CheckpointError if that cannot be told any more."""
        return _of_sums(self._entered_path, Entered, run_id)

    def keep_entered(self, entered: Entered) -> None:
        """On disk before the vector leaves."""
        if self.entered(entered.run_id) != entered:
            atomic.write_text(self._entered_path, entered.model_dump_json(indent=1))

    def residual(self, round: int) -> dict[str, Tensor]:
        """What was rounded off the last update that counted, before a round; by name, float32."""
        earlier = {number: path for number, path in self._residuals().items() if number < round}
        return read_tensors(earlier[max(earlier)], "residual") if earlier else {}

    def _write_joined(self, joined: Joined) -> None:
        atomic.write_text(self.path / "federation.json", joined.model_dump_json(indent=1))

    def _has_inactivity(self) -> bool:
        return any(name.startswith("inactivity/") for name in TensorFile(self.update_path).specs)

    def _write(self, update: Update) -> None:
        atomic.write_text(self._update_json, update.model_dump_json(indent=1))

    def _residuals(self) -> dict[int, Path]:
        found = {path: re.fullmatch(r"residual-(\d+)\.safetensors", path.name) for path in self.path.glob("residual-*")}
        return {int(match[1]): path for path, match in found.items() if match}


def _of_sums(path: Path, kind: type[Sums], run_id: str) -> Sums | None:
    try:
        found = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path}: is not what was written", "restore it; without it a second sum could be opened"
        ) from None
    return found if found.run_id == run_id else None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Work]:
    """Makes and locks the directory; two silos in one would send each other's updates."""
    work = Work(path)
    with atomic.locked(path, "work"):
        for torn in (*path.glob(".*.part"), *work.tokens_path.parent.glob(".*.part")):  # of writes that were killed
            torn.unlink()
        yield work
