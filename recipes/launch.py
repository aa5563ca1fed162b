"""The command line: one recipe, resolved once, then run in one process or in many.

    launch [CONFIG.toml] [--section.key=value]... [--resume[=PATH]] [--print-config]
           [--dry-run[=DEVICE[@MFU]]]

Exit status: 0 done; 2 bad configuration or input; 128 + signal when stopped by one after saving; 1 anything else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.run_directory import FLIGHT_RECORDER
from recipes.config import Config, ConfigError, Override, load
from recipes.errors import RunError, blame, component_at_fault, out_of_memory

log = logging.getLogger("powertrain")

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "train_configs" / "debug.toml"

HELP = f"""\
usage: run_train.sh [CONFIG.toml] [--section.key=value]... [--resume[=PATH]] [--print-config]
                    [--dry-run[=DEVICE[@MFU]]]

  CONFIG.toml           the recipe; without one: {DEFAULT_CONFIG.relative_to(ROOT)}
  --section.key=value   set a key of the recipe ("--section.key value" does, too)
  --resume[=PATH]       continue from the newest checkpoint of this run, or from the checkpoint or run directory PATH
  --print-config        print the resolved recipe as TOML, with where each value comes from, and stop
  --dry-run             say what the run would be: parameters, memory, steps, rates, time, problems; start nothing.
                        =DEVICE[@MFU] reckons with one device and utilisation: H100, A100@45%, cpu, @0.5
  --help                this text

environment: PYTHON the interpreter to set up with; NPROC or NGPU processes on this node (default: its GPUs, or 1;
             a dry run may claim any number); NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT for several nodes;
             MAX_RESTARTS after a failure (default 0); PYTORCH_ALLOC_CONF settings of the memory allocator of GPUs
             (default expandable_segments:True)
"""


class UsageError(Exception):
    """The command line itself is wrong."""


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config: Path = DEFAULT_CONFIG
    overrides: tuple[Override, ...] = ()
    resume: bool = False
    resume_path: Path | None = None
    print_config: bool = False
    dry_run: str | None = None
    """DEVICE@MFU; empty if neither was given, None without --dry-run."""
    help: bool = False


def parse(arguments: Sequence[str]) -> Command:
    """Raises UsageError."""
    configs: list[Path] = []
    overrides: list[Override] = []
    flags: dict[str, bool] = {}
    resume_path, dry_run = None, None
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if argument in ("--print-config", "--dry-run", "--help", "-h", "--resume"):
            flags[argument.strip("-").replace("-", "_")] = True
        elif name == "--dry-run":
            if not value:
                raise UsageError("--dry-run= needs a device, as in --dry-run=H100; --dry-run alone shows several")
            dry_run = value
        elif name == "--resume":
            if not value:
                raise UsageError("--resume= needs a path; --resume alone takes the newest checkpoint of this run")
            flags["resume"], resume_path = True, Path(value)
        elif name.startswith("--") and ("." in name or (equals and name[2:].isidentifier())):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UsageError(f"{name} needs a value: {name}=VALUE")
                value = rest.pop(0)
            overrides.append(Override(name[2:], value))
        elif name.startswith("-"):
            raise UsageError(f"{argument} is no option; keys of the recipe are written --section.key=value")
        else:
            configs.append(Path(argument))
    if len(configs) > 1:
        raise UsageError(f"one recipe, please: {' '.join(map(str, configs))}; layer recipes with `extends` in TOML")
    return Command(
        config=configs[0] if configs else DEFAULT_CONFIG,
        overrides=tuple(overrides),
        resume=flags.get("resume", False),
        resume_path=resume_path,
        print_config=flags.get("print_config", False),
        dry_run=dry_run if dry_run is not None else "" if "dry_run" in flags else None,
        help=flags.get("help", False) or flags.get("h", False),
    )


@dataclass(frozen=True)
class Processes:
    """How many processes this launch means."""

    per_node: int
    nodes: int

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


def processes(environment: Mapping[str, str], recipe: object = None, gpus: int | None = None) -> Processes:
    """From the environment; without NPROC or NGPU one for each GPU, or one for a `recipe` that wants none.

    `gpus` are those that are visible, if not to this process. Raises UsageError.
    """
    per_node = environment.get("NPROC") or environment.get("NGPU")
    if per_node is None:
        if getattr(recipe, "device", "auto") == "cpu":
            gpus = 0
        if gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        per_node = str(max(1, gpus))
    nodes = environment.get("NNODES") or "1"
    for name, value in (("NPROC", per_node), ("NNODES", nodes)):
        if not value.isdigit() or int(value) < 1:
            raise UsageError(f"{name}={value}: a number of at least 1, please")
    return Processes(int(per_node), int(nodes))


def worker_processes(environment: Mapping[str, str]) -> Processes:
    """Those of the run that this process is one of."""
    world_size = int(environment["WORLD_SIZE"])
    per_node = int(environment.get("LOCAL_WORLD_SIZE") or world_size)
    return Processes(per_node, world_size // per_node) if world_size % per_node == 0 else Processes(world_size, 1)


def start_workers(count: Processes, environment: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Run this launcher in every process of this node; returns the exit status of the run. Raises UsageError."""
    from components.parallel.elastic import Node, run_workers

    numbers = {}
    for name, default in (("NODE_RANK", "0"), ("MASTER_PORT", "29500"), ("MAX_RESTARTS", "0")):
        value = environment.get(name) or default
        if not value.isdigit():
            raise UsageError(f"{name}={value}: a whole number, please")
        numbers[name] = int(value)
    if numbers["NODE_RANK"] >= count.nodes:
        raise UsageError(f"NODE_RANK={numbers['NODE_RANK']}: the {count.nodes} nodes of NNODES are counted from 0")
    if count.nodes > 1 and not environment.get("MASTER_ADDR"):
        raise UsageError(f"NNODES={count.nodes} needs MASTER_ADDR: the name of node 0, at which the others find it")
    node = Node(
        processes=count.per_node,
        nodes=count.nodes,
        rank=numbers["NODE_RANK"],
        address=environment.get("MASTER_ADDR") or "127.0.0.1",
        port=numbers["MASTER_PORT"],
        max_restarts=numbers["MAX_RESTARTS"],
    )
    try:
        return run_workers([sys.executable, "-u", str(ROOT / "recipes" / "__main__.py"), *arguments], node)
    except OSError as error:
        raise UsageError(f"the processes cannot be started: {error}") from error


def enable_flight_recorder(environment: MutableMapping[str, str], directory: Path) -> None:
    """Have NCCL write the latest collectives of every process to `directory` when one of them times out.

    What the user has set stays, also under the older name that torch still reads.
    """
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "20000",  # collectives: a few steps of them
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(directory.absolute() / FLIGHT_RECORDER),
    }
    for names, value in settings.items():
        if not any(name in environment for name in names):
            environment[names[0]] = value


def choose_allocator(environment: MutableMapping[str, str]) -> None:
    """Let the memory of a GPU grow in segments that fragmentation does not waste, unless the user has chosen otherwise.

    A run that fills a GPU frees and takes back gigabytes of gradients in every step. torch reads the variable, of which
    there are an old and a new spelling, when it is imported.
    """
    if not environment.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main(arguments: Sequence[str]) -> int:
    status, message = 0, ""
    choose_allocator(os.environ)
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it would end a process that is not ready to save yet
    if in_worker():
        from components.parallel.elastic import follow_launcher

        follow_launcher()
    try:
        status = run(arguments)
    except (ConfigError, UsageError) as error:
        status, message = 2, str(error)
        # Every process of a run finds the same error; one voice is enough.
        if os.environ.get("RANK", "0") == "0":
            print(message, file=sys.stderr)
    except RunError as error:  # rank 0 has logged it
        status, message = 1, str(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not in_worker():
            raise
        from components.parallel.elastic import crash

        crash(error)
        return 1
    if in_worker():
        from components.parallel.elastic import end

        return end(status, message)
    return status


def in_worker() -> bool:
    """Whether this is one process of a run, not the launcher that starts them."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    if command.help:
        print(HELP, end="")
        return 0
    config = load(command.config, command.overrides)
    if command.print_config:
        print(config.to_toml(), end="")
        return 0
    with blame(config, "recipe"):
        count = worker_processes(os.environ) if in_worker() else processes(os.environ, config.recipe)
    if command.dry_run is not None:
        return start_dry_run(config, count, command.dry_run)
    with blame(config, "parallel"):
        config.recipe.parallel.sizes(count.world_size, count.per_node)
    if in_worker() and "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "RANK and WORLD_SIZE are set, as in a process that torchrun has started, but LOCAL_RANK is not; unset them "
            "to start a run, or set all three for each process"
        )
    if not in_worker() and (count.world_size > 1 or "MAX_RESTARTS" in os.environ):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count.per_node)))
        if getattr(config.recipe, "device", "auto") != "cpu" and hasattr(config.recipe, "run"):
            enable_flight_recorder(os.environ, config.recipe.run.directory)
        return start_workers(count, os.environ, arguments)
    return start_recipe(config, command)


def start_dry_run(config: Config, count: Processes, text: str) -> int:
    """In this process, whatever the number of processes claimed."""
    from recipes.dry_run.plan import HardwareTarget
    from recipes.dry_run.report import print_report

    try:
        target = HardwareTarget.parse(text)
    except ValueError as error:
        raise UsageError(f"--dry-run: {error}") from None
    own = getattr(config.recipe, "dry_run", None)
    if own is not None:
        return int(own(config, count.world_size))
    return print_report(config, count.world_size, target, count.per_node)


def start_recipe(config: Config, command: Command) -> int:
    """Run the recipe in this process; an error the run can name is one line, not a traceback."""
    from recipes.resume import Resume

    resume = Resume(path=command.resume_path) if command.resume else None
    try:
        return int(config.recipe.main(config, resume))
    except RunError as error:
        log.error(str(error))
        raise
    except ConfigError:
        raise
    except Exception as error:
        if (remedy := out_of_memory(error)) is not None:
            raise ConfigError([config.problem("training.micro_batch_size", remedy)], started=True) from error
        where = f" in [{section}]" if (section := component_at_fault(config, error)) else ""
        log.critical(f"the run crashed{where}; the traceback is in log.txt, too", exc_info=True)
        raise
