"""Costs of many ranks outside training: checkpoint metadata, save plans, sockets and initial weights.

    python -m benchmarks.control_plane [--ranks 8 64 512 1024] [--models 8b 70b] [--parts metadata plans ...]

The ranks are simulated: this process makes and reads the metadata and plans of that many ranks. Sockets are counted in
2, 4 and 8 real processes and extrapolated linearly. 70B on 1,024 ranks takes about 12 GB. Times are processor seconds
of one thread.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from benchmarks.measure import machine
from components.checkpoint.manager import CheckpointManager
from components.checkpoint.metadata import read_index
from components.checkpoint.tensor_writer import SavePlans
from components.distributed.context import DistributedContext
from models.decoder import Decoder
from models.init import fill_runs
from models.presets import LlamaShape

SIZES = {
    "8b": LlamaShape(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336),
    "70b": LlamaShape(dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28672),
}
VOCABULARY = 128_256
ZIP_BYTES = 1300
"""Bytes that torch.save adds to a chunk."""


def state_shapes(model: str) -> dict[str, torch.Size]:
    """Return the names and shapes of the weights and of Adam's moments."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Decoder(SIZES[model], VOCABULARY).named_parameters()}
    parts = ("model.{}", "optimizer.state.{}.exp_avg", "optimizer.state.{}.exp_avg_sq")
    return {part.format(name): shape for name, shape in shapes.items() for part in parts}


def shard(shape: torch.Size, rank: int, ranks: int) -> ChunkStorageMetadata | None:
    """Return the shard of `rank`, by rows as in FSDP2; None if it is empty."""
    rows = -(-shape[0] // ranks)
    first = min(rank * rows, shape[0])
    if first == shape[0]:
        return None
    offsets = torch.Size((first, *[0] * (len(shape) - 1)))
    return ChunkStorageMetadata(offsets, torch.Size((min(rows, shape[0] - first), *shape[1:])))


def write_checkpoint(shapes: dict[str, torch.Size], ranks: int, directory: Path) -> None:
    """Write the `.metadata` of `ranks` ranks, and empty (sparse) files of the right sizes."""
    entries = {
        name: TensorStorageMetadata(TensorProperties(torch.float32), shape, []) for name, shape in shapes.items()
    }
    places = {}
    for rank in range(ranks):
        end = 0
        for name, shape in shapes.items():
            if (chunk := shard(shape, rank, ranks)) is not None:
                entries[name].chunks.append(chunk)
                own_name = "".join(list(name))  # plans are pickled to the first rank, so each has copies of the names
                length = 4 * chunk.sizes.numel() + ZIP_BYTES
                places[MetadataIndex(own_name, chunk.offsets)] = _StorageInfo(f"__{rank}_0.distcp", end, length)
                end += length
        with (directory / f"__{rank}_0.distcp").open("wb") as file:
            file.truncate(end)
    with (directory / ".metadata").open("wb") as file:
        pickle.dump(Metadata(dict(entries), {}, places, StorageMeta()), file)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_metadata(model: str, ranks: int) -> str:
    """Return a row: bytes and chunks, seconds of the first rank's check, and of loading the result on each rank."""
    shapes = state_shapes(model)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        gc.disable()
        write_checkpoint(shapes, ranks, directory)
        gc.enable()
        gc.collect()
        size = (directory / ".metadata").stat().st_size
        start = time.process_time()
        index = read_index(directory)
        checked = time.process_time() - start
    sent = pickle.dumps(index)
    received = seconds(lambda: pickle.loads(sent))
    # The rows of a rank in the middle, as plain tensors: each overlaps one chunk or two
    start = time.process_time()
    wanted = {name: torch.empty((-(-shape[0] // ranks), *shape[1:]), device="meta") for name, shape in shapes.items()}
    index.metadata(wanted)
    own = time.process_time() - start
    return (
        f"| {model} | {ranks:,} | {len(index.places):,} | {size / 1e6:,.1f} MB | {checked:.1f} s | "
        f"{len(sent) / 1e6:,.1f} MB | {received + own:.2f} s |"
    )


def measure_plans(model: str, ranks: int) -> str:
    """Return a row: seconds of the first rank for the global plan of the first save, and of later saves."""
    shapes = state_shapes(model)

    def local_plan(rank: int) -> SavePlan:
        items = []
        for name, shape in shapes.items():
            if (chunk := shard(shape, rank, ranks)) is not None:
                data = TensorWriteData(chunk, TensorProperties(torch.float32), shape)
                items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items, planner_data={})

    plans = SavePlans()
    all_plans = [local_plan(rank) for rank in range(ranks)]
    old = seconds(lambda: DefaultSavePlanner().create_global_plan(list(all_plans)))
    first = seconds(lambda: plans.planner().create_global_plan(all_plans))
    unchanged = [SavePlan([], usable=False)] * ranks
    again = seconds(lambda: plans.planner().create_global_plan(unchanged))
    plans.clear()
    return f"| {model} | {ranks:,} | {old:.1f} s | {first:.1f} s | {again:.3f} s |"


def count_sockets(rank: int, ranks: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    world = DistributedContext.init("cpu")
    store = CheckpointManager(Path(folder), world, async_save=True)
    world.barrier()
    if rank == ranks - 1:
        links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        Path(folder, "sockets").write_text(str(sum(link.startswith("socket") for link in links)))
    world.barrier()
    store.close()
    world.close()


def sockets_per_process(ranks: int) -> int:
    """Return the sockets of one of `ranks` processes that save checkpoints in the background."""
    import socket

    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            Path(folder, "port").write_text(str(probe.getsockname()[1]))
        mp.spawn(count_sockets, (ranks, folder), nprocs=ranks)
        return int(Path(folder, "sockets").read_text())


def nanoseconds_per_number() -> tuple[float, float]:
    """Return the time of a number from `fill_runs` and from torch's `normal_`, on one thread; the best of five."""
    count, threads = 2**22, torch.get_num_threads()
    torch.set_num_threads(1)
    drawn_numbers, torch_numbers = np.empty(count, dtype=np.float32), torch.empty(count)
    start = np.zeros(1, dtype=np.int64)
    generator = torch.Generator().manual_seed(0)
    drawn = min(seconds(lambda: fill_runs(drawn_numbers, start, count, key=0, std=1.0)) for _ in range(5))
    normal = min(seconds(lambda: torch_numbers.normal_(generator=generator)) for _ in range(5))
    torch.set_num_threads(threads)
    return drawn / count * 1e9, normal / count * 1e9


def print_metadata(cases: list[tuple[str, int]]) -> None:
    print("| model | ranks | chunks | .metadata | checked by the first rank | sent to each | loaded by each |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        print(measure_metadata(*case), flush=True)


def print_plans(cases: list[tuple[str, int]]) -> None:
    print("| model | ranks | plan of a save | first save, plans cached | later saves |\n|---|---|---|---|---|")
    for case in cases:
        print(measure_plans(*case), flush=True)


def print_weights(cases: list[tuple[str, int]]) -> None:
    drawn, by_torch = nanoseconds_per_number()
    print(f"initial weights: {drawn:.1f} ns per number, torch's normal_ {by_torch:.1f} ns")
    print("| model | ranks | each rank draws all, by torch | each rank draws its shard |\n|---|---|---|---|")
    for model, ranks in cases:
        numbers = sum(shape.numel() for name, shape in state_shapes(model).items() if name.startswith("model."))
        print(f"| {model} | {ranks:,} | {numbers * by_torch / 1e9:.1f} s | {numbers * drawn / 1e9 / ranks:.2f} s |")


def print_sockets(cases: list[tuple[str, int]]) -> None:
    counts = {ranks: sockets_per_process(ranks) for ranks in (2, 4, 8)}
    slope = (counts[8] - counts[4]) / 4
    print(f"sockets of a process: {counts} by number of processes, {slope:g} for each additional one")
    print(f"extrapolated: { {ranks: round(counts[8] + slope * (ranks - 8)) for _, ranks in cases} }")


PARTS = {"metadata": print_metadata, "plans": print_plans, "weights": print_weights, "sockets": print_sockets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 1024])
    parser.add_argument("--models", nargs="+", default=["8b"], choices=sorted(SIZES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    print(machine())
    cases = [(model, ranks) for model in arguments.models for ranks in arguments.ranks]
    for part in arguments.parts:
        print()
        PARTS[part](cases)


if __name__ == "__main__":
    main()
