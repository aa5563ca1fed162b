"""Files that are not what they should be: what to do to the folder of a tiny run, and the message it must get."""

from __future__ import annotations

import gzip
import json
import shutil
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

from tests.checkpoints import rewrite_manifest

Spoil = Callable[[Path], list[str]]
"""Changes the folder; returns the arguments."""

BYTES = [f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
TIKTOKEN = ["--tokenizer.use=components.tokenizers:TiktokenFile", "--tokenizer.path=my.tiktoken"]
MINE = ["--data.use=my_data:Mine"]
"""A dataset of the user, in my_data.py."""


def text(content: bytes, name: str = "bad.txt") -> Spoil:
    def spoil(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [f"--data.path={folder / name}"]

    return spoil


def dangling(folder: Path) -> list[str]:
    (folder / "text" / "more").symlink_to(folder / "gone")
    return [f"--data.path={folder / 'text'}"]


def ranks(lines: list[str], pattern: str = "gpt2", *more: str) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        (folder / "my.tiktoken").write_text("".join(lines))
        return [*TIKTOKEN[:1], f"--tokenizer.path={folder / 'my.tiktoken'}", f"--tokenizer.pattern={pattern}", *more]

    return spoil


def dataset(length: str, item: str) -> Spoil:
    """A dataset whose methods return these expressions."""

    def spoil(folder: Path) -> list[str]:
        (folder / "my_data.py").write_text(
            "import torch\n"
            "class Samples:\n"
            f"    def __len__(self): return {length}\n"
            f"    def __getitem__(self, index): return {item}\n"
            "class Mine:\n"
            "    def build(self, *, tokenizer, sequence_length, cache_dir, progress): return Samples()\n"
        )
        return ["--data.use=my_data:Mine"]

    return spoil


def prepared(change: Callable[[Path], object]) -> Spoil:
    """After the text was prepared once; `change` gets the directory of its index."""

    def spoil(folder: Path) -> list[str]:
        change(_index(folder))
        return ["--run.if_exists=replace"]

    return spoil


def shards(change: Callable[[Path], object]) -> Spoil:
    """As `prepared`, but `change` gets each directory with a part of its tokens."""

    def spoil(folder: Path) -> list[str]:
        directory = _index(folder)
        index = json.loads((directory / "index.json").read_text())
        for shard in index["shards"]:
            change(directory.parent / index["store"] / shard)
        return ["--run.if_exists=replace"]

    return spoil


def _index(folder: Path) -> Path:
    (directory,) = (each for each in (folder / "cache").glob("TextFiles-*") if "held" not in _source(each))
    return directory


def _source(directory: Path) -> str:
    return str(json.loads((directory / "index.json").read_text())["source"])


def record(name: str, **entries: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return change


def index(**entries: object) -> Spoil:
    return prepared(record("index.json", **entries))


def checkpoint(change: Callable[[Path], object], *arguments: str) -> Spoil:
    """The only checkpoint of the run; `change` gets it."""

    def spoil(folder: Path) -> list[str]:
        newest, *others = sorted((folder / "run" / "checkpoints").iterdir(), reverse=True)
        for other in others:
            shutil.rmtree(other)
        change(newest)
        return ["--resume", "--training.total_tokens=2000", *arguments]

    return spoil


def unsigned(change: Callable[[Path], object]) -> Spoil:
    """As `checkpoint`, with a manifest that describes the change, which shows only when the file is used."""

    def both(path: Path) -> None:
        change(path)
        rewrite_manifest(path)

    return checkpoint(both)


def state(**entries: object) -> Callable[[Path], None]:
    return record("state.json", **entries)


def cut(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for file in directory.glob(name):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return change


def flip(name: str) -> Callable[[Path], None]:
    """One bit in the middle."""

    def change(directory: Path) -> None:
        for file in directory.glob(name):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)

    return change


def drop(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for file in directory.glob(name):
            file.unlink()

    return change


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


IDS = "torch.full((25,), {}, dtype=torch.int64)"

FRESH: dict[str, tuple[Spoil, str]] = {
    "a link to nothing in a folder of text": (dangling, "more is a link to"),
    "an archive that is called text": (text(b"PK\x03\x04" + bytes(60)), "is not text but a zip file"),
    "text of no bytes": (text(b""), "holds no text"),
    "text of nothing but blanks": (text(b" \n\n \t\n"), "holds no text"),
    "text shorter than a sequence": (text(b"abc"), "one sequence needs"),
    "UTF-16": (text("text".encode("utf-16")), "is UTF-16"),
    "invalid gzip": (text(b"not zipped", "bad.txt.gz"), "is damaged, or is not a .gz file"),
    "gzip that is cut off": (text(gzip.compress(b"abc" * 999)[:-9], "bad.txt.gz"), "is damaged"),
    "invalid JSON lines": (text(b"{\n", "bad.jsonl"), "bad.jsonl:1: expected a JSON object"),
    "JSON lines of numbers": (text(b"3\n", "bad.jsonl"), "bad.jsonl:1: expected a JSON object"),
    "JSON lines without text": (text(b'{"content": "a"}\n', "bad.jsonl"), "no text under text_key"),
    "JSON lines nested without end": (text(b"[" * 100_000, "bad.jsonl"), "bad.jsonl:1"),
    "an empty tokenizer": (ranks([]), "256 single bytes have no rank"),
    "a tokenizer that is not a rank file": (ranks(["hello world\n"]), "my.tiktoken:1: expected"),
    "a tokenizer that lacks bytes": (ranks(BYTES[:-1]), "1 of the 256 single bytes"),
    "a rank given twice": (ranks([*BYTES, "YWI= 255\n"]), "is already on line 256"),
    "a rank beyond all bounds": (ranks([*BYTES, "YWI= 99999999999\n"]), "expected a token and a rank"),
    "a negative rank": (ranks([*BYTES, "YWI= -4\n"]), "expected a token and a rank"),
    "a pattern there is not": (ranks(BYTES, "gpt5"), "'gpt5' is not one of"),
    "a pattern that is not a regular expression": (ranks(BYTES, "(unclosed"), "is not a regular expression"),
    "an end of document that is not a token": (
        ranks(BYTES, "gpt2", "--tokenizer.end_of_document=<end>"),
        "not among special_tokens",
    ),
    "a special token given twice": (
        ranks(BYTES, "gpt2", '--tokenizer.special_tokens=["<|endoftext|>","<|endoftext|>"]'),
        "contains a token twice",
    ),
    "a dataset of no samples": (dataset("0", IDS.format(1)), "samples"),
    "a dataset with an id that is too large": (dataset("9", IDS.format(257)), "token id 257 is outside the vocabulary"),
    "a dataset with a negative id": (dataset("9", IDS.format(-1)), "token id -1 is outside the vocabulary"),
    "a dataset of fractions": (dataset("9", "torch.ones(25)"), "token ids must be integers"),
    "a dataset of short samples": (
        dataset("9", "torch.ones(9, dtype=torch.int64)"),
        "9 token ids per sample; sequence_length = 24 needs 25",
    ),
    "a dataset that cannot be read": (dataset("9", "open('nowhere')"), "nowhere"),
}

AFTER_A_RUN: dict[str, tuple[Spoil, str]] = {
    "a run directory that is in use": (lambda folder: [], "already holds a run"),
    "an index that is gone": (prepared(drop("index.json")), "is missing"),
    "an index that is not JSON": (prepared(write("index.json", "{")), "is damaged or of another version"),
    "an index that is a list": (prepared(write("index.json", "[]")), "is damaged or of another version"),
    "an index of another version": (index(format=99), "is damaged or of another version"),
    "an index of a vocabulary of none": (index(vocab_size=0), "vocab_size"),
    "an index of another text": (index(content="other"), "holds other text"),
    "an index of no shards": (index(shards=[]), "shards"),
    "an index of shards that lie elsewhere": (index(store="../../elsewhere"), "store"),
    "spans that are gone": (prepared(drop("spans.npy")), "is missing"),
    "spans that are cut": (prepared(cut("spans.npy")), "was altered"),
    "spans that were altered": (prepared(flip("spans.npy")), "was altered"),
    "shards of another tokenizer": (shards(record("shard.json", tokenizer="other")), "was made with another tokenizer"),
    "shards of another version": (shards(record("shard.json", format=99)), "is damaged or of another version"),
    "shards whose record is gone": (shards(drop("shard.json")), "is missing"),
    "shards that are gone": (shards(drop("tokens.bin")), "is missing"),
    "shards that are cut": (shards(cut("tokens.bin")), "is truncated"),
    "shards that were altered": (shards(flip("tokens.bin")), "was altered"),
    "documents that are cut": (shards(cut("documents.bin")), "is truncated"),
    "another width": (checkpoint(lambda path: None, "--model.dim=32"), "in the checkpoint"),
    "more layers": (checkpoint(lambda path: None, "--model.layers=3"), "in the checkpoint"),
    "another tokenizer": (checkpoint(lambda path: None, *TIKTOKEN, "--tokenizer.pattern=gpt2"), "in the checkpoint"),
    "another length of sequences": (
        checkpoint(lambda path: None, "--training.sequence_length=12"),
        "in the checkpoint",
    ),
    "a newer format": (checkpoint(state(format=99)), "format 99"),
    "a checkpoint without state": (checkpoint(drop("state.json")), "state.json"),
    "a state that is not JSON": (checkpoint(write("state.json", "{")), "is damaged: state.json"),
    "a state that is a list": (checkpoint(write("state.json", "[]")), "is damaged"),
    "a state that was altered": (checkpoint(state(vocab_size=9)), "is damaged"),
    "tensors that are gone": (checkpoint(drop("*.distcp")), "is missing"),
    "tensors that are cut": (checkpoint(cut("*.distcp")), "were written"),
    "a bit of the tensors": (checkpoint(flip("*.distcp")), "its SHA-256 differs"),
    "a bit of the metadata": (checkpoint(flip(".metadata")), "its SHA-256 differs"),
    "a configuration that was altered": (checkpoint(flip("config.toml")), "its SHA-256 differs"),
    "a manifest that is gone": (checkpoint(drop("manifest.json")), "manifest.json is missing"),
    "a manifest that is not JSON": (checkpoint(cut("manifest.json")), "manifest.json"),
    "a manifest that leads elsewhere": (
        checkpoint(write("manifest.json", json.dumps({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}))),
        "manifest.json",
    ),
    "another vocabulary": (unsigned(state(vocab_size=9)), "trained with a vocabulary of 9"),
    "an invalid clock": (unsigned(state(clock={"step": -1, "samples": 0, "tokens": 0})), "clock.step"),
    "a clock of another run": (unsigned(state(clock={"step": 1, "samples": 1, "tokens": 7})), "7 tokens in 1 samples"),
    "an invalid batch": (unsigned(state(batch=3)), "batch"),
    "invalid noise": (unsigned(state(gradient_noise={"noise": 1})), "state.json"),
    "an invalid guard": (unsigned(state(guard={"mean": "x"})), "state.json"),
    "metadata that is gone": (unsigned(drop(".metadata")), "does not list .metadata"),
    "metadata that is cut": (unsigned(cut(".metadata")), "is not the metadata of a checkpoint"),
    "metadata that is text": (unsigned(write(".metadata", "hello")), "is not the metadata of a checkpoint"),
    "tensors that are cut, unsigned": (unsigned(cut("*.distcp")), "beyond the end"),
    "a configuration that is not TOML": (unsigned(write("config.toml", "= 3")), "config.toml is damaged"),
}
