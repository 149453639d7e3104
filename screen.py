"""What ``potluck demo`` and ``potluck estimate`` show in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .protocol.footprint import CARDS, CHOICES, LORA_CHOICES, Choice, Footprint, fits, footprints
from .protocol.plan import Shape

if TYPE_CHECKING:
    from .protocol.config import RunConfig
    from .worker.estimate import Estimate, Line


class Screen:
    """What the terminal shows: a live block while training, lines otherwise."""

    def __init__(self, *, plain: bool) -> None:
        self.console = Console()
        self.page = ""
        self.state: dict[str, Any] | None = None
        self._plain = plain or not self.console.is_terminal
        self._live: Live | None = None
        self._shown_step = -1

    def say(self, line: str) -> None:
        self.console.print(escape(line), highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        if self._plain:
            yield
            return
        with Live(Text("starting the workers: loading torch …"), console=self.console, refresh_per_second=4) as live:
            self._live = live
            yield
        self._live = None

    def update(self, state: dict[str, Any]) -> None:
        self.state = state
        if self._live:
            self._live.update(self._block(state))
        elif state["step"] // 20 > self._shown_step // 20 or self._shown_step < 0:
            self._shown_step = state["step"]
            self.say(self._line(state))

    def _line(self, s: dict[str, Any]) -> str:
        if not s["step"]:
            return f"{s['phase']}: {s['note']}" if s["note"] else s["phase"]
        return (
            f"step {s['step']}/{s['steps']}  loss {number(s['train_loss'])}  held-out {number(s['heldout_loss'])}"
            f"  {number(s['tokens_per_second'], 0)} tokens/s  {number(s['bytes_per_token'], 0)} B/token"
            f" (uncompressed {number(s['dense_bytes_per_token'], 0)})  peers {len(s['peers'])}  rounds {s['round']}"
        )

    def _block(self, s: dict[str, Any]) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        bar = ProgressBar(total=s["steps"], completed=s["step"], width=40)
        eta = f"{s['eta_seconds']:.0f} s left" if s["eta_seconds"] else ""
        note = f"{s['phase']}" + (f": {s['note']}" if s["note"] else "")
        factor = ""
        if s["bytes_per_token"] and s["dense_bytes_per_token"]:
            factor = f", {s['dense_bytes_per_token'] / s['bytes_per_token']:.1f}x fewer"
        table.add_row("step", f"{s['step']} of {s['steps']}  {eta}")
        table.add_row("", bar)
        table.add_row("phase", Text(note))
        first = f"  (from {number(s['heldout_first'])})" if s["heldout_first"] else ""
        table.add_row("held-out loss", f"[bold]{number(s['heldout_loss'])}[/]{first}")
        table.add_row("training loss", number(s["train_loss"]))
        table.add_row("speed", f"{number(s['tokens_per_second'], 0)} tokens/s")
        table.add_row(
            "bytes per token",
            f"{number(s['bytes_per_token'], 0)} (uncompressed: {number(s['dense_bytes_per_token'], 0)}{factor})",
        )
        peers = ", ".join(f"{p['name']} s{p['stage']}" if p["stage"] is not None else p["name"] for p in s["peers"])
        table.add_row("peers", Text(f"{len(s['peers'])}: {peers}"))
        table.add_row("rounds", str(s["round"]))
        table.add_row("dashboard", self.page)
        return Group(table)

    def summary(self, before: str | None, after: str, model: Path) -> None:
        s = self.state or {}
        self.say("")
        self.say(
            f"Held-out loss {number(s.get('heldout_first'))} -> {number(s.get('heldout_loss'))}"
            f" after {s.get('tokens', 0):,} tokens in {s.get('round', 0)} rounds,"
            f" {number(s.get('bytes_per_token'), 0)} bytes per token"
            f" (uncompressed: {number(s.get('dense_bytes_per_token'), 0)})."
        )
        if before:
            self.say(f"Before: {before}")
        self.say(f"After:  {after}")
        self.say("")
        self.say(f"The model: {model}")
        self.say(f'  from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained("{model}")')


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def show_estimate(config: RunConfig, found: Estimate, line: Line) -> None:
    """Two tables: bytes per token by purpose, and what it means for each machine's line."""
    console = Console()
    replicas = found.tokens // found.chain_tokens
    parameters = sum(m.parameters for m in found.machines)
    what = "parameters in adapters" if config.model.train == "lora" else "parameters"
    console.print(
        f"{config.name}: {parameters / 1e6:,.1f} M {what}, {len(found.machines)} stages x {replicas} replicas,"
        f" {found.tokens:,} tokens a step",
        highlight=False,
    )
    table = Table(title="bytes per token, sent by all machines together", title_justify="left", title_style="bold")
    for name in ("what", "sent", "uncompressed (fp16)", "times less"):
        table.add_column(name, justify="left" if name == "what" else "right")
    rows = [(str(what), sent, found.dense[what]) for what, sent in found.nbytes.items()]
    for what, sent, dense in [*rows, ("together", found.total, sum(found.dense.values()))]:
        table.add_row(what, f"{sent:,.1f}", f"{dense:,.1f}", f"{dense / sent:,.1f}" if sent else "-")
    console.print(table)
    title = f"a machine with {line.up_mbps:g} Mbit/s up, {line.down_mbps:g} down"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("stage", "parameters", "up, a step", "down, a step", "time", "each way, a round", "time"):
        table.add_column(name, justify="right")
    for m in found.machines:
        table.add_row(
            str(m.stage + 1),
            f"{m.parameters / 1e6:,.1f} M",
            f"{m.sent / 1e6:,.2f} MB",
            f"{m.received / 1e6:,.2f} MB",
            f"{line.seconds(m.sent, m.received):,.2f} s",
            f"{m.round_nbytes / 1e6:,.2f} MB",
            f"{line.seconds(m.round_nbytes, m.round_nbytes):,.2f} s",
        )
    console.print(table)
    delay = config.sync.resolved().delay
    slowest = max(line.seconds(m.round_nbytes, m.round_nbytes) for m in found.machines)
    rounds = f"A round comes every {found.steps_per_round:,.1f} steps on average"
    if replicas == 1:
        console.print("With one replica of a stage no weights are exchanged.", highlight=False)
    elif delay:
        console.print(
            f"{rounds} and is transferred beside the next {delay} (sync.delay): it costs no time if that many steps"
            f" take {slowest:,.2f} s.",
            highlight=False,
        )
    else:
        console.print(f"{rounds}, and everybody waits for it (sync.delay: 0).", highlight=False)


def show_memory(config: RunConfig, vocab_size: int, stages: int) -> None:
    """Tables: what each stage takes, and what the largest one takes with other choices."""
    console = Console()
    layers = Shape.of(config.model, vocab_size).split(stages)
    own, choices = Choice.of(config), list(CHOICES)
    if config.model.init:  # a base that adapters could be trained beside
        choices += LORA_CHOICES
    model, size = config.model, config.pipeline.microbatch_size
    stage_table = Table(title="memory of a stage in GB (10^9 bytes)", title_justify="left", title_style="bold")
    other_table = Table(
        title="the stage that takes the most, with each choice", title_justify="left", title_style="bold"
    )
    for name in ("stage", "layers"):
        stage_table.add_column(name, justify="right")
    for name in ("train", "dtype", "bits", "recompute"):
        other_table.add_column(name, justify="right")
    for name in ("GPU", "beside", "CPU only", "card"):
        stage_table.add_column(name, justify="right")
        other_table.add_column(name, justify="right")

    def sizes(choice: Choice) -> list[tuple[Footprint, Footprint]]:
        on_gpus, on_cpus = (footprints(choice.within(config), vocab_size, layers, d) for d in ("cuda", "cpu"))
        return list(zip(on_gpus, on_cpus, strict=True))

    def cells(gpu: Footprint, cpu: Footprint) -> list[str]:
        card = next((f"{card} GB" for card in CARDS if fits(gpu, card)), "-")
        return [*(f"{nbytes / 1e9:,.2f}" for nbytes in (gpu.on_gpu, gpu.beside_gpu, cpu.on_cpu)), card]

    for i, both in enumerate(sizes(own)):
        stage_table.add_row(str(i + 1), f"{layers[i][0]}-{layers[i][1] - 1}", *cells(*both))
    for choice in choices if own in choices else [*choices, own]:
        other_table.add_row(
            *(f"lora, {choice.base}" if choice.base else "full", choice.dtype, str(choice.bits)),
            "yes" if choice.recompute else "no",
            *cells(*max(sizes(choice), key=lambda both: both[0].on_gpu)),
            style="bold" if choice == own else "",
        )
    console.print(stage_table)
    console.print(other_table)
    console.print(
        "Bold: as run.yaml has it (model.train with model.lora.base, model.dtype, optimizer.bits, pipeline.recompute)."
        " Beside: in the machine's memory while a round is on its way. Card: the smallest that holds it."
        f" Microbatches are of {size} x {model.seq_len}, as many under way as pipeline.in_flight_gb allows.",
        highlight=False,
    )
