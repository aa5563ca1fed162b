"""The command line: load one recipe, then run it in one process or start worker processes.

`--help` lists the options, the environment variables and the exit codes (EPILOG). The exit status of a run that is
stopped comes from `exit_status` of components/interrupts.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from components.errors import InputError
from components.garbage_collection import resume_after_imports
from components.protocol_defaults import with_defaults
from recipes.config import Config, ConfigError, Override, load
from recipes.config.errors import did_you_mean
from recipes.errors import RunError, config_errors_at, failing_component, out_of_memory_remedy
from recipes.process_environment import choose_allocator, enable_flight_recorder
from recipes.recipe import CheckpointDefaults, RunDefaults, complete_recipe

log = logging.getLogger("powertrain")
P = ParamSpec("P")

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "train_configs" / "debug.toml"

ERROR_FILE = "POWERTRAIN_ERROR_FILE"
"""Environment variable: path of a file to which the fields of a ConfigError are written, for other programs."""

EMPTY_VALUES = {
    "--resume": "needs a path; --resume alone continues from the newest checkpoint of this run",
    "--dry-run": "needs a device, as in --dry-run=H100; --dry-run alone shows several",
}
"""Options with an optional value, and the error message for an empty one."""

EPILOG = """\
environment:
  PYTHON                     interpreter used to create the environment
  NPROC or NGPU              processes on this node (default: its GPUs, or 1); any number for --dry-run
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NODE_ADDR
                             a run on several nodes; NNODES=2:4: on two to four, which may leave and join
  NODE_TIMEOUT               seconds without a heartbeat until a node is lost (default: 15, at least 5)
  JOIN_AFTER                 seconds that a new node waits before the run restarts with it (default: 60)
  MAX_RESTARTS               restarts after a failure (default: 0, with NNODES=2:4: 10)
  POWERTRAIN_LAUNCH          name of the launch, the same on all nodes (docs/multi_node.md)
  PYTORCH_ALLOC_CONF         settings of the GPU memory allocator (default: expandable_segments:True)

exit codes:
  0                          done
  1                          the run stopped itself, could not save its last step, or crashed
  2                          bad configuration or input, reported in one message
  128 + signal (130, 143)    stopped by a signal, after saving a checkpoint
"""


class UsageError(Exception):
    """The command line is invalid."""


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
    """Return the parser of everything except the overrides, whose names only the recipe knows."""
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
    text = "continue from the newest checkpoint of this run, or from PATH: a checkpoint or a run directory"
    option("--resume", metavar="=PATH", help=text)
    text = "print parameters, memory, steps, learning rates, time and problems, and exit; with DEVICE[@MFU], such as "
    option("--dry-run", metavar="=DEVICE[@MFU]", help=text + "H100, A100@45%%, cpu or @0.5, for that device and MFU")
    text = "print the resolved recipe as TOML, with where each value comes from, and exit"
    parser.add_argument("--print-config", action="store_true", help=text)
    parser.add_argument("-h", "--help", action="store_true", help="print this text and exit")
    return parser


def parse_arguments(arguments: Sequence[str]) -> Command:
    """Return the parsed command line. Raises UsageError."""
    overrides, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in EMPTY_VALUES:
            if equals and not value:
                raise UsageError(f"{argument} {EMPTY_VALUES[name]}")
            rest.append(f"{name}={value}")  # without `=` argparse would use the next argument as the value
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


def reports_bad_input(main: Callable[P, int]) -> Callable[P, int]:
    """Return `main` of a tool with errors that stand for bad input printed, and exit status 2 for them."""

    @wraps(main)
    def reported(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (ConfigError, UsageError, ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2

    return reported


def parse_recipe(arguments: Sequence[str]) -> Command:
    """Return the recipe and overrides on the command line of a tool. Raises UsageError, also for launcher options."""
    command = parse_arguments(arguments)
    if command.resume or command.print_config or command.dry_run is not None:
        raise UsageError("--resume, --print-config and --dry-run are options of ./run_train.sh only")
    return command


@dataclass(frozen=True)
class WorldShape:
    """The number of processes of a launch."""

    per_node: int
    nodes: int
    min_nodes: int = 0
    """The smallest number of nodes that an elastic run continues with; 0: `nodes`."""

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


def resolve_world_shape(environment: Mapping[str, str], recipe: object = None, gpus: int | None = None) -> WorldShape:
    """Return the world shape that the environment asks for.

    Without NPROC or NGPU it is one process per GPU, or one process for a `recipe` on the CPU. `gpus` is the number of
    GPUs; by default those visible to this process. Raises UsageError.
    """
    per_node = environment.get("NPROC") or environment.get("NGPU")
    if per_node is None:
        if complete_recipe(recipe).device == "cpu":
            gpus = 0
        if gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        per_node = str(max(1, gpus))
    given = environment.get("NNODES") or "1"
    smallest, elastic, nodes = given.partition(":")
    nodes = nodes if elastic else smallest
    for name, whole, value in (("NPROC", per_node, per_node), ("NNODES", given, smallest), ("NNODES", given, nodes)):
        if not value.isdigit() or int(value) < 1:
            form = ", or two such as 2:4" if name == "NNODES" else ""
            raise UsageError(f"{name}={whole}: expected a whole number >= 1{form}")
    if int(smallest) > int(nodes):
        raise UsageError(f"NNODES={smallest}:{nodes}: the smallest number of nodes is above the largest")
    return WorldShape(int(per_node), int(nodes), int(smallest) if elastic else 0)


def worker_world_shape(environment: Mapping[str, str]) -> WorldShape:
    """Return the world shape of the run to which this worker process belongs."""
    world_size = int(environment["WORLD_SIZE"])
    per_node = int(environment.get("LOCAL_WORLD_SIZE") or world_size)
    return WorldShape(per_node, world_size // per_node) if world_size % per_node == 0 else WorldShape(world_size, 1)


def launch_workers(
    shape: WorldShape,
    environment: Mapping[str, str],
    arguments: Sequence[str],
    *,
    hang_timeout_seconds: float | None = None,
) -> int:
    """Start this command line in every worker process of this node. Returns the exit status. Raises UsageError."""
    from components.distributed.launcher import run_workers
    from components.distributed.membership import Patience
    from components.distributed.node import NodeSpec

    numbers, elastic = {}, shape.min_nodes > 0
    defaults = {"NODE_RANK": "0", "MASTER_PORT": "29500", "MAX_RESTARTS": "10" if elastic else "0"}
    defaults |= {"NODE_TIMEOUT": "15", "JOIN_AFTER": "60"}
    for name, default in defaults.items():
        value = environment.get(name) or default
        if not value.isdigit():
            raise UsageError(f"{name}={value}: expected a whole number >= 0")
        numbers[name] = int(value)
    if numbers["NODE_TIMEOUT"] < 5:
        raise UsageError(f"NODE_TIMEOUT={numbers['NODE_TIMEOUT']}: expected at least 5 seconds")
    if numbers["NODE_RANK"] >= shape.nodes and not elastic:
        raise UsageError(
            f"NODE_RANK={numbers['NODE_RANK']}: expected 0 to {shape.nodes - 1}, because NNODES={shape.nodes}"
        )
    if shape.nodes > 1 and not environment.get("MASTER_ADDR"):
        raise UsageError(f"NNODES={shape.nodes} needs MASTER_ADDR: the host name of node 0")
    node = NodeSpec(
        processes=shape.per_node,
        nodes=shape.nodes,
        min_nodes=shape.min_nodes,
        rank=None if elastic and not environment.get("NODE_RANK") else numbers["NODE_RANK"],
        address=environment.get("MASTER_ADDR") or "127.0.0.1",
        port=numbers["MASTER_PORT"],
        max_restarts=numbers["MAX_RESTARTS"],
        hang_timeout_seconds=hang_timeout_seconds,
        patience=Patience(lost_after=numbers["NODE_TIMEOUT"], join_after=numbers["JOIN_AFTER"]),
    )
    try:
        return run_workers([sys.executable, "-u", str(ROOT / "recipes" / "__main__.py"), *arguments], node)
    except OSError as error:
        raise UsageError(f"cannot start the worker processes: {error}") from error


def main(arguments: Sequence[str]) -> int:
    """Run the command line, report its errors, and return the exit status."""
    status, message = 0, ""
    choose_allocator(os.environ)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)  # the default would kill a process that is not ready to save yet
    if is_worker():
        from components.distributed.heartbeat import dump_stacks_on_request
        from components.distributed.worker import die_with_launcher

        die_with_launcher()
        dump_stacks_on_request()
    try:
        status = run_command(arguments)
    except (ConfigError, UsageError) as error:
        status, message = 2, str(error)
        if os.environ.get("RANK", "0") == "0":  # all ranks hit the same error; print it once
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
        from components.distributed.worker import report_crash

        report_crash(error)
        return 1
    if is_worker():
        from components.distributed.worker import report_exit

        return report_exit(status, message)
    return status


def is_worker() -> bool:
    """Return whether this process is a worker of a run, not the launcher."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_command(arguments: Sequence[str]) -> int:
    """Do what the command line asks for, and return the exit status."""
    command = parse_arguments(arguments)
    if command.help:
        print(make_parser().format_help(), end="")
        return 0
    config = load(command.config, command.overrides)
    resume_after_imports()
    if command.print_config:
        print(config.to_toml(), end="")
        return 0
    with config_errors_at(config, "recipe"):
        shape = worker_world_shape(os.environ) if is_worker() else resolve_world_shape(os.environ, config.recipe)
    if command.dry_run is not None:
        return start_dry_run(config, shape, command.dry_run)
    with config_errors_at(config, "parallel"):
        check_layouts(config.recipe.parallel, shape)
    if is_worker() and "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "RANK and WORLD_SIZE are set, as by torchrun, but LOCAL_RANK is not; unset them to start a run, or set all "
            "three in each process"
        )
    recipe = complete_recipe(config.recipe)
    hang_timeout = with_defaults(recipe.run, RunDefaults).hang_timeout_seconds
    several = shape.world_size > 1 or shape.min_nodes > 0
    if not is_worker() and (several or hang_timeout is not None or "MAX_RESTARTS" in os.environ):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // shape.per_node)))
        if recipe.device != "cpu" and recipe.run is not None:
            enable_flight_recorder(os.environ, recipe.run.directory)
        with ExitStack() as cleanup:
            if with_defaults(recipe.checkpoint, CheckpointDefaults).in_memory_interval_steps is not None:
                from components.checkpoint.host_memory import make_host_memory_directory

                cleanup.enter_context(make_host_memory_directory())
            return launch_workers(shape, os.environ, arguments, hang_timeout_seconds=hang_timeout)
    return start_recipe(config, command)


def check_layouts(parallel: Any, shape: WorldShape) -> None:
    """Raise InputError if [parallel] does not fit the processes, with any number of nodes of an elastic run."""
    for nodes in range(shape.min_nodes or shape.nodes, shape.nodes + 1):
        try:
            parallel.mesh_shape(shape.per_node * nodes, shape.per_node)
        except InputError as error:
            if not shape.min_nodes:
                raise
            counts = f"NNODES={shape.min_nodes}:{shape.nodes}"
            raise InputError(error.key, f"{error.message}; {counts} may mean {nodes} nodes") from None


def start_dry_run(config: Config, shape: WorldShape, text: str) -> int:
    """Print the dry run of `shape`, which may have any number of processes, from this process."""
    from recipes.dry_run.plan import HardwareTarget
    from recipes.dry_run.report import print_report

    try:
        target = HardwareTarget.parse(text)
    except ValueError as error:
        raise UsageError(f"--dry-run: {error}") from None
    custom = complete_recipe(config.recipe).dry_run
    if custom is not None:
        return int(custom(config, shape.world_size))
    return print_report(config, shape.world_size, target, shape.per_node)


def start_recipe(config: Config, command: Command) -> int:
    """Run the recipe in this process. An expected failure is reported in one line, without a traceback."""
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
        if (remedy := out_of_memory_remedy(error)) is not None:
            raise ConfigError([config.problem("training.micro_batch_size", remedy)], started=True) from error
        where = f" in [{section}]" if (section := failing_component(config, error)) else ""
        log.critical(f"the run crashed{where}; the traceback is also in log.txt", exc_info=True)
        raise
