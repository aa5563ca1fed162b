"""Everything that can be wrong with a configuration, and the exact messages."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.config import ConfigError, Override, load
from tests.recipes import config_parts as parts

pytestmark = pytest.mark.quick

MINIMAL = f"""training.total_tokens = 1
batch.use = "{parts.HERE}:Ramp"
"""


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's modules, and where they were found, do not outlive the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def complaint(folder: Path, text: str | bytes, *overrides: str) -> str:
    """What `load` says about mine.toml."""
    (folder / "mine.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    pairs = (override.partition("=") for override in overrides)
    given = [Override(path, value) for path, _, value in pairs]
    with pytest.raises(ConfigError) as error:
        load(folder / "mine.toml", given, cwd=folder, default_recipe=f"{parts.HERE}:Recipe")
    return str(error.value)


CASES = {
    "a misspelled key, and it is not called missing too": (
        f'batch.use = "{parts.HERE}:Ramp"\n[training]\ntotal_token = "4B"',
        'mine.toml:3  training.total_token = "4B"\n    unknown key in [training]; did you mean total_tokens?',
    ),
    "a key of another section": (
        MINIMAL + "run.compile = true",
        "mine.toml:3  run.compile = true\n    unknown key in [run]; compile is a key of [training]",
    ),
    "a misspelled key of another section": (
        MINIMAL + "run.Precisions = 3",
        "mine.toml:3  run.Precisions = 3\n    unknown key in [run]; precision is a key of [training]",
    ),
    "a key like no other": (
        MINIMAL + "run.zzz = 3",
        "mine.toml:3  run.zzz = 3\n    unknown key in [run]; its keys are name, dir, note",
    ),
    "a key of another component": (
        MINIMAL + "batch.max_lr = 3",
        "mine.toml:3  batch.max_lr = 3\n"
        f"    unknown key in [batch] of {parts.HERE}:Ramp; max_lr is a key of [schedule]",
    ),
    "a key outside its section": (
        "compile = true\n" + MINIMAL,
        "mine.toml:1  compile = true\n    unknown key; compile is a key of [training]",
    ),
    "a misspelled section": (
        MINIMAL + "[runs]\nname = 3",
        "mine.toml:3  runs\n    unknown section [runs]; did you mean [run]?",
    ),
    "hyphens": (
        MINIMAL + "training.max-grad-norm = 3",
        "mine.toml:3  training.max-grad-norm = 3\n    unknown key in [training]; did you mean max_grad_norm?",
    ),
    "a required key": (
        f'batch.use = "{parts.HERE}:Ramp"\n\n[training]',
        "mine.toml:3  training.total_tokens\n"
        '    required, but not set: a whole number, or text such as "20M" or "1.5B"',
    ),
    "a required section": (
        f'batch.use = "{parts.HERE}:Ramp"',
        'mine.toml  training.total_tokens\n    required, but not set: a whole number, or text such as "20M" or "1.5B"',
    ),
    "a required slot": (
        "training.total_tokens = 1",
        'mine.toml  batch\n    required, but not set: a table [batch] with use = "package.module:Name", '
        f"naming the batch policy ({parts.HERE}:BatchPolicy)",
    ),
    "a slot without use": (
        "training.total_tokens = 1\n[batch]\neta = 1",
        f'mine.toml:2  batch.use\n    name the batch policy ({parts.HERE}:BatchPolicy): use = "package.module:Name"',
    ),
    "a slot that is not a table": (
        "training.total_tokens = 1\nbatch = 3",
        'mine.toml:2  batch = 3\n    expected a table [batch] with use = "package.module:Name", '
        f"naming the batch policy ({parts.HERE}:BatchPolicy)",
    ),
    "a section that is not a table": (MINIMAL + "run = 3", "mine.toml:3  run = 3\n    expected a table, [run]"),
    "an array that is not an array": (
        MINIMAL + 'sources = "x"',
        'mine.toml:3  sources = "x"\n    expected an array of tables, [[sources]]',
    ),
    "a table in place of a value": (
        MINIMAL + "[training.seed]\na = 3",
        "mine.toml:3  training.seed = { a = 3 }\n    expected a whole number, not a table",
    ),
    "text for a number": (
        MINIMAL + 'training.seed = "3"',
        'mine.toml:3  training.seed = "3"\n    expected a whole number',
    ),
    "a fraction for a whole number": (
        MINIMAL + "training.seed = 3.0",
        "mine.toml:3  training.seed = 3.0\n    expected a whole number",
    ),
    "a boolean for a number": (
        MINIMAL + "batch.eta = true",
        "mine.toml:3  batch.eta = true\n    expected a number",
    ),
    "a number for a boolean": (
        MINIMAL + "training.compile = 1",
        "mine.toml:3  training.compile = 1\n    expected true or false",
    ),
    "a number for text": (MINIMAL + "run.name = 1", "mine.toml:3  run.name = 1\n    expected text"),
    "a number for a path": (
        MINIMAL + "run.dir = 1",
        "mine.toml:3  run.dir = 1\n    expected a path, as text",
    ),
    "a date": (
        MINIMAL + "run.name = 2026-01-01",
        "mine.toml:3  run.name = 2026-01-01\n    expected text; write a date or time in quotes",
    ),
    "an optional value": (
        MINIMAL + 'training.max_grad_norm = "x"',
        'mine.toml:3  training.max_grad_norm = "x"\n    expected a number, or "none"',
    ),
    "one of several": (
        MINIMAL + 'training.precision = "bf17"',
        'mine.toml:3  training.precision = "bf17"\n    expected one of "bf16", "float32"',
    ),
    "text that is not a count": (
        MINIMAL.replace("= 1\n", '= "4 gigs"\n'),
        'mine.toml:1  training.total_tokens = "4 gigs"\n    expected a count such as 20_000_000, "20M" or "1.5B"',
    ),
    "a count below its limit": (
        MINIMAL + "batch.initial = 0",
        "mine.toml:3  batch.initial = 0\n    expected a whole number > 0",
    ),
    "a number beyond its limit": (
        MINIMAL + 'validation = {path = "x", weight = -1.5}',
        "mine.toml:3  validation.weight = -1.5\n    expected a number >= 0",
    ),
    "an item of a list": (
        MINIMAL + 'batch.stages = [[0, 1], ["1M", 0]]',
        'mine.toml:3  batch.stages = [[0, 1], ["1M", 0]]\n    item 2: item 2: expected a whole number > 0',
    ),
    "a list of another shape": (
        MINIMAL + "batch.stages = [1]",
        "mine.toml:3  batch.stages = [1]\n    expected a list, each item a list of 2: "
        'a whole number, or text such as "20M" or "1.5B", a whole number, or text such as "20M" or "1.5B"',
    ),
    "a constructor that names its key": (
        MINIMAL + "batch.eta = -1",
        "mine.toml:3  batch.eta = -1.0\n    -1.0 must be above 0",
    ),
    "a constructor that names none": (
        f'training.total_tokens = 1\n[batch]\nuse = "{parts.HERE}:Ramp"\neta = 1000',
        "mine.toml:2  batch\n    too noisy",
    ),
    "a table that is not a key": (
        MINIMAL + "[training.x]",
        "mine.toml:3  training.x\n    unknown key in [training]; its keys are total_tokens, precision, compile, "
        "max_grad_norm, seed",
    ),
    "not an import path": (
        MINIMAL.replace(":Ramp", ".Ramp"),
        f'mine.toml:2  batch.use = "{parts.HERE}.Ramp"\n'
        f"    expected an import path, package.module:Name; did you mean {parts.HERE}:Ramp?",
    ),
    "a file in place of a module": (
        MINIMAL.replace(f"{parts.HERE}:Ramp", "./my_batch.py:Mine"),
        'mine.toml:2  batch.use = "./my_batch.py:Mine"\n    write the module\'s name, not its file: my_batch:Mine'
        " (add its directory to import_paths, unless it is next to the recipe)",
    ),
    "a misspelled module": (
        MINIMAL.replace("config_parts:", "config_part:"),
        'mine.toml:2  batch.use = "tests.recipes.config_part:Ramp"\n'
        "    no module named tests.recipes.config_part; did you mean tests.recipes.config_parts?",
    ),
    "a misspelled package": (
        MINIMAL.replace("tests.", "test."),
        None,
    ),
    "a misspelled class": (
        MINIMAL.replace(":Ramp", ":Rampe"),
        f'mine.toml:2  batch.use = "{parts.HERE}:Rampe"\n    {parts.HERE} ({parts.__file__}) has no Rampe; '
        "did you mean Ramp?",
    ),
    "no class": (
        MINIMAL.replace(":Ramp", ":HERE"),
        f'mine.toml:2  batch.use = "{parts.HERE}:HERE"\n    {parts.HERE}:HERE is not a class but a str',
    ),
    "a misfit that lacks a method": (
        MINIMAL.replace(":Ramp", ":WithoutObserve"),
        f'mine.toml:2  batch.use = "{parts.HERE}:WithoutObserve"\n    {parts.HERE}:WithoutObserve cannot be used as '
        "batch policy "
        f"({parts.HERE}:BatchPolicy): it lacks observe()",
    ),
    "a misfit whose method takes other arguments": (
        MINIMAL.replace(":Ramp", ":OtherObserve"),
        f'mine.toml:2  batch.use = "{parts.HERE}:OtherObserve"\n    {parts.HERE}:OtherObserve cannot be used as '
        "batch policy "
        f"({parts.HERE}:BatchPolicy): its observe() cannot be called as observe(step, moments=...): "
        "got an unexpected keyword argument 'moments'",
    ),
    "a misfit that lacks an attribute": (
        MINIMAL.replace(":Ramp", ":Nameless"),
        f"mine.toml:2  batch.use\n    {parts.HERE}:Nameless cannot be used as batch policy "
        f"({parts.HERE}:BatchPolicy): it lacks name",
    ),
    "a misfit of a base class": (
        MINIMAL + f'schedule.use = "{parts.HERE}:Constant"',
        f'mine.toml:3  schedule.use = "{parts.HERE}:Constant"\n    {parts.HERE}:Constant cannot be used as schedule '
        f"({parts.HERE}:Schedule): it does not derive from {parts.HERE}:Schedule",
    ),
    "an abstract class": (
        MINIMAL + f'schedule.use = "{parts.HERE}:Schedule"',
        f'mine.toml:3  schedule.use = "{parts.HERE}:Schedule"\n    {parts.HERE}:Schedule cannot be used as schedule '
        f"({parts.HERE}:Schedule): it lacks lr()",
    ),
    "a recipe that is not there": (
        MINIMAL + f'recipe = "{parts.HERE}:Recip"',
        f'mine.toml:3  recipe = "{parts.HERE}:Recip"\n    {parts.HERE} ({parts.__file__}) has no Recip; '
        "did you mean Recipe?",
    ),
    "broken TOML": (
        "[run]\nname = = 3",
        "mine.toml:2:8\n    not valid TOML: Invalid value\n      name = = 3\n             ^",
    ),
    "an unfinished value": (
        "[run]\nname =\n",
        "mine.toml:2:7\n    not valid TOML: Invalid value\n      name =\n            ^",
    ),
    "a key given twice": (
        "[run]\nname = 3\nname = 4",
        "mine.toml:3:9\n    not valid TOML: Cannot overwrite a value; this key was given before\n"
        "      name = 4\n              ^",
    ),
    "a table given twice": (
        "[run]\n[run]",
        "mine.toml:2:5\n    not valid TOML: Cannot declare ('run',) twice; this key was given before\n"
        "      [run]\n          ^",
    ),
    "not UTF-8": (b"[run]\nname = '\xff'", "mine.toml:2\n    not UTF-8 text: byte 0xff; save the file as UTF-8"),
    "a base that is not there": (
        MINIMAL + 'extends = ["mime.toml"]',
        'mine.toml:3  extends = ["mime.toml"]\n    mime.toml: no such file; did you mean mine.toml?',
    ),
    "a base in a directory that is not there": (
        MINIMAL + 'extends = ["base/x.toml"]',
        'mine.toml:3  extends = ["base/x.toml"]\n    base/x.toml: no such file: there is no directory base',
    ),
    "a base that is a directory": (
        MINIMAL + 'extends = ["."]',
        None,
    ),
    "a circle": (
        MINIMAL + 'extends = ["mine.toml"]',
        'mine.toml:3  extends = ["mine.toml"]\n    files extend each other in a circle: mine.toml -> mine.toml',
    ),
    "extends that is not a list": (
        MINIMAL + 'extends = "base.toml"',
        'mine.toml:3  extends = "base.toml"\n    expected a list of paths, such as extends = ["base/cpu.toml"]',
    ),
    "an import path that is not there": (
        MINIMAL + 'import_paths = ["nowhere"]',
        'mine.toml:3  import_paths = ["nowhere"]\n    no such directory: nowhere',
    ),
}
LOOSE = {
    "a misspelled package": "no module named test.recipes",
    "a base that is a directory": "a directory, not a recipe file",
}


@pytest.mark.parametrize("name", CASES)
def test_message(tmp_path: Path, name: str) -> None:
    text, expected = CASES[name]
    said = complaint(tmp_path, text)
    if expected is None:
        assert LOOSE[name] in said
    else:
        assert said == f"{expected}\n1 problem; nothing was started."


OVERRIDES = {
    "run.nam=3": "run.nam = 3\n    unknown key in [run]; did you mean name?",
    "training.compile=maybe": 'training.compile = "maybe"\n    expected true or false',
    "training.seed=1.5": "training.seed = 1.5\n    expected a whole number",
    "training.total_tokens=4G": 'training.total_tokens = "4G"\n    '
    'expected a count such as 20_000_000, "20M" or "1.5B"',
    "batch.eta=-2": "batch.eta = -2.0\n    -2.0 must be above 0",
    "run..name=3": "run..name\n    not a key; write --section.key=value",
    "training.total_tokens.x=3": "training.total_tokens.x = 3\n    "
    "training.total_tokens is 1 (mine.toml:1): it has no keys",
    "run.name.x=3": "run.name = { x = 3 }\n    expected text, not a table",
    "sources.3.weight=3": "sources.3.weight = 3\n    "
    "sources is an array of tables (mine.toml:3): write the number of an item, sources.0 to sources.1",
    "sources.weight=3": "sources.weight = 3\n    "
    "sources is an array of tables (mine.toml:3): write the number of an item, sources.0 to sources.1",
    "extends=[]": "extends = []\n    only valid in a file; write a recipe that extends the others",
    "run.dir=~nobody-here/x": 'run.dir = "~nobody-here/x"\n    ~nobody-here/x: there is no such home directory',
    "batch.use=tests.recipes.config_parts:Plain": "batch.initial\n    required, but not set: a whole number",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_message_about_the_command_line(tmp_path: Path, override: str) -> None:
    text = MINIMAL + '[[sources]]\npath = "a"\n[[sources]]\npath = "b"'
    assert complaint(tmp_path, text, override) == (
        f"command line  {OVERRIDES[override]}\n1 problem; nothing was started."
    )


def test_all_problems_are_reported_at_once_in_reading_order(tmp_path: Path) -> None:
    text = """
[training]
total_token = "4B"
seed = "x"

[batch]
use = "tests.recipes.config_parts:Ramp"
eta = -1

[runs]

[policies.a]
use = "tests.recipes.nowhere:X"
"""
    said = complaint(tmp_path, text, "validation.path=3.x", "validation.weight=-1", "training.y=1")
    places = [line.split()[:2] for line in said.splitlines() if not line.startswith(" ")]
    assert places == [
        ["mine.toml:3", "training.total_token"],
        ["mine.toml:4", "training.seed"],
        ["mine.toml:8", "batch.eta"],
        ["mine.toml:10", "runs"],
        ["mine.toml:13", "policies.a.use"],
        ["command", "line"],
        ["command", "line"],
        ["7", "problems;"],
    ]


def test_checks_across_sections_are_reported_at_their_key(tmp_path: Path) -> None:
    text = MINIMAL + 'training.compile = true\ntraining.precision = "float32"'
    assert complaint(tmp_path, text).startswith('mine.toml:4  training.precision = "float32"\n    compile wants bf16\n')


USERS_MODULES = {
    "raise KeyError('x')": "my_module fails on import: KeyError: 'x'\n    {file}:1",
    "import math\nmath.sqrt(-1)": "my_module fails on import: ValueError: ",
    "import json\njson.loads('{')": "\n    {file}:2",  # not the line of the library that raised
    "def f(:": "my_module fails on import: SyntaxError: invalid syntax\n    {file}:1",
    "raise SystemExit(3)": "my_module fails on import: SystemExit: 3\n    {file}:1",
    "import components.nowhere": "my_module fails on import: ModuleNotFoundError: No module named 'components.nowhere'",
    "import no_such_package.x": "my_module needs no_such_package, which is not installed: pip install no_such_package",
    "raise ModuleNotFoundError(name='transformers')": "not installed: pip install -e '.[hf]'",
    "raise ModuleNotFoundError(name='matplotlib.pyplot')": "not installed: pip install -e '.[plot]'",
    "class Mien: ...": "my_module ({file}) has no Mine; did you mean Mien?",
    "class Other: ...": "my_module ({file}) has no Mine; its classes are Other",
    "def Mine(): ...": "my_module:Mine is not a class but a function",
    "class Mine:\n  def __init__(self, *, a): ...": "my_module:Mine is not a component: its parameter a has no type",
    "class Mine:\n  def __init__(self, *, a: 'Nope'): ...": "the type of its parameter a cannot be read: name 'Nope'",
    "class Mine:\n  def __init__(self, a: int, /): ...": "its parameter a cannot be a key",
    "class Mine:\n  def __init__(self, *, a: 'type' = int): ...": "the default of a in my_module:Mine cannot be a key",
    "import io\nclass Mine:\n  def __init__(self, *, a: io.BytesIO): ...": "TOML cannot express a BytesIO",
    "class Mine:\n  def __init__(self): raise OSError('disk')": "batch\n    OSError: disk",
}


@pytest.mark.parametrize("source", USERS_MODULES)
def test_mistakes_in_a_custom_module_are_reported(tmp_path: Path, source: str) -> None:
    file = tmp_path / "my_module.py"
    fitting = "\n  name = 'mine'\n  def samples(self, step): ...\n  def observe(self, step, *, moments): ...\n"
    file.write_text(source + (fitting if "class Mine" in source else ""))
    text = 'training.total_tokens = 1\nbatch = {use = "my_module:Mine", a = 1}'
    if "OSError" in source or "= int" in source:
        text = text.replace(", a = 1", "")
    assert USERS_MODULES[source].format(file=file) in complaint(tmp_path, text)


def test_a_missing_recipe_names_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "debug.toml").touch()
    for wrong in ("debgu.toml", "debug"):
        with pytest.raises(ConfigError) as error:
            load(Path("configs", wrong), cwd=tmp_path)
        assert str(error.value) == (
            f"configs/{wrong}\n    no such file; did you mean configs/debug.toml?\n1 problem; nothing was started."
        )


def test_problems_of_several_files_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text("a = ")
    (tmp_path / "two.toml").write_text("b")
    said = complaint(tmp_path, 'extends = ["one.toml", "two.toml", "three.toml"]')
    assert "one.toml:1:5" in said and "two.toml:1:2" in said and "three.toml: no such file" in said
