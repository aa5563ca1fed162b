"""The build functions of a run, each by itself on one process, and the state that they make."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from components.batch import StepBatch
from components.data.loader import MicroBatchLoader
from components.distributed.context import DistributedContext
from components.gradient_noise import GradientMoments, GradientNoise
from components.token_ids import IGNORE_INDEX
from models.compilation import RECOMPILE_LIMIT, missing_for_gpu
from recipes import build
from recipes.config import ConfigError, Override, load
from recipes.data_checks import MicroBatchReader
from recipes.run_config import TrainingConfig
from recipes.run_setup import build_environment
from recipes.training_state import TrainingState

pytestmark = pytest.mark.quick

WORLD = DistributedContext(0, 1, torch.device("cpu"))


def configured(tiny, **overrides):
    return load(tiny.recipe, [Override(key, str(value)) for key, value in overrides.items()], cwd=tiny.folder)


def parts(tiny, **overrides):
    """What a state is built of."""
    config = configured(tiny, **overrides)
    mesh, layout = build.build_mesh(config, WORLD)
    data = build.build_data(config, WORLD)
    model = build.build_sharded_model(config, WORLD, mesh, data, is_resumed=False)
    return config, mesh, layout, data, build.build_train_step(config, WORLD, mesh, model)


def test_data_is_built_without_a_model(tiny):
    data = build.build_data(configured(tiny), WORLD)
    assert data.identity.vocab_size == 257
    assert data.identity.epoch_length == len(data.dataset)
    assert data.identity.content == data.dataset.fingerprint
    assert data.validation is not None
    assert build.build_data(configured(tiny, validation="none"), WORLD).validation is None


def test_data_that_is_missing_is_reported_at_its_key(tiny):
    with pytest.raises(ConfigError, match=r"data\.path"):
        build.build_data(configured(tiny, **{"data.path": "nowhere/*.txt"}), WORLD)


def test_the_model_has_its_weights_and_the_step_its_parameters(tiny):
    _, _, _, _, step = parts(tiny)
    assert all(parameter.isfinite().all() for parameter in step.model.parameters())
    trained = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in step.model.parameters()}


def test_compiled_blocks_may_have_more_variants_than_pytorch_compiles_by_default(tiny):
    with torch.compiler.config.patch(recompile_limit=8):
        parts(tiny, **{"training.compile": "true"})
        assert torch.compiler.config.recompile_limit == RECOMPILE_LIMIT


@pytest.mark.parametrize(
    ("found", "cc", "expected"),
    [((), "cc", "triton"), (("triton",), "", "C compiler"), (("triton",), "cc", None), (("triton", "clang"), "", None)],
)
def test_what_a_gpu_needs_to_compile(monkeypatch, found, cc, expected):
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr("models.compilation.find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr("shutil.which", lambda name: name if name in found else None)
    missing = missing_for_gpu.__wrapped__()
    assert expected in missing if expected else missing is None


@pytest.mark.parametrize("missing", [None, "a C compiler"])
def test_auto_does_not_compile_for_a_gpu_that_lacks_something(monkeypatch, missing):
    training = TrainingConfig(total_tokens=1, sequence_length=1, micro_batch_size=1)
    monkeypatch.setattr("recipes.run_config.missing_for_gpu", lambda: missing)
    for present, device, expected in ((True, "cuda", not missing), (False, "cuda", True), (True, "cpu", False)):
        monkeypatch.setattr("torch.cuda.is_available", lambda found=present: found)
        assert training.compiles(torch.device(device)) is expected
        assert replace(training, compile=True).compiles(torch.device(device)), "as it says"
        why = training.slow_eager(torch.device(device), 1)
        assert "install a C compiler" in why if present and device == "cuda" and missing else why is None


def test_a_policy_is_new_for_each_run(tiny):
    keys = {"batch.use": "components.batch:NoiseScale", "batch.initial_size": 8, "batch.max_size": 64}
    config = configured(tiny, **keys)
    first, second = build.build_policy(config), build.build_policy(config)
    first.load_state_dict({"samples": 32})
    assert [policy.next_batch_size(None) for policy in (first, second)] == [32, 8]  # type: ignore[arg-type]


def test_a_state_survives_json(tiny):
    config, _, _, data, step = parts(tiny)

    def new() -> TrainingState:
        with ExitStack() as cleanup:
            environment = build_environment(config, None, cleanup)
            return build.build_state(config, environment, step, build.build_policy(config), data.identity, {})

    state = new()
    state.clock.advance(8)
    noise = state.noise.update(8, {"l2": GradientMoments(4, 2, 9.0, 1.0)})
    assert isinstance(noise, GradientNoise)
    state.observations.append((state.clock, noise))
    assert state.guard.check(3.0, 1.0) is None
    again = new()
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert again.state_dict() == state.state_dict()
    assert (again.clock.step, again.clock.samples) == (1, 8)
    rolled = new()
    rolled.load_state_dict(state.state_dict(), clock=False)
    assert rolled.clock.step == 0
    assert rolled.state_dict()["gradient_noise"] == state.state_dict()["gradient_noise"]


class InOrder(list):
    def order(self, *, seed):
        return lambda samples: (samples // len(self), samples % len(self))


@pytest.mark.parametrize(("ids", "length", "said"), [(300, 24, "300"), (5, 23, "the dataset returns 24 token ids")])
def test_bad_samples_are_found_before_a_step_uses_them(ids, length, said):
    good, bad = torch.zeros(25, dtype=torch.int64), torch.full((length + 1,), ids)
    with MicroBatchLoader(InOrder([good, good, bad, bad]), seed=0, micro_batch_size=2) as loader:
        reader = MicroBatchReader(loader, WORLD, sequence_length=24, vocab_size=257)
        batch = StepBatch(2, 2, 1)
        first = reader.read(batch.micro_batches)
        assert first.wait_for_bad() is None and len(first.micro_batches) == 1
        replaced = reader.read(batch.micro_batches)
        assert (replaced.micro_batches[0].labels == IGNORE_INDEX).all(), "other ranks wait for its results"
        second = replaced.wait_for_bad()
        assert second.first.startswith("samples 2 to 3: ") and said in second.first
        assert isinstance(second.failure, ValueError)
        assert reader.read(batch.micro_batches).wait_for_bad() is None, "the next step starts behind the bad one"
