from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Piece(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: Header
    chunk: bytes
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("name", "total_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    total_bytes: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., total_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("samples", "package_version")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    samples: int
    package_version: str
    def __init__(self, samples: _Optional[int] = ..., package_version: _Optional[str] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("settings_json", "proxy_digest", "proxy_bytes")
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    PROXY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROXY_BYTES_FIELD_NUMBER: _ClassVar[int]
    settings_json: str
    proxy_digest: str
    proxy_bytes: int
    def __init__(self, settings_json: _Optional[str] = ..., proxy_digest: _Optional[str] = ..., proxy_bytes: _Optional[int] = ...) -> None: ...

class FetchProxyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchPatchesRequest(_message.Message):
    __slots__ = ("from_version",)
    FROM_VERSION_FIELD_NUMBER: _ClassVar[int]
    from_version: int
    def __init__(self, from_version: _Optional[int] = ...) -> None: ...

class NextTaskRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Task(_message.Message):
    __slots__ = ("train", "wait", "finished", "aborted")
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    train: Train
    wait: Wait
    finished: Finished
    aborted: Aborted
    def __init__(self, train: _Optional[_Union[Train, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ...) -> None: ...

class Train(_message.Message):
    __slots__ = ("round", "proxy_version", "count_inactivity")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PROXY_VERSION_FIELD_NUMBER: _ClassVar[int]
    COUNT_INACTIVITY_FIELD_NUMBER: _ClassVar[int]
    round: int
    proxy_version: int
    count_inactivity: bool
    def __init__(self, round: _Optional[int] = ..., proxy_version: _Optional[int] = ..., count_inactivity: _Optional[bool] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Finished(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Aborted(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class FetchAdapterRequest(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class UpdatePart(_message.Message):
    __slots__ = ("update", "piece")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    update: UpdateHeader
    piece: Piece
    def __init__(self, update: _Optional[_Union[UpdateHeader, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("round", "proxy_version", "samples", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PROXY_VERSION_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    round: int
    proxy_version: int
    samples: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, round: _Optional[int] = ..., proxy_version: _Optional[int] = ..., samples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class UpdateReply(_message.Message):
    __slots__ = ("outcome",)
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[UpdateReply.Outcome]
        ACCEPTED: _ClassVar[UpdateReply.Outcome]
        DUPLICATE: _ClassVar[UpdateReply.Outcome]
    UNSPECIFIED: UpdateReply.Outcome
    ACCEPTED: UpdateReply.Outcome
    DUPLICATE: UpdateReply.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: UpdateReply.Outcome
    def __init__(self, outcome: _Optional[_Union[UpdateReply.Outcome, str]] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
