"""tools/generate writes what `transformers` does, the same for a prompt alone or in a batch, and repeats it by seed."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from components.generation import Sampling, generate_tokens
from recipes.trained_model import load_pretrained
from tests.conftest import TinyRun
from tests.processes import call_in_ranks
from tests.tools.test_export_hf import MODELS, TOKENIZER, trained
from tools import export_hf, generate, import_hf

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

PROMPTS = ["It was the best of ", "I", "Some years ago, never mind how "]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run that no test changes."""
    tiny = TinyRun(tmp_path_factory.mktemp("generate"))
    trained(tiny, "--model.max_sequence_length=50", "--run.seed=3")  # greedy texts that differ
    return tiny.directory


@pytest.fixture
def run_tool(capsys):
    """Return a function that runs the tool and returns (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = generate.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def greedy_of_transformers(directory: Path, prompt: str, tokens: int) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    given = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["bytes, grouped heads", "all at once"])
def test_greedy_is_what_transformers_generates_from_the_export(tiny, run_tool, name):
    trained(tiny, *MODELS[name])
    exported = tiny.folder / "exported"
    assert export_hf.main([str(tiny.directory), str(exported)]) == 0
    expected = greedy_of_transformers(exported, PROMPTS[0], 60)
    assert len(set(expected)) > 8, "else it says little"
    for source in (tiny.directory, max((tiny.directory / "checkpoints").iterdir()), exported):
        status, out, _ = run_tool(source, PROMPTS[0], "--greedy", "--max-tokens", 60, "--precision", "float32")
        assert (status, out) == (0, expected + "\n"), source


def test_greedy_is_what_transformers_generates_from_a_checkpoint_of_others(reference, tmp_path):
    """The checkpoint has no tokenizer, so ids are compared."""
    directory = tmp_path / "imported"
    assert import_hf.main([str(reference("checkpoints/tiny-random-llama")), str(directory)]) == 0
    found = load_pretrained(directory)
    model = found.component.build(vocab_size=found.vocab_size, sequence_length=64)
    found.load_weights(model, single_process=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    given = torch.randint(found.vocab_size, (9,), generator=torch.Generator().manual_seed(0))
    expected = theirs.generate(given[None], attention_mask=torch.ones(1, 9), max_new_tokens=40, do_sample=False)
    model.use_mkldnn_linear()
    steps = generate_tokens(
        model, [given.tolist()], Sampling(temperature=0.0), torch.zeros(1, 40, dtype=torch.float64),
        end=2, vocab_size=found.vocab_size, device=torch.device("cpu"),
    )  # fmt: skip
    written = [ids[0] for ids in steps]
    assert written == [id for id in expected[0, 9:].tolist() if id != 2]
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        found.load_tokenizer()


@pytest.mark.parametrize("how", [["--greedy"], ["--temperature=1.3", "--top-k=40", "--top-p=0.95", "--seed=5"]])
def test_a_batch_gives_what_its_prompts_give_alone_and_a_seed_is_repeated(run, run_tool, tmp_path, how):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (*PROMPTS, "")))
    together = [run, "--prompts", prompts, "--json", "--max-tokens=40", *how]
    status, out, _ = run_tool(*together)
    assert status == 0
    assert run_tool(*together)[1] == run_tool(*together, "--batch=3")[1] == out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == [*PROMPTS, ""]
    assert len({row["text"] for row in rows}) == 4
    for number, row in enumerate(rows):
        own = [*how[:-1], f"--seed={5 + number}"] if len(how) > 1 else how
        _, alone, _ = run_tool(run, row["prompt"], "--json", "--max-tokens=40", *own)
        assert json.loads(alone) == row
        assert row["tokens"] == min(40, 50 - max(1, len(row["prompt"]))), "no further than its sequences go"
    if len(how) > 1:
        assert run_tool(*together, "--seed=6")[1] != out


def generate_in_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=2)
    for number, arguments in enumerate(json.loads((folder / "arguments.json").read_text())):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = generate.main(arguments)
        (folder / f"{number}-{rank}.json").write_text(json.dumps([status, out.getvalue(), err.getvalue()]))
    dist.destroy_process_group()


def test_two_processes_write_what_one_does(run, run_tool, tmp_path):
    """By context parallelism; every error is reported once."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (*PROMPTS, "")))
    commands = [
        [run, "--prompts", prompts, "--json", "--max-tokens=20", "--greedy"],
        [run, PROMPTS[0], "--max-tokens=20", "--temperature=1.3", "--seed=5"],
        [tmp_path / "nowhere", "x"],
        [run, "--prompts=-"],
    ]
    commands = [[str(part) for part in (*command, "--device=cpu", "--precision=float32")] for command in commands]
    (tmp_path / "arguments.json").write_text(json.dumps(commands))
    call_in_ranks(generate_in_ranks, tmp_path, 2)
    for number, command in enumerate(commands):
        status, out, err = json.loads((tmp_path / f"{number}-0.json").read_text())
        assert json.loads((tmp_path / f"{number}-1.json").read_text()) == [status, "", ""]
        if command[1] == "--prompts=-":
            assert (status, out) == (2, "") and "cannot all read standard input" in err
        else:
            assert (status, out, err) == run_tool(*command)


def test_it_stops_where_the_document_ends(run, run_tool, monkeypatch):
    _, whole, _ = run_tool(run, "It was", "--greedy", "--max-tokens=30", "--json")
    text = json.loads(whole)["text"]
    encoder = type(load_pretrained(run).tokenizer.build())
    monkeypatch.setattr(encoder, "end_of_document", ord(text[9]))
    status, out, _ = run_tool(run, "It was", "--greedy", "--max-tokens=30", "--json")
    expected = text[: text.index(text[9])]
    assert (status, json.loads(out)) == (
        0,
        {"prompt": "It was", "text": expected, "tokens": len(expected), "end": "end_of_document"},
    )


def test_characters_stream_out_whole(run, run_tool, monkeypatch):
    writes = []
    monkeypatch.setattr(generate, "emit", writes.append)
    forced = iter("🐋x鯨".encode())
    monkeypatch.setattr(Sampling, "choose", lambda self, logits, uniform: torch.tensor([next(forced)]))
    assert run_tool(run, "a", "--max-tokens=8")[0] == 0
    assert [written for written in writes if written] == ["a", "🐋", "x", "鯨", "\n"]


def test_several_prompts_and_standard_input(run, run_tool, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    status, out, _ = run_tool(run, "--prompts=-", "--greedy", "--max-tokens=5")
    parts = out.split("--- ")
    assert status == 0
    assert [part[:5] for part in parts[1:]] == ["1\none", "2\ntwo"]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_only_the_end_of_a_line_ends_a_prompt(tmp_path, name):
    prompts = ["one\u2028still one", "two\x0cthe same", "three"]
    lines = prompts if name.endswith("txt") else [json.dumps({"prompt": each}, ensure_ascii=False) for each in prompts]
    file = tmp_path / name
    file.write_bytes("\r\n".join([*lines, ""]).encode())
    assert generate.read_prompts(file) == prompts


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_an_interrupt_prints_what_is_generated(run, run_tool, monkeypatch, arguments):
    drawn = iter(b"ab\xf0")

    def choose(self, logits, uniform):
        id = next(drawn, None)
        if id is None:
            raise KeyboardInterrupt
        return torch.tensor([id])

    monkeypatch.setattr(Sampling, "choose", choose)
    status, out, err = run_tool(run, "It", *arguments)
    assert (status, err) == (
        130,
        "note: the model was trained on sequences of 24 tokens; quality beyond that is untested\n",
    )
    if arguments:
        assert json.loads(out) == {"prompt": "It", "text": "ab\ufffd", "tokens": 3, "end": "interrupted"}
    else:
        assert out == "Itab\ufffd\n"


def test_bad_input_is_reported_with_status_2(tiny, run_tool, monkeypatch):
    def refused(*arguments: object) -> str:
        status, out, err = run_tool(*arguments)
        assert (status, out) == (2, "")
        assert "Traceback" not in err
        return err

    assert "is not a directory" in refused(tiny.folder / "nowhere", "x")
    said = refused(tiny.folder, "x")
    assert "neither a checkpoint nor a run directory with one; it is not a Hugging Face directory either" in said
    trained(tiny, *TOKENIZER, "--model.max_sequence_length=50", "--run.seed=3")  # greedy texts that differ
    run = tiny.directory
    assert "51 tokens; at most 49 leave room" in refused(run, "x\n\t" * 17)
    assert "has no prompt" in refused(run, "--prompts", "/dev/null")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # also where it is closed: a command then finds it empty
    assert refused(run, "--prompts=-") == "standard input has no prompt\n"
    assert "--top-p 2.0; expected" in refused(run, "x", "--top-p=2")
    assert refused(run, "x", "--top-k=0") == "--top-k 0; expected an integer >= 1\n"
    assert "No such file" in refused(run, "--prompts", tiny.folder / "prompts.txt")
    bad = tiny.folder / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    assert "bad.jsonl:2" in refused(run, "--prompts", bad)
    checkpoint = max((run / "checkpoints").iterdir())
    assert "lost.tiktoken does not exist" in refused(run, "x", "--tokenizer", tiny.folder / "lost.tiktoken")
    ranks = Path(TOKENIZER[1].partition("=")[2])
    assert run_tool(run, "x", "--tokenizer", ranks, "--max-tokens=1")[0] == 0
    fewer = tiny.folder / "fewer.tiktoken"
    fewer.write_bytes(b"".join(ranks.read_bytes().splitlines(keepends=True)[:4000]))
    assert "trained with a vocabulary of" in refused(run, "x", "--tokenizer", fewer)
    exported = tiny.folder / "exported"
    assert export_hf.main([str(run), str(exported)]) == 0
    moved = shutil.move(exported / "tokenizer.json", tiny.folder)
    assert "has no tokenizer.json" in refused(exported, "x")
    assert run_tool(exported, "x", "--tokenizer", moved, "--max-tokens=1")[0] == 0
    assert "is not a tokenizer.json" in refused(exported, "x", "--tokenizer", ranks)
    assert "nowhere.json does not exist" in refused(exported, "x", "--tokenizer", tiny.folder / "nowhere.json")
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    assert "is damaged" in refused(run, "x")


@pytest.mark.parametrize(
    "arguments",
    [["x", "--prompts=y"], ["--greedy", "--temperature=1"], ["--batch=0"], ["--max-tokens=0"],
     ["--seed=-1"], ["--seed=99999999999999999999"]],
)  # fmt: skip
def test_contradictory_or_invalid_options_have_status_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["runs/debug", *arguments])
    assert stopped.value.code == 2
