"""HuggingFaceDataset: data sets of the Hugging Face Hub, read by the `datasets` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.data.document import Document, ReadStats
from components.data.file_hash_cache import FileHashCache
from components.data.sources.base import TextSource
from components.data.sources.formats import documents_of
from components.errors import InputError, extra_required
from components.paths import is_file, walk_files

_URL = re.compile(r"hf://(?P<name>.+)/(?P<config>[^/]+)/(?P<split>[^/]+)")


@dataclass(kw_only=True)
class HuggingFaceDataset(TextSource):
    """A data set of the Hub, streamed while it is tokenized; without a network, read from the cache of the library.

    The state at the first use is kept in `cache_dir` and used from then on, without network access; set `revision` for
    a particular state.
    """

    path: str
    """hf://dataset/config/split, as in "hf://HuggingFaceFW/fineweb-edu/sample-10BT/train"; the dataset may be a local
    directory, as in "hf:///data/tales/default/train"."""
    text_key: str = "text"
    """The column of the text."""
    revision: str | None = None
    """A commit, tag or branch of the data set; unset: the current default branch."""

    def __post_init__(self) -> None:
        match = _URL.fullmatch(self.path)
        if match is None:
            raise InputError("path", f'{self.path!r} is not of the form "hf://dataset/config/split"')
        self._name, self._config, self._split = match.group("name", "config", "split")

    def documents(self, log: ReadStats) -> Iterator[Document]:
        rows, number = iter(self._rows()), -1
        while True:
            try:
                row, number = next(rows), number + 1
            except StopIteration:
                return
            except Exception as error:  # the readers of the library name neither file nor row
                kind = OSError if isinstance(error, OSError) else ValueError
                raise kind(f"{self.path} row {number + 1}: {type(error).__name__}: {error}") from error
            text = row.get(self.text_key)
            if not isinstance(text, str):
                keys = ", ".join(sorted(row)[:10])
                raise ValueError(
                    f"{self.path} row {number}: no text under text_key = {self.text_key!r}; the row has {keys}"
                )
            log.source_bytes += len(text.encode("utf-8", "surrogatepass"))
            yield from documents_of(text, log)

    def fingerprint(self, hashes: FileHashCache) -> str:
        files = sorted(filter(is_file, walk_files(Path(self._name), hidden=True))) if self._is_local else []
        content = [[str(path.relative_to(self._name)), hashes.sha256(path)] for path in files]
        named = [None if self._is_local else self._name, self._config, self._split, self.revision, self.text_key]
        return f"HuggingFaceDataset-1 {json.dumps([named, content])}"

    def __str__(self) -> str:
        return self.path

    @property
    def _is_local(self) -> bool:
        return Path(self._name).is_dir()

    def _rows(self) -> Any:
        """Return an iterable of rows, as dicts. Raises InputError for a data set that cannot be loaded."""
        with extra_required("HuggingFaceDataset", "datasets", "data"):
            import datasets
        wanted = {"path": self._name, "name": self._config, "split": self._split, "revision": self.revision}
        try:
            return datasets.load_dataset(**wanted, streaming=True)
        except (ConnectionError, OSError) as no_network:
            try:
                return datasets.load_dataset(**wanted)  # from the cache of the library
            except Exception as error:  # many types are possible
                raise InputError(
                    "path",
                    f"{self.path} cannot be reached ({no_network}) and is not in the cache of the datasets "
                    f"library ({error})",
                ) from error
        except Exception as error:  # no such config or split, a script, ...
            raise InputError("path", f"{self.path}: {error}") from error
