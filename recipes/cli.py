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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import NoReturn, ParamSpec

from components.garbage_collection import resume_after_imports
from recipes.config import Config, ConfigError, Override, load
from recipes.config.errors import did_you_mean
from recipes.errors import RunError, UsageError, config_errors_at, failing_component, out_of_memory_remedy
from recipes.launch import (
    WorldShape,
    check_layouts,
    is_worker,
    launch_recipe,
    needs_launcher,
    resolve_world_shape,
    worker_world_shape,
)
from recipes.process_environment import choose_allocator
from recipes.recipe import complete_recipe

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


def main(arguments: Sequence[str]) -> int:
    """Run the command line, report its errors, and return the exit status."""
    choose_allocator(os.environ)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)  # the default would kill a process that is not ready to save yet
    try:
        return run_worker(arguments) if is_worker() else run_and_print_failure(arguments)[0]
    except KeyboardInterrupt:
        return 130


def run_worker(arguments: Sequence[str]) -> int:
    """Run the command line in a worker process, and report to its launcher how it ends. Returns the exit status."""
    from components.distributed.heartbeat import dump_stacks_on_request
    from components.distributed.worker import die_with_launcher, report_crash, report_exit

    die_with_launcher()
    dump_stacks_on_request()
    try:
        status, message = run_and_print_failure(arguments)
    except Exception as error:
        report_crash(error)
        return 1
    return report_exit(status, message)


def run_and_print_failure(arguments: Sequence[str]) -> tuple[int, str]:
    """Run the command line, and print an expected failure. Returns the exit status and the message."""
    try:
        return run_command(arguments), ""
    except (ConfigError, UsageError) as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks hit the same error; print it once
            print(error, file=sys.stderr)
            if isinstance(error, ConfigError) and ERROR_FILE in os.environ:
                Path(os.environ[ERROR_FILE]).write_text(json.dumps(error.fields()), encoding="utf-8")
        return 2, str(error)
    except RunError as error:  # rank 0 has logged it
        return 1, str(error)


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
    if not is_worker() and needs_launcher(config.recipe, shape, os.environ):
        return launch_recipe(config.recipe, shape, arguments)
    return start_recipe(config, command)


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
