"""Code that a recipe names fails in every place where loading calls it: reported at its key, with the line."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from recipes.config import ConfigError, Override, load

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("clean_imports")]

BATCH = """
from dataclasses import dataclass, field
from typing import Annotated
from pydantic import AfterValidator
from components.batch import Constant

def fail(*_):
    raise {error}  # line 8

class Odd:
    __eq__ = __bool__ = fail

"""
PLACES = {
    # where it fails: (source of a batch policy, message, the key it is reported at)
    "a constructor": ("class Mine(Constant):\n  def __init__(self, *, initial_size: int): fail()", "", "batch"),
    "what comes after it": (
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Constant):\n  def __post_init__(self): fail()",
        "",
        "batch",
    ),
    "a default": (
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Constant):\n  a: int = field(default_factory=fail)",
        "",
        "batch.a",
    ),
    "a validator": (
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Constant):\n"
        "  a: Annotated[int, AfterValidator(lambda _: fail())] = 1",
        "a = 2",
        "batch.a",
    ),
    "a property of a default": (
        "@dataclass(frozen=True)\nclass Part:\n  b: int = 1\n  def __getattribute__(self, name):\n"
        "    return fail() if name == 'b' else object.__getattribute__(self, name)\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Constant):\n"
        "  a: Part = field(default_factory=lambda: Part())",
        "",
        "batch.a",
    ),
    "a default of a default": (
        "@dataclass(kw_only=True)\nclass Part:\n  b: int = field(default_factory=fail)\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Constant):\n  a: Part = field(default_factory=Part)",
        "",
        "batch.a.b",
    ),
    "a name that the module makes": ("def __getattr__(name):\n  fail()", "", "batch.use"),
}
ERRORS = {
    "KeyError('mine')": "KeyError: 'mine'\n{file}:8",
    "RuntimeError": "RuntimeError\n{file}:8",
    "SystemExit(0)": "SystemExit: 0\n{file}:8",
}


def load_error(tiny, changes: str, *overrides: str) -> ConfigError:
    (tiny.folder / "mine.toml").write_text(f'extends = ["tiny.toml"]\n{changes}')
    pairs = (override.split("=", 1) for override in overrides)
    with pytest.raises(ConfigError) as error:
        load(tiny.folder / "mine.toml", [Override(key, value) for key, value in pairs], cwd=tiny.folder)
    return error.value


@pytest.mark.parametrize("error", ERRORS)
def test_everything_that_loading_calls_may_fail(tiny, error):
    for number, (place, (source, keys, key)) in enumerate(PLACES.items()):
        file = tiny.folder / f"mine_{number}.py"
        file.write_text(BATCH.format(error=error) + source)
        (problem,) = load_error(tiny, f'[batch]\nuse = "mine_{number}:Mine"\ninitial_size = 4\n{keys}').problems
        assert problem.path == key, place
        assert ERRORS[error].format(file=file) in problem.message, place
        assert problem.source == "default" if key == "batch.a.b" else problem.source.startswith("mine.toml:"), place


def test_a_message_for_the_user_is_reported_unchanged(tiny):
    """A ValueError says what is wrong with the input; where the code said so does not matter."""
    for number, (source, keys, key) in enumerate(PLACES.values()):
        (tiny.folder / f"mine_{number}.py").write_text(BATCH.format(error="ValueError('too odd')") + source)
        (problem,) = load_error(tiny, f'[batch]\nuse = "mine_{number}:Mine"\ninitial_size = 4\n{keys}').problems
        assert problem.path == key and "too odd" in problem.message
        assert key == "batch.use" or ".py" not in problem.message


def test_a_check_across_sections_may_fail(tiny):
    (tiny.folder / "mine_a.py").write_text(
        "from models.llama import Llama\nfrom components.lr_schedules import WSD\n"
        "class Model(Llama):\n  def plan(self, *, tp): return {}['plan']\n"
        "class Schedule:\n  def lr(self, tokens, batch_tokens, total_tokens): return 1e-3\n"
        "  @property\n  def warmup_tokens(self): return {}['warmup']\n"
    )
    recipe = tiny.recipe.read_text()
    tiny.recipe.write_text(recipe.replace("models.llama:Llama", "mine_a:Model"))
    (problem,) = load_error(tiny, "").problems
    assert (problem.path, problem.message) == ("parallel.tp", f"KeyError: 'plan'\n{tiny.folder / 'mine_a.py'}:4")
    (problem,) = load_error(tiny, '[lr_schedule]\nuse = "mine_a:Schedule"').problems
    assert problem.path == "recipe"
    assert problem.message == f"its check() fails: KeyError: 'warmup'\n{tiny.folder / 'mine_a.py'}:8"


def test_a_default_is_not_made_where_it_is_not_used(tiny):
    (tiny.folder / "mine_b.py").write_text(
        BATCH.format(error="AssertionError")
        + "@dataclass(frozen=True, kw_only=True)\nclass Mine(Constant):\n  a: int = field(default_factory=fail)"
    )
    (tiny.folder / "mine.toml").write_text(
        'extends = ["tiny.toml"]\nbatch = {use = "mine_b:Mine", initial_size = 4, a = 1}'
    )
    assert load(tiny.folder / "mine.toml", cwd=tiny.folder).recipe.batch.a == 1


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of whom the system knows nothing, as in a container that was started with a number for a user."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])


def test_a_user_without_a_home_needs_none_where_all_places_are_named(tiny, homeless):
    load(tiny.recipe, cwd=tiny.folder).to_toml()
    evaluation = Path(__file__).parents[2] / "train_configs" / "evaluate.toml"
    load(evaluation, [Override("evaluation.checkpoint", "run"), Override("evaluation.cache_dir", "c")], cwd=tiny.folder)
    tiny.recipe.write_text(tiny.recipe.read_text().replace('cache_dir = "cache"', ""))
    (problem,) = load_error(tiny, "").problems
    assert problem.path == "run.cache_dir"
    assert "~/.cache/powertrain: there is no such home directory" in problem.message
    assert problem.message.endswith("; set it")
    load(tiny.recipe, [Override("run.cache_dir", "c")], cwd=tiny.folder)
    for key in ("run.cache_dir", "run.dir"):
        (problem,) = [each for each in load_error(tiny, "", f"{key}=~/c", "data.path=~/x").problems if each.path == key]
        assert "~/c: there is no such home directory" in problem.message
    with pytest.raises(ConfigError, match=r"~nobody-here/x\.toml: there is no such home directory"):
        load(Path("~nobody-here/x.toml"), cwd=tiny.folder)


@pytest.mark.parametrize(
    ("file", "use"),
    [("models.py", "models:Mine"), ("tools.py", "tools:Mine"), ("types.py", "types:Mine"),
     ("models/mine.py", "models.mine:Mine"), ("models/__init__.py", "models:Mine")],
)  # fmt: skip
def test_a_file_whose_name_is_taken_is_named(tiny, file, use):
    own = tiny.folder / file
    own.parent.mkdir(exist_ok=True)
    own.write_text("from components.batch import Constant as Mine")
    (problem,) = load_error(tiny, f'batch = {{use = "{use}"}}').problems
    assert problem.message.startswith(f"{own} cannot be imported because ")
    assert problem.message.endswith("has the same name; rename it, also in `use`")


def test_a_value_of_a_module_that_has_no_names_is_no_traceback(tiny):
    (problem,) = load_error(tiny, 'batch = {use = "math:pi.Mine"}').problems
    assert problem.message.startswith("math (math) has no Mine")


def test_names_that_are_not_utf8_are_one_clear_problem(tiny):
    bad = tiny.folder / "b\udcfc"
    bad.mkdir()
    for path, cwd in ((bad / "tiny.toml", tiny.folder), (tiny.recipe, bad)):
        with pytest.raises(ConfigError) as error:
            load(path, cwd=cwd)
        (problem,) = error.value.problems
        assert "the name is not UTF-8, so a recipe cannot contain it" in problem.message
    for override in ("run.dir=b\udcfc", "run.name=b\udcfc", "data.path=['b\udcfc/*.txt']"):
        (problem,) = load_error(tiny, "", override).problems
        assert "in UTF-8; rename the file" in problem.message
