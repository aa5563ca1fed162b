"""Plans of the tiny recipe, and what they say."""

from __future__ import annotations

from recipes.config import Config, Override, load
from recipes.dry_run.memory import Memory
from recipes.dry_run.plan import HardwareTarget, RunPlan, make_plan
from recipes.dry_run.preflight import preflight_checks

GPU = "--run.device=auto"


def config_of(tiny, *arguments: str) -> Config:
    pairs = (argument.removeprefix("--").split("=", 1) for argument in arguments)
    return load(tiny.recipe, [Override(key, value) for key, value in pairs])


def plan_of(tiny, *arguments: str, processes: int = 1, claim: str = "") -> RunPlan:
    return make_plan(config_of(tiny, *arguments), processes, HardwareTarget.parse(claim))


def memory_of(tiny, *arguments: str, processes: int = 1) -> Memory:
    memory = plan_of(tiny, *arguments, processes=processes).memory
    assert isinstance(memory, Memory)
    return memory


def findings_of(tiny, *arguments: str, processes: int = 1, claim: str = "") -> dict[str, tuple[str, str]]:
    """Key -> (level, message) of the findings, the gravest of each key."""
    found: dict[str, tuple[str, str]] = {}
    for item in preflight_checks(plan_of(tiny, *arguments, processes=processes, claim=claim)):
        found.setdefault(item.key, (item.level, item.message))
    return found
