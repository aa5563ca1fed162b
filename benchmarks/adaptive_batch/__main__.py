"""Compare batch policies at equal tokens, each with its tuned learning rate and three seeds: loss and steps.

    python -m benchmarks.adaptive_batch --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.adaptive_batch --report     # tables and figures of the stored results; needs no text

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
For every method and schedule the learning rate is tuned with one seed, among values about a factor sqrt(2) apart: first
with a quarter of the tokens, and then, from the best one on, at full length. Each time neighbors are added until the
best one lies between two others. It gets the other seeds. Runs in the file of results are not run again, so the
comparison can be stopped at any time. A method takes some 30 core-minutes under each schedule, the default hours;
with `--size 5M` it takes several times as long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.adaptive_batch.methods import FIRST, LRS, METHODS, SIZES, SMALL, VARIANTS
from benchmarks.adaptive_batch.report import Rows, write_report
from benchmarks.adaptive_batch.runs import ResultBook, Row, Run
from tools.sweep.runner import Results, report_stop

SAME_MEAN_AS = "norm test, eta 2.0"
"""The method whose mean batch is also tried as a constant."""
TUNING = 4
"""Tuning runs have this fraction of the tokens: one part in `TUNING`."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive_batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", type=Path, help="text to train on")
    parser.add_argument("--valid", type=Path, help="text to validate on")
    parser.add_argument("--tokenizer", type=Path, help="a tiktoken file of 2048 entries")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens of each final run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="0.7M", help="the model; another needs its own --results")
    parser.add_argument("--schedules", nargs="+", choices=("wsd", "power"), default=["wsd", "power"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=Path("docs/data/adaptive_batch.jsonl"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    paths = {"data.path": options.train, "validation.data.path": options.valid, "tokenizer.path": options.tokenizer}
    text = {key: path for key, path in paths.items() if path is not None}
    if len(text) < len(paths) and (text or not options.report):
        parser.error("--train, --valid and --tokenizer are required together; only --report works without them")
    try:
        book = ResultBook(Results(options.results), text or None, options.tokens, options.jobs, options.size)
        if not options.report:
            for kind in options.schedules:
                compare_methods(book, kind, options.seeds, options.methods)
        write_report(rows_of(book), options.tokens, options.pictures)
    except KeyboardInterrupt as stop:
        return report_stop(stop)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def compare_methods(book: ResultBook, kind: str, seeds: int, methods: Sequence[str]) -> None:
    """Run `methods` under one schedule, and then a constant batch of the mean size of an adaptive one."""
    if kind == "power":
        rows = [(name, kind) for name in methods if METHODS[name].power]
    else:
        rows = [(name, METHODS[name].decay) for name in methods]
    run_rows(book, rows, seeds)
    if SAME_MEAN_AS not in methods:
        return
    _, (model, *_) = rows_of(book)[SAME_MEAN_AS, kind]
    same_mean = max(SMALL, round(model.mean_batch / 4) * 4)
    run_rows(book, [(f"constant {same_mean}", kind)], seeds)


def run_rows(book: ResultBook, rows: Sequence[Row], seeds: int) -> None:
    """Tune each row and run every seed at the best of its learning rates; of the ramp variants only the best."""
    short = tune_lrs(book, {row: FIRST[row[1]] for row in rows}, book.final_tokens // TUNING)
    variants = sorted((row for row in rows if row[0] in VARIANTS), key=lambda row: short[row][1])
    tuned = {row: [lr] for row, (lr, _) in short.items() if row not in variants[1:]}
    best = tune_lrs(book, tuned, book.final_tokens)
    book.run(Run(row, lr, seed, book.final_tokens) for seed in range(1, seeds) for row, (lr, _) in best.items())


def tune_lrs(book: ResultBook, first: Mapping[Row, Sequence[float]], tokens: int) -> dict[Row, tuple[float, float]]:
    """Return the best learning rate of each row and its loss after `tokens`, with one seed.

    `first`: the learning rates of each row to begin with. The neighbors of the best one are tried too.
    """
    tried = {row: set(lrs) for row, lrs in first.items()}
    while True:
        runs = [Run(row, lr, 0, tokens) for row, lrs in tried.items() for lr in sorted(lrs)]
        losses = {run: outcome.loss for run, outcome in zip(runs, book.run(runs), strict=True)}
        best = {row: min((loss, run.lr) for run, loss in losses.items() if run.row == row) for row in tried}
        neighbors = {row: set(with_neighbors(best[row][1], LRS[row[1]])) for row in tried}
        if all(neighbors[row] <= tried[row] for row in tried):
            return {row: (lr, loss) for row, (loss, lr) in best.items()}
        tried = {row: tried[row] | neighbors[row] for row in tried}


def with_neighbors(lr: float, lrs: Sequence[float]) -> Sequence[float]:
    """Return a learning rate and its neighbors in the list."""
    at = lrs.index(lr)
    return lrs[max(0, at - 1) : at + 2]


def rows_of(book: ResultBook) -> Rows:
    """Return the final runs of each row, at the learning rate with the lowest loss of the first seed."""
    finals = book.finals()
    return {row: min(by_lr.items(), key=lambda item: item[1][0].loss) for row, by_lr in finals.items()}


if __name__ == "__main__":
    sys.exit(main())
