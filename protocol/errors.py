"""Every error a user can meet, as one tree.

::

    PotluckError            anything with a ``code`` and a ``hint``
      ConfigError           run.yaml or a flag is wrong
      TicketError           not a ticket, expired, for another run
      IdentityError         key file unreadable, open to others, already in use
      RefusedError          the coordinator said no
      UnreachableError      nobody answers, or somebody else answers
      WireError             a peer sent something that is not allowed
      DivergedError         numbers are not finite any more
      StateError            the run's files on disk are missing, damaged, or cannot be written
      CapacityError         the run does not fit the machines offered

A message is one line; ``hint`` is the command or action that mends it.
"""

from __future__ import annotations


class PotluckError(Exception):
    """An error for people: ``str(error)`` says what happened, ``hint`` what to do, ``code`` is stable."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code or type(self).code

    def one_line(self) -> str:
        text = " ".join(str(self).split())
        hint = self.hint[:1].upper() + self.hint[1:]
        return f"{text}. {hint}" if hint else text


class ConfigError(PotluckError):
    code = "config"


class TicketError(PotluckError):
    code = "ticket"


class IdentityError(PotluckError):
    code = "identity"


class RefusedError(PotluckError):
    code = "refused"


class UnreachableError(PotluckError):
    code = "unreachable"


class WireError(PotluckError):
    code = "wire"


class DivergedError(PotluckError):
    code = "diverged"

    def __init__(self, why: str) -> None:
        hint = "Start again from a published model with a lower optimizer.lr."
        super().__init__(f"training has diverged ({why})", hint=hint)


class StateError(PotluckError):
    code = "state"


class CapacityError(PotluckError):
    code = "capacity"
