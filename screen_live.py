"""One screen that is drawn again and again, and lines where there is no screen."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from .protocol.errors import UnreachableError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # what could move a terminal's cursor


def watch(draw: Callable[[], RenderableType], seconds: float) -> None:
    """Shows what ``draw`` makes until Ctrl-C, or once where stdout is no terminal. Who does not answer any more is
    waited for with the last picture, which then says so."""
    console = Console(highlight=False)
    shown = draw()
    if not console.is_terminal:
        console.print(shown)
        return
    with contextlib.suppress(KeyboardInterrupt), Live(shown, console=console, screen=True, auto_refresh=False) as live:
        lost: float | None = None
        while True:
            live.refresh()
            time.sleep(seconds)
            try:
                shown, lost = draw(), None
                live.update(shown)
            except UnreachableError as error:
                lost = lost or time.monotonic()
                ago = f"{time.monotonic() - lost:.0f} s"
                live.update(Text(f"no answer for {ago}: {error}\nCtrl-C ends the watching."))


def clean(text: object, most: int = 200) -> str:
    """Somebody else's text as one harmless line."""
    line = CONTROL.sub(" ", str(text))
    return line if len(line) <= most else line[: most - 1] + "…"


def nbytes(value: float | None) -> str:
    """10^3 based, three digits at most."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def mbits(bytes_per_second: float | None) -> str:
    return "-" if bytes_per_second is None else f"{bytes_per_second * 8e-6:.3g} Mbit/s"


def duration(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds is None:
        return "-"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {int(seconds % 3600 // 60)} min"
    return f"{hours // 24} d {hours % 24} h"
