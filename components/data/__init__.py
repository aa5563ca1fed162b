"""Data sources: `use = "components.data:TextFiles"`.

A source is tokenized into shards on first use and read as packed sequences. Data flows through these modules:

1. `sources/` read documents from files or the Hub;
2. `tokenize.py` tokenizes documents into shards on disk (`shards.py`, `shard_writer.py`);
3. `cache.py` and `document_index.py` select and order the documents of a data set;
4. `dataset.py` packs their tokens into sequences, and `mixture.py` mixes several sources;
5. `loader.py` reads micro-batches in the global order of `order.py`.
"""

from components.data.mixture import Mixture
from components.data.sources.hub import HuggingFaceDataset
from components.data.sources.standard_library import StandardLibrary
from components.data.sources.text_files import TextFiles
from components.data.sources.token_files import TokenFiles

__all__ = ["HuggingFaceDataset", "Mixture", "StandardLibrary", "TextFiles", "TokenFiles"]
