"""Check this interpreter for the Python version and dependencies of pyproject.toml, and of EXTRA.

    check_requirements.py [EXTRA]

Exit status: 0 if it has them, 1 if not: those missing or too old are printed. It also fails if the libraries that it
imports are missing.
"""

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli
from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def missing_requirements(project: dict[str, Any], requirements: Iterable[str]) -> Iterator[str]:
    """Yield the `requirements`, including extras of the project, that are not installed in a matching version."""
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                yield from missing_requirements(project, project["optional-dependencies"][extra])
            continue
        try:
            is_installed = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            is_installed = False
        if not is_installed:
            yield str(requirement)


if __name__ == "__main__":
    project = tomli.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = [f"{project['name']}[{extra}]" for extra in sys.argv[1:] if extra]
    missing = list(missing_requirements(project, [*project["dependencies"], *extras]))
    python = Requirement(f"python{project['requires-python']}")
    if not python.specifier.contains("{}.{}.{}".format(*sys.version_info)):
        missing.append(str(python))
    print("\n".join(missing))
    sys.exit(bool(missing))
