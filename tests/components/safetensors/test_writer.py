"""A written directory is complete or does not exist, with files of the requested size."""

import json

import pytest
import torch
from safetensors.torch import load_file

from components.safetensors import TensorSpec, Weights, new_directory, parse_bytes, write_weights

pytestmark = pytest.mark.quick

TENSORS = {name: torch.full((size,), float(size)) for name, size in [("a", 10), ("b", 20), ("c", 100), ("d", 1)]}
DESCRIBED = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(
    ("limit", "files"),
    [(10**9, [["a", "b", "c", "d"]]), (120, [["a", "b"], ["c"], ["d"]]), (1, [["a"], ["b"], ["c"], ["d"]])],
)
def test_files_are_no_larger_than_asked_unless_one_tensor_is(tmp_path, limit, files):
    asked = []
    number = write_weights(
        tmp_path,
        DESCRIBED,
        lambda names: asked.append(list(names)) or {name: TENSORS[name] for name in names},
        max_shard_bytes=limit,
    )
    assert (asked, number) == (files, len(files))
    assert sorted(list(load_file(path)) for path in tmp_path.glob("*.safetensors")) == sorted(files)
    with Weights(tmp_path) as weights:
        assert all(weights.read(name).equal(tensor) for name, tensor in TENSORS.items())
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == 4 * 131
    (tmp_path / "made").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "made").stat().st_mode}


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300", 300), ("7B", 7)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 bananas", "-1GB", "0", "0.1B", "9" * 400])
def test_invalid_sizes(text):
    with pytest.raises(ValueError, match="such as 5GB"):
        parse_bytes(text)


def write(path, *, force=False, content="new", fail=False):
    with new_directory(path, force=force) as temporary:
        (temporary / "config.json").write_text(content)
        if fail:
            raise KeyboardInterrupt


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "model", fail=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()  # an empty one may be there
    write(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_is_replaced_only_with_force_and_only_if_an_export_wrote_all_of_it(tmp_path):
    model = tmp_path / "model"
    write(model, content="old")
    with pytest.raises(ValueError, match=r"is not empty; .* --force"):
        write(model)
    with pytest.raises(KeyboardInterrupt):
        write(model, force=True, fail=True)
    assert (model / "config.json").read_text() == "old"
    write(model, force=True)
    assert (model / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    (model / "photographs").mkdir()
    with pytest.raises(ValueError, match="holds photographs, which is not listed"):
        write(model, force=True)
    (tmp_path / "home").mkdir()
    for name in ("config.json", "letter"):
        (tmp_path / "home" / name).write_text("dear")
        with pytest.raises(ValueError, match=r"holds config.json, which is not listed"):
            write(tmp_path / "home", force=True)
    with pytest.raises(ValueError, match="is not a directory"):
        write(tmp_path / "home" / "letter")
