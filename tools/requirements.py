"""What pyproject.toml asks for, and whether this interpreter has it. Runs before anything is installed.

requirements.py list [EXTRA]     print the requirements, one a line
requirements.py check [EXTRA]    exit with status 0 if all are installed, else 1 and say which are not
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

# Only the plain forms this project's own pyproject uses: NAME>=1.2 and powertrain[extra,extra].
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)>=([\d.]+)")
_OWN_EXTRAS = re.compile(r"powertrain\[([\w,]+)\]")


def requirements(extra: str = "") -> list[str]:
    """Requirements of the project and of `extra`, extras of extras included."""
    text = PYPROJECT.read_text(encoding="utf-8")
    found: list[str] = []
    for key in ("dependencies", extra) if extra else ("dependencies",):
        # tomllib came with Python 3.11 and tomli may not be installed yet, so the two plain lists are read by hand
        match = re.search(rf"^{re.escape(key)} = \[(.*?)\]\s*$", text, re.MULTILINE | re.DOTALL)
        if match is None:
            raise SystemExit(f"pyproject.toml has no extra named {key!r}")
        for item in re.findall(r'"([^"]+)"', match.group(1)):
            own = _OWN_EXTRAS.fullmatch(item)
            if own:
                for name in own.group(1).split(","):
                    found += [r for r in requirements(name) if r not in found]
            elif item not in found:
                found.append(item)
    return found


def missing(wanted: list[str]) -> list[str]:
    """Those of `wanted` that are not installed, or too old."""
    return [requirement for requirement in wanted if not _installed(requirement)]


def _installed(requirement: str) -> bool:
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise SystemExit(f"pyproject.toml: {requirement!r} is not of the form NAME>=VERSION")
    try:
        have = metadata.version(match.group(1))
    except metadata.PackageNotFoundError:
        return False
    return _numbers(have) >= _numbers(match.group(2))


def _numbers(version: str) -> list[int]:
    release = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in release.group(0).split(".")] if release else []


def main(arguments: list[str]) -> int:
    command, extra = arguments[0], arguments[1] if len(arguments) > 1 else ""
    wanted = requirements(extra)
    if command == "list":
        print("\n".join(wanted))
        return 0
    lacking = missing(wanted)
    for requirement in lacking:
        print(f"missing: {requirement}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
