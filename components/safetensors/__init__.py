"""Directories of Hugging Face models: reading them from untrusted sources, and writing them atomically.

    config.json                                     the architecture and its sizes
    model.safetensors                               or model-00001-of-00003.safetensors ... and
    model.safetensors.index.json                    the file of each tensor
    generation_config.json, tokenizer.json, ...

This package handles files, names and shapes; models/hf/ maps names to parameters.
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
