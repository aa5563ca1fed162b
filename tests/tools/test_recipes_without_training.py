"""Tools that read the recipe of a training run refuse one that trains nothing."""

import pytest

from recipes.cli import ROOT
from tools import inspect_data, plot, prepare_data
from tools.plan_run import __main__ as plan_run
from tools.sweep import __main__ as sweep

pytestmark = pytest.mark.quick

PLAN = ["--parameters=1M", "--tokens=10M", "--pilot-sizes=10K,40K", "--pilot-tokens=10K"]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (prepare_data.main, []),
        (inspect_data.main, []),
        (plot.main, ["schedule", "--output=schedule.svg"]),
        (sweep.main, ["--grid", "evaluation.limit=1,2", "--results=sweep.jsonl"]),
        (plan_run.main, [*PLAN, "--results=plan.jsonl"]),
    ],
)
def test_a_recipe_without_training_is_refused(tmp_path, monkeypatch, capsys, main, arguments):
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "train_configs" / "evaluate.toml")
    command, rest = (arguments[:1], arguments[1:]) if main is plot.main else ([], arguments)
    assert main([*command, recipe, "--evaluation.checkpoint=runs/x", *rest]) == 2
    assert "Evaluate trains nothing; give the recipe of a training run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
