"""What :mod:`benchmarks.codecs` measures: each codec as a pair of functions from a tensor to bytes and back.

Everyone starts from an fp32 tensor and ends with the bytes in one piece, as a transport wants them, and back:
hivemind through its public classes and its protobuf message, bitsandbytes with codes and scales joined (one copy).
hivemind 1.1.12 cannot read its own 8-bit messages under numpy 2.4 and above; its rows say so there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potluck.compression.codec import CodecError
from potluck.compression.mask import Mask
from potluck.compression.registry import build
from potluck.compression.sync import SyncCodec

BITS, TILES, TILE = (2, 3, 4, 6, 8), (32, 64, 128), 64
OPTIONS = ("zero", "hadamard", "random", "outliers=8")
BLOCK = 64  # bitsandbytes
OUTLIERS = 8  # channels of the tensor below

MISSING = "not installed: pip install 'potluck[bench]'"


@dataclass(frozen=True)
class Contestant:
    """A codec, or the reason why it is not there."""

    group: str
    name: str
    encode: Callable[[], Any] | None = None  # to bytes or something like it
    decode: Callable[[Any], Tensor] | None = None
    missing: str = ""
    counted: Callable[[Tensor], Tensor] = lambda vector: vector  # the elements whose error counts
    reset: Callable[[], object] = lambda: None  # before the decoding that is looked at


Errors = Callable[[Tensor, Tensor], dict[str, float]]


def activations(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Heavy-tailed fp32 [B, T, D], like a residual stream; and which of the D channels are outliers.

    Elements are Gaussians whose width varies by channel, token and element; a few channels sit far from zero.
    """
    g = torch.Generator().manual_seed(seed)
    d = shape[-1]
    x_BTD = torch.randn(shape, generator=g)
    x_BTD *= torch.randn(shape, generator=g).mul_(0.3).exp_()
    x_BTD *= torch.randn(d, generator=g).mul_(0.4).exp_()
    x_BTD *= torch.randn(*shape[:-1], 1, generator=g).mul_(0.2).exp_()
    chosen = torch.randperm(d, generator=g)[:OUTLIERS]
    x_BTD[..., chosen] = x_BTD[..., chosen] * 4 + 20 * torch.randn(OUTLIERS, generator=g).sign()
    outlier_D = torch.zeros(d, dtype=torch.bool)
    outlier_D[chosen] = True
    return x_BTD, outlier_D


def difference(n: int, seed: int) -> Tensor:
    """A flat fp32 weight difference: small, heavy-tailed."""
    g = torch.Generator().manual_seed(seed)
    x_N = torch.randn(n, generator=g).mul_(0.6).exp_()
    return x_N.mul_(torch.randn(n, generator=g)).mul_(1e-4)


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((y - x).square_().sum(dtype=torch.float64) / x.square().sum(dtype=torch.float64))


def errors_of_activations(outlier_D: Tensor) -> Errors:
    def errors(x_BTD: Tensor, y_BTD: Tensor) -> dict[str, float]:
        plain = relative_error(x_BTD[..., ~outlier_D], y_BTD[..., ~outlier_D])
        return {"error": relative_error(x_BTD, y_BTD), "error_plain": plain}

    return errors


def errors_of_differences(x_N: Tensor, y_N: Tensor) -> dict[str, float]:
    return {"error": relative_error(x_N, y_N)}


def everyone(x: Tensor) -> Iterator[Contestant]:
    yield from ceilings(x)
    yield from of_torch(x)
    yield from of_hivemind(x)
    yield from of_bitsandbytes(x)
    yield from of_potluck(x)


def ceilings(x: Tensor) -> Iterator[Contestant]:
    array, there, back = x.numpy(), np.zeros_like(x.numpy()), np.zeros_like(x.numpy())

    def encode() -> np.ndarray:
        np.copyto(there, array)
        return there

    def decode(sent: np.ndarray) -> Tensor:
        np.copyto(back, sent)
        return torch.from_numpy(back)

    yield Contestant("numpy", "copy into the same memory", encode, decode)
    yield Contestant("numpy", "copy into new memory", array.copy, lambda sent: torch.from_numpy(sent.copy()))


def of_torch(x: Tensor) -> Iterator[Contestant]:
    shape = x.shape
    yield Contestant(
        "torch",
        "cast to fp16",
        lambda: x.to(torch.float16).numpy().tobytes(),
        lambda sent: _from(sent, torch.float16).float().view(shape),
    )


def of_hivemind(x: Tensor, names: tuple[str, ...] = ()) -> Iterator[Contestant]:
    names = names or (
        "Float16Compression",
        "ScaledFloat16Compression",
        "Uniform8BitQuantization",
        "Quantile8BitQuantization",
        "BlockwiseQuantization",
    )
    if not _installed("hivemind"):
        yield from (Contestant("hivemind", name, missing=MISSING) for name in names)
        return
    import hivemind.compression
    from hivemind.proto import runtime_pb2

    for name in names:
        if name == "BlockwiseQuantization" and not _installed("bitsandbytes"):
            yield Contestant("hivemind", name, missing=MISSING)
            continue
        codec = getattr(hivemind.compression, name)()
        info = hivemind.compression.CompressionInfo.from_tensor(x)

        def encode(codec: Any = codec, info: Any = info) -> bytes:
            return codec.compress(x, info).SerializeToString()

        def decode(sent: bytes, codec: Any = codec) -> Tensor:
            return codec.extract(runtime_pb2.Tensor.FromString(sent))

        yield Contestant("hivemind", name, encode, decode)


def of_bitsandbytes(x: Tensor) -> Iterator[Contestant]:
    kinds = ("8 bit", "nf4", "fp4")
    if not _installed("bitsandbytes"):
        yield from (Contestant("bitsandbytes", kind, missing=MISSING) for kind in kinds)
        return
    from bitsandbytes import functional as bnb

    blocks, shape = -(-x.numel() // BLOCK), x.shape
    codebook = bnb.create_dynamic_map()

    def encode8() -> bytes:
        codes, state = bnb.quantize_blockwise(x, code=codebook, blocksize=BLOCK)
        return _join(state.absmax, codes)

    def decode8(sent: bytes) -> Tensor:
        absmax, codes = _from(sent[: 4 * blocks], torch.float32), _from(memoryview(sent)[4 * blocks :], torch.uint8)
        return bnb.dequantize_blockwise(codes, absmax=absmax, code=codebook, blocksize=BLOCK).view(shape)

    yield Contestant("bitsandbytes", kinds[0], encode8, decode8)
    for kind in kinds[1:]:
        try:
            bnb.dequantize_4bit(*bnb.quantize_4bit(torch.ones(1, BLOCK), blocksize=BLOCK, quant_type=kind))
        except Exception as error:  # a CPU backend without it
            yield Contestant("bitsandbytes", kind, missing=f"not on this CPU: {type(error).__name__}")
            continue

        def encode4(kind: str = kind) -> bytes:
            codes, state = bnb.quantize_4bit(x, blocksize=BLOCK, quant_type=kind)
            return _join(state.absmax, codes)

        def decode4(sent: bytes, kind: str = kind) -> Tensor:
            absmax = _from(sent[: 4 * blocks], torch.float32)
            codes = _from(memoryview(sent)[4 * blocks :], torch.uint8).view(-1, 1)
            state = bnb.QuantState(absmax, shape=shape, dtype=torch.float32, blocksize=BLOCK, quant_type=kind)
            return bnb.dequantize_4bit(codes, state)

        yield Contestant("bitsandbytes", kind, encode4, decode4)


def of_potluck(x: Tensor) -> Iterator[Contestant]:
    specs = ["fp16", "bf16", *(f"int{bits}:tile={tile}" for bits in BITS for tile in TILES)]
    specs += [f"int{bits}:tile={TILE},{option}" for bits in BITS for option in OPTIONS]
    for spec in specs:
        try:
            codec = build(spec)
        except CodecError:
            yield Contestant("potluck", spec, missing="no such codec in this version")
            continue

        def encode(codec: Any = codec) -> bytes:
            return codec.encode(x, 1)

        def decode(sent: bytes, codec: Any = codec) -> Tensor:
            return codec.decode(sent, x.shape)

        yield Contestant("potluck", spec, encode, decode)


def everyone_of_sync(x: Tensor) -> Iterator[Contestant]:
    yield from ceilings(x)
    yield from of_hivemind(x, ("Float16Compression", "Uniform8BitQuantization", "BlockwiseQuantization"))
    yield from syncs_of_potluck(x)


def syncs_of_potluck(x: Tensor) -> Iterator[Contestant]:
    """Rounds of potluck. Decoding ends with everything added to a vector of the shard's length, as a round does."""
    n = x.numel()
    into = torch.zeros(n)
    rounds: tuple[tuple[str, float, dict[str, Any]], ...] = (
        ("dense, 4 bit", 1.0, {"bits": 4}),
        ("mask .1, 4 bit", 0.1, {"bits": 4}),
        ("mask .1, top .2, 4 bit", 0.1, {"topk": 0.2, "bits": 4}),
        ("top .03 of 4096, 2 bit", 1.0, {"topk": 0.03, "chunk": 4096, "bits": 2}),
    )
    for name, density, settings in rounds:
        try:
            codec = SyncCodec(**settings)
        except (TypeError, ValueError):
            yield Contestant("potluck", name, missing="no such codec in this version")
            continue

        def encode(codec: Any = codec, density: float = density) -> bytes:
            return codec.encode(Mask(n, density, 1).gather(x)).payload

        def decode(sent: bytes, codec: Any = codec, density: float = density) -> Tensor:
            mask = Mask(n, density, 1)
            sparse = codec.decode(sent, mask.count)
            if density == 1.0:
                return sparse.add_to(into)
            values = sparse.values if sparse.indices is None else sparse.dense(mask.count)
            return mask.put(into, values)

        yield Contestant("potluck", name, encode, decode, counted=Mask(n, density, 1).gather, reset=into.zero_)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _from(sent: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(sent, dtype=dtype)


def _join(*tensors: Tensor) -> bytes:
    return b"".join(memoryview(t.numpy().reshape(-1)).cast("B") for t in tensors)
