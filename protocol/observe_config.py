"""``run.yaml``'s section ``observe``: who else is told how a run goes. The coordinator's own: no worker is sent it."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from .errors import ConfigError
from .sync_config import Section

MOST_URL = 2048  # characters


class ObserveConfig(Section, frozen=True, kw_only=True, repr_omit_defaults=True):
    """Alerts are always shown on the page; what they are raised by, and what else is told, is said here."""

    # Where alerts are sent, raised and resolved, as JSON by POST: a secret, as whoever knows it can write there.
    webhook: Annotated[str, Meta(max_length=MOST_URL)] = ""
    webhook_kind: Literal["generic", "slack", "discord"] = "generic"
    # While the run trains: minutes without a committed round, or three times what its rounds usually take if that is
    # longer. 0: never an alert.
    no_commit_minutes: Annotated[float, Meta(ge=0, le=1e5)] = 30.0
    # The least space on the disk that holds the run, in 10^9 bytes. 0: never an alert.
    disk_free_gb: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    # Seconds that the machine's clock may be from the run's. 0: never an alert.
    clock_seconds: Annotated[float, Meta(ge=0, le=1e6)] = 5.0
    # The curves also go to an experiment tracker's log, kept in the run's data folder; needs the extra of that name.
    track: Literal["off", "tensorboard", "wandb", "trackio"] = "off"
    # A file with one JSON object for each event and warning, begun anew when it has log_mb 10^6 bytes; three older
    # ones are kept. Relative to the run's data folder.
    log: Annotated[str, Meta(max_length=4096)] = ""
    log_mb: Annotated[float, Meta(ge=0.01, le=1e5)] = 50.0

    def __post_init__(self) -> None:
        if self.webhook and (wrong := _wrong(self.webhook)):
            raise ConfigError(
                f"observe.webhook {wrong}",  # not the address itself: it is a secret
                hint="Give the whole address, as in https://hooks.example.com/services/abc; leave it out for none.",
            )

    def __repr__(self) -> str:
        return f"ObserveConfig(webhook={'[set]' if self.webhook else ''!r}, track={self.track!r}, log={self.log!r})"


def _wrong(url: str) -> str:
    """What is wrong with it, without repeating it; empty: nothing."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return "has characters that no address has"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is no address"
    if parts.scheme not in ("http", "https"):
        return "must begin with https:// or http://"
    if not host:
        return "names no host"
    if port == 0:
        return "names port 0"
    if parts.username is not None or parts.password is not None:
        return "has a user name or password in it: nothing would be sent of them"
    return ""
