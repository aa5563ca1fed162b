"""The direction of imports: tools, tests, benchmarks -> recipes -> components, models. Held here, not by good will."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
OURS = {"recipes", "components", "models", "tools", "tests", "benchmarks"}
SHARED = {
    f"components.{name}"
    for name in (
        "quantities",
        "activation_checkpointing",
        "durable",
        "folders",
        "processes",
        "profiler_range",
        "token_ids",
    )
}
"""Types as users write them, activation checkpointing (its memory is estimated elsewhere), how files are written and
found, what processes tell one another, ranges of a profile, and what token ids are. They import nothing of ours but one
another, so everyone may import them."""


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in OURS}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def component_of(file: Path) -> str:
    """The component a file belongs to: a module of components/, or a package of it with all its modules."""
    return file.relative_to(ROOT / "components").parts[0].removesuffix(".py")


def test_components_import_neither_each_other_nor_what_uses_them():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules("components")
        for name in imports(file)
        if name not in SHARED and not f"{name}.".startswith(f"components.{component_of(file)}.")
    ]
    assert not wrong


def test_models_import_only_models():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules("models")
        for name in imports(file)
        if name not in SHARED and name.split(".")[0] != "models"
    ]
    assert not wrong


def test_recipes_import_no_tool():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules("recipes")
        for name in imports(file)
        if name.split(".")[0] not in {"recipes", "components", "models"}
    ]
    assert not wrong


@pytest.mark.parametrize("shared", sorted(SHARED))
def test_what_everyone_may_import_imports_nothing_of_ours_but_shared_modules(shared):
    assert imports((ROOT / shared.replace(".", "/")).with_suffix(".py")) <= SHARED


def test_the_import_finder_sees_imports():
    assert "recipes.config" in imports(ROOT / "recipes" / "pretrain.py")
