"""Every error a user can make is one line on stderr that says what to do; nothing on disk is changed by it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from potluck.cli import main
from potluck.protocol.config import convert, dump
from potluck.protocol.errors import ConfigError
from potluck.protocol.ticket import Ticket
from potluck.worker.daemon import prepare_torch

# The command line itself.


@pytest.mark.timeout(30)
def test_help_imports_nothing_heavy(cli: Any, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from potluck.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'grpc', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
    asked = cli.potluck(tmp_path, "--help")
    assert asked.code == 0 and asked.err == "" and "potluck worker join TICKET" in asked.out


def commands(command: click.Command, *path: str) -> Iterator[tuple[list[str], click.Command]]:
    yield [*path], command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, *path, name)


@pytest.mark.timeout(30)
def test_every_command_explains_itself() -> None:
    for path, command in commands(main):
        shown = CliRunner().invoke(main, [*path, "--help"])
        assert shown.exit_code == 0
        assert command.help and command.help.split("\n")[0][:30] in shown.output, path
        for option in command.params:
            assert not isinstance(option, click.Option) or all(name in shown.output for name in option.opts), path


# run.yaml.

BAD_RUNS = {
    "unknown key": ("stpes: 3", "run.yaml: unknown key `stpes`. Did you mean `steps`?"),
    "unknown key below": ("model: {haeds: 4}", "run.yaml: unknown key `model.haeds`. Did you mean `model.heads`?"),
    "wrong type": ("steps: many", "run.yaml: steps: Expected `int`, got `str`. "),
    "wrong type below": ("optimizer: {lr: fast}", "run.yaml: optimizer.lr: Expected `float`, got `str`. "),
    "out of range": ("data: {vocab_size: 10}", "run.yaml: data.vocab_size: Expected `int` >= 300. "),
    "not a section": ("model: 3", "run.yaml: model must be a mapping of keys to values, not 3. "),
    "not a mapping": ("- steps", "run.yaml: the file must be a mapping of keys to values, not ['steps']. "),
    "no such preset": (
        "sync: {preset: potlock}",
        "run.yaml: sync.preset: must be one of potluck, gptjt, cocktail, diloco, sparseloco, dense. ",
    ),
    "not YAML": ("steps: 3\nmodel: {d_model: 3", "run.yaml, line 2: not YAML "),
    "does not add up": ("pipeline: {stages: 9}", "run.yaml: pipeline.stages 9 exceeds model.layers 4. "),
    "no text": ("data: {source: nowhere.txt}", "cannot read nowhere.txt: No such file or directory. "),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_wrong_run_file_is_refused(cli: Any, tmp_path: Path, name: str) -> None:
    text, expected = BAD_RUNS[name]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert cli.potluck(tmp_path, "coordinator", "up", "run.yaml", "--data-dir", "data").error.startswith(expected)
    made = {path for path, content in cli.tree(tmp_path).items() if content is not None}
    assert made <= {"run.yaml", "data/run.lock"}
    assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == text


@pytest.mark.timeout(30)
def test_missing_and_present_run_files(cli: Any, tmp_path: Path) -> None:
    done = cli.potluck(tmp_path, "coordinator", "up", "run.yaml", "--data-dir", "data")
    assert done.error == "run.yaml: no such file. Write one with: potluck coordinator init run.yaml"
    assert cli.tree(tmp_path) == {}
    assert cli.potluck(tmp_path, "coordinator", "init", "run.yaml").code == 0
    before = cli.tree(tmp_path)
    assert (
        cli.potluck(tmp_path, "coordinator", "init", "run.yaml").error
        == "run.yaml is there already. Name another file."
    )
    assert cli.tree(tmp_path) == before


@pytest.mark.timeout(60)
def test_a_run_keeps_what_it_was_started_with(cli: Any, tmp_path: Path) -> None:
    cli.write_run(tmp_path)
    up = cli.Coordinator(tmp_path)
    up.close()
    (tmp_path / "corpus.txt").unlink()
    for section, value in {"data": {**cli.tiny["data"], "vocab_size": 301}, "optimizer": {"lr": 0.5}}.items():
        (tmp_path / "run.yaml").write_text(dump(convert(cli.tiny | {section: value})), encoding="utf-8")
        before = cli.tree(tmp_path / "data" / "corpus")
        error = cli.potluck(tmp_path, "coordinator", "up", "run.yaml", "--data-dir", "data").error
        assert error.startswith(f"run.yaml's `{section}` is not what this run was started with. Put it back, or ")
        assert cli.tree(tmp_path / "data" / "corpus") == before
    (tmp_path / "run.yaml").write_text(dump(convert(cli.tiny | {"steps": 99})), encoding="utf-8")
    again = cli.Coordinator(tmp_path)
    again.close()
    assert again.ticket.run == up.ticket.run


# Tickets.


@pytest.mark.timeout(30)
def test_tickets_that_are_none(cli: Any, tmp_path: Path) -> None:
    good = Ticket(url="127.0.0.1:9", fingerprint="0" * 64, run="run", secret="secret", expires=2**40).encode()
    old = msgspec.structs.replace(Ticket.decode(good, 0.0), expires=1000).encode()
    wrong = {
        "hello": "this is not a potluck ticket. A ticket starts with potluck1-",
        good[:-5]: "the ticket is damaged: a part is missing or mistyped. Copy the whole line again",
        old: "the ticket has expired. Ask the operator for a new ticket",
        "@none": "none: cannot be read (No such file or directory). Name the ticket's file.",
    }
    for text, expected in wrong.items():
        assert cli.potluck(tmp_path, "worker", "join", text, "--data-dir", "data").error == expected
    assert cli.tree(tmp_path) == {}
    (tmp_path / "old").write_text(old, encoding="utf-8")
    assert cli.potluck(tmp_path, "worker", "join", "@old").error == wrong[old]
    (tmp_path / "old").unlink()
    # Nobody listens there: a key is made, and `worker status` can say why it ended.
    assert cli.potluck(tmp_path, "worker", "join", good, "--data-dir", "data").error.startswith("nobody listens at ")
    kept = {"data", "data/identity.pem", "data/identity.pem.lock", "data/ended.json", "data/contribution.json"}
    assert set(cli.tree(tmp_path)) == kept


# Ports, folders, disks.


@pytest.mark.timeout(60)
def test_what_is_in_use_stays_in_use(cli: Any, tmp_path: Path, live: Any) -> None:
    def up(*options: object) -> str:
        return cli.potluck(tmp_path, "coordinator", "up", "run.yaml", *options).error

    page_port = live.page.rstrip("/").rpartition(":")[2]
    assert up("--data-dir", "other", "--port", live.port).startswith(
        f"cannot listen on 127.0.0.1:{live.port}: the port is taken or not allowed. "
    )
    assert up("--data-dir", "other", "--http-port", page_port).endswith(
        f"port {page_port}: already in use. Choose another port with --http-port (0 takes any free one)"
    )
    assert up("--data-dir", "data") == (
        "another coordinator is running on data. Stop it, or give this one its own --data-dir."
    )
    assert live.peers() == []


@pytest.mark.timeout(60)
def test_folders_that_cannot_be_written(cli: Any, tmp_path: Path, live: Any) -> None:
    (tmp_path / "file").touch()
    before = cli.tree(tmp_path)
    there = ("--data-dir", "file/data")
    key = cli.potluck(tmp_path, "worker", "join", live.text, *there).error
    assert key == "cannot write the key file file/data/identity.pem: Not a directory. Choose a writable --data-dir"
    run = cli.potluck(tmp_path, "coordinator", "up", "run.yaml", *there).error
    assert run == "cannot open the lock file file/data/run.lock: Not a directory. Choose a writable --data-dir"
    assert {k: v for k, v in cli.tree(tmp_path).items() if not k.startswith("data")} == {
        k: v for k, v in before.items() if not k.startswith("data")
    }
    place = ("--data-dir", "other", "--ready-file", "file/ready")
    ready = cli.potluck(tmp_path, "coordinator", "up", "run.yaml", *place).error
    assert ready.startswith("file/ready: cannot be written (Not a directory). Name a file in a writable folder")
    empty = cli.potluck(tmp_path, "sample", ".").error
    assert empty.startswith(". holds no published model: config.json is missing. ")


# The demo, a machine without the device asked for, and an installation without torch.


@pytest.mark.timeout(60)
def test_a_demo_that_cannot_begin(cli: Any, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine", encoding="utf-8")
    before = cli.tree(tmp_path)
    few = cli.potluck(tmp_path, "demo", "--workers", 1, "--stages", 2, "--keep", "new")
    assert few.error == "--workers 1 is too few for --stages 2. Each stage needs a worker: --workers 2"
    other = cli.potluck(tmp_path, "demo", "--keep", "foreign")
    assert other.error == f"{foreign} is not empty and not a demo's. Name another folder with --keep."
    nothing = cli.potluck(tmp_path, "demo", "--resume", "--keep", "foreign")
    assert nothing.error == f"{foreign} holds no run to go on with. Start one: potluck demo"
    file = cli.potluck(tmp_path, "demo", "--keep", "foreign/letter.txt")
    assert file.error == f"{foreign / 'letter.txt'}: Not a directory. Name a writable folder with --keep."
    assert cli.tree(tmp_path) == before

    # A demo that never got up stands in nobody's way.
    for _ in range(2):
        gone = cli.potluck(tmp_path, "demo", "--plain", "--data", "nowhere.txt", "--keep", "new")
        assert re.match("the coordinator ended: cannot read .*nowhere.txt: No such file or directory", gone.error)
        assert gone.error.endswith(f" Its log: {tmp_path / 'new' / 'logs' / 'coordinator.log'}")


@pytest.mark.timeout(60)
def test_a_device_that_is_not_there() -> None:
    import torch

    with pytest.raises(ConfigError, match="this machine cannot compute on 'abacus'") as caught:
        prepare_torch(torch.get_num_threads(), "abacus")
    assert caught.value.hint == "Use --device cpu, or cuda where torch finds a GPU."


@pytest.mark.timeout(30)
def test_an_installation_without_torch(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    code = "import sys; sys.modules['torch'] = None; from potluck.cli import main; main(['sample', '.'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    error = cli.Ended(done.returncode, done.stdout, done.stderr).error
    assert error == "torch is not installed. In potluck's checkout: pip install -e '.[worker]'"
