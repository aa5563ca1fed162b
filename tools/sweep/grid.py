"""The runs of a sweep: a recipe, keys that all runs share, and grids of keys that are crossed."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.data.file_hash_cache import HASH_CACHE_FILE, FileHashCache
from components.data.sources.base import TextSource
from components.data.sources.token_files import TokenFiles
from recipes.config import Config, ConfigError, Override, load
from recipes.config.errors import DEFAULT
from recipes.prepared_data import data_sources
from recipes.recipe import require_training
from recipes.resume import LOCATION_KEYS

Settings = Mapping[str, str]
"""Dotted key -> value, as on the command line."""
Grid = Sequence[Settings]
"""Points of one axis: the keys of a point go together."""
Fingerprints = dict[tuple[tuple[str, str], ...], str]
"""Keys of a section -> fingerprint of the files it reads, which is the same for many runs."""

SEED = "run.seed"
RUN_LOCATION_KEYS = ("run.name", "run.dir", "run.if_exists", "checkpoint", "metrics", "import_paths")
"""Keys and sections that set where a run is stored and what it writes, but do not affect training."""
OPENERS, CLOSERS, QUOTES = "[{", "]}", "\"'"


@dataclass(frozen=True)
class Job:
    """One run."""

    recipe: Path
    settings: Settings
    """Every key that the command line sets."""
    varied: Settings
    """The keys in which this run differs from the others."""
    digest: str
    """The digest of the resolved configuration and the content of its data."""
    resume_from: Path | None = None
    """A checkpoint of a run that is equal up to there, from which to continue; None: run all of it."""

    def __str__(self) -> str:
        return ", ".join(f"{key} = {value}" for key, value in self.varied.items()) or str(self.recipe)


@dataclass(frozen=True)
class Sweep:
    """A recipe and the keys that are varied."""

    recipe: Path
    common: Settings
    """Keys that all its runs share."""
    grids: Sequence[Grid]
    processes: Callable[[object], int] = lambda recipe: 1
    """Returns the number of processes of a run of such a recipe."""

    def __post_init__(self) -> None:
        seen = set(self.common)
        for grid in self.grids:
            if twice := sorted(seen & grid[0].keys()):
                raise ValueError(f"{twice[0]} is given twice: in two grids, or in a grid and for all runs")
            seen |= grid[0].keys()

    def jobs(self) -> list[Job]:
        """Return every run once, the last grid varying fastest. Raises ValueError with the problems of a bad run."""
        jobs: dict[str, Job] = {}
        fingerprints: Fingerprints = {}
        for points in itertools.product(*self.grids):
            varied = {key: value for point in points for key, value in point.items()}
            settings = {**self.common, **varied}
            try:
                config = load(self.recipe, [Override(key, value) for key, value in settings.items()])
                require_training(config)
                job = Job(self.recipe, settings, varied, digest(config, fingerprints, self.processes(config.recipe)))
            except (ConfigError, OSError, ValueError) as error:
                which = ", ".join(f"{key} = {value}" for key, value in varied.items())
                raise ValueError(f"with {which}:\n{error}" if which else str(error)) from None
            jobs.setdefault(job.digest, job)
        return list(jobs.values())


def parse_grid(texts: Sequence[str]) -> Grid:
    """Parse `KEY=VALUE,VALUE ...`: keys that vary together, with equally many values each. Raises ValueError."""
    columns: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--grid {text}: write --grid key=value,value; the recipe comes first")
        if key in columns:
            raise ValueError(f"--grid: {key} is given twice")
        columns[key.removeprefix("--")] = split_values(values)
        if "" in columns[key.removeprefix("--")]:
            raise ValueError(f"--grid {text}: a value is empty")
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ValueError(f"--grid: keys of one grid need equally many values: {counts}; or give each a separate --grid")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def split_values(text: str) -> list[str]:
    """Split `text` at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if char == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += char
        if quote:
            quote = "" if char == quote else quote
        elif char in QUOTES:
            quote = char
        else:
            depth += (char in OPENERS) - (char in CLOSERS)
    return [part.strip() for part in parts]


def digest(config: Config, fingerprints: Fingerprints, processes: int = 1) -> str:
    """Return the digest of what a run learns from: keys that were set, content of text and tokenizer, and processes.

    Defaults are left out, so that a new key of a component does not invalidate every result; so are locations.
    `fingerprints` caches what was read. Raises ValueError or OSError if the data is missing.
    """
    content = {section: _fingerprint(config, section, source, fingerprints) for section, source in _sources(config)}
    keys = {
        key: leaf.toml
        for key, leaf in config.leaves.items()
        if leaf.origin.source != DEFAULT and is_learned_from(key) and not _is_path_below(key, content)
    }
    if processes > 1:  # a batch is rounded up to what they can share
        keys["processes"] = str(processes)
    return hashlib.sha256(json.dumps([keys, content], sort_keys=True).encode()).hexdigest()[:16]


def is_learned_from(key: str) -> bool:
    """Return whether a key changes what a run learns."""
    inside = (key == place or key.startswith(f"{place}.") for place in RUN_LOCATION_KEYS)
    return not any(inside) and key.rpartition(".")[2] != "cache_dir"


def _sources(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the sections that read files, with their components."""
    yield "tokenizer", config.recipe.tokenizer
    for section, source in data_sources(config.recipe).items():
        if isinstance(source, TextSource | TokenFiles):
            yield section, source


def _fingerprint(config: Config, section: str, source: Any, known: Fingerprints) -> str:
    keys = tuple((key, leaf.toml) for key, leaf in config.leaves.items() if key.startswith(f"{section}."))
    if keys not in known:
        if isinstance(source, TextSource | TokenFiles):
            with FileHashCache(config.recipe.run.cache_dir / HASH_CACHE_FILE) as hashes:
                known[keys] = source.fingerprint(hashes)
        else:
            known[keys] = str(source.build().fingerprint)
    return known[keys]


def _is_path_below(key: str, sections: Mapping[str, str]) -> bool:
    section, _, last = key.rpartition(".")
    return section in sections and last in LOCATION_KEYS
