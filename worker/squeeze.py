"""zstd over payloads that have something to gain: quantized values are not spread evenly over their codes.

Measured (``python -m benchmarks.entropy``, tile 64, level 1): 4-bit gradients 7-9 % fewer bytes, 4-bit masked weight
differences 12 %, 4-bit activations 26-32 % plain but only 3-6 % rotated, 8 bits 4-5 %, the bit planes of 3 and 6 bits
nothing; at about 1 GB/s of payload, well below a hundredth of the time that a home line needs for it. Range and ANS
coders gain little more and cost more than a tenth of a 100 Mbit/s line's time.
"""

from __future__ import annotations

import zstandard

from ..protocol.errors import WireError

SUFFIX = "+zstd"  # of the codec's name, where a payload went through
LEVEL = 1
_WINDOW_NBYTES = 8 << 20  # what a stranger's payload may make us hold beside its contents


def squeeze(codec: str, payload: bytes) -> tuple[str, bytes]:
    """``payload`` and the name of its codec as they go on the wire: whichever form is shorter."""
    shorter = zstandard.ZstdCompressor(level=LEVEL).compress(payload)
    return (codec + SUFFIX, shorter) if len(shorter) < len(payload) else (codec, payload)


def is_squeezed(codec: str) -> bool:
    return codec.endswith(SUFFIX)


def release(codec: str, payload: bytes | memoryview, most_nbytes: int) -> bytes | memoryview:
    """What ``squeeze`` was given. ``WireError`` for bytes that it does not make, or for more than ``most_nbytes``.

    The size that a payload says of itself is checked before anything is allocated.
    """
    if not is_squeezed(codec):
        return payload
    try:
        nbytes = zstandard.frame_content_size(payload)
        if not 0 <= nbytes <= most_nbytes:
            raise WireError(f"a payload of {nbytes} bytes behind zstd, at most {most_nbytes} were expected")
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_NBYTES)
        return reader.decompress(payload, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"a payload that zstd cannot read: {error}") from None
