"""Hooks: the points at which a custom class is called, their order, state and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from components.clock import TrainingClock
from recipes import cli
from recipes.hooks import POINTS, Hook, HookContext, Hooks, complete_hook

CONTEXT = HookContext(None, None, TrainingClock(100, 10), None, 0, 1, None, dict.update)  # type: ignore[arg-type]

MODULE = '''
import json
import torch


class Record:
    """Writes down each point with the step at which it is called, and whether its gradients are there."""

    def __init__(self, *, file: str, fail_at: int = 0):
        self.file, self.fail_at, self.seen = file, fail_at, 0

    def note(self, point, context):
        with open(self.file, "a") as file:
            gradients = sum(parameter.grad is not None for parameter in context.model.parameters())
            file.write(json.dumps([point, context.clock.step, self.seen, gradients > 0]) + "\\n")

    def on_run_begin(self, context):
        self.note("run begin", context)

    def on_step_begin(self, context):
        self.note("step begin", context)

    def on_gradients_ready(self, context):
        self.note("gradients", context)

    def on_step_end(self, context):
        self.seen += 1
        self.note("step end", context)
        if self.seen == self.fail_at:
            raise ArithmeticError("by hand")

    def on_run_end(self, context):
        self.note("run end", context)
        context.log_metrics({"seen": self.seen})

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Early:
    """Logs a metric before the first step, and cannot read its state."""

    def on_run_begin(self, context):
        context.log_metrics({"early": 1})

    def load_state_dict(self, state):
        raise ValueError("not my state")


class Halve:
    """Has one method only."""

    def on_gradients_ready(self, context):
        for parameter in context.model.parameters():
            parameter.grad.mul_(0.0)


class Nothing:
    """Not a hook."""
'''


class Points(Hook):
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def on_step_end(self, context: HookContext) -> None:
        self.calls.append(self.name)

    on_run_end = on_step_end


@pytest.mark.quick
def test_hooks_are_called_in_a_fixed_order():
    calls: list[str] = []
    first, own, other, last = (Points(name, calls) for name in ("profile", "own", "other", "save"))
    hooks = Hooks([first], {"own": own, "other": other}, [last])
    hooks.call("on_step_end", CONTEXT)
    assert calls == ["profile", "own", "other", "save"], "a checkpoint holds the state after the step"
    calls.clear()
    hooks.call("on_run_end", CONTEXT)
    assert calls == ["profile", "save", "own", "other"], "everything is saved when a custom hook is called"


@pytest.mark.quick
def test_a_class_with_some_of_the_points_is_a_hook_and_one_without_is_refused():
    class Some:
        def on_step_end(self, context):
            context.append(1)

    hook, called = complete_hook(Some()), []
    for point in POINTS:
        getattr(hook, point)(called)
    assert called == [1]
    assert hook.state_dict() == {}
    with pytest.raises(ValueError, match="use: dict is not a hook: it has none of on_run_begin, on_step_begin"):
        complete_hook({})


@pytest.fixture
def hooked(tiny, clean_imports):
    (tiny.folder / "mine_hooks.py").write_text(MODULE)
    tiny.recipe.write_text(
        tiny.recipe.read_text() + '\n[hooks.record]\nuse = "mine_hooks:Record"\nfile = "calls.jsonl"\n'
    )
    return tiny


def calls(tiny) -> list:
    return [json.loads(line) for line in (tiny.folder / "calls.jsonl").read_text().splitlines()]


SHORT = "--training.total_tokens=400"  # 3 steps of 8 samples of 24 tokens


def test_a_custom_hook_is_called_at_its_points_and_its_state_survives(hooked, monkeypatch):
    monkeypatch.chdir(hooked.folder)
    assert hooked.launch(SHORT) == 0
    in_steps = [
        [point, step - (point != "step end"), step - (point != "step end"), point == "gradients"]
        for step in (1, 2, 3)
        for point in ("step begin", "gradients", "step end")
    ]
    assert calls(hooked) == [["run begin", 0, 0, False], *in_steps, ["run end", 3, 3, False]]
    assert hooked.rows()[-1] == {"step": 3, "tokens": 576, "seen": 3}
    assert json.loads((hooked.checkpoint(2) / "state.json").read_text())["hooks"] == {"record": {"seen": 2}}
    (hooked.folder / "calls.jsonl").unlink()
    assert hooked.launch("--training.total_tokens=700", "--resume") == 0
    assert calls(hooked)[0] == ["run begin", 3, 3, False]
    assert calls(hooked)[-1][:3] == ["run end", 4, 4]
    steps = [row["step"] for row in hooked.rows() if "loss" in row]
    assert steps == [1, 2, 3, 4]


def test_a_hook_that_raises_is_named_with_its_section(hooked, monkeypatch, capsys):
    monkeypatch.chdir(hooked.folder)
    with pytest.raises(ArithmeticError, match="by hand"):
        hooked.launch(SHORT, "--hooks.record.fail_at=2")
    assert "the run crashed in [hooks.record]; the traceback is also in log.txt" in capsys.readouterr().out
    assert hooked.checkpoint(2).is_dir(), "the step before the error is saved"


def test_gradients_that_a_hook_changes_are_those_of_the_update(hooked, monkeypatch):
    monkeypatch.chdir(hooked.folder)
    assert hooked.launch(SHORT, "--hooks.halve.use=mine_hooks:Halve", "--optimizer.weight_decay=0") == 0
    import torch

    from components.checkpoint import load_tensors
    from recipes.pretrained import load_pretrained

    weights = []
    for step in (1, 3):
        trained = load_pretrained(hooked.checkpoint(step), trust_code=True)
        model = trained.build(24).to_empty(device="cpu")
        load_tensors(trained.path, {"model": model.state_dict()}, no_dist=True)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_the_example_of_the_documentation_runs(tiny, clean_imports):
    page = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()
    blocks = dict(re.findall(r"```(toml|python)\n(.*?)```", page, re.DOTALL))
    (tiny.folder / "my_hooks.py").write_text(blocks["python"])
    tiny.recipe.write_text(tiny.recipe.read_text() + blocks["toml"].partition("]\n")[2])
    assert tiny.launch("--training.total_tokens=1200") == 0
    logged = {row["step"]: row["weight_norm"] for row in tiny.rows() if "weight_norm" in row}
    assert list(logged) == [5] and logged[5] > 1


@pytest.mark.quick
def test_a_class_that_is_not_a_hook_is_reported_at_its_key(hooked, monkeypatch, capsys):
    monkeypatch.chdir(hooked.folder)
    assert hooked.launch("--hooks.odd.use=mine_hooks:Nothing") == 2
    said = capsys.readouterr().err
    assert "hooks.odd.use" in said and "Nothing is not a hook: it has none of on_run_begin" in said
    assert hooked.launch("--hooks.record.files=3") == 2
    assert "did you mean file?" in capsys.readouterr().err


@pytest.mark.quick
def test_hooks_are_printed_as_they_are_configured(hooked, monkeypatch, capsys):
    monkeypatch.chdir(hooked.folder)
    assert cli.main([str(hooked.recipe), "--print-config"]) == 0
    assert '[hooks.record]\nuse = "mine_hooks:Record"' in capsys.readouterr().out


def test_a_metric_logged_before_the_first_step_is_not_taken_for_a_step_without_its_validation(hooked):
    early = ["--hooks.record.use=mine_hooks:Early", SHORT, "--validation.interval_steps=2"]
    assert hooked.launch(*early) == 0
    assert [row["step"] for row in hooked.rows() if "val_loss" in row] == [2, 3]


def test_a_hook_that_cannot_load_its_state_is_named_and_the_checkpoint_is_not_called_damaged(hooked, capsys):
    early = ["--hooks.record.use=mine_hooks:Early"]
    assert hooked.launch(*early, SHORT) == 0
    assert hooked.launch(*early, "--training.total_tokens=700", "--resume") == 2
    error = capsys.readouterr().err
    assert "hooks.record" in error and "not my state" in error and "damaged" not in error
