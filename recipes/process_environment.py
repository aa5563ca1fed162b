"""Environment variables that a run sets for the libraries in its processes."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

from components.run_directory import FLIGHT_RECORDER


def enable_flight_recorder(environment: MutableMapping[str, str], directory: Path) -> None:
    """Make NCCL write the latest collectives of every process to `directory` when a collective times out.

    Variables that the user has set are kept, also under the older names that torch still reads.
    """
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "20000",  # collectives, those of a few steps
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(directory.absolute() / FLIGHT_RECORDER),
    }
    for names, value in settings.items():
        if not any(name in environment for name in names):
            environment[names[0]] = value


def choose_allocator(environment: MutableMapping[str, str]) -> None:
    """Enable expandable segments in the CUDA allocator, unless the user has configured it.

    They avoid fragmentation in a run that fills a GPU and frees and allocates gigabytes of gradients in every step.
    torch reads the variable, which has an old and a new name, when it is imported.
    """
    if not environment.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
