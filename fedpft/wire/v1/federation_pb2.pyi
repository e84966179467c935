from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class File(_message.Message):
    __slots__ = ("name", "total_bytes", "sha256", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    total_bytes: int
    sha256: bytes
    content: bytes
    def __init__(self, name: _Optional[str] = ..., total_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., content: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data", "check")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    check: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., check: _Optional[bytes] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("package_version",)
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    package_version: str
    def __init__(self, package_version: _Optional[str] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("package_version", "time_ms", "task", "labels", "max_tokens", "characters_per_token")
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHARACTERS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    package_version: str
    time_ms: int
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    max_tokens: int
    characters_per_token: float
    def __init__(self, package_version: _Optional[str] = ..., time_ms: _Optional[int] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., max_tokens: _Optional[int] = ..., characters_per_token: _Optional[float] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("samples", "package_version")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    samples: int
    package_version: str
    def __init__(self, samples: _Optional[int] = ..., package_version: _Optional[str] = ...) -> None: ...

class EnrolResponse(_message.Message):
    __slots__ = ("settings_json", "run_id", "proxy")
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PROXY_FIELD_NUMBER: _ClassVar[int]
    settings_json: str
    run_id: str
    proxy: _containers.RepeatedCompositeFieldContainer[File]
    def __init__(self, settings_json: _Optional[str] = ..., run_id: _Optional[str] = ..., proxy: _Optional[_Iterable[_Union[File, _Mapping]]] = ...) -> None: ...

class NextTaskRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NextTaskResponse(_message.Message):
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
    __slots__ = ("round", "attempt", "adapter", "proxy_version", "patch", "snapshot", "count_inactivity")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROXY_VERSION_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    COUNT_INACTIVITY_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    adapter: File
    proxy_version: int
    patch: File
    snapshot: File
    count_inactivity: bool
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., adapter: _Optional[_Union[File, _Mapping]] = ..., proxy_version: _Optional[int] = ..., patch: _Optional[_Union[File, _Mapping]] = ..., snapshot: _Optional[_Union[File, _Mapping]] = ..., count_inactivity: _Optional[bool] = ...) -> None: ...

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

class FetchFileRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchFileResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: Chunk
    def __init__(self, chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("round", "attempt", "proxy_version", "samples", "metrics", "file")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROXY_VERSION_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    proxy_version: int
    samples: int
    metrics: _containers.ScalarMap[str, float]
    file: File
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., proxy_version: _Optional[int] = ..., samples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., file: _Optional[_Union[File, _Mapping]] = ...) -> None: ...

class OfferUpdateRequest(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: UpdateHeader
    def __init__(self, update: _Optional[_Union[UpdateHeader, _Mapping]] = ...) -> None: ...

class OfferUpdateResponse(_message.Message):
    __slots__ = ("verdict", "offset", "counted_sha256")
    class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VERDICT_UNSPECIFIED: _ClassVar[OfferUpdateResponse.Verdict]
        VERDICT_SEND: _ClassVar[OfferUpdateResponse.Verdict]
        VERDICT_COUNTED: _ClassVar[OfferUpdateResponse.Verdict]
        VERDICT_ACCEPTED: _ClassVar[OfferUpdateResponse.Verdict]
    VERDICT_UNSPECIFIED: OfferUpdateResponse.Verdict
    VERDICT_SEND: OfferUpdateResponse.Verdict
    VERDICT_COUNTED: OfferUpdateResponse.Verdict
    VERDICT_ACCEPTED: OfferUpdateResponse.Verdict
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNTED_SHA256_FIELD_NUMBER: _ClassVar[int]
    verdict: OfferUpdateResponse.Verdict
    offset: int
    counted_sha256: bytes
    def __init__(self, verdict: _Optional[_Union[OfferUpdateResponse.Verdict, str]] = ..., offset: _Optional[int] = ..., counted_sha256: _Optional[bytes] = ...) -> None: ...

class SendUpdateRequest(_message.Message):
    __slots__ = ("update", "chunk")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    update: UpdateHeader
    chunk: Chunk
    def __init__(self, update: _Optional[_Union[UpdateHeader, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class SendUpdateResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
