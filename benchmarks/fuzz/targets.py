"""The readers that the fuzzer calls, and one execution: a mutation of a file of the corpus is read or refused."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.fuzz.mutator import mutate
from components.checkpoint import list_checkpoints, load_tensors
from components.checkpoint.manifest import MANIFEST, run_of, write_manifest
from components.checkpoint.metadata_unpickler import read_index
from components.checkpoint.remote import RemoteCheckpoints, fetch_model, restore_run
from components.data import HuggingFaceDataset, TextFiles, TokenFiles
from components.data.document import ReadStats
from components.data.file_hash_cache import HASH_CACHE_FILE, FileHashCache
from components.distributed.launcher import WorkerAgent
from components.distributed.membership import parse_launch
from components.environment import record_environment
from components.errors import InputError
from components.metrics.background import PositionFile
from components.metrics.jsonl import last_rows, read_rows
from components.metrics.wandb_offline import read_steps
from components.run_directory import RunDirectory
from components.safetensors import PickledWeights, Weights
from components.storage import local_copy
from components.storage.address import RemoteDirectory, local_copy_of
from components.tasks import Cloze, MultipleChoice
from components.tokenizers import Bytes, TiktokenFile, TokenizerJson
from models.hf.architectures import architecture_from_config
from recipes import cli
from recipes.config import ConfigError, load
from recipes.critical_batch.branches import read_branch_point
from recipes.trained_model import load_pretrained
from tools.generate import read_prompts
from tools.import_hf import import_model
from tools.plot import heat_maps, read_run
from tools.sweep.outcome import measure
from tools.sweep.runner import Results

REFUSALS = (ValueError, OSError, ConfigError)
"""What readers raise for bad input, and their callers report as one message."""


@dataclass(frozen=True)
class Target:
    """A reader of files that may be damaged or hostile."""

    read: Callable[[Path, Path], object]
    """Called with the directory of the files and the path of the one that was mutated."""
    corpus: str
    """The directory of the corpus with the files of the reader."""
    mutated: Sequence[str] = ("*",)
    """Patterns of the paths of the files to mutate."""
    seal: Callable[[Path], None] | None = None
    """Writes the checksums of the files in the directory, as whoever forges them would: for half of the mutations."""
    names_file: bool = True
    """Whether the message of an error must name a file."""


class Executions:
    """Executes a target on mutations of its files, in a directory of its own."""

    def __init__(self, name: str, corpus: Path, folder: Path) -> None:
        """`name` is a key of TARGETS, `folder` is written anew for each execution."""
        self.name, self.folder, self.target, self._corpus = name, folder, TARGETS[name], corpus
        source = corpus / self.target.corpus
        self._files = {
            path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()
        }
        patterns = self.target.mutated
        self.originals = sorted(file for file in self._files if any(fnmatch.fnmatch(file, each) for each in patterns))
        """Names of the files that are mutated."""
        if not self.originals:
            raise ValueError(f"{source} has none of {', '.join(patterns)}")

    def mutation(self, number: int) -> tuple[str, bytes, bool]:
        """Return the file, the content and whether checksums are rewritten, of an execution: the same every time."""
        random = Random(f"{self.name} {number}")
        file = random.choice(self.originals)
        return file, mutate(self._files[file], random), random.random() < 0.5

    def run(self, number: int) -> bool:
        """Return whether the reader accepted mutation `number`. Raises what it should not have raised."""
        file, content, is_sealed = self.mutation(number)
        return self.read(file, content, is_sealed=is_sealed)

    def read(self, file: str, content: bytes, *, is_sealed: bool = False) -> bool:
        """Return whether the reader accepted `content` in place of `file`. Raises what it should not have raised."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name, original in self._files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if name == file else original)
        if is_sealed and self.target.seal is not None:
            with suppress(Exception):  # the mutated file has no place for a checksum
                self.target.seal(self.folder)
        try:
            self.target.read(self.folder, self.folder / file)
        except REFUSALS as error:
            self._check_message(error)
            return False
        return True

    def _check_message(self, error: Exception) -> None:
        """Raise AssertionError unless the message of a refusal says where the problem is."""
        has_place = isinstance(error, (ConfigError, InputError)) or not self.target.names_file
        if not has_place and str(self.folder) not in str(error) and str(self._corpus) not in str(error):
            raise AssertionError(f"a refusal that names no file: {type(error).__name__}: {error}") from error


def _read_checkpoint(folder: Path, file: Path) -> None:
    trained = load_pretrained(folder)
    model = trained.build(8).to_empty(device="cpu")
    trained.load_weights(model, single_process=True)
    trained.load_tokenizer()


def _seal_checkpoint(folder: Path) -> None:
    run = run_of(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder, ranks=0, run=run or "")


def _read_tensors(folder: Path, file: Path) -> None:
    names = set(read_index(folder).entries)
    wanted = {"model": {"tok_embeddings.weight": torch.zeros(257, 16)}}
    load_tensors(folder, wanted, no_dist=True)
    assert names


def _resume(folder: Path, file: Path) -> None:
    """Continue the run for a step."""
    settings = ["--training.total_tokens=1000", "--checkpoint.interval_steps=1000"]
    if cli.main([str(folder / "mine.toml"), "--resume", *settings]):
        raise ConfigError([])


def _seal_run(folder: Path) -> None:
    for checkpoint in list_checkpoints(folder / "run" / "checkpoints"):
        _seal_checkpoint(checkpoint)


def _read_recipe(folder: Path, file: Path) -> None:
    load(file, cwd=folder).to_toml()


def _read_model_config(folder: Path, file: Path) -> None:
    config = load_pretrained(file.parent)
    config.build(8)
    _, architecture = architecture_from_config(json.loads(file.read_bytes()))
    with torch.device("meta"):
        model: Any = config.component.build(vocab_size=config.vocab_size, sequence_length=8)
    if architecture.matches(model):
        with suppress(ValueError):  # such as head dimensions that transformers does not have
            architecture.hf_config(model)


def _read_safetensors(folder: Path, file: Path) -> None:
    with Weights(folder) as weights:
        for name in weights.specs:
            weights.read(name)


def _read_pickles(folder: Path, file: Path) -> None:
    weights = PickledWeights(folder)
    for name in weights.specs:
        weights.read(name).sum()


def _import_model(folder: Path, file: Path) -> None:
    import_model(folder, folder.parent / f"{folder.name}-imported", max_shard_bytes=10**9, force=True)


def _read_tokenizer_json(folder: Path, file: Path) -> None:
    for start in (None, "auto"):
        encoder = TokenizerJson(path=folder / "tokenizer.json", start_of_document=start).build()
        _encode(encoder)


def _read_ranks(folder: Path, file: Path) -> None:
    _encode(TiktokenFile(path=file, pattern="gpt2", special_tokens=["<|endoftext|>"]).build())


def _encode(encoder: Any) -> None:
    (ids,) = encoder.encode_batch(["abé he"])
    assert all(0 <= int(number) < encoder.vocab_size for number in ids)
    encoder.decode([int(number) for number in ids])
    assert len(encoder.byte_lengths) == encoder.vocab_size


def _read_text(folder: Path, file: Path) -> None:
    for document in TextFiles(path=file, document_separator="Call").documents(ReadStats()):
        document.text.encode("utf-8", "surrogatepass")


def _read_hub(folder: Path, file: Path) -> None:
    (folder / "data").mkdir()
    shutil.copy(file, folder / "data" / f"train{''.join(file.suffixes)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for document in HuggingFaceDataset(path=f"hf://{folder / 'data'}/default/train").documents(ReadStats()):
        document.text.encode("utf-8", "surrogatepass")


def _read_token_file(folder: Path, file: Path) -> None:
    tokenizer: Any = SimpleNamespace(vocab_size=300, end_of_document=0)
    path = file.with_suffix(".bin") if file.suffix == ".idx" else file
    data = TokenFiles(path=path).build(
        tokenizer=tokenizer, sequence_length=8, cache_dir=folder, progress=lambda line: None
    )
    for index in {0, len(data) // 2, len(data) - 1}:
        data[index]
        data.describe(index)


def _read_prepared(folder: Path, file: Path) -> None:
    data = TextFiles(path=folder / "text").build(
        tokenizer=Bytes().build(), sequence_length=24, cache_dir=folder / "cache", progress=lambda line: None
    )
    for index in {0, len(data) - 1}:
        data[index]
        data.describe(index)


def _seal_prepared(folder: Path) -> None:
    """Write the checksums of the shards and of the spans into their records."""
    for record in (folder / "cache").rglob("*.json"):
        content = json.loads(record.read_bytes())
        for key, name in (
            ("tokens_sha256", "tokens.bin"),
            ("documents_sha256", "documents.bin"),
            ("spans_sha256", "spans.npy"),
        ):
            if key in content:
                content[key] = hashlib.sha256((record.parent / name).read_bytes()).hexdigest()
        record.write_text(json.dumps(content), encoding="utf-8")


def _read_hash_cache(folder: Path, file: Path) -> None:
    with FileHashCache(file) as hashes:
        assert hashes.sha256(folder / "a.txt") == hashlib.sha256((folder / "a.txt").read_bytes()).hexdigest()


def _read_run_directory(folder: Path, file: Path) -> None:
    run = RunDirectory(folder)
    run.owned_by("launch")
    run.claim()
    run.record_owner("0123456789abcdef", ["launch"])
    assert run.owned_by("launch")


def _read_environment(folder: Path, file: Path) -> None:
    record_environment(file, {"torch": "2"}, after_step=3)
    assert json.loads(file.read_bytes())[-1] == {"after_step": 3, "torch": "2"}


def _read_metrics(folder: Path, file: Path) -> None:
    last_rows(file)
    read_rows(file)
    read_run(folder)
    heat_maps(folder, None)


def _read_sweep_metrics(folder: Path, file: Path) -> None:
    str(measure(RunDirectory(folder), None, curve_points=5))


def _read_results(folder: Path, file: Path) -> None:
    for _, outcome in Results(file).items():
        str(outcome)


def _read_position(folder: Path, file: Path) -> None:
    position = PositionFile(file)
    position.save(position.read().next(3))
    position.close()


def _read_exits(folder: Path, file: Path) -> None:
    agent: Any = SimpleNamespace(_exit_dir=folder)
    WorkerAgent._read_reported_exits(agent)


def _read_remote(folder: Path, file: Path) -> None:
    """Resume from remote checkpoints, and read them as a model, through local copies that are written first."""
    os.environ["HOME"] = str(folder / "home")
    local_copy._fetch_once.cache_clear()
    address = f"file://{folder / 'remote'}"
    fetch_model(local_copy_of(Path(address)) or Path())
    restore_run(RemoteCheckpoints(RemoteDirectory(address)), folder / "resumed", None)


def _read_copy_record(folder: Path, file: Path) -> None:
    """Fetch a file twice, with a mutated record of the first time."""
    os.environ["HOME"] = str(folder / "home")
    copy = local_copy_of(Path(f"file://{folder}/a.txt")) or Path()
    local_copy._fetch_once.cache_clear()
    local_copy.fetch(copy)
    (record,) = (folder / "home").rglob("*.json")
    record.write_bytes(file.read_bytes())
    local_copy._fetch_once.cache_clear()
    local_copy.fetch(copy)
    assert copy.read_bytes() == (folder / "a.txt").read_bytes()


def _read_rows(folder: Path, file: Path) -> None:
    task = Cloze if file.name == "clozes.jsonl" else MultipleChoice
    task(path=file).questions()


CHECKPOINT = ("state.json", "manifest.json", "config.toml", ".metadata", "*.distcp")
TARGETS: dict[str, Target] = {
    "recipe": Target(_read_recipe, "recipes"),
    "checkpoint": Target(_read_checkpoint, "checkpoint", CHECKPOINT, _seal_checkpoint),
    "checkpoint state": Target(_read_checkpoint, "checkpoint", ("state.json", "config.toml"), _seal_checkpoint),
    "checkpoint metadata": Target(_read_tensors, "checkpoint", (".metadata",)),
    "checkpoint tensors": Target(_read_tensors, "checkpoint", ("*.distcp",)),
    "resumed run": Target(_resume, "training", ("run/*",), _seal_run),
    "remote checkpoint": Target(_read_remote, "remote", ("remote/*",)),
    "record of a local copy": Target(_read_copy_record, "records", ("copy.json",)),
    "model": Target(_read_checkpoint, "model"),
    "model config": Target(_read_model_config, "model_configs"),
    "safetensors": Target(_read_safetensors, "model", ("*.safetensors",)),
    "safetensors index": Target(_read_safetensors, "sharded_model", ("*.index.json", "*.safetensors")),
    "pickled weights": Target(_read_pickles, "pickled_model", ("*.bin",)),
    "imported model": Target(_import_model, "sharded_model"),
    "tokenizer.json": Target(_read_tokenizer_json, "tokenizers", ("*.json",)),
    "tiktoken": Target(_read_ranks, "tokenizers", ("*.tiktoken",)),
    "text": Target(_read_text, "texts"),
    "text of the Hub": Target(_read_hub, "texts", ("*.jsonl", "*.parquet", "*.txt", "*.csv", "*.json")),
    "token files": Target(_read_token_file, "token_files"),
    "prepared data": Target(_read_prepared, "prepared", ("cache/*",), _seal_prepared),
    "cache of hashes": Target(_read_hash_cache, "records", (HASH_CACHE_FILE,)),
    "run.json": Target(_read_run_directory, "records", ("run.json",)),
    "environment.json": Target(_read_environment, "records", ("environment.json",)),
    "metrics": Target(_read_metrics, "records", ("metrics.jsonl",)),
    "metrics of a sweep": Target(_read_sweep_metrics, "records", ("metrics.jsonl",)),
    "results of a sweep": Target(_read_results, "records", ("results.jsonl",)),
    "position of a writer": Target(_read_position, "records", ("position.json",)),
    "W&B file": Target(lambda folder, file: list(read_steps(file)), "records", ("*.wandb",)),
    "branch point": Target(lambda folder, file: read_branch_point(file), "records", ("start.json",)),
    "exit of a worker": Target(_read_exits, "exits", names_file=False),
    "launch in the rendezvous": Target(
        lambda folder, file: parse_launch(file.read_bytes()), "records", ("launch.json",), names_file=False
    ),
    "task": Target(_read_rows, "rows", ("choices.jsonl", "clozes.jsonl", "exported.jsonl")),
    "prompts": Target(lambda folder, file: read_prompts(file), "rows", ("prompts.*",)),
}
"""The readers by name, for the command line and the tests."""
