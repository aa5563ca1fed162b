"""Convert a checkpoint to a Hugging Face directory, which `transformers` and most other readers open.

    python -m tools.export_hf CHECKPOINT OUTPUT [--average NAME] [--dtype bf16] [--max-shard-size 5GB]

CHECKPOINT is a checkpoint, saved on any number of processes, or a run directory, whose newest checkpoint is taken.
Exit status: 0 done, 2 for a user error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.safetensors import TensorSpec, new_directory, parse_bytes, write_json, write_weights
from components.standard_streams import run_command
from components.token_ids import first_input, fit_vocabulary
from components.tokenizers.hf_conversion import save
from models.hf.architectures import architecture_from_model, part_shapes
from recipes.averages import load_weights
from recipes.cli import reports_bad_input
from recipes.trained_model import PretrainedModel, load_pretrained

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@reports_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.export_hf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory")
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument("--average", metavar="NAME", help="average of the weights to export (default: the last step)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the exported weights (default: as saved)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of one weights file (default: 5GB)")
    parser.add_argument("--trust-code", action="store_true", help="import the custom code that CHECKPOINT names")
    parser.add_argument("--force", action="store_true", help="replace the model in OUTPUT")
    options = parser.parse_args(arguments)
    notes = export(
        options.checkpoint,
        options.output,
        average=options.average,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        max_shard_bytes=parse_bytes(options.max_shard_size),
        force=options.force,
        trust_code=options.trust_code,
    )
    print("\n".join(notes))
    print(f"wrote {options.output}")
    return 0


def export(
    checkpoint: Path,
    output: Path,
    *,
    average: str | None = None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    force: bool = False,
    trust_code: bool = False,
) -> list[str]:
    """Write the model of `checkpoint`, or an average of it, to the directory `output`; return notes for the user.

    Raises ValueError, ConfigError or OSError.
    """
    trained = load_pretrained(checkpoint, average=average, trust_code=trust_code)
    if trained.recipe is None:
        raise ValueError(f"{checkpoint} already is a Hugging Face directory")
    model = trained.build(trained.sequence_length)
    name, architecture = architecture_from_model(model)
    entries = {"architectures": [name], "model_type": architecture.model_type, **architecture.hf_config(model)}
    parts = architecture.hf_parts(model)
    parameters = dict(model.named_parameters())
    tensors = {
        hf_name: TensorSpec(shape, dtype or parameters[parts[hf_name].name].dtype)
        for hf_name, shape in part_shapes(model, parts).items()
    }

    def read(group: Sequence[str]) -> dict[str, Tensor]:
        names = {parts[hf_name].name for hf_name in group}  # the only ones that are read
        whole = {name: torch.empty(parameters[name].shape, dtype=parameters[name].dtype) for name in names}
        load_weights(trained.path, whole, trained.average, no_dist=True)
        return {
            hf_name: parts[hf_name].of(whole[parts[hf_name].name]).to(tensors[hf_name].dtype).contiguous()
            for hf_name in group
        }

    with new_directory(output, force=force) as temporary:
        start, end, notes = _write_tokenizer(trained, temporary, entries["max_position_embeddings"])
        ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": None}
        stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_json(temporary / "config.json", {**entries, **ids, "dtype": stored, "torch_dtype": stored})
        write_json(temporary / "generation_config.json", {**ids, "pad_token_id": end})
        files = write_weights(temporary, tensors, read, max_shard_bytes=max_shard_bytes)
    count = sum(parameter.numel() for parameter in parameters.values())
    source = trained.path.name if average is None else f"{trained.path.name}, average {average}"
    summary = f"{source}: {name} of {count:,} parameters in {stored}, {files} file{'s' if files > 1 else ''}"
    return [summary, *notes]


def _write_tokenizer(
    trained: PretrainedModel, directory: Path, max_length: int
) -> tuple[int | None, int | None, list[str]]:
    """Write the tokenizer's files if it can be exported; return the first and last id of a document, if known, and
    notes."""
    missing = "warning: no tokenizer was written"
    try:
        encoder: Any = fit_vocabulary(trained.recipe.tokenizer.build(), trained.vocab_size)
    except (OSError, ValueError) as error:
        return None, None, [f"{missing}, and config.json has no eos_token_id: {error}"]
    if (ids := encoder.vocab_size) != trained.vocab_size:
        return None, None, [f"{missing}: it has {ids} ids, the model was trained with {trained.vocab_size}"]
    start, end = first_input(encoder), int(encoder.end_of_document)
    if not hasattr(encoder, "hugging_face"):
        return start, end, [f"{missing}: a {type(encoder).__name__} has no method hugging_face()"]
    try:
        return start, end, [f"tokenizer in {', '.join(save(encoder, directory, max_length=max_length))}"]
    except ValueError as error:
        return start, end, [f"{missing}: {error}"]


if __name__ == "__main__":
    sys.exit(run_command(main))
