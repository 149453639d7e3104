"""``activations`` in run.yaml accepts exactly the codecs that exist."""

from __future__ import annotations

import itertools

import pytest

from potluck.compression.codec import CodecError
from potluck.compression.registry import build
from potluck.protocol.config import parse
from potluck.protocol.errors import ConfigError

OPTIONS = ["tile=64", "tile=48", "tile=128", "zero", "hadamard", "random", "outliers=8", "outliers=1", "outliers=2000"]
NAMES = ["int1", "int2", "int3", "int4", "int5", "int6", "int8", "fp16", "fp8"]


def exists(spec: str) -> bool:
    try:
        return bool(build(spec))
    except CodecError:
        return False


def accepted(spec: str) -> bool:
    try:
        return bool(parse(f"activations: {{forward: '{spec}', backward: '{spec}'}}"))
    except ConfigError as error:
        return "activations." not in str(error) or not error.hint  # a refusal without a reason counts as none


@pytest.mark.parametrize("name", NAMES)
def test_run_yaml_and_the_codecs_agree(name: str) -> None:
    lists = [combination for n in range(3) for combination in itertools.permutations(OPTIONS, n)]
    specs = [name + ("" if not options else ":" + ",".join(options)) for options in lists]
    specs += [f"{name}:", f"{name}:,", f"{name}:zero,", f"{name}:tile=064", f" {name}", f"{name}\n"]
    wrong = [spec for spec in specs if accepted(spec) != exists(spec)]
    assert not wrong
    assert any(map(exists, specs)) == (name not in ("int1", "int5", "fp8"))
