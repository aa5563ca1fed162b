"""The runs of a sweep, and when two of them are equal."""

from __future__ import annotations

import shutil
import sys

import pytest

from tools.sweep.grid import Sweep, parse_grid, split_values

pytestmark = pytest.mark.quick


def jobs_of(recipe, *grids, **common):
    common = {key.replace("__", "."): value for key, value in common.items()}
    return Sweep(recipe, common, [parse_grid(texts) for texts in grids]).jobs()


def digest_of(recipe, **common):
    (job,) = jobs_of(recipe, **common)
    return job.digest


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1e-3,2e-3", ["1e-3", "2e-3"]),
        ("300K, 1.2M", ["300K", "1.2M"]),
        ("[0.9, 0.95],[0.9, 0.99]", ["[0.9, 0.95]", "[0.9, 0.99]"]),
        ("[{ from_tokens = 1, samples = 2 }],[]", ["[{ from_tokens = 1, samples = 2 }]", "[]"]),
        ("\"a,b\",'c]'", ['"a,b"', "'c]'"]),
        ("one", ["one"]),
    ],
)
def test_values_are_cut_at_commas_outside_brackets_and_quotes(text, parts):
    assert split_values(text) == parts


def test_keys_of_one_grid_go_together_and_grids_are_crossed(tiny):
    jobs = jobs_of(tiny.recipe, ["model.dim=16,32", "model.ffn_dim=32,64"], ["lr_schedule.max_lr=1e-3,2e-3,4e-3"])
    assert [tuple(job.varied.values()) for job in jobs] == [
        (dim, ffn, rate) for dim, ffn in (("16", "32"), ("32", "64")) for rate in ("1e-3", "2e-3", "4e-3")
    ]
    assert len({job.digest for job in jobs}) == 6


def test_equal_runs_are_run_once(tiny):
    assert len(jobs_of(tiny.recipe, ["lr_schedule.max_lr=1e-3,0.001,2e-3"])) == 2


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["lr_schedule.max_lr"], "write --grid key=value,value; the recipe comes first"),
        (["lr_schedule.max_lr=1,,2"], "a value is empty"),
        (["a=1,2", "b=3"], "a has 2, b has 1"),
        (["a=1,2", "a=3,4"], "a is given twice"),
    ],
)
def test_an_invalid_grid_is_reported(texts, said):
    with pytest.raises(ValueError, match=said):
        parse_grid(texts)


def test_a_key_in_two_grids_or_also_for_all_runs_is_reported(tiny):
    with pytest.raises(ValueError, match=r"model\.dim is given twice"):
        jobs_of(tiny.recipe, ["model.dim=16,32"], ["model.dim=16,32"])
    with pytest.raises(ValueError, match=r"model\.dim is given twice"):
        jobs_of(tiny.recipe, ["model.dim=16,32"], model__dim="16")


def test_an_invalid_run_is_reported_before_any_is_started(tiny):
    with pytest.raises(ValueError, match=r"(?s)with model\.kv_heads = 3:.*does not divide"):
        jobs_of(tiny.recipe, ["model.kv_heads=1,3"])


def test_keys_that_change_training_change_the_digest(tiny):
    before = digest_of(tiny.recipe)
    for key, value in (("run.seed", "1"), ("lr_schedule.max_lr", "0.02"), ("data.document_separator", "x")):
        assert digest_of(tiny.recipe, **{key: value}) != before, key
    (tiny.folder / "text" / "0.txt").write_text("other words")
    assert digest_of(tiny.recipe) != before


@pytest.mark.parametrize(
    "data",
    [
        'use = "components.data:Mixture"\nweights = { a = 1 }\n'
        'sources.a = { use = "components.data:TextFiles", path = "a.txt" }\n',
        'use = "components.data:TokenFiles"\npath = "a.txt"\n',
    ],
)
def test_the_content_of_mixtures_and_token_files_changes_the_digest(tiny, data):
    recipe = tiny.recipe.read_text()
    head, section, rest = recipe.partition("[data]\n")
    assert section
    tiny.recipe.write_text(f"{head}{section}{data}\n{rest[rest.index('[') :]}")
    digests = set()
    for name, content in (("a.txt", "words"), ("a.txt", "other words"), ("b.txt", "words")):
        (tiny.folder / name).write_text(content)
        digests.add(digest_of(tiny.recipe))
    assert len(digests) == 2
    tiny.recipe.write_text(tiny.recipe.read_text().replace("a.txt", "b.txt"))
    assert digest_of(tiny.recipe) in digests  # the file moved


def test_the_number_of_processes_changes_the_digest(tiny):
    grid = [parse_grid(["lr_schedule.max_lr=1e-3"])]
    of_one = Sweep(tiny.recipe, {}, grid).jobs()[0].digest
    digests = [Sweep(tiny.recipe, {}, grid, lambda recipe, n=n: n).jobs()[0].digest for n in (1, 2, 4)]
    assert digests[0] == of_one
    assert len(set(digests)) == 3


def test_locations_and_outputs_do_not_change_the_digest(tiny, tmp_path):
    before = digest_of(tiny.recipe)
    outputs = {"checkpoint__keep_last": "1", "metrics__writers__tensorboard__use": "components.metrics:TensorBoard"}
    assert digest_of(tiny.recipe, run__name="other", **outputs) == before
    moved = tmp_path / "moved"
    shutil.copytree(tiny.folder / "text", moved / "text")
    shutil.copy(tiny.recipe, moved)
    assert digest_of(moved / "tiny.toml") == before


def test_a_key_at_its_default_does_not_change_the_digest(tiny):
    """A new key of a component must not invalidate stored results."""
    recipe = tiny.recipe.read_text()
    (tiny.folder / "parts.py").write_text(
        "from dataclasses import dataclass\n"
        "from components.lr_schedules import Constant\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Constant):\n"
        "    pass\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class More(Constant):\n"
        "    extra: int = 0\n"
    )
    digests = []
    for name in ("Mine", "More"):
        tiny.recipe.write_text(recipe.replace("components.lr_schedules:WSD", "parts:Schedule"))
        (tiny.folder / "parts.py").write_text((tiny.folder / "parts.py").read_text() + f"\nSchedule = {name}\n")
        sys.modules.pop("parts", None)
        digests.append(digest_of(tiny.recipe))
    assert digests[0] == digests[1]


def test_missing_data_is_reported(tiny):
    with pytest.raises(ValueError, match="/nowhere does not exist"):
        jobs_of(tiny.recipe, data__path="/nowhere")
