"""The part of a tool's command line that is a launch's: a recipe and its overrides."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.launch import Command, UsageError, parse


def read_recipe(arguments: Sequence[str]) -> Command:
    """[CONFIG.toml] [--section.key=value]... as the launcher reads them. Raises UsageError, for its switches, too."""
    command = parse(arguments)
    if command.resume or command.print_config or command.dry_run is not None:
        raise UsageError("--resume, --print-config and --dry-run are for the launcher: ./run_train.sh")
    return command
