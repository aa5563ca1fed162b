"""Tasks during a run, when it is resumed, of its checkpoint and of its export."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from components.metrics.tensorboard import scalars
from components.tasks import Answer, Question, Request
from recipes import cli
from recipes.interfaces import complete_task
from recipes.tasks import Task
from tests.conftest import TinyRun, launch_here, refusal
from tools import export_hf

CONFIG = Path(__file__).resolve().parents[2] / "train_configs" / "evaluate.toml"
ROWS = [
    {"context": "It was the best of", "choices": ["times", "wisdom", "foolishness, it was"], "answer": 0},
    {"context": "Call me ", "choices": ["Ishmael", "never", "it was the worst, 鯨"], "answer": 0},
    {"context": "Some years ago, never mind how long ", "choices": ["precisely", "money"], "answer": 1},
    {"context": "the age of foolishness. ", "choices": ["It was", "Call me"], "answer": 1},
]
TASKS = """
[tasks.novel]
use = "components.tasks:MultipleChoice"
path = "novel.jsonl"
interval_steps = 2
[tasks.shots]
use = "components.tasks:Cloze"
path = "cloze.jsonl"
"""
SHORT = ["--training.total_tokens=960", "--training.sequence_length=24", "--lr_schedule.max_lr=5e-2"]
"""Five steps."""


def add_tasks(tiny: TinyRun) -> None:
    (tiny.folder / "novel.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tiny.folder / "cloze.jsonl").write_text(json.dumps({"context": "it was the age of", "answer": "wisdom"}) + "\n")
    tiny.recipe.write_text(tiny.recipe.read_text() + TASKS)


def task_rows(tiny: TinyRun) -> list[dict]:
    return [row for row in tiny.rows() if any(key.startswith("task_") for key in row)]


class Evaluated:
    """A run with tasks, its export, and evaluations of both."""

    def __init__(self, folder: Path) -> None:
        self.tiny = TinyRun(folder)
        add_tasks(self.tiny)
        assert self.tiny.launch(*SHORT) == 0
        self.exported = folder / "exported"
        assert export_hf.main([str(self.tiny.directory), str(self.exported)]) == 0

    def launch(self, *arguments: str) -> int:
        given = [f"--evaluation.checkpoint={self.tiny.directory}", "--evaluation.method=tasks"]
        return cli.main([str(CONFIG), *given, "--evaluation.device=cpu", "--evaluation.precision=float32", *arguments])

    def result(self, *arguments: str) -> tuple[dict, list[dict]]:
        output, table = self.tiny.folder / "result.json", self.tiny.folder / "table.jsonl"
        assert self.launch(f"--evaluation.output={output}", f"--evaluation.table={table}", *arguments) == 0
        return json.loads(output.read_text()), [json.loads(line) for line in table.read_text().splitlines()]

    @property
    def on_novel(self) -> list[str]:
        return [
            "--tasks.novel.use=components.tasks:MultipleChoice",
            f"--tasks.novel.path={self.tiny.folder / 'novel.jsonl'}",
        ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Evaluated:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
            patch.delenv(name, raising=False)
        return Evaluated(tmp_path_factory.mktemp("tasks"))


def test_a_run_evaluates_each_task_at_its_interval_and_all_at_the_end(evaluated):
    rows = task_rows(evaluated.tiny)
    assert [row["step"] for row in rows] == [2, 4, 5]
    novel = {"task_novel_acc", "task_novel_acc_norm", "task_novel_bits_per_byte"}
    shots = {"task_shots_acc", "task_shots_bits_per_byte"}
    assert rows[0].keys() == rows[1].keys() == {"step", "tokens"} | novel
    assert rows[2].keys() == {"step", "tokens"} | novel | shots
    assert rows[0]["task_novel_bits_per_byte"] > rows[2]["task_novel_bits_per_byte"]
    assert {tag for tag, _ in scalars(rows[2])} == {f"tasks/{name}" for name in novel | shots}
    assert "task novel  acc 0." in (evaluated.tiny.directory / "log.txt").read_text()


def test_tasks_change_nothing_in_training(evaluated, tmp_path):
    plain = TinyRun(tmp_path)
    assert plain.launch(*SHORT) == 0
    losses = [[row["loss"] for row in run.rows() if "loss" in row] for run in (plain, evaluated.tiny)]
    assert losses[0] == losses[1]


def test_a_checkpoint_and_its_export_have_the_same_metrics(evaluated):
    result, table = evaluated.result()
    last = task_rows(evaluated.tiny)[-1]
    metrics = {key: value for key, value in last.items() if key.startswith("task_")}
    assert {key: result[key] for key in metrics} == pytest.approx(metrics, rel=1e-6)
    assert (result["task_novel_questions"], result["step"], result["method"]) == (4, 5, "tasks")
    assert [row["task"] for row in table] == ["novel"] * 4 + ["shots"]
    assert [len(row["nats"]) for row in table] == [3, 3, 2, 2, 1]
    assert table[1]["source"].endswith("novel.jsonl:2")
    hf, hf_table = evaluated.result(
        f"--evaluation.checkpoint={evaluated.exported}", "--evaluation.sequence_length=24", *evaluated.on_novel
    )
    assert [row["nats"] for row in hf_table] == [pytest.approx(row["nats"], rel=1e-5) for row in table[:4]]
    assert hf["task_novel_bits_per_byte"] == pytest.approx(result["task_novel_bits_per_byte"], rel=1e-5)
    limited, _ = evaluated.result("--evaluation.limit=2")
    assert limited["task_novel_questions"] == 2


def test_a_task_that_was_lost_to_a_kill_is_evaluated_when_the_run_is_resumed(tiny, capsys):
    add_tasks(tiny)
    assert tiny.launch(*SHORT) == 0
    whole = tiny.rows()
    kept = [row for row in whole if row["step"] < 4 or (row["step"] == 4 and "loss" in row)]
    (tiny.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for path in tiny.directory.glob("checkpoints/step-00000005"):
        path.rename(tiny.folder / "moved")
    assert tiny.launch(*SHORT, "--resume") == 0
    expected = [{key: row[key] for key in row if key.startswith("task_")} for row in whole if row["step"] >= 4]
    found = [{key: row[key] for key in row if key.startswith("task_")} for row in tiny.rows() if row["step"] >= 4]
    assert [row for row in found if row] == [row for row in expected if row]
    assert tiny.launch(*SHORT, "--resume", "--tasks.novel.max_rows=1", "--training.total_tokens=1400") == 0
    assert "tasks.novel.max_rows" in capsys.readouterr().out


def test_a_task_may_define_its_metrics():
    class Margin:
        def questions(self):
            return [Question([Request("Call me", choice) for choice in ("Ishmael", "Ahab")])]

        def metrics(self, answers):
            return {"margin": answers[0].nats[1] - answers[0].nats[0]}

    config = complete_task(Margin())
    assert config.interval_steps is None
    answer = Answer(config.questions()[0], [2.0, 5.0], [False, False])
    assert Task("whale", config, [answer.question], []).metrics([answer]) == {"task_whale_margin": 3.0}


MISTAKES = {
    "an unknown key": (["--tasks.novel.nam=3"], "unknown key in [tasks.novel] of components.tasks:MultipleChoice"),
    "no path": (["--tasks.more.use=components.tasks:Cloze"], "tasks.more"),
    "another component": (["--tasks.more.use=components.batch:Constant"], "it lacks questions()"),
    "a bad name": (["bad_name.toml"], "tasks\n    'a b': the name must consist of letters"),
    "no rows": (["--tasks.novel.path=empty.jsonl"], "empty.jsonl has no rows"),
    "a bad row": (["--tasks.novel.path=bad.jsonl"], "bad.jsonl:2: `answer` is 7; expected one of its choices"),
    "too many examples": (["--tasks.novel.num_fewshot=4"], "4 is more than the 3 other rows"),
    "a missing file": (["--tasks.novel.path=nowhere.jsonl"], "nowhere.jsonl does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_at_the_start_and_in_the_dry_run(tiny, capsys, monkeypatch, name):
    add_tasks(tiny)
    monkeypatch.chdir(tiny.folder)
    (tiny.folder / "empty.jsonl").touch()
    (tiny.folder / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[0], "answer": 7}))
    (tiny.folder / "bad_name.toml").write_text(
        'extends = ["tiny.toml"]\n[tasks."a b"]\nuse = "components.tasks:PythonCompletion"\n'
    )
    arguments, message = MISTAKES[name]
    recipe = [] if arguments[0].endswith(".toml") else [str(tiny.recipe)]
    for dry in ([], ["--dry-run=cpu"]):
        capsys.readouterr()
        status = launch_here([*recipe, *SHORT, *arguments, *dry])
        said = "".join(capsys.readouterr())
        assert message in said and "Traceback" not in said
        assert status == (0 if dry and name == "a missing file" else 2), "a file may be on another machine"
        assert said.count(message) == 1
    assert not (tiny.directory / "checkpoints").exists()


def test_mistakes_of_an_evaluation_are_reported(evaluated, capsys):
    refused = partial(refusal, evaluated.launch, capsys)
    for dry in ([], ["--dry-run"]):
        exported = refused(f"--evaluation.checkpoint={evaluated.exported}", *dry)
        assert "has no [tasks]; add a table [tasks.NAME]" in exported
        assert 'only valid with evaluation.method = "tasks"' in refused(
            "--evaluation.method=packed", *evaluated.on_novel, *dry
        )
        missing = refused("--tasks.a.use=components.tasks:Cloze", "--tasks.a.path=nowhere", *dry)
        assert "tasks.a.path" in missing and "nowhere does not exist" in missing


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: docs/tasks.md")
def test_lm_evaluation_harness_computes_the_same(evaluated):
    folder = evaluated.tiny.folder / "harness"
    folder.mkdir()
    (folder / "novel.yaml").write_text(
        f"task: novel\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {evaluated.tiny.folder / 'novel.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    model = f"pretrained={evaluated.exported},dtype=float32,max_length=24"
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "novel", "--device", "cpu",
         "--include_path", folder, "--log_samples", "--output_path", folder / "out"],
        check=True,
    )  # fmt: skip
    (samples,) = folder.glob("out/*/samples_novel_*.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    length = [f"--evaluation.checkpoint={evaluated.exported}", "--evaluation.sequence_length=24"]
    from_export = ["--tasks.novel.use=components.tasks:MultipleChoice", f"--tasks.novel.path={samples}"]
    for tasks in (evaluated.on_novel, from_export):
        result, table = evaluated.result(*length, *tasks)
        for row, sample in zip(table, theirs, strict=True):
            assert row["nats"] == pytest.approx([-float(nats) for nats, _ in sample["filtered_resps"]], rel=1e-5)
        for metric in ("acc", "acc_norm"):
            assert result[f"task_novel_{metric}"] == sum(sample[metric] for sample in theirs) / len(theirs)
