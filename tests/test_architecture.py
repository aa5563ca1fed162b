"""The direction of imports: tools, tests, benchmarks -> recipes -> components, models."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
OURS = {"recipes", "components", "models", "tools", "tests", "benchmarks"}
SHARED = {
    f"components.{name}"
    for name in (
        "atomic_files",
        "cpu",
        "distributed.collectives",
        "protocol_defaults",
        "errors",
        "evaluation_mode",
        "gradient_noise.moments",
        "gradient_noise.norms",
        "interfaces",
        "interrupts",
        "json_files",
        "local_tensor",
        "paths",
        "profiler_range",
        "python_library",
        "retry",
        "storage.address",
        "storage.local_copy",
        "token_ids",
        "unicode_text",
        "units",
    )
}
"""Modules that import at most one another, so that every component may import them."""


def imports(file: Path) -> set[str]:
    """Return the project modules that a file imports: at its top, in a function, or for types only."""
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
    """Return the component of a file: a module or a package of components/."""
    return file.relative_to(ROOT / "components").parts[0].removesuffix(".py")


def test_components_import_neither_each_other_nor_their_users():
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
def test_shared_modules_import_no_other_project_module(shared):
    assert imports((ROOT / shared.replace(".", "/")).with_suffix(".py")) <= SHARED


def test_the_import_finder_sees_imports():
    assert "recipes.config" in imports(ROOT / "recipes" / "pretrain.py")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_graph() -> dict[str, set[str]]:
    """Return each module of the product with the modules it imports anywhere in the file, also for types only.

    `from package import name` is an import of the module that defines `name` where the package only re-exports it:
    what a package exports is imported for one name of it, and not for the others.
    """
    files = {module_name(file): file for name in ("recipes", "components", "models", "tools") for file in modules(name)}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in files:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                graph[module] |= submodules or {node.module}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return one cycle for each group of modules that import one another."""
    left = {module: set(imported) for module, imported in graph.items()}
    while ends := {m for m, imported in left.items() if not imported & left.keys()}:
        left = {module: imported - ends for module, imported in left.items() if module not in ends}
    found = []
    while left:
        path = [min(left)]
        while path[-1] not in path[:-1]:
            path.append(min(left[path[-1]] & left.keys()))
        circle = path[path.index(path[-1]) :]
        found.append(circle)
        left = {module: imported - set(circle) for module, imported in left.items() if module not in circle}
        while ends := {m for m, imported in left.items() if not imported & left.keys()}:
            left = {module: imported - ends for module, imported in left.items() if module not in ends}
    return found


def test_there_are_no_import_cycles():
    """Not even in a function or for types: modules in a cycle cannot be read, tested or moved separately."""
    assert [" -> ".join(circle) for circle in cycles(module_graph())] == []


def test_import_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c", "b"]]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    graph = module_graph()
    assert "components.distributed.context" in graph["recipes.build"]
    assert "torch" not in graph["recipes.build"]
    assert "recipes.initial_weights" in graph["recipes.build"], "an import in a function"
    assert "components.distributed.context" in graph["recipes.errors"], "an import for types"


MAPPED = [
    package
    for name in ("recipes", "components", "models")
    for package in sorted((ROOT / name).rglob("__init__.py"))
    if re.search(r"^\w+\.py  ", ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or "", re.MULTILINE)
]


@pytest.mark.parametrize("package", MAPPED, ids=lambda package: module_name(package))
def test_the_docstring_of_a_package_lists_its_files(package):
    listed = re.findall(r"^(\w+\.py)  ", package.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in package.parent.glob("*.py") if file != package)


def test_package_maps_are_found():
    assert len(MAPPED) >= 12
