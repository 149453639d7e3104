"""``potluck ledger verify`` as a user meets it: clean, damaged, missing, and beside a live coordinator."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kept_run import with_a_lost_round


@pytest.mark.timeout(60)
def test_a_ledger_is_verified(cli: Any, tmp_path: Path) -> None:
    run = with_a_lost_round(tmp_path / "run")
    run.store.close()
    before = cli.tree(tmp_path)
    good = cli.potluck(tmp_path, "ledger", "verify", "run")
    assert (good.code, good.err) == (0, ""), good
    assert good.out.splitlines() == [
        "test: 72 samples in 2 rounds (1 more lost), 3 generations",
        "committed: 72 samples in 12 leases",
        "leased:    12 samples in 2 leases",
        "returned:  48 samples in 8 leases: its round is lost",
        "returned:  24 samples in 4 leases: A is gone",
        "Every sample of [0, 72) is committed exactly once.",
    ]
    report = json.loads(cli.potluck(tmp_path, "ledger", "verify", "run/run.sqlite", "--json").out)
    assert (report["samples"], report["problems"], report["findings"]) == (72, 0, [])
    assert report["returned"]["A is gone"] == {"samples": 24, "leases": 4}
    assert cli.tree(tmp_path) == before

    with closing(sqlite3.connect(run.store.path, isolation_level=None)) as db:
        db.execute("UPDATE ledger SET state = 'returned', reason = char(27) || 'x' WHERE id = 22")
    bad = cli.potluck(tmp_path, "ledger", "verify", "run")
    assert (bad.code, bad.err) == (1, ""), bad
    assert "  ledger row 23: samples [54, 60) before it neither leased nor committed" in bad.out.splitlines()
    assert "exactly once" not in bad.out and "\x1b" not in bad.out
    report = json.loads(cli.potluck(tmp_path, "ledger", "verify", "run", "--json").out)
    assert {"table": "rounds", "id": 8, "text": "round 3 has 24 samples, its leases add up to 18"} in report["findings"]


@pytest.mark.timeout(60)
def test_a_run_is_found_by_its_name_or_missed_in_one_line(cli: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    place = "from potluck.cli import data_home; print(data_home())"
    environment = {**os.environ, "HOME": str(home), "XDG_DATA_HOME": str(home)}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *command]
        return subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    folder = Path(run("-c", place).stdout.strip()) / "coordinator"
    with_a_lost_round(folder / "dinner").store.close()
    found = run("-m", "potluck", "ledger", "verify", "dinner")
    assert found.returncode == 0 and found.stdout.endswith("Every sample of [0, 72) is committed exactly once.\n")
    missed = run("-m", "potluck", "ledger", "verify", "supper")
    hint = "Name a run's data folder (its coordinator's --data-dir), or the run's name."
    error = cli.Ended(missed.returncode, missed.stdout, missed.stderr).error
    assert error == f"{folder / 'supper' / 'run.sqlite'}: No such file or directory. {hint}"
    (tmp_path / "run.sqlite").write_text("Dear diary")
    assert (
        "is not a run's file: file is not a database. Name a run's"
        in cli.potluck(tmp_path, "ledger", "verify", ".").error
    )


@pytest.mark.timeout(60)
def test_a_live_coordinator_is_not_disturbed(cli: Any, tmp_path: Path, live: Any) -> None:
    done = cli.potluck(tmp_path, "ledger", "verify", "data")
    assert done.code == 0 and done.out.startswith("tiny: 0 samples in 0 rounds, 0 generations\n"), done
    assert live.peers() == [] and live.process.poll() is None
