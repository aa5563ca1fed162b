"""Files of any bytes are read correctly or give one clear error; benchmarks/fuzz/ has the readers and mutates files."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.corpus import make_corpus
from benchmarks.fuzz.mutator import mutate
from benchmarks.fuzz.targets import TARGETS, Executions
from components.checkpoint import DamagedError, verify
from components.checkpoint.manifest import MANIFEST, Manifest
from components.checkpoint.metadata_unpickler import read_index
from components.tokenizers import TiktokenFile
from recipes.config import ConfigError, Override, flatten, load
from tests.conftest import RECIPE

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
SLOW = {"resumed run": 0.2, "text of the Hub": 0.2}
"""Fraction of the examples of a target whose executions take a second."""
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,  # of a machine that others use, too
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NESTED = b"[" * 100_000
"""JSON that is nested too deeply for Python."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("pyarrow", "zstandard", "wandb", "tokenizers", "datasets", "fsspec"):
        pytest.importorskip(library, reason="needs all extras")
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    make_corpus(folder)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Restore the variables that targets set."""
    for name in ("HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_accepted_or_refused(corpus: Path, tmp_path: Path, name: str) -> None:
    executions = Executions(name, corpus, tmp_path / "work")
    for number in range(round(EXAMPLES * SLOW.get(name, 1))):
        executions.run(number)


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"recipe"}))  # some recipes name files that are not there
def test_valid_files_are_accepted(corpus: Path, tmp_path: Path, name: str) -> None:
    executions = Executions(name, corpus, tmp_path / "work")
    for file in executions.originals:
        if name not in SLOW or file == min(executions.originals):
            assert executions.read(file, (corpus / executions.target.corpus / file).read_bytes()), file


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header


def zip_with_bytes_as_a_name() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("é", b"")
    return buffer.getvalue().replace("é".encode(), b"\xff\xff")


def with_id(number: int) -> bytes:
    """A tokenizer.json of one token."""
    model = {"type": "WordLevel", "vocab": {"<|endoftext|>": number}, "unk_token": "<|endoftext|>"}
    return json.dumps({"version": "1.0", "model": model, "added_tokens": []}).encode()


BOS = b'{"add_bos_token": true, "bos_token": %s}'
TEXT_FOR_A_LOSS = (
    b'{"step": 1, "tokens": 8, "samples": 2, "global_batch_size": 2, "loss": 2.5, "lr": 1.0, "step_seconds": 1.0, '
    b'"val_loss": "x"}\n'
)
RESULT = b'{"digest": "0", "varied": {}, "outcome": {"val_loss": %s}}\n'
REFUSED: dict[str, tuple[str, str, bytes]] = {
    "an integer of 5,000 digits": ("recipe", "mine.toml", b"a = " + b"9" * 5000),
    "a null character in a path": ("recipe", "mine.toml", b'extends = ["a\\u0000b"]'),
    "a header of NumPy that does not end": ("token files", "numpy.npy", npy(b"{'descr': ('<i8', \n") + bytes(80)),
    "names in a zip file that are not text": (
        "pickled weights",
        "pytorch_model.bin",
        zip_with_bytes_as_a_name(),
    ),
    "a result of another type": ("results of a sweep", "results.jsonl", RESULT % b'"x"'),
    "a result that is nested": ("results of a sweep", "results.jsonl", RESULT % NESTED),
    "a prompt that is nested": ("prompts", "prompts.jsonl", NESTED),
    "a configuration that is nested": ("tokenizer.json", "tokenizer_config.json", NESTED),
    "a branch point that is nested": ("branch point", "start.json", NESTED),
    "an id that is too large": ("tokenizer.json", "tokenizer.json", with_id(2**32 - 1)),
    "a start token that is not text": ("tokenizer.json", "tokenizer_config.json", BOS % b'"\\ud800"'),
    "a start token that is a number": ("tokenizer.json", "tokenizer_config.json", BOS % b"7"),
    "a launch that is nested": ("launch in the rendezvous", "launch.json", NESTED),
    "a W&B record of other bytes": ("W&B file", "run.wandb", bytes(11) + b"\x03\0\x01\xff\xff\xff"),
    "metrics without tokens": ("metrics", "metrics.jsonl", b'{"step": 1, "loss": 2.5}\n'),
    "metrics of a sweep without samples": ("metrics of a sweep", "metrics.jsonl", b'{"step": 1, "loss": 2.5}\n'),
    "a validation loss that is text": ("metrics of a sweep", "metrics.jsonl", TEXT_FOR_A_LOSS),
}
"""What the fuzzer found: a target, a file of it, and a content that once raised another error."""
READ_AS_EMPTY: dict[str, tuple[str, str, bytes]] = {
    "hashes that are nested": ("cache of hashes", "file-hashes.json", NESTED),
    "environments that are nested": ("environment.json", "environment.json", NESTED),
    "a record of a copy that is nested": ("record of a local copy", "copy.json", NESTED),
    "a record of a null character": ("record of a local copy", "copy.json", b'{"\\u0000": [1, "1"]}'),
    "a record of a surrogate": ("record of a local copy", "copy.json", b'{"\\ud800": [1, "1"]}'),
    "a position without end": ("position of a writer", "position.json", b"[Infinity, 1]"),
}
"""As REFUSED, of files that the product replaces when they are damaged."""


@pytest.mark.parametrize("what", [*REFUSED, *READ_AS_EMPTY])
def test_findings_of_the_fuzzer(corpus: Path, tmp_path: Path, what: str) -> None:
    name, file, content = {**REFUSED, **READ_AS_EMPTY}[what]
    assert Executions(name, corpus, tmp_path / "work").read(file, content) == (what in READ_AS_EMPTY)


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_a_change_of_a_checkpoint_is_found(corpus: Path, tmp_path_factory, seed: int) -> None:
    executions = Executions("checkpoint", corpus, tmp_path_factory.mktemp("fuzz") / "work")
    file, content, _ = executions.mutation(seed)
    executions.read(file, content)
    if not means_the_same(file, content, (corpus / "checkpoint" / file).read_bytes()):
        with pytest.raises((DamagedError, ValueError)):
            verify(executions.folder)


def means_the_same(file: str, content: bytes, original: bytes) -> bool:
    """Return whether a mutated file describes the same checkpoint: nothing has the hash of the manifest itself."""
    if file != MANIFEST:
        return content == original
    try:
        return Manifest.model_validate_json(content).files == Manifest.model_validate_json(original).files
    except ValueError:
        return False


def test_every_change_of_a_manifest_is_found(corpus: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(corpus / "checkpoint", tmp_path / "checkpoint"))
    original, found = (checkpoint / MANIFEST).read_bytes(), 0
    for number in range(100 * EXAMPLES):
        content = mutate(original, Random(number))
        if not means_the_same(MANIFEST, content, original):
            (checkpoint / MANIFEST).write_bytes(content)
            found += 1
            with pytest.raises((DamagedError, ValueError)):
                verify(checkpoint)
    assert found > 90 * EXAMPLES


@FUZZ
@given(text=st.text(max_size=200))
def test_text_as_a_recipe(tmp_path_factory, text: str) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load(folder / "mine.toml", cwd=folder)


@FUZZ
@given(
    key=st.sampled_from(sorted(flatten(RECIPE))) | st.text(max_size=20),
    value=st.text(max_size=20) | st.sampled_from(["1e999", "-0", "nan", "[[]]", "{a = 1}", "2026-01-01", "9" * 5000]),
)
def test_overrides(tmp_path_factory, key: str, value: str) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.toml").write_text(RECIPE)
    try:
        load(folder / "mine.toml", [Override(key, value)], cwd=folder).to_toml()
    except ConfigError as error:
        assert str(error).endswith("nothing was started.")


@FUZZ
@given(special=st.lists(st.text(max_size=5), max_size=3), pattern=st.text(max_size=8), seed=st.integers(0, 2**32))
def test_patterns_and_special_tokens(
    corpus: Path, tmp_path_factory, special: list[str], pattern: str, seed: int
) -> None:
    file = tmp_path_factory.mktemp("tokenizer") / "my.tiktoken"
    original = (corpus / "tokenizers" / "my.tiktoken").read_bytes()
    for content in (original, mutate(original, Random(seed))):
        file.write_bytes(content)
        for cut in ("gpt2", pattern):
            try:
                encoder = TiktokenFile(path=file, pattern=cut, special_tokens=["<|endoftext|>", *special]).build()
            except ValueError:
                continue
            (ids,) = encoder.encode_batch(["abé"])
            assert all(0 <= int(number) < encoder.vocab_size for number in ids)


@FUZZ
@given(content=st.binary(max_size=60))
def test_bytes_as_metadata(tmp_path_factory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / ".metadata").write_bytes(b"\x80\x04" + content)
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint"):
        read_index(folder)


@pytest.mark.parametrize(("found", "changed"), [(b"text", b"te\xfft"), (b"\x0c", b"\0")])
def test_names_and_counts_in_a_parquet_file_are_not_trusted(corpus: Path, tmp_path: Path, found, changed) -> None:
    """A name of a column that is not UTF-8; no rows, where 0x0c is the number of the six rows in Thrift."""
    executions = Executions("text", corpus, tmp_path / "work")
    content = (corpus / "texts" / "a.parquet").read_bytes()
    places = [match.start() for match in re.finditer(re.escape(found), content)]
    refused = [
        at for at in places if not executions.read("a.parquet", content[:at] + changed + content[at + len(found) :])
    ]
    assert refused


def test_forged_records_of_prepared_data_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Their checksums are right, but they refer to tokens and documents that are not there."""
    executions = Executions("prepared data", corpus, tmp_path / "work")
    (spans,) = (file for file in executions.originals if file.endswith("spans.npy"))
    (documents,) = (file for file in executions.originals if file.endswith("documents.bin"))
    original = np.load(corpus / "prepared" / spans)
    for column, value in enumerate((7, 10**6, -1, 10**6, 2**40)):
        forged, buffer = original.copy(), BytesIO()
        forged[0, column] = value
        np.save(buffer, forged)
        assert not executions.read(spans, buffer.getvalue(), is_sealed=True), column
    content = (corpus / "prepared" / documents).read_bytes()
    assert not executions.read(documents, b"\1" + content[1:], is_sealed=True)
    assert executions.read(documents, content, is_sealed=True)


def test_a_record_of_a_copy_removes_no_other_file(corpus: Path, tmp_path: Path) -> None:
    kept = tmp_path / "mine.txt"
    kept.write_text("mine")
    for name in (str(kept), f"a/{'../' * 20}{kept}"):
        executions = Executions("record of a local copy", corpus, tmp_path / "work")
        assert executions.read("copy.json", json.dumps({name: [1, "1"]}).encode())
        assert kept.read_text() == "mine"
