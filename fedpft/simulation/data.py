"""Who of the simulated silos has what."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpft.config import PartitionSection, SimulationConfig
from fedpft.data.partition import deal, split_counts, write_split
from fedpft.data.samples import Samples, read_samples, silo_files
from fedpft.errors import ConfigError
from fedpft.server.identity import label_list
from fedpft.silo.work import Work
from fedpft.tasks import TASKS

log = logging.getLogger(__name__)

WAY_OUT = "; or set simulation.bad_rows: skip to go on without them"


class SilosData:
    """A silo's samples are made when it trains, and not kept.

    config: with the silos' names.
    sizes: how many samples each has.
    """

    def __init__(self, config: SimulationConfig) -> None:
        """Reads what is dealt out, and deals it out; or looks where each silo's file is.

        Raises:
            DataError: a file of any silo cannot be used, or not be dealt out so.
            ConfigError: silos are named that have no file, or fewer are there than a round needs.
        """
        section, named = config.simulation, config.federation.silos
        self._labels = label_list(config)
        self._files = {path.stem: path for path in silo_files(section.data)} if section.data.is_dir() else {}
        self._dealt: Samples | None = None
        self._parts: dict[str, Tensor] = {}
        if self._files:
            if lacking := sorted(set(named) - self._files.keys()):
                raise ConfigError(f"{section.data}: has no file of {lacking[0]}", "name the silos as their files")
            if section.partition != PartitionSection() or section.silos is not None:
                raise ConfigError(
                    "simulation.silos and simulation.partition deal out one file, and simulation.data is a directory "
                    "with a file for each silo",
                    "remove the two keys, or name a file",
                )
            names = named or tuple(sorted(self._files))
        else:
            count = section.silos or len(named)
            if not count:
                raise ConfigError(f"{section.data}: nothing says how many silos share it", "set simulation.silos")
            if named and count != len(named):
                raise ConfigError(
                    f"simulation.silos is {section.silos}, federation.silos names {len(named)}", "give one of the two"
                )
            names = named or tuple(f"silo-{number:0{len(str(count))}d}" for number in range(1, count + 1))
            self._dealt = self._read(config, section.data, section.partition.column)
            _warn(self._dealt)
            parts = deal(section.partition, self._dealt, count, config.seed)
            self._parts = dict(zip(names, parts, strict=True))
            self.sizes = {silo: len(part) for silo, part in self._parts.items()}
        federation = config.federation.model_copy(update={"silos": names})
        self.config = config.model_copy(update={"federation": federation, "listen": "127.0.0.1:0", "tls": None})
        try:
            self.config.check_silos()
        except ValueError as error:
            other = "call the files otherwise" if self._files else "simulate other silos"
            raise ConfigError(f"{section.data}: {error}", f"change that, or {other}") from None
        if self._files:  # each is read before hours of work, not when its silo's turn comes
            self.sizes = {silo: _warn(self.samples(silo)) for silo in names}

    @property
    def directory(self) -> Path:
        """Where each silo keeps what it has on disk."""
        return self.config.out / "silos"

    def work(self, silo: str) -> Work:
        """What a silo has there."""
        return Work(self.directory / silo)

    def samples(self, silo: str) -> Samples:
        """A silo's own, as if it had read them from a file of its own."""
        if self._dealt is not None:
            return self._dealt.subset(self._parts[silo])
        return self._read(self.config, self._files[silo], None)

    def split(self) -> dict[str, Any]:
        """What report.html draws of it."""
        if self._dealt is None:
            return {"labels": [], "silos": {silo: [size] for silo, size in self.sizes.items()}}
        return split_counts(self._dealt, self._parts, self._labels)

    def write(self, directory: Path) -> None:
        """As a file for each silo; ConfigError if it was no one file that was dealt out."""
        if self._dealt is None:
            raise ConfigError(f"{self.config.simulation.data}: has a file for each silo already", "use those")
        write_split(self._dealt, self._parts, directory)

    def _read(self, config: SimulationConfig, path: Path, group: str | None) -> Samples:
        task = TASKS[config.model.task]
        return read_samples(
            path,
            config.columns,
            task.forms,
            task.reader(self._labels),
            config.encoding,
            group=group,
            bad_rows=config.simulation.bad_rows,
            way_out=WAY_OUT,
        )


def _warn(samples: Samples) -> int:
    """Says what is odd about a file; returns how many samples it has."""
    for warning in samples.warnings:
        log.warning("%s", warning)
    return len(samples)
