"""The command line: one recipe, resolved once, then run in one process or in many.

`--help` lists the options, the environment variables and the exit codes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from components.run_directory import FLIGHT_RECORDER
from recipes.config import Config, ConfigError, Override, load
from recipes.config.errors import did_you_mean
from recipes.errors import RunError, config_errors_at, failing_component, is_out_of_memory
from recipes.recipe import complete_recipe

log = logging.getLogger("powertrain")

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "train_configs" / "debug.toml"

ERROR_FILE = "POWERTRAIN_ERROR_FILE"
"""Environment variable with the path of a file that the fields of a ConfigError are written to, for other programs."""

EMPTY_VALUES = {
    "--resume": "needs a path; --resume alone takes the newest checkpoint of this run",
    "--dry-run": "needs a device, as in --dry-run=H100; --dry-run alone shows several",
}
"""The options whose value may be left out, and what is said of one that is empty."""

EPILOG = """\
environment:
  PYTHON                     interpreter to set up with
  NPROC or NGPU              processes on this node (default: its GPUs, or 1); a dry run may claim any number
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                             several nodes
  MAX_RESTARTS               restarts after a failure (default: 0)
  PYTORCH_ALLOC_CONF         memory allocator of GPUs (default: expandable_segments:True)

exit codes:
  0                          done
  1                          the run stopped itself, could not save its last step, or crashed
  2                          bad configuration or input, reported in one message
  128 + signal (130, 143)    stopped by a signal, after saving a checkpoint
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of everything but the overrides, whose names only the recipe knows."""
    parser = _Parser(
        prog="run_train.sh",
        usage="run_train.sh [CONFIG.toml] [--section.key=value]... [--resume[=PATH]] [--print-config]\n"
        "                    [--dry-run[=DEVICE[@MFU]]]",
        description="Pre-train from a recipe. --section.key=value, or --section.key value, sets a key of the recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    default = DEFAULT_CONFIG.relative_to(ROOT)
    option = partial(parser.add_argument, nargs="?")
    option("config", metavar="CONFIG.toml", type=Path, default=DEFAULT_CONFIG, help=f"the recipe (default: {default})")
    text = "continue from this run's newest checkpoint, or from PATH, which may be one checkpoint or a run directory"
    option("--resume", metavar="=PATH", help=text)
    text = "print parameters, memory, steps, learning rates, time and problems, and exit; with DEVICE[@MFU], such as "
    option("--dry-run", metavar="=DEVICE[@MFU]", help=text + "H100, A100@45%%, cpu or @0.5, for that device and MFU")
    text = "print the resolved recipe as TOML, with where each value comes from, and exit"
    parser.add_argument("--print-config", action="store_true", help=text)
    parser.add_argument("-h", "--help", action="store_true", help="print this text and exit")
    return parser


def parse(arguments: Sequence[str]) -> Command:
    """Return the parsed command line. Raises UsageError."""
    overrides, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in EMPTY_VALUES:
            if equals and not value:
                raise UsageError(f"{argument} {EMPTY_VALUES[name]}")
            rest.append(f"{name}={value}")  # without one argparse would take the next argument for it
        elif name.startswith("--") and ("." in name or (equals and name[2:].isidentifier())):
            value = value if equals else next(remaining, "--")
            if not equals and value.startswith("--"):
                raise UsageError(f"{name} needs a value: {name}=VALUE")
            overrides.append(Override(name[2:], value))
        else:
            rest.append(argument)
    parser = make_parser()
    options, unknown = parser.parse_known_args(rest)
    if unknown and unknown[0].startswith("-"):
        match = did_you_mean(unknown[0], ("--resume", "--print-config", "--dry-run", "--help"))
        hint = f"did you mean {match}?" if match else "to override a key of the recipe write --section.key=value"
        raise UsageError(f"unknown option {unknown[0]}; {hint}")
    if unknown:
        recipes = [str(options.config), *unknown]
        raise UsageError(
            f"expected one recipe, got {len(recipes)}: {' '.join(recipes)}; combine recipes with `extends`"
        )
    return Command(
        config=options.config,
        overrides=tuple(overrides),
        resume=options.resume is not None,
        resume_path=Path(options.resume) if options.resume else None,
        print_config=options.print_config,
        dry_run=options.dry_run,
        help=options.help,
    )


def parse_recipe(arguments: Sequence[str]) -> Command:
    """Return the recipe and overrides that a tool is given. Raises UsageError, for options of the launcher, too."""
    command = parse(arguments)
    if command.resume or command.print_config or command.dry_run is not None:
        raise UsageError("--resume, --print-config and --dry-run are for the launcher: ./run_train.sh")
    return command


@dataclass(frozen=True)
class WorldShape:
    """How many processes this launch means."""

    per_node: int
    nodes: int

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


def resolve_world_shape(environment: Mapping[str, str], recipe: object = None, gpus: int | None = None) -> WorldShape:
    """From the environment; without NPROC or NGPU one for each GPU, or one for a `recipe` that wants none.

    `gpus` are those that are visible, if not to this process. Raises UsageError.
    """
    per_node = environment.get("NPROC") or environment.get("NGPU")
    if per_node is None:
        if complete_recipe(recipe).device == "cpu":
            gpus = 0
        if gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        per_node = str(max(1, gpus))
    nodes = environment.get("NNODES") or "1"
    for name, value in (("NPROC", per_node), ("NNODES", nodes)):
        if not value.isdigit() or int(value) < 1:
            raise UsageError(f"{name}={value}: expected a whole number >= 1")
    return WorldShape(int(per_node), int(nodes))


def worker_world_shape(environment: Mapping[str, str]) -> WorldShape:
    """Those of the run that this process is one of."""
    world_size = int(environment["WORLD_SIZE"])
    per_node = int(environment.get("LOCAL_WORLD_SIZE") or world_size)
    return WorldShape(per_node, world_size // per_node) if world_size % per_node == 0 else WorldShape(world_size, 1)


def launch_workers(count: WorldShape, environment: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Run this launcher in every process of this node; returns the exit status of the run. Raises UsageError."""
    from components.distributed.launcher import NodeSpec, run_workers

    numbers = {}
    for name, default in (("NODE_RANK", "0"), ("MASTER_PORT", "29500"), ("MAX_RESTARTS", "0")):
        value = environment.get(name) or default
        if not value.isdigit():
            raise UsageError(f"{name}={value}: expected a whole number >= 0")
        numbers[name] = int(value)
    if numbers["NODE_RANK"] >= count.nodes:
        raise UsageError(f"NODE_RANK={numbers['NODE_RANK']}: the {count.nodes} nodes of NNODES are counted from 0")
    if count.nodes > 1 and not environment.get("MASTER_ADDR"):
        raise UsageError(f"NNODES={count.nodes} needs MASTER_ADDR: the name of node 0, at which the others find it")
    node = NodeSpec(
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
    if is_worker():
        from components.distributed.launcher import die_with_launcher

        die_with_launcher()
    try:
        status = run(arguments)
    except (ConfigError, UsageError) as error:
        status, message = 2, str(error)
        if os.environ.get("RANK", "0") == "0":  # every process of a run finds the same error
            print(message, file=sys.stderr)
            if isinstance(error, ConfigError) and ERROR_FILE in os.environ:
                Path(os.environ[ERROR_FILE]).write_text(json.dumps(error.fields()), encoding="utf-8")
    except RunError as error:  # rank 0 has logged it
        status, message = 1, str(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_worker():
            raise
        from components.distributed.launcher import report_crash

        report_crash(error)
        return 1
    if is_worker():
        from components.distributed.launcher import report_exit

        return report_exit(status, message)
    return status


def is_worker() -> bool:
    """Whether this is one process of a run, not the launcher that starts them."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    if command.help:
        print(make_parser().format_help(), end="")
        return 0
    config = load(command.config, command.overrides)
    if command.print_config:
        print(config.to_toml(), end="")
        return 0
    with config_errors_at(config, "recipe"):
        count = worker_world_shape(os.environ) if is_worker() else resolve_world_shape(os.environ, config.recipe)
    if command.dry_run is not None:
        return start_dry_run(config, count, command.dry_run)
    with config_errors_at(config, "parallel"):
        config.recipe.parallel.mesh_shape(count.world_size, count.per_node)
    if is_worker() and "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "RANK and WORLD_SIZE are set, as in a process that torchrun has started, but LOCAL_RANK is not; unset them "
            "to start a run, or set all three for each process"
        )
    if not is_worker() and (count.world_size > 1 or "MAX_RESTARTS" in os.environ):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count.per_node)))
        recipe = complete_recipe(config.recipe)
        if recipe.device != "cpu" and recipe.run is not None:
            enable_flight_recorder(os.environ, recipe.run.directory)
        return launch_workers(count, os.environ, arguments)
    return start_recipe(config, command)


def start_dry_run(config: Config, count: WorldShape, text: str) -> int:
    """In this process, whatever the number of processes claimed."""
    from recipes.dry_run.plan import HardwareTarget
    from recipes.dry_run.report import print_report

    try:
        target = HardwareTarget.parse(text)
    except ValueError as error:
        raise UsageError(f"--dry-run: {error}") from None
    own = complete_recipe(config.recipe).dry_run
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
        if (remedy := is_out_of_memory(error)) is not None:
            raise ConfigError([config.problem("training.micro_batch_size", remedy)], started=True) from error
        where = f" in [{section}]" if (section := failing_component(config, error)) else ""
        log.critical(f"the run crashed{where}; the traceback is in log.txt, too", exc_info=True)
        raise
