"""The run ledger, OUT/ledger.sqlite: what has happened in a run, so that a restarted server goes on from there.

Each method is one transaction that is on disk when it returns; an update's only after `sync`. A file is entered with
its SHA-256 after it is in place, so whatever the ledger names is whole; `verified` looks at the file again before it is
used. SQLite does not notice a damaged value: each row has a seal, the SHA-256 of its values, and all are looked at when
the ledger is opened.

    run        key -> value: format, run_id, config and contents (JSON)
    files      name under OUT -> sha256, bytes
    rounds     a row for each time a round was begun or taken up again: silos that were there, silos that were picked
    updates    a row for each update that counts
    journal    what the run has recorded, in order: (kind, round, JSON)

Where the files are that it names:

    rounds/<r>/adapter.safetensors          the adapter after round r; 0: untrained
    rounds/<r>/optimizer.safetensors        the server's optimizer after round r, until round r + 1 is closed
    rounds/<r>/sum.safetensors              with secure aggregation the sum over silos, until the round is closed
    patches/patch-<n>.safetensors           turns version n - 1 of the proxy into n
    patches/snapshot-<n>.safetensors        turns any version of the proxy into n
    updates/round-<r>/...                   until the round is closed
"""

import contextlib
import datetime
import hashlib
import json
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpft import atomic, faults
from fedpft.errors import CheckpointError, ConfigError, LedgerUnusable
from fedpft.wire.transfer import Payload, payload

FORMAT = "2"
LEDGER_FILE = "ledger.sqlite"
SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL, seal TEXT NOT NULL);
CREATE TABLE files (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, seal TEXT NOT NULL);
CREATE TABLE rounds (
    round INTEGER, attempt INTEGER, silos TEXT NOT NULL, present TEXT NOT NULL, count_inactivity INTEGER NOT NULL,
    begun_at TEXT NOT NULL, seal TEXT NOT NULL, PRIMARY KEY (round, attempt)
);
CREATE TABLE updates (
    round INTEGER, silo TEXT, attempt INTEGER NOT NULL, file TEXT NOT NULL, sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL, samples INTEGER NOT NULL, metrics TEXT NOT NULL, received_at TEXT NOT NULL,
    seal TEXT NOT NULL, PRIMARY KEY (round, silo)
);
CREATE TABLE journal (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, round INTEGER, value TEXT NOT NULL, seal TEXT NOT NULL
);
"""
ROOM = "make room on its disk and start the server again"
LOCAL = "put `out` on a local disk, and look after that disk"
RESTORE = "restore it from a backup, or start a new run in another OUT"
REMEDIES = {
    "disk is full": ROOM,
    "readonly": "make it writable, and its directory, and start the server again",
    "unable to open": "make it readable and writable, and its directory, and start the server again",
    "disk I/O": LOCAL,
    "locking protocol": LOCAL,
    "write-ahead log": LOCAL,
    "is locked": "stop whatever else has it open, and start the server again",
}
UPDATE = "round, silo, attempt, file, sha256, bytes, samples, metrics"
COLUMNS = {  # what a row's seal covers
    "run": "key, value",
    "files": "name, sha256, bytes",
    "rounds": "round, attempt, silos, present, count_inactivity, begun_at",
    "updates": f"{UPDATE}, received_at",
    "journal": "kind, round, value",
}


@dataclass(frozen=True)
class RoundRow:
    """A round as it was last begun. present: the silos out of which `silos` were picked."""

    round: int
    attempt: int
    silos: tuple[str, ...]
    present: tuple[str, ...]
    count_inactivity: bool


@dataclass(frozen=True)
class UpdateRow:
    """An update that counts. `file` is relative to OUT, `sha256` hexadecimal."""

    round: int
    silo: str
    attempt: int
    file: str
    sha256: str
    bytes: int
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Begun:
    """What a run was begun with, and whether it is at its end.

    proxy: digest of its proxy; None if it was not entered yet.
    """

    run_id: str
    config: dict[str, Any]
    contents: dict[str, Any]
    proxy: str | None
    finished: bool

    def check_config(self, out: Path, config: Mapping[str, Any]) -> None:
        """Raises ConfigError if a run cannot go on under this configuration."""
        if differing := _difference(self.config, json.loads(json.dumps(config))):
            raise ConfigError(
                f"{out}: holds a run that was begun with another {differing}",
                "set it back to go on with that run, or give the new run another `out`",
            )


class Ledger:
    """Thread-safe: SQLite lets one statement in at a time, and each is a transaction.

    out: the run directory.
    run_id: of this run, the same after every restart.
    contents: what the run was begun with.
    """

    def __init__(self, out: Path, config: Mapping[str, Any], contents: Mapping[str, Any] | None = None) -> None:
        """Opens the ledger of a run that has begun in `out`, or begins one.

        Args:
            config: what the run's result depends on; a run cannot go on under another.
            contents: of the files that it depends on; whether they are the same as `self.contents` is for the caller.

        Raises:
            CheckpointError: the ledger is torn, or of another version of fedpft.
            ConfigError: `out` holds a run with another configuration.
        """
        self.out, self._path = out, out / LEDGER_FILE
        out.mkdir(parents=True, exist_ok=True)
        with _explaining(self._path, "read"):
            self._database = _connect(self._path)
            if self._database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its integrity check fails")
            if not _has_tables(self._database, out):
                self._begin(config, contents or {})
            begun = _begun(self._path, self._database)
            atomic.sync(out)  # the name of the log, which SQLite has made by now
        self.run_id, self.contents = begun.run_id, begun.contents
        begun.check_config(out, config)

    def adapter_path(self, round: int) -> Path:
        """The adapter after a round."""
        return self.out / "rounds" / str(round) / "adapter.safetensors"

    def optimizer_path(self, round: int) -> Path:
        """What the server's optimizer carries from a round into the next."""
        return self.out / "rounds" / str(round) / "optimizer.safetensors"

    def sum_path(self, round: int) -> Path:
        """The sum of a round with secure aggregation."""
        return self.out / "rounds" / str(round) / "sum.safetensors"

    def patch_path(self, version: int) -> Path:
        """What leads from the version before to this one."""
        return self.out / "patches" / f"patch-{version}.safetensors"

    def snapshot_path(self, version: int) -> Path:
        """What leads from any version to this one."""
        return self.out / "patches" / f"snapshot-{version}.safetensors"

    def enter_file(self, path: Path) -> None:
        """Enters a file under OUT that is in place and synced."""
        file = payload(path)
        self._write("files", self._name(path), file.sha256.hex(), file.total_bytes, replace=True)

    def entered(self, path: Path) -> bool:
        """Whether the file was entered."""
        return bool(self._rows("SELECT 1 FROM files WHERE name = ?", self._name(path)))

    def verified(self, path: Path) -> Payload:
        """An entered file, which is as it was then.

        Raises:
            CheckpointError: it is missing or changed.
        """
        ((sha256,),) = self._rows("SELECT sha256 FROM files WHERE name = ?", self._name(path))
        return self._checked(path, sha256)

    def begin_round(self, row: RoundRow) -> None:
        """A round begins, or begins anew, or goes on with other silos than it began with."""
        silos, present = json.dumps(row.silos), json.dumps(row.present)
        self._write("rounds", row.round, row.attempt, silos, present, int(row.count_inactivity), _now(), replace=True)

    def last_round(self) -> RoundRow | None:
        """The round that was begun last."""
        rows = self._rows(
            "SELECT round, attempt, silos, present, count_inactivity FROM rounds "
            "ORDER BY round DESC, attempt DESC LIMIT 1"
        )
        if not rows:
            return None
        (row,) = rows
        return RoundRow(row[0], row[1], tuple(json.loads(row[2])), tuple(json.loads(row[3])), bool(row[4]))

    def enter_update(self, row: UpdateRow) -> None:
        """An update counts, and nothing that is entered later can be on disk without it. Its file is in place.

        Whoever is told that it counts must be told after `sync`: updates that come together then need not wait for the
        disk one after the other.
        """
        self._insert(
            "updates",
            row.round,
            row.silo,
            row.attempt,
            row.file,
            row.sha256,
            row.bytes,
            row.samples,
            json.dumps(row.metrics),
            _now(),
        )

    def sync(self) -> None:
        """Forces to disk what was entered so far."""
        log = self._path.with_name(f"{LEDGER_FILE}-wal")
        try:
            atomic.sync(log)
        except FileNotFoundError as error:
            raise CheckpointError(f"{log}: is gone", _remedy(error)) from None

    def updates(self, round: int | None = None) -> list[UpdateRow]:
        """The updates that a round counts, or any (None), in the order of rounds and of the silos' names."""
        only, values = ("", ()) if round is None else ("WHERE round = ?", (round,))
        return [
            _update(row) for row in self._rows(f"SELECT {UPDATE} FROM updates {only} ORDER BY round, silo", *values)
        ]

    def update(self, round: int, silo: str) -> UpdateRow | None:
        """The update of a silo that a round counts."""
        query = f"SELECT {UPDATE} FROM updates WHERE round = ? AND silo = ?"
        return next((_update(row) for row in self._rows(query, round, silo)), None)

    def verified_update(self, row: UpdateRow) -> Path:
        """The file of an update of a round that is not closed; CheckpointError if it is missing or changed."""
        return self._checked(self.out / row.file, row.sha256).path

    def record(self, kind: str, round: int | None, value: Any) -> None:
        """Adds to the journal."""
        self._write("journal", kind, round, json.dumps(value))

    def recorded(self, kind: str) -> list[Any]:
        """The journal's values of a kind, in order."""
        rows = self._rows("SELECT value FROM journal WHERE kind = ? ORDER BY number", kind)
        return [json.loads(value) for (value,) in rows]

    def close(self) -> None:
        """May be called more than once."""
        with faults.tidying(self._path):
            self._database.close()

    def _begin(self, config: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
        values = {"format": FORMAT, "run_id": secrets.token_hex(16)}
        values |= {"config": json.dumps(config), "contents": json.dumps(contents)}
        with self._database:
            self._database.executescript(f"BEGIN; {SCHEMA}")
            for key, value in values.items():
                self._insert("run", key, value)
            self._database.execute("COMMIT")
        self.sync()

    def _write(self, table: str, *values: str | int | None, replace: bool = False) -> None:
        self._insert(table, *values, replace=replace)
        self.sync()

    def _insert(self, table: str, *values: str | int | None, replace: bool = False) -> None:
        insert = f"INSERT {'OR REPLACE ' if replace else ''}INTO {table} ({COLUMNS[table]}, seal)"
        with _explaining(self._path, "written"):
            self._database.execute(f"{insert} VALUES ({'?, ' * len(values)}?)", (*values, _seal(table, values)))

    def _rows(self, query: str, *values: str | int) -> list[Any]:
        with _explaining(self._path, "read"):
            return self._database.execute(query, values).fetchall()

    def _checked(self, path: Path, sha256: str) -> Payload:
        file = payload(path) if path.is_file() else None
        if file is None or file.sha256.hex() != sha256:
            raise CheckpointError(
                f"{path}: is not the file that this run wrote", "restore it from a backup, or start a new run"
            )
        return file

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


def has_begun(out: Path) -> bool:
    """Whether `out` holds a run, even one that has lost its ledger."""
    return (out / LEDGER_FILE).exists() or (out / "rounds").exists()


def look(out: Path) -> Begun | None:
    """What the run in `out` was begun with; None if none was. No server may be running there; nothing is changed.

    Raises:
        CheckpointError: the ledger is torn, or of another version of fedpft.
    """
    path = out / LEDGER_FILE
    if not has_begun(out):
        return None
    with _explaining(path, "read"), tempfile.TemporaryDirectory() as place:
        copy = Path(place) / LEDGER_FILE  # beside what it merely reads, SQLite makes files too
        for file in (path, path.with_name(f"{LEDGER_FILE}-wal")):
            if file.exists():
                shutil.copyfile(file, copy.with_name(file.name))
        with contextlib.closing(sqlite3.connect(copy)) as database:
            return _begun(path, database) if _has_tables(database, out) else None


def try_out(directory: Path) -> None:
    """Keeps a ledger for a moment in a directory that is there, and leaves nothing.

    Raises:
        ConfigError: its file system lacks what SQLite needs.
    """
    path = directory / ".tried.sqlite"
    try:
        with contextlib.closing(_connect(path)) as database:
            database.execute("CREATE TABLE IF NOT EXISTS tried (value)")
    except sqlite3.Error as error:
        if _remedy(error) == ROOM:
            raise CheckpointError(f"{directory}: {error}", ROOM) from None
        raise ConfigError(
            f"{directory}: its file system lacks what SQLite needs ({error})", "give `out` a directory on a local disk"
        ) from None
    finally:
        with faults.tidying(path):
            for suffix in ("", "-wal", "-shm", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        if database.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise sqlite3.OperationalError("no write-ahead log")
        database.execute("PRAGMA synchronous = NORMAL")  # `sync` does what FULL would, when it is due
    except BaseException:
        database.close()
        raise
    return database


@contextlib.contextmanager
def _explaining(path: Path, what: str) -> Iterator[None]:
    """what: "read" or "written"."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # of this code's own making
    except (sqlite3.Error, UnicodeDecodeError) as error:
        remedy = _remedy(error)
        kind = CheckpointError if remedy == RESTORE else LedgerUnusable
        raise kind(f"{path}: cannot be {what} ({error})", remedy) from None


def _remedy(error: Exception) -> str:
    """What to do about a fault of SQLite, by its text."""
    return next((remedy for text, remedy in REMEDIES.items() if text in str(error)), RESTORE)


def _has_tables(database: sqlite3.Connection, out: Path) -> bool:
    if database.execute("SELECT 1 FROM sqlite_master").fetchone():
        return True
    if (out / "rounds").exists():
        raise sqlite3.DatabaseError("it is empty, but its run has begun")
    return False


def _begun(path: Path, database: sqlite3.Connection) -> Begun:
    """Looks at the whole ledger."""
    known = dict(database.execute("SELECT key, value FROM run"))
    for table, columns in COLUMNS.items():
        for *values, seal in database.execute(f"SELECT {columns}, seal FROM {table}"):
            if seal != _seal(table, values):
                raise sqlite3.DatabaseError(f"a row of {table} is damaged")
    if known.get("format") != FORMAT or not known.keys() >= {"run_id", "config", "contents"}:
        raise CheckpointError(
            f"{path}: written by another version of fedpft", "go on with that version, or use another OUT"
        )
    config, contents = json.loads(known["config"]), json.loads(known["contents"])
    journal = dict(database.execute("SELECT kind, value FROM journal WHERE kind IN ('proxy', 'finished')"))
    proxy = json.loads(journal["proxy"]) if "proxy" in journal else None
    return Begun(known["run_id"], config, contents, proxy, "finished" in journal)


def _update(row: Any) -> UpdateRow:
    values = [*row[:-1], json.loads(row[-1])]
    return UpdateRow(*values)


def _seal(table: str, values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([table, *values], default=repr).encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key, dotted, whose values differ."""
    for key in [*before, *(key for key in after if key not in before)]:
        one, other = before.get(key), after.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if deeper := _difference(one, other, f"{prefix}{key}."):
                return deeper
        elif one != other:
            return f"{prefix}{key}"
    return None
