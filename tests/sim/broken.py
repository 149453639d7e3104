"""What is raised when something does not hold."""

from __future__ import annotations


class Broken(AssertionError):
    """An invariant does not hold."""


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)
