"""A file into the RGB image that a model sees, by one rule for each kind of image; docs/data.md has them in words.

What Pillow would convert wrongly, or to a part of what the file holds, is refused by name.

    n     images in a dataset
    M     images in one batch
    C     colours
    H, W  height and width of an image
"""

import hashlib
import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedpft.data.batches import EncodedDataset
from fedpft.data.rows import one_line
from fedpft.errors import DataError

BACKGROUND = (255, 255, 255, 255)  # what shows through where an image is transparent
DEEP_FORMATS = ("PNG", "TIFF", "JPEG2000", "PPM")  # whose 16-bit grey is known to be unsigned, from black to white
PRIMARY_FIRST = ("MPO",)  # the other frames are previews, depth maps and the like
DIM_SHARE = 0.25
WHITE_IS_ZERO = 0  # of TIFF's PhotometricInterpretation
PHOTOMETRIC = 262
DEEP = ";16"  # in Pillow's name for how the values stand in the file
GREY_STEPS = {"L;2": 85, "L;4": 17}  # of PNG's few-bit greys on the scale of 8 bits

REPLACE = "replace it or remove the row"
SAVE_AS_RGB = "save it as PNG or TIFF of 8 bits a colour, grey or RGB"
AHEAD = 64  # images that are begun before their batch is asked for, to a whole batch: 38 MB of 224 x 224 pixels
MOST_DECODERS = 16  # threads
HELD_BYTES = 64 << 20  # of prepared images: 111 of 224 x 224 pixels, 1,700 of 56 x 56


@dataclass(frozen=True)
class Opened:
    """An image as the model's image processor takes it.

    image: RGB, of 8 bits.
    dim: of an image of more than 8 bits whether its values stay below a quarter of their range; None for others.
    """

    image: Image.Image
    dim: bool | None


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where the bytes of an image are, and which they were when it was looked at.

    path: of its file, or of the archive that it stands in.
    member: its name in the archive, where it has `size` bytes from `offset` on; empty: it is all of the file.
    digest: SHA-256 of its bytes then; empty before.
    """

    path: str
    member: str = ""
    offset: int = 0
    size: int = -1
    digest: bytes = b""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path

    def look(self) -> tuple["ImageFile", Opened]:
        """The same with its digest, and the image; errors as of :func:`open_image`."""
        content = _content(self)
        return replace(self, digest=hashlib.sha256(content).digest()), _decoded(content, self)

    def open(self) -> Opened:
        """The image that was looked at; DataError if it is another now, or gone."""
        content = _content(self)
        if hashlib.sha256(content).digest() != self.digest:
            raise DataError(f"image {self} changed since it was looked at", "start again when nothing writes there")
        return _decoded(content, self)


def open_image(path: Path | str) -> Opened:
    """Reads an image, upright, in RGB; DataError if it cannot be read, or there is no rule for its kind."""
    return ImageFile(str(path)).look()[1]


def _content(image: ImageFile) -> bytes:
    try:
        with open(image.path, "rb") as file:
            file.seek(image.offset)
            return file.read(image.size)
    except (OSError, ValueError) as error:
        raise _unreadable(image, error) from None


def _unreadable(image: ImageFile, error: Exception) -> DataError:
    reason = one_line(error) or type(error).__name__
    return DataError(f"image {image} cannot be read ({reason})", f"{REPLACE}; PNG, JPEG and TIFF are read")


def _decoded(content: bytes, path: ImageFile) -> Opened:
    try:
        # Not by its path: of a TIFF that it can map into memory Pillow mixes up width and height if it is to be turned.
        with _opened(io.BytesIO(content)) as opened:
            _check_frames(path, opened)
            depth, raw = _depth(opened), _raw_mode(opened)
            opened.load()
            if isinstance(key := opened.info.get("transparency"), int) and opened.mode == "L":
                opened.info["transparency"] = key * GREY_STEPS.get(raw, 1)
            image = ImageOps.exif_transpose(opened)
            if depth is None:
                rgb = _eight_bits(path, image, opened.format, raw)
                return Opened(rgb, _is_dim(image) if DEEP in raw else None)
            return _deep(image, depth, inverted=_is_white_zero(opened))
    except DataError:
        raise
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        raise _unreadable(path, error) from None


def _opened(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file)


def _check_frames(path: ImageFile, image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in PRIMARY_FIRST:
        raise DataError(
            f"image {path} holds {frames} frames, pages or layers, and a sample is one image",
            "save those that are samples as files of their own, or all of them flattened into one",
        )


def _raw_mode(image: Image.Image) -> str:
    """How the values stand in the file, as Pillow calls it; empty where it does not say."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else None
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _depth(image: Image.Image) -> int | None:
    """Bits of a grey image that has more than 8; None for any other. To be asked before the image is loaded."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # so Pillow opens their 16 bits, PNG's until version 10
        return 16
    if image.mode.startswith("I;16") and image.format in DEEP_FORMATS:
        return 12 if _raw_mode(image) == "I;12" else 16
    return None


def _is_white_zero(image: Image.Image) -> bool:
    """Pillow turns such TIFFs of up to 8 bits, but not those of 16."""
    return image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]


def _is_dim(image: Image.Image) -> bool:
    """Of colours that had 16 bits in the file, from each of which Pillow takes the upper 8."""
    highest = max(high for _, high in image.convert("RGB").getextrema())  # type: ignore[misc]
    return highest < DIM_SHARE * 256


def _deep(image: Image.Image, bits: int, *, inverted: bool) -> Opened:
    """Grey of more than 8 bits: 0 is black and the largest value that the bits can hold is white."""
    highest = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    key = image.info.get("transparency")
    clear = values == key if isinstance(key, int) else None
    dim = bool(values.max() < DIM_SHARE * highest)
    if inverted:
        values = highest - values
    grey = ((values * 255 + highest // 2) // highest).astype(np.uint8)
    if clear is not None:
        grey[clear] = BACKGROUND[0]
    return Opened(Image.fromarray(grey).convert("RGB"), dim)


def _eight_bits(path: ImageFile, image: Image.Image, kind: str | None, raw: str) -> Image.Image:
    """Every mode of 8 bits or fewer; what is transparent shows the background."""
    mode, key = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;"):
        what = "floating-point numbers" if mode == "F" else "whole numbers without a known range"
        raise DataError(f"image {path} holds {what} ({kind}, mode {mode})", SAVE_AS_RGB)
    if mode == "CMYK" and kind == "JPEG" and "adobe" not in image.info:
        raise DataError(f"image {path} is a CMYK JPEG that does not say which end is ink", SAVE_AS_RGB)
    if isinstance(key, tuple) and DEEP in raw:
        raise DataError(f"image {path} has 16 bits a colour and a colour that is transparent", SAVE_AS_RGB)
    if mode == "La":
        image = image.convert("LA")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or key is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def describe_dim(deep: int, dim: int) -> str | None:
    """A warning about the 16-bit images of one set of files; None if there is nothing to say.

    Args:
        deep: how many of them there are.
        dim: how many of those are :attr:`Opened.dim`.
    """
    if not dim:
        return None
    return (
        f"{dim} of {deep} images of 16 bits use less than a quarter of their range and are nearly black for the "
        "model -> if a sensor of fewer bits made them, multiply their values so that its white becomes 65535"
    )


class ImageDataset(EncodedDataset):
    """Images as the model's image processor prepares them."""

    def __init__(self, pixel_values: "Tensor | ImagePixels", labels: Tensor | None) -> None:
        """Args:
        pixel_values: (n, C, H, W) float32. labels: (n,) int64.
        """
        self.pixel_values, self.labels = pixel_values, labels
        self.lengths = torch.ones(len(pixel_values), dtype=torch.int64)

    def ahead(self, lots: Iterable[Tensor]) -> Iterator[Tensor]:
        """Prepares the images of the next lots while a model is busy with one."""
        return iter(lots) if isinstance(self.pixel_values, Tensor) else self.pixel_values.ahead(lots)

    def _inputs(self, indices: Tensor, longest: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[indices]}


class ImagePixels:
    """Images that stay on disk: each is decoded and prepared when its batch is asked for, or a little earlier.

    In threads, of which Pillow and NumPy let several run at once. What comes out is the same with any number of them.
    What has been prepared stays, up to HELD_BYTES: images of a small set are decoded once, and not once an epoch.
    """

    def __init__(self, images: Sequence[ImageFile], prepare: Callable[[Image.Image], Tensor]) -> None:
        """Args:
        images: n that were looked at.
        prepare: makes (C, H, W) float32 of one.
        """
        self._images, self._prepare = images, prepare
        self._threads: ThreadPoolExecutor | None = None
        self._begun: dict[int, Future[Tensor]] = {}
        self._held: dict[int, Tensor] = {}
        self._room = HELD_BYTES

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """(M, C, H, W) float32 of (M,) int64; DataError names an image that changed since it was looked at."""
        pixels = [self._begun.pop(index) if index in self._begun else self._begin(index) for index in indices.tolist()]
        prepared = [each.result() for each in pixels]
        for index, each in zip(indices.tolist(), prepared, strict=True):
            if index not in self._held and each.nbytes <= self._room:
                self._held[index] = each
                self._room -= each.nbytes
        return torch.stack(prepared)

    def ahead(self, lots: Iterable[Tensor]) -> Iterator[Tensor]:
        """The lots; when one comes out, so many of the next are begun that they hold AHEAD images."""
        waiting: deque[Tensor] = deque()
        try:
            for lot in lots:
                for index in lot.tolist():
                    if index not in self._begun:
                        self._begun[index] = self._begin(index)
                waiting.append(lot)
                while sum(map(len, waiting)) - len(waiting[0]) >= AHEAD:
                    yield waiting[0]
                    waiting.popleft()
            while waiting:
                yield waiting[0]
                waiting.popleft()
        finally:  # nobody may want them any more
            for lot in waiting:
                for index in lot.tolist():
                    if (pixels := self._begun.pop(index, None)) is not None:
                        pixels.cancel()

    def _begin(self, index: int) -> Future[Tensor]:
        if (held := self._held.get(index)) is not None:
            done = Future[Tensor]()
            done.set_result(held)
            return done
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(MOST_DECODERS, torch.get_num_threads()), "decode")
        return self._threads.submit(self._pixels, self._images[index])

    def _pixels(self, image: ImageFile) -> Tensor:
        return self._prepare(image.open().image)


def encode_images(images: Sequence[ImageFile], processor: Any, labels: Tensor | None) -> ImageDataset:
    """Has the FM's image processor prepare images that were looked at, as their batches are asked for."""

    def prepare(image: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()

    return ImageDataset(ImagePixels(images, prepare), labels)
