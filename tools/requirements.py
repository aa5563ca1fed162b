"""Exit with status 0 if this interpreter has all that pyproject.toml lists, with EXTRA: requirements.py [EXTRA].

Else the status is 1, and what is missing or too old is printed. Without the libraries it needs itself it fails, too.
"""

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli
from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def missing(project: dict[str, Any], requirements: Iterable[str]) -> Iterator[str]:
    """Yield those of `requirements`, extras of the project among them, that are not installed in the version wanted."""
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                yield from missing(project, project["optional-dependencies"][extra])
            continue
        try:
            is_here = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            is_here = False
        if not is_here:
            yield str(requirement)


if __name__ == "__main__":
    project = tomli.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = [f"{project['name']}[{extra}]" for extra in sys.argv[1:] if extra]
    lacking = list(missing(project, [*project["dependencies"], *extras]))
    print("\n".join(lacking))
    sys.exit(bool(lacking))
