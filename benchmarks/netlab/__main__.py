"""``python -m benchmarks.netlab check`` measures the emulated lines; ``run`` starts a command behind one."""

from __future__ import annotations

import argparse
import os
import sys

from .check import check
from .lab import MTU, Lab, LabError
from .profiles import PROFILES

USUAL = ("100m", "home-fibre", "home-cable", "home-dsl", "home-mobile")  # what one forwarder in Python carries at ease


def main() -> int:
    known = "\n".join(f"  {name:12} {profile.about}" for name, profile in PROFILES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab",
        description=__doc__,
        epilog=f"profiles (times are round trips between two such hosts, jitter apart):\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="measures rates, round trips and loss; exit code 1 if one is wrong")
    one.add_argument(
        "--profile", action="append", choices=PROFILES, help=f"again for more (default {', '.join(USUAL)})"
    )
    two = commands.add_parser("run", help="a command on host 0, the others idle: run --profile P --hosts N -- COMMAND")
    two.add_argument("--profile", choices=PROFILES, required=True)
    two.add_argument("--hosts", type=int, default=2)
    two.add_argument("argv", nargs="+", metavar="COMMAND")
    for command in (one, two):
        command.add_argument("--rate", type=float, default=1.0, help="all rates times this (default 1)")
        command.add_argument("--time", type=float, default=1.0, help="all delays times this (default 1)")
        command.add_argument("--mtu", type=int, default=MTU, help=f"bytes of the largest packet (default {MTU})")
        command.add_argument("--rootless", action="store_true", help="in a user namespace even as root")
    arguments = parser.parse_args()
    names = arguments.profile if arguments.command == "run" else arguments.profile or USUAL
    chosen = [PROFILES[name] for name in ([names] if isinstance(names, str) else names)]
    if (arguments.rate, arguments.time) != (1.0, 1.0):
        chosen = [profile.scaled(rate=arguments.rate, time=arguments.time) for profile in chosen]
    try:
        if arguments.command == "run":
            with Lab(chosen[0], hosts=arguments.hosts, mtu=arguments.mtu, rootless=arguments.rootless) as lab:
                print(lab.how, *(f"host {i}: {lab.address(i)}" for i in range(lab.hosts)), sep="\n", file=sys.stderr)
                return lab.popen(0, arguments.argv, start_new_session=not os.isatty(0)).wait()
        wrong = False
        for profile in chosen:
            report = check(profile, mtu=arguments.mtu, rootless=arguments.rootless)
            print(report, end="\n\n", flush=True)
            wrong |= not report.ok
    except LabError as error:
        print(f"no lab here: {error}", file=sys.stderr)
        return 2
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
