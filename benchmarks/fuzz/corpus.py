"""The valid files that the fuzzer mutates: a small run with its prepared data and model, and a file of each format."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.parity import draw_shape
from benchmarks.shared import ROOT
from models.decoder import Decoder
from models.hf.architectures import ARCHITECTURES, architecture_from_model
from recipes import cli
from tools.export_hf import export

RECIPE = """
[run]
name = "run"
dir = "run"
cache_dir = "cache"
device = "cpu"

[model]
use = "models.llama:Llama"
size = "debug"
dim = 16
layers = 2
heads = 2
kv_heads = 1
head_dim = 8
ffn_dim = 32

[tokenizer]
use = "components.tokenizers:Bytes"

[data]
use = "components.data:TextFiles"
path = "text"

[validation]
interval_steps = 2
max_sequences = 3
micro_batch_size = 2
  [validation.data]
  use = "components.data:TextFiles"
  path = "text"

[training]
total_tokens = 800
sequence_length = 24
micro_batch_size = 2
precision = "float32"

[optimizer]
use = "components.optimizers:AdamW"

[lr_schedule]
use = "components.lr_schedules:WSD"
max_lr = 1e-2

[batch]
use = "components.batch:NoiseScale"
initial_size = 8
max_size = 16

[average.ema]
use = "components.average:Exponential"
half_life_tokens = 200

[checkpoint]
interval_steps = 2
"""
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\nCall me Ishmael. Some years\n"
RANKS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)) + b"YWI= 256\naGU= 300\n"


def make_corpus(folder: Path) -> None:
    """Write a directory for each kind of input to `folder`. It trains a small model in this process."""
    trained = folder / "training"
    (trained / "text").mkdir(parents=True)
    for number in range(3):
        (trained / "text" / f"{number}.txt").write_text(TEXT[number * 7 :] * 4, encoding="utf-8")
    (trained / "mine.toml").write_text(RECIPE, encoding="utf-8")
    if status := cli.main([str(trained / "mine.toml")]):
        raise RuntimeError(f"the run of the fuzzer ended with status {status}")
    newest = max((trained / "run" / "checkpoints").iterdir())
    shutil.copytree(newest, folder / "checkpoint")
    shutil.copytree(trained / "cache", folder / "prepared" / "cache")
    shutil.copytree(trained / "text", folder / "prepared" / "text", copy_function=shutil.copy2)
    shutil.copytree(ROOT / "train_configs", folder / "recipes" / "train_configs")
    (folder / "recipes" / "mine.toml").write_text(f'extends = ["train_configs/debug.toml"]\n{RECIPE}', encoding="utf-8")
    for name, bytes_per_file in (("model", 10**9), ("sharded_model", 10_000)):
        export(newest, folder / name, dtype=None, max_shard_bytes=bytes_per_file)
    _write_pickled_model(folder / "model", folder / "pickled_model")
    _write_configs(folder / "model_configs")
    _write_texts(folder / "texts")
    _write_token_files(folder / "token_files")
    _write_rows(folder / "rows")
    _write_records(folder / "records", trained / "run")
    (folder / "exits").mkdir()
    (folder / "exits" / "0").write_text("2\nmodel: a message\n1 problem", encoding="utf-8")
    shutil.copytree(trained / "run", folder / "remote" / "remote")
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "my.tiktoken").write_bytes(RANKS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, folder / "tokenizers" / name)


def _write_pickled_model(model: Path, folder: Path) -> None:
    from safetensors.torch import load_file

    folder.mkdir()
    shutil.copy(model / "config.json", folder / "config.json")
    torch.save(load_file(model / "model.safetensors"), folder / "pytorch_model.bin")


def _write_configs(folder: Path) -> None:
    """Write a config.json for each architecture."""
    for family in ARCHITECTURES:
        with torch.device("meta"):
            model = Decoder(draw_shape(family, Random(family).choice), 97)
        name, architecture = architecture_from_model(model)
        entries = {"architectures": [name], "model_type": architecture.model_type, **architecture.hf_config(model)}
        (folder / family).mkdir(parents=True)
        (folder / family / "config.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _write_texts(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard

    folder.mkdir()
    texts = [TEXT[number * 5 :] for number in range(6)]
    rows = [{"text": text, "id": number, "meta": {"a": [1, None]}} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {
        "a.txt": TEXT.encode(),
        "a.jsonl": lines,
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.csv": b"id,text\r\n" + b"".join(b'%d,"%s"\r\n' % (n, text.encode()) for n, text in enumerate(texts)),
        "a.txt.gz": gzip.compress(TEXT.encode()) * 2,
        "a.jsonl.gz": gzip.compress(lines),
        "a.txt.zst": zstandard.compress(TEXT.encode()) * 2,
        "a.csv.zst": zstandard.compress(b"text\none\ntwo\n"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    column = pa.array(texts)
    for name, values, compression in (("a", column, "snappy"), ("b", column.dictionary_encode(), "zstd")):
        table = pa.table({"text": values, "id": range(6)})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", compression=compression)


def _write_token_files(folder: Path) -> None:
    """Write files of nanoGPT, llm.c, NumPy and Megatron-LM."""
    folder.mkdir()
    ids = np.arange(200) % 250
    ids.astype("<u2").tofile(folder / "nanogpt.bin")
    header = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0")
    (folder / "llmc.bin").write_bytes(header + ids.astype("<u2").tobytes())
    np.save(folder / "numpy.npy", ids.astype("<u4"))
    lengths = [60, 40, 100]
    ids.astype("<u2").tofile(folder / "megatron.bin")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", *lengths)
    (folder / "megatron.idx").write_bytes(index + struct.pack("<3q", 0, 120, 200) + struct.pack("<4q", 0, 1, 2, 3))


def _write_rows(folder: Path) -> None:
    """Write files of tasks and prompts."""
    folder.mkdir()
    questions = [{"context": f"{number} plus 1 is", "choices": ["one", "two"], "answer": 1} for number in range(3)]
    clozes = [{"context": f"number {number}", "answer": "word"} for number in range(3)]
    pair = {"gen_args_0": {"arg_0": "Once", "arg_1": " upon"}, "gen_args_1": {"arg_0": "Once", "arg_1": " a"}}
    exported = [{"doc_id": number, "target": "1", "arguments": pair, "filter": "none"} for number in range(3)]
    files: dict[str, Any] = {"choices": questions, "clozes": clozes, "exported": exported}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "prompts.txt").write_text("Once upon\na time\n", encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "Once upon"}\n{"prompt": "a time"}\n', encoding="utf-8")


def _write_records(folder: Path, run: Path) -> None:
    """Write the small files that the product writes for itself."""
    from wandb.proto.wandb_internal_pb2 import Record

    folder.mkdir()
    for name in ("run.json", "environment.json", "metrics.jsonl"):
        shutil.copy(run / name, folder / name)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "tokens": 800, "probe_rms_layer_0": 0.5, "probe_rms_layer_1": None}) + "\n")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    steps = [Record(), Record()]
    for step, record in enumerate(steps, 1):
        record.history.step.num = step
    parts = [struct.pack("<IHB", 0, len(data), 1) + data for data in (record.SerializeToString() for record in steps)]
    (folder / "run.wandb").write_bytes(b":W&B\xbe\xe1\0" + b"".join(parts))
    result = {
        "digest": "0" * 16, "varied": {"optimizer.lr": "1"}, "settings": {"a": "b"},
        "outcome": {"val_loss": 2.5, "train_loss": 2.25, "steps": 9, "curve": [[1, 24, 5.5, 8]]},
    }  # fmt: skip
    contents = {
        "file-hashes.json": {str(folder / "a.txt"): [9, 8, 7, "0" * 64]},
        "copy.json": {"a.txt": [len(TEXT), "1"]},
        "position.json": [3, 1],
        "launch.json": ["0123abcd", 1.7e9],
        "start.json": {"checkpoint": "a/step-00000004", "step": 4, "tokens": 400, "batch": 8, "lr": 1e-3},
        "results.jsonl": result,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
