"""The experiment trackers whose logs :mod:`.track` writes: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...protocol.config import RunConfig, told
from ...protocol.errors import ConfigError
from .track import Row, Sink

PROJECT = "potluck"
COUNT = itertools.count()


def check(kind: str) -> None:
    """``ConfigError`` if the tracker's package is not there."""
    if importlib.util.find_spec(kind) is None:
        raise ConfigError(
            f"observe.track is {kind}, which is not installed",
            hint=f"In potluck's checkout: pip install -e '.[{kind}]'; or set observe.track: off.",
        )


def made(kind: str, folder: Path, config: RunConfig, run_id: str) -> Sink:
    """A log in ``folder``, begun or gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = msgspec.to_builtins(told(config))
    about = {key: value for key, value in settings.items() if key not in ("coordinator", "observe")}
    sinks: dict[str, Callable[..., Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
    return sinks[kind](folder, config.name, run_id, about)


class TensorBoard:
    """Event files below ``folder``/NAME, a new one each time: look at them with ``tensorboard --logdir``."""

    can_take_back = True

    def __init__(self, folder: Path, name: str, run_id: str, about: dict[str, Any]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        place = folder / f"{name}-{run_id}"
        place.mkdir(parents=True, exist_ok=True)
        # A reader takes the files by name: the first number is when each was begun, in nanoseconds here as two may be
        # begun in a second.
        self._file = (place / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}.{next(COUNT)}").open("xb")
        self._records = RecordWriter(self._file)
        self._put(time.time(), file_version="brain.Event:2")
        text = summary_pb2.Summary(value=[self._text("config/text_summary", json.dumps(about, indent=1))])
        self._put(time.time(), step=0, summary=text)

    def _text(self, tag: str, text: str) -> Any:
        from tensorboard.compat.proto import tensor_pb2, types_pb2

        value = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
        metadata = self._summary.SummaryMetadata(
            plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name="text"),
            data_class=self._summary.DATA_CLASS_TENSOR,
        )
        return self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=value)

    def _put(self, wall_time: float, **fields: Any) -> None:
        self._records.write(self._event.Event(wall_time=wall_time, **fields).SerializeToString())

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.takes_back:  # readers then drop this step and all behind it
                start = self._event.SessionLog(status=self._event.SessionLog.START)
                self._put(row.time, step=row.step, session_log=start)
            if row.values:
                values = [self._summary.Summary.Value(tag=t, simple_value=v) for t, v in row.values.items()]
                self._put(row.time, step=row.step, summary=self._summary.Summary(value=values))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Wandb:
    """A run of Weights & Biases, offline unless WANDB_MODE says otherwise: ``wandb sync`` sends it later."""

    can_take_back = False

    def __init__(self, folder: Path, name: str, run_id: str, about: dict[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=f"{name}-{run_id}",
            name=name,
            dir=str(folder),
            config=about,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:  # their own step must grow, over restarts, too
            self._run.log({**row.values, "step": row.step, "time": row.time}, step=row.id)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A local project of Trackio in ``folder`` unless TRACKIO_DIR names another: ``trackio show`` opens it."""

    can_take_back = False

    def __init__(self, folder: Path, name: str, run_id: str, about: dict[str, Any]) -> None:
        import contextlib
        import sys

        os.environ.setdefault("TRACKIO_DIR", str(folder))  # it is read when the package is imported
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=PROJECT,
                name=f"{name}-{run_id}",
                config=about,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(dict(row.values), step=row.step)

    def close(self) -> None:
        self._run.finish()
