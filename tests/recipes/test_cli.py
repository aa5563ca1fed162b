"""The command line, and what it means for processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.distributed.launcher import numa_options
from components.distributed.node import NodeSpec
from recipes import cli
from recipes.cli import DEFAULT_CONFIG, Command, parse_arguments
from recipes.config import ConfigError, Override, load
from recipes.errors import UsageError
from recipes.launch import WorldShape, launch_workers, needs_launcher, resolve_world_shape
from recipes.process_environment import choose_allocator, enable_flight_recorder

pytestmark = pytest.mark.quick


def test_without_a_recipe_it_is_the_debug_one():
    command = parse_arguments([])
    assert command.config == DEFAULT_CONFIG
    assert DEFAULT_CONFIG.is_file()


def test_both_forms_of_an_override():
    command = parse_arguments(
        ["my.toml", "--training.total_tokens=4B", "--run.name", "x", "--batch.initial_size", "-3"]
    )
    assert command.config == Path("my.toml")
    assert command.overrides == (
        Override("training.total_tokens", "4B"),
        Override("run.name", "x"),
        Override("batch.initial_size", "-3"),
    )


def test_an_override_may_hold_an_equals_sign():
    assert parse_arguments(["--run.name=a=b"]).overrides == (Override("run.name", "a=b"),)


@pytest.mark.parametrize(
    ("arguments", "resume", "path"),
    [([], False, None), (["--resume"], True, None), (["--resume=runs/x"], True, Path("runs/x"))],
)
def test_resume(arguments, resume, path):
    command = parse_arguments(arguments)
    assert (command.resume, command.resume_path) == (resume, path)


def test_options_and_the_recipe_may_come_in_any_order():
    for arguments in (["--resume", "my.toml", "--print-config"], ["--print-config", "--resume", "my.toml"]):
        assert parse_arguments(arguments) == Command(Path("my.toml"), resume=True, print_config=True)


def test_help_lists_options_and_exit_codes(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--resume", "--print-config", "--dry-run", "--section.key=value"))
    assert "exit codes:" in said and "MASTER_ADDR" in said


@pytest.mark.parametrize(
    ("arguments", "claim"), [([], None), (["--dry-run"], ""), (["--dry-run=H100@45%"], "H100@45%")]
)
def test_dry_run(arguments, claim):
    assert parse_arguments(arguments).dry_run == claim


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dry-run="], "needs a device"),
        (["--resume="], "needs a path"),
        (["--run.name"], "needs a value"),
        (["--run.name", "--dry-run"], "needs a value"),
        (["--frobnicate"], "--section.key=value"),
        (["-x"], "unknown option -x; to override a key of the recipe write"),
        (["--print_config"], "unknown option --print_config; did you mean --print-config"),
        (["--resme"], "did you mean --resume"),
        (["a.toml", "b.toml"], "expected one recipe, got 2: a.toml b.toml"),
        (["a.toml", "--print-config", "b.toml"], "expected one recipe, got 2: a.toml b.toml"),
    ],
)
def test_invalid_arguments_are_reported(arguments, said):
    with pytest.raises(UsageError, match=said):
        parse_arguments(arguments)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NPROC": "2"}, WorldShape(2, 1)),
        ({"NGPU": "8", "NNODES": "4"}, WorldShape(8, 4)),
    ],
)
def test_processes_from_the_environment(environment, expected):
    assert resolve_world_shape(environment) == expected


def test_a_process_for_each_gpu_unless_the_recipe_wants_none(tiny):
    on_gpus, on_cpu = (load(tiny.recipe, [Override("run.device", device)]).recipe for device in ("auto", "cpu"))
    assert resolve_world_shape({}, on_gpus, gpus=8) == WorldShape(8, 1)
    assert resolve_world_shape({}, on_cpu, gpus=8) == WorldShape(1, 1)
    assert resolve_world_shape({"NPROC": "2"}, on_cpu, gpus=8) == WorldShape(2, 1)
    assert resolve_world_shape({}, on_gpus, gpus=0) == WorldShape(1, 1)


@pytest.mark.parametrize(
    ("shape", "environment", "expected"),
    [
        (WorldShape(1, 1), {}, False),
        (WorldShape(1, 1), {"MAX_RESTARTS": "1"}, True),
        (WorldShape(2, 1), {}, True),
        (WorldShape(1, 1, 1), {}, True),
    ],
)
def test_a_recipe_without_sections_has_a_launcher_for_several_processes_and_for_restarts(shape, environment, expected):
    assert needs_launcher(object(), shape, environment) is expected


def test_a_hang_timeout_needs_a_launcher(tiny):
    recipe = load(tiny.recipe, [Override("run.hang_timeout_seconds", "60")]).recipe
    assert needs_launcher(recipe, WorldShape(1, 1), {})


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_gpus_is_chosen_unless_the_user_has_chosen(name):
    environment = {"HOME": "/"}
    choose_allocator(environment)
    assert environment == {"HOME": "/", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment = {name: "max_split_size_mb:512"}
    choose_allocator(environment)
    assert environment == {name: "max_split_size_mb:512"}


def test_the_allocator_is_chosen_before_torch_is_imported():
    """torch reads the variable once."""
    code = (
        "import os, sys\n"
        "import recipes.cli as cli\n"
        "cli.choose_allocator(os.environ)\n"
        "assert 'torch' not in sys.modules, 'too late'\n"
    )
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=cli.ROOT, env=environment)


@pytest.mark.parametrize(
    ("processes", "gpus", "usable", "numactl", "is_bound"),
    [
        (8, 8, 16, "/usr/bin/numactl", True),
        (2, 0, 16, "/usr/bin/numactl", False),
        (8, 4, 16, "/usr/bin/numactl", False),
        (8, 8, 8, "/usr/bin/numactl", False),  # a scheduler has bound them already
        (8, 8, 16, None, False),
    ],
)
def test_processes_are_bound_to_the_processors_near_their_gpus(monkeypatch, processes, gpus, usable, numactl, is_bound):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(usable)), raising=False)
    monkeypatch.setattr("shutil.which", lambda program: numactl)
    assert (numa_options(processes) is not None) is is_bound


@pytest.mark.parametrize("environment", [{"NPROC": "two"}, {"NPROC": "0"}, {"NPROC": "1", "NNODES": "x"}])
def test_an_invalid_number_of_processes_is_reported(environment):
    with pytest.raises(UsageError, match="expected a whole number >= 1"):
        resolve_world_shape(environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "NNODES=2 needs MASTER_ADDR"),
        ({"MASTER_ADDR": "node0", "NODE_RANK": "2"}, "NODE_RANK=2: expected 0 to 1"),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "high"}, "MASTER_PORT=high"),
        ({"MASTER_ADDR": "node0", "MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1"),
        ({"MASTER_ADDR": "node0", "NODE_TIMEOUT": "4"}, "NODE_TIMEOUT=4: expected at least 5 seconds"),
    ],
)
def test_nodes_that_cannot_meet_are_reported_with_the_reason(environment, said):
    with pytest.raises(UsageError, match=said):
        launch_workers(WorldShape(8, 2), environment, ["my.toml"])


def test_an_elastic_run_has_a_smallest_and_a_largest_number_of_nodes():
    assert resolve_world_shape({"NPROC": "8", "NNODES": "2:4"}) == WorldShape(8, 4, 2)
    assert resolve_world_shape({"NPROC": "8", "NNODES": "4"}) == WorldShape(8, 4)
    for nodes, said in (
        ("4:2", "NNODES=4:2: the smallest"),
        (":2", "NNODES=:2: expected"),
        ("2:x", "NNODES=2:x: expected"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve_world_shape({"NPROC": "8", "NNODES": nodes})


def test_an_elastic_run_is_refused_if_a_number_of_nodes_does_not_fit(tiny, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("NNODES", "2:4")
    with pytest.raises(ConfigError, match=r"not the 6 processes of this run.*NNODES=2:4 may mean 3 nodes"):
        cli.run_command([str(tiny.recipe), "--parallel.dp_replicate=4"])


def test_rank_variables_without_torchrun_are_reported(tiny, monkeypatch, capsys):
    """As some schedulers set it for each machine."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UsageError, match=r"RANK and WORLD_SIZE are set, .* LOCAL_RANK is not; unset them"):
        cli.run_command([str(tiny.recipe)])


def test_several_nodes_meet_at_node_0():
    first = NodeSpec(processes=8, nodes=2, rank=0, address="node0", port=1234).rendezvous()
    second = NodeSpec(processes=8, nodes=2, rank=1, address="node0", port=1234).rendezvous()
    assert first.endpoint == second.endpoint == "node0:1234"
    assert (first.get_as_bool("is_host"), second.get_as_bool("is_host")) == (True, False)
    assert NodeSpec(processes=8).rendezvous().endpoint == "127.0.0.1:0", "one node needs no port of its own"


def test_the_flight_recorder_writes_to_the_run_directory_unless_the_user_said_otherwise(tmp_path):
    environment: dict[str, str] = {}
    enable_flight_recorder(environment, tmp_path)
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl_trace_rank_",
    }
    chosen = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "mine"}
    environment = dict(chosen)
    enable_flight_recorder(environment, tmp_path)
    assert environment == chosen
