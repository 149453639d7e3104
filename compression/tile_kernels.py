"""Compiled loops over the rows of the tile format, for CPU tensors.

Bit for bit what :mod:`.tile_torch` computes: the same float32 operations in the same order, no fused
multiply-add, no reassociation. They go row by row with a few buffers of a row's size.

Written for the vectorizer: reductions run over the bits of floats as integers (a maximum of floats may not be
reordered, a maximum of integers may), and packed parts are contiguous runs. Compiled for the machine at first
use, a few seconds; kept on disk where a folder can be written to.
"""

import numba
import numpy as np

from .jit import jit

NON_FINITE, BAD_EXPONENT, BAD_POSITIONS = 1, 2, 3
_F0, _F1 = np.float32(0.0), np.float32(1.0)
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, half to even
_LIMIT_BITS = np.int32((100 + 127) << 23)  # of tile_format.LIMIT
_ULP24 = np.float32(2.0**-24)
_GOLDEN64, _GOLDEN32 = np.uint64(0x9E3779B97F4A7C15), np.uint32(0x9E3779B9)
_Options = tuple[int, int, bool, bool, bool, int, int, int]
_inner = numba.njit(nogil=True)  # part of the compiled code of `encode` and `decode`, whose cache is enough


@_inner
def _mix64(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_inner
def _butterflies(a: np.ndarray, b: np.ndarray, tile: int) -> None:
    half = tile // 2
    for start in range(0, a.size // tile * tile, tile):
        left, right, to = a[start : start + half], a[start + half : start + tile], b[start : start + tile]
        for j in range(half):
            to[2 * j] = left[j] + right[j]
            to[2 * j + 1] = left[j] - right[j]


@_inner
def _rotate(x: np.ndarray, y: np.ndarray, spare: np.ndarray, tile: int) -> None:
    """Unnormalized Walsh-Hadamard transform of the whole tiles of `x` into `y`; the rest is copied.

    Each of the log2(tile) passes adds the halves of a tile and interleaves sums and differences, which is the
    butterfly that goes from the largest stride to the smallest.
    """
    cut = x.size // tile * tile
    y[cut:] = x[cut:]
    if tile == 64:  # an even number of passes
        _butterflies(x, spare, tile)
        _butterflies(spare, y, tile)
    else:
        _butterflies(x, y, tile)
    width = 4 if tile == 64 else 2
    while width < tile:
        _butterflies(y, spare, tile)
        _butterflies(spare, y, tile)
        width *= 4


@_inner
def _pack(codes: np.ndarray, n: int, bits: int, plane: np.ndarray, out: np.ndarray) -> None:
    """`pack_codes` of one row. `codes` is zero from n to n + 8; `plane` is scratch."""
    low = 8 if bits == 8 else 4 if bits >= 4 else 2
    plane[n : n + 8] = 0
    at, done = 0, 0
    while done < bits:
        width = low if done == 0 else bits - low
        source = codes
        if width != bits:
            mask = np.uint8((1 << width) - 1)
            for j in range(n):
                plane[j] = (codes[j] >> np.uint8(done)) & mask
            source = plane
        m = (n * width + 7) // 8
        to = out[at : at + m]
        if width == 4:
            b = source[m:]
            for j in range(m):
                to[j] = source[j] | (b[j] << np.uint8(4))
        elif width == 2:
            b, c, d = source[m:], source[2 * m :], source[3 * m :]
            for j in range(m):
                to[j] = source[j] | (b[j] << np.uint8(2)) | (c[j] << np.uint8(4)) | (d[j] << np.uint8(6))
        else:
            to[:] = source[:m]
            for part in range(1, 8 // width):
                b = source[part * m :]
                for j in range(m):
                    to[j] |= b[j] << np.uint8(part)
        at += m
        done += width


@_inner
def _unpack(packed: np.ndarray, n: int, bits: int, codes: np.ndarray) -> None:
    """`unpack_codes` of one row; `codes` has room for n + 8."""
    low = 8 if bits == 8 else 4 if bits >= 4 else 2
    m = (n * low + 7) // 8
    if low == 8:
        codes[:m] = packed
    elif low == 4:
        b = codes[m:]
        for j in range(m):
            codes[j] = packed[j] & np.uint8(15)
            b[j] = packed[j] >> np.uint8(4)
    else:
        b, c, d = codes[m:], codes[2 * m :], codes[3 * m :]
        for j in range(m):
            codes[j] = packed[j] & np.uint8(3)
            b[j] = (packed[j] >> np.uint8(2)) & np.uint8(3)
            c[j] = (packed[j] >> np.uint8(4)) & np.uint8(3)
            d[j] = packed[j] >> np.uint8(6)
    width = bits - low
    if width == 0:
        return
    rest = packed[m:]
    m = (n * width + 7) // 8
    mask = np.uint8((1 << width) - 1)
    for part in range(8 // width):
        b = codes[part * m : min((part + 1) * m, n)]
        for j in range(b.size):
            b[j] |= ((rest[j] >> np.uint8(part * width)) & mask) << np.uint8(low)


@_inner
def _ends(bits: np.ndarray, tile: int, zero: bool, low: np.ndarray, high: np.ndarray) -> None:
    """The bits of each tile's least and greatest float; without `zero`, those of their reaches from zero."""
    magnitude = np.int32(0x7FFFFFFF)
    unsigned = bits.view(np.uint32)
    for t in range(low.size):
        part, same = bits[t * tile : (t + 1) * tile], unsigned[t * tile : (t + 1) * tile]
        if zero:
            least, most = magnitude, np.int32(-0x80000000)
            for j in range(part.size):
                ordered = np.int32(part[j] ^ ((part[j] >> np.int32(31)) & magnitude))
                least, most = min(least, ordered), max(most, ordered)
            low[t] = least ^ ((least >> np.int32(31)) & magnitude)
            high[t] = most ^ ((most >> np.int32(31)) & magnitude)
        else:
            below, above = np.uint32(0), np.int32(0)
            for j in range(part.size):
                below, above = max(below, same[j]), max(above, part[j])
            low[t] = np.int32(below & np.uint32(magnitude)) if below >= np.uint32(0x80000000) else np.int32(0)
            high[t] = above


@_inner
def _choose(keys: np.ndarray, kept: int, wide: np.ndarray) -> None:
    """Mark the `kept` largest keys (of float32 scales, so never negative), among equals the first ones."""
    bound = np.int32(0)
    for bit in range(30, -1, -1):
        higher = np.int32(bound | (1 << bit))
        count = 0
        for t in range(keys.size):
            count += keys[t] >= higher
        if count >= kept:
            bound = higher
    left = kept
    for t in range(keys.size):
        left -= keys[t] > bound
    for t in range(keys.size):
        wide[t] = keys[t] > bound
        if keys[t] == bound and left > 0:
            wide[t] = True
            left -= 1


@_inner
def _quantize(row, tile, least, r, wide, clamps, key, codes):  # type: ignore[no-untyped-def]
    """The codes of a row; a key of zero rounds to nearest, any other by chance."""
    k1, k2 = np.uint32(key), np.uint32(key >> np.uint64(32))
    for t in range(r.size):
        x, to = row[t * tile : (t + 1) * tile], codes[t * tile : (t + 1) * tile]
        grid = 1 if wide[t] else 0
        m_t, r_t, low, high = least[t], r[t], np.int32(clamps[grid, 0]), np.int32(clamps[grid, 1])
        if key == np.uint64(0):
            for j in range(x.size):
                q = np.int32(((x[j] - m_t) * r_t + _ROUNDER) - _ROUNDER)
                to[j] = np.uint8(min(max(q, low), high) - low)
        else:
            first = np.uint32(np.uint32(t * tile) * _GOLDEN32 + k1)
            for j in range(x.size):
                z = np.uint32(np.uint32(j) * _GOLDEN32 + first)
                z = np.uint32((z ^ (z >> np.uint32(16))) * np.uint32(0x85EBCA6B))
                z = np.uint32((z ^ (z >> np.uint32(13))) + k2)
                z = np.uint32((z ^ (z >> np.uint32(16))) * np.uint32(0xC2B2AE35))
                z = np.uint32(z ^ (z >> np.uint32(16)))
                noise = np.float32(np.int32(z >> np.uint32(8))) * _ULP24
                q = np.int32(np.floor((x[j] - m_t) * r_t + noise))
                to[j] = np.uint8(min(max(q, low), high) - low)


@_inner
def _split(codes: np.ndarray, tile: int, wide: np.ndarray, low_bits: int, extra: np.ndarray) -> None:
    """Move the low bits of the codes of wide tiles to `extra`, zero where there are none."""
    mask, shift = np.uint8((1 << low_bits) - 1), np.uint8(low_bits)
    extra[:] = 0
    at = 0
    for t in range(wide.size):
        if wide[t]:
            part, to = codes[t * tile : (t + 1) * tile], extra[at:]
            for j in range(part.size):
                to[j] = part[j] & mask
                part[j] >>= shift
            at += part.size


@_inner
def _write_positions(wide: np.ndarray, index_nbytes: int, to: np.ndarray) -> None:
    to[:] = 0
    at = 0
    for t in range(wide.size):
        if wide[t]:
            if index_nbytes == 0:
                to[t >> 3] |= np.uint8(1 << (t & 7))
            else:
                for k in range(index_nbytes):
                    to[at + k] = np.uint8(t >> (8 * k))
                at += index_nbytes


@_inner
def _read_positions(data: np.ndarray, index_nbytes: int, kept: int, wide: np.ndarray) -> bool:
    """Whether `data` is exactly `kept` positions, in order, of the tiles that `wide` has."""
    wide[:] = False
    count, last = 0, -1
    if index_nbytes == 0:
        for t in range(8 * data.size):
            if (data[t >> 3] >> np.uint8(t & 7)) & np.uint8(1):
                if t >= wide.size:
                    return False
                wide[t] = True
                count += 1
        return count == kept
    for i in range(kept):
        t = 0
        for k in range(index_nbytes):
            t |= int(data[i * index_nbytes + k]) << (8 * k)
        if t <= last or t >= wide.size:
            return False
        wide[t] = True
        last = t
    return True


@jit
def encode(
    x: np.ndarray,
    out: np.ndarray,
    sections: np.ndarray,
    options: _Options,
    constants: np.ndarray,
    clamps: np.ndarray,
    seed: np.uint64,
) -> int:
    """The rows of float32 `x` [R, N] as bytes `out` [R, B]; NON_FINITE, or 0. Arguments: see `TileCodec`."""
    bits, tile, zero, hadamard, random, kept, extra_n, index_nbytes = options
    rows, n = x.shape
    tiles = (n + tile - 1) // tile
    whole = n // tile if hadamard else 0
    shift = np.int32(19 if zero else 20)
    round_up = np.int32((1 << shift) - 1)
    codes, plane, extra = np.zeros(n + 8, np.uint8), np.zeros(n + 8, np.uint8), np.zeros(extra_n + 8, np.uint8)
    rotated, spare = np.empty(n if hadamard else 0, np.float32), np.empty(n if hadamard else 0, np.float32)
    wide = np.zeros(tiles, np.bool_)
    low, high, steps = np.empty(tiles, np.float32), np.empty(tiles, np.float32), np.empty(tiles, np.float32)
    low_bits, high_bits, step_bits = low.view(np.int32), high.view(np.int32), steps.view(np.int32)
    least, reciprocal = np.zeros(tiles, np.float32), np.zeros(tiles, np.float32)
    p, q = np.empty(tiles, np.float32), np.empty(tiles, np.float32)
    for r in range(rows):
        row, to = x[r], out[r]
        row_bits = row.view(np.int32)
        top = np.int32(0)
        for j in range(n):
            top = max(top, np.int32(row_bits[j] & np.int32(0x7FFFFFFF)))
        if top >= _LIMIT_BITS:
            return NON_FINITE
        key = np.uint64(0)
        if random:
            total = np.int64(0)
            for j in range(n):
                total += np.int64(row_bits[j])
            key = _mix64(_mix64(seed + _GOLDEN64) ^ np.uint64(total)) | np.uint64(1)
        if hadamard:
            _rotate(row, rotated, spare, tile)
            row = rotated
        _ends(row.view(np.int32), tile, zero, low_bits, high_bits)
        for t in range(tiles):
            p[t] = high[t] - low[t] if zero else max(low[t], high[t])
            q[t] = abs(low[t]) if zero else min(low[t], high[t])
            if t < whole:
                p[t] *= constants[0, 4]
                q[t] *= constants[0, 4]
            steps[t] = max(p[t] / constants[0, 0], q[t] / constants[0, 1])
        if kept:
            _choose(step_bits, kept, wide)
            for t in range(tiles):
                if wide[t]:
                    steps[t] = max(p[t] / constants[1, 0], q[t] / constants[1, 1])
        largest = np.int32(0)
        for t in range(tiles):
            step_bits[t] = (step_bits[t] + round_up) >> shift
            largest = max(largest, step_bits[t])
        exponent = max(int(largest >> (np.int32(23) - shift)) - 15, 1)
        base = np.int32(exponent << (23 - shift))
        to[0] = exponent
        for t in range(tiles):
            code, reciprocal[t] = np.int32(0), _F0
            if max(p[t], q[t]) > _F0:
                code = max(np.int32(step_bits[t] - base), np.int32(1))
                step_bits[t] = (base + code) << shift
                turned = not zero and low[t] <= high[t]
                reciprocal[t] = (_F1 / (-steps[t] if turned else steps[t])) * (constants[0, 4] if t < whole else _F1)
                code = np.int32(code | 128) if turned else code
            to[1 + t] = np.uint8(code)
        if zero:
            for t in range(tiles):
                grid = 1 if wide[t] else 0
                unit = steps[t] * constants[grid, 2]
                m = 0
                if reciprocal[t] != _F0:
                    m = int(np.floor((low[t] + steps[t] * constants[grid, 3]) / unit))
                    m = min(max(m, -128), 127)
                least[t] = np.float32(m) * unit
                to[sections[0] + t] = np.uint8(m)
        _quantize(row, tile, least, reciprocal, wide, clamps, key, codes[:n])
        if kept:
            _split(codes[:n], tile, wide, 8 - bits, extra[:extra_n])
            _write_positions(wide, index_nbytes, to[sections[1] : sections[2]])
            _pack(extra, extra_n, 8 - bits, plane, to[sections[3] : sections[4]])
        _pack(codes, n, bits, plane, to[sections[2] : sections[3]])
    return 0


@jit
def decode(
    data: np.ndarray,
    out: np.ndarray,
    sections: np.ndarray,
    options: _Options,
    constants: np.ndarray,
    max_exponent: int,
) -> int:
    """The rows of bytes `data` [R, B] as float32 `out` [R, N]; BAD_EXPONENT, BAD_POSITIONS, or 0."""
    bits, tile, zero, hadamard, _, kept, extra_n, index_nbytes = options
    rows, n = out.shape
    tiles = (n + tile - 1) // tile
    whole = n // tile if hadamard else 0
    shift = 19 if zero else 20
    codes, extra = np.empty(n + 8, np.uint8), np.empty(extra_n + 8, np.uint8)
    wide = np.zeros(tiles, np.bool_)
    rotated, spare = np.empty(n if hadamard else 0, np.float32), np.empty(n if hadamard else 0, np.float32)
    one_float = np.empty(1, np.float32)
    one_bits = one_float.view(np.int32)
    for r in range(rows):
        row, to = data[r], out[r]
        if row[0] > max_exponent:
            return BAD_EXPONENT
        _unpack(row[sections[2] : sections[3]], n, bits, codes)
        if kept:
            if not _read_positions(row[sections[1] : sections[2]], index_nbytes, kept, wide):
                return BAD_POSITIONS
            _unpack(row[sections[3] : sections[4]], extra_n, 8 - bits, extra)
        if hadamard:
            to = rotated
        at_extra = 0
        for t in range(tiles):
            grid = 1 if wide[t] else 0
            code = np.int32(row[1 + t])
            magnitude = code if zero else np.int32(code & 127)
            one_bits[0] = ((np.int32(row[0]) << (23 - shift)) + magnitude) << shift if magnitude else 0
            step = one_float[0] if magnitude == code else -one_float[0]
            least, offset = _F0, np.int32(0)
            if zero:
                least = np.float32(np.int8(row[sections[0] + t])) * (step * constants[grid, 2])
            else:
                offset = np.int32(128 if grid else 1 << (bits - 1))
            if t < whole:
                step *= constants[0, 5]
            start, stop = t * tile, min((t + 1) * tile, n)
            part, tile_codes = to[start:stop], codes[start:stop]
            if grid:
                low = extra[at_extra : at_extra + stop - start]
                for j in range(part.size):
                    tile_codes[j] = (tile_codes[j] << np.uint8(8 - bits)) | low[j]
                at_extra += stop - start
            for j in range(part.size):
                part[j] = np.float32(np.int32(tile_codes[j]) - offset) * step + least
        if hadamard:
            _rotate(rotated, out[r], spare, tile)
    return 0
