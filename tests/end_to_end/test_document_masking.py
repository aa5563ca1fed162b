"""`document_masking = true`: runs and evaluations give the results of every document alone."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from components.data.loader import MicroBatchLoader
from components.tokenizers import Bytes
from models.decoder import Decoder
from models.llama import Llama
from recipes import cli
from recipes.config import Override, load
from tests.conftest import TEXT, TinyRun
from tests.end_to_end.test_other_models import MODEL
from tests.end_to_end.test_resume import assert_same_state, tensors, timeless

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

EVALUATE = Path(__file__).resolve().parents[2] / "train_configs" / "evaluate.toml"
LENGTH, END, SEQUENCES = 24, 256, 20
LENGTHS = [3, 40, 2, 70, 9, 24, 23, 15]
"""Characters of the documents, over and over: some fill no sequence, some more than one, some just one."""
WITHIN = "--training.document_masking=true"
INIT_STD = 0.3
"""Weights so large that it shows in the loss what a token attends to."""


class Short(TinyRun):
    """The tiny run on short documents, and 6 steps of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        texts = [TEXT[number * 5 :][:length] for number, length in enumerate(LENGTHS * 4)]
        self.documents = folder / "short.jsonl"
        self.documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.ids = [id for text in texts for id in [*text.encode(), END]]

    def launch(self, *arguments: str) -> int:
        own = [f"--data.path={self.documents}", f"--validation.data.path={self.documents}"]
        own += [
            f"--validation.max_sequences={SEQUENCES}",
            "--training.total_tokens=1300",
            f"--model.init_std={INIT_STD}",
        ]
        return super().launch(*own, *arguments)

    def evaluate(self, *arguments: str) -> dict:
        output = self.folder / "result.json"
        keys = {"checkpoint": self.directory, "cache_dir": self.folder / "cache", "limit": SEQUENCES, "output": output}
        given = [f"--evaluation.{key}={value}" for key, value in keys.items()]
        given += ["--evaluation.device=cpu", "--evaluation.precision=float32"]
        assert cli.main([str(EVALUATE), *given, *arguments]) == 0
        return json.loads(output.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Short:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
            patch.delenv(name, raising=False)
        made = Short(tmp_path_factory.mktemp("documents"))
        assert made.launch(WITHIN) == 0
        return made


def model_of(run: Short, checkpoint: Path | None = None) -> Decoder:
    """In float64, attending to whole sequences: as initialized, or as saved."""
    component = load(run.recipe, [Override("model.init_std", str(INIT_STD))]).recipe.model
    assert isinstance(component, Llama)
    model = component.build(vocab_size=257, sequence_length=LENGTH)
    model.init_weights(0)
    if checkpoint is not None:
        saved = tensors(checkpoint)
        model.load_state_dict({name: saved[f"model.{name}"] for name in model.state_dict()})
    return model.double()


def nats(model: Decoder, sequence: list[int]) -> float:
    """Of the targets of one sequence, each document by itself: its end token is the first input of the next."""
    starts = [0, *(place for place, id in enumerate(sequence[1:-1], 1) if id == END), len(sequence) - 1]
    total = 0.0
    with torch.no_grad():
        for first, end in pairwise(starts):
            log_p = model(torch.tensor([sequence[first:end]]))[0].log_softmax(-1)
            total -= float(log_p[range(end - first), sequence[first + 1 : end + 1]].sum())
    return total


def test_the_loss_is_that_of_every_document_alone(run):
    data = load(run.recipe, [Override("data.path", str(run.documents))]).recipe.data
    samples = data.build(
        tokenizer=Bytes().build(), sequence_length=LENGTH, cache_dir=run.folder / "cache", progress=print
    )
    with MicroBatchLoader(samples, seed=0, micro_batch_size=8) as loader:
        (seen,) = loader.next_step(1)
    rows = [[*tokens, labels[-1]] for tokens, labels in zip(seen.tokens.tolist(), seen.labels.tolist(), strict=True)]
    initial = model_of(run)
    expected = sum(nats(initial, row) for row in rows) / (8 * LENGTH)
    assert run.rows()[0]["loss"] == pytest.approx(expected, rel=1e-6)  # float32
    assert any(END in row[1:-1] for row in rows)


def test_validation_and_evaluation_mask_documents_as_the_training_does(run):
    last = [row for row in run.rows() if "val_loss" in row][-1]
    trained = model_of(run, run.checkpoint(last["step"]))
    count = (len(run.ids) - 1) // LENGTH
    starts = [number * count // SEQUENCES * LENGTH for number in range(SEQUENCES)]
    sequences = [run.ids[start : start + LENGTH + 1] for start in starts]
    assert last["val_loss"] == pytest.approx(
        sum(nats(trained, each) for each in sequences) / SEQUENCES / LENGTH, rel=1e-5
    )
    found = run.evaluate()
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert (found["tokens"], found["document_masking"]) == (SEQUENCES * LENGTH, True)
    across = run.evaluate("--evaluation.document_masking=false")
    assert across["document_masking"] is False
    assert across["loss"] != pytest.approx(found["loss"], rel=1e-4), "a test that can fail"
    assert (across["tokens"], across["bytes"]) == (found["tokens"], found["bytes"])


def test_a_document_has_the_same_loss_packed_and_by_itself(tmp_path, run):
    """Evaluation by documents needs no mask: a window begins with the end token, as a document in a sequence does."""
    text, table = tmp_path / "one.txt", tmp_path / "table.jsonl"
    text.write_text(TEXT[:LENGTH])  # and the end token is the last target
    arguments = ["--data.use=components.data:TextFiles", f"--data.path={text}", f"--evaluation.table={table}"]
    found = run.evaluate("--evaluation.method=documents", "--evaluation.sequence_length=25", *arguments)
    ids = [*TEXT[:LENGTH].encode(), END]
    newest = run.checkpoint(max(row["step"] for row in run.rows()))
    before = [ord("x")] * 3  # another document, in the same sequence
    whole = nats(model_of(run, newest), [*before, END, *ids]) - nats(model_of(run, newest), [*before, END])
    assert found["nats"] == pytest.approx(whole, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, run):
    again = Short(tmp_path)
    shutil.copytree(run.directory, again.directory)
    last = max(row["step"] for row in run.rows())
    for later in range(3, last + 1):
        shutil.rmtree(again.checkpoint(later))
    assert again.launch(WITHIN, "--resume", "--checkpoint.interval_steps=none") == 0
    assert timeless(again.rows()) == timeless(run.rows())
    assert_same_state(again.checkpoint(last), run.checkpoint(last))


def test_a_resumed_run_may_change_document_masking_with_a_warning(tmp_path, run, capsys):
    again = Short(tmp_path)
    shutil.copytree(run.directory, again.directory)
    assert again.launch("--resume", "--training.total_tokens=1600") == 0
    assert "training.document_masking was True, is False" in capsys.readouterr().out


def test_unsupported_combinations_are_refused_in_one_message(tiny, run, capsys):
    (tiny.folder / "of_mine.py").write_text(MODEL)
    for arguments, message in {
        ("--model.use=of_mine:Model", WITHIN): "Tagger has no enable_document_masking(first_input)",
        ("--model.use=of_mine:Model", WITHIN, "--dry-run"): "training.document_masking",
        ("--training.document_masking=documents",): "expected true or false",
    }.items():
        assert tiny.launch(*arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
        assert "Traceback" not in captured.err
    both = ["--evaluation.method=documents", "--evaluation.document_masking=true"]
    assert cli.main([str(EVALUATE), f"--evaluation.checkpoint={run.directory}", *both]) == 2
    assert "evaluation.document_masking" in capsys.readouterr().err


def test_data_without_ends_is_warned_about(tiny, capsys):
    np.tile(np.arange(200, dtype=np.uint16), 20).tofile(tiny.folder / "unmarked.bin")
    data = ["--data.use=components.data:TokenFiles", f"--data.path={tiny.folder / 'unmarked.bin'}"]
    short = ["--training.total_tokens=384", "--validation=none", "--checkpoint.interval_steps=none"]
    assert tiny.launch(*data, *short, WITHIN) == 0
    assert "none of 56 sampled sequences contains the id 256" in capsys.readouterr().out
