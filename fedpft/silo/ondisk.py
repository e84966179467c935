"""The institution's data as this process read it, and whether it is that still.

What a process read at its start is what it trains on, all its life. A change of the file is noticed at the next round
and takes effect at the next start. Images stay where they are until a batch has them, and some then in memory: a change
of one is noticed, too, and ends the training that meets it. The digest stays here: it is not sent.
"""

from collections.abc import Sequence
from pathlib import Path

from fedpft.config import SiloConfig
from fedpft.data.samples import data_digest, image_paths
from fedpft.digests import Digests, combined
from fedpft.errors import DataError
from fedpft.proxy.bundle import task_of
from fedpft.tasks import TASKS


class DataOnDisk:
    """The data file and its images by their content, first looked at when this is made, before they are read.

    read: their digest then; one file's without images is its SHA-256.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: Sequence[Path] = ()
        self._digests = Digests()
        self.read = self._seen = self._now()

    def add_images(self, images: Sequence[Path]) -> None:
        """The images that the file names, before they are decoded; DataError if the file was changed in between."""
        self.check_read()
        self._images = images
        self.read = self._seen = self._now()

    def check_read(self) -> None:
        """After reading: raises DataError if it was changed in the meantime."""
        if self._now() != self.read:
            raise DataError(f"{self.path}: changed while it was read", "start the silo again when nothing writes there")

    def changed(self) -> str | None:
        """The digest now, if it is neither what was read nor what the last look found."""
        last, self._seen = self._seen, self._now()
        return None if self._seen in (self.read, last) else self._seen

    def _now(self) -> str:
        file = data_digest(self.path, self._digests)
        return combined({"": file, "images": self._digests.of_files(self._images)}) if self._images else file


def data_now(config: SiloConfig, bundle: Path) -> str:
    """The digest of the data as a silo would read it now, for the task of a proxy that it has received.

    Raises:
        DataError: the data file cannot be read.
    """
    data = DataOnDisk(config.data.path)
    task = task_of(bundle)
    if task is not None and TASKS[task].has_images:
        data.add_images(image_paths(config.data.path, config.data.columns, config.data.encoding))
    return data.read
