"""``run.yaml``: what a run is. Read by the coordinator, sent to every worker, the same object on both sides.

Everything is frozen, keyword-only and checked when it is made. An unknown or mistyped key is a ``ConfigError``
that names its path and the nearest key that exists.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from .errors import ConfigError

Count = Annotated[int, Meta(ge=1, le=10**12)]
Share = Annotated[float, Meta(gt=0, le=1)]
Codec = Annotated[
    str,
    Meta(
        pattern=r"^(fp32|fp16|bf16|int[248](:tile=(32|64|128))?)$",
        description="must be fp32, fp16, bf16 or int2, int4, int8, with :tile=32, 64 or 128 if you like",
    ),
]
Port = Annotated[int, Meta(ge=0, le=65535)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: immutable, named fields only."""


class ModelConfig(Section, frozen=True, kw_only=True):
    """A GPT-J shape. The vocabulary's size comes from the tokenizer."""

    d_model: Annotated[int, Meta(ge=8, le=65536)] = 256
    layers: Annotated[int, Meta(ge=1, le=1024)] = 4
    heads: Annotated[int, Meta(ge=1, le=1024)] = 4
    rotary_dim: Annotated[int, Meta(ge=2, le=1024)] = 32
    seq_len: Annotated[int, Meta(ge=8, le=65536)] = 128


class DataConfig(Section, frozen=True, kw_only=True):
    """Where the text comes from: ``builtin``, a file, a folder, or ``hf:NAME[:SPLIT]``."""

    source: str = "builtin"
    vocab_size: Annotated[int, Meta(ge=300, le=1_000_000)] = 2048
    heldout_share: Annotated[float, Meta(gt=0, lt=0.5)] = 0.02


class PipelineConfig(Section, frozen=True, kw_only=True):
    """How a step is cut. Every first-stage replica feeds ``microbatches`` of ``microbatch_size`` samples a step."""

    stages: Annotated[int, Meta(ge=1, le=256)] = 2
    microbatch_size: Annotated[int, Meta(ge=1, le=4096)] = 4
    microbatches: Annotated[int, Meta(ge=1, le=4096)] = 4
    # Backward recomputes forward from the kept input (activation checkpointing): less memory, a third more work.
    recompute: bool = True
    # Forwards a stage may run ahead beyond what 1F1B needs, so that a hop's latency hides behind compute.
    run_ahead: Annotated[int, Meta(ge=0, le=64)] = 1


class ActivationConfig(Section, frozen=True, kw_only=True):
    """Codecs of the boundary tensors: ``fp32``, ``fp16``, ``bf16`` or ``int2|4|8[:tile=32|64|128]``."""

    forward: Codec = "int4:tile=64"
    backward: Codec = "int8:tile=64"


class OptimizerConfig(Section, frozen=True, kw_only=True):
    """Local AdamW of every replica."""

    lr: Annotated[float, Meta(gt=0, le=10)] = 1e-3
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Meta(gt=0)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.01
    warmup_steps: Annotated[int, Meta(ge=0)] = 20
    schedule: Literal["constant", "cosine"] = "constant"


class Sync(Section, frozen=True, kw_only=True):
    """When a round happens and what is sent in it: one rule, the known algorithms as settings (design, section 4)."""

    coin: Share | None = None  # probability of a round after a step; or
    every: Count | None = None  # a round after every N steps
    density: Share = 1.0  # share of positions the round's seeded mask opens
    topk: Share = 1.0  # share kept, by magnitude, of what the mask opens
    bits: Literal[2, 4, 8, 16, 32] = 16
    delay: Literal[0, 1] = 1  # steps between the capture of a round and its application
    outer_lr: Annotated[float, Meta(gt=0, le=10)] = 1.0
    outer_momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # Nesterov's, on the mean difference


PRESETS: dict[str, Sync] = {
    "potluck": Sync(coin=1 / 8, density=0.25, bits=4),
    "gptjt": Sync(coin=1 / 50, bits=16),
    "cocktail": Sync(every=1, density=0.1, topk=0.2, bits=4),
    "diloco": Sync(every=20, bits=8, outer_lr=0.7, outer_momentum=0.9),
    "dense": Sync(every=1, bits=32, delay=0),
}


class SyncConfig(Section, frozen=True, kw_only=True):
    """A preset, and any of its settings changed by name."""

    preset: Literal["potluck", "gptjt", "cocktail", "diloco", "dense"] = "potluck"
    coin: Share | None = None
    every: Count | None = None
    density: Share | None = None
    topk: Share | None = None
    bits: Literal[2, 4, 8, 16, 32] | None = None
    delay: Literal[0, 1] | None = None
    outer_lr: Annotated[float, Meta(gt=0, le=10)] | None = None
    outer_momentum: Annotated[float, Meta(ge=0, lt=1)] | None = None

    def resolved(self) -> Sync:
        """The preset with this section's changes; ``coin`` and ``every`` replace each other."""
        changes = {k: v for k, v in msgspec.structs.asdict(self).items() if k != "preset" and v is not None}
        if "coin" in changes and "every" in changes:
            raise ConfigError(
                "sync.coin and sync.every are both set", hint="Keep one: a round by chance, or every N steps."
            )
        if "coin" in changes:
            changes["every"] = None
        if "every" in changes:
            changes["coin"] = None
        return msgspec.structs.replace(PRESETS[self.preset], **changes)


class EvalConfig(Section, frozen=True, kw_only=True):
    """Held-out loss of the reference weights, through the pipeline, every ``every`` steps."""

    every: Count = 25
    samples: Count = 32


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """Workers save to their own disk every ``save_rounds`` rounds; the model is published every ``publish_rounds``."""

    save_rounds: Count = 10
    publish_rounds: Count = 50


class CoordinatorConfig(Section, frozen=True, kw_only=True):
    """Where the coordinator listens, whom it waits for."""

    host: str = "127.0.0.1"
    port: Port = 0
    http_port: Port = 0
    # What workers dial, if it is not the listening address (a public name, a forwarded port): HOST or HOST:PORT.
    advertise: str = ""
    # Workers to wait for before the first step; 0 means one for each stage.
    wait_for: Annotated[int, Meta(ge=0, le=10**6)] = 0
    ticket_hours: Annotated[float, Meta(gt=0, le=24 * 365)] = 24 * 7
    lease_seconds: Annotated[float, Meta(gt=0)] = 120.0
    # How long to wait for the holders of the newest state before going on from an older one.
    patience_seconds: Annotated[float, Meta(ge=0)] = 120.0


class RunConfig(Section, frozen=True, kw_only=True):
    """The whole of ``run.yaml``."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
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
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()

    def __post_init__(self) -> None:
        model, pipeline = self.model, self.pipeline
        if model.d_model % model.heads:
            raise ConfigError(
                f"model.d_model {model.d_model} is not a multiple of model.heads {model.heads}",
                hint="Change one of the two.",
            )
        if model.rotary_dim > model.d_model // model.heads or model.rotary_dim % 2:
            raise ConfigError(
                f"model.rotary_dim {model.rotary_dim} must be even and at most d_model / heads"
                f" = {model.d_model // model.heads}",
                hint="Lower model.rotary_dim.",
            )
        if pipeline.stages > model.layers:
            raise ConfigError(
                f"pipeline.stages {pipeline.stages} exceeds model.layers {model.layers}",
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
    _check_keys(raw, RunConfig, origin, "")
    try:
        return msgspec.convert(raw, RunConfig)
    except msgspec.ValidationError as error:
        text = str(error)
        match = re.search(r"^(.*?) - at `\$\.?(.*)`$", text)
        what, where = (match[1], match[2]) if match else (text, "")
        what = _explained(where) or what
        raise ConfigError(f"{origin}: {where or 'the file'}: {what}", hint="Change that value.") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}", hint=error.hint) from None


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults written out."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)


def _explained(path: str) -> str:
    """What the value at ``path`` must be, where its type says more than its name: choices and patterns."""
    kind: Any = RunConfig
    for key in path.split("."):
        hints = typing.get_type_hints(kind, include_extras=True) if isinstance(kind, type) else {}
        if key not in hints:
            return ""
        kind = hints[key]
    for part in (kind, *typing.get_args(kind)):
        if isinstance(part, Meta) and part.description:
            return part.description
        if typing.get_origin(part) is Literal:
            return "must be one of " + ", ".join(map(str, typing.get_args(part)))
    return ""


def _check_keys(raw: object, kind: Any, origin: str, path: str) -> None:
    if isinstance(kind, types.UnionType) or not (isinstance(kind, type) and issubclass(kind, Struct)):
        return
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{origin}: {path.rstrip('.') or 'the file'} must be a mapping of keys to values, not {raw!r}",
            hint="Indent its keys below it.",
        )
    hints = typing.get_type_hints(kind)
    for key, value in raw.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ConfigError(
                f"{origin}: unknown key `{path}{key}`",
                hint=f"Did you mean `{path}{near[0]}`?" if near else "",
            )
        _check_keys(value, hints[key], origin, f"{path}{key}.")
