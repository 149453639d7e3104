"""AdamW's moments beside the flat vector of weights: in fp32, or in 8 bits with a scale for every 256 of them.

The blocks of 8 bits are those of the whole vector: they do not depend on where a tensor begins, and no tensor is too
small for them. Weight decay is the same for all weights, so one vector is one parameter.

The arithmetic of 8 bits is that of bitsandbytes (Dettmers et al., arXiv 2110.02861), with two differences, so that
moments that went through fp32 (``State``) come back as they were, bit for bit. Its signed codes end at -0.993 and 1;
ours at -1 and 1, so that the largest of a block always is its scale. And moments that are loaded get the nearest
code; its own quantization on a CPU gives 1 in 10,000 the one beside it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..protocol.config import OptimizerConfig
from ..protocol.errors import ConfigError
from . import bnb

BLOCK = 256  # moments that have one scale; the one that bitsandbytes updates in
_PART = 1 << 20  # moments at a time, where a copy is needed


@dataclass(frozen=True)
class Coded:
    """A moment of n weights in 8 bits, as it lies in memory: codes uint8 [n] and scales fp32 [n / 256], on the CPU."""

    codes: Tensor
    scales: Tensor
    signed: bool

    def numel(self) -> int:
        return self.codes.numel()

    def check(self, n: int) -> None:
        """``ValueError`` unless these can be moments of n weights."""
        codes, scales = self.codes, self.scales
        if codes.shape != (n,) or codes.dtype != torch.uint8 or scales.shape != (-(-n // BLOCK),):
            raise ValueError("its moments in 8 bits have another size")
        if scales.dtype != torch.float32 or not torch.isfinite(scales).all() or bool((scales < 0).any()):
            raise ValueError("its moments' scales are not finite fp32 numbers from 0 on")

    def part(self, start: int, end: int) -> Tensor:
        """fp32 [end - start]."""
        first, last = start // BLOCK, -(-end // BLOCK)
        values = dequantized(self.codes[first * BLOCK : last * BLOCK], self.scales[first:last], self.signed)
        return values[start - first * BLOCK : end - first * BLOCK]


Moment = Tensor | Coded


def dense(moment: Moment) -> Tensor:
    """fp32 [n] of a moment in either form; perhaps itself."""
    return part_of(moment, 0, moment.numel())


def part_of(moment: Moment, start: int, end: int) -> Tensor:
    """fp32 [end - start] of a moment in either form; perhaps a view."""
    return moment.part(start, end) if isinstance(moment, Coded) else moment[start:end]


class Moments(Protocol):
    """Both moments of n weights."""

    def step(self, p: Tensor, grad: Tensor, start: int, *, rate: float, update: int) -> None:
        """AdamW's update, the ``update``-th with these moments (from 1), of weights fp32 [k] that begin at ``start``, a
        multiple of ``BLOCK``; written to ``p``."""

    def copies(self) -> tuple[Moment, Moment]:
        """Of both, on the CPU."""

    def load(self, m: Moment | None, v: Moment | None) -> None:
        """From such copies, in either form; None: zero."""


def moments(config: OptimizerConfig, n: int, device: torch.device) -> Moments:
    """``ConfigError`` if the run's need bitsandbytes and it is not here."""
    return Moments8(config, n, device) if config.bits == 8 else Moments32(config, n, device)


class Moments32:
    """``m`` and ``v``: fp32 [n] on the device."""

    def __init__(self, config: OptimizerConfig, n: int, device: torch.device) -> None:
        self.config = config
        self.m, self.v = (torch.zeros(n, device=device) for _ in range(2))

    def step(self, p: Tensor, grad: Tensor, start: int, *, rate: float, update: int) -> None:
        c, here = self.config, slice(start, start + p.numel())
        adamw(
            [p],
            [grad],
            [self.m[here]],
            [self.v[here]],
            [],
            [torch.tensor(float(update - 1), device=p.device if p.device.type == "cuda" else "cpu")],
            fused=True,
            amsgrad=False,
            beta1=c.beta1,
            beta2=c.beta2,
            lr=rate,
            weight_decay=c.weight_decay,
            eps=c.eps,
            maximize=False,
        )

    def copies(self) -> tuple[Moment, Moment]:
        return self.m.to("cpu", copy=True), self.v.to("cpu", copy=True)

    def load(self, m: Moment | None, v: Moment | None) -> None:
        for own, kept in ((self.m, m), (self.v, v)):
            own.zero_() if kept is None else own.copy_(dense(kept))


class Moments8:
    """Codes uint8 [n] and scales fp32 [n / 256] of each moment. With CUDA the codes are paged: in memory that the
    driver moves to the host when the GPU's is short, and back."""

    def __init__(self, config: OptimizerConfig, n: int, device: torch.device) -> None:
        self.config, self.device, self._library = config, device, library()
        self.maps = [code_map(signed).to(device) for signed in (True, False)]
        self.codes = [self._empty(n) for _ in self.maps]
        self.scales = [torch.zeros(-(-n // BLOCK), device=device) for _ in self.maps]
        self.load(None, None)

    def step(self, p: Tensor, grad: Tensor, start: int, *, rate: float, update: int) -> None:
        c, here = self.config, slice(start, start + p.numel())
        blocks = slice(start // BLOCK, -(-here.stop // BLOCK))
        (m, v), (m_scales, v_scales) = (self._paged_like(q[here]) for q in self.codes), (s[blocks] for s in self.scales)
        self._library.optimizer_update_8bit_blockwise(
            "adam",
            grad,
            p,
            m,
            v,
            c.beta1,
            c.beta2,
            0.0,
            0.0,
            c.eps,
            update,
            rate,
            self.maps[0],
            self.maps[1],
            m_scales,
            v_scales,
            weight_decay=c.weight_decay,
        )

    def copies(self) -> tuple[Moment, Moment]:
        self._wait()
        both = zip(self.codes, self.scales, (True, False), strict=True)
        m, v = (Coded(c.to("cpu", copy=True), s.to("cpu", copy=True), signed) for c, s, signed in both)
        return m, v

    def load(self, m: Moment | None, v: Moment | None) -> None:
        self._wait()
        for codes, scales, values, signed in zip(self.codes, self.scales, (m, v), (True, False), strict=True):
            if values is None:
                codes.fill_(int((code_map(signed) == 0).nonzero()))
                scales.zero_()
                continue
            if isinstance(values, Coded):
                codes.copy_(values.codes)
                scales.copy_(values.scales)
                continue
            for start in range(0, values.numel(), _PART):
                here = slice(start, start + _PART)
                found, scale = quantized(values[here], signed)
                codes[here].copy_(found)
                scales[start // BLOCK : start // BLOCK + scale.numel()].copy_(scale)

    def _empty(self, n: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.empty(n, dtype=torch.uint8, device=self.device)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        paged: Tensor = self._library.get_paged(n, dtype=torch.uint8, device=torch.device("cuda", index))
        return paged

    def _paged_like(self, view: Tensor) -> Tensor:
        """A slice of paged codes, marked as bitsandbytes marks what is paged."""
        if self.device.type == "cuda":
            view.is_paged = True  # type: ignore[attr-defined]
        return view

    def _wait(self) -> None:
        """Paged codes are read and written by the CPU here: not while the GPU does."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def library() -> Any:
    """bitsandbytes' functions."""
    try:
        return bnb.functions()
    except ImportError as error:
        raise ConfigError(
            f"the run has optimizer.bits 8, and bitsandbytes cannot be imported ({error})",
            hint="Install it: pip install 'potluck[bnb]' (or bitsandbytes itself).",
        ) from None


@functools.cache
@torch.inference_mode(False)
def code_map(signed: bool) -> Tensor:
    """fp32 [256], rising: what the codes stand for, as a share of their block's largest value."""
    out: Tensor = library().create_dynamic_map(signed=signed).clone()
    if signed:
        out[0] = -1.0
    return out


@functools.cache
@torch.inference_mode(False)
def _middles(signed: bool) -> Tensor:
    """fp32 [255]: where one code ends and the next begins."""
    codes = code_map(signed).double()
    return ((codes[1:] + codes[:-1]) / 2).float()


def quantized(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes uint8 [k] of fp32 [k] on the CPU, and the scales fp32 [k / 256]."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, _middles(signed), out_int32=True).to(torch.uint8)
    return codes.flatten()[: values.numel()], scales


def dequantized(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """fp32 [k] of codes [k] and scales [k / 256] on the CPU."""
    out = torch.empty(codes.numel())
    for start in range(0, codes.numel(), _PART):
        part = code_map(signed)[codes[start : start + _PART].int()]
        scale = scales[start // BLOCK : (start + _PART) // BLOCK].repeat_interleave(BLOCK)
        out[start : start + _PART] = part.mul_(scale[: part.numel()])
    return out
