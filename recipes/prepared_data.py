"""The data of a recipe, and whether it is tokenized: otherwise the GPUs of several nodes would wait for one CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from components.data.mixture import sources_in
from components.data.sources.base import TextSource
from components.distributed.context import DistributedContext
from components.interfaces import DataConfig, PackedDataset, Tokenizer
from recipes.config import Config
from recipes.errors import config_errors_at
from recipes.model_setup import build_tokenizer
from recipes.recipe import complete_recipe, require_training


def data_sources(recipe: Any) -> dict[str, object]:
    """Return the sources of [data] and [validation.data] by section; those of a mixture each."""
    validation = complete_recipe(recipe).validation
    held_out = {} if validation is None else sources_in("validation.data", validation.data)
    return sources_in("data", recipe.data) | held_out


def text_sources(recipe: Any) -> dict[str, TextSource]:
    """Return those of `data_sources` that are text."""
    return {section: source for section, source in data_sources(recipe).items() if isinstance(source, TextSource)}


def build_datasets(
    config: Config, progress: Callable[[str], None], *, validation: bool
) -> tuple[Tokenizer, dict[str, PackedDataset]]:
    """Build the tokenizer and, as a run does, [data] and optionally [validation.data]. Raises ConfigError."""
    require_training(config)
    recipe, datasets = config.recipe, {}
    sections: dict[str, DataConfig] = {"data": recipe.data}
    if validation and (held_out := complete_recipe(recipe).validation) is not None:
        sections["validation.data"] = held_out.data
    with config_errors_at(config, "tokenizer"):
        tokenizer = build_tokenizer(recipe)
    for section, data in sections.items():
        with config_errors_at(config, section):
            datasets[section] = data.build(
                tokenizer=tokenizer,
                sequence_length=recipe.training.sequence_length,
                cache_dir=recipe.run.cache_dir,
                progress=progress,
            )
    return tokenizer, datasets


def require_prepared_data(config: Config, tokenizer: Tokenizer, world: DistributedContext) -> None:
    """Raise ConfigError, on more than one node, for text that is not tokenized yet. Call on every rank."""
    if world.nodes == 1:
        return
    cache_dir = config.recipe.run.cache_dir
    for section, source in text_sources(config.recipe).items():

        def check(source: TextSource = source) -> None:
            if not source.cache_entry(tokenizer, cache_dir).is_prepared():
                raise ValueError(
                    f"this text is not tokenized yet in {cache_dir}, and the GPUs of {world.nodes} nodes "
                    "would wait for it; first run, on one machine, python -m tools.prepare_data RECIPE.toml "
                    "[--section.key=value]... with the recipe and the overrides of this run"
                )

        with config_errors_at(config, section):
            world.main_process_first(check)
