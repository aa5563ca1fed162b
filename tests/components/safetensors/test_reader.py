"""Directories from untrusted sources: no file outside, no unpickling, no tensor larger than its file."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.safetensors import PickledWeights, Weights, read_json

pytestmark = pytest.mark.quick

A, B = torch.arange(12.0).view(3, 4), torch.ones(5, dtype=torch.bfloat16)


def sharded(folder: Path, **places: str) -> Path:
    save_file({"a": A}, folder / "one.safetensors")
    save_file({"b": B}, folder / "two.safetensors")
    table = {"a": "one.safetensors", "b": "two.safetensors", **places}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def test_tensors_have_specs_and_are_read_whole_or_in_part(tmp_path):
    with Weights(sharded(tmp_path)) as weights:
        assert weights.specs["a"].shape == (3, 4)
        assert weights.specs["b"].dtype == torch.bfloat16
        assert weights.specs["b"].bytes == 10
        assert weights.read("a").equal(A)
        assert weights.read("a", (slice(1, 3), slice(2, 3))).equal(A[1:3, 2:3])


@pytest.mark.parametrize(
    "place",
    ["../../x.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "", "a\\b", ".hidden", "one.safetensors\n", 7],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, place):
    with pytest.raises(ValueError, match="not a file name in this directory"):
        Weights(sharded(tmp_path, b=place))


def test_an_index_that_promises_too_much_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one.safetensors has no tensor b, which"):
        Weights(sharded(tmp_path, b="one.safetensors"))
    with pytest.raises(ValueError, match=r"three.safetensors is missing"):
        Weights(sharded(tmp_path, b="three.safetensors"))


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="missing, or is not a file"):
        Weights(sharded(tmp_path, b="pipe.safetensors"))


def header(content: dict, *, length: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DAMAGED = {
    "an empty file": b"",
    "less than a header": b"\x01\x02",
    "a header longer than the file": header({}, length=10_000),
    "a header of an exabyte": header({}, length=2**60),
    "truncated data": header({"a": F32}, data=b"\0" * 8),
    "data that no tensor is": header({"a": F32}, data=b"\0" * 32),
    "a shape larger than its data": header({"a": {**F32, "shape": [2**40]}}, data=b"\0" * 16),
    "a shape that overflows": header({"a": {**F32, "shape": [2**62, 2**62]}}, data=b"\0" * 16),
    "offsets beyond the end": header({"a": {**F32, "data_offsets": [1000, 1016]}}, data=b"\0" * 16),
    "overlapping tensors": header({"a": F32, "b": F32}, data=b"\0" * 16),
    "a header that is not JSON": struct.pack("<Q", 4) + b"{{{{",
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_hostile_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged, or is not a safetensors file"):
        Weights(tmp_path)


def test_quantized_weights_are_refused_and_ignored_tensors_may_have_any_dtype(tmp_path):
    save_file({"w": torch.ones(3, dtype=torch.int8), "x.inv_freq": torch.ones(2, dtype=torch.int64)},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"w is stored as I8; only F64, F32, F16, BF16"):
        Weights(tmp_path, ignore=["inv_freq"])
    save_file({"w": A, "x.inv_freq": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with Weights(tmp_path, ignore=["inv_freq"]) as weights:
        assert weights.specs.keys() == {"w"}
        assert weights.dropped == ["x.inv_freq"]


def test_no_weights_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "holds a list"), ("{", "not JSON"), ("[" * 10**5, "not JSON")]
)
def test_json_is_an_object(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "config.json")


def test_an_enormous_json_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # a hole: takes no space
    with pytest.raises(ValueError, match="at most"):
        read_json(tmp_path / "config.json")


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    torch.save(
        {"a": A, "b": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match="convert it to safetensors"):
        PickledWeights(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_old_pickles_of_tensors_are_read_in_shards_too(tmp_path):
    torch.save({"a": A, "x.inv_freq": B}, tmp_path / "one.bin")
    torch.save({"b": B}, tmp_path / "two.bin")
    table = {"a": "one.bin", "x.inv_freq": "one.bin", "b": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    weights = PickledWeights(tmp_path, ignore=["inv_freq"])
    assert weights.read("a").equal(A)
    assert weights.read("b").equal(B)
    assert (weights.specs.keys(), weights.dropped) == ({"a", "b"}, ["x.inv_freq"])
    table["b"] = "../two.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ValueError, match="not a file name"):
        PickledWeights(tmp_path)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(ValueError, match="would unpack to more than its size"):
        PickledWeights(tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_pickle_is_refused(tmp_path, keep):
    torch.save({"a": torch.ones(10_000)}, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"pytorch_model.bin"):
        PickledWeights(tmp_path)


def test_a_view_that_is_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**9)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a dense tensor"):
        PickledWeights(tmp_path)


@pytest.mark.parametrize("content", [[A], {"a": {"nested": A}}, {1: A}])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a dict of tensors by name"):
        PickledWeights(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "pickled"])
def test_a_single_file_is_read_before_an_index_which_is_reported(tmp_path, kind):
    whole, index, shard = {
        "safetensors": ("model.safetensors", "model.safetensors.index.json", "one.safetensors"),
        "pickled": ("pytorch_model.bin", "pytorch_model.bin.index.json", "one.bin"),
    }[kind]
    save, read = (save_file, Weights) if kind == "safetensors" else (torch.save, PickledWeights)
    save({"a": A}, tmp_path / shard)
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": shard}}))
    assert read(tmp_path).notes == []
    save({"a": A + 1}, tmp_path / whole)
    weights = read(tmp_path)
    assert weights.read("a").equal(A + 1)
    assert [str(tmp_path / whole) in note and index in note for note in weights.notes] == [True]
    (tmp_path / shard).unlink()
    assert read(tmp_path).read("a").equal(A + 1)
    (tmp_path / whole).unlink()
    (tmp_path / whole).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=rf"{whole} is a link to .*gone, which does not exist"):
        read(tmp_path)
