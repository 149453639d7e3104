"""Cheap starts: one process imports everything once and forks itself into coordinators, workers and proxies.

It never computes, opens no gRPC object and starts no thread, so what it forks begins as if it had just started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",  # without it MKL promises the same bits only for memory that is aligned alike
    "OPENBLAS_NUM_THREADS": "1",
    "GRPC_VERBOSITY": "NONE",
}  # in the environment of a zygote from its start
CODECS = {"activations": {"forward": "fp32", "backward": "fp32"}, "sync": {"preset": "dense"}}


def prepare() -> None:
    """Imports and compiles what the forked processes need."""
    import torch

    torch.set_num_threads(1)
    import transformers.models.gptj.modeling_gptj  # noqa: F401

    import potluck.cli
    import potluck.coordinator.service
    import potluck.worker.session  # noqa: F401
    from potluck.protocol.config import convert
    from potluck.worker.warm import warm

    warm(convert(CODECS))
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"


@dataclass
class Process:
    """One of ours. ``code`` is its exit code once it has ended, negative for a signal."""

    name: str
    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Whatever it is doing."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def spawn(name: str, log: Path, work: Callable[[], None]) -> Process:
    """A child in a session of its own that does ``work``, says it in ``log``, and dies with its parent."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(name, pid, log)
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, standard in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(descriptor, standard)
        work()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
