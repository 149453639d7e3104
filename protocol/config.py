"""``run.yaml``: what a run is. Read by the coordinator, sent to every worker, the same object on both sides.

Everything is frozen, keyword-only and checked when it is made. An unknown or mistyped key is a ``ConfigError``
that names its path and the nearest key that exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta

from .errors import ConfigError
from .model_config import ModelConfig as ModelConfig
from .observe_config import ObserveConfig as ObserveConfig
from .strict import convert_to
from .sync_config import PRESETS as PRESETS
from .sync_config import Count, Section, SyncConfig
from .sync_config import Sync as Sync

_OPTION = r"tile=(32|64|128)|zero|hadamard|random|outliers=[1-9][0-9]{0,3}"
Codec = Annotated[
    str,
    Meta(
        pattern=rf"^(fp32|fp16|bf16|int[23468](:({_OPTION})(,({_OPTION}))*)?)\Z",
        description="must be fp32, fp16, bf16 or int2, int3, int4, int6, int8, with options like"
        " :tile=128,hadamard if you like (tile=32|64|128, zero, hadamard, random, outliers=K)",
    ),
]
Port = Annotated[int, Meta(ge=0, le=65535)]


class DataConfig(Section, frozen=True, kw_only=True):
    """Where the text comes from: ``builtin``, a file, a folder, ``hf:NAME[:SPLIT]``; or a ``recipe.yaml`` or a folder
    that ``potluck data build`` made. Those have a tokenizer and held-out text of their own: the rest is ignored."""

    source: str = "builtin"
    vocab_size: Annotated[int, Meta(ge=300, le=1_000_000)] = 2048
    heldout_share: Annotated[float, Meta(gt=0, lt=0.5)] = 0.02


MOST_STAGES = 32  # that are thought of when the number is not fixed


class StageRange(Section, frozen=True, kw_only=True):
    """Between which numbers of stages the coordinator chooses."""

    min: Annotated[int, Meta(ge=1, le=MOST_STAGES)] = 1
    max: Annotated[int, Meta(ge=1, le=MOST_STAGES)] = MOST_STAGES

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ConfigError(
                f"pipeline.stages.min {self.min} exceeds pipeline.stages.max {self.max}", hint="Swap the two."
            )


class PipelineConfig(Section, frozen=True, kw_only=True):
    """How a step is cut. Every first-stage replica feeds ``microbatches`` of ``microbatch_size`` samples a step."""

    # A number; or {min: 2, max: 8}, or auto (as {min: 1, max: 32}): then as few as fit the workers' memory, more where
    # that makes the slowest stage clearly faster, and the layers are divided anew when what the workers bring changes
    # much, or nobody is left who can hold a stage.
    stages: Annotated[int, Meta(ge=1, le=256)] | Literal["auto"] | StageRange = 2
    microbatch_size: Annotated[int, Meta(ge=1, le=4096)] = 4
    microbatches: Annotated[int, Meta(ge=1, le=4096)] = 4
    # Backward recomputes each block's forward from its kept input (activation checkpointing): less memory, a third more
    # work. The last stage, where backward follows at once, does so only if all its blocks' graphs together are larger
    # than in_flight_gb.
    recompute: bool = True
    # Memory for microbatches under way beyond what 1F1B holds, in 10^9 bytes: a stage uses it when it would otherwise
    # wait for a slow line.
    in_flight_gb: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    # Replicas of a stage below which nothing new is trained until somebody joins, for coordinator.patience_seconds;
    # then the run goes on, and its rounds are marked as degraded.
    quorum: Annotated[int, Meta(ge=1, le=256)] = 1

    def counts(self, layers: int) -> range:
        """The numbers of stages that there may be, of a model with so many layers."""
        if isinstance(self.stages, int):
            return range(self.stages, self.stages + 1)
        found = StageRange() if self.stages == "auto" else self.stages
        return range(found.min, min(found.max, layers) + 1)


class ActivationConfig(Section, frozen=True, kw_only=True):
    """Codecs of the boundary tensors: ``fp32``, ``fp16``, ``bf16``, or integers in tiles of a row.

    ``int2|3|4|6|8[:OPTION,...]`` with ``tile=32|64|128`` elements, ``zero`` (a minimum for each tile instead of a
    signed scale), ``hadamard`` (rotated tiles), ``random`` (unbiased rounding), ``outliers=K`` (of K tiles, the one
    with the largest scale has 8 bits).
    """

    forward: Codec = "int4:tile=64,hadamard"
    backward: Codec = "int4:tile=64,hadamard"
    # Send samples of earlier epochs as what changed since (AQ-SGD): for runs of several epochs, see compression/aq.py.
    reuse: bool = False
    # Disk that a worker spends on it at most, in 10^9 bytes.
    cache_gb: Annotated[float, Meta(gt=0, le=1e6)] = 4.0

    def __post_init__(self) -> None:
        for key in ("forward", "backward"):
            name, _, options = getattr(self, key).partition(":")
            given = options.split(",") if options else []
            kinds = [option.partition("=")[0] for option in given]
            wrong = ""
            if len(set(kinds)) < len(kinds):
                wrong = "has an option twice"
            elif "zero" in kinds and "hadamard" in kinds:
                wrong = "has zero and hadamard: rotating a tile spreads its offset"
            elif "outliers" in kinds and name == "int8":
                wrong = "has outliers, which are tiles of 8 bits, where all tiles have 8"
            elif "outliers" in kinds and not 2 <= int(next(o[9:] for o in given if o[0] == "o")) <= 1024:
                wrong = "has outliers=K with K not from 2 to 1024"
            if wrong:
                raise ConfigError(f"activations.{key}: {getattr(self, key)} {wrong}", hint="Leave one of them out.")


class OptimizerConfig(Section, frozen=True, kw_only=True):
    """Local AdamW of every replica."""

    lr: Annotated[float, Meta(gt=0, le=10)] = 1e-3
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Meta(gt=0)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.01
    warmup_steps: Annotated[int, Meta(ge=0)] = 20
    schedule: Literal["constant", "cosine"] = "constant"
    # Of each of AdamW's two moments: 8 needs bitsandbytes and a quarter of the memory (worker/moments.py).
    bits: Literal[8, 32] = 32


class EvalConfig(Section, frozen=True, kw_only=True):
    """Held-out loss of the reference weights, through the pipeline, every ``every`` steps."""

    every: Count = 25
    samples: Count = 32


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """Workers save to their own disk every ``save_rounds`` rounds; the model is published every ``publish_rounds``."""

    save_rounds: Count = 10
    publish_rounds: Count = 50
    # Peers of other stages that can do a stage's rounds again if all its replicas are lost; 0: none. One replica alone
    # has one at most, and tells it about 3 bytes a weight: with short rounds, think of 0 or of more workers.
    keepers: Annotated[int, Meta(ge=0, le=16)] = 2


class CoordinatorConfig(Section, frozen=True, kw_only=True):
    """Where the coordinator listens, whom it waits for."""

    host: str = "127.0.0.1"
    port: Port = 0
    http_port: Port = 0
    # What workers dial, if it is not the listening address (a public name, a forwarded port): HOST or HOST:PORT.
    advertise: str = ""
    # Whether workers that cannot be dialled may meet here, each on a connection that it opened itself; how many Mbit/s
    # each may send through (0: no limit), and other relays for the same run: lines of `potluck relay up`.
    relay: bool = True
    relay_peer_mbps: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    relays: tuple[str, ...] = ()
    # libp2p relays, for workers that have the extra `p2p`: two behind routers that meet there can then often go on
    # without it. Lines of `potluck relay p2p`; four at different addresses, or no hole is found.
    p2p_relays: tuple[str, ...] = ()
    # Whether workers may name addresses of a home's or a company's own network. By default they may where the
    # coordinator itself is dialled at one.
    lan: bool | None = None
    # Workers to wait for before the first step; 0 means one for each stage.
    wait_for: Annotated[int, Meta(ge=0, le=10**6)] = 0
    ticket_hours: Annotated[float, Meta(gt=0, le=24 * 365)] = 24 * 7
    lease_seconds: Annotated[float, Meta(gt=0)] = 120.0
    # How long to wait for the holders of the newest state before going on from an older one.
    patience_seconds: Annotated[float, Meta(ge=0)] = 120.0
    # How long newcomers may take to fetch their stage while the others train; then all wait for them.
    prepare_seconds: Annotated[float, Meta(ge=0)] = 900.0


class RunConfig(Section, frozen=True, kw_only=True):
    """The whole of ``run.yaml``."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z",
            description="must be of lower-case letters, digits and -, 63 at most",
        ),
    ] = "run"
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 1
    steps: Count = 1000
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    pipeline: PipelineConfig = PipelineConfig()
    activations: ActivationConfig = ActivationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sync: SyncConfig = SyncConfig()
    # Activations, gradients and rounds go through zstd where that makes them shorter (worker/squeeze.py).
    zstd: bool = True
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    observe: ObserveConfig = ObserveConfig()

    def __post_init__(self) -> None:
        model, pipeline = self.model, self.pipeline
        if not (counts := pipeline.counts(model.layers)) or counts[0] > model.layers:
            raise ConfigError(
                f"pipeline.stages {counts.start} exceeds model.layers {model.layers}",
                hint="A stage holds at least one layer: lower pipeline.stages.",
            )
        self.sync.resolved()


def parse(text: str, origin: str = "run.yaml") -> RunConfig:
    """Reads ``run.yaml``'s text. Raises ``ConfigError`` with the path of what is wrong."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(
            f"{origin}{line}: not YAML ({getattr(error, 'problem', error)})", hint="Mend that line."
        ) from None
    return convert({} if raw is None else raw, origin)


def load(path: Path) -> RunConfig:
    """Reads a file; see :func:`parse`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", hint="Write one with: potluck coordinator init run.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", hint="Check the path and its rights.") from None
    return parse(text, str(path))


def convert(raw: object, origin: str = "run.yaml") -> RunConfig:
    """Plain data to a ``RunConfig``; ``ConfigError`` on anything that does not fit."""
    return convert_to(RunConfig, raw, origin)


def told(config: RunConfig) -> RunConfig:
    """What others may know of it: without the section ``observe``, which may hold secrets."""
    return msgspec.structs.replace(config, observe=ObserveConfig())


def encoded(config: RunConfig) -> str:
    """A run's configuration as workers are sent it, in JSON."""
    plain = msgspec.to_builtins(told(config))
    del plain["observe"]
    return msgspec.json.encode(plain).decode()


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults written out."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)
