"""Compare AdamW (also with a bf16 momentum), Muon and NorMuon, also with muP, at equal tokens and tuned learning rates.

    python -m benchmarks.optimizers --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.optimizers ... --report        # table and figure of the results so far

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
For each size, batch and optimizer: at least four learning rates a factor of sqrt(2) apart with one seed, and more while
the best one is the first or the last; then the best one with all seeds, and for variants of Muon also at 50 % and 70 %
of the tokens, which shows the steps to AdamW's loss, decay included. Results are kept: the same command continues.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.optimizers.report import plot_losses, report_lines
from benchmarks.optimizers.runs import OPTIMIZERS, Setting, Tuning, next_jobs
from benchmarks.text_runs import SIZES, comparison_parser, run_and_report, text_keys
from tools.sweep.runner import Results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = comparison_parser("optimizers", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 8], help="in samples")
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/optimizers.svg"))
    options = parser.parse_args(arguments)
    settings = [
        Setting(size, batch, optimizer)
        for size in options.sizes
        for batch in options.batches
        for optimizer in options.optimizers
    ]

    def tuning(results: Results) -> Tuning:
        return Tuning(results, text_keys(options), options.tokens, options.seeds)

    def report(results: Results) -> None:
        print(f"{options.tokens:,} tokens\n")
        print("\n".join(report_lines(tuning(results), settings)))
        plot_losses(tuning(results), settings, options.picture)

    return run_and_report(options, lambda results: next_jobs(tuning(results), settings), report)


if __name__ == "__main__":
    sys.exit(main())
