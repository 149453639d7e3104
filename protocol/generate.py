"""Writes ``control_pb2.py`` and ``control_pb2.pyi`` from ``control.proto``: ``python -m potluck.protocol.generate``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("control_pb2.py", "control_pb2.pyi")


def generate() -> dict[str, str]:
    """The text of each generated file. Needs ``grpcio-tools``."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as out:
        arguments = [f"-I{HERE}", f"--python_out={out}", f"--pyi_out={out}", str(HERE / "control.proto")]
        if protoc.main(["protoc", *arguments]):
            raise RuntimeError("protoc failed")
        return {name: (Path(out) / name).read_text() for name in NAMES}


def main() -> None:
    for name, text in generate().items():
        (HERE / name).write_text(text)
        sys.stderr.write(f"wrote {name}\n")


if __name__ == "__main__":
    main()
