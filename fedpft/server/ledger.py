"""The run ledger, OUT/ledger.sqlite: what has happened in a run, so that a restarted server goes on from there.

Each method is one transaction that is on disk when it returns. A file is entered with its SHA-256 after it is in place,
so whatever the ledger names is whole; `verified` looks at the file again before it is used.

    run        key -> value: format, run_id, config (JSON)
    files      name under OUT -> sha256, bytes
    rounds     a row for each time a round was begun: silos that were picked
    updates    a row for each update that counts
    journal    what the run has recorded, in order: (kind, round, JSON)
"""

import datetime
import json
import secrets
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpft.errors import CheckpointError, ConfigError
from fedpft.wire.transfer import payload

FORMAT = "1"
NAME = "ledger.sqlite"
SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE files (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE rounds (
    round INTEGER, attempt INTEGER, silos TEXT NOT NULL, count_inactivity INTEGER NOT NULL, begun_at TEXT NOT NULL,
    PRIMARY KEY (round, attempt)
);
CREATE TABLE updates (
    round INTEGER, silo TEXT, attempt INTEGER NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    samples INTEGER NOT NULL, metrics TEXT NOT NULL, received_at TEXT NOT NULL, PRIMARY KEY (round, silo)
);
CREATE TABLE journal (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, round INTEGER, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class RoundRow:
    """A round as it was last begun."""

    round: int
    attempt: int
    silos: tuple[str, ...]
    count_inactivity: bool


@dataclass(frozen=True)
class UpdateRow:
    """An update that counts. `sha256` is hexadecimal."""

    round: int
    silo: str
    attempt: int
    sha256: str
    bytes: int
    samples: int
    metrics: dict[str, float]


class Ledger:
    """One thread at a time; the callers hold the lock of the round in which they write.

    run_id: of this run, the same after every restart.
    """

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        """Opens the ledger of a run that has begun in `out`, or begins one.

        Args:
            config: what the run's result depends on; a run cannot go on under another.

        Raises:
            CheckpointError: the ledger is torn, or of another version of fedpft.
            ConfigError: `out` holds a run with another configuration.
        """
        self._out, self._path = out, out / NAME
        out.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            if self._database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its integrity check fails")
            if not self._database.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._begin(config)
            known = dict(self._database.execute("SELECT key, value FROM run"))
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{self._path}: cannot be read ({error})", "restore it from a backup, or start a new run in another OUT"
            ) from None
        if known.get("format") != FORMAT:
            raise CheckpointError(
                f"{self._path}: written by another version of fedpft", "go on with that version, or use another OUT"
            )
        self.run_id: str = known["run_id"]
        if differing := _difference(json.loads(known["config"]), json.loads(json.dumps(config))):
            raise ConfigError(
                f"{self._out}: holds a run that was begun with another {differing}",
                "set it back to go on with that run, or give the new run another `out`",
            )

    def enter_file(self, path: Path) -> None:
        """Enters a file under OUT that is in place and synced."""
        file = payload(path)
        self._write(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?)", self._name(path), file.sha256.hex(), file.total_bytes
        )

    def verified(self, path: Path) -> Path | None:
        """The file if it was entered and is as it was then; None if it never was entered.

        Raises:
            CheckpointError: it is missing or changed.
        """
        row = self._database.execute("SELECT sha256 FROM files WHERE name = ?", (self._name(path),)).fetchone()
        if row is None:
            return None
        if not path.is_file() or payload(path).sha256.hex() != row[0]:
            raise CheckpointError(
                f"{path}: is not the file that this run wrote", "restore it from a backup, or start a new run"
            )
        return path

    def begin_round(self, row: RoundRow) -> None:
        """A round begins, or begins anew."""
        silos = json.dumps(row.silos)
        self._write(
            "INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", row.round, row.attempt, silos, row.count_inactivity, _now()
        )

    def last_round(self) -> RoundRow | None:
        """The round that was begun last."""
        row = self._database.execute(
            "SELECT round, attempt, silos, count_inactivity FROM rounds ORDER BY round DESC, attempt DESC LIMIT 1"
        ).fetchone()
        return None if row is None else RoundRow(row[0], row[1], tuple(json.loads(row[2])), bool(row[3]))

    def enter_update(self, row: UpdateRow) -> None:
        """An update counts. Its file is in place."""
        self._write(
            "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row.round,
            row.silo,
            row.attempt,
            row.sha256,
            row.bytes,
            row.samples,
            json.dumps(row.metrics),
            _now(),
        )

    def updates(self) -> list[UpdateRow]:
        """All updates that ever counted, in the order of rounds and of the silos' names."""
        rows = self._database.execute(
            "SELECT round, silo, attempt, sha256, bytes, samples, metrics FROM updates ORDER BY round, silo"
        )
        return [UpdateRow(*row[:6], metrics=json.loads(row[6])) for row in rows]

    def record(self, kind: str, round: int | None, value: Any) -> None:
        """Adds to the journal."""
        self._write("INSERT INTO journal (kind, round, value) VALUES (?, ?, ?)", kind, round, json.dumps(value))

    def recorded(self, kind: str) -> list[Any]:
        """The journal's values of a kind, in order."""
        rows = self._database.execute("SELECT value FROM journal WHERE kind = ? ORDER BY number", (kind,))
        return [json.loads(value) for (value,) in rows]

    def close(self) -> None:
        """May be called more than once."""
        self._database.close()

    def _begin(self, config: Mapping[str, Any]) -> None:
        values = {"format": FORMAT, "run_id": secrets.token_hex(16), "config": json.dumps(config)}
        with self._database:
            self._database.executescript(f"BEGIN; {SCHEMA}")
            self._database.executemany("INSERT INTO run VALUES (?, ?)", values.items())
            self._database.execute("COMMIT")

    def _write(self, statement: str, *values: Any) -> None:
        self._database.execute(statement, values)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._out).as_posix()


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
