"""The tile format in torch operations: the reference, and the path of tensors on other devices than the CPU.

Only operations that IEEE 754 rounds correctly, in a fixed order, so that every device makes the same bytes.
Divisors are tensors: CUDA turns a division by a number into a multiplication by its reciprocal.
"""

import numpy as np
import torch
from torch import Tensor

from .codec import CodecError
from .grid import pack_codes, unpack_codes
from .tile_format import LIMIT, MAX_EXPONENT, TileFormat

_WORD32 = (1 << 32) - 1

# Shapes: R rows, T tiles of a row, W elements of a tile, N elements of a row, K tiles that have 8 bits.


def encode_rows(fmt: TileFormat, x_RN: Tensor, out: Tensor, seed: int) -> None:
    """The bytes of float32 `x_RN` into uint8 `out` [R, row bytes], on the device of both."""
    n, device = x_RN.shape[1], x_RN.device
    if not bool(x_RN.abs().amax() < LIMIT):
        raise non_finite()
    kept = fmt.kept(n)
    at_minima, at_positions, at_codes, at_extra, end = fmt.sections(n)
    y_RTW = _tiled(fmt, rotated(fmt, x_RN))
    norm_T = _norms(fmt, n, fmt.rotation[0], device)
    low_RT, high_RT = y_RTW.amin(dim=-1), y_RTW.amax(dim=-1)
    if fmt.zero:
        p_RT, q_RT = (high_RT - low_RT) * norm_T, low_RT.abs() * norm_T
        turned_RT = torch.zeros_like(p_RT, dtype=torch.bool)
    else:
        low_reach, high_reach = (-low_RT).clamp_(min=0.0), high_RT.clamp(min=0.0)
        p_RT = torch.maximum(low_reach, high_reach) * norm_T
        q_RT = torch.minimum(low_reach, high_reach) * norm_T
        turned_RT = low_reach <= high_reach
    s_RT = _scales(fmt, fmt.bits, p_RT, q_RT)
    wide_RT = torch.zeros_like(turned_RT)
    if kept:
        largest_RK = s_RT.argsort(dim=1, descending=True, stable=True)[:, :kept]
        wide_RT.scatter_(1, largest_RK, True)
        s_RT = torch.where(wide_RT, _scales(fmt, 8, p_RT, q_RT), s_RT)
    shift = 23 - fmt.mantissa
    rounded_RT = (s_RT.view(torch.int32) + ((1 << shift) - 1)) >> shift
    exponent_R1 = ((rounded_RT.amax(dim=1, keepdim=True) >> fmt.mantissa) - 15).clamp_(min=1)
    something_RT = torch.maximum(p_RT, q_RT) > 0
    code_RT = (rounded_RT - (exponent_R1 << fmt.mantissa)).clamp_(min=1) * something_RT
    s_RT = _scale_values(fmt, exponent_R1, code_RT)
    r_RT = torch.where(something_RT, s_RT, torch.inf).reciprocal()
    r_RT = torch.where(turned_RT, -r_RT, r_RT) * norm_T
    m_RT = torch.zeros_like(code_RT)
    least_RT = torch.zeros_like(s_RT)
    if fmt.zero:
        unit_RT = s_RT * _pick(wide_RT, fmt.grid(fmt.bits).unit, fmt.grid(8).unit)
        margin_RT = s_RT * _pick(wide_RT, fmt.grid(fmt.bits).margin, fmt.grid(8).margin)
        whole_RT = ((low_RT + margin_RT) / torch.where(something_RT, unit_RT, torch.inf)).floor_()
        m_RT = whole_RT.clamp_(-128, 127).to(torch.int32)
        least_RT = m_RT.float() * unit_RT
    v_RTW = (y_RTW - least_RT.unsqueeze(-1)) * r_RT.unsqueeze(-1)
    if fmt.random:
        v_RTW = v_RTW.add_(_tiled(fmt, _noise(x_RN, seed))).floor_()
    else:
        v_RTW = v_RTW.round_()
    bottom_RT1 = _pick(wide_RT, fmt.grid(fmt.bits).low, fmt.grid(8).low).unsqueeze(-1)
    top_RT1 = _pick(wide_RT, fmt.grid(fmt.bits).high, fmt.grid(8).high).unsqueeze(-1)
    codes_RTW = (torch.minimum(torch.maximum(v_RTW, bottom_RT1), top_RT1) - bottom_RT1).to(torch.uint8)
    out[:, :1] = exponent_R1.to(torch.uint8)
    signs_RT = (turned_RT & something_RT).to(torch.int32) << 7
    out[:, 1:at_minima] = (code_RT | signs_RT).to(torch.uint8)
    if fmt.zero:
        out[:, at_minima:at_positions] = (m_RT & 0xFF).to(torch.uint8)
    if kept:
        spare = 8 - fmt.bits
        codes_RTW.view(len(x_RN), -1)[:, n:] = 0
        chosen_RK = wide_RT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
        low_RKW = codes_RTW.gather(1, chosen_RK.unsqueeze(-1).expand(-1, -1, fmt.tile)) & ((1 << spare) - 1)
        out[:, at_extra:end] = pack_codes(low_RKW.flatten(1)[:, : fmt.extra(n)], spare)
        out[:, at_positions:at_codes] = _positions(wide_RT, chosen_RK, fmt.index_nbytes(n))
        codes_RTW = torch.where(wide_RT.unsqueeze(-1), codes_RTW >> spare, codes_RTW)
    out[:, at_codes:at_extra] = pack_codes(codes_RTW.flatten(1)[:, :n], fmt.bits)


def decode_rows(fmt: TileFormat, data: Tensor, out_RN: Tensor) -> None:
    """The float32 values of uint8 `data` [R, row bytes] into `out_RN`, both on the CPU."""
    rows, n = out_RN.shape
    tiles, kept = fmt.tiles(n), fmt.kept(n)
    at_minima, at_positions, at_codes, at_extra, end = fmt.sections(n)
    if bool((data[:, 0] > MAX_EXPONENT).any()):
        raise bad_exponent()
    code_RT = data[:, 1:at_minima].to(torch.int32)
    magnitude_RT = code_RT if fmt.zero else code_RT & 127
    s_RT = _scale_values(fmt, data[:, :1].to(torch.int32), magnitude_RT)
    s_RT = torch.where(code_RT == magnitude_RT, s_RT, -s_RT)
    codes_RTW = _tiled(fmt, unpack_codes(data[:, at_codes:at_extra], fmt.bits, n)).to(torch.int32)
    wide_RT = torch.zeros((rows, tiles), dtype=torch.bool)
    if kept:
        spare, extra = 8 - fmt.bits, fmt.extra(n)
        chosen_RK = _read_positions(data[:, at_positions:at_codes], tiles, kept, fmt.index_nbytes(n))
        wide_RT.scatter_(1, chosen_RK, True)
        low = torch.zeros((rows, kept * fmt.tile), dtype=torch.int32)
        low[:, :extra] = unpack_codes(data[:, at_extra:end], spare, extra).to(torch.int32)
        index_RKW = chosen_RK.unsqueeze(-1).expand(-1, -1, fmt.tile)
        joined_RKW = (codes_RTW.gather(1, index_RKW) << spare) | low.view(rows, kept, -1)
        codes_RTW.scatter_(1, index_RKW, joined_RKW)
    least_RT1: Tensor | float = 0.0
    zero_point_RT1 = _pick(wide_RT, -fmt.grid(fmt.bits).low, -fmt.grid(8).low).unsqueeze(-1)
    if fmt.zero:
        unit_RT = s_RT * _pick(wide_RT, fmt.grid(fmt.bits).unit, fmt.grid(8).unit)
        m_RT = data[:, at_minima:at_positions].view(torch.int8).float()
        least_RT1 = (m_RT * unit_RT).unsqueeze(-1)
    s_RT = s_RT * _norms(fmt, n, fmt.rotation[1], out_RN.device)
    y_RTW = (codes_RTW.float() - zero_point_RT1) * s_RT.unsqueeze(-1) + least_RT1
    out_RN.copy_(rotated(fmt, y_RTW.flatten(1)[:, :n]))


def rotated(fmt: TileFormat, x_RN: Tensor) -> Tensor:
    """`x_RN` with its whole tiles under the unnormalized Walsh-Hadamard transform, largest stride first.

    Unchanged without `hadamard`. The transform is its own inverse up to the factor 1 / tile, which is in the
    scales, as powers of two.
    """
    if not fmt.hadamard:
        return x_RN
    cut = x_RN.shape[1] // fmt.tile * fmt.tile
    y = x_RN[:, :cut]
    stride = fmt.tile // 2
    while stride:
        pairs = y.reshape(len(x_RN), cut // (2 * stride), 2, stride)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
        stride //= 2
    return torch.cat([y.reshape(len(x_RN), cut), x_RN[:, cut:]], dim=1)


def row_keys(totals_R: np.ndarray, seed: int) -> np.ndarray:
    """The uint64 keys of rows for rounding by chance, from the sums of their float32 bits and the seed.

    A sum does not depend on the order of additions, so every device finds the same one; splitmix64 mixes it.
    """
    word = np.array([(seed + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)], dtype=np.uint64)
    return _mix64(_mix64(word) ^ totals_R.astype(np.int64).view(np.uint64)) | np.uint64(1)


def non_finite() -> CodecError:
    return CodecError(f"the tensor has infinite or NaN elements, or some of {LIMIT:.1e} or more", "look upstream")


def bad_exponent() -> CodecError:
    return CodecError(f"a scale in the payload is not finite: an exponent is above {MAX_EXPONENT}")


def bad_positions() -> CodecError:
    return CodecError("the outlier positions in the payload are not the right number of tiles in order")


def _tiled(fmt: TileFormat, x_RN: Tensor) -> Tensor:
    """Rows cut into tiles, the last one filled up with its last element, which leaves its extremes alone."""
    rows, n = x_RN.shape
    missing = fmt.tiles(n) * fmt.tile - n
    if missing:
        x_RN = torch.cat([x_RN, x_RN[:, -1:].expand(rows, missing)], dim=1)
    return x_RN.reshape(rows, -1, fmt.tile)


def _norms(fmt: TileFormat, n: int, factor: float, device: torch.device) -> Tensor:
    """`factor` for each tile of a row that is rotated, 1 for others."""
    norm_T = torch.ones(fmt.tiles(n), device=device)
    if fmt.hadamard:
        norm_T[: n // fmt.tile] = factor
    return norm_T


def _scales(fmt: TileFormat, bits: int, p_RT: Tensor, q_RT: Tensor) -> Tensor:
    grid = fmt.grid(bits)
    divisors = torch.tensor([grid.p_divisor, grid.q_divisor], device=p_RT.device)
    return torch.maximum(p_RT / divisors[0], q_RT / divisors[1])


def _scale_values(fmt: TileFormat, exponent_R1: Tensor, code_RT: Tensor) -> Tensor:
    bits_RT = ((exponent_R1 << fmt.mantissa) + code_RT) << (23 - fmt.mantissa)
    return (bits_RT * (code_RT > 0)).view(torch.float32)


def _pick(wide_RT: Tensor, narrow: float, wide: float) -> Tensor:
    """A constant for each tile: `wide` where it has 8 bits."""
    return torch.where(wide_RT, float(wide), float(narrow))


def _noise(x_RN: Tensor, seed: int) -> Tensor:
    """Float32 [R, N] in [0, 1), multiples of 2^-24: a hash of the row's key and the element's number.

    The hash is murmur3's finalizer (Appleby) on a Weyl sequence, with the second half of the key put in the
    middle; 32-bit arithmetic, done here in 64 bits.
    """
    totals_R = x_RN.contiguous().view(torch.int32).sum(dim=1, dtype=torch.int64)
    keys_R = row_keys(totals_R.cpu().numpy(), seed)
    halves = np.stack([keys_R & np.uint64(_WORD32), keys_R >> np.uint64(32)]).astype(np.int64)
    k1_R1, k2_R1 = torch.from_numpy(halves).to(x_RN.device).unsqueeze(-1)
    j_N = torch.arange(x_RN.shape[1], device=x_RN.device)
    z = (j_N * 0x9E3779B9 + k1_R1) & _WORD32
    z = ((z ^ (z >> 16)) * 0x85EBCA6B) & _WORD32
    z = ((z ^ (z >> 13)) + k2_R1) & _WORD32
    z = ((z ^ (z >> 16)) * 0xC2B2AE35) & _WORD32
    z = z ^ (z >> 16)
    return (z >> 8).to(torch.float32).mul_(2.0**-24)


def _mix64(z: np.ndarray) -> np.ndarray:
    """splitmix64's output function on uint64; arithmetic wraps."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _positions(wide_RT: Tensor, chosen_RK: Tensor, index_nbytes: int) -> Tensor:
    if not index_nbytes:
        return _pack_bits(wide_RT)
    parts = [((chosen_RK >> (8 * k)) & 0xFF).to(torch.uint8) for k in range(index_nbytes)]
    return torch.stack(parts, dim=-1).flatten(1)


def _pack_bits(flags_RT: Tensor) -> Tensor:
    """Flag t as bit t % 8 of byte t // 8; uint8 [R, ceil(T / 8)]."""
    padded = torch.nn.functional.pad(flags_RT.to(torch.int32), (0, -flags_RT.shape[1] % 8))
    weights = 1 << torch.arange(8, dtype=torch.int32, device=flags_RT.device)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(dim=-1).to(torch.uint8)


def _read_positions(data: Tensor, tiles: int, kept: int, index_nbytes: int) -> Tensor:
    """Tile numbers int64 [R, K], in order; CodecError if the bytes are not K of them."""
    if not index_nbytes:
        bits = (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        flags = bits.flatten(1)
        if bool((flags.sum(dim=1, dtype=torch.int64) != kept).any()) or bool(flags[:, tiles:].any()):
            raise bad_positions()
        return flags.nonzero()[:, 1].view(-1, kept)
    parts = data.view(len(data), kept, index_nbytes).to(torch.int64)
    chosen_RK = sum((parts[..., k] << (8 * k) for k in range(index_nbytes)), torch.zeros((), dtype=torch.int64))
    if bool((chosen_RK.diff(dim=1) <= 0).any()) or bool((chosen_RK >= tiles).any()):
        raise bad_positions()
    return chosen_RK
