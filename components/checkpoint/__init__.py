"""Checkpoints: a complete directory or nothing, written by torch.distributed.checkpoint.

    checkpoints/step-00000123/
        *.distcp, .metadata     tensors, resharded on load to the layout of the new run
        state.json              clock, batch policy and all other state that is not a tensor
        config.toml             the configuration of the run
        manifest.json           size and SHA-256 of all of these, and the identifier of the run

A checkpoint is written to a temporary directory (`.writing-RUN-step-00000123`), synced to the disk and renamed. A
directory with the final name is therefore complete, and an interrupted save leaves only a directory that is never read.
An asynchronous save does the same in a thread, on a copy of the tensors.

manager.py              [checkpoint]: when to save, and which checkpoints to keep
commit.py               writes a checkpoint, fsyncs and renames it; removes checkpoints and partial saves
in_memory.py            checkpoints in the main memory of the nodes
host_memory.py          the directory for them, which outlives the processes of a run
file_transfer.py        sends files from process to process
async_saver.py          the thread of an asynchronous save
tensor_writer.py        writes *.distcp with cached plans
remote.py               the layout of checkpoints at an address: upload, download, listing and removal
uploader.py             the thread that uploads checkpoints
manifest.py             writes and verifies manifest.json
load.py                 lists checkpoints, and loads state and tensors
metadata_unpickler.py   unpickles .metadata: the allowlist of classes and operations
safe_tensor_reader.py   reads *.distcp without executing stored code
tensor_index.py         the tensors of a checkpoint and the places of their chunks
state_tensors.py        which tensors of a run are saved

torch.distributed.checkpoint takes most of a second to import, so it is imported where it is used: a typo in a recipe is
reported before that.
"""

from components.checkpoint.commit import mark_damaged, remove_all, remove_partial_saves
from components.checkpoint.host_memory import host_memory_directory
from components.checkpoint.load import (
    DamagedError,
    list_checkpoints,
    load_tensors,
    read_state,
    step_of,
)
from components.checkpoint.manager import CheckpointConfig, CheckpointManager
from components.checkpoint.manifest import run_of, verify
from components.checkpoint.state_tensors import StateTensors

__all__ = [
    "CheckpointConfig",
    "CheckpointManager",
    "DamagedError",
    "StateTensors",
    "host_memory_directory",
    "list_checkpoints",
    "load_tensors",
    "mark_damaged",
    "read_state",
    "remove_all",
    "remove_partial_saves",
    "run_of",
    "step_of",
    "verify",
]
