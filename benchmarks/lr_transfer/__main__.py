"""Does one learning-rate setting suit every width, batch and length? Compare WSD, WSD with muP, and Power with muP.

    python -m benchmarks.lr_transfer --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.lr_transfer ... --report        # table and figure of the results so far

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
Every learning rate is tried in every group, by tools.sweep: runs in the file of results are not run again, so the
comparison can be stopped at any time. The default, 3 widths x 2 batches x 2 lengths at 18 settings, has 216 runs of 7 s
to two minutes, about two hours on two otherwise idle cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lr_transfer.methods import METHODS, Grid, Method, relative_cost, sweep_of
from benchmarks.lr_transfer.report import plot_regret, report_lines
from benchmarks.text_runs import comparison_parser, run_and_report, text_keys
from tools.sweep.grid import Job
from tools.sweep.groups import Group, group_results
from tools.sweep.runner import Results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = comparison_parser("lr_transfer", __doc__, seeds=Grid.seeds)
    for key in ("widths", "batches", "tokens"):
        parser.add_argument(f"--{key}", type=int, nargs="+", default=getattr(Grid, key))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/lr_transfer.svg"))
    options = parser.parse_args(arguments)
    grid = Grid(options.widths, options.batches, options.tokens, options.seeds)

    def jobs(method: Method) -> list[Job]:
        return sweep_of(method, grid, text_keys(options)).jobs()

    def wanted(_: Results) -> list[Job]:
        return sorted((job for method in METHODS for job in jobs(method)), key=relative_cost)

    def report(results: Results) -> None:
        every = wanted(results)
        print(f"{sum(results.get(job) is not None for job in every)} of {len(every)} runs are done\n")
        found: dict[Method, list[Group]] = {}
        for method in METHODS:
            done = [(job, outcome) for job in jobs(method) if (outcome := results.get(job)) is not None]
            if groups := group_results(done, method.lr_key):
                found[method] = groups
        if found:
            print("\n".join(report_lines(found)))
            plot_regret(found, options.picture)

    return run_and_report(options, wanted, report)


if __name__ == "__main__":
    sys.exit(main())
