"""The audit log: whatever is done to a line is found, and a crash loses nothing that was written."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpft import audit, cli
from fedpft.audit import AuditLog, verify
from fedpft.errors import CheckpointError

shared_directory = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, count: int = 4) -> list[bytes]:
    with AuditLog(path) as log:
        for round in range(count):
            log.append("sent", peer="north", round=round, file="adapter.safetensors", bytes=1000, sha256="ab" * 32)
    return path.read_bytes().splitlines(keepends=True)


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    with AuditLog(path) as log:
        log.append("enrolled", peer="north", samples=3)
        log.append("sent", peer="north", bytes=10, note="größer\n<>")
        log.append("received", peer="south", bytes=7)
    entries = list(audit.read(path))
    assert [(entry.number, entry.event) for entry in entries] == [(1, "enrolled"), (2, "sent"), (3, "received")]
    assert entries[1].fields == {"peer": "north", "bytes": 10, "note": "größer\n<>"}
    summary = verify(path)
    assert (summary.entries, summary.sent, summary.received) == (3, {"north": 10}, {"south": 7})
    assert summary.head == entries[-1].hash
    assert len(path.read_bytes().splitlines()) == 3


def test_each_line_holds_the_hash_of_the_one_before(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in write(tmp_path / "log")]
    assert [line["previous"] for line in lines] == ["0" * 64, *(line["hash"] for line in lines[:-1])]


def test_a_log_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, 2)
    before = path.read_bytes()
    write(path, 2)
    assert path.read_bytes().startswith(before)
    assert verify(path).entries == 4


def test_an_empty_log_is_in_order(tmp_path: Path) -> None:
    write(tmp_path / "log", 0)
    assert verify(tmp_path / "log") == audit.Summary()


@shared_directory
@given(data=st.data())
def test_every_changed_byte_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    content = bytearray(b"".join(write(path)))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"log: line [1-4]\b"):
        verify(path)


@pytest.mark.parametrize(
    ("arranged", "place"),
    [([1, 2, 3], 1), ([0, 2, 3], 2), ([0, 1, 3], 3), ([1, 0, 2, 3], 1), ([0, 1, 3, 2], 3), ([0, 1, 1, 2, 3], 3)],
)
def test_a_line_that_is_missing_moved_or_there_twice_is_named(arranged: list[int], place: int, tmp_path: Path) -> None:
    lines = write(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"".join(lines[number] for number in arranged))
    with pytest.raises(CheckpointError, match=f"log: line {place} does not follow"):
        verify(tmp_path / "log")


def test_a_line_of_another_log_is_found(tmp_path: Path) -> None:
    lines = write(tmp_path / "log")
    other = write(tmp_path / "other")
    (tmp_path / "log").write_bytes(b"".join([*lines[:2], other[2], lines[3]]))
    if lines[1] != other[1]:
        with pytest.raises(CheckpointError, match="line 3 does not follow"):
            verify(tmp_path / "log")


def test_a_missing_end_shows_only_by_the_head_that_was_noted(tmp_path: Path) -> None:
    lines = write(tmp_path / "log")
    noted = verify(tmp_path / "log").head
    (tmp_path / "log").write_bytes(b"".join(lines[:-1]))
    assert verify(tmp_path / "log").head != noted


@shared_directory
@given(data=st.data())
def test_a_line_torn_by_a_crash_is_cut_off_and_the_cut_recorded(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    lines = write(path)
    kept = data.draw(st.integers(1, len(lines[-1]) - 1))
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    with pytest.raises(CheckpointError, match=r"line 4, the last, is torn.*died") as caught:
        verify(path)
    assert "cuts the line off" in caught.value.remedy
    with AuditLog(path) as log:
        log.append("started")
    *_, cut, started = audit.read(path)
    assert (cut.number, cut.event, started.event) == (4, "cut off", "started")
    assert cut.fields == {"bytes": kept, "text": lines[-1][:kept].decode()}


def test_a_torn_first_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'{"num\xff')
    AuditLog(tmp_path / "log").close()
    (cut,) = audit.read(tmp_path / "log")
    assert cut.fields["text"] == '{"num\\xff'


@pytest.mark.parametrize("fault", ["changed", "foreign", "endless"])
def test_a_log_with_a_wrong_last_line_is_not_gone_on_with(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    content = b"".join(write(path))
    wrong = {
        "changed": content.replace(b'"round": 3', b'"round": 4'),
        "foreign": content + b"{}\n",
        "endless": b"x" * (2 * audit.LONGEST_LINE_BYTES + 1),
    }[fault]
    path.write_bytes(wrong)
    with pytest.raises(CheckpointError, match="the last line") as caught:
        AuditLog(path)
    assert "evidence" in caught.value.remedy
    assert path.read_bytes() == wrong


def test_many_threads_make_one_chain(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log") as log:
        threads = [
            threading.Thread(target=lambda name: [log.append("x", peer=name) for _ in range(50)], args=[str(number)])
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify(tmp_path / "log").entries == 400


def test_a_killed_process_loses_nothing_that_it_recorded(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedpft.audit import AuditLog\n"
        "log, number = AuditLog(Path(sys.argv[1])), 0\n"
        "while True:\n    number += 1; log.append('x', value=number); print(number, flush=True)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "log"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(100):
            said = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        said = max([said, *map(int, process.stdout.read().splitlines())])
        process.wait()
        process.stdout.close()
        AuditLog(tmp_path / "log").close()  # as the next process, for a line may be half written
        recorded = [entry.fields["value"] for entry in audit.read(tmp_path / "log") if entry.event == "x"]
        assert recorded[-1] >= said


def test_a_full_disk_is_an_error_and_leaves_no_piece_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    real = os.write
    with AuditLog(path) as log:
        log.append("x")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, line: real(file, line[:20]))
            with pytest.raises(CheckpointError, match="disk is full"):
                log.append("x")
        log.append("x")
    assert verify(path).entries == 2


def test_a_piece_of_a_line_that_stays_is_the_last_and_is_cut_off_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> None:
        raise OSError(5, "Input/output error")

    path, real = tmp_path / "log", os.write
    log = AuditLog(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: real(file, line[:20]))
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(CheckpointError, match="disk is full"):
            log.append("x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        log.append("x")
    with AuditLog(path) as log:
        log.append("x")
    assert [entry.event for entry in audit.read(path)] == ["cut off", "x"]


def test_fields_cannot_take_the_place_of_the_chain(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log") as log:
        with pytest.raises(ValueError, match="'hash'"):
            log.append("x", hash="y")
        with pytest.raises(ValueError, match="JSON"):
            log.append("x", value=float("nan"))
        with pytest.raises(ValueError, match="a line may have"):
            log.append("x", value="y" * audit.LONGEST_LINE_BYTES)
    assert verify(tmp_path / "log").entries == 0


def test_the_table_shows_what_went_to_whom(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log") as log:
        log.append(
            "sent", peer="north", round=3, file="adapter.safetensors", bytes=12345, sha256="ab" * 32, note="\x1b[2J"
        )
    (entry,) = audit.read(tmp_path / "log")
    heading, row = audit.format_heading(), audit.format_entry(entry)
    for column, text in {"peer": "north", "file": "adapter.safetensors", "sha256": "ab" * 8 + " "}.items():
        assert row[heading.index(column) :].startswith(text)
    assert "12345" in row
    assert row.endswith("note=?[2J")
    assert "north: 12345 bytes sent, 0 received" in audit.format_summary(verify(tmp_path / "log"))


def test_the_command_prints_the_log_and_ends_with_the_code_of_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write(tmp_path / "log")
    monkeypatch.setattr(sys, "argv", ["fedpft", "audit", str(tmp_path / "log")])
    assert cli.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("adapter.safetensors") == 4
    assert f"head: {json.loads(lines[-1])['hash']}" in printed
    (tmp_path / "log").write_bytes(b"".join([lines[0], *lines[2:]]))
    assert cli.main() == CheckpointError.exit_code
    assert "line 2 does not follow" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fedpft", "audit", str(tmp_path / "other"), "--since", "2999"])
    write(tmp_path / "other")
    assert cli.main() == 0
    printed = capsys.readouterr().out
    assert "adapter.safetensors" not in printed
    assert "4 lines, all in order" in printed


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        verify(tmp_path / "nowhere")
