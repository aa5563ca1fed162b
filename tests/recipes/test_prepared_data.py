"""Several nodes do not wait for a text to be tokenized; one does."""

from __future__ import annotations

import pytest
import torch

from components.distributed.context import DistributedContext
from recipes.config import ConfigError, Override, load
from recipes.prepared_data import require_prepared_data
from tests.conftest import TinyRun
from tools import prepare_data

pytestmark = pytest.mark.quick


class Several(DistributedContext):
    """One process that takes itself for one of two nodes."""

    nodes = 2  # type: ignore[assignment]


def test_text_that_is_not_tokenized_is_refused_on_two_nodes(tiny: TinyRun) -> None:
    config = load(tiny.recipe, [])
    tokenizer = config.recipe.tokenizer.build()
    one, two = DistributedContext(0, 1, torch.device("cpu")), Several(0, 1, torch.device("cpu"))
    require_prepared_data(config, tokenizer, one)
    with pytest.raises(ConfigError, match=r"data\n.* 2 nodes .* python -m tools.prepare_data RECIPE.toml"):
        require_prepared_data(config, tokenizer, two)
    assert prepare_data.main([str(tiny.recipe)]) == 0
    require_prepared_data(config, tokenizer, two)
    held_out = load(tiny.recipe, [Override("data.validation_fraction", "0.5")])
    with pytest.raises(ConfigError, match="not tokenized yet"):
        require_prepared_data(held_out, tokenizer, two)
