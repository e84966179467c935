import hashlib
import re
import tempfile
import threading
from pathlib import Path

import fedpft.wire  # noqa: F401  isort: skip  (sets gRPC's environment before grpc is imported)
import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpft import errors
from fedpft.errors import FedPFTError, InvalidUpdate, RefusedByServer, ServerUnreachable, TransferCorrupt
from fedpft.wire import channel, status, transfer
from fedpft.wire.channel import CORRUPT_ATTEMPTS, LONGEST_PAUSE_SECONDS, TELL_SECONDS, Watchdog, pauses, persist
from fedpft.wire.tensors import check_groups, read_tensors, write_tensors
from fedpft.wire.v1 import federation_pb2 as pb

ROOT = Path(__file__).parent.parent
PROTO = ROOT / "protos" / "fedpft" / "wire" / "v1" / "federation.proto"


# --- generated code ---------------------------------------------------------------------------------------------------


def test_generated_code_is_that_of_the_proto(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{ROOT / 'protos'}", *outputs, str(PROTO)]) == 0
    remedy = "run the command at the head of federation.proto"
    for name in ("federation_pb2.py", "federation_pb2.pyi", "federation_pb2_grpc.py"):
        committed = (ROOT / "fedpft" / "wire" / "v1" / name).read_text()
        generated = (tmp_path / "fedpft" / "wire" / "v1" / name).read_text()
        if _versions(committed) == _versions(generated):
            assert committed == generated, remedy
    # Whatever version of the compiler made them, the messages and methods must be the same.
    descriptors = [
        re.search(r"AddSerializedFile\((b'.*')\)", (directory / "fedpft/wire/v1/federation_pb2.py").read_text())[1]
        for directory in (ROOT, tmp_path)
    ]
    assert descriptors[0] == descriptors[1], remedy


def _versions(source):
    return re.findall(r"Protobuf Python Version: (\S+)|GRPC_GENERATED_VERSION = '(\S+)'", source)


def test_no_message_names_its_sender():
    names = [field.name for message in pb.DESCRIPTOR.message_types_by_name.values() for field in message.fields]
    assert not {"silo", "sender", "identity"} & set(names)


# --- files in chunks --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 16)


def written(directory, content):
    path = directory / "file.bin"
    path.write_bytes(content)
    return transfer.payload(path)


def sent(file, offset=0):
    """The chunks as the other side reads them."""
    return [pb.FetchFileResponse.FromString(frame).chunk for frame in file.frames(pb.FetchFileResponse, offset)]


def receive(directory, file, chunks):
    with transfer.Incoming(directory, file.announcement()) as incoming:
        for chunk in chunks:
            incoming.write(chunk)
        incoming.finish(directory / file.name)
    return (directory / file.name).read_bytes()


def part(directory):
    (path,) = directory.glob("*.part")
    return path


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=200), chunk=st.integers(1, 40), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_whatever_the_cuts_a_file_arrives_whole_and_no_byte_twice(content, chunk, cuts):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", chunk)
        there = Path(place) / "there"
        file, crossed, counted = written(Path(place), content), bytearray(), []
        for room in [*cuts, len(content)]:  # in each attempt so many bytes pass, a part of the last chunk among them
            with transfer.Incoming(there, file.announcement()) as incoming:
                assert incoming.offset == len(crossed)
                for each in file.frames(pb.FetchFileResponse, incoming.offset, counted.append):
                    arrived = pb.FetchFileResponse.FromString(each).chunk
                    if (room := room - len(arrived.data)) < 0:
                        break
                    assert incoming.write(arrived) == len(arrived.data)
                    crossed += arrived.data
                if len(crossed) == len(content):
                    break
        assert receive(there, file, []) == content == crossed
        assert sum(counted) == len(content)
        assert not list(there.glob("*.part"))


@settings(deadline=None, max_examples=100)
@given(content=st.binary(min_size=1, max_size=100), kept=st.integers(0, 100), data=st.data())
def test_a_transfer_goes_on_from_any_byte(content, kept, data):
    """A process may be killed between any two bytes that it writes."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", data.draw(st.integers(1, 40)))
        there = Path(place) / "there"
        there.mkdir()
        file, kept = written(Path(place), content), min(kept, len(content))
        (there / f"{file.sha256.hex()}.part").write_bytes(content[:kept])
        chunks = sent(file, kept)
        assert b"".join(chunk.data for chunk in chunks) == content[kept:]
        assert receive(there, file, chunks) == content


@settings(deadline=None, max_examples=100)
@given(content=st.binary(min_size=1, max_size=100), data=st.data())
def test_a_damaged_byte_is_not_kept(content, data):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 16)
        there = Path(place) / "there"
        file = written(Path(place), content)
        chunks = sent(file)
        bad = data.draw(st.sampled_from(chunks))
        position = data.draw(st.integers(0, len(bad.data) - 1))
        damaged = bytearray(bad.data)
        damaged[position] ^= data.draw(st.integers(1, 255))
        bad.data = bytes(damaged)
        with pytest.raises(TransferCorrupt, match=r"file\.bin is not what was sent"):
            receive(there, file, chunks)
        assert part(there).read_bytes() == content[: bad.offset]
        assert receive(there, file, sent(file, bad.offset)) == content


@settings(deadline=None, max_examples=60)
@given(content=st.binary(min_size=2, max_size=100), data=st.data())
def test_a_part_that_was_damaged_is_found_by_the_next_chunk_and_dropped(content, data):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 16)
        there = Path(place) / "there"
        there.mkdir()
        file = written(Path(place), content)
        damaged = bytearray(content[: data.draw(st.integers(1, len(content) - 1))])
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        (there / f"{file.sha256.hex()}.part").write_bytes(damaged)
        with pytest.raises(TransferCorrupt, match="is not what was sent"):
            receive(there, file, sent(file, len(damaged))[:1])
        assert part(there).read_bytes() == b""
        assert receive(there, file, sent(file)) == content


def test_a_part_that_is_whole_but_wrong_is_deleted(tmp_path):
    file = written(tmp_path, b"what was sent")
    (tmp_path / f"{file.sha256.hex()}.part").write_bytes(b"what was not!")
    with pytest.raises(TransferCorrupt, match="SHA-256"):
        receive(tmp_path, file, [])
    assert not list(tmp_path.glob("*.part"))


def test_a_part_that_is_too_long_is_begun_anew(tmp_path):
    file = written(tmp_path, b"short")
    (tmp_path / f"{file.sha256.hex()}.part").write_bytes(b"short and more")
    with transfer.Incoming(tmp_path, file.announcement()) as incoming:
        assert incoming.offset == 0


def test_parts_of_two_files_are_kept_apart(tmp_path, small_chunks):
    first, second = bytes(48), bytes(range(48))
    for content in (first, second):
        with pytest.raises(TransferCorrupt, match="stopped after 16 of 48 bytes"):
            receive(tmp_path / "there", file := written(tmp_path, content), sent(file)[:1])
    assert receive(tmp_path / "there", file, sent(file, 16)) == second


@pytest.mark.parametrize("fault", ["lost", "twice", "swapped", "empty", "too much", "of another file", "cut"])
def test_a_disturbed_stream_is_detected(fault, tmp_path, small_chunks):
    file = written(tmp_path, bytes(range(48)))
    first, second, third = sent(file)
    (tmp_path / "other").mkdir()
    other = sent(written(tmp_path / "other", bytes(48)))
    disturbed, kept, message = {
        "lost": ([first, third], 16, "at byte 32 instead of 16"),
        "twice": ([first, first], 16, "at byte 0 instead of 16"),
        "swapped": ([second, first, third], 0, "at byte 16 instead of 0"),
        "empty": ([first, pb.Chunk(offset=16)], 16, "do not fit"),
        "too much": ([first, second, third, pb.Chunk(offset=48, data=b"x")], 48, "do not fit"),
        "of another file": ([first, other[1], third], 16, "is not what was sent"),
        "cut": ([first, second], 32, "stopped after 32 of 48 bytes"),
    }[fault]
    there = tmp_path / "there"
    with pytest.raises(TransferCorrupt, match=message):
        receive(there, file, disturbed)
    assert part(there).read_bytes() == bytes(range(kept))
    assert receive(there, file, sent(file, kept)) == bytes(range(48))


def test_a_chunk_over_the_limit_is_refused(tmp_path, monkeypatch):
    file = written(tmp_path, bytes(48))
    (chunk,) = sent(file)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 47)
    with pytest.raises(TransferCorrupt, match="do not fit"):
        receive(tmp_path / "there", file, [chunk])


def test_a_file_that_changed_after_it_was_announced_is_refused(tmp_path, small_chunks):
    file = written(tmp_path, bytes(48))
    file.path.write_bytes(bytes(20) + b"!" + bytes(27))
    with pytest.raises(TransferCorrupt, match="is not what was sent"):
        receive(tmp_path / "there", file, sent(file))
    assert part(tmp_path / "there").read_bytes() == bytes(16)
    file.path.write_bytes(bytes(20))
    with pytest.raises(TransferCorrupt):
        receive(tmp_path / "there", file, sent(file, 16))


@pytest.mark.parametrize("offset", [48, 49, 2**63])
def test_beyond_its_end_a_file_has_no_chunks(offset, tmp_path, small_chunks):
    assert sent(written(tmp_path, bytes(48)), offset) == []


def test_the_place_of_a_file_is_not_touched_before_it_is_whole(tmp_path, small_chunks):
    file, there = written(tmp_path, bytes(48)), tmp_path / "there"
    there.mkdir()
    (there / file.name).write_bytes(b"the last one")
    with pytest.raises(TransferCorrupt):
        receive(there, file, sent(file)[:2])
    assert (there / file.name).read_bytes() == b"the last one"


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", ".hidden", "a/b", "", "x" * 200, "nul\0"])
def test_a_name_with_a_directory_is_refused(name, tmp_path):
    file = pb.File(name=name, total_bytes=0, sha256=hashlib.sha256(b"").digest())
    with pytest.raises(TransferCorrupt, match="no name"):
        transfer.Incoming(tmp_path / "there", file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sha256", [b"", b"x" * 31, b"x" * 33])
def test_a_digest_of_another_length_is_refused(sha256, tmp_path):
    with pytest.raises(TransferCorrupt):
        transfer.Incoming(tmp_path / "there", pb.File(name="a", sha256=sha256))


@given(
    size=st.integers(0, 300),
    offset=st.integers(0, 300),
    kind=st.sampled_from(["FetchFileResponse", "SendUpdateRequest"]),
)
def test_a_frame_is_what_protobuf_would_write(size, offset, kind):
    message = getattr(pb, kind)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 150)
        file = written(Path(place), bytes(size))
        for frame in file.frames(message, offset):
            parsed = message.FromString(frame)
            assert parsed.chunk.offset == offset
            assert message.FromString(parsed.SerializeToString()) == parsed
            assert len(parsed.SerializeToString()) == len(frame)
            offset += len(parsed.chunk.data)
        assert offset >= size


def test_no_message_reaches_the_limit(tmp_path):
    sizes = [len(frame) for frame in written(tmp_path, bytes(5 << 20)).frames(pb.SendUpdateRequest, 0)]
    assert len(sizes) == 5
    assert max(sizes) < transfer.MAX_MESSAGE_BYTES


def test_digest_depends_on_names_and_contents_but_not_on_order(tmp_path):
    files = [pb.File(name=name, total_bytes=1, sha256=name.encode() * 32) for name in ("a", "b")]
    assert transfer.digest(files) == transfer.digest(reversed(files))
    renamed = [pb.File(name="c", total_bytes=1, sha256=b"a" * 32), files[1]]
    changed = [files[0], pb.File(name="b", total_bytes=1, sha256=b"c" * 32)]
    assert len({transfer.digest(each) for each in (files, renamed, changed)}) == 3


# --- tensors ----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 1000),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)
def test_tensors_keep_every_bit(dtype, shape, seed, name):
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        tensor = torch.randint(0, 2, shape, generator=generator).bool()
    else:  # any bits at all: NaN payloads, infinities, subnormal numbers
        raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        tensor = raw.view(dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.safetensors"
        write_tensors(path, {"adapter": {name: tensor}})
        (read,) = read_tensors(path, "adapter").items()
        assert read[0] == name
        assert read[1].dtype == dtype
        assert read[1].shape == tensor.shape
        assert read[1].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_strided_and_shared_tensors_can_be_sent(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": base.t(), "row": base[1], "all": base}
    write_tensors(tmp_path / "x", {"adapter": tensors, "inactivity": {"0": torch.ones(2)}})
    read = read_tensors(tmp_path / "x", "adapter")
    assert read.keys() == tensors.keys()
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    assert read_tensors(tmp_path / "x", "inactivity").keys() == {"0"}
    assert read_tensors(tmp_path / "x", "patch") == {}


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(TransferCorrupt, match=r"x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors", "adapter")


def test_a_tensor_outside_of_the_known_groups_is_refused(tmp_path):
    write_tensors(tmp_path / "x", {"adapter": {"a": torch.ones(1)}, "patch": {"b": torch.ones(1)}})
    with pytest.raises(TransferCorrupt, match="patch/b"):
        check_groups(tmp_path / "x", {"adapter", "inactivity"})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, {"adapter": {"a": torch.ones(1)}})
    with pytest.raises(AttributeError):
        write_tensors(path, {"adapter": {"a": None}})
    assert read_tensors(path, "adapter")["a"].equal(torch.ones(1))
    assert list(tmp_path.iterdir()) == [path]


# --- errors as status codes -------------------------------------------------------------------------------------------


class Ended(Exception):
    pass


class Context:
    """What the server side of an RPC says, and then how gRPC shows it to the silo's side."""

    def __init__(self):
        self.metadata = ()

    def set_trailing_metadata(self, metadata):
        self.metadata = metadata

    def is_active(self):
        return True

    def abort(self, code, details):
        self.reply = Reply(code, details, self.metadata)
        raise Ended


class Reply(grpc.RpcError):
    def __init__(self, code, details="", metadata=()):
        self._code, self._details, self._metadata = code, details, metadata

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return self._metadata


def as_seen_by_the_silo(error):
    context = Context()
    with pytest.raises(Ended), status.answering(context):
        raise error
    return status.error_of(context.reply)


@pytest.mark.parametrize("kind", status.CODES)
def test_an_error_is_the_same_at_the_silo(kind):
    seen = as_seen_by_the_silo(kind("the fault", "the remedy — à faire"))
    assert type(seen) is kind
    assert (seen.message, seen.remedy) == ("the fault", "the remedy — à faire")


def test_every_status_code_stands_for_one_class():
    assert len(set(status.CODES.values())) == len(status.CODES)


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), errors.ModelError("/srv/fm: secret", "secret")])
def test_an_error_outside_of_the_table_says_nothing(error):
    seen = as_seen_by_the_silo(error)
    assert type(seen) is RefusedByServer
    assert "secret" not in str(seen)
    assert "srv" not in str(seen)


def test_a_peer_never_sees_a_path():
    for text in ("/srv/fed/out/x.json: no such file", "cannot read '/home/a/b.pem'", "at C:\\keys\\key.pem (bad)"):
        seen = as_seen_by_the_silo(InvalidUpdate(text, text))
        assert not re.search(r"srv|home|keys\\", str(seen))
    assert status.sanitised("ratio 3/4 and/or adapter/weight at 127.0.0.1:80") == (
        "ratio 3/4 and/or adapter/weight at 127.0.0.1:80"
    )


@given(st.text(max_size=2000))
def test_what_a_peer_sees_is_one_short_printable_line(text):
    line = status.sanitised(text)
    assert len(line) <= status.LONGEST_TEXT
    assert line.isprintable()


# --- patience ---------------------------------------------------------------------------------------------------------

NOBODY = "127.0.0.1:1"
AWAY = Reply(grpc.StatusCode.UNAVAILABLE)


class Time:
    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def clock(self):
        return self.now


PROGRESS = object()


def persisting(outcomes, timeout_seconds=60.0):
    """Each outcome is raised or returned by one attempt; those after PROGRESS by one that came further."""
    time, left = Time(), iter(outcomes)

    def attempt(progress):
        outcome = next(left)
        while outcome is PROGRESS:
            progress()
            outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    answer = persist(attempt, NOBODY, None, timeout_seconds=timeout_seconds, sleep=time.sleep, clock=time.clock)
    return answer, time.now


def test_a_server_that_comes_back_in_time_is_reached():
    answer, waited = persisting([AWAY] * 5 + ["here"])
    assert answer == "here"
    assert 0 < waited < 60


def test_a_server_that_stays_away_is_unreachable():
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1 did not answer for 60 s .*refused") as caught:
        persisting([AWAY] * 1000)
    assert "silo.yaml" in caught.value.remedy


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"])
def test_a_server_that_goes_down_is_waited_for(code):
    answer, waited = persisting([Reply(grpc.StatusCode[code]), TimeoutError("nothing moved for 120 s"), "here"])
    assert answer == "here"
    assert waited > 0


def test_progress_renews_the_patience():
    once = [AWAY] * 8  # 8 pauses are at most 22.7 s; 20 of them without progress in between would be too long
    assert persisting([PROGRESS, *once] * 20 + ["here"], timeout_seconds=30.0)[0] == "here"
    with pytest.raises(ServerUnreachable, match="for 30 s"):
        persisting([PROGRESS, *once] * 20 + [*once] * 20, timeout_seconds=30.0)


def test_a_server_that_stays_away_is_told_of_once_a_minute(caplog):
    caplog.set_level("INFO")
    _, waited = persisting([AWAY] * 200 + ["here"], timeout_seconds=1e6)
    away = [line for line in caplog.messages if "does not answer" in line]
    assert len(away) <= 1 + waited / TELL_SECONDS
    assert len(away) > waited / (TELL_SECONDS + LONGEST_PAUSE_SECONDS)
    assert caplog.messages[-1].endswith("answers again")


def test_a_refusal_is_not_tried_again():
    with pytest.raises(RefusedByServer):
        persisting([Reply(grpc.StatusCode.PERMISSION_DENIED, "no"), "here"])


def test_a_broken_transfer_is_tried_again_but_not_for_ever():
    broken = TransferCorrupt("x", "y")
    assert persisting([broken] * (CORRUPT_ATTEMPTS - 1) + ["here"]) == ("here", 0.0)
    with pytest.raises(TransferCorrupt):
        persisting([broken] * CORRUPT_ATTEMPTS + ["here"])
    assert persisting([PROGRESS, *[broken] * (CORRUPT_ATTEMPTS - 1)] * 5 + ["here"])[0] == "here"


def test_an_answer_outside_of_the_table_is_a_broken_transfer():
    strange = Reply(grpc.StatusCode.INTERNAL, "a flipped bit")
    assert persisting([strange] * (CORRUPT_ATTEMPTS - 1) + ["here"]) == ("here", 0.0)
    with pytest.raises(RefusedByServer, match="a flipped bit"):
        persisting([strange] * CORRUPT_ATTEMPTS + ["here"])


def test_pauses_grow_to_their_limit():
    waiting = pauses()
    drawn = [next(waiting) for _ in range(50)]
    assert 0 < drawn[0] <= 0.1
    assert LONGEST_PAUSE_SECONDS / 2 <= drawn[-1] <= LONGEST_PAUSE_SECONDS


class Call:
    def __init__(self):
        self.cancelled = threading.Event()

    def cancel(self):
        self.cancelled.set()


def test_a_watchdog_lets_go_of_what_moves(monkeypatch):
    time, call, watchdog = Time(), Call(), Watchdog(10.0)
    monkeypatch.setattr(channel.time, "monotonic", time.clock)
    waits = []

    class Over:
        def wait(self, seconds):
            waits.append(seconds)
            time.sleep(4.0)
            if len(waits) <= 3:
                watchdog.rearm()
            return False

    watchdog.rearm()
    watchdog._over = Over()
    watchdog._watch(call)
    assert call.cancelled.is_set()
    assert waits == [10.0, 10.0, 10.0, 10.0, 6.0, 2.0], "10 s after the last move, and not before"


def test_a_watchdog_cancels_what_stands_still():
    call = Call()

    def stand_still():
        with Watchdog(0.001).guarding(call):
            call.cancelled.wait()
            raise Reply(grpc.StatusCode.CANCELLED)

    with pytest.raises(TimeoutError, match="nothing moved"):
        stand_still()


def test_a_fault_of_what_is_guarded_stays_what_it_is():
    call = Call()
    with pytest.raises(TransferCorrupt), Watchdog().guarding(call):
        raise TransferCorrupt("x", "y")
    assert not call.cancelled.is_set()


# --- exit codes -------------------------------------------------------------------------------------------------------


def error_classes(kind=FedPFTError):
    return [kind, *(found for each in kind.__subclasses__() for found in error_classes(each))]


def test_the_table_of_exit_codes_is_that_of_the_classes():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert sorted((int(code), name) for code, name in rows) == sorted(
        (kind.exit_code, kind.__name__) for kind in error_classes()
    )
