"""``python -m tests.faults``: run scenarios by name, all of them, or make the report."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("words", nargs="*", help="only scenarios whose name has all of these")
    parser.add_argument("--all", action="store_true", help="the full suite, not only what CI runs")
    parser.add_argument("--list", action="store_true", help="names only")
    parser.add_argument("--report", type=Path, help="write what was seen to this file (implies --all)")
    parser.add_argument("--exactly", help="the one scenario of this name")
    parser.add_argument("--times", type=int, default=1, help="how often to run each")
    parser.add_argument("--width", type=int, default=2, help="how many at a time")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        from .pool import serve

        serve(options.serve)
        return 0
    from .catalogue import every

    chosen = [s for s in every() if (s.ci or options.all or options.report or options.words)]
    names = [s.name for s in chosen if all(word in s.name for word in options.words)]
    if options.exactly:
        names = [s.name for s in every() if s.name == options.exactly]
    if options.list:
        print("\n".join(names))
        return 0
    return run(names, options)


def run(names: list[str], options: argparse.Namespace) -> int:
    from .pool import Pool
    from .report import write

    results, failed, started = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for turn in range(options.times):
            pool = Pool(Path(folder) / str(turn), names, options.width)
            try:
                for name in names:
                    result = pool.results[name].result()
                    results.append(result)
                    failed += bool(result.problems)
                    late = "" if result.recovery is None else f", {result.recovery:.2f} s"
                    print(
                        f"{'FAIL' if result.problems else 'ok'}  {name}: {result.observed}{late} [{result.seconds:.1f}]"
                    )
                    if result.problems:
                        print("\n".join(result.problems), result.story, sep="\n")
                    sys.stdout.flush()
            finally:
                pool.close()
    took = time.monotonic() - started
    print(f"{len(results)} runs, {failed} failed, {took:.0f} s")
    if options.report:
        write(options.report, results, took, options.times, options.width)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
