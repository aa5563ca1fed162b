"""Files of any bytes are read correctly or give one clear error; the bytes come from hypothesis."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.checkpoint import list_checkpoints, load_tensors, tensor_names, verify
from components.checkpoint.load import read_state
from components.data import TextFiles
from components.tokenizers import Bytes, TiktokenFile
from recipes.config import ConfigError, Override, flatten, load
from recipes.stored_config import load_stored_config
from recipes.training_state import read_run_state
from tests.conftest import RECIPE, TinyRun

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "30")),
    deadline=None,  # of a machine that others use, too
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyRun(tmp_path_factory.mktemp("trained"))
    assert tiny.launch("--training.total_tokens=300") == 0
    return tiny.folder


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return list_checkpoints(trained / "run" / "checkpoints")[-1]


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[int, int, bytes]]:
    """Edits: (position in thousandths of the length, number of bytes to replace, other bytes)."""
    edit = st.tuples(st.integers(0, 1000), st.sampled_from([0, 1, 2, 8, 10**6]), st.binary(max_size=9))
    return draw(st.lists(edit, min_size=1, max_size=4))


def mutate(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, added in edits:
        at = len(content) * place // 1000
        content = content[:at] + added + content[at + removed :]
    return content


def spoilt(source: Path, folder: Path, name: str, content: bytes) -> Path:
    """A copy of the directory `source` in which the file `name` is another."""
    copy = folder / "spoilt"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    (copy / name).write_bytes(content)
    return copy


@FUZZ
@given(edits=mutations())
def test_recipes(tmp_path_factory, edits) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.toml").write_bytes(mutate(RECIPE.encode(), edits))
    try:
        load(folder / "mine.toml", cwd=folder).to_toml()
    except ConfigError as error:
        assert str(error).endswith("nothing was started.")


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
@given(edits=mutations(), special=st.lists(st.text(max_size=5), max_size=3), pattern=st.text(max_size=8))
def test_tokenizer_files(tmp_path_factory, edits, special: list[str], pattern: str) -> None:
    from tests.faults.bad_files import BYTES

    file = tmp_path_factory.mktemp("tokenizer") / "my.tiktoken"
    for content in ("".join([*BYTES, "YWI= 256\n"]).encode(), b"".join(added for _, _, added in edits)):
        file.write_bytes(mutate(content, edits))
        for cut in ("gpt2", pattern):
            try:
                encoder = TiktokenFile(path=file, pattern=cut, special_tokens=["<|endoftext|>", *special]).build()
            except ValueError:
                continue
            (ids,) = encoder.encode_batch(["abé"])
            assert all(0 <= int(number) < encoder.vocab_size for number in ids)


@FUZZ
@given(
    edits=mutations(),
    name=st.sampled_from(["index.json", "spans.npy", "source_files.json", "shard.json", "tokens.bin", "documents.bin"]),
)
def test_token_shards(trained: Path, tmp_path_factory, edits, name: str) -> None:
    original = min((trained / "cache").rglob(name))
    folder = tmp_path_factory.mktemp("shards")
    content = mutate(original.read_bytes(), edits)
    cache = spoilt(trained / "cache", folder, str(original.relative_to(trained / "cache")), content)
    for text in ("*.txt", "held_out/*.txt"):  # one of them has the file
        try:
            samples = TextFiles(path=trained / "text" / text).build(
                tokenizer=Bytes().build(), sequence_length=24, cache_dir=cache, progress=lambda line: None
            )
            last = len(samples) - 1
            assert len(samples[last]) == 25
            samples.describe(last)
        except ValueError as error:
            assert str(cache) in str(error)


@FUZZ
@given(edits=mutations())
def test_checkpoint_metadata(checkpoint: Path, tmp_path_factory, edits) -> None:
    content = mutate((checkpoint / ".metadata").read_bytes(), edits)
    copy = spoilt(checkpoint, tmp_path_factory.mktemp("checkpoint"), ".metadata", content)
    for read in (lambda: tensor_names(copy), lambda: load_tensors(copy, {"x": torch.zeros(3)}, no_dist=True)):
        try:
            read()
        except ValueError as error:
            assert str(copy) in str(error)


@FUZZ
@given(content=st.binary(max_size=60))
def test_bytes_as_metadata(tmp_path_factory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / ".metadata").write_bytes(b"\x80\x04" + content)
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint"):
        tensor_names(folder)


@FUZZ
@given(edits=mutations())
def test_checkpoint_tensors(checkpoint: Path, tmp_path_factory, edits) -> None:
    (file,) = checkpoint.glob("*.distcp")
    copy = spoilt(checkpoint, tmp_path_factory.mktemp("checkpoint"), file.name, mutate(file.read_bytes(), edits))
    if (copy / file.name).read_bytes() != file.read_bytes():
        with pytest.raises(ValueError, match="is damaged"):
            verify(copy)
    wanted = {"model": {"tok_embeddings.weight": torch.zeros(257, 16)}}
    try:
        load_tensors(copy, wanted, no_dist=True)
    except ValueError as error:
        assert str(copy) in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(
    edits=mutations(), key=st.sampled_from(["clock", "batch", "loader", "vocab_size", "format", "guard"]), value=JSON
)
def test_checkpoint_state(checkpoint: Path, tmp_path_factory, edits, key: str, value) -> None:
    text = (checkpoint / "state.json").read_bytes()
    folder = tmp_path_factory.mktemp("checkpoint")
    for content in (mutate(text, edits), json.dumps({**json.loads(text), key: value}).encode()):
        copy = spoilt(checkpoint, folder, "state.json", content)
        for read in (read_state, read_run_state, verify):
            try:
                read(copy)
            except ValueError as error:
                assert str(copy) in str(error)


@FUZZ
@given(edits=mutations(), name=st.sampled_from(["manifest.json", "config.toml"]))
def test_checkpoint_manifest_and_configuration(checkpoint: Path, tmp_path_factory, edits, name: str) -> None:
    content = mutate((checkpoint / name).read_bytes(), edits)
    copy = spoilt(checkpoint, tmp_path_factory.mktemp("checkpoint"), name, content)
    for read in (verify, load_stored_config):
        try:
            read(copy)
        except (ValueError, ConfigError) as error:
            assert "checkpoint" in str(error) or "spoilt" in str(error)
