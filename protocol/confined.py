"""Becomes another program that can do little and does not outlive its parent: ``PARENT ONE_CORE COMMAND...``.

Run as a script, with the standard library alone. ``PARENT`` is the process that must live. As root, the program runs
as nobody; its environment holds only what says how much it logs; with ``ONE_CORE`` 1 Go runs it on one core.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

if sys.platform != "win32":
    import resource  # here, for nobody may not be allowed to read the library

NOBODY = 65534
_SET_PDEATHSIG, _SET_NO_NEW_PRIVS = 1, 38  # of prctl(2), Linux


def confine(parent: int) -> None:
    """Root's rights are given up first: that would undo the rest."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold the key
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for option, value in ((_SET_PDEATHSIG, signal.SIGKILL), (_SET_NO_NEW_PRIVS, 1)):
            if prctl(option, value, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        raise OSError("the parent is gone")


def main(parent: str, one_core: str, program: str, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("GOLOG_")}
    if one_core == "1":
        environment["GOMAXPROCS"] = "1"
    # Opened before: nobody may not be allowed into the folder that it lies in.
    opened = os.open(program, os.O_RDONLY) if os.execve in os.supports_fd else None
    confine(int(parent))
    os.execve(program if opened is None else opened, [program, *arguments], environment)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"cannot start {os.path.basename(sys.argv[3])}: {error.strerror or error}")
