"""Every kind of image that Pillow opens: converted by the rule of docs/data.md, or refused by name."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpft.data.images import open_image
from fedpft.errors import DataError

WHITE, BLACK, RED, GREEN = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0)
ORIENTATION, PHOTOMETRIC = 274, 262


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixels(path: Path) -> list[Any]:
    """The colours of the first row."""
    image = open_image(path).image
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


def grey(*values: int, dtype: Any = np.uint16) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


def two(mode: str, *colours: Any) -> Image.Image:
    """An image of one row with these colours."""
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tiff", "jp2", "pgm"])
def test_16_bits_of_grey_keep_their_whole_range(suffix: str, tmp_path: Path) -> None:
    values = (0, 128, 129, 256, 4095, 32768, 65406, 65407, 65535)
    options = {"irreversible": False} if suffix == "jp2" else {}
    path = saved(grey(*values), tmp_path / f"a.{suffix}", **options)
    assert pixels(path) == [(round(value / 257),) * 3 for value in values]
    assert [round(value / 257) for value in values] == [0, 0, 1, 1, 16, 128, 254, 255, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bits_of_either_byte_order(mode: str, tmp_path: Path) -> None:
    order = "<" if mode == "I;16" else ">"
    image = Image.frombytes(mode, (3, 1), struct.pack(f"{order}3H", 0, 25700, 65535))
    assert pixels(saved(image, tmp_path / "a.tiff")) == [BLACK, (100,) * 3, WHITE]


def test_16_bits_of_which_0_is_white_are_turned_as_8_bits_are(tmp_path: Path) -> None:
    deep = saved(grey(0, 25700, 65535), tmp_path / "a.tiff", tiffinfo={PHOTOMETRIC: 0})
    assert pixels(deep) == [WHITE, (155,) * 3, BLACK]
    flat = saved(grey(0, 100, 255, dtype=np.uint8), tmp_path / "b.tiff", tiffinfo={PHOTOMETRIC: 0})
    assert pixels(flat) == [BLACK, (100,) * 3, WHITE], "Pillow turns these when it writes, and again when it reads"


def tiff(values: bytes, bits: int, width: int) -> bytes:
    """A one-row TIFF of grey with so many bits, which Pillow reads but does not write."""
    entries = [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, 1), (279, 4, len(values))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory + struct.pack("<I", 0)


def test_a_tiff_of_12_bits_has_a_range_of_12_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(tiff(bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00]), 12, 4))
    assert pixels(path) == [BLACK, WHITE, (128,) * 3, BLACK]
    assert open_image(path).dim is False


@pytest.mark.parametrize(("highest", "dim"), [(4095, True), (16383, True), (16384, False), (65535, False)])
def test_16_bits_that_are_hardly_used_are_noticed(highest: int, dim: bool, tmp_path: Path) -> None:
    assert open_image(saved(grey(0, highest), tmp_path / "a.png")).dim is dim
    assert open_image(saved(grey(0, 10, dtype=np.uint8), tmp_path / "b.png")).dim is None


@pytest.mark.parametrize(
    ("image", "suffix", "colours"),
    [
        (two("1", 0, 1), "png", [BLACK, WHITE]),
        (two("1", 0, 1), "tiff", [BLACK, WHITE]),
        (two("L", 0, 77), "png", [BLACK, (77,) * 3]),
        (two("LA", (0, 255), (0, 0), (0, 51)), "png", [BLACK, WHITE, (204,) * 3]),
        (two("RGB", RED, GREEN), "png", [RED, GREEN]),
        (two("RGBA", (*RED, 255), (*RED, 0), (*BLACK, 51)), "png", [RED, WHITE, (204,) * 3]),
        (two("RGBA", (*RED, 255), (*RED, 0)), "webp", [RED, WHITE]),
        (two("RGBX", (*RED, 0), (*GREEN, 0)), "tiff", [RED, GREEN]),
        (two("CMYK", (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)), "tiff", [RED, BLACK, WHITE]),
        (two("YCbCr", (255, 128, 128), (0, 128, 128)), "tiff", [WHITE, BLACK]),
        (two("P", 0, 0), "png", [BLACK, BLACK]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_8_bits_of_every_mode_become_rgb(image: Image.Image, suffix: str, colours: Any, tmp_path: Path) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    assert pixels(saved(image, tmp_path / f"a.{suffix}", **options)) == colours


def test_lab_is_converted_by_its_own_profile(tmp_path: Path) -> None:
    path = saved(two("LAB", (255, 128, 128), (0, 128, 128), (136, 208, 195)), tmp_path / "a.tiff")
    assert np.allclose(pixels(path), [WHITE, BLACK, RED], atol=12)  # L, a and b are whole numbers


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV", "I;16N", "RGBX"])
def test_modes_that_hardly_any_file_has(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(two("RGBA", (*RED, 255), (*RED, 0)), tmp_path / "a.png")
    plain = two("RGBA", (*RED, 255), (*RED, 0))
    made = {
        "La": lambda: plain.convert("LA").convert("La"),
        "RGBa": lambda: plain.convert("RGBa"),
        "PA": lambda: plain.convert("RGB").convert("P").convert("PA"),
        "HSV": lambda: plain.convert("RGB").convert("HSV"),
        "I;16N": lambda: Image.new("I;16N", (2, 1)),
        "RGBX": lambda: plain.convert("RGB").convert("RGBX"),
    }[mode]()
    assert made.mode == mode
    monkeypatch.setattr(Image, "open", lambda _: made)
    if mode == "I;16N":
        with pytest.raises(DataError, match="whole numbers without a known range"):
            open_image(path)
    else:
        first, last = pixels(path)
        assert first == ((76,) * 3 if mode == "La" else RED)
        assert last == (WHITE if mode in ("La", "RGBa") else RED)


def test_a_jpeg_of_cmyk_is_inverted_as_adobe_writes_it_and_refused_if_it_does_not_say(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    path = saved(image, tmp_path / "a.jpg", quality=95)
    assert np.allclose(pixels(path)[0], RED, atol=4)
    content = path.read_bytes()
    start = content.index(b"\xff\xeeB") if b"\xff\xeeB" in content else content.index(b"\xff\xee")
    length = struct.unpack(">H", content[start + 2 : start + 4])[0]
    path.write_bytes(content[:start] + content[start + 2 + length :])
    with pytest.raises(DataError, match="CMYK JPEG that does not say which end is ink"):
        open_image(path)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (Image.new("I", (2, 2)), "whole numbers without a known range (TIFF, mode I)"),
        (Image.new("F", (2, 2)), "floating-point numbers (TIFF, mode F)"),
    ],
)
def test_numbers_without_a_range_are_refused_by_name(image: Image.Image, name: str, tmp_path: Path) -> None:
    path = saved(image, tmp_path / "a.tiff")
    with pytest.raises(DataError) as raised:
        open_image(path)
    assert raised.value.message == f"image {path} holds {name}"
    assert "save it as PNG or TIFF of 8 bits" in raised.value.remedy


# --- transparency -----------------------------------------------------------------------------------------------------


def test_palettes_with_one_or_many_transparencies_show_the_background(tmp_path: Path) -> None:
    image = two("P", 0, 1, 2)
    image.putpalette([*RED, *GREEN, *BLACK])
    assert pixels(saved(image, tmp_path / "a.png")) == [RED, GREEN, BLACK]
    assert pixels(saved(image, tmp_path / "b.png", transparency=1)) == [RED, WHITE, BLACK]
    assert pixels(saved(image, tmp_path / "c.png", transparency=bytes([255, 0, 51]))) == [RED, WHITE, (204,) * 3]
    assert pixels(saved(image, tmp_path / "d.gif", transparency=0)) == [WHITE, GREEN, BLACK]


def test_a_transparent_colour_shows_the_background(tmp_path: Path) -> None:
    assert pixels(saved(two("RGB", RED, GREEN), tmp_path / "a.png", transparency=RED)) == [WHITE, GREEN]
    assert pixels(saved(two("L", 7, 8), tmp_path / "b.png", transparency=7)) == [WHITE, (8,) * 3]
    assert pixels(saved(grey(257, 514), tmp_path / "c.png", transparency=257)) == [WHITE, (2,) * 3]


def png(bits: int, colour: int, row: bytes, width: int, transparent: bytes | None = None) -> bytes:
    """A one-row PNG of a kind that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    key = b"" if transparent is None else chunk(b"tRNS", transparent)
    parts = chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "row"), [(2, 0b00011011), (4, 0b00000101)])
def test_a_transparent_grey_of_few_bits_is_found(bits: int, row: int, tmp_path: Path) -> None:
    width = 8 // bits
    values = [(row >> (8 - bits * (x + 1))) & ((1 << bits) - 1) for x in range(width)]
    path = tmp_path / "a.png"
    path.write_bytes(png(bits, 0, bytes([row]), width, struct.pack(">H", values[1])))
    shades = [value * 255 // ((1 << bits) - 1) for value in values]
    assert pixels(path) == [
        WHITE if value == values[1] else (shade,) * 3 for value, shade in zip(values, shades, strict=True)
    ]


def test_16_bits_a_colour_are_read_but_not_with_a_transparent_colour(tmp_path: Path) -> None:
    path, row = tmp_path / "a.png", struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 65535, 0, 65535)
    path.write_bytes(png(16, 2, row, 2))
    assert pixels(path) == [(0x12, 0x56, 0x9A), (255, 0, 255)]
    path.write_bytes(png(16, 2, row, 2, struct.pack(">3H", 0x12, 0x56, 0x9A)))
    with pytest.raises(DataError, match="16 bits a colour and a colour that is transparent"):
        open_image(path)


@pytest.mark.parametrize(("value", "dim"), [(0x0FFF, True), (0x3FFF, True), (0x4000, False)])
def test_16_bits_a_colour_that_are_hardly_used_are_noticed(value: int, dim: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(16, 2, struct.pack(">3H", 0, value, 0), 1))
    assert open_image(path).dim is dim


# --- orientation, frames, damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "deep", "options"),
    [
        *((suffix, False, {}) for suffix in ("png", "jpg", "tiff", "webp")),
        *((suffix, True, {}) for suffix in ("png", "tiff")),
        ("tiff", False, {"compression": "tiff_lzw"}),
    ],
)
def test_images_are_turned_upright(suffix: str, deep: bool, options: Any, tmp_path: Path) -> None:
    values = np.zeros((32, 64), np.uint16 if deep else np.uint8)
    values[:16, :16] = 65535 if deep else 255  # the upper left corner, before it is turned by a quarter to the right
    image, exif = Image.fromarray(values), Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / f"a.{suffix}"
    saved(image, path, **options, **({"tiffinfo": {ORIENTATION: 6}} if suffix == "tiff" else {"exif": exif}))
    found = np.asarray(open_image(path).image)
    assert found.shape == (64, 32, 3)
    assert found[8, 24].min() > 200
    assert found[8, 8].max() < 50


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png", "webp"])
def test_several_frames_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    path = saved(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"a\.\w+ holds 3 frames, pages or layers"):
        open_image(path)


def test_of_a_photo_with_previews_the_photo_is_read(tmp_path: Path) -> None:
    photo, preview = Image.new("RGB", (16, 16), WHITE), Image.new("RGB", (16, 16), BLACK)
    assert pixels(saved(photo, tmp_path / "a.mpo", save_all=True, append_images=[preview]))[0] == WHITE


def test_interlaced_images_are_read(tmp_path: Path) -> None:
    path = saved(two("P", 0, 1), tmp_path / "a.gif", interlace=1)
    with Image.open(path) as opened:
        assert opened.size == (2, 1)
    assert len(pixels(path)) == 2
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(buffer, "JPEG", progressive=True)
    (tmp_path / "b.jpg").write_bytes(buffer.getvalue())
    assert len(pixels(tmp_path / "b.jpg")) == 32


@pytest.mark.parametrize("damage", ["cut", "no image", "orientation", "bomb"])
def test_what_cannot_be_read_is_one_line(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.effect_noise((64, 64), 50), tmp_path / "a.jpg")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "no image":
        path.write_bytes(b"DICM")
    elif damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    else:

        def torn(_: Any) -> Any:
            raise struct.error("unpack requires\na buffer of 2 bytes")

        monkeypatch.setattr("PIL.ImageOps.exif_transpose", torn)
    with pytest.raises(DataError, match=r"image .*a\.jpg cannot be read \(.+\)") as raised:
        open_image(path)
    assert "\n" not in str(raised.value)
    assert "PNG, JPEG and TIFF are read" in raised.value.remedy
