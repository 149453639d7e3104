"""The API's description, in OpenAPI 3.1: made from the table of endpoints and the types of their answers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import Struct

from ... import __version__
from .endpoints import Endpoint
from .parameters import Param
from .shapes import Refusal

REFERENCE = "#/components/schemas/{name}"
TITLE = "potluck: what a run shows"
ABOUT = (
    "Everything that the page shows of one training run, for programs. Reading needs no permission, changes nothing. "
    "Times are seconds, moments Unix time, sizes bytes, rates bytes per second; null is what nobody knows. Nobody's "
    "network address is in any answer. Every list is also there as CSV, at the same address with .csv behind it."
)
REFUSALS = {
    400: "A parameter is not what it must be.",
    404: "There is no such thing.",
    405: "This address is asked in another way.",
    429: "Too many ask at once.",
    503: "The run's file cannot be read right now.",
}


class Health(Struct, frozen=True, kw_only=True):
    """``why``: it is not well."""

    ok: bool
    why: str | None = None


class Operation(Protocol):
    """An address beside the table's, as its description says it. ``responses``: what each status means, with the type
    of its JSON; ``parameters``: name, where it stands (path, query or header) and what it says."""

    @property
    def path(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def request(self) -> Any: ...  # type of the body, None without one
    @property
    def responses(self) -> Mapping[int, tuple[str, Any]]: ...
    @property
    def parameters(self) -> Sequence[tuple[str, str, str]]: ...


class Own(NamedTuple):
    path: str
    summary: str
    responses: Mapping[int, tuple[str, Any]]
    parameters: Sequence[tuple[str, str, str]] = ()
    method: str = "get"
    request: Any = None
    media: str = "text/event-stream"  # of an answer that is no JSON


AFTER = Param(
    name="after",
    kind="place",
    text="only points and events behind these two ids; left out: every point, and the newest events",
)
STREAM = Own(
    path="/api/stream",
    summary="What changes, as server-sent events",
    responses={200: ("The stream", None), **{code: (REFUSALS[code], Refusal) for code in (400, 429)}},
    parameters=(
        ("after", "query", f"{AFTER.text} ({AFTER.expects})"),
        ("Last-Event-ID", "header", "the same, sent by a browser that connects again"),
    ),
)
OWN = (
    STREAM,
    Own("/api/openapi.json", "This description", {200: ("OpenAPI 3.1", dict[str, Any])}),
    Own("/healthz", "Whether the process answers", {200: ("It does", Health)}),
    Own(
        "/readyz",
        "Whether the run can go on: it is opened, and its disk takes what is written",
        {200: ("It can", Health), 503: ("It cannot; the answer says why", Health)},
    ),
)
SCHEMAS: dict[str, dict[str, Any]] = {"after": AFTER.schema}  # of parameters that are more than a text


def document(table: Iterable[Endpoint], operations: Sequence[Operation] = ()) -> dict[str, Any]:
    """The whole description, as JSON. ``operations``: what else is served."""
    table, others = tuple(table), (*OWN, *operations)
    types = [kind for other in others for _, kind in other.responses.values()] + [other.request for other in others]
    types = [*(endpoint.answer for endpoint in table), Refusal, *(kind for kind in types if kind is not None)]
    schemas, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    shape = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in table:
        paths[endpoint.path] = {"get": _asked(endpoint, {"application/json": {"schema": shape[repr(endpoint.answer)]}})}
        if endpoint.columns:
            csv = {"text/csv": {"schema": {"type": "string"}}}
            paths[f"{endpoint.path}.csv"] = {"get": _asked(endpoint, csv, f" As CSV: {', '.join(endpoint.columns)}.")}
    for other in others:
        paths.setdefault(other.path, {})[other.method] = _operated(other, shape)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "version": __version__, "description": ABOUT, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    if any(needs_token(other) for other in others):
        found["components"]["securitySchemes"] = {"operator": {"type": "http", "scheme": "bearer"}}
    return copy.deepcopy(found)


def _asked(endpoint: Endpoint, content: dict[str, Any], more: str = "") -> dict[str, Any]:
    codes = [*([400] if endpoint.params else []), *([404] if endpoint.missing else []), 429, 503]
    return {
        "operationId": _name("get", endpoint.path) + ("_csv" if more else ""),
        "summary": endpoint.summary + more,
        "parameters": [_parameter(param) for param in endpoint.params],
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **{str(code): _refusal(code) for code in codes},
        },
    }


def _operated(other: Operation, shape: Mapping[str, Any]) -> dict[str, Any]:
    def content(kind: Any) -> dict[str, Any]:
        if kind is None:
            return {getattr(other, "media", "text/event-stream"): {"schema": {"type": "string"}}}
        return {"application/json": {"schema": shape[repr(kind)]}}

    found: dict[str, Any] = {
        "operationId": _name(other.method, other.path),
        "summary": other.summary,
        "parameters": [
            {
                "name": name,
                "in": place,
                "required": place == "path",
                "description": text,
                "schema": SCHEMAS.get(name, {"type": "string"}),
            }
            for name, place, text in other.parameters
            if name != "Authorization"  # which OpenAPI has another word for
        ],
        "responses": {
            str(status): {"description": text, "content": content(kind)}
            for status, (text, kind) in other.responses.items()
        },
    }
    if other.request is not None:
        found["requestBody"] = {"required": True, "content": content(other.request)}
    if needs_token(other):
        found["security"] = [{"operator": []}]
    return found


def needs_token(other: Operation) -> bool:
    return any(name == "Authorization" for name, _, _ in other.parameters)


def _refusal(code: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(name="Refusal")}}}
    return {"description": REFUSALS[code], "content": content}


def _parameter(param: Param) -> dict[str, Any]:
    return {
        "name": param.name,
        "in": param.place,
        "required": param.place == "path",
        "description": f"{param.text} ({param.expects})",
        "schema": param.schema,
    }


def _name(method: str, path: str) -> str:
    words = path.strip("/").replace("{", "").replace("}", "").replace(".", "_").split("/")
    return "_".join([method, *(word for word in words if word != "api")])
