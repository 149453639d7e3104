"""``docs/API.md``, from the same table as the server.

python -m potluck.coordinator.dashboard.manual   writes it anew
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Struct

from ..observe.metrics import OPERATION
from . import openapi
from .actions import OPERATIONS
from .endpoints import TABLE, Endpoint
from .openapi import Operation

FILE = Path(__file__).parents[2] / "docs" / "API.md"
INTRO = """# The dashboard's API

Made from the coordinator's table of endpoints (`python -m potluck.coordinator.dashboard.manual`): do not edit.
For programs the same is at `/api/openapi.json` (OpenAPI 3.1).

{about}

```bash
curl -s http://127.0.0.1:7701/api/state | python -m json.tool
curl -s http://127.0.0.1:7701/api/points.csv > points.csv
curl -sN http://127.0.0.1:7701/api/stream
```

An error is a JSON object with `error`, what is wrong, and `hint`, what would be right: 400 for a parameter that is not
what it must be, 404 for what is not there, 405 for another method than the address takes, 429 while too many ask at
once, 503 while the run's file cannot be read. Text in a CSV that a spreadsheet would take for a formula stands behind
an apostrophe. Long answers come with gzip to who accepts it.
"""
STREAM = """## The stream

`GET /api/stream` sends what changes as
[server-sent events](https://html.spec.whatwg.org/multipage/server-sent-events.html), at most one state each 0.5 s,
less often while many read. Each message's id is `P.E`: the ids of the last point and of the last event that this reader
has. `?after=P.E`, or the `Last-Event-ID` that a browser sends by itself, goes on there: nothing is lost or comes twice,
after a restart of the coordinator neither. Without it the stream begins with every point, and with those events that
the state shows. Who takes more than half a minute to read a message is cut off.

| event | data |
| --- | --- |
| `state` | those fields of [State](#state) that changed since this reader was told, at first all; \
always `version` and `now`, never `peers` and `events` |
| `peers` | `{"rows": [PeerRow that changed], "gone": [ids]}`; at first all rows, and `"all": true` |
| `points` | [[Point](#point)] |
| `events` | [[EventRow](#eventrow)] |
| `ping` | each 10 s: the line is alive |
"""


SERVED: tuple[Operation, ...] = (*OPERATIONS, OPERATION)  # beside the questions, by a run that goes on


def manual(operations: Sequence[Operation] = SERVED) -> str:
    parts = [INTRO.format(about=openapi.ABOUT), "## Questions\n", *map(_endpoint, TABLE), STREAM, "## Others\n"]
    parts += [_operation(other) for other in (*openapi.OWN, *operations) if other is not openapi.STREAM]
    kinds = _kinds([*(endpoint.answer for endpoint in TABLE), *_answers((*openapi.OWN, *operations))])
    return "\n".join([*parts, "## Answers\n", *map(_type, sorted(kinds, key=lambda kind: kind.__name__))])


def _endpoint(endpoint: Endpoint) -> str:
    lines = [f"### `GET {endpoint.path}`\n", f"{endpoint.summary} Answer: {_named(endpoint.answer)}.\n"]
    if endpoint.params:
        lines += ["| parameter | what | value |", "| --- | --- | --- |"]
        for param in endpoint.params:
            default = "" if param.default is None else f" (default {param.default})"
            lines.append(f"| `{param.name}` | {param.text} | {param.expects}{default} |")
        lines.append("")
    if endpoint.columns:
        lines.append(f"As a table: `{endpoint.path}.csv` with {', '.join(f'`{name}`' for name in endpoint.columns)}.\n")
    return "\n".join(lines)


def _operation(other: Operation) -> str:
    lines = [f"### `{other.method.upper()} {other.path}`\n", f"{other.summary}.\n"]
    if other.request is not None:
        lines.append(f"Body: {_named(other.request)}.\n")
    if other.parameters:
        lines += ["| parameter | where | what |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {place} | {text} |" for name, place, text in other.parameters] + [""]
    lines += ["| status | meaning | answer |", "| --- | --- | --- |"]
    for status, (text, kind) in other.responses.items():
        said = getattr(other, "media", "") if kind is None else _named(kind)
        lines.append(f"| {status} | {text} | {said} |")
    lines.append("")
    return "\n".join(lines)


def _answers(operations: Iterable[Operation]) -> list[Any]:
    return [kind for other in operations for kind in (*(kind for _, kind in other.responses.values()), other.request)]


def _type(kind: type[Struct]) -> str:
    said = " ".join((kind.__dict__.get("__doc__") or "").replace("``", "`").split())
    lines = [f"### {kind.__name__}\n", *([f"{said}\n"] if said else []), "| field | type |", "| --- | --- |"]
    hints = get_type_hints(kind)
    return "\n".join([*lines, *(f"| `{name}` | {_named(hints[name])} |" for name in kind.__struct_fields__), ""])


def _kinds(answers: Iterable[Any]) -> set[type[Struct]]:
    """Every struct that they are made of."""
    found: set[type[Struct]] = set()
    left = list(answers)
    while left:
        kind = left.pop()
        if isinstance(kind, type) and issubclass(kind, Struct):
            if kind not in found:
                found.add(kind)
                left += get_type_hints(kind).values()
        else:
            left += get_args(kind)
    return found


def _named(kind: Any) -> str:
    """A type as people say it, with links to those below."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(part) for part in inner)
    if origin in (list, tuple):
        parts = [part for part in inner if part is not Ellipsis]
        return f"[{', '.join(_named(part) for part in parts)}{', …' if len(parts) < 2 else ''}]"
    if isinstance(kind, type) and issubclass(kind, Struct):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return words.get(kind, "object")


def main() -> None:
    FILE.write_text(manual(), encoding="utf-8")


if __name__ == "__main__":
    main()
