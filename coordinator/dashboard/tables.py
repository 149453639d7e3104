"""Lists as CSV. Names come from strangers, so nothing in a cell may run when a spreadsheet opens it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what a cell begins with that is computed
Row = Sequence[Any]


def table(columns: Sequence[str], rows: Iterable[Row]) -> bytes:
    """UTF-8, one line for each row below the names of the columns."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([cell(value) for value in row] for row in rows)
    return text.getvalue().encode(errors="replace")


def cell(value: Any) -> str | int | float:
    """``value`` as it is written: nothing for what nobody knows, text that would be a formula behind an apostrophe."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return value
    text = str(value).replace("\0", "")
    return f"'{text}" if text.lstrip(" \u00a0").startswith(FORMULA) else text
