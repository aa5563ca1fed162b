"""Tokenizers: `use = "components.tokenizers:TiktokenFile"`. Each builds an object that encodes and decodes text.

bytes.py           Bytes: an id is a byte
tiktoken_file.py   TiktokenFile: byte-pair encoding from a tiktoken rank file
tokenizer_json.py  TokenizerJson: tokenizer.json of Hugging Face
patterns.py        regular expressions that split text before byte-pair encoding
detokenizer.py     decodes ids one at a time, as they are generated
hf_conversion.py   converts an encoding to tokenizer.json
"""

from components.tokenizers.bytes import Bytes
from components.tokenizers.tiktoken_file import TiktokenEncoding, TiktokenFile
from components.tokenizers.tokenizer_json import TokenizerJson

__all__ = ["Bytes", "TiktokenEncoding", "TiktokenFile", "TokenizerJson"]
