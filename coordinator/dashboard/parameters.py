"""What may be asked with: typed, bounded parameters, read strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.exceptions import HTTPException

MOST_NUMBER = 2**53 - 1  # that every JSON reader takes exactly
LAST_MOMENT = 1e11  # seconds since 1970: in the year 5138
WORD = "[A-Za-z0-9_]{1,64}"
PLACE = r"[0-9]{1,16}\.[0-9]{1,16}"
DIGITS = re.compile(r"[0-9]{1,18}")
DECIMAL = re.compile(r"[0-9]{1,18}(\.[0-9]{0,18})?([eE][+-]?[0-9]{1,3})?")


class Refused(HTTPException):
    """An answer that is an error: ``error`` says what is wrong, ``hint`` what would be right."""

    def __init__(self, status: int, error: str, hint: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, error, headers)
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class Param:
    """``place``: in the address's path or behind its question mark. ``low`` and ``high``: what a number may be."""

    name: str
    kind: Literal["whole", "moment", "word", "choice", "place"]
    text: str
    place: Literal["path", "query"] = "query"
    default: Any = None
    low: int = 0
    high: int = MOST_NUMBER
    choices: tuple[str, ...] = ()

    @property
    def expects(self) -> str:
        if self.kind == "whole":
            return f"a whole number, {self.low} or more" + (f", at most {self.high}" if self.high < MOST_NUMBER else "")
        if self.kind == "moment":
            return "a moment: seconds since 1970, as 1700000000.5"
        if self.kind == "place":
            return "two whole numbers with a dot between, as 120.45"
        return f"one of {', '.join(self.choices)}" if self.choices else "1 to 64 letters, digits or underscores"

    @property
    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        found: dict[str, Any] = {"type": "string", "pattern": f"^{WORD}$"}
        if self.kind == "whole":
            found = {"type": "integer", "minimum": self.low, "maximum": self.high}
        elif self.kind == "moment":
            found = {"type": "number", "minimum": 0, "maximum": LAST_MOMENT}
        elif self.kind == "place":
            found = {"type": "string", "pattern": f"^{PLACE}$"}
        elif self.choices:
            found = {"type": "string", "enum": list(self.choices)}
        return found if self.default is None else {**found, "default": self.default}

    def read(self, text: str) -> Any:
        """Its value; `Refused` with 400 if ``text`` is none."""
        if self.kind == "whole" and DIGITS.fullmatch(text) and self.low <= int(text) <= self.high:
            return int(text)
        if self.kind == "moment" and DECIMAL.fullmatch(text) and 0 <= (value := float(text)) <= LAST_MOMENT:
            return value if math.isfinite(value) else None
        if self.kind == "choice" and text in self.choices:
            return text
        if self.kind == "place" and re.fullmatch(PLACE, text):
            return text
        if self.kind == "word" and re.fullmatch(WORD, text):
            return text
        raise Refused(400, f"'{self.name}' must be {self.expects}", f"{self.name}: {self.text}")


def read(params: Sequence[Param], path: Mapping[str, str], query: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Every parameter's value, its default where it is not given. `Refused` with 400 for one that is unknown, given
    twice, or no value of its kind."""
    known = {param.name: param for param in params}
    given = dict(path)
    for name, text in query:
        if name not in known or known[name].place == "path":
            others = [param.name for param in params if param.place == "query"]
            hint = f"It takes {', '.join(others)}" if others else "It takes no parameter"
            raise Refused(400, f"{name[:64]!a} is no parameter of this address", hint)
        if name in given:
            raise Refused(400, f"'{name}' is given twice", "Give it once")
        given[name] = text
    return {name: param.read(given[name]) if name in given else param.default for name, param in known.items()}
