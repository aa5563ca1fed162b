"""[average.NAME]: averages in a run, in its checkpoints, in validation, and wherever weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from components.average import Exponential
from recipes import cli
from recipes.averages import Averages
from tests.checkpoints import rewrite_manifest
from tests.conftest import TinyRun
from tests.end_to_end.test_evaluate import CONFIG
from tests.end_to_end.test_initial_weights import STANDSTILL, validations
from tests.end_to_end.test_resume import tensors
from tools import average, export_hf, generate

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

EMA = ["--average.ema.use=components.average:Exponential", "--average.ema.half_life_tokens=500"]
LATE = ["--average.late.use=components.average:Exponential", "--average.late.half_life_tokens=500"]
LATE += ["--average.late.start_tokens=100M"]
WINDOW = ["--average.w.use=components.average:Window", "--average.w.window_tokens=1200", "--average.w.blocks=3"]
SHORT = ["--training.total_tokens=1500", "--training.precision=bf16"]
"""Seven steps, of 8 and then of 12 samples, that compute with bf16 copies of the weights."""
STEPS = 7


class Averaged:
    """A run with averages, an equal one without, and an export of an average."""

    def __init__(self, folder: Path) -> None:
        self.tiny = TinyRun(folder)
        self.run = self.tiny.directory
        self.plain = folder / "plain"
        assert self.tiny.launch(*SHORT, *EMA, *LATE, *WINDOW) == 0
        assert self.tiny.launch(*SHORT, f"--run.dir={self.plain}") == 0
        self.exported = folder / "exported"
        assert export_hf.main([str(self.run), str(self.exported), "--average", "ema"]) == 0

    def start(self, name: str, weights: Path, *arguments: str) -> int:
        place = f"--run.dir={self.tiny.folder / name}"
        return self.tiny.launch(place, "--run.if_exists=replace", f"--run.init_from={weights}", *STANDSTILL, *arguments)

    def evaluate(self, *arguments: str) -> float:
        output = self.tiny.folder / "result.json"
        held_out = ["--data.use=components.data:TextFiles", f"--data.path={self.tiny.folder / 'text/held_out/*.txt'}"]
        common = ["--evaluation.limit=3", "--evaluation.device=cpu", "--evaluation.sequence_length=24"]
        common += ["--evaluation.precision=bf16", f"--evaluation.cache_dir={self.tiny.folder / 'cache'}"]
        assert cli.main([str(CONFIG), f"--evaluation.output={output}", *held_out, *common, *arguments]) == 0
        return json.loads(output.read_text())["loss"]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> Averaged:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
            patch.delenv(name, raising=False)
        return Averaged(tmp_path_factory.mktemp("averages"))


def last_row(run: Path) -> dict:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]


def test_the_saved_averages_are_those_of_the_saved_weights(averaged):
    saved = [tensors(averaged.tiny.checkpoint(step)) for step in range(1, STEPS + 1)]
    sizes = [row["global_batch_size"] * 24 for row in averaged.tiny.rows() if "loss" in row]
    ends = [sum(sizes[: step + 1]) for step in range(STEPS)]
    factors = [2 ** ((end - ends[-1]) / 500) * (1 - 2 ** (-size / 500)) for end, size in zip(ends, sizes, strict=True)]
    last_blocks = [size * (end > (-(-ends[-1] // 400) - 3) * 400) for end, size in zip(ends, sizes, strict=True)]
    names = [name.removeprefix("average.ema.0.") for name in saved[-1] if name.startswith("average.ema.0.")]
    assert len(names) > 10
    state = json.loads((averaged.tiny.checkpoint(STEPS) / "state.json").read_text())["average"]["w"]["state"]
    for name in names:
        weights = [each[f"model.{name}"].double() for each in saved]
        ema = sum(w * factor / sum(factors) for w, factor in zip(weights, factors, strict=True))
        torch.testing.assert_close(saved[-1][f"average.ema.0.{name}"].double(), ema, rtol=0, atol=1e-6)
        window = sum(w * factor / sum(last_blocks) for w, factor in zip(weights, last_blocks, strict=True))
        blocks = enumerate(state["block_tokens"])
        found = sum(saved[-1][f"average.w.{i}.{name}"].double() * n / sum(last_blocks) for i, n in blocks)
        torch.testing.assert_close(found, window, rtol=0, atol=1e-6)
        assert not saved[-1][f"average.late.0.{name}"].any()


def test_an_average_changes_neither_training_nor_the_rest_of_a_checkpoint(averaged):
    one, other = tensors(averaged.tiny.checkpoint(STEPS)), tensors(averaged.plain / f"checkpoints/step-{STEPS:08d}")
    assert {name for name in one if not name.startswith("average.")} == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert json.loads((averaged.plain / f"checkpoints/step-{STEPS:08d}/state.json").read_text())["average"] == {}
    assert "val_loss" in last_row(averaged.plain)
    assert not [key for key in last_row(averaged.plain) if "average" in key]


def test_validation_equals_an_evaluation_of_the_average_and_of_its_export(averaged):
    row = last_row(averaged.run)
    expected = row["val_loss_average_ema"]
    assert expected != pytest.approx(row["val_loss"], rel=1e-4)
    assert not [key for key in row if "late" in key], "it has not started"
    run = f"--evaluation.checkpoint={averaged.run}"
    assert averaged.evaluate(run, "--evaluation.average=ema") == pytest.approx(expected, rel=1e-6)
    assert averaged.evaluate(run, "--evaluation.average=w") == pytest.approx(row["val_loss_average_w"], rel=1e-6)
    assert averaged.evaluate(f"--evaluation.checkpoint={averaged.exported}") == pytest.approx(expected, rel=1e-6)
    assert "average ema " in (averaged.run / "log.txt").read_text()


def test_a_run_starts_from_an_average_or_its_export(averaged):
    row = last_row(averaged.run)
    cases = [([f"--run.average={name}"], averaged.run, row[f"val_loss_average_{name}"]) for name in ("ema", "w")]
    cases += [([], averaged.exported, row["val_loss_average_ema"]), ([], averaged.run, row["val_loss"])]
    for arguments, weights, expected in cases:
        assert averaged.start("started", weights, "--training.precision=bf16", *arguments) == 0
        assert validations(averaged.tiny.folder / "started")[-1] == pytest.approx(expected, rel=1e-6)


def test_merged_checkpoints_are_read_like_any_other_but_not_resumed(averaged, capsys):
    merged, exported = averaged.tiny.folder / "merged", averaged.tiny.folder / "exported-merged"
    assert average.main([str(averaged.run), "--last", "3", "--output", str(merged)]) == 0
    (written,) = merged.iterdir()
    saved = [tensors(averaged.tiny.checkpoint(step)) for step in range(STEPS - 2, STEPS + 1)]
    found = tensors(written)
    assert found.keys() == {name for name in saved[0] if name.startswith("model.")}
    for name, tensor in found.items():
        assert torch.equal(tensor, (sum(each[name].double() for each in saved) / 3).float()), name
    assert export_hf.main([str(merged), str(exported)]) == 0
    loss = averaged.evaluate(f"--evaluation.checkpoint={exported}")
    assert averaged.evaluate(f"--evaluation.checkpoint={merged}") == pytest.approx(loss, rel=1e-6)
    assert averaged.start("started", merged, "--training.precision=bf16") == 0
    assert validations(averaged.tiny.folder / "started")[-1] == pytest.approx(loss, rel=1e-6)
    capsys.readouterr()
    assert averaged.tiny.launch(f"--resume={merged}", f"--run.dir={averaged.tiny.folder / 'resumed'}") == 2
    assert "which cannot be resumed; start a new run with run.init_from" in capsys.readouterr().err
    assert average.main([str(averaged.run), "--output", str(merged)]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert average.main([str(averaged.run), "--average", "ema", "--output", str(averaged.tiny.folder / "means")]) == 0


def test_averages_start_and_end_where_the_recipe_changes(averaged, capsys):
    fork = averaged.tiny.folder / "fork"

    def resume(step: int, *arguments: str) -> str:
        shutil.rmtree(fork, ignore_errors=True)
        capsys.readouterr()
        assert averaged.tiny.launch(f"--resume={averaged.tiny.checkpoint(step)}", f"--run.dir={fork}", *arguments) == 0
        return capsys.readouterr().out

    new = [each.replace(".ema.", ".new.") for each in EMA]
    said = resume(STEPS - 1, *SHORT, *new, *(each.replace("blocks=3", "blocks=4") for each in WINDOW))
    assert "average new starts here: the checkpoint does not have it" in said
    assert "average w starts here: the checkpoint has one of 3 x components.average:Window" in said
    for name in ("ema", "late"):
        assert f"average {name} of the checkpoint is dropped: the recipe has no [average.{name}]" in said
    found = tensors(fork / f"checkpoints/step-{STEPS:08d}")
    state = json.loads((fork / f"checkpoints/step-{STEPS:08d}/state.json").read_text())["average"]
    assert state.keys() == {"new", "w"}
    place = state["w"]["state"]["block_tokens"].index(288)
    for name in [name for name in found if name.startswith("average.new.0.")]:
        weight = found[name.replace("average.new.0.", "model.")]
        assert torch.equal(found[name], weight)
        assert torch.equal(found[name.replace("new.0", f"w.{place}")], weight)


def test_a_checkpoint_of_before_there_were_averages_is_continued(averaged, capsys):
    fork, stored = averaged.tiny.folder / "older", averaged.plain / "checkpoints" / f"step-{STEPS - 1:08d}"
    state = json.loads((stored / "state.json").read_text())
    del state["average"]
    (stored / "state.json").write_text(json.dumps(state))
    rewrite_manifest(stored)
    assert averaged.tiny.launch(f"--resume={stored}", f"--run.dir={fork}", *SHORT, *EMA) == 0
    assert "average ema starts here" in capsys.readouterr().out
    assert export_hf.main([str(stored), str(averaged.tiny.folder / "none"), "--average", "ema"]) == 2
    assert "has no average 'ema'; its averages: none" in capsys.readouterr().err


def test_an_unknown_average_is_one_message_with_the_names_there_are(averaged, capsys):
    known = "has no average 'eam'; its averages: ema, late, w"
    output = str(averaged.tiny.folder / "unwritten")
    cases = {
        "export": lambda: export_hf.main([str(averaged.run), output, "--average", "eam"]),
        "generate": lambda: generate.main([str(averaged.run), "It", "--device", "cpu", "--average", "eam"]),
        "merge": lambda: average.main([str(averaged.run), "--output", output, "--average", "eam"]),
        "evaluation.average": lambda: cli.main(
            [str(CONFIG), f"--evaluation.checkpoint={averaged.run}", "--evaluation.average=eam"]
        ),
        "run.average": lambda: averaged.start("started", averaged.run, "--run.average=eam"),
    }
    for name, launch in cases.items():
        capsys.readouterr()
        assert launch() == 2, name
        error = capsys.readouterr().err
        assert error.count(known) == 1, (name, error)
        assert "Traceback" not in error
        assert ("." not in name) or f"{name} = " in error
    assert export_hf.main([str(averaged.run), output, "--average", "late"]) == 2
    assert "average: late has not started in " in capsys.readouterr().err
    assert averaged.start("started", averaged.exported, "--run.average=ema") == 2
    assert "is a Hugging Face directory, which has no averages" in capsys.readouterr().err
    assert generate.main([str(averaged.exported), "It", "--device", "cpu", "--average", "ema"]) == 2
    assert "is a Hugging Face directory, which has no averages" in capsys.readouterr().err
    assert averaged.start("started", averaged.run, "--model.ffn_dim=48") == 2
    assert "has the shape (32, 16) for layers.0.feed_forward.w_gate.weight, (48, 16)" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [EMA[0], "--average.ema.half_life_tokens=0"],
            "average.ema.half_life_tokens = 0\n    expected a whole number > 0",
        ),
        (
            [EMA[0], "--average.ema.half_life=5"],
            "unknown key in [average.ema] of components.average:Exponential; its keys are",
        ),
        (["--average.ema.use=components.average:Exponentail"], "has no Exponentail; did you mean Exponential?"),
        (["--average.ema.use=components.guard:GuardConfig"], "cannot be used as average config"),
        (
            ["--average.'a b'.use=components.average:Window", "--average.'a b'.window_tokens=9"],
            "must consist of letters",
        ),
        (["--run.average=ema"], "only valid with init_from"),
    ],
)
def test_mistakes_in_the_recipe_are_one_message(tiny, capsys, arguments, message):
    assert tiny.launch(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count(message) == 1, error
    assert "Traceback" not in error


@pytest.mark.quick
def test_an_exception_leaves_the_weights_bitwise_as_they_were():
    model = nn.Linear(3, 2)
    averages = Averages(model, {"ema": Exponential(half_life_tokens=100)})
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.normal_()
        averages.update(tokens=50 * step, step_tokens=50)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (mean, *_) = averages.tensors()["ema"].values()
    kept = mean.clone()
    with pytest.raises(KeyError), averages.swapped("ema"):
        assert torch.equal(model.weight, mean)
        raise KeyError
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert torch.equal(mean, kept)


def test_a_custom_average_is_a_class_of_the_user(tiny, clean_imports, capsys):
    (tiny.folder / "mine_average.py").write_text(
        "class Last:\n"
        "    num_copies = 1\n\n"
        "    def __init__(self, *, every: int = 1):\n"
        "        self.every, self.seen = every, 0\n\n"
        "    def build(self, *, copies):\n"
        "        self.copy = copies[0]\n"
        "        return self\n\n"
        "    @property\n"
        "    def has_started(self):\n"
        "        return self.seen >= self.every\n\n"
        "    def update(self, weights, *, tokens, step_tokens):\n"
        "        self.seen += 1\n"
        "        if self.seen % self.every == 0:\n"
        "            for mine, weight in zip(self.copy, weights):\n"
        "                mine.copy_(weight)\n\n"
        "    def copy_to(self, weights):\n"
        "        for mine, weight in zip(self.copy, weights):\n"
        "            weight.copy_(mine)\n\n"
        "    def state_dict(self):\n"
        "        return {'seen': self.seen}\n\n"
        "    def load_state_dict(self, state):\n"
        "        self.seen = state['seen']\n"
    )
    mine = ["--average.mine.use=mine_average:Last", "--average.mine.every=4", "--training.total_tokens=800"]
    assert tiny.launch(*mine) == 0
    row = next(row for row in tiny.rows() if "val_loss" in row)
    assert row["val_loss_average_mine"] == row["val_loss"], "step 4"
    found = tensors(tiny.checkpoint(5))
    assert torch.equal(found["average.mine.0.norm.weight"], tensors(tiny.checkpoint(4))["model.norm.weight"])
    capsys.readouterr()
    assert export_hf.main([str(tiny.directory), str(tiny.folder / "x"), "--average", "mine"]) == 2
    assert "--trust-code" in capsys.readouterr().err
