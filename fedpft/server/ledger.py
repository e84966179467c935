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
import hashlib
import json
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpft.errors import CheckpointError, ConfigError
from fedpft.wire.transfer import Payload, payload

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
