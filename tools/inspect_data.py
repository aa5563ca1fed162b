"""Show the decoded samples of a step, with token boundaries and the source of each sample.

    python -m tools.inspect_data CONFIG.toml --step 120 [--micro-batch 0] [--rank 0] [--ranks 1] [--key=value]...
    python -m tools.inspect_data CONFIG.toml --sample 4096 [--count 2] [--ids]

The samples come from the loader of the run, so they are those it trains on. The batch of a step is read from
metrics.jsonl if the run has done the step, and otherwise computed by the batch policy, which must not be adaptive. Each
token is preceded by a bar; a token that is not a whole character is shown as <id>. With document masking, the first
token of each document, at position 0, is preceded by a double bar. Exit status: 0 done, 2 for a user error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from operator import add
from typing import Any

import numpy as np

from components.batch import BatchRounding
from components.data.loader import MicroBatch, MicroBatchLoader, build_order
from components.interfaces import PackedDataset, Tokenizer
from components.metrics.jsonl import read_rows
from components.run_directory import RunDirectory
from components.standard_streams import run_command
from components.token_ids import first_input
from models.document_attention import document_positions
from recipes.batch_policy import build_batch_policy
from recipes.cli import parse_recipe, reports_bad_input
from recipes.config import Config, load
from recipes.dry_run.schedule_preview import planned_steps
from recipes.errors import config_errors_at
from recipes.prepared_data import build_datasets
from recipes.recipe import require_training

BAR, DOUBLE_BAR = "│", "║"


@reports_bad_input
def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_data",
        description=(__doc__ or "").split("\n")[0],
        epilog="Other arguments are those of run_train.sh: CONFIG.toml and --section.key=value.",
        allow_abbrev=False,
    )
    position = parser.add_mutually_exclusive_group()
    position.add_argument("--step", type=int, default=1, help="optimizer step, from 1 (default: 1)")
    position.add_argument("--sample", type=int, help="first global sample to show, instead of a step")
    parser.add_argument("--micro-batch", type=int, default=0, help="micro-batch of the step, from 0 (default: 0)")
    parser.add_argument("--rank", type=int, default=0, help="data-parallel rank (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="number of data-parallel ranks (default: 1)")
    parser.add_argument("--count", type=int, help="largest number of samples to show")
    parser.add_argument("--ids", action="store_true", help="also show the ids")
    options, rest = parser.parse_known_args(arguments)
    command = parse_recipe(rest)
    for line in inspect(load(command.config, command.overrides), options):
        print(line)
    return 0


def inspect(config: Config, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines to print. Raises ConfigError, ValueError or OSError."""
    require_training(config)
    if not 0 <= options.rank < options.ranks:
        raise ValueError(
            f"--rank {options.rank}: expected 0 to {options.ranks - 1}, because --ranks is {options.ranks}"
        )
    recipe = config.recipe
    size = recipe.training.micro_batch_size
    start, micro_batch = (options.sample, 0) if options.sample is not None else (None, options.micro_batch)
    if start is None:
        start, micro_batches = samples_before(config, options.step, options.ranks)
        if not 0 <= micro_batch < micro_batches:
            raise ValueError(f"--micro-batch {micro_batch}: step {options.step} has {micro_batches}, counted from 0")
        which = f"micro-batch {micro_batch} of {micro_batches}, rank {options.rank} of {options.ranks}"
        yield f"step {options.step}, {which}"
    tokenizer, datasets = build_datasets(config, partial(print, file=sys.stderr), validation=False)
    dataset = datasets["data"]
    loader_options: dict[str, Any] = {"micro_batch_size": size, "dp_rank": options.rank, "dp_size": options.ranks}
    if options.sample is not None:
        loader_options = {"micro_batch_size": options.count or size}
    with MicroBatchLoader(dataset, seed=recipe.run.seed, start=start, **loader_options) as loader:
        *_, seen = loader.next_step(micro_batch + 1)
    masking = recipe.training.document_masking
    yield from format_samples(
        seen, dataset, tokenizer, seed=recipe.run.seed, count=options.count, ids=options.ids, document_masking=masking
    )


def samples_before(config: Config, step: int, ranks: int) -> tuple[int, int]:
    """Return the samples before `step` and its micro-batches on each rank. Raises ValueError if they are unknown."""
    recipe = config.recipe
    rounding = BatchRounding(recipe.training.micro_batch_size, ranks)
    if step < 1:
        raise ValueError(f"--step {step}: steps count from 1")
    metrics = RunDirectory(recipe.run.directory).metrics
    for row in read_rows(metrics):
        if row["step"] == step and "global_batch_size" in row:
            batch = row["global_batch_size"]
            if batch % rounding.samples_per_micro_step:
                raise ValueError(
                    f"--ranks {ranks}: {metrics} has {batch} samples in step {step}, which {ranks} ranks with "
                    f"micro-batches of {rounding.micro_batch_size} cannot have taken"
                )
            return row["samples"] - batch, batch // rounding.samples_per_micro_step
    with config_errors_at(config, "batch"):
        policy = build_batch_policy(recipe)
    if policy.is_adaptive:
        raise ValueError(f"--step {step}: the batch is adaptive, and {metrics} does not have this step; use --sample")
    with config_errors_at(config, "batch"):
        for planned in planned_steps(recipe, rounding, policy):
            if planned.number == step:
                return planned.tokens // recipe.training.sequence_length, planned.micro_batches
    raise ValueError(f"--step {step}: the run ends with step {planned.number}")


def format_samples(
    seen: MicroBatch,
    dataset: PackedDataset,
    tokenizer: Tokenizer,
    *,
    seed: int,
    count: int | None,
    ids: bool,
    document_masking: bool,
) -> Iterator[str]:
    """Yield the position and then the text of each sample of a micro-batch, with the last label after `>`."""
    epochs, indices = build_order(dataset, seed=seed)(seen.sample_ids.numpy())
    describe = getattr(dataset, "describe", "sequence {}".format)
    for row in range(len(seen.sample_ids))[:count]:
        tokens, last = seen.tokens[row].tolist(), int(seen.labels[row, -1])
        yield f"\nsample {seen.sample_ids[row]}, epoch {epochs[row]}, {describe(int(indices[row]))}"
        first = (document_positions(seen.tokens[row : row + 1] == first_input(tokenizer))[0] == 0).tolist()
        bars = [DOUBLE_BAR if document_masking and starts else BAR for starts in first]
        text = "".join(map(add, bars, format_token(tokens, tokenizer)))
        yield f"{text}{BAR}>{format_token([last], tokenizer)[0]}"
        if ids:
            yield f"{np.array2string(np.array(tokens), threshold=sys.maxsize, max_line_width=120)} > {last}"


def format_token(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token; <id> if that is empty or not a whole character."""
    known: dict[int, str] = {}
    for token in set(tokens):
        try:
            text = tokenizer.decode([token])
        except ValueError:
            text = "\ufffd"
        known[token] = f"<{token}>" if not text or "\ufffd" in text else text
    return [known[token] for token in tokens]


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
