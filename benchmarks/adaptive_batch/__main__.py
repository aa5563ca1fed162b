"""Is a batch that follows the gradient worth it? Equal tokens, tuned rates, three seeds: loss and optimizer steps.

    python -m benchmarks.adaptive_batch --train novels/train --valid novels/valid --tokenizer novels2048.tiktoken
    python -m benchmarks.adaptive_batch ... --report     # the table and the pictures of what is done so far

The tokenizer is one of 2048 entries: python -m tools.train_tokenizer --path novels/train --vocab-size 2048 --output ...
For every method and schedule the rate is tuned first, over three values and on while the best is at the edge, with
one seed and half of the tokens. Runs in the file of results are not run again, so it can be stopped at any time.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.adaptive_batch.methods import METHODS, RATES, SMALL, VARIANTS
from benchmarks.adaptive_batch.report import report
from benchmarks.adaptive_batch.runs import Book, Job, Row

AT_THE_SAME_MEAN = "norm test, eta 2.0"
"""The method whose mean batch is also tried as a constant."""


def tune(book: Book, pool: ThreadPoolExecutor, rows: list[Row], tokens: int) -> dict[Row, float]:
    """The best rate of each row."""
    grids = {row: list(RATES[row[1]]) for row in rows}
    while True:
        jobs = {row: [Job(*row, rate, 0, tokens) for rate in grids[row]] for row in rows}
        losses = dict(
            zip(
                (job for each in jobs.values() for job in each),
                pool.map(lambda job: book.run(job).val_loss, [job for each in jobs.values() for job in each]),
                strict=True,
            )
        )
        best = {row: min(jobs[row], key=losses.__getitem__).rate for row in rows}
        open_rows = [row for row in rows if best[row] in (min(grids[row]), max(grids[row])) and len(grids[row]) < 7]
        if not open_rows:
            return best
        for row in open_rows:
            low = best[row] == min(grids[row])
            grids[row] = sorted([*grids[row], best[row] / 2 if low else best[row] * 2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to hold out")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tiktoken file of 2048 entries")
    parser.add_argument("--tokens", type=int, default=2_500_000, help="of each final run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=Path("docs/data/adaptive_batch.jsonl"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    text = {
        "data.path": str(arguments.train.resolve()),
        "validation.data.path": str(arguments.valid.resolve()),
        "tokenizer.path": str(arguments.tokenizer.resolve()),
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    book = Book(arguments.results, text, arguments.tokens)
    if not arguments.report:
        compare(book, arguments.tokens, arguments.seeds, arguments.jobs)
    report(book, arguments.tokens, arguments.pictures)


def compare(book: Book, tokens: int, seeds: int, at_a_time: int) -> None:
    with ThreadPoolExecutor(at_a_time) as pool:
        for kind in ("wsd", "power"):
            rows = [(name, kind if kind == "power" else method.decay) for name, method in METHODS.items()]
            rows = [row for row in rows if not (row[0] == "Seesaw" and kind == "power")]  # it needs the root rule
            finish(book, pool, rows, tokens, seeds)
            model = book.finals((AT_THE_SAME_MEAN, kind), tokens)[0]
            same_mean = max(SMALL, round(model.mean_batch / 4) * 4)
            finish(book, pool, [(f"constant {same_mean}", kind)], tokens, seeds)


def finish(book: Book, pool: ThreadPoolExecutor, rows: list[Row], tokens: int, seeds: int) -> None:
    best = tune(book, pool, rows, tokens // 2)
    variants = [row for row in rows if row[0] in VARIANTS]
    for row in sorted(variants, key=lambda row: book.run(Job(*row, best[row], 0, tokens // 2)).val_loss)[1:]:
        del best[row]
    list(pool.map(book.run, [Job(*row, rate, seed, tokens) for seed in range(seeds) for row, rate in best.items()]))


if __name__ == "__main__":
    main()
