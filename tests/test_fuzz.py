"""Whatever a peer sends: the error of the right class, and neither memory nor disk beyond what was announced.

What such a search found is kept as a test of its own. The long search is `pytest -m slow tests/test_fuzz.py`.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

import fedpft
import fedpft.wire
from fedpft.audit import AuditLog, verify
from fedpft.config import AdapterSection, AggregationSection, RoundSettings, TrainingSection
from fedpft.data.batches import round_window
from fedpft.errors import InvalidUpdate, RoundOver, TransferCorrupt
from fedpft.federation import Federation, RoundRequested
from fedpft.server.admission import Admission
from fedpft.server.inbox import Inbox
from fedpft.server.ledger import Ledger
from fedpft.server.live import LiveFederation, Place
from fedpft.server.outbox import Outbox
from fedpft.server.servicer import FederationServicer
from fedpft.server.updates import Update, aggregate, check_update
from fedpft.wire import transfer
from fedpft.wire.channel import SILO_KEY, WORK_KEY
from fedpft.wire.encoding import ENCODINGS, Encoding, encode
from fedpft.wire.hello import Terms
from fedpft.wire.status import CODES
from fedpft.wire.tensors import LARGEST_HEADER_BYTES, TensorFile, check_groups, read_tensors, write_tensors
from fedpft.wire.v1 import federation_pb2 as pb

LONG = 5_000  # examples of a slow search


def search(examples: int) -> Any:
    return settings(deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck), database=None)


# --- tensor files -----------------------------------------------------------------------------------------------------

START = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(300)}
NEURONS = {1: 3}
COUNTS = {"1": torch.tensor([0, 3, 5]), "1.tokens": torch.tensor(5)}


def packed(header: Any, content: bytes = b"", *, claimed: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + content


def valid(directory: Path, encoding: Encoding) -> bytes:
    """An update's file."""
    trained = {name: tensor + 0.1 for name, tensor in START.items()}
    groups, _ = encode(trained, START, encoding, {})
    write_tensors(directory / "valid", groups | {"inactivity": COUNTS})
    return (directory / "valid").read_bytes()


with tempfile.TemporaryDirectory() as _place:
    VALID = {encoding: valid(Path(_place), encoding) for encoding in ENCODINGS}

A = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

numbers = st.one_of(
    st.integers(-2, 10), st.sampled_from([2**31, 2**48, 2**62, 2**63, 2**64, 10**30, 1.5, 4.0, True, None, "4"])
)
names = st.one_of(
    st.sampled_from(["adapter/a", "adapter/b", "delta/a", "scale/a", "inactivity/1", "inactivity/1.tokens", "patch/x"]),
    st.sampled_from(
        ["", "/", "adapter", "adapter/", "../x", "/etc/x", "adapter/a\0", "__metadata__", "x/\ud800", "é/é"]
    ),
    st.text(max_size=5),
)
tensor_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "I64", "F8_E4M3", "F4", "C64", "BOOL", "", 4, None]),
        "shape": st.one_of(st.lists(numbers, max_size=3), st.just([1] * 100), numbers),
        "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), st.lists(numbers, max_size=3), numbers),
        "more": st.none(),
    },
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
headers = st.one_of(st.dictionaries(names, tensor_entries, max_size=4), json_values)
claims = st.one_of(st.none(), st.sampled_from([0, 1, 2, 100, LARGEST_HEADER_BYTES, 2**60, 2**64 - 1]))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid update with some of its bytes changed, cut out or put in, mostly in the header."""
    content = bytearray(VALID[draw(st.sampled_from(ENCODINGS))])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(len(content), 700) - 1)))
        match draw(st.sampled_from(["change", "cut", "put", "copy", "end"])):
            case "change":
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=2))
            case "cut":
                del content[place : place + draw(st.integers(1, 40))]
            case "put":
                content[place:place] = draw(st.binary(min_size=1, max_size=40))
            case "copy":
                content[place:place] = content[place : place + draw(st.integers(1, 40))]
            case "end":
                del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


files = st.one_of(
    st.binary(max_size=200), st.builds(packed, headers, st.binary(max_size=40), claimed=claims), mutated()
)


@contextlib.contextmanager
def placed(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "update.safetensors"
        path.write_bytes(content)
        yield path


def look_at(content: bytes) -> None:
    """A file is read as the library reads it, or is corrupt."""
    with placed(content) as path:
        try:
            file = TensorFile(path)
        except TransferCorrupt:
            return
        assert sum(spec.nbytes for spec in file.specs.values()) <= len(content)
        read = {name: file.tensor(*name.split("/", 1)) for name in file.specs if "/" in name}
        with contextlib.suppress(TransferCorrupt):
            check_groups(path, {"adapter", "inactivity"})
        assert read_tensors(path, "adapter").keys() == {
            name.removeprefix("adapter/") for name in read if name.startswith("adapter/")
        }
        try:
            theirs = safe_open(path, framework="pt")
        except SafetensorError:
            return
        assert set(theirs.keys()) == file.specs.keys()
        for name, tensor in read.items():
            assert (tensor.dtype, tensor.shape) == ((other := theirs.get_tensor(name)).dtype, other.shape)
            assert torch.equal(tensor.flatten().view(torch.uint8), other.clone().flatten().view(torch.uint8))


def judge(content: bytes, encoding: Encoding, samples: int = 1, metrics: dict[str, float] | None = None) -> None:
    """An update is accepted, and then fit for the mean, or refused."""
    with placed(content) as path:
        start = path.with_name("start")
        write_tensors(start, {"adapter": START})
        update = Update("north", samples, metrics or {}, path, TensorFile(start), encoding)
        try:
            check_update(update, NEURONS, 1e9, 100)
        except (InvalidUpdate, TransferCorrupt):
            return
        for name, tensor in update.adapter.items():
            assert (tensor.shape, tensor.dtype) == (START[name].shape, START[name].dtype)
            assert bool(torch.isfinite(tensor).all())
        assert update.inactivity is None or update.inactivity.keys() == COUNTS.keys()


@example(packed(b"{}", claimed=2**60))
@example(packed(b"{}", claimed=2**64 - 1))
@example(packed(b"null"))
@example(packed(b"[]"))
@example(packed(b"{}", claimed=100))
@example(packed(b"[" * 100_000))
@example(packed(b'{"a":' * 100_000))
@example(packed(b'{"x/a":' + b"9" * 5000 + b"}"))
@example(packed({"x/a": A, "x/b": A}, b"1234"))  # one on the other
@example(packed({"x/a": A, "x/b": A | {"data_offsets": [2, 6]}}, b"123456"))
@example(packed({"x/a": A | {"data_offsets": [4, 8]}}, b"12345678"))  # a gap
@example(packed({"x/a": A}, b"12345678"))  # more behind it
@example(packed({"x/a": A | {"data_offsets": [0, 2**62], "shape": [2**60]}}, b"1234"))
@example(packed({"x/a": A | {"data_offsets": [0, 0], "shape": [2**63, 0]}}))
@example(packed({"x/a": A | {"data_offsets": [0, 0], "shape": [0] * 100}}))
@example(packed({"x/a": A | {"data_offsets": [-4, 0]}}, b"1234"))
@example(packed({"x/a\0": A}, b"1234"))
@example(packed({"../a": A, "__metadata__": {"format": "pt"}}, b"1234"))
@search(250)
@given(files)
def test_a_tensor_file_is_read_as_the_library_reads_it_or_is_corrupt(content: bytes) -> None:
    look_at(content)


@pytest.mark.hours
@search(LONG)
@given(files)
def test_a_tensor_file_is_read_as_the_library_reads_it_or_is_corrupt_long(content: bytes) -> None:
    look_at(content)


@search(150)
@given(files, st.sampled_from(ENCODINGS))
def test_a_file_is_an_update_or_is_refused(content: bytes, encoding: Encoding) -> None:
    judge(content, encoding)


@pytest.mark.hours
@search(LONG)
@given(files, st.sampled_from(ENCODINGS), st.integers(0, 2**64 - 1), st.dictionaries(st.text(max_size=9), st.floats()))
def test_a_file_is_an_update_or_is_refused_long(
    content: bytes, encoding: Encoding, samples: int, metrics: dict[str, float]
) -> None:
    judge(content, encoding, samples, metrics)


def test_a_name_that_stands_twice_in_a_header_is_corrupt(tmp_path: Path) -> None:
    """Which of the two counts would depend on the reader; the library takes one of them."""
    entry = json.dumps(A)
    (tmp_path / "x").write_bytes(packed(f'{{"adapter/a": {entry}, "adapter/a": {entry}}}'.encode(), b"1234"))
    with pytest.raises(TransferCorrupt, match="twice"):
        TensorFile(tmp_path / "x")


def test_a_tensor_at_an_odd_address_of_the_file_is_read_into_aligned_memory(tmp_path: Path) -> None:
    """The library returns a tensor at the odd address."""
    header = json.dumps({"adapter/a": A}).encode()
    (tmp_path / "x").write_bytes(packed(header + b" " * (3 - (8 + len(header)) % 4), b"1234"))
    tensor = read_tensors(tmp_path / "x", "adapter")["a"]
    assert tensor.data_ptr() % 8 == 0
    assert tensor.view(torch.uint8).tolist() == [*b"1234"]


def test_a_header_beyond_all_measure_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)
    with pytest.raises(TransferCorrupt, match="its header would have 1073741824 bytes"):
        TensorFile(tmp_path / "x")


# --- chunks -----------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(200))


def chunk(content: bytes, start: int, size: int = 50) -> pb.Chunk:
    end = start + size
    check = hashlib.sha256(content[:end]).digest()[: transfer.CHECK_BYTES]
    return pb.Chunk(offset=start, data=content[start:end], check=check)


def right_chunks(content: bytes) -> list[pb.Chunk]:
    return [chunk(content, start) for start in range(0, len(content), 50)]


@st.composite
def chunks(draw: st.DrawFn, content: bytes = CONTENT) -> pb.Chunk:
    """Mostly a right one, or one with a fault in one place."""
    made = chunk(content, draw(st.sampled_from([0, 50, 100, 150])), draw(st.sampled_from([50, 50, 1, 60])))
    match draw(st.sampled_from(["right", "right", "offset", "data", "check"])):
        case "offset":
            made.offset = draw(st.integers(0, 2**64 - 1))
        case "data":
            made.data = draw(st.binary(max_size=60))
        case "check":
            made.check = draw(st.binary(max_size=40))
    return made


announcements = st.builds(
    pb.File,
    name=st.one_of(st.just("update"), st.sampled_from(["../x", "/x", "", ".", "a\0"]), st.text(max_size=5)),
    total_bytes=st.one_of(st.just(len(CONTENT)), st.integers(0, 300), st.integers(0, 2**64 - 1)),
    sha256=st.one_of(
        st.just(hashlib.sha256(CONTENT).digest()), st.binary(max_size=40), st.binary(min_size=32, max_size=32)
    ),
)


@search(300)
@given(announcements, st.one_of(st.just(right_chunks(CONTENT)), st.lists(chunks(), max_size=6)), st.integers(0, 5))
def test_a_file_arrives_whole_and_right_or_not_at_all(file: pb.File, sent: list[pb.Chunk], cut: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory, goal = Path(place) / "in", Path(place) / "goal"
        for part in (sent[:cut], sent[cut:]):  # the second goes on where the first stopped
            try:
                with transfer.Incoming(directory, file) as incoming:
                    for each in part:
                        incoming.write(each)
                        assert incoming.offset <= file.total_bytes
                    incoming.finish(goal)
            except TransferCorrupt:
                assert not goal.exists()
            else:
                assert hashlib.sha256(goal.read_bytes()).digest() == file.sha256
                assert goal.stat().st_size == file.total_bytes
                break
        assert {path.name for path in Path(place).iterdir()} <= {"in", "goal"}
        left = list(directory.glob("**/*"))
        assert all(path.name == f"{file.sha256.hex()}.part" for path in left)
        assert sum(path.stat().st_size for path in left) <= file.total_bytes


# --- the inbox --------------------------------------------------------------------------------------------------------


class Box:
    """An inbox in round 1, and what one silo does to it."""

    def __init__(self, place: Path) -> None:
        (place / "bundle").mkdir()
        (place / "bundle" / "proxy.json").write_text('{"neurons": [3, 3], "compressed": [1]}')
        self.ledger = Ledger(place / "out", {})
        self.inbox = Inbox(place / "bundle", self.ledger, training=TrainingSection(), max_norm=None)
        self.inbox.enrolled("north", 10)
        self.start = self.ledger.adapter_path(0)
        write_tensors(self.start, {"adapter": START})
        self.inbox.open_round(1, self.start, count_inactivity=True)
        self.updates = place / "out" / "updates"

    def send(self, header: pb.UpdateHeader, sent: list[pb.Chunk]) -> Update:
        return self.inbox.receive("north", header, sent)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.updates)) for path in self.updates.rglob("*") if path.is_file())


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.ledger.close()


def header_of(content: bytes, **changes: Any) -> pb.UpdateHeader:
    file = pb.File(name="update", total_bytes=len(content), sha256=hashlib.sha256(content).digest())
    return pb.UpdateHeader(**({"round": 1, "samples": 3, "metrics": {"tokens": 5.0}, "file": file} | changes))


UPDATE = VALID["exact"]
update_headers = st.builds(
    pb.UpdateHeader,
    round=st.sampled_from([0, 1, 1, 1, 2, 2**32 - 1]),
    attempt=st.sampled_from([0, 0, 0, 1, 2**32 - 1]),
    proxy_version=st.sampled_from([0, 0, 0, 1, 2**32 - 1]),
    samples=st.one_of(st.integers(0, 11), st.integers(0, 2**64 - 1)),
    metrics=st.dictionaries(
        st.one_of(st.sampled_from(["train_loss", "tokens"]), st.text(max_size=3)), st.floats(), max_size=2
    ),
    file=st.one_of(st.just(header_of(UPDATE).file), announcements),
)


def submit(headers: list[pb.UpdateHeader], sent: list[pb.Chunk]) -> None:
    with tempfile.TemporaryDirectory() as place:
        box = Box(Path(place))
        for header in headers:
            with contextlib.suppress(RoundOver, InvalidUpdate, TransferCorrupt):
                assert 0 <= box.inbox.offered("north", header) <= header.file.total_bytes
            try:
                update = box.send(header, sent)
            except (RoundOver, InvalidUpdate, TransferCorrupt):
                continue
            assert update.path.read_bytes() == UPDATE
        kept = box.files()
        assert len([name for name in kept if name.startswith("incoming/")]) <= 1
        assert all(name.startswith(("incoming/north/", "round-1/north-")) for name in kept)
        assert box.ledger.updates() == []
        box.ledger.close()


@search(40)
@given(
    st.lists(update_headers, min_size=1, max_size=3),
    st.one_of(st.just(right_chunks(UPDATE)), st.lists(chunks(UPDATE), max_size=6)),
)
def test_what_is_no_update_does_not_get_into_a_round(headers: list[pb.UpdateHeader], sent: list[pb.Chunk]) -> None:
    submit(headers, sent)


@pytest.mark.hours
@search(LONG // 10)
@given(
    st.lists(update_headers, min_size=1, max_size=3),
    st.one_of(st.just(right_chunks(UPDATE)), st.lists(chunks(UPDATE), max_size=6)),
)
def test_what_is_no_update_does_not_get_into_a_round_long(headers: list[pb.UpdateHeader], sent: list[pb.Chunk]) -> None:
    submit(headers, sent)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"samples": 2**64 - 1}, {"metrics": {"patients": 1.0}}])
def test_the_file_of_an_update_that_counts_cannot_be_taken_away_by_a_wrong_header(
    wrong: dict[str, Any], box: Box
) -> None:
    """The same bytes sent again with a wrong header were refused, and their file deleted: the one that counted."""
    update = box.send(header_of(UPDATE), right_chunks(UPDATE))
    box.inbox.keep(update, header_of(UPDATE))
    with pytest.raises(InvalidUpdate):
        box.send(header_of(UPDATE, **wrong), right_chunks(UPDATE))
    (counted,) = box.inbox.updates(1, box.start)
    assert counted.path.read_bytes() == UPDATE


def test_an_update_that_comes_again_does_not_take_the_place_of_the_one_that_counts(box: Box) -> None:
    update = box.send(header_of(UPDATE), right_chunks(UPDATE))
    box.inbox.keep(update, header_of(UPDATE))
    assert box.send(header_of(UPDATE), right_chunks(UPDATE)).path != update.path


def test_beginnings_of_many_updates_do_not_fill_the_disk(box: Box) -> None:
    """A part was kept of every digest that a silo ever offered."""
    for number in range(5):
        content = bytes([number]) * 500
        assert box.inbox.offered("north", header_of(content)) == 0
        with pytest.raises(TransferCorrupt, match="stopped"):
            box.send(header_of(content), right_chunks(content)[:3])
    assert box.files() == [f"incoming/north/{hashlib.sha256(content).hexdigest()}.part"]
    assert box.inbox.offered("north", header_of(content)) == 150


# --- all of the server's calls ----------------------------------------------------------------------------------------


class Ended(Exception):
    pass


class Call:
    """gRPC's side of a call."""

    def __init__(self, place: bytes) -> None:
        self.code: grpc.StatusCode | None = None
        self.place = place

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return ((SILO_KEY, "north"), (WORK_KEY, self.place))

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise Ended

    def add_callback(self, callback: Any) -> bool:
        return True

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    def is_active(self) -> bool:
        return True

    def cancel(self) -> None:
        pass


requests = st.one_of(
    st.builds(pb.HelloRequest, package_version=st.sampled_from([fedpft.__version__, "", "0", "x.y\0"])),
    st.builds(
        pb.EnrolRequest,
        samples=st.sampled_from([0, 10, 2**64 - 1]),
        package_version=st.sampled_from([fedpft.__version__, "", "0", "x.y\0"]),
    ),
    st.just(pb.NextTaskRequest()),
    st.just(pb.LeaveRequest()),
    st.builds(
        pb.FetchFileRequest,
        sha256=st.one_of(st.just(b"the adapter's"), st.binary(max_size=40)),
        offset=st.one_of(st.just(0), st.integers(0, 2**64 - 1)),
    ),
    st.builds(pb.OfferUpdateRequest, update=update_headers),
    st.lists(
        st.one_of(
            st.builds(pb.SendUpdateRequest, update=update_headers),
            st.builds(pb.SendUpdateRequest, chunk=chunks(UPDATE)),
            st.just(pb.SendUpdateRequest()),
        ),
        max_size=4,
    ),
    update_headers.map(lambda header: sending(header)),
)


def sending(header: pb.UpdateHeader) -> list[pb.SendUpdateRequest]:
    """All of an update."""
    sent = [pb.SendUpdateRequest(chunk=each) for each in right_chunks(UPDATE)]
    return [pb.SendUpdateRequest(update=header), *sent]


TERMS = Terms("sequence-classification", ("0", "1"), max_tokens=8, characters_per_token=2.0)
COUNTING = sending(header_of(UPDATE))


HERE = b"here"
callers = st.lists(st.sampled_from([HERE, HERE, b"", b"elsewhere" * 4, b"here" * 1000]), max_size=4)


@example([COUNTING, COUNTING, sending(header_of(UPDATE, samples=0))], [])
@search(60)
@given(st.lists(requests, max_size=8), callers)
def test_no_call_ends_in_a_fault_of_the_server(made: list[Any], places: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpft.server.servicer.POLL_SECONDS", 0.0)
        box = Box(Path(place))
        live = LiveFederation(Federation(["north"], min_silos=1, sample_fraction=1.0, seed=0))
        log = AuditLog(Path(place) / "audit.jsonl")
        outbox = Outbox(Path(place) / "bundle", lambda *_: None)
        outbox.put_adapter(transfer.payload(box.start))
        servicer = FederationServicer(live, box.inbox, outbox, log, "{}", "run", Admission(None, live.fail), TERMS)
        live.enrol("north", 10, Place(HERE, b""))
        live.handle(RoundRequested(1))
        for request, place_of_call in itertools.zip_longest(made, places[: len(made)], fillvalue=HERE):
            if isinstance(request, pb.FetchFileRequest) and request.sha256 == b"the adapter's":
                request = pb.FetchFileRequest(sha256=outbox.adapter.sha256, offset=request.offset)
            call: Any = Call(place_of_call)
            with contextlib.suppress(Ended):
                match request:
                    case pb.HelloRequest():
                        servicer.Hello(request, call)
                    case pb.EnrolRequest():
                        servicer.Enrol(request, call)
                    case pb.NextTaskRequest():
                        servicer.NextTask(request, call)
                    case pb.LeaveRequest():
                        servicer.Leave(request, call)
                    case pb.FetchFileRequest():
                        list(servicer.FetchFile(request, call))
                    case pb.OfferUpdateRequest():
                        servicer.OfferUpdate(request, call)
                    case _:
                        servicer.SendUpdate(iter(request), call)
            assert call.code is None or call.code in CODES.values()
            assert live._broken is None, "no call ends the server"
        counted = box.inbox.updates(1, box.start)
        assert [update.path.read_bytes() for update in counted] in ([], [UPDATE])
        assert len([name for name in box.files() if name.startswith("round-1/")]) == len(counted)
        mean = aggregate(counted, AggregationSection(), 32) if counted else {}
        assert all(bool(torch.isfinite(tensor).all()) for tensor in mean.values())
        if COUNTING in made[:1] and places[:1] in ([], [HERE]):
            assert [update.samples for update in counted] == [3]
        log.close()
        assert verify(Path(place) / "audit.jsonl").entries >= len(counted)
        box.ledger.close()


# --- settings at the silo ---------------------------------------------------------------------------------------------

SETTINGS = RoundSettings(seed=0, adapter=AdapterSection(), training=TrainingSection(), inactive_below=0.01)


@st.composite
def settings_texts(draw: st.DrawFn) -> str:
    """The server's settings with something else in one place."""
    values = json.loads(SETTINGS.model_dump_json())
    place, key = values, draw(st.sampled_from([*values, "more"]))
    if isinstance(values.get(key), dict) and draw(st.booleans()):
        place = values[key]
        key = draw(st.sampled_from([*place, "more"]))
    place[key] = draw(st.one_of(json_values, st.sampled_from([10**400, 1e308, -1, 0, 5e-324])))
    return json.dumps(values)


@example('{"seed": 0, "adapter": {}, "training": {"local_epochs": 1e999}, "inactive_below": 0}')
@example('{"seed": 0, "adapter": {}, "training": {"local_epochs": 1e308}, "inactive_below": 0}')
@example('{"seed": 0, "adapter": {"rank": 1e12}, "training": {}, "inactive_below": 0}')
@example("[" * 100_000)
@example('{"seed": ' + "9" * 100_000 + "}")
@search(200)
@given(st.one_of(settings_texts(), st.text(max_size=50), json_values.map(json.dumps)))
def test_settings_are_ones_that_a_silo_can_train_with_or_none(text: str) -> None:
    try:
        read = RoundSettings.model_validate_json(text)
    except ValidationError as error:
        error.errors()[0]["msg"].encode()  # what the silo says
        return
    assert read.adapter.rank <= 4096
    assert round_window(10**9, read.training.local_epochs, 10**6)[1] >= 1


def test_the_examples_of_this_file_are_valid_themselves(tmp_path: Path) -> None:
    """Or nothing would be mutated but errors."""
    for encoding, content in VALID.items():
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        (tmp_path / "x").write_bytes(content)
        write_tensors(tmp_path / "start", {"adapter": START})
        update = Update("north", 1, {}, tmp_path / "x", TensorFile(tmp_path / "start"), encoding)
        check_update(update, NEURONS, 1e9, 100)
        tensors: dict[str, Tensor] = update.adapter
        assert tensors.keys() == START.keys()
