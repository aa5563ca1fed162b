import json
import shutil

import pytest

from components.data import HuggingFaceDataset
from components.data.document import ReadStats
from components.data.file_hash_cache import FileHashCache

datasets = pytest.importorskip("datasets", reason="needs the [data] extra")

TEXTS = ["one", "two\r\nlines", "three"]


@pytest.fixture
def tales(tmp_path, monkeypatch):
    """A data set in a local directory, and a cache of the library that holds nothing else."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "tales"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def texts(path: str, **settings) -> list[str]:
    return [document.text for document in HuggingFaceDataset(path=path, **settings).documents(ReadStats())]


def test_a_data_set_is_streamed(tales):
    assert texts(f"hf://{tales}/default/train") == ["one", "two\nlines", "three"]


def test_without_a_network_the_cache_of_the_library_serves(tales, tmp_path):
    datasets.load_dataset(str(tales), "default", split="train")
    # as the library keeps a data set `me/tales` of the Hub
    shutil.copytree(tmp_path / "cache" / "tales", tmp_path / "cache" / "me___tales")
    assert texts("hf://me/tales/default/train") == ["one", "two\nlines", "three"]
    with pytest.raises(ValueError, match=r"hf://me/others/default/train cannot be reached .* is not in the cache"):
        texts("hf://me/others/default/train")


def test_the_fingerprint_follows_what_the_documents_depend_on(tales, tmp_path):
    def fingerprint(path, **settings):
        return HuggingFaceDataset(path=path, **settings).fingerprint(FileHashCache(tmp_path / "memory"))

    plain = fingerprint("hf://me/tales/default/train")
    others = [
        fingerprint("hf://me/tales/default/train", revision="v2"),
        fingerprint("hf://me/tales/default/train", text_key="body"),
        fingerprint("hf://me/tales/default/test"),
        fingerprint("hf://me/tales/other/train"),
    ]
    assert len({plain, *others}) == 5
    local = fingerprint(f"hf://{tales}/default/train")
    (tales / "train.jsonl").write_text('{"text": "changed"}\n')
    assert fingerprint(f"hf://{tales}/default/train") != local


def test_mistakes_are_reported(tales):
    with pytest.raises(ValueError, match=r'^path: .* is not of the form "hf://dataset/config/split"'):
        HuggingFaceDataset(path="hf://tales/train")
    with pytest.raises(ValueError, match=r"row 0: no text under text_key = 'body'; the row has text"):
        texts(f"hf://{tales}/default/train", text_key="body")
    with pytest.raises(ValueError, match=r"^path: hf://.*/nosplit: "):
        texts(f"hf://{tales}/default/nosplit")
