"""The fenced examples of README.md and docs/, and the commands in them as a shell parses them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("sh", "bash", "shell", "console")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
    r"(\w+=\S+ +)*(\./\w+\.sh|python|pip|git|source|for|cd|\w+/bin/\w+|sbatch|kubectl|touch|kill|torchrun"
    r"|torchfrtrace)\b"
)


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page."""

    page: Path
    line: int
    """Number of its first line in the page."""
    language: str
    """`toml`, `python`, `sh` for commands, or empty for the output of a program."""
    text: str

    @property
    def file(self) -> str | None:
        """The file name in a comment on its first line, such as `# my_parts.py, beside my.toml`."""
        found = re.match(r"# ([\w/]+\.(py|toml))\b", self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a fence, as a shell parses it."""

    fence: Fence
    environment: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fence}: {shlex.join(self.words)}"


def read_fences(page: Path) -> list[Fence]:
    """Return the fenced blocks of a page, in order."""
    text, fences = page.read_text(encoding="utf-8"), []
    for found in _FENCE.finditer(text):
        indent, language, content = found.groups()
        content = re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)
        if not language and (commands := take_commands(content)):
            language, content = "sh", commands
        fences.append(Fence(page, text[: found.start()].count("\n") + 2, language, content))
    return fences


def take_commands(text: str) -> str:
    """Return the commands at the start of a block, before their output."""
    kept: list[str] = []
    for line in text.splitlines(keepends=True):
        within = bool(kept) and (kept[-1].endswith("\\\n") or "".join(kept).count("; do\n") > kept.count("done\n"))
        if not (within or _COMMAND.match(line) or (kept and not line.strip())):
            break
        kept.append(line)
    return "".join(kept)


ENVIRONMENT = ("NPROC", "NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR")
_RECORD = f"""
record() {{
    printf '%s\\0' "$#" "$@" {" ".join(f'"${name}"' for name in ENVIRONMENT)} >> "$RECORDED"
}}
"""
_BUILTINS = ("source", "cd", "kill", "touch", "python", "pip", "git", "kubectl", "torchrun")


def read_commands(fence: Fence, folder: Path) -> list[Command]:
    """Return the commands of a fence: a shell runs it with every command replaced by one that records its words."""
    recorded, stub = folder / "recorded", folder / "stub"
    stub.write_text(f'#!/usr/bin/env bash\n{_RECORD}\nrecord "$0" "$@"\n')
    stub.chmod(0o755)
    text = re.sub(r"<[a-z ]+>|\bSEED\b|\bPID\b", "1", fence.text)  # placeholders
    text = re.sub(r"(^| )\.\.\. (?=\./)", r"\1", text, flags=re.MULTILINE)
    for path in set(re.findall(r"(?<![\w/.=])(?:\./)?[\w./]+/bin/[\w.-]+(?=\s)|\./\w+\.sh", text)):
        target = folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(stub)
    functions = "".join(f'{name}() {{ record {name} "$@"; }}\n' for name in _BUILTINS)
    functions += 'command_not_found_handle() { record "$@"; }\n'
    done = subprocess.run(
        ["bash", "-e", "-c", f"{_RECORD}{functions}{text}"],
        cwd=folder, env={"PATH": os.environ["PATH"], "RECORDED": str(recorded)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{fence} is not shell: {done.stderr}"
    parts, commands = recorded.read_text().split("\0")[:-1], []
    while parts:
        end = 1 + int(parts[0])
        words, values = parts[1:end], parts[end : end + len(ENVIRONMENT)]
        environment = {name: value for name, value in zip(ENVIRONMENT, values, strict=True) if value}
        commands.append(Command(fence, environment, tuple(words)))
        parts = parts[end + len(ENVIRONMENT) :]
    return commands
