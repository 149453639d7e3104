"""What README.md and deploy/ tell people to type exists: commands, options, extras, files."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from potluck.cli import main

ROOT = Path(__file__).parent.parent.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy" / "README.md", *ROOT.glob("deploy/systemd/*")]


def commands() -> list[str]:
    """Every `potluck ...` in a code block, in code spans and in units."""
    found = set()
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
        blocks += re.findall(r"^ExecStart=(.*)$", text, re.M)
        for line in "\n".join(blocks).splitlines():
            for part in line.split("#")[0].split("&&"):
                if re.match(r"\s*(\S*/)?potluck\s", part):
                    found.add(" ".join(shlex.split(part)[1:]))
    return sorted(found)


@pytest.mark.parametrize("line", commands())
def test_a_command_people_are_told_to_type_exists(line: str) -> None:
    command: click.Command = main
    words = shlex.split(line)
    while words and isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options, word


def test_the_two_commands_stand_in_the_readme_and_the_second_is_what_ci_calls() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install -e ".[worker]" && potluck demo' in readme
    assert 'pip install -e ".[test]" && python -m pytest' in readme
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet -e ".[test]"' in ci
    assert "\npython -m pytest\n" in ci
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", readme)) <= extras.keys()


def test_files_the_readme_points_to_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        if "://" not in target:
            assert (ROOT / target).exists(), target
