from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Up(_message.Message):
    __slots__ = ("seq", "hello", "ready", "step_done", "round_done", "eval_done", "saved", "leaving", "fault", "heartbeat", "held", "prepared")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    ROUND_DONE_FIELD_NUMBER: _ClassVar[int]
    EVAL_DONE_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    hello: Hello
    ready: Ready
    step_done: StepDone
    round_done: RoundDone
    eval_done: EvalDone
    saved: Saved
    leaving: Leaving
    fault: Fault
    heartbeat: Heartbeat
    held: Held
    prepared: Prepared
    def __init__(self, seq: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., step_done: _Optional[_Union[StepDone, _Mapping]] = ..., round_done: _Optional[_Union[RoundDone, _Mapping]] = ..., eval_done: _Optional[_Union[EvalDone, _Mapping]] = ..., saved: _Optional[_Union[Saved, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., held: _Optional[_Union[Held, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ...) -> None: ...

class Down(_message.Message):
    __slots__ = ("challenge", "welcome", "refuse", "view", "ack")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    challenge: Challenge
    welcome: Welcome
    refuse: Refuse
    view: View
    ack: Ack
    def __init__(self, challenge: _Optional[_Union[Challenge, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., view: _Optional[_Union[View, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "version", "run", "public_key", "signature", "secret_proof", "name", "device", "memory_gb", "speed", "addresses", "savepoints", "session", "p2p", "region", "upload_mbps", "state_mbps", "threads")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SECRET_PROOF_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_GB_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SAVEPOINTS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    P2P_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_MBPS_FIELD_NUMBER: _ClassVar[int]
    STATE_MBPS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    run: str
    public_key: bytes
    signature: bytes
    secret_proof: bytes
    name: str
    device: str
    memory_gb: float
    speed: float
    addresses: _containers.RepeatedScalarFieldContainer[str]
    savepoints: _containers.RepeatedCompositeFieldContainer[SavePoint]
    session: bytes
    p2p: str
    region: str
    upload_mbps: float
    state_mbps: float
    threads: int
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., run: _Optional[str] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., secret_proof: _Optional[bytes] = ..., name: _Optional[str] = ..., device: _Optional[str] = ..., memory_gb: _Optional[float] = ..., speed: _Optional[float] = ..., addresses: _Optional[_Iterable[str]] = ..., savepoints: _Optional[_Iterable[_Union[SavePoint, _Mapping]]] = ..., session: _Optional[bytes] = ..., p2p: _Optional[str] = ..., region: _Optional[str] = ..., upload_mbps: _Optional[float] = ..., state_mbps: _Optional[float] = ..., threads: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("peer_id", "config", "manifest", "token", "acked", "relays", "addresses", "p2p_relays", "weights")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    RELAYS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    P2P_RELAYS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    config: str
    manifest: str
    token: bytes
    acked: int
    relays: _containers.RepeatedScalarFieldContainer[str]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    p2p_relays: _containers.RepeatedScalarFieldContainer[str]
    weights: str
    def __init__(self, peer_id: _Optional[str] = ..., config: _Optional[str] = ..., manifest: _Optional[str] = ..., token: _Optional[bytes] = ..., acked: _Optional[int] = ..., relays: _Optional[_Iterable[str]] = ..., addresses: _Optional[_Iterable[str]] = ..., p2p_relays: _Optional[_Iterable[str]] = ..., weights: _Optional[str] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("code", "text", "hint")
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    code: str
    text: str
    hint: str
    def __init__(self, code: _Optional[str] = ..., text: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class SavePoint(_message.Message):
    __slots__ = ("kind", "generation", "step", "first_layer", "last_layer", "digest")
    KIND_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    kind: str
    generation: int
    step: int
    first_layer: int
    last_layer: int
    digest: bytes
    def __init__(self, kind: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("peer", "addresses")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    peer: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("first_layer", "last_layer", "replicas", "donors", "digest", "shares")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DONORS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    last_layer: int
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    donors: _containers.RepeatedCompositeFieldContainer[Replica]
    digest: bytes
    shares: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., donors: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., digest: _Optional[bytes] = ..., shares: _Optional[_Iterable[int]] = ...) -> None: ...

class Lost(_message.Message):
    __slots__ = ("peer", "since")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    since: int
    def __init__(self, peer: _Optional[str] = ..., since: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("generation", "first_step", "first_sample", "origin", "origin_generation", "stages", "microbatches", "microbatch_size", "lost", "void", "parts")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    FIRST_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_GENERATION_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    first_step: int
    first_sample: int
    origin: str
    origin_generation: int
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    microbatches: int
    microbatch_size: int
    lost: _containers.RepeatedCompositeFieldContainer[Lost]
    void: int
    parts: _containers.RepeatedCompositeFieldContainer[Stage]
    def __init__(self, generation: _Optional[int] = ..., first_step: _Optional[int] = ..., first_sample: _Optional[int] = ..., origin: _Optional[str] = ..., origin_generation: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., microbatches: _Optional[int] = ..., microbatch_size: _Optional[int] = ..., lost: _Optional[_Iterable[_Union[Lost, _Mapping]]] = ..., void: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("phase", "note", "plan", "until", "end", "closing", "committed", "publish", "publishing", "released", "prospect", "guests", "keep")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CLOSING_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    PUBLISHING_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    PROSPECT_FIELD_NUMBER: _ClassVar[int]
    GUESTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    phase: str
    note: str
    plan: Plan
    until: int
    end: int
    closing: str
    committed: int
    publish: int
    publishing: bool
    released: bool
    prospect: Prospect
    guests: _containers.RepeatedCompositeFieldContainer[Replica]
    keep: _containers.RepeatedCompositeFieldContainer[Keep]
    def __init__(self, phase: _Optional[str] = ..., note: _Optional[str] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., until: _Optional[int] = ..., end: _Optional[int] = ..., closing: _Optional[str] = ..., committed: _Optional[int] = ..., publish: _Optional[int] = ..., publishing: _Optional[bool] = ..., released: _Optional[bool] = ..., prospect: _Optional[_Union[Prospect, _Mapping]] = ..., guests: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., keep: _Optional[_Iterable[_Union[Keep, _Mapping]]] = ...) -> None: ...

class Prospect(_message.Message):
    __slots__ = ("stage", "point")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    stage: int
    point: SavePoint
    def __init__(self, stage: _Optional[int] = ..., point: _Optional[_Union[SavePoint, _Mapping]] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("stage", "rounds")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    rounds: _containers.RepeatedCompositeFieldContainer[SavePoint]
    def __init__(self, stage: _Optional[int] = ..., rounds: _Optional[_Iterable[_Union[SavePoint, _Mapping]]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("generation", "digest")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    generation: int
    digest: bytes
    def __init__(self, generation: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("generation", "step", "samples", "loss_sum", "targets", "compute_seconds", "wait_seconds", "trace")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    samples: int
    loss_sum: float
    targets: int
    compute_seconds: float
    wait_seconds: float
    trace: Trace
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., samples: _Optional[int] = ..., loss_sum: _Optional[float] = ..., targets: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., wait_seconds: _Optional[float] = ..., trace: _Optional[_Union[Trace, _Mapping]] = ...) -> None: ...

class Trace(_message.Message):
    __slots__ = ("began", "before", "ops", "pause", "took", "early", "decode", "encode", "told", "pause_update", "update", "left_out")
    BEGAN_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    OPS_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    EARLY_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    PAUSE_UPDATE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    began: int
    before: int
    ops: _containers.RepeatedScalarFieldContainer[int]
    pause: _containers.RepeatedScalarFieldContainer[int]
    took: _containers.RepeatedScalarFieldContainer[int]
    early: _containers.RepeatedScalarFieldContainer[int]
    decode: _containers.RepeatedScalarFieldContainer[int]
    encode: _containers.RepeatedScalarFieldContainer[int]
    told: _containers.RepeatedScalarFieldContainer[int]
    pause_update: int
    update: int
    left_out: int
    def __init__(self, began: _Optional[int] = ..., before: _Optional[int] = ..., ops: _Optional[_Iterable[int]] = ..., pause: _Optional[_Iterable[int]] = ..., took: _Optional[_Iterable[int]] = ..., early: _Optional[_Iterable[int]] = ..., decode: _Optional[_Iterable[int]] = ..., encode: _Optional[_Iterable[int]] = ..., told: _Optional[_Iterable[int]] = ..., pause_update: _Optional[int] = ..., update: _Optional[int] = ..., left_out: _Optional[int] = ...) -> None: ...

class RoundDone(_message.Message):
    __slots__ = ("generation", "step", "samples", "digest", "base_digest", "nbytes", "seconds", "attempt")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    samples: int
    digest: bytes
    base_digest: bytes
    nbytes: int
    seconds: float
    attempt: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., samples: _Optional[int] = ..., digest: _Optional[bytes] = ..., base_digest: _Optional[bytes] = ..., nbytes: _Optional[int] = ..., seconds: _Optional[float] = ..., attempt: _Optional[int] = ...) -> None: ...

class EvalDone(_message.Message):
    __slots__ = ("generation", "step", "loss_sum", "targets")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    loss_sum: float
    targets: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., loss_sum: _Optional[float] = ..., targets: _Optional[int] = ...) -> None: ...

class Saved(_message.Message):
    __slots__ = ("generation", "savepoint")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SAVEPOINT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    savepoint: SavePoint
    def __init__(self, generation: _Optional[int] = ..., savepoint: _Optional[_Union[SavePoint, _Mapping]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("savepoints",)
    SAVEPOINTS_FIELD_NUMBER: _ClassVar[int]
    savepoints: _containers.RepeatedCompositeFieldContainer[SavePoint]
    def __init__(self, savepoints: _Optional[_Iterable[_Union[SavePoint, _Mapping]]] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("savepoint",)
    SAVEPOINT_FIELD_NUMBER: _ClassVar[int]
    savepoint: SavePoint
    def __init__(self, savepoint: _Optional[_Union[SavePoint, _Mapping]] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("at_once",)
    AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    at_once: bool
    def __init__(self, at_once: _Optional[bool] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("generation", "text", "peer", "missing")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    generation: int
    text: str
    peer: str
    missing: bool
    def __init__(self, generation: _Optional[int] = ..., text: _Optional[str] = ..., peer: _Optional[str] = ..., missing: _Optional[bool] = ...) -> None: ...

class Traffic(_message.Message):
    __slots__ = ("peer", "direction", "purpose", "nbytes", "dense_nbytes")
    PEER_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    DENSE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    peer: str
    direction: str
    purpose: str
    nbytes: int
    dense_nbytes: int
    def __init__(self, peer: _Optional[str] = ..., direction: _Optional[str] = ..., purpose: _Optional[str] = ..., nbytes: _Optional[int] = ..., dense_nbytes: _Optional[int] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("peer", "path", "rtt_seconds", "bytes_per_second")
    PEER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    RTT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    peer: str
    path: str
    rtt_seconds: float
    bytes_per_second: float
    def __init__(self, peer: _Optional[str] = ..., path: _Optional[str] = ..., rtt_seconds: _Optional[float] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("traffic", "links", "state", "idle")
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    traffic: _containers.RepeatedCompositeFieldContainer[Traffic]
    links: _containers.RepeatedCompositeFieldContainer[Link]
    state: str
    idle: bool
    def __init__(self, traffic: _Optional[_Iterable[_Union[Traffic, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[Link, _Mapping]]] = ..., state: _Optional[str] = ..., idle: _Optional[bool] = ...) -> None: ...

class BlobRequest(_message.Message):
    __slots__ = ("token", "name", "offset")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    name: str
    offset: int
    def __init__(self, token: _Optional[bytes] = ..., name: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class UploadPiece(_message.Message):
    __slots__ = ("token", "step", "stage", "nbytes", "sha256", "data")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    step: int
    stage: int
    nbytes: int
    sha256: bytes
    data: bytes
    def __init__(self, token: _Optional[bytes] = ..., step: _Optional[int] = ..., stage: _Optional[int] = ..., nbytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadResult(_message.Message):
    __slots__ = ("ok", "text")
    OK_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    text: str
    def __init__(self, ok: _Optional[bool] = ..., text: _Optional[str] = ...) -> None: ...
