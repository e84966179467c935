"""The ranks of a silo beside rank 0: they train with it, talk to no server, and write nothing.

They read silo.yaml and the data for themselves, and what rank 0 has received from its work directory, by the paths
that it tells them.
"""

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fedpft import faults, machine
from fedpft.config import RoundSettings, SiloConfig
from fedpft.errors import DataError
from fedpft.parallel import Ranks
from fedpft.silo import data
from fedpft.silo.learner import Learner
from fedpft.silo.ondisk import DataOnDisk
from fedpft.silo.work import Work
from fedpft.wire.hello import Terms
from fedpft.wire.tensors import read_tensors


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Beginning(_Record):
    """What rank 0 says first; bundle: the proxy's directory. When it has read its data, it says their digest."""

    name: str
    settings: RoundSettings
    terms: Terms
    bundle: Path


class SharedRound(_Record):
    """What rank 0 says before each round that is trained; "" in its place: there is none any more.

    version: of the proxy; patches: what brings the former version to it.
    adapter: the file that the round starts from.
    """

    round: int
    version: int
    patches: tuple[Path, ...]
    adapter: Path
    count_inactivity: bool


def follow(config: SiloConfig, ranks: Ranks) -> None:
    """Trains what rank 0 trains, until that has no more rounds.

    Raises:
        DataError: the data is not what rank 0 has read.
        FedPFTError: rank 0 or another rank ended; any other of docs/errors.md.
    """
    logging.getLogger().setLevel(logging.WARNING)  # rank 0 says the rest
    with faults.explaining(config.work, "work"):
        machine.prepare(config.device, config.threads)
        beginning = Beginning.model_validate_json(ranks.tell())
        on_disk = DataOnDisk(config.data.path)
        samples = data.fit(data.examine(config), config, beginning.terms)
        learner = Learner(beginning.bundle, beginning.settings, config.device, config.limits)
        read = ranks.tell()  # and by then what rank 0 has encoded lies in `work`
        dataset = learner.encode(samples, on_disk, config.data, Work(config.work).tokens_path)
        if on_disk.read != read:
            raise DataError(
                f"{config.data.path}: changed while it was read", "start the silo again when nothing writes there"
            )
        packing = learner.way_to_pack(beginning.name, dataset, ranks)
        while order := ranks.tell():
            now = SharedRound.model_validate_json(order)
            for patch in now.patches:
                learner.bring_to(now.version, patch)
            learner.fit(
                beginning.name,
                dataset,
                read_tensors(now.adapter, "adapter"),
                round=now.round,
                count_inactivity=now.count_inactivity,
                limits=config.limits,
                packing=packing,
                ranks=ranks,
            )
