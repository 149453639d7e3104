"""What a worker computes: the real engine and pipeline, in which tensors and weights are counters of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from potluck.protocol import control_pb2 as pb
from potluck.protocol.errors import UnreachableError
from potluck.protocol.frames import Kind
from potluck.protocol.plan import SavePoint
from potluck.worker import engine as engine_module
from potluck.worker import origin as origin_module
from potluck.worker import pipeline as pipeline_module
from potluck.worker import publishing as publishing_module
from potluck.worker.boundary import EVAL, TRAIN, Seat
from potluck.worker.engine import Engine
from potluck.worker.layout import Batch
from potluck.worker.outside import EngineConfig
from potluck.worker.plan import View
from potluck.worker.sync import Synchronizer

from . import fiber
from .checks import hold
from .links import Frame, Header
from .weights import Content, Counters, State, begun, samples

if TYPE_CHECKING:
    from .worker import Worker
    from .world import World

LAYERS_SIZE = 256  # weights that a stage says it has
OWNERS = 2  # of shards, at most


class Vector:
    """A flat vector of weights that train: how often each sample is in them."""

    def __init__(self, counters: Counters = 0) -> None:
        self.counters = counters

    def clone(self) -> Vector:
        return Vector(self.counters)

    def copy_(self, other: Vector | Content) -> None:
        self.counters = other.counters


class Tensor:
    """Hidden states, a loss or a gradient of some samples; knows the stage that made it, and from what."""

    def __init__(
        self, counters: Counters, count: int, stage: SimStage | None = None, source: Tensor | None = None
    ) -> None:
        self.counters, self.count, self.stage, self.source = counters, count, stage, source
        self.grad: Tensor | None = None

    def to(self, _: object) -> Tensor:
        return self

    def detach(self) -> Tensor:
        return self

    def requires_grad_(self) -> Tensor:
        return self

    def __float__(self) -> float:
        return 1.0 * self.count

    def backward(self, gradient: Tensor | None = None) -> None:
        assert self.stage and self.source
        hold(gradient is None or gradient.counters == self.counters, "a gradient of other samples")
        self.stage.worker.compute(1.0)
        self.stage.grad += self.counters
        self.source.grad = Tensor(self.counters, self.count)


class Targets:
    """One for each sample."""

    def __init__(self, count: int) -> None:
        self.count = count

    def to(self, _: object) -> Targets:
        return self

    def __ge__(self, _: int) -> Targets:
        return self

    def sum(self) -> int:
        return self.count


class SimStage:
    """As :class:`potluck.worker.stage.Stage`."""

    device, size = "cpu", LAYERS_SIZE

    def __init__(self, worker: Worker, first: int, last: int) -> None:
        self.worker, self.first, self.last = worker, first, last
        self.g = Content.beginning(first, last)
        self.x = Vector()
        self.grad: Counters = 0
        self.module = Module(self)

    def update(self, targets: int) -> None:
        self.x.counters += self.grad
        self.grad = 0

    def state(self, point: SavePoint, *, pending: int = 0) -> State:
        return State(point=point, content=self.g, delta=self.x.counters - self.g.counters, pending=pending)

    def load(self, state: State) -> None:
        self.g = state.content
        self.x = Vector(state.content.counters + state.delta)
        self.grad = 0

    @contextmanager
    def at_reference(self) -> Iterator[None]:
        training = self.x.clone()
        self.x.copy_(self.g)
        yield
        self.x.copy_(training)

    def named(self, _: object) -> dict[str, Any]:
        return {}


class Module:
    def __init__(self, stage: SimStage) -> None:
        self._stage = stage

    def __call__(self, source: Tensor, _: None) -> Tensor:
        self._stage.worker.compute(0.0)
        return Tensor(source.counters, source.count, self._stage, source)

    def loss_sum(self, output: Tensor, _: Targets) -> Tensor:
        return output


class SimBatch(Batch):
    """All on one device."""

    def to(self, _: object) -> SimBatch:  # type: ignore[override]
        return self


class SimData:
    """As :class:`potluck.worker.data.Dataset`."""

    manifest = SimpleNamespace(n_heldout=8)

    def __init__(self, *_: object) -> None: ...

    def prepare(self, index: int, seed: int, n_heldout: int) -> None: ...

    def batch(self, indices: range, seed: int) -> Batch:
        return SimBatch(Tensor(samples(indices), len(indices)), Targets(len(indices)))

    def heldout_batch(self, indices: Sequence[int]) -> Batch:
        return SimBatch(Tensor(0, len(indices)), Targets(len(indices)))


class SimBoundary:
    """As :class:`potluck.worker.boundary.Boundary`, without codecs."""

    memory = None

    def __init__(self, config: Any, seat: Seat, *_: object) -> None:
        self.config, self.seat = config, seat

    def activation(self, step: int, part: int, m: int, batch: Any, attempt: int = 0) -> tuple[Frame, bool]:
        return self._frame(Kind.ACTIVATION, step, m, batch.x, part), False

    def gradient(self, step: int, m: int, gradient: Tensor) -> Frame:
        return self._frame(Kind.GRADIENT, step, m, gradient)

    def received(self, frame: Frame, attempt: int = 0) -> Batch:
        counters, count = frame.payload
        step, m = frame.header.step, frame.header.microbatch
        right = frame.header.part == EVAL or counters == samples(self.seat.plan.samples(step, m))
        hold(right, f"microbatch {m} of step {step} has other samples")
        return SimBatch(Tensor(counters, count), Targets(count))

    def received_gradient(self, frame: Frame) -> Tensor:
        return Tensor(*frame.payload)

    def _frame(self, kind: Kind, step: int, m: int, tensor: Tensor, part: int = TRAIN) -> Frame:
        header = Header(kind=kind, generation=self.seat.plan.generation, step=step, microbatch=m, part=part)
        return Frame(header, (tensor.counters, tensor.count))


@dataclass(frozen=True, kw_only=True)
class Capture:
    state: State
    samples: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    state: State
    shift: Counters  # of the weights since the capture
    base_digest: bytes
    samples: int
    entry: None = None

    def report(self, attempt: int) -> pb.RoundDone:
        point = self.state.point
        return pb.RoundDone(
            generation=point.generation,
            step=point.step,
            samples=self.samples,
            digest=point.digest,
            base_digest=self.base_digest,
            attempt=attempt,
        )


class SimSynchronizer(Synchronizer):
    """The real rules; instead of shards of weights, whole counters go to a few owners and come back from them."""

    def __init__(self, config: Any, seat: Seat, stage: Any, state: object, wire: Any) -> None:
        super().__init__(config, seat, stage, None, wire)
        self.worker: Worker = stage.worker

    def owing(self, state: Any) -> Any:
        return state

    def capture(  # type: ignore[override]
        self, stage: Any, steps_done: int, samples: int, fragments: Iterable[int], **_: bool
    ) -> Capture:
        point = SavePoint(
            kind="round",
            generation=self.seat.plan.generation,
            step=steps_done,
            first_layer=stage.first,
            last_layer=stage.last,
        )
        return Capture(state=stage.state(point), samples=samples)

    def exchange(self, capture: Any) -> Outcome:  # type: ignore[override]
        me, world, before, (piece,) = self.seat.replica, self.worker.world, capture.state, self.pieces[0]
        step = before.point.step
        fiber.sleep(world.step_seconds * self.worker.rng.uniform(0.0, 0.3))
        owners = range(min(len(self.peers), OWNERS))
        brought = {self.peers[me]: before.delta}
        for j in owners:
            if j != me:
                self._say(j, Kind.SHARD, step, (before.delta,), capture.samples)
        if me in owners:
            for i in range(len(self.peers)):
                if i != me:
                    frame: Any = self._take(Kind.SHARD, step, piece, i)
                    self._weight(frame, i, step)
                    brought[self.peers[i]] = frame.payload[0]
            for i in range(len(self.peers)):
                if i != me:
                    self._say(i, Kind.MEAN, step, (brought,))
        means = [brought if j == me else self._take(Kind.MEAN, step, piece, j).payload[0] for j in owners]
        hold(all(mean == means[0] for mean in means), "owners of one round heard of different replicas")
        self.counted_from = step
        content = before.content.trained(self.seat.plan.generation, step, means[0])
        point = SavePoint(**{**_fields(before.point), "digest": content.name})
        world.watch.made(content)
        return Outcome(
            state=State(point=point, content=content),
            shift=content.counters - before.content.counters - before.delta,
            base_digest=before.content.name,
            samples=capture.samples,
        )

    def _say(self, to: int, kind: Kind, step: int, what: tuple[Any, ...], count: int = 0) -> None:
        plan = self.seat.plan
        header = Header(
            kind=kind,
            generation=plan.generation,
            step=step,
            microbatch=self.seat.replica,
            attempt=plan.attempt,
            targets=count,
        )
        self.wire.post(self.peers[to], Frame(header, what))  # type: ignore[arg-type]


def _fields(point: SavePoint) -> dict[str, Any]:
    return {name: getattr(point, name) for name in ("kind", "generation", "step", "first_layer", "last_layer")}


def apply(stage: Any, outcome: Outcome, *, late: bool) -> None:
    """Puts a round into the weights; it must be a committed one."""
    content = outcome.state.content
    stage.worker.world.watch.applied(stage.worker.peer, content)
    stage.x.counters = stage.x.counters + outcome.shift if late else content.counters
    stage.g = content


class Views:
    """As those of outside.py."""

    def __init__(self, worker: Worker) -> None:
        self._bell = worker.bell
        self.newest: tuple[View, int] = (View(), 0)
        self.closed = self.idle = False

    def put(self, view: View) -> None:
        self.newest = (view, self.newest[1] + 1)
        self._bell.ring()

    def close(self) -> None:
        self.closed = True
        self._bell.ring()

    def wait(self, seen: int) -> None:
        self.idle = True
        fiber.wait(self._bell, lambda: self.closed or self.newest[1] != seen)
        self.idle = False


class Headquarters:
    """As the coordinator of session.py."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.state = "loading"

    def report(self, **body: object) -> None:
        self._worker.report(**body)

    def counterfactual(self, dense_nbytes: int) -> None: ...

    def corpus(self) -> Path:
        return Path()

    def fetch(self, name: str, nbytes: int) -> None: ...

    def publish(self, step: int, stage: int, data: bytes, is_wanted: Callable[[], bool]) -> None:
        worker = self._worker
        coordinator, plan = worker.world.coordinator, worker.links.plan
        if plan is None or not coordinator.upload(worker.peer, step, stage):
            raise UnreachableError("the upload was refused")
        fiber.sleep(worker.rng.uniform(0.1, 3.0) * worker.world.net.slow.get(worker.peer, 1.0))
        if not coordinator.upload(worker.peer, step, stage, plan):
            raise UnreachableError("the upload broke")


class SimEngine(Engine):
    """The real one."""

    def __init__(self, worker: Worker) -> None:
        world = worker.world
        config = EngineConfig(run=world.config, manifest=world.manifest, run_name=b"a run 00", peer=worker.peer)
        links: Any = worker.links
        super().__init__(config, worker.views, links, worker.mailbox, worker.states, Headquarters(worker))  # type: ignore[arg-type]
        self.worker = worker
        self._rounds, self._uploads = (  # type: ignore[assignment]
            fiber.Executor(worker.kernel, worker.process, worker.bell) for _ in range(2)
        )

    def _build(self, layers: tuple[int, int], *_: object) -> Any:
        return SimStage(self.worker, *layers)

    def _take_seat(self, plan: Any, view: View) -> None:
        fiber.sleep(self.worker.rng.uniform(0.05, 20.0 if plan.parts else 0.5))
        super()._take_seat(plan, view)

    def _save_round(self, state: Any) -> None:
        fiber.sleep(self.worker.rng.uniform(0.01, 1.0))
        super()._save_round(state)


@contextmanager
def patched(world: World) -> Iterator[None]:
    """Engines compute with counters while this is open."""

    def divided(parts: Sequence[State], layers: tuple[int, int], _: object) -> State:
        content, made = Content.divided([part.content for part in parts], layers), parts[0].point
        world.watch.made(content)
        point = replace(made, first_layer=layers[0], last_layer=layers[1], digest=content.name)
        return State(point=point, content=content)

    clock = SimpleNamespace(perf_counter=lambda: world.kernel.now, sleep=fiber.sleep)
    with ExitStack() as stack:
        for module, name, value in (
            (engine_module, "Boundary", SimBoundary),
            (engine_module, "Dataset", SimData),
            (engine_module, "Synchronizer", SimSynchronizer),
            (engine_module, "apply", apply),
            (engine_module, "digest", lambda vector: vector.name),
            (engine_module, "initial_state", lambda _run, _vocab, point, _base: begun(point)),
            (origin_module, "divided", divided),
            (pipeline_module, "time", clock),
            (publishing_module, "time", clock),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield
