"""Does one learning-rate setting suit every width, batch and length? Compare WSD, WSD with muP, and Power with muP.

    python -m benchmarks.lr_transfer --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.lr_transfer ... --report        # table and figure of the results so far

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
Every learning rate is tried in every group, by tools.sweep: runs in the file of results are not run again, so the
comparison can be stopped at any time. The default, 3 widths x 2 batches x 2 lengths at 18 settings, has 216 runs of 7 s
to two minutes, about two hours on two otherwise idle cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lr_transfer.groups import Group, group_results
from benchmarks.lr_transfer.methods import METHODS, Grid, Method, relative_cost, sweep_of
from benchmarks.lr_transfer.report import plot_regret, report_lines
from benchmarks.shared import add_text_arguments, machine, text_keys
from tools.sweep.runner import Results, Runner, report_stop


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lr_transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_text_arguments(parser)
    for key in ("widths", "batches", "tokens"):
        parser.add_argument(f"--{key}", type=int, nargs="+", default=getattr(Grid, key))
    parser.add_argument("--seeds", type=int, default=Grid.seeds)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/data/lr_transfer.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/lr_transfer.svg"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    text = text_keys(options)
    grid = Grid(options.widths, options.batches, options.tokens, options.seeds)
    try:
        jobs = {method: sweep_of(method, grid, text).jobs() for method in METHODS}
        results = Results(options.results)
        every = sorted((job for each in jobs.values() for job in each), key=relative_cost)
        killed = 0 if options.report else Runner(results, options.jobs).run(every)
        found: dict[Method, list[Group]] = {}
        for method in METHODS:
            done = [(job, outcome) for job in jobs[method] if (outcome := results.get(job)) is not None]
            if groups := group_results(done, method.lr_key):
                found[method] = groups
        print(f"{sum(results.get(job) is not None for job in every)} of {len(every)} runs are done; {machine()}\n")
        if found:
            print("\n".join(report_lines(found)))
            plot_regret(found, options.picture)
    except KeyboardInterrupt as stop:
        return report_stop(stop)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if killed else 0


if __name__ == "__main__":
    sys.exit(main())
