"""Entropy coders for the codes of one message, and the bounds that no coder of their kind can beat."""

from __future__ import annotations

import functools
import importlib.util
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]  # [R, N], one code each, counted from zero


@dataclass(frozen=True)
class Coder:
    """`encode` gives everything the other side needs beside the shape: the statistics are in the bytes."""

    name: str
    encode: Callable[[], bytes]
    decode: Callable[[bytes], object]
    whole: bool = False  # codes the message, not only the codes in it


def order0(codes: Codes, bits: int) -> float:
    """Bytes at the entropy of the codes' frequencies, the frequencies known to the other side for nothing."""
    counts = np.bincount(codes.ravel(), minlength=1 << bits)
    share = counts[counts > 0] / codes.size
    return float(-(share * np.log2(share)).sum() * codes.size / 8)


def adaptive(codes: Codes, bits: int, context: NDArray[np.integer] | None = None) -> float:
    """Bytes of an ideal adaptive coder of order 0, or of one for each value of `context`; learning included.

    The Krichevsky-Trofimov estimator's code length, in closed form.
    """
    levels = 1 << bits
    which = np.zeros(codes.shape, np.int64) if context is None else np.broadcast_to(context, codes.shape)
    cells = which.astype(np.int64).ravel() * levels + codes.ravel()
    counts = np.bincount(cells, minlength=(int(which.max()) + 1) * levels).reshape(-1, levels)
    log_gamma = np.vectorize(math.lgamma, otypes=[float])
    symbols = log_gamma(counts + 0.5) - math.lgamma(0.5)
    totals = log_gamma(counts.sum(axis=1) + levels / 2) - math.lgamma(levels / 2)
    nats = totals.sum() - symbols.sum()
    return float(nats / np.log(2) / 8)


def coders(codes: Codes, message: bytes, packed: bytes, bits: int) -> Iterator[Coder]:
    """Every coder that is installed, for a message whose codes the wire format packs as `packed`."""
    unpacked, grouped = codes.tobytes(), group(codes, bits)
    if importlib.util.find_spec("zstandard"):
        import zstandard

        decompress = zstandard.ZstdDecompressor().decompress
        for level in (1, 3):
            compress = zstandard.ZstdCompressor(level=level).compress
            kinds = {"message": message, "packed": packed, "unpacked": unpacked, "grouped": grouped}
            for what, data in kinds.items():
                encode = functools.partial(compress, data)
                yield Coder(f"zstd {level} {what}", encode, decompress, whole=what == "message")
    yield Coder("zlib grouped", lambda: _huffman(grouped), lambda sent: zlib.decompress(sent, wbits=-15))
    if importlib.util.find_spec("constriction"):
        yield from _constriction(codes, bits)


def group(codes: Codes, bits: int) -> bytes:
    """As many whole codes in a byte as fit, so that a coder of bytes sees each code unbroken."""
    k = 8 // bits
    flat = np.pad(codes.ravel(), (0, -codes.size % k)).reshape(k, -1)
    out = flat[0].copy()
    for part in range(1, k):
        out |= flat[part] << np.uint8(part * bits)
    return out.tobytes()


def _huffman(data: bytes) -> bytes:
    """Huffman's code by the standard library: zlib that looks for no repeats."""
    made = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return made.compress(data) + made.flush()


def _constriction(codes: Codes, bits: int) -> Iterator[Coder]:
    """Range coder and ANS, order 0, with the frequencies of this message as uint16 at the front."""
    import constriction

    stream = constriction.stream  # its parts are no modules that can be imported
    flat = codes.ravel()
    head = 2 << bits

    def model(table: bytes) -> Any:
        weights = np.frombuffer(table, "<u2").astype(np.float64)
        return stream.model.Categorical(weights / weights.sum(), perfect=False)

    def table() -> bytes:
        counts = np.bincount(flat, minlength=1 << bits)
        scaled = np.minimum(-(-counts * 65535 // counts.max()), 65535)  # what occurs stays above zero
        return scaled.astype("<u2").tobytes()

    def encode_range() -> bytes:
        front, coder = table(), stream.queue.RangeEncoder()
        coder.encode(flat.astype(np.int32), model(front))
        return front + coder.get_compressed().tobytes()

    def encode_ans() -> bytes:
        front, coder = table(), stream.stack.AnsCoder()
        coder.encode_reverse(flat.astype(np.int32), model(front))
        return front + coder.get_compressed().tobytes()

    def decode_range(sent: bytes) -> object:
        words = np.frombuffer(sent[head:], np.uint32)
        return stream.queue.RangeDecoder(words).decode(model(sent[:head]), flat.size).astype(np.uint8)

    def decode_ans(sent: bytes) -> object:
        words = np.frombuffer(sent[head:], np.uint32)
        return stream.stack.AnsCoder(words).decode(model(sent[:head]), flat.size).astype(np.uint8)

    yield Coder("range coder", encode_range, decode_range)
    yield Coder("ANS", encode_ans, decode_ans)
