"""The run ledger: whatever a method wrote is there after any crash, and what was changed since is named."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpft.errors import CheckpointError, ConfigError
from fedpft.server.ledger import LEDGER_FILE, Ledger, RoundRow, UpdateRow, try_out

CONFIG = {"seed": 0, "training": {"rounds": 6, "batch": 32}, "silos": ["north", "south"]}
ROUND = RoundRow(1, 1, ("north",), ("north", "south"), True)


def update(silo: str, round: int = 1, **changes: Any) -> UpdateRow:
    values = {"attempt": 1, "file": f"updates/{silo}", "sha256": "ab" * 32, "bytes": 10, "samples": 3}
    return UpdateRow(round, silo, metrics={"train_loss": 0.25}, **(values | changes))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "out", CONFIG)
    yield opened
    opened.close()


def reopened(ledger: Ledger, config: Any = CONFIG) -> Ledger:
    ledger.close()
    return Ledger(ledger.out, config)


def test_a_restart_finds_all_that_was_written(ledger: Ledger) -> None:
    path = ledger.adapter_path(0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"adapter")
    assert not ledger.entered(path)
    ledger.enter_file(path)
    ledger.begin_round(ROUND)
    ledger.enter_update(update("south"))
    ledger.enter_update(update("north"))
    ledger.record("round", 1, {"loss": [0.1, None]})
    ledger.record("round", 2, 5)
    ledger.record("other", None, "x")
    run_id = ledger.run_id
    ledger = reopened(ledger)
    assert ledger.run_id == run_id
    assert ledger.entered(path)
    assert ledger.verified(path).path.read_bytes() == b"adapter"
    assert ledger.last_round() == ROUND
    assert ledger.updates() == [update("north"), update("south")]
    assert ledger.update(1, "north") == update("north")
    assert ledger.update(2, "north") is None
    assert ledger.recorded("round") == [{"loss": [0.1, None]}, 5]
    ledger.close()
    ledger.close()


def test_every_run_has_an_id_of_its_own(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other", CONFIG)
    assert other.run_id != ledger.run_id
    other.close()


def test_the_last_round_is_the_one_that_was_begun_last(ledger: Ledger) -> None:
    assert ledger.last_round() is None
    rows = [RoundRow(round, attempt, ("a",), ("a",), False) for round, attempt in ((1, 1), (2, 1), (2, 2), (10, 1))]
    for row in rows:
        ledger.begin_round(row)
        assert ledger.last_round() == row


def test_a_round_counts_one_update_of_a_silo(ledger: Ledger) -> None:
    ledger.enter_update(update("north"))
    with pytest.raises(sqlite3.IntegrityError):
        ledger.enter_update(update("north", sha256="cd" * 32))
    assert ledger.updates() == [update("north")]


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_file_that_is_not_as_it_was_entered_is_named(fault: str, ledger: Ledger) -> None:
    path = ledger.snapshot_path(3)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"patch")
    ledger.enter_file(path)
    if fault == "changed":
        path.write_bytes(b"pitch")
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"snapshot-3\.safetensors: is not the file"):
        ledger.verified(path)


def test_an_update_that_is_not_as_it_arrived_is_named(ledger: Ledger) -> None:
    with pytest.raises(CheckpointError, match="updates/north: is not the file"):
        ledger.verified_update(update("north"))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (CONFIG | {"seed": 1}, "seed"),
        (CONFIG | {"training": {"rounds": 6, "batch": 16}}, r"training\.batch"),
        (CONFIG | {"silos": ["north"]}, "silos"),
        (CONFIG | {"more": 1}, "more"),
        ({"seed": 0, "silos": ["north", "south"]}, "training"),
    ],
)
def test_a_run_does_not_go_on_under_another_configuration(config: Any, key: str, ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match=f"another {key} -> set it back"):
        reopened(ledger, config)


def test_a_configuration_is_compared_as_json_reads_it(ledger: Ledger) -> None:
    reopened(ledger, CONFIG | {"silos": ("north", "south")}).close()


def test_a_ledger_of_another_format_is_refused(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.close()
    monkeypatch.setattr("fedpft.server.ledger.FORMAT", "99")
    with pytest.raises(CheckpointError, match="another version of fedpft"):
        Ledger(ledger.out, CONFIG)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A ledger's file with some content, closed."""
    ledger = Ledger(tmp_path_factory.mktemp("ledger"), CONFIG)
    for round in range(1, 20):
        ledger.begin_round(RoundRow(round, 1, ("north",), ("north",), False))
        ledger.enter_update(update("north", round))
        ledger.record("round", round, {"text": "x" * 300})
    ledger.close()
    return (ledger.out / LEDGER_FILE).read_bytes()


def opened(content: bytes, place: Path) -> Ledger:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / LEDGER_FILE).write_bytes(content)
    return Ledger(place, CONFIG)


@pytest.mark.parametrize("kept", [100, 4096, 4097, 10_000, -4096, -1])
def test_a_ledger_that_was_cut_is_refused(kept: int, written: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ledger\.sqlite: cannot be read") as caught:
        opened(written[:kept], tmp_path / "out")
    assert "backup" in caught.value.remedy


def test_a_ledger_whose_damage_python_cannot_even_print_is_refused(written: bytes, tmp_path: Path) -> None:
    """SQLite quotes the damaged text, which is not UTF-8, and Python fails over the message."""
    damaged = written.replace(b"CREATE TABLE journal", b"CREATE\x80TABLE journal")
    assert damaged != written
    with pytest.raises(CheckpointError, match=r"ledger\.sqlite: cannot be read"):
        opened(damaged, tmp_path / "out")


@pytest.mark.parametrize("fault", ["empty", "missing"])
def test_a_run_that_has_lost_its_ledger_does_not_begin_anew(fault: str, ledger: Ledger) -> None:
    ledger.close()
    ledger.adapter_path(0).parent.mkdir(parents=True)
    if fault == "empty":
        (ledger.out / LEDGER_FILE).write_bytes(b"")
    else:
        (ledger.out / LEDGER_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"ledger\.sqlite: cannot be read .it is empty, but its run has begun"):
        Ledger(ledger.out, CONFIG)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ledger\.sqlite: cannot be read"):
        opened(b"no database at all" * 1000, tmp_path / "out")


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_a_damaged_ledger_is_refused_or_says_what_was_written(
    data: st.DataObject, written: bytes, tmp_path: Path
) -> None:
    """A damage in free space harms nothing."""
    content = bytearray(written)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 200)))
        damage = data.draw(st.binary(min_size=1, max_size=64))
        content[place : place + len(damage)] = damage[: len(content) - place]
    try:
        ledger = opened(bytes(content), tmp_path / "out")
    except CheckpointError:
        return
    for row in ledger.updates():
        assert row == update("north", row.round)
    assert all(value == {"text": "x" * 300} for value in ledger.recorded("round"))
    last = ledger.last_round()
    assert last is None or last == RoundRow(last.round, 1, ("north",), ("north",), False)
    ledger.close()


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("updates", "samples = 1000000"),
        ("updates", "sha256 = 'cd'"),
        ("rounds", "silos = '[]'"),
        ("journal", "value = '0'"),
        ("files", "sha256 = 'cd'"),
        ("run", "value = '{}' WHERE key = 'config'"),
    ],
)
def test_a_changed_value_is_found_when_the_ledger_is_opened(table: str, change: str, ledger: Ledger) -> None:
    ledger.enter_update(update("north"))
    ledger.begin_round(ROUND)
    ledger.record("kind", 1, "value")
    ledger.enter_file(ledger.out / LEDGER_FILE)
    ledger.close()
    with sqlite3.connect(ledger.out / LEDGER_FILE) as database:
        database.execute(f"UPDATE {table} SET {change}")
    database.close()
    with pytest.raises(CheckpointError, match=f"a row of {table} is damaged"):
        Ledger(ledger.out, CONFIG)


def test_threads_may_write_at_once(ledger: Ledger) -> None:
    def work(silo: str) -> None:
        for round in range(1, 11):
            ledger.enter_update(update(silo, round))
            assert ledger.update(round, silo) is not None

    threads = [threading.Thread(target=work, args=[f"silo{number}"]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.updates()) == 40


PROGRAM = f"""
import sys
from pathlib import Path
from fedpft.server.ledger import Ledger, UpdateRow
ledger = Ledger(Path(sys.argv[1]), {CONFIG!r})
number = len(ledger.recorded("step"))
while True:
    number += 1
    ledger.enter_update(UpdateRow(number, "north", 1, "f", "ab", 1, 1, {{}}))
    ledger.record("step", number, number)
    print(number, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_was_told_was_written(tmp_path: Path) -> None:
    run_ids, said = set(), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(40):
            assert int(process.stdout.readline()) == said + 1
            said += 1
        process.send_signal(signal.SIGKILL)
        said = max([said, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        ledger = Ledger(tmp_path, CONFIG)
        run_ids.add(ledger.run_id)
        steps, updates = ledger.recorded("step"), len(ledger.updates())
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) - said in (0, 1)  # written, and killed before it could be said
        assert updates - len(steps) in (0, 1)
        if updates > len(steps):
            ledger.record("step", updates, updates)
        said = updates
        ledger.close()
    assert len(run_ids) == 1


KILLED_AT_EACH_STATEMENT = f"""
import os, signal, sqlite3, sys
from pathlib import Path
from fedpft.server.ledger import Ledger
connect = sqlite3.connect

def run(out, statement):
    def connected(*arguments, **options):
        database, left = connect(*arguments, **options), [statement]
        def trace(_):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        database.set_trace_callback(trace)
        return database
    sqlite3.connect = connected
    Ledger(out, {CONFIG!r}).record("kind", None, "value")

for statement in range(1, 100):
    child = os.fork()
    if child == 0:
        run(Path(sys.argv[1]) / str(statement), statement)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(statement - 1)
"""


def test_a_process_killed_at_any_statement_leaves_a_run_or_nothing(tmp_path: Path) -> None:
    """Also at one of those that make the tables: the next process goes on or begins anew."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_STATEMENT, tmp_path], stdout=subprocess.PIPE, text=True, check=True
    )
    statements = int(done.stdout)
    assert statements > 10
    for statement in range(1, statements + 1):
        ledger = Ledger(tmp_path / str(statement), CONFIG)
        assert ledger.recorded("kind") == []
        ledger.record("kind", None, "value")
        ledger.close()
    finished = Ledger(tmp_path / str(statements + 1), CONFIG)
    assert finished.recorded("kind") == ["value"]
    finished.close()


def test_a_full_disk_is_named(ledger: Ledger) -> None:
    ledger._database.execute("PRAGMA max_page_count = 1")  # SQLite's own: no page can be added
    with pytest.raises(CheckpointError, match=r"ledger\.sqlite: cannot be written .*full") as caught:
        ledger.record("kind", None, "x" * 1_000_000)
    assert "make room" in caught.value.remedy


# --- what SQLite says -------------------------------------------------------------------------------------------------


class Failing(sqlite3.Connection):
    """Says something when a statement comes that has a word in it."""

    word, error = "", sqlite3.OperationalError("")

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if self.word and self.word in statement:
            raise self.error
        return super().execute(statement, *values)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Failing]]:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Failing))
    yield Failing
    Failing.word = ""


SAID = [
    ("database or disk is full", "make room"),
    ("attempt to write a readonly database", "make it writable"),
    ("unable to open database file", "make it readable and writable"),
    ("disk I/O error", "local disk"),
    ("locking protocol", "local disk"),
    ("database is locked", "stop whatever else has it open"),
    ("database disk image is malformed", "restore it from a backup"),
]


@pytest.mark.parametrize(("text", "remedy"), SAID)
@pytest.mark.parametrize("word", ["SELECT", "INSERT", "PRAGMA"])
def test_what_sqlite_says_is_one_line_with_its_remedy(
    word: str, text: str, remedy: str, failing: type[Failing], tmp_path: Path
) -> None:
    opened = Ledger(tmp_path / "out", CONFIG)
    calls: list[Any] = [
        lambda: opened.begin_round(ROUND),
        lambda: opened.enter_update(update("north")),
        lambda: opened.record("round", 1, {}),
        lambda: opened.last_round(),
        lambda: opened.updates(),
        lambda: opened.update(1, "north"),
        lambda: opened.recorded("round"),
        lambda: opened.entered(opened.adapter_path(1)),
        lambda: Ledger(tmp_path / "out", CONFIG),
    ]
    wanted = {"INSERT": calls[:3], "SELECT": calls[3:], "PRAGMA": calls[-1:]}[word]
    failing.word = word
    for kind in (sqlite3.OperationalError, sqlite3.DatabaseError):
        failing.error = kind(text)
        for call in wanted:
            with pytest.raises(CheckpointError, match=text) as caught:
                call()
            assert remedy in caught.value.remedy
    failing.word = ""
    opened.close()


def test_a_log_that_is_gone_is_named(ledger: Ledger) -> None:
    (ledger.out / f"{LEDGER_FILE}-wal").unlink()
    with pytest.raises(CheckpointError, match="wal: is gone"):
        ledger.sync()


def test_a_ledger_that_cannot_be_closed_hides_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def close(self) -> None:
            raise sqlite3.OperationalError("unable to close due to unfinalized statements")

    database = ledger._database
    monkeypatch.setattr(ledger, "_database", Stuck())
    ledger.close()
    database.close()


@pytest.mark.parametrize("text", ["locking protocol", "disk I/O error"])
def test_a_file_system_that_lacks_what_a_ledger_needs_is_found_before_there_is_one(
    text: str, failing: type[Failing], tmp_path: Path
) -> None:
    failing.word, failing.error = "journal_mode", sqlite3.OperationalError(text)
    with pytest.raises(ConfigError, match=f"lacks what SQLite needs .{text}") as caught:
        try_out(tmp_path)
    assert caught.value.remedy == "give `out` a directory on a local disk"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_a_write_ahead_log_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda _, **options: connect(":memory:", **options))  # has none either
    with pytest.raises(ConfigError, match="no write-ahead log"):
        try_out(tmp_path)


def test_where_a_ledger_can_be_kept_nothing_is_left_of_the_trial(tmp_path: Path) -> None:
    try_out(tmp_path)
    assert list(tmp_path.iterdir()) == []
