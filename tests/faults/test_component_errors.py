"""Every call of a component by a run fails: before the first step it is reported at the key, later it is named."""

from __future__ import annotations

import pytest

from recipes import cli
from tests.conftest import TinyRun

pytestmark = pytest.mark.usefixtures("clean_imports")

METHOD = """
from {module} import {name}

class Mine({name}):
    def {method}(self, *args, **kwargs):
        raise {error}
"""
BUILT = """
from {module} import {name}

class Mine({name}):
    def build(self, **given):
        made = super().build(**given)

        class Broken(type(made)):
            {decorator}
            def {method}(self, *args, **kwargs):
                raise {error}

        made.__class__ = Broken
        return made
"""

SECTIONS = {
    "tokenizer": "components.tokenizers:Bytes",
    "data": "components.data:TextFiles",
    "validation.data": "components.data:TextFiles",
    "model": "models.llama:Llama",
    "optimizer": "components.optimizers:AdamW",
    "lr_schedule": "components.lr_schedules:WSD",
    "batch": "components.batch:Ramp",
    "gradient_noise": "components.gradient_noise:GradientNoiseConfig",
    "guard": "components.guard:GuardConfig",
    "checkpoint": "components.checkpoint:CheckpointConfig",
    "metrics": "components.metrics.logger:MetricsConfig",
    "parallel": "components.distributed:ParallelConfig",
    "validation": "components.validation:ValidationConfig",
}
AT_THE_START = [
    ("tokenizer", METHOD, "build"), ("tokenizer", BUILT, "vocab_size"), ("tokenizer", BUILT, "fingerprint"),
    ("data", METHOD, "build"), ("data", BUILT, "__len__"), ("data", BUILT, "fingerprint"),
    ("validation.data", METHOD, "build"), ("validation", METHOD, "build"),
    ("model", METHOD, "build"), ("model", BUILT, "init_weights"), ("model", BUILT, "flops_per_token"),
    ("optimizer", METHOD, "build"),
    ("batch", METHOD, "build"), ("gradient_noise", METHOD, "build"), ("guard", METHOD, "build"),
    ("checkpoint", METHOD, "build"), ("metrics", METHOD, "build"), ("parallel", METHOD, "mesh_shape"),
    ("parallel", METHOD, "build"),
]  # fmt: skip
IN_THE_LOOP = [
    ("batch", "next_batch_size"), ("batch", "measures_noise"), ("batch", "observe"), ("batch", "observe_time"),
    ("batch", "metrics"), ("lr_schedule", "lr"),
]  # fmt: skip


def breaking(tiny: TinyRun, number: int, section: str, source: str, method: str, error: str) -> list[str]:
    """The arguments of a run one of whose components, or what that builds, fails in a method."""
    module, name = SECTIONS[section].split(":")
    decorator = "@property" if method in ("vocab_size", "fingerprint") else ""
    text = source.format(module=module, name=name, method=method, decorator=decorator, error=error)
    (tiny.folder / f"mine_{number}.py").write_text(text)
    recipe, use = tiny.folder / "mine.toml", f'use = "mine_{number}:Mine"'
    old = f'use = "{SECTIONS[section]}"'
    parts = tiny.recipe.read_text().split(old)
    if len(parts) == 1:
        recipe.write_text(f'extends = ["tiny.toml"]\n[{section}]\n{use}')
    else:  # the second of two sources is that of [validation]
        at = len(parts) - 1 if section == "validation.data" else 1
        recipe.write_text(old.join(parts[:at]) + use + old.join(parts[at:]))
    return [str(recipe), "--run.if_exists=replace", "--training.total_tokens=400", "--run.deterministic=false"]


def test_a_failure_before_the_first_step_is_reported_at_its_key(tiny: TinyRun, capsys: pytest.CaptureFixture[str]):
    for number, (section, source, method) in enumerate(AT_THE_START):
        arguments = breaking(tiny, number, section, source, method, "ValueError('too odd')")
        capsys.readouterr()
        status = cli.main(arguments)
        output = capsys.readouterr()
        said, where = output.out + output.err, f"{section}.{method}"
        assert (status, "Traceback" in said) == (2, False), f"{where}: {said}"
        assert f"  {section}\n    too odd\n1 problem; nothing was started." in output.err, f"{where}: {said}"
        assert not (tiny.directory / "metrics.jsonl").exists(), where


def test_a_failure_in_the_loop_names_its_section(tiny: TinyRun, capsys: pytest.CaptureFixture[str]):
    """It is not an input error: the traceback shows the mistake."""
    for number, (section, method) in enumerate(IN_THE_LOOP):
        arguments = breaking(tiny, 100 + number, section, METHOD, method, "ArithmeticError('by hand')")
        if section == "lr_schedule":  # the state is saved first, by all ranks together
            assert cli.main(arguments) == 1
        else:
            with pytest.raises(ArithmeticError, match="by hand"):
                cli.main(arguments)
        said = capsys.readouterr().out
        assert f"the run crashed in [{section}]; the traceback is also in log.txt" in said, f"{method}: {said}"
        assert "ArithmeticError: by hand" in (tiny.directory / "log.txt").read_text()


@pytest.mark.parametrize("cache", ["/dev/null/cache", "tiny.toml", "/proc/nobody"])
def test_a_cache_that_cannot_be_written_is_not_reported_at_the_data(tiny: TinyRun, capsys, cache: str):
    assert cli.main([str(tiny.recipe), f"--run.cache_dir={tiny.folder / cache}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith('command line  run.cache_dir = "') and "\n    [Errno" in said
    assert "; use a writable directory with free space\n1 problem; nothing was started." in said
