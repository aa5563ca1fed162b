"""Compare AdamW, Muon and NorMuon at equal tokens, with the learning rate of each tuned for each model and batch.

    python -m benchmarks.optimizers --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.optimizers ... --report        # table and figure of the results so far

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
For each size, batch and optimizer: at least four learning rates a factor of sqrt(2) apart with one seed, and more while
the best one is the first or the last; then the best one with all seeds, and for Muon and NorMuon also at 50 % and 70 %
of the tokens, which shows the steps to AdamW's loss, decay included. Results are kept: the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.optimizers.report import plot_losses, report_lines
from benchmarks.optimizers.runs import OPTIMIZERS, SIZES, Setting, Tuning, next_jobs
from benchmarks.shared import add_text_arguments, machine, text_keys
from tools.sweep.runner import Results, Runner, report_stop


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_text_arguments(parser)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 8], help="in samples")
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--results", type=Path, default=Path("docs/data/optimizers.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/optimizers.svg"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    text = text_keys(options)
    settings = [
        Setting(size, batch, optimizer)
        for size in options.sizes
        for batch in options.batches
        for optimizer in options.optimizers
    ]
    try:
        results = Results(options.results)
        tuning = Tuning(results, text, options.tokens, options.seeds)
        killed = 0
        while not options.report and not killed and (jobs := next_jobs(tuning, settings)):
            killed = Runner(results, options.jobs).run(jobs)
        print(f"{machine()}; {options.tokens:,} tokens\n")
        print("\n".join(report_lines(tuning, settings)))
        plot_losses(tuning, settings, options.picture)
    except KeyboardInterrupt as stop:
        return report_stop(stop)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if killed else 0


if __name__ == "__main__":
    sys.exit(main())
