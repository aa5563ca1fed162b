"""Layers, types, paths and provenance: what a configuration means."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.config import Config, ConfigError, Override, describe, flatten, load
from tests.recipes import config_parts as parts

pytestmark = pytest.mark.quick

Load = Callable[..., Config]


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's modules, and where they were found, do not outlive the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    """Loads `text` as mine.toml, with `key=value` overrides; other files may lie beside it."""

    def load_text(text: str, *overrides: str, **files: str) -> Config:
        for name, content in files.items():
            (tmp_path / f"{name}.toml").write_text(content)
        (tmp_path / "mine.toml").write_text(text)
        pairs = (override.partition("=") for override in overrides)
        return load(
            tmp_path / "mine.toml",
            [Override(path, value) for path, _, value in pairs],
            cwd=tmp_path,
            default_recipe=f"{parts.HERE}:Recipe",
        )

    return load_text


MINIMAL = f"""
training.total_tokens = "4B"
batch.use = "{parts.HERE}:Ramp"
"""


def test_a_recipe_is_constructed_from_its_sections(load_text: Load) -> None:
    config = load_text(MINIMAL + 'batch.stages = [[0, 8], ["1M", 16]]\n[run]\nname = "x"')
    assert config.recipe == parts.Recipe(
        training=parts.Training(total_tokens=4_000_000_000),
        batch=parts.Ramp(stages=[(0, 8), (1_000_000, 16)]),
        run=parts.Run(name="x", dir=config.leaves["run.dir"].value),
        schedule=parts.Flat(max_lr=0.5),
    )


def test_classes_need_not_be_dataclasses(load_text: Load) -> None:
    config = load_text(f'training.total_tokens = 1\nbatch = {{use = "{parts.HERE}:Plain", initial = 3}}')
    assert (config.recipe.batch.initial, config.recipe.batch.name) == (3, "plain")


def test_later_layers_win_key_by_key(load_text: Load) -> None:
    config = load_text(
        'extends = ["one.toml", "two.toml"]\nrun.name = "mine"',
        "training.seed=4",
        one=MINIMAL + 'run = {name = "one", note = "one"}\ntraining.seed = 1',
        two='run = {name = "two", note = "two"}\ntraining.seed = 2\n[[sources]]\npath = "x"',
    )
    assert (config.recipe.run.name, config.recipe.run.note, config.recipe.training.seed) == ("mine", "two", 4)
    assert str(config.leaves["run.note"].origin.source) == "two.toml:1"
    assert config.leaves["training.seed"].origin.source == "command line"
    assert config.leaves["training.compile"].origin.source == "default"


def test_arrays_are_replaced_whole(load_text: Load) -> None:
    two = '[[sources]]\npath = "a"\n[[sources]]\npath = "b"'
    config = load_text('extends = ["base.toml"]\n[[sources]]\npath = "c"', base=MINIMAL + two)
    assert [source.path.name for source in config.recipe.sources] == ["c"]


def test_another_use_starts_with_an_empty_table(load_text: Load) -> None:
    base = f'training.total_tokens = 1\nbatch = {{use = "{parts.HERE}:Ramp", eta = 3, initial = 5}}'
    changed = load_text(f'extends = ["base.toml"]\nbatch.use = "{parts.HERE}:Constant"', base=base)
    assert changed.recipe.batch == parts.Constant()
    same = load_text(f'extends = ["base.toml"]\nbatch = {{use = "{parts.HERE}:Ramp", eta = 4}}', base=base)
    assert same.recipe.batch == parts.Ramp(eta=4.0, initial=5)


@pytest.mark.parametrize("turn", [1, -1])
def test_overrides_of_a_new_component_may_come_in_any_order(load_text: Load, turn: int) -> None:
    overrides = [f"batch.use={parts.HERE}:Constant", "batch.initial=3"][::turn]
    assert load_text(MINIMAL + "batch.eta = 3", *overrides).recipe.batch == parts.Constant(initial=3)


def test_a_default_component_is_a_layer_too(load_text: Load) -> None:
    assert load_text(MINIMAL).recipe.schedule == parts.Flat(max_lr=0.5)
    assert load_text(MINIMAL, "schedule.max_lr=2").recipe.schedule == parts.Flat(max_lr=2.0)
    assert load_text(MINIMAL, f"schedule.use={parts.HERE}:Flat").recipe.schedule == parts.Flat(max_lr=0.5)


def test_a_default_section_hides_nothing_of_its_class(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "my_recipe.py").write_text(
        """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Inner:
    a: int = 1

@dataclass
class Outer:
    inner: Inner | None = None
    table: dict[str, int] = field(default_factory=lambda: {"x": 1})
    b: int = 1

@dataclass
class Recipe:
    outer: Outer = field(default_factory=lambda: Outer(b=2))
"""
    )
    recipe = 'recipe = "my_recipe:Recipe"\n'
    plain = load_text(recipe).recipe.outer
    assert (plain.inner, plain.table, plain.b) == (None, {"x": 1}, 2)
    changed = load_text(recipe, "outer.inner.a=3", "outer.table.y=2").recipe.outer
    assert (changed.inner.a, changed.table, changed.b) == (3, {"y": 2}, 2)
    assert "# inner is unset" in load_text(recipe).to_toml()


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("run.name=123", "run.name", "123"),
        ("run.name=true", "run.name", "true"),
        ("run.name=a = b", "run.name", "a = b"),
        ("run.name=1\nb = 2", "run.name", "1\nb = 2"),
        ('run.name="quoted"', "run.name", "quoted"),
        ("run.name=", "run.name", ""),
        ("run.note=none", "run.note", None),
        ("training.total_tokens=20M", "training.total_tokens", 20_000_000),
        ("training.total_tokens=1_000", "training.total_tokens", 1000),
        ("training.max_grad_norm=none", "training.max_grad_norm", None),
        ("training.max_grad_norm=2", "training.max_grad_norm", 2.0),
        ("training.compile=true", "training.compile", True),
        ("training.precision=float32", "training.precision", "float32"),
        ('batch.stages=[[0, 1], ["2K", 3]]', "batch.stages", [(0, 1), (2000, 3)]),
        ("multipliers={a.b = 1}", None, None),
        ('multipliers."a.b"=3', 'multipliers."a.b"', 3.0),
        ('sources=[{path = "x"}, {path = "y", weight = 2}]', "sources.1.weight", 2.0),
        (f"policies.x.use={parts.HERE}:Constant", "policies.x.initial", 8),
    ],
)
def test_the_command_line_means_what_the_type_says(load_text: Load, override: str, path: str, value: Any) -> None:
    if path is None:
        with pytest.raises(ConfigError, match="expected a number"):
            load_text(MINIMAL, override)
        return
    leaf = load_text(MINIMAL, override).leaves[path]
    assert leaf.value == value and type(leaf.value) is type(value)


def test_an_item_of_an_array_is_overridden_by_its_number(load_text: Load) -> None:
    text = MINIMAL + '[[sources]]\npath = "a"\n[[sources]]\npath = "b"'
    config = load_text(text, "sources.1.weight=7")
    assert [source.weight for source in config.recipe.sources] == [1.0, 7.0]


def test_an_optional_table_can_be_switched_off_and_on(load_text: Load) -> None:
    assert load_text(MINIMAL).recipe.validation is None
    on = MINIMAL + 'validation.path = "x"'
    assert load_text(on).recipe.validation.path.name == "x"
    assert load_text(on, "validation=none").recipe.validation is None
    off = MINIMAL + 'validation = "none"'
    assert load_text(off, "validation.path=y").recipe.validation.path.name == "y"


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "configs" / "base").mkdir(parents=True)
    (tmp_path / "configs" / "base" / "a.toml").write_text('[[sources]]\npath = "../x*.txt"\n[[sources]]\npath = "~/y"')
    text = f'extends = ["base/a.toml"]\nrecipe = "{parts.HERE}:Recipe"\n{MINIMAL}validation.path = "v"'
    (tmp_path / "configs" / "mine.toml").write_text(text)
    config = load(Path("configs/mine.toml"), [Override("batch.table", "t/../u")], cwd=tmp_path)
    recipe = config.recipe
    assert [source.path for source in recipe.sources] == [tmp_path / "configs" / "x*.txt", tmp_path / "home" / "y"]
    assert recipe.validation.path == tmp_path / "configs" / "v"
    assert recipe.batch.table == tmp_path / "u"
    assert recipe.run.dir == tmp_path / "runs"


def test_the_dump_names_every_key_and_where_it_comes_from(load_text: Load, tmp_path: Path) -> None:
    config = load_text(MINIMAL + "multipliers = {a = 1}", "batch.initial=4", "training.seed=1")
    assert (
        config.to_toml()
        == f"""\
recipe = "{parts.HERE}:Recipe"  # default
sources = []  # default
# validation is unset

[training]
total_tokens = 4000000000  # mine.toml:2
precision = "bf16"  # default
compile = false  # default
max_grad_norm = 1.0  # default
seed = 1  # command line

[batch]
use = "{parts.HERE}:Ramp"  # mine.toml:3
initial = 4  # command line
stages = []  # default
eta = 0.5  # default
# table is unset

[run]
name = "debug"  # default
dir = "{tmp_path}/runs"  # default
# note is unset

[schedule]
use = "{parts.HERE}:Flat"  # default
max_lr = 0.5  # default

[policies]

[multipliers]
a = 1.0  # mine.toml:4
"""
    )
    stored = flatten(config.to_toml(provenance=False))
    assert stored["multipliers.a"] == 1.0
    assert list(stored) == [path for path, leaf in config.leaves.items() if not leaf.unset]


def test_a_users_module_lies_beside_the_recipe_and_the_dump_finds_it(load_text: Load, tmp_path: Path) -> None:
    source = f"from {parts.HERE} import Constant\nclass Mine(Constant): ..."
    (tmp_path / "my_batch.py").write_text(source)
    config = load_text('training.total_tokens = 1\nbatch.use = "my_batch:Mine"')
    assert flatten(config.to_toml())["import_paths"] == [str(tmp_path)]


def test_import_paths_are_relative_to_their_file(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_policies.py").write_text(f"from {parts.HERE} import Constant as Mine")
    config = load_text('import_paths = ["code"]\ntraining.total_tokens = 1\nbatch.use = "my_policies:Mine"')
    dumped = tmp_path / "elsewhere.toml"
    dumped.write_text(config.to_toml())
    assert flatten(config.to_toml())["import_paths"] == [str(tmp_path / "code")]
    assert load(dumped, cwd=Path("/")).to_toml(provenance=False) == config.to_toml(provenance=False)


def test_a_problem_found_later_is_reported_where_the_key_was_written(load_text: Load) -> None:
    config = load_text(MINIMAL + '[[sources]]\npath = "x"', "training.seed=3")
    assert str(config.problem("training.seed", "odd")) == "command line  training.seed = 3\n    odd"
    assert str(config.problem("batch", "too big")) == "mine.toml:3  batch\n    too big"
    assert str(config.problem("batch.nothing", "too big")) == "mine.toml:3  batch.nothing\n    too big"
    assert config.problem("sources.0.path", "gone").source == "mine.toml:5"
    assert str(config.problem("run.name", "taken")) == 'default  run.name = "debug"\n    taken'


def test_keys_are_documented_by_the_text_below_them() -> None:
    assert describe(parts.Ramp) == {"initial": "Samples of every step.", "eta": "Above 0."}


def test_the_configuration_layer_starts_without_torch() -> None:
    import subprocess

    code = "import sys, recipes.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
