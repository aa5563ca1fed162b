"""The recipe that evaluates: what `transformers` gives for the same weights and text, worked out independently."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from components.errors import InputError
from components.validation import LossTotals
from recipes import cli
from recipes.evaluate import Evaluate, Evaluation
from recipes.evaluator import document_rows
from tests.conftest import TinyRun, refusal
from tools import export_hf

CONFIG = Path(__file__).resolve().parents[2] / "train_configs" / "evaluate.toml"
LENGTH, STRIDE = 24, 7
TEXTS = ["Ça: it was the best of times, 鯨 and 🐋 it was the worst of times.", "I", "Call me Ishmael. " * 4]


@pytest.mark.parametrize("key", ["output", "table"])
def test_a_file_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(tmp_path, key):
    (tmp_path / "file").touch()
    for path, message in (tmp_path, "is a directory"), (tmp_path / "file" / "x.json", "file is not a directory"):
        evaluation = Evaluation(checkpoint=tmp_path / "missing", method="tasks", **{key: path})
        with pytest.raises(InputError, match=rf"^{key}: .*{message}"):
            Evaluate(evaluation=evaluation).prepare_model()


class Evaluated:
    """A trained run, and evaluations of it on other text."""

    def __init__(self, folder: Path) -> None:
        self.tiny = TinyRun(folder)
        assert self.tiny.launch("--training.total_tokens=1100", "--lr_schedule.max_lr=5e-2") == 0
        self.text = folder / "evaluated"
        self.text.mkdir()
        for number, text in enumerate(TEXTS):
            (self.text / f"{number}.txt").write_text(text, encoding="utf-8")
        self.exported = folder / "exported"
        assert export_hf.main([str(self.tiny.directory), str(self.exported)]) == 0

    def launch(self, *arguments: str) -> int:
        own = [f"--evaluation.checkpoint={self.tiny.directory}", f"--evaluation.cache_dir={self.tiny.folder / 'cache'}"]
        return cli.main([str(CONFIG), *own, "--evaluation.device=cpu", "--evaluation.precision=float32", *arguments])

    def result(self, *arguments: str) -> dict:
        output = self.tiny.folder / "result.json"
        assert self.launch(f"--evaluation.output={output}", *arguments) == 0
        return json.loads(output.read_text())

    @property
    def on_text(self) -> list[str]:
        return ["--data.use=components.data:TextFiles", f"--data.path={self.text}"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Evaluated:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
            patch.delenv(name, raising=False)
        return Evaluated(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def theirs(evaluated):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
    return transformers.AutoModelForCausalLM.from_pretrained(evaluated.exported, local_files_only=True)


def nats_of(model, inputs: list[int], targets: list[int]) -> torch.Tensor:
    """(T,) float64"""
    with torch.no_grad():
        logits = model(torch.tensor([inputs])).logits[0]
    return -logits.double().log_softmax(-1)[range(len(targets)), targets]


def documents() -> list[list[int]]:
    return [[*text.encode(), 256] for text in TEXTS]


@pytest.mark.parametrize("source", ["run", "Hugging Face directory"])
def test_packed_is_what_transformers_computes(evaluated, theirs, source):
    stream = [id for document in documents() for id in document]
    nats, targets = 0.0, []
    for start in range(0, len(stream) - LENGTH, LENGTH):
        given = stream[start : start + LENGTH + 1]
        nats += float(nats_of(theirs, given[:-1], given[1:]).sum())
        targets += given[1:]
    text_bytes = sum(id < 256 for id in targets)
    other = [] if source == "run" else [f"--evaluation.checkpoint={evaluated.exported}"]
    found = evaluated.result(*evaluated.on_text, f"--evaluation.sequence_length={LENGTH}", *other)
    assert (found["tokens"], found["bytes"]) == (len(targets), text_bytes)
    assert found["loss"] == pytest.approx(nats / len(targets), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(targets)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json"])
def test_documents_are_what_transformers_computes_token_by_token(evaluated, theirs, tokenizer):
    """The tokenizer.json of the export is the same tokenizer: it changes nothing."""
    expected = []
    for document in documents():
        inputs, nats = [256, *document[:-1]], 0.0
        for target, id in enumerate(document):
            end = min(LENGTH + max(0, math.ceil((target + 1 - LENGTH) / STRIDE)) * STRIDE, len(document))
            context = inputs[max(0, end - LENGTH) : target + 1]
            nats += float(nats_of(theirs, context, [*context[1:], id])[-1])
        expected.append(nats)
    table = evaluated.tiny.folder / "table.jsonl"
    arguments = [f"--evaluation.table={table}", "--evaluation.method=documents", f"--evaluation.stride={STRIDE}"]
    if tokenizer == "tokenizer.json":
        arguments += ["--tokenizer.use=components.tokenizers:TokenizerJson"]
        arguments += [f"--tokenizer.path={evaluated.exported / 'tokenizer.json'}"]
    found = evaluated.result(*evaluated.on_text, *arguments)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["bytes"] for row in rows] == [len(text.encode()) for text in TEXTS], "the true bytes"
    assert [row["nats"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(sum(expected) / sum(map(len, documents())), rel=1e-5)
    in_all = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / in_all, rel=1e-5)


def test_the_result_of_a_broken_model_is_still_json(tmp_path):
    output, table = tmp_path / "result.json", tmp_path / "table.jsonl"
    keys = Evaluation(checkpoint=tmp_path, method="documents", output=output, table=table)
    rows = [LossTotals(math.nan, 3, 2), LossTotals(1.0, 1, 0)]
    about = {"checkpoint": "broken", "data": "text"}
    Evaluate(evaluation=keys).write_files({**about, **rows[0].metrics(), **asdict(rows[0])}, document_rows(rows))
    written = [output.read_text(), *table.read_text().splitlines()]
    found = [json.loads(text, parse_constant=pytest.fail) for text in written]
    assert [row["loss"] for row in found] == [None, None, 1.0]
    assert found[2]["bits_per_byte"] is None


def test_without_data_it_is_the_validation_of_the_run(evaluated):
    """Of 3 sequences, as the recipe of the tiny run has it."""
    logged = [row for row in evaluated.tiny.rows() if "val_loss" in row][-1]
    found = evaluated.result("--evaluation.limit=3")
    assert found["loss"] == pytest.approx(logged["val_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(logged["val_bits_per_byte"], rel=1e-6)
    assert found["step"] == logged["step"]


def test_mistakes_are_reported_in_one_message(evaluated, capsys):
    refused = partial(refusal, evaluated.launch, capsys)
    for dry in ([], ["--dry-run"]):
        assert "is not a directory" in refused("--evaluation.checkpoint=nowhere", *dry)
        assert 'only valid with method = "documents"' in refused("--evaluation.stride=3", *dry)
        long = refused("--evaluation.method=documents", "--evaluation.stride=25", *dry)
        assert "evaluation.stride" in long and "more than sequence_length = 24" in long
        assert "max_sequence_length: 2048 is below" in refused("--evaluation.sequence_length=4096", *dry)
    assert "--resume only applies to training" in refused("--resume")
    assert "has no [validation] data" in refused(f"--evaluation.checkpoint={evaluated.exported}")
    assert "trained with a vocabulary of 257" in refused(
        "--tokenizer.use=components.tokenizers:TiktokenFile", "--tokenizer.pattern=cl100k",
        f"--tokenizer.path={CONFIG.parent.parent / 'assets' / 'tokenizers' / 'stdlib-4096.tiktoken'}",
    )  # fmt: skip
