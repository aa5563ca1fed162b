"""Refuse text that is not tokenized yet on several nodes, whose GPUs would wait for the CPU of one process."""

from __future__ import annotations

from components.data.mixture import sources_in
from components.data.sources.base import TextSource
from components.distributed.context import DistributedContext
from components.interfaces import Tokenizer
from recipes.config import Config
from recipes.errors import config_errors_at


def require_prepared_data(config: Config, tokenizer: Tokenizer, world: DistributedContext) -> None:
    """Raise ConfigError, on more than one node, for text that is not tokenized yet. Call on every rank."""
    if world.nodes == 1:
        return
    recipe = config.recipe
    validation = {} if recipe.validation is None else sources_in("validation.data", recipe.validation.data)
    for section, source in {**sources_in("data", recipe.data), **validation}.items():
        if not isinstance(source, TextSource):
            continue

        def check(source: TextSource = source) -> None:
            if not source.cache_entry(tokenizer, recipe.run.cache_dir).is_prepared():
                raise ValueError(
                    f"this text is not tokenized yet in {recipe.run.cache_dir}, and the GPUs of {world.nodes} nodes "
                    "would wait for it; first run, on one machine, python -m tools.prepare_data RECIPE.toml "
                    "[--section.key=value]... with the recipe and the overrides of this run"
                )

        with config_errors_at(config, section):
            world.main_process_first(check)
