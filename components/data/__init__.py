"""Data: `use = "components.data:TextFiles"`. A source of documents prepares itself into token shards on first use and
opens as packed sequences; the loader serves them in one global order."""

from components.data.mixture import Mixture
from components.data.sources.hub import HuggingFaceDataset
from components.data.sources.standard_library import StandardLibrary
from components.data.sources.text_files import TextFiles
from components.data.sources.token_files import TokenFiles

__all__ = ["HuggingFaceDataset", "Mixture", "StandardLibrary", "TextFiles", "TokenFiles"]
