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
    __slots__ = ("package_version", "time_ms", "task", "labels", "max_tokens", "characters_per_token", "secure_aggregation", "silo_privacy")
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHARACTERS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECURE_AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    SILO_PRIVACY_FIELD_NUMBER: _ClassVar[int]
    package_version: str
    time_ms: int
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    max_tokens: int
    characters_per_token: float
    secure_aggregation: bool
    silo_privacy: SiloPrivacy
    def __init__(self, package_version: _Optional[str] = ..., time_ms: _Optional[int] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., max_tokens: _Optional[int] = ..., characters_per_token: _Optional[float] = ..., secure_aggregation: _Optional[bool] = ..., silo_privacy: _Optional[_Union[SiloPrivacy, _Mapping]] = ...) -> None: ...

class SiloPrivacy(_message.Message):
    __slots__ = ("epsilon", "delta", "clip", "rounds")
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    epsilon: float
    delta: float
    clip: float
    rounds: int
    def __init__(self, epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., clip: _Optional[float] = ..., rounds: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("train", "wait", "finished", "aborted", "stage")
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    train: Train
    wait: Wait
    finished: Finished
    aborted: Aborted
    stage: Stage
    def __init__(self, train: _Optional[_Union[Train, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ..., stage: _Optional[_Union[Stage, _Mapping]] = ...) -> None: ...

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

class Stage(_message.Message):
    __slots__ = ("round", "attempt", "roster", "sealed", "survivors", "signatures")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    roster: Roster
    sealed: SealedShares
    survivors: Survivors
    signatures: Signatures
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., sealed: _Optional[_Union[SealedShares, _Mapping]] = ..., survivors: _Optional[_Union[Survivors, _Mapping]] = ..., signatures: _Optional[_Union[Signatures, _Mapping]] = ...) -> None: ...

class Keys(_message.Message):
    __slots__ = ("certificate", "seal_key", "mask_key", "commitment", "signature")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SEAL_KEY_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    seal_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., seal_key: _Optional[bytes] = ..., mask_key: _Optional[bytes] = ..., commitment: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Keys]
    def __init__(self, keys: _Optional[_Iterable[_Union[Keys, _Mapping]]] = ...) -> None: ...

class SealedShares(_message.Message):
    __slots__ = ("by_silo",)
    class BySiloEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    BY_SILO_FIELD_NUMBER: _ClassVar[int]
    by_silo: _containers.ScalarMap[str, bytes]
    def __init__(self, by_silo: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("silos",)
    SILOS_FIELD_NUMBER: _ClassVar[int]
    silos: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, silos: _Optional[_Iterable[str]] = ...) -> None: ...

class Signatures(_message.Message):
    __slots__ = ("survivors", "by_silo")
    class BySiloEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    BY_SILO_FIELD_NUMBER: _ClassVar[int]
    survivors: Survivors
    by_silo: _containers.ScalarMap[str, bytes]
    def __init__(self, survivors: _Optional[_Union[Survivors, _Mapping]] = ..., by_silo: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Reveal(_message.Message):
    __slots__ = ("by_silo",)
    class BySiloEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    BY_SILO_FIELD_NUMBER: _ClassVar[int]
    by_silo: _containers.ScalarMap[str, bytes]
    def __init__(self, by_silo: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class AnswerStageRequest(_message.Message):
    __slots__ = ("round", "attempt", "keys", "shares", "signature", "reveal", "withdrawal")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    REVEAL_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWAL_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    keys: ShownKeys
    shares: SealedShares
    signature: bytes
    reveal: Reveal
    withdrawal: Withdrawal
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., keys: _Optional[_Union[ShownKeys, _Mapping]] = ..., shares: _Optional[_Union[SealedShares, _Mapping]] = ..., signature: _Optional[bytes] = ..., reveal: _Optional[_Union[Reveal, _Mapping]] = ..., withdrawal: _Optional[_Union[Withdrawal, _Mapping]] = ...) -> None: ...

class ShownKeys(_message.Message):
    __slots__ = ("keys", "proxy_version")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PROXY_VERSION_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    proxy_version: int
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., proxy_version: _Optional[int] = ...) -> None: ...

class Withdrawal(_message.Message):
    __slots__ = ("from_round",)
    FROM_ROUND_FIELD_NUMBER: _ClassVar[int]
    from_round: bool
    def __init__(self, from_round: _Optional[bool] = ...) -> None: ...

class AnswerStageResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

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
