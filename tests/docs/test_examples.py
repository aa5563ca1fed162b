"""Every fenced command, recipe and Python file of README.md and docs/ works, at a tiny size.

The examples of a page are run in order, in this process, in a folder that holds what pages take for granted: a text, a
custom recipe, a trained run. Commands that cannot be run here are listed in `NOT_RUN`, with the reason, and parsed.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from recipes import cli
from recipes.config import Override, load
from tests.conftest import TEXT, launch_here
from tests.docs.fences import PAGES, ROOT, SHELLS, Command, Fence, read_commands, read_fences

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OTHERS = "is another project's; tests/tools/test_other_readers.py runs it where it is installed"
NOT_RUN = {
    # program: the reason
    "pip-audit": "needs the network",
    "cyclonedx-py": "is installed in an environment of its own",
    "git": "needs a repository to clone from",
    "cd": "goes where a clone is",
    "source": "changes the shell of the reader",
    "pip": "needs the network",
    "run_tests.sh": "is what runs this",
    "python -m venv": "makes an environment for what needs the network",
    "python -m pytest": "is what runs this",
    "python -m tools.sweep": "trains 64 runs; tests/tools/sweep/ has small ones",
    "python -m tools.plan_run": "trains 36 runs; tests/tools/plan_run/ has small ones",
    "python -m benchmarks": "measures for minutes or hours; the tests of each benchmark run it at a tiny size",
    "lm_eval": OTHERS,
    "mlx_lm.generate": OTHERS,
    "ct2-transformers-converter": OTHERS,
    "sbatch": "needs a cluster",
    "kubectl": "needs a cluster",
    "torchfrtrace": "needs what NCCL leaves when a GPU hangs",
    "python -m tools.rendezvous": "waits for nodes; tests/distributed/test_multi_node.py has some",
    "torchrun": "starts several processes; tests/tools/test_generate.py runs the tool in two",
    "kill": "needs a run under way; tests/end_to_end/test_requests.py signals one",
    "touch": "needs a run under way; tests/end_to_end/test_requests.py stops one",
}
TINY = {
    "run": ["max_minutes=1e-9", "device=cpu"],
    "training": ["sequence_length=32", "micro_batch_size=2", "precision=float32"],
    "model": ["dim=16", "layers=1", "heads=2", "kv_heads=2", "head_dim=8", "ffn_dim=32"],
    "validation": ["max_sequences=2"],
    "branches": ["tokens=2048", "smoothing_tokens=512"],
    "evaluation": ["limit=2", "device=cpu", "precision=float32"],
}
"""Section -> keys that every recipe with that section is given: a step of a small model.

The run saves and stops after one step, with status 143, because its time is over.
"""
TOOLS = {
    "tools.coord_check": [
        "--widths",
        "32",
        "64",
        "--base-width",
        "32",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--tolerance",
        "9",
    ],
    "tools.train_tokenizer": ["--vocab-size", "300"],
    "tools.generate": ["--max-tokens", "3", "--device", "cpu"],
}
"""Tool -> arguments that make it quick."""
SEVERAL = {"NPROC", "NNODES"}
"""Environment variables of a launch of several processes, which gets `--dry-run`: tests/distributed/ starts some."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with the files that the pages refer to."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("assets", "tests", "tools"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "train_configs", folder / "train_configs")
    for place in ("my_text", "novels/train", "novels/valid", "web", "books"):
        (folder / place).mkdir(parents=True)
        for number in range(150):
            (folder / place / f"{number}.txt").write_text(f"{number} {TEXT} {place} ")
    for name in ("my", "mine", "base", "my_recipe", "plan"):
        (folder / f"{name}.toml").write_text(f'extends = ["train_configs/debug.toml"]\n[run]\nname = "{name}"\n')
    (folder / "prompts.txt").write_text("def\n")
    return folder


@pytest.fixture(scope="module")
def trained(prepared: Path) -> Path:
    """Add the results of runs, exports and other tools to the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        patch.setenv("XDG_CACHE_HOME", str(prepared.parent / "docs-cache"))
        assert launch_here(shrink(["train_configs/debug.toml"])) == 143
        export, imports = (importlib.import_module(f"tools.{name}") for name in ("export_hf", "import_hf"))
        assert export.main(["runs/debug", "exported"]) == 0
        shutil.copytree("exported", "downloaded")
        assert imports.main(["downloaded", "imported"]) == 0
        shutil.copytree("runs/debug", "runs/a")
        train = importlib.import_module("tools.train_tokenizer")
        assert train.main(["--path", "my_text", "--vocab-size", "300", "--output", "my.tiktoken"]) == 0
        for name in ("novels", "novels2048"):
            shutil.copy("my.tiktoken", f"{name}.tiktoken")
    return prepared


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a copy of the folder for one page."""
    place = tmp_path / "place"
    shutil.copytree(trained, place, symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained.parent / "docs-cache"))
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    known = set(sys.modules)
    for name in ("RANK", "WORLD_SIZE", "NPROC", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    yield place
    for name in set(sys.modules) - known:  # modules of the examples; two pages may use the same name
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(place)):
            del sys.modules[name]


def shrink(arguments: list[str]) -> list[str]:
    """Return launch arguments that make the run one step of a small model; checkpoint paths name that step."""
    arguments = [re.sub(r"step-\d{8}", "step-00000001", argument) for argument in arguments]
    command = cli.parse_arguments(arguments)
    if command.print_config or command.dry_run is not None:
        return arguments
    recipe = load(command.config, command.overrides).recipe
    sections = (section for section in TINY if getattr(recipe, section, None) is not None)
    return [*arguments, *(f"--{section}.{key}" for section in sections for key in TINY[section])]


@pytest.mark.parametrize("page", [page for page in PAGES if read_fences(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_work(page: Path, folder: Path, tmp_path: Path) -> None:
    fences = list(read_fences(page))
    for fence in fences:
        if fence.file:  # first of all: a recipe may come before the component it names
            Path(fence.file).write_text(fence.text)
    for fence in fences:
        if fence.language == "python":
            example = Path(fence.file or f"example_{fence.line}.py")
            example.write_text(fence.text)
            importlib.import_module(example.stem)
        elif fence.language == "toml":
            check_recipe(fence)
        elif fence.language in SHELLS:
            commands = tmp_path / f"commands-{fence.line}"
            commands.mkdir()
            for command in read_commands(fence, commands):
                run(command)


def check_recipe(fence: Fence) -> None:
    """Merge a table over the debug recipe; all its keys must exist and have the right type."""
    tables = tomllib.loads(fence.text)
    recipe = Path("example.toml") if "extends" in tables else Path("train_configs/example.toml")
    text = fence.text if "extends" in tables else f'extends = ["debug.toml"]\n{fence.text}'
    recipe = Path(fence.file) if fence.file else recipe
    recipe.write_text(text)
    training = tables.get("training", {})
    load(recipe, [] if "total_tokens" in training else [Override("training.total_tokens", "100B")])


def run(command: Command) -> None:
    name, *arguments = command.words
    name = Path(name).name
    module = ""
    if name == "python":
        _, module, *arguments = arguments
        name = f"python -m {module}"
    if reasons := [NOT_RUN[program] for program in NOT_RUN if f"{name}.".startswith(f"{program}.")]:
        print(f"{command}: not run, {reasons[0]}")
        if module.startswith(("tools", "benchmarks")):
            check_options(module, arguments, command)
    elif name == "run_train.sh":
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in command.environment.items():
                patch.setenv(variable, value)
            if SEVERAL & command.environment.keys() and not any(
                argument.startswith("--dry-run") for argument in arguments
            ):
                arguments.append("--dry-run=cpu")
            assert launch_here(shrink(arguments)) in (0, 143), str(command)
    elif module.startswith("tools."):
        if module in ("tools.export_hf", "tools.import_hf"):
            shutil.rmtree(arguments[1], ignore_errors=True)  # made by the fixture
        if module == "tools.train_tokenizer":
            Path(arguments[arguments.index("--output") + 1]).unlink(missing_ok=True)
        assert not main_of(module)([*arguments, *TOOLS.get(module, [])]), str(command)
    else:
        pytest.fail(f"{command}: no known program; add it to NOT_RUN with the reason if it cannot be run")


def main_of(module: str) -> Callable[[list[str]], int]:
    package = importlib.util.find_spec(module)
    assert package is not None, f"there is no {module}"
    return importlib.import_module(f"{module}.__main__" if package.submodule_search_locations else module).main


def check_options(module: str, arguments: list[str], command: Command) -> None:
    """Check a program that takes too long to run: it exists, and its help names every option."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", [module, "--help"])
        main_of(module)()
    options = [argument.split("=")[0] for argument in arguments if argument.startswith("--") and "." not in argument]
    unknown = [option for option in options if option not in said.getvalue()]
    assert not unknown, f"{command}: {module} has no {unknown}"


def test_a_shell_reads_the_commands_of_the_docs() -> None:
    """Enough of them to show that the pattern still separates commands from output."""
    assert sum(fence.language in SHELLS for page in PAGES for fence in read_fences(page)) > 20
