"""Images with their labels and no table: a directory with one directory a label, and WebDataset's shards. docs/data.md.

Rows are counted from 1 in the order of names; messages name the file, and the member of a shard.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fedpft.data.images import ImageFile
from fedpft.data.rows import ARROW_SPLITS, Form, Row, RowFaults, Table, Unusable, listed, one_line
from fedpft.errors import DataError

SHARD = ".tar"
IMAGES = frozenset(("bmp", "gif", "jp2", "jpeg", "jpg", "mpo", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp"))
LABELS = ("cls", "txt")  # of a member that is nothing but the label; the first counts
COLUMNS = "json"  # of a member that has what a row of a table has
NO_IMAGES = frozenset(("thumbs.db", "desktop.ini"))  # which Windows puts beside images
LONGEST_LABEL = 1 << 20  # bytes of a member with columns


def is_image_set(path: Path) -> bool:
    """Whether a data path is one, and no table."""
    if path.is_dir():
        if (path / ARROW_SPLITS).exists():
            return False
        return any(each.is_dir() or _is_shard(each) or _is_image(each) for each in _listing(path))
    return _is_shard(path)


def read_image_set(path: Path, forms: Sequence[Form], columns: Mapping[str, str]) -> Table:
    """Reads which images there are, and what belongs to each; arguments and errors as of :func:`read_rows`.

    The values of the role `image` are of type ImageFile.
    """
    shards = [path] if _is_shard(path) else [each for each in _listing(path) if _is_shard(each)]
    rows = _Rows(path, forms, columns)
    if shards:
        for shard in shards:
            _read_shard(shard, rows)
    else:
        _read_directory(path, rows)
    if not rows.places:
        raise DataError(f"{path}: holds no image", "put one directory for each label there, or shards (docs/data.md)")
    return rows.table


class _Rows:
    """Rows as they are found, all of one form.

    places: what each is called in messages.
    """

    def __init__(self, path: Path, forms: Sequence[Form], columns: Mapping[str, str]) -> None:
        fitting = [form for form in forms if "image" in form]
        if not fitting:
            raise DataError(f"{path}: holds images, and {_asked(forms)} is asked for", "name a table (docs/data.md)")
        self.places: list[object] = []
        self._columns = columns
        self._found: list[Row] = []
        self.table = Table(fitting[0], RowFaults(path, lambda line: str(self.places[line - 1])), self._found)

    def add(self, image: ImageFile | Unusable, place: object, read: Callable[[str, str], Any]) -> None:
        """Adds one.

        Args:
            image: or why there is none.
            read: is given role and column of whatever else belongs to it; raises Unusable.
        """
        self.places.append(place)
        line = len(self.places)
        try:
            if isinstance(image, Unusable):
                raise image
            values = [image if role == "image" else read(role, self._columns[role]) for role in self.table.roles]
        except Unusable as fault:
            self.table.faults.add(line, fault.message, fault.remedy)
        else:
            self._found.append((line, values))


def _asked(forms: Sequence[Form]) -> str:
    return " or ".join(dict.fromkeys(" with ".join(form) for form in forms))


def files_in(path: Path) -> Iterator[Path]:
    """All that are seen in a directory, however deep, in the order of their names; DataError if one is closed."""
    for each in _listing(path):
        if each.is_dir():
            yield from files_in(each)
        else:
            yield each


def _listing(path: Path) -> list[Path]:
    try:
        return sorted(each for each in path.iterdir() if _is_seen(each.name))
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror})", "let this user read it")


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in NO_IMAGES


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == SHARD and path.is_file()


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGES


# --- a directory with one directory a label ---------------------------------------------------------------------------


def _read_directory(path: Path, rows: _Rows) -> None:
    for file in files_in(path):
        name = file.relative_to(path)
        if len(name.parts) == 1 and not _is_image(file):  # a licence, a list of labels
            continue
        image = ImageFile(str(file))
        rows.add(image, image, lambda role, column, name=name: _directory_label(role, name))  # type: ignore[misc]


def _directory_label(role: str, name: Path) -> str:
    if role != "label":
        raise Unusable(f"a directory of images says nothing of {role!r}", "write a table with that column")
    if len(name.parts) == 1:
        raise Unusable("stands in no label's directory", "put it into one that is called as its label")
    return name.parts[0]


# --- WebDataset -------------------------------------------------------------------------------------------------------


def _read_shard(shard: Path, rows: _Rows) -> None:
    """Members that share their name up to the first dot stand one after the other and are one row."""
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            known: set[str] = set()
            for key, members in groupby(_members(archive), key=_key):
                _add_sample(shard, file, key, list(members), rows, again=key in known)
                known.add(key)
    except tarfile.TarError as error:
        raise DataError(
            f"{shard}: cannot be read as a shard ({one_line(error)})", "write it again, whole and not compressed"
        ) from None
    except OSError as error:
        raise _unreadable(shard, error) from None


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        if member.isfile() and _is_seen(PurePosixPath(member.name).name):
            yield member


def _key(member: tarfile.TarInfo) -> str:
    name = PurePosixPath(member.name)
    return str(name.with_name(name.name.split(".")[0]))


def _kind(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).name.partition(".")[2].lower()


def _add_sample(
    shard: Path, file: IO[bytes], key: str, members: Sequence[tarfile.TarInfo], rows: _Rows, *, again: bool
) -> None:
    kinds = {_kind(member): member for member in members}

    def read(role: str, column: str) -> Any:
        if (columns := _json(file, kinds.get(COLUMNS))) is not None and column in columns:
            return columns[column]
        lone = next((kinds[kind] for kind in LABELS if kind in kinds), None)
        if role == "label" and lone is not None:
            return _text(file, lone).strip()
        remedy = f"add it as {column!r} of {key}.json" + (f", or as {key}.cls" if role == "label" else "")
        raise Unusable(f"there is no {role} among {listed(sorted(kinds))}", remedy)

    image: ImageFile | Unusable
    images = [member for member in members if _kind(member) in IMAGES]
    if again:
        image = Unusable("members of other names stand between those of this one", "write them one after the other")
    elif len(kinds) < len(members) or len(images) > 1:
        image = Unusable("there are several members of one kind", "give each image a name of its own")
    elif not images:
        image = Unusable(f"there is no image among {listed(sorted(kinds))}", f"add one as {key}.jpg or the like")
    else:
        image = ImageFile(str(shard), images[0].name, images[0].offset_data, images[0].size)
    rows.add(image, image if isinstance(image, ImageFile) else f"{shard}:{key}", read)


def _text(file: IO[bytes], member: tarfile.TarInfo) -> str:
    if member.size > LONGEST_LABEL:
        raise Unusable(f"{member.name} has {member.size} bytes, which is no label", "write the label's name into it")
    file.seek(member.offset_data)
    try:
        return file.read(member.size).decode()
    except UnicodeDecodeError:
        raise Unusable(f"{member.name} is not UTF-8", "write it as UTF-8") from None


def _json(file: IO[bytes], member: tarfile.TarInfo | None) -> dict[str, Any] | None:
    if member is None:
        return None
    try:
        found = json.loads(_text(file, member))
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{member.name} is malformed JSON ({one_line(error)})", "write one JSON object") from None
    if not isinstance(found, dict):
        raise Unusable(f"{member.name} is not a JSON object", 'write {"label": ...}')
    return found
