"""The kinds of runs that are killed: a small recipe, and what each kind adds to it."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from components.hardware import peak_flops
from recipes.config import load

RECIPE = """
[run]
name = "torture"
cache_dir = "cache"
device = "cpu"
[model]
use = "models.llama:Llama"
size = "debug"
dim = 16
layers = 2
heads = 2
kv_heads = 2
head_dim = 8
ffn_dim = 32
[tokenizer]
use = "components.tokenizers:Bytes"
[data]
use = "components.data:TextFiles"
path = "text.txt"
[training]
total_tokens = 11_520           # 60 steps of 8 samples
sequence_length = 24
micro_batch_size = 2
precision = "float32"
grad_sync = "once_per_step"     # several processes on a few cores spend their time in collectives
[optimizer]
use = "components.optimizers:AdamW"
[lr_schedule]
use = "components.lr_schedules:WSD"
max_lr = 1e-2
warmup_tokens = 300
[batch]
use = "components.batch:Constant"
initial_size = 8
[checkpoint]
interval_steps = 3
keep_last = 2
[metrics.writers]
tensorboard = "none"
"""
VALIDATION_STEPS = 4
VALIDATION = f"""
[validation]
interval_steps = {VALIDATION_STEPS}
max_sequences = 16
[validation.data]
use = "components.data:TextFiles"
path = "text.txt"
"""
NORM_TEST = """
[batch]
use = "components.batch:NormTest"
eta = 0.7
initial_size = 8
max_size = 24
multiple_of = 4
shrink = true
[gradient_noise]
smoothing_samples = 20
"""
EXPERTS = """
[model]
experts = 4
top_k = 2
"""
MUON = """
[optimizer]
use = "components.optimizers:Muon"
"""
AVERAGES = """
[average.ema]
use = "components.average:Exponential"
half_life_tokens = 600
[average.window]
use = "components.average:Window"
window_tokens = 1200
"""
WRITERS = """
[metrics.writers.tensorboard]
use = "components.metrics:TensorBoard"
"""
if importlib.util.find_spec("wandb") is not None:
    WRITERS += """
[metrics.writers.wandb]
use = "components.metrics:WandB"
project = "torture"
mode = "offline"
"""
WHOLE_MICRO_BATCHES = """
[batch]
initial_size = 24
max_size = 72
multiple_of = 24                # whole micro-batches of 2 samples on 1, 2, 3 and 4 processes
"""


@dataclass(frozen=True)
class Kind:
    """A kind of run: what it adds to the recipe, and its processes."""

    name: str
    ranks: tuple[int, ...] = (1,)
    """Numbers of processes. Of several, each start of a killed run takes one at random, and the uninterrupted run the
    first."""
    settings: tuple[str, ...] = ()
    """Parts of a recipe."""
    tokens: int = 11_520
    async_save: bool = False
    remote: bool = False
    """Whether checkpoints are uploaded to another directory, and the run directory is sometimes removed between two
    starts."""

    def __str__(self) -> str:
        return self.name

    @property
    def is_elastic(self) -> bool:
        """Whether the number of processes changes."""
        return len(self.ranks) > 1


KINDS = (
    Kind("AdamW, constant batch, 1 process"),
    Kind("AdamW, constant batch, 2 processes, asynchronous saves", (2,), async_save=True),
    Kind("experts, NormTest, average, 1 process", (1,), (VALIDATION, EXPERTS, NORM_TEST, AVERAGES), async_save=True),
    Kind("Muon, experts, averages, 2 processes", (2,), (VALIDATION, EXPERTS, MUON, AVERAGES), 5_760, async_save=True),
    Kind("Muon, NormTest, 4 processes: 2 shards of 2 TP ranks", (4,), (MUON, NORM_TEST, "[parallel]\ntp = 2\n"), 4_800),
    Kind("TensorBoard and W&B, 1 process", (1,), (VALIDATION, WRITERS)),
    Kind("remote checkpoints, directory lost, 1 process", (1,), (VALIDATION, AVERAGES), async_save=True, remote=True),
    Kind("AdamW, NormTest, average, 1 to 4 processes", (1, 2, 3, 4),
         (VALIDATION, NORM_TEST, WHOLE_MICRO_BATCHES, AVERAGES), 23_040),
    Kind("Muon, directory lost, 1 to 4 processes", (1, 2, 3, 4),
         (VALIDATION, MUON, "[batch]\ninitial_size = 24\n"), 11_520, async_save=True, remote=True),
)  # fmt: skip


def make_recipe(folder: Path, kind: Kind = KINDS[0]) -> Path:
    """Write the recipe of a kind, and its text, into `folder`; return the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    # a text that is not learned by heart: relative differences of losses near zero say nothing
    (folder / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "torture.toml").write_text(RECIPE, encoding="utf-8")
    below = "torture.toml"
    own = f"[training]\ntotal_tokens = {kind.tokens}\n[checkpoint]\nasync_save = {str(kind.async_save).lower()}\n"
    if kind.remote:
        own += f'remote = "file://{remote_folder(folder)}"\n'
    number = KINDS.index(kind) if kind in KINDS else len(KINDS)
    for part, text in enumerate((*kind.settings, own)):
        file = folder / f"kind-{number}-{part}.toml"
        file.write_text(f'extends = ["{below}"]\n{text}', encoding="utf-8")
        below = file.name
    return folder / below


def remote_folder(folder: Path) -> Path:
    """Return the directory that stands for remote storage."""
    return folder / "remote"


def import_for(recipe: Path) -> None:
    """Import what a run of `recipe` imports, and compute nothing, so that processes forked from this one start at once.

    A process that is forked after it has started threads would hang.
    """
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict

    import components.checkpoint.tensor_writer  # noqa: F401
    import recipes.pretrain  # noqa: F401

    for name in ("fsspec.implementations.local", "wandb.sdk", "components.metrics.tensorboard_events"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    load(recipe, [])
    for dtype in (torch.float32, torch.bfloat16):
        peak_flops(torch.device("cpu"), dtype)
    gc.collect()
    gc.freeze()  # a run collects garbage after its first step: half a second for the imported objects
