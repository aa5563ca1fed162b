"""Tokenizers: `use = "components.tokenizers:TiktokenFile"`. Each builds an object that encodes and decodes text."""

from components.tokenizers.bytes import Bytes
from components.tokenizers.tiktoken_file import TiktokenEncoding, TiktokenFile
from components.tokenizers.tokenizer_json import TokenizerJson

__all__ = ["Bytes", "TiktokenEncoding", "TiktokenFile", "TokenizerJson"]
