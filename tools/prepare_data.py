"""Tokenize the data of a recipe before the run; otherwise a run does so on first use.

    python -m tools.prepare_data CONFIG.toml [--section.key=value]...

If it is interrupted or killed, the same command continues where it stopped.
Exit status: 0 done or nothing to do, 2 for a user error, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from components.standard_streams import run_command
from recipes.cli import parse_recipe
from recipes.config import Config, ConfigError, load
from recipes.errors import UsageError
from recipes.prepared_data import build_datasets


def main(arguments: Sequence[str]) -> int:
    try:
        command = parse_recipe(arguments)
        if command.help:
            print(__doc__)
            return 0
        prepare_recipe(load(command.config, command.overrides))
    except (ConfigError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues, and what is encoded so far is kept", file=sys.stderr)
        return 130
    return 0


def prepare_recipe(config: Config) -> None:
    """Build [data] and [validation.data] as the run will, and print the progress. Raises ConfigError."""
    _, datasets = build_datasets(config, partial(print, flush=True), validation=True)
    for section, dataset in datasets.items():
        for name, part in getattr(dataset, "sources", {section: dataset}).items():
            index = getattr(part, "index", "ready")
            print(f"[{name}] {index}; {len(part):,} sequences of {config.recipe.training.sequence_length}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
