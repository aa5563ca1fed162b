"""Is a batch that follows the gradient worth it? Equal tokens, tuned rates, three seeds: loss and optimizer steps.

    python -m benchmarks.adaptive_batch --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.adaptive_batch --report     # the tables and figures of what is done so far; needs no text

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
For every method and schedule the rate is tuned first, over three values some root of two apart, and on while the best
is at the edge, with one seed and a quarter of the tokens. The best rate falls with the length of a run, by the law of
Power to half for four times the tokens: at full length the first seed tries two, the next two below under WSD and
cosine, and under Power, whose law has the length in it, the tuned amplitude and the next below. The better one gets the
other seeds. Runs in the file of results are not run again, so it can be stopped at any time.
The default takes some four hours on two cores of their own, half of it for each schedule; it leaves out larger models
and longer runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.adaptive_batch.methods import FIRST, METHODS, RATES, SMALL, VARIANTS
from benchmarks.adaptive_batch.report import Rows, report
from benchmarks.adaptive_batch.runs import Book, Row, Run
from tools.sweep.runner import Results, report_stop

AT_THE_SAME_MEAN = "norm test, eta 2.0"
"""The method whose mean batch is also tried as a constant."""
TUNING = 4
"""Of the tokens, tuning takes one part in so many."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive_batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", type=Path, help="text to train on")
    parser.add_argument("--valid", type=Path, help="text to hold out")
    parser.add_argument("--tokenizer", type=Path, help="a tiktoken file of 2048 entries")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of each final run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schedules", nargs="+", choices=("wsd", "power"), default=["wsd", "power"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=Path("docs/data/adaptive_batch.jsonl"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    paths = {"data.path": options.train, "validation.data.path": options.valid, "tokenizer.path": options.tokenizer}
    text = {key: path for key, path in paths.items() if path is not None}
    if len(text) < len(paths) and (text or not options.report):
        parser.error("--train, --valid and --tokenizer are required, all three; --report does without them")
    try:
        book = Book(Results(options.results), text or None, options.tokens, options.jobs)
        if not options.report:
            for kind in options.schedules:
                compare(book, kind, options.seeds)
        report(rows_of(book), options.tokens, options.pictures)
    except KeyboardInterrupt as stop:
        return report_stop(stop)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def compare(book: Book, kind: str, seeds: int) -> None:
    """All methods under one schedule, and then the constant batch that an adaptive one came to."""
    rows = [(name, kind if kind == "power" else method.decay) for name, method in METHODS.items()]
    rows = [row for row in rows if row != ("Seesaw", "power")]  # it needs the root rule
    finish(book, rows, seeds)
    _, (model, *_) = rows_of(book)[AT_THE_SAME_MEAN, kind]
    same_mean = max(SMALL, round(model.mean_batch / 4) * 4)
    finish(book, [(f"constant {same_mean}", kind)], seeds)


def finish(book: Book, rows: Sequence[Row], seeds: int) -> None:
    """Tune, and run at the better of two rates with every seed; of the variants of a ramp the best alone."""
    best = tune(book, rows)
    variants = sorted((row for row in rows if row[0] in VARIANTS), key=lambda row: best[row][1])
    rates = {row: at_full_length(rate, row[1]) for row, (rate, _) in best.items() if row not in variants[1:]}
    book.run(Run(row, rate, 0, book.final_tokens) for row, two in rates.items() for rate in two)
    better = {row: rate for row, (rate, _) in rows_of(book).items() if row in rates}
    book.run(Run(row, rate, seed, book.final_tokens) for seed in range(1, seeds) for row, rate in better.items())


def at_full_length(tuned: float, kind: str) -> Sequence[float]:
    """Two rates to try, lower ones first."""
    rates = RATES[kind]
    at = rates.index(tuned) + (kind == "power")
    return rates[max(0, at - 2) : max(at, 1)]


def tune(book: Book, rows: Sequence[Row]) -> dict[Row, tuple[float, float]]:
    """The best rate of each row, and its loss."""
    tried = {row: set(RATES[row[1]][FIRST]) for row in rows}
    while True:
        runs = [Run(row, rate, 0, book.final_tokens // TUNING) for row in rows for rate in sorted(tried[row])]
        losses = {run: outcome.loss for run, outcome in zip(runs, book.run(runs), strict=True)}
        best = {row: min((loss, run.rate) for run, loss in losses.items() if run.row == row) for row in rows}
        neighbours = {row: set(around(best[row][1], RATES[row[1]])) for row in rows}
        if all(neighbours[row] <= tried[row] for row in rows):
            return {row: (rate, loss) for row, (loss, rate) in best.items()}
        tried = {row: tried[row] | neighbours[row] for row in rows}


def around(rate: float, rates: Sequence[float]) -> Sequence[float]:
    """`rate` and those next to it."""
    at = rates.index(rate)
    return rates[max(0, at - 1) : at + 2]


def rows_of(book: Book) -> Rows:
    """What there is; of a row that was run at several rates, the one with which the first seed did best."""
    finals = book.finals()
    return {row: min(by_rate.items(), key=lambda item: item[1][0].loss) for row, by_rate in finals.items()}


if __name__ == "__main__":
    sys.exit(main())
