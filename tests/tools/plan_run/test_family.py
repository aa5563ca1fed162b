"""Models of other sizes have the parameters that are said, and the proportions of the recipe's."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from recipes.config import Override, load
from tools.plan_run.family import Family

pytestmark = pytest.mark.quick


def family(tiny, **keys: str) -> Family:
    config = load(tiny.recipe, [Override(f"model.{key}", value) for key, value in keys.items()])
    return Family(config, config.recipe.tokenizer.build().vocab_size)


@pytest.mark.parametrize(
    "keys", [{}, {"tied_embeddings": "true"}, {"qkv_bias": "true", "qk_norm": "per_head", "head_dim": "none"}]
)
@pytest.mark.parametrize("wanted", [20_000, 100_000, 3_000_000])
def test_a_size_has_the_parameters_it_says(tiny, keys, wanted):
    sizes = family(tiny, **keys)
    size = sizes.of(wanted)
    model = sizes.build(size)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.parameters == pytest.approx(wanted, rel=0.25)
    tied = keys.get("tied_embeddings") == "true"
    assert size.parameters - size.multiplied == (0 if tied else model.tok_embeddings.weight.numel())
    aspect = sizes.base.dim / sizes.base.layers
    assert 1 / 4 <= size.dim / size.layers / aspect <= 4
    assert size.heads == 2 * size.kv_heads and size.dim == 8 * size.heads
    assert size.ffn_dim == pytest.approx(2 * size.dim, abs=4)


def test_the_size_of_the_recipe_is_found_again(tiny):
    sizes = family(tiny)
    assert sizes.of(sizes.base.parameters) == sizes.base


def test_a_size_that_no_whole_layers_and_heads_have_is_refused(tiny):
    with pytest.raises(ValueError, match="no model of 500 parameters has about the proportions"):
        family(tiny).of(500)


def test_heads_can_be_divided_among_the_ranks_of_tensor_parallelism(tiny):
    config = load(tiny.recipe, [Override("parallel.tp", "2"), Override("model.kv_heads", "2")])
    sizes = Family(config, 257)
    assert {sizes.of(parameters).kv_heads % 2 for parameters in (30_000, 100_000, 300_000)} == {0}


def test_of_the_experts_those_of_a_token_are_multiplied(tiny):
    sizes = family(tiny, experts="4", top_k="1")
    size = sizes.of(400_000)
    model = sizes.build(size)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    one_expert = 3 * size.dim * size.ffn_dim
    embedding = model.tok_embeddings.weight.numel()
    assert size.multiplied == size.parameters - embedding - 3 * size.layers * one_expert


def test_a_model_of_another_class_is_refused(tiny):
    config = load(tiny.recipe)
    other = replace(config, recipe=replace(config.recipe, model=SimpleNamespace()))
    with pytest.raises(ValueError, match="this recipe has SimpleNamespace"):
        Family(other, 257)
