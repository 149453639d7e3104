"""The format of quantized tiles: what a spec may say, and where each byte of a row lies.

A row (the last dimension) is cut into tiles of `tile` elements, the last one shorter where that does not
divide. Its bytes, which depend on that row and the seed only:

    exponent   1 byte e, from 1: the scales of the row are counted from 2^(e - 127)
    scales     1 byte a tile: a small float, 16 binades from the exponent up, rounded up; 0 is a tile of zeros
    minima     `zero`: 1 byte a tile, signed, in units of 2^(bits - 6) scales
    positions  `outliers`: which tiles have 8 bits, as a bitmap or as sorted indices, whichever is shorter
    codes      one for each element, packed as in :mod:`.grid`
    extra      `outliers`: the low 8 - bits bits of the codes of the chosen tiles, packed likewise

Without `zero` a scale is sign, 4 bits of exponent and 3 of mantissa, of the signed grid of :mod:`.grid`: the
side with one more level is the side of the tile's extreme, and the scale is |extreme| / (2^(bits - 1) + 1/2)
rounded up, so that rounding costs the extreme half a step at most. With `zero` it has no sign and 4 bits of
mantissa; value = minimum + code * scale, and both ends of a tile may lie half a step outside the grid. With
`random` nothing may lie outside: a cut is a bias.

Why one byte. Squared error over squares on N(0,1), tile 64, against an fp16 scale of |extreme| / divisor with
the better of the divisors 2^(bits - 1) and 2^(bits - 1) + 1/2:

    bits      fp16        byte        dB lost     bits saved (6.02 dB each)
    2         0.1332      0.1349      0.06        0.125 (0.75 dB)
    3         0.0337      0.0343      0.08        0.125
    4         0.00876     0.00898     0.11        0.125
    6         0.000556    0.000600    0.33        0.125
    8         0.0000347   0.0000383   0.43        0.125
"""

import re
from dataclasses import dataclass

from .codec import CodecError
from .grid import packed_nbytes

TILE_BITS = (2, 3, 4, 6, 8)
TILES = (32, 64, 128)
DEFAULT_TILE = 64
MAX_OUTLIERS = 1024
LEGAL = "fp32, fp16, bf16, int{2,3,4,6,8}[:tile={32,64,128},zero,hadamard,random,outliers=K]"

LIMIT = 2.0**100  # elements at or above it are refused like infinities: nothing past here can overflow
MAX_EXPONENT = 216  # of a row: the largest that elements below LIMIT can lead to
_LIST = re.compile(r"int([23468])(?::([a-z0-9=,]+))?")
_OPTION = re.compile(r"tile=(?:32|64|128)|zero|hadamard|random|outliers=[1-9][0-9]{0,3}")


@dataclass(frozen=True)
class Grid:
    """The constants of a grid of `bits` bits, all of them exact in float32.

    With p and q the tile's larger and smaller reach from zero (with `zero`: its range and its |minimum|), the
    scale is max(p / p_divisor, q / q_divisor), rounded up. Codes are clamped to [low, high], then counted
    from low.
    """

    p_divisor: float
    q_divisor: float
    low: int
    high: int
    unit: float  # of the minimum, in scales
    margin: float  # how far above the tile's minimum the grid may begin, in scales


@dataclass(frozen=True)
class TileFormat:
    """One way to write rows of tiles; :func:`parse` makes it from a spec."""

    bits: int
    tile: int = DEFAULT_TILE
    zero: bool = False
    hadamard: bool = False
    random: bool = False
    outliers: int = 0

    def __post_init__(self) -> None:
        if self.bits not in TILE_BITS or self.tile not in TILES:
            raise CodecError(f"no codec of {self.bits} bits with tile {self.tile}", f"use one of {LEGAL}")
        if self.outliers and self.bits == 8:
            raise CodecError("outliers are tiles of 8 bits", "leave the option out where all tiles have 8")
        if self.outliers and not 2 <= self.outliers <= MAX_OUTLIERS:
            raise CodecError(f"outliers=K picks one tile in K, K from 2 to {MAX_OUTLIERS}, not {self.outliers}")
        if self.zero and self.hadamard:
            raise CodecError("zero with hadamard", "rotating a tile spreads its offset: leave one of them out")

    @property
    def spec(self) -> str:
        """The canonical text."""
        flags = [name for name in ("zero", "hadamard", "random") if getattr(self, name)]
        picks = [f"outliers={self.outliers}"] if self.outliers else []
        return f"int{self.bits}:" + ",".join([f"tile={self.tile}", *flags, *picks])

    @property
    def mantissa(self) -> int:
        """Bits of the mantissa of a scale."""
        return 4 if self.zero else 3

    @property
    def rotation(self) -> tuple[float, float]:
        """Factors of a tile before and after quantization: powers of two, their product 1 / tile."""
        forward = {32: 2.0**-3, 64: 2.0**-3, 128: 2.0**-4}[self.tile]
        return forward, 1.0 / (self.tile * forward)

    def grid(self, bits: int) -> Grid:
        """The grid of the tiles that have `bits` bits."""
        top, half = (1 << bits) - 1, 1 << (bits - 1)
        if self.zero:
            unit = 2.0 ** (bits - 6)
            cut = 0.0 if self.random else 1.0
            return Grid(top + cut - unit, 127.0 * unit, 0, top, unit, cut / 2)
        if self.random:
            return Grid(float(half), half - 1.0, -half, half - 1, 0.0, 0.0)
        return Grid(half + 0.5, float("inf"), -half, half - 1, 0.0, 0.0)

    def tiles(self, n: int) -> int:
        """Tiles of a row of `n` elements."""
        return -(-n // self.tile)

    def kept(self, n: int) -> int:
        """Tiles of a row that have 8 bits by `outliers`."""
        return -(-self.tiles(n) // self.outliers) if self.outliers else 0

    def extra(self, n: int) -> int:
        """Codes in the extra section of a row: whole tiles, but never more than the row has elements."""
        return min(self.kept(n) * self.tile, n)

    def index_nbytes(self, n: int) -> int:
        """Bytes of one position: 1, 2 or 4, or 0 where a bitmap of the row's tiles is not longer."""
        tiles, kept = self.tiles(n), self.kept(n)
        width = 1 if tiles <= 1 << 8 else 2 if tiles <= 1 << 16 else 4
        return width if kept * width < packed_nbytes(tiles, 1) else 0

    def positions_nbytes(self, n: int) -> int:
        """Bytes of the positions section of a row."""
        width = self.index_nbytes(n)
        return 0 if not self.outliers else self.kept(n) * width if width else packed_nbytes(self.tiles(n), 1)

    def sections(self, n: int) -> tuple[int, int, int, int, int]:
        """Where minima, positions, codes and extra begin in a row, and where it ends."""
        minima = 1 + self.tiles(n)
        positions = minima + (self.tiles(n) if self.zero else 0)
        codes = positions + self.positions_nbytes(n)
        extra = codes + packed_nbytes(n, self.bits)
        return minima, positions, codes, extra, extra + packed_nbytes(self.extra(n), 8 - self.bits)


def parse(spec: str) -> TileFormat:
    """The format that `spec` names, its options in any order; CodecError if there is none.

    `int4` is short for `int4:tile=64`.
    """
    found = _LIST.fullmatch(spec)
    options = found[2].split(",") if found and found[2] else []
    names = [option.partition("=")[0] for option in options]
    if found is None or len(set(names)) < len(names) or not all(_OPTION.fullmatch(option) for option in options):
        raise CodecError(f"unknown codec {str(spec)[:80]!r}", f"use one of {LEGAL}")
    numbers = {name: int(text) for name, _, text in (option.partition("=") for option in options) if text}
    return TileFormat(
        bits=int(found[1]),
        tile=numbers.get("tile", DEFAULT_TILE),
        zero="zero" in names,
        hadamard="hadamard" in names,
        random="random" in names,
        outliers=numbers.get("outliers", 0),
    )
