"""A model trained with a start token is evaluated and prompted with it, as `transformers` does with its export."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from components.token_ids import first_input
from recipes import cli
from recipes.config import load
from tests.components.tokenizers.test_tokenizer_json import write_byte_tokenizer
from tests.conftest import TinyRun
from tools import export_hf, generate, inspect_data

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

CONFIG = Path(__file__).resolve().parents[2] / "train_configs" / "evaluate.toml"
LENGTH, STRIDE, END, START = 24, 7, 256, 257
TEXTS = ["Ça: it was the best of times, 鯨 and 🐋 it was the worst of times.", "I", "Call me Ishmael. " * 4]


class Trained:
    """A run with start tokens and document masking, its export, and other text."""

    def __init__(self, folder: Path) -> None:
        self.tiny = TinyRun(folder)
        self.keys = [
            "--tokenizer.use=components.tokenizers:TokenizerJson", "--tokenizer.end_of_document=</s>",
            f"--tokenizer.path={write_byte_tokenizer(folder, single='<s> $A')}",
            "--training.document_masking=true", "--checkpoint.interval_steps=100",
        ]  # fmt: skip
        for number in range(40):
            (folder / "text" / f"short-{number}.txt").write_text(f"It is {number}.")
        start = "--tokenizer.start_of_document=auto"
        assert self.tiny.launch(*self.keys, start, "--training.total_tokens=1500", "--lr_schedule.max_lr=5e-2") == 0
        self.text = folder / "evaluated"
        self.text.mkdir()
        for number, text in enumerate(TEXTS):
            (self.text / f"{number}.txt").write_text(text, encoding="utf-8")
        self.exported = folder / "exported"
        assert export_hf.main([str(self.tiny.directory), str(self.exported)]) == 0
        self.theirs = transformers.AutoModelForCausalLM.from_pretrained(self.exported, local_files_only=True)

    def evaluate(self, checkpoint: Path, *arguments: str) -> dict:
        output = self.tiny.folder / "result.json"
        keys = [f"checkpoint={checkpoint}", f"cache_dir={self.tiny.folder / 'cache'}", f"output={output}"]
        keys += ["device=cpu", "precision=float32", f"sequence_length={LENGTH}"]
        data = ["--data.use=components.data:TextFiles", f"--data.path={self.text}"]
        assert cli.main([str(CONFIG), *(f"--evaluation.{key}" for key in keys), *data, *arguments]) == 0
        return json.loads(output.read_text())

    def nats(self, inputs: list[int], targets: list[int]) -> list[float]:
        with torch.no_grad():
            log_p = self.theirs(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        return (-log_p[range(len(targets)), targets]).tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
            patch.delenv(name, raising=False)
        return Trained(tmp_path_factory.mktemp("start"))


def check(found: dict, nats: list[float], text_bytes: int) -> None:
    assert (found["tokens"], found["bytes"]) == (len(nats), text_bytes)
    assert found["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize("source", ["run", "export"])
def test_documents_begin_with_it_and_it_is_not_counted(trained, source, capsys):
    nats = []
    for text in TEXTS:
        document = [*text.encode(), END]
        inputs = [START, *document[:-1]]
        for target, id in enumerate(document):
            end = min(LENGTH + max(0, math.ceil((target + 1 - LENGTH) / STRIDE)) * STRIDE, len(document))
            context = [START, *inputs[max(0, end - LENGTH) + 1 : target + 1]]
            nats.append(trained.nats(context, [*context[1:], id])[-1])
    checkpoint = trained.tiny.directory if source == "run" else trained.exported
    how = ["--evaluation.method=documents", f"--evaluation.stride={STRIDE}"]
    found = trained.evaluate(checkpoint, *how)
    assert "documents begin with '<s>' (id 257), which is not counted" in capsys.readouterr().out
    check(found, nats, sum(len(text.encode()) for text in TEXTS))
    without = trained.evaluate(checkpoint, *how, "--evaluation.add_special_tokens=false")
    assert "documents begin" not in capsys.readouterr().out
    assert (without["tokens"], without["bytes"]) == (found["tokens"], found["bytes"])
    assert without["loss"] != pytest.approx(found["loss"], rel=1e-4), "a test that can fail"


@pytest.mark.parametrize("masked", [True, False])
def test_packed_text_holds_it_and_masks_documents_from_it(trained, masked):
    stream = [id for text in TEXTS for id in (START, *text.encode(), END)]
    nats, text_bytes = [], 0
    for first in range(0, len(stream) - LENGTH, LENGTH):
        given = stream[first : first + LENGTH + 1]
        starts = [0, *(place for place, id in enumerate(given[1:-1], 1) if id == START and masked), LENGTH]
        for begin, end in pairwise(starts):
            targets = given[begin + 1 : end + 1]
            each = trained.nats(given[begin:end], targets)
            nats += [nat for nat, target in zip(each, targets, strict=True) if target != START]
        text_bytes += sum(id < END for id in given[1:])
    own = [] if masked else ["--evaluation.document_masking=false"]  # the run masks them
    check(trained.evaluate(trained.tiny.directory, *own), nats, text_bytes)
    if not masked:
        check(trained.evaluate(trained.exported), nats, text_bytes)


def test_prompts_begin_with_it_as_those_of_transformers(trained, tmp_path, capsys):
    prompts = ["It was the best of ", "I", "Some years ago, never mind how ", "Ça"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.exported, local_files_only=True)

    def written(source: Path, *options: str) -> list[str]:
        arguments = [str(source), "--greedy", "--json", "--max-tokens=12", "--precision=float32", *options]
        capsys.readouterr()
        assert generate.main(arguments) == 0
        out, err = capsys.readouterr()
        assert ("note: prompts begin with '<s>' (id 257)" in err) == ("--no-special-tokens" not in options)
        return [json.loads(line)["text"] for line in out.splitlines()]

    expected = {True: [], False: []}
    for added in expected:
        for prompt in [*prompts, ""] if added else prompts:
            given = tokenizer(prompt, return_tensors="pt", add_special_tokens=added)
            assert (given["input_ids"][0, 0] == START) == added
            ids = trained.theirs.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
            expected[added].append(tokenizer.decode(ids[ids != END]))
    assert expected[True][:-1] != expected[False], "a test that can fail"
    file = f"--prompts={tmp_path / 'prompts.txt'}"
    for source in (trained.tiny.directory, trained.exported):
        assert written(source, file) == expected[True][:-1]
    assert written(trained.exported) == expected[True][-1:], "without a prompt, a new document"
    assert written(trained.tiny.directory, file, "--no-special-tokens") == expected[False]


def test_training_data_begins_documents_with_it_where_the_key_is_set(trained, tmp_path, capsys):
    def prepared(*keys: str) -> tuple:
        recipe = load(trained.tiny.recipe, cli.parse_arguments(["x", *trained.keys, *keys]).overrides).recipe
        tokenizer = recipe.tokenizer.build()
        dataset = recipe.data.build(tokenizer=tokenizer, sequence_length=8, cache_dir=tmp_path, progress=print)
        lengths = dataset.document_lengths()
        ends = lengths[:, 0].cumsum()
        ids = dataset.tokens(0, int(ends[-1])).tolist()
        return tokenizer, dataset, lengths, [ids[end - count : end] for end, count in zip(ends, lengths[:, 0])]  # noqa: B905

    plain, dataset, lengths, documents = prepared()
    started, dataset_2, lengths_2, documents_2 = prepared("--tokenizer.start_of_document=<s>")
    assert documents_2 == [[START, *ids] for ids in documents]
    assert lengths_2[:, 1].tolist() == lengths[:, 1].tolist(), "bytes of text"
    assert dataset.directory != dataset_2.directory and plain.fingerprint != started.fingerprint
    assert (first_input(plain), first_input(started)) == (END, START)
    *_, same = prepared("--tokenizer.start_of_document=</s>")
    assert same == documents, "the end token precedes every document already"
    assert inspect_data.main([str(trained.tiny.directory / "config.toml"), "--step=2"]) == 0
    shown = capsys.readouterr().out
    assert f"{inspect_data.DOUBLE_BAR}<s>" in shown and f"{inspect_data.DOUBLE_BAR}</s>" not in shown
