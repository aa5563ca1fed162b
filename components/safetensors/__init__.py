"""Directories of Hugging Face models on disk: read without trust, written aside and whole.

    config.json                                     the architecture and its numbers
    model.safetensors                               or model-00001-of-00003.safetensors ... and
    model.safetensors.index.json                    which tensor is in which of them
    generation_config.json, tokenizer.json, ...

Knows files, names and shapes; which name means what is the models' business.
"""

from components.safetensors.directory import new_directory, read_json, write_json
from components.safetensors.pytorch_bin import PickledWeights, has_only_pickles
from components.safetensors.reader import TensorSpec, Weights
from components.safetensors.writer import parse_bytes, write_weights

__all__ = [
    "PickledWeights",
    "TensorSpec",
    "Weights",
    "has_only_pickles",
    "new_directory",
    "parse_bytes",
    "read_json",
    "write_json",
    "write_weights",
]
