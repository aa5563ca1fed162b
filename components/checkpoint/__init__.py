"""Checkpoints: a complete directory or nothing, written by torch.distributed.checkpoint.

    checkpoints/step-00000123/
        *.distcp, .metadata     tensors, resharded on load to whatever the new run looks like
        state.json              clock, batch policy: everything that is no tensor
        config.toml             the configuration that made it
        manifest.json           size and SHA-256 of all of these, and the identifier of the run

A checkpoint is written aside (`.writing-RUN-step-00000123`), synced to the disk and renamed. A directory that bears its
final name is therefore complete, and an interrupted save leaves only a name that no one reads. Saved asynchronously,
the same happens in a thread, on a copy of the tensors.

torch.distributed.checkpoint takes most of a second to import, so it is imported where it is used: a typo in a recipe is
told before.
"""

from components.checkpoint.load import (
    DamagedError,
    complete_checkpoints,
    load_tensors,
    read_state,
    step_of,
    tensor_names,
)
from components.checkpoint.manager import Checkpoint, CheckpointStore, clean, remove_all
from components.checkpoint.manifest import run_of, verify
from components.checkpoint.state_tensors import TrainingTensors

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "DamagedError",
    "TrainingTensors",
    "clean",
    "complete_checkpoints",
    "load_tensors",
    "read_state",
    "remove_all",
    "run_of",
    "step_of",
    "tensor_names",
    "verify",
]
