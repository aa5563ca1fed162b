"""A checkpoint is complete or does not exist; the restored state equals the saved one bitwise."""

import json

import pytest
import torch
from torch import nn

from components.checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    StateTensors,
    load_tensors,
    manager,
    read_state,
)
from components.optimizers import AdamW

pytestmark = pytest.mark.quick


class Alone:
    rank, size, is_main, long_timeout_group = 0, 1, True, None

    def gather(self, text: str) -> list[str]:
        return [text]


def training(seed: int, tied: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 12, bias=False))
    if tied:
        model[3].weight = model[0].weight
    model.lr_multiplier = lambda name: 1.0
    optimizer = AdamW().build(model=model)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    data = torch.randint(12, (4, 6), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(data).flatten(0, 1), data.flatten()).backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    optimizer.zero_grad()


def test_copies_in_memory_need_a_directory_on_every_node(tmp_path, monkeypatch, caplog):
    class OneWithout(Alone):
        def all_reduce_max(self, value: int) -> int:
            return 1

    monkeypatch.setenv("POWERTRAIN_HOST_MEMORY", str(tmp_path))
    manager = CheckpointConfig(in_memory_interval_steps=1).build(tmp_path / "checkpoints", OneWithout())
    assert not manager.can_save_in_memory(), "the ranks would wait for those of the other node"
    assert "needs /dev/shm on every node" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
def test_training_continues_bitwise(tmp_path, tied):
    model, optimizer = training(0, tied)
    for seed in range(3):
        step(model, optimizer, seed)
    store = CheckpointManager(tmp_path, Alone())
    assert store.save(3, StateTensors(model, optimizer, Alone()).collect(), {"clock": {}}, "a = 1\n")
    drawn = torch.rand(5)
    for seed in range(3, 6):
        step(model, optimizer, seed)

    resumed, resumed_optimizer = training(99, tied)
    torch.manual_seed(123)
    StateTensors(resumed, resumed_optimizer, Alone()).restore(store.path(3))
    assert torch.equal(torch.rand(5), drawn), "the random state is part of the checkpoint"
    for seed in range(3, 6):
        step(resumed, resumed_optimizer, seed)
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [g["weight_decay"] for g in resumed_optimizer.param_groups] == [
        g["weight_decay"] for g in optimizer.param_groups
    ]


def test_a_checkpoint_of_a_run_without_a_gpu_is_continued_on_one_and_the_other_way_round(tmp_path, monkeypatch):
    """A random state that the checkpoint does not have is unchanged, and one of a missing device is ignored."""
    on_cpu, store = StateTensors._random_state, CheckpointManager(tmp_path, Alone())
    restored = []
    monkeypatch.setattr("torch.cuda.set_rng_state", restored.append)

    def on_gpu(tensors):
        return {**on_cpu(tensors), "cuda": torch.full((16,), 7, dtype=torch.uint8)}

    for number, (there, here) in enumerate([(on_cpu, on_gpu), (on_gpu, on_cpu), (on_gpu, on_gpu)], 1):
        model, optimizer = training(0)
        step(model, optimizer, 1)
        monkeypatch.setattr(StateTensors, "_random_state", there)
        assert store.save(number, StateTensors(model, optimizer, Alone()).collect(), {}, "")
        drawn = torch.rand(3)
        other, other_optimizer = training(1)
        monkeypatch.setattr(StateTensors, "_random_state", here)
        StateTensors(other, other_optimizer, Alone()).restore(store.path(number))
        assert torch.equal(torch.rand(3), drawn)
        assert torch.equal(other[1].weight, model[1].weight)
        assert len(restored) == (number == 3)


def test_a_save_that_fails_is_logged_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    store = CheckpointManager(tmp_path, Alone())
    tensors = {"x": torch.ones(3)}
    store.save(1, tensors, {}, "")
    for dies_in in (
        "components.checkpoint.commit.write_fsync",
        "torch.distributed.checkpoint.save",
        "pathlib.Path.rename",
    ):

        def die(*args, **kwargs):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(dies_in, die)
            assert store.save(2, tensors, {}, "") is False
        assert "step-00000002 could not be saved: No space left on device" in caplog.text
        caplog.clear()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (store.saved_step, store.failed_steps) == (1, [2, 2, 2])
    assert store.save(3, tensors, {}, ""), "a disk that has room again is used again"


def test_old_checkpoints_that_cannot_be_listed_do_not_fail_a_save(tmp_path, monkeypatch, caplog):
    def fail(directory):
        raise OSError("Stale file handle")

    store = CheckpointManager(tmp_path, Alone(), keep_last=1)
    monkeypatch.setattr(manager, "list_checkpoints", fail)
    assert store.save(1, {"model": {"x": torch.ones(2)}}, {}, "")
    assert "could not be listed: Stale file handle" in caplog.text
    monkeypatch.undo()
    assert store.saved_step == 1 and store.failed_steps == [] and store.list_checkpoints() == [store.path(1)]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointManager(tmp_path, Alone())
    for value in (1.0, 2.0):
        store.save(5, {"x": torch.full((3,), value)}, {"value": value}, "")
    path = store.path(5)
    loaded = {"x": torch.zeros(3)}
    load_tensors(path, loaded, no_dist=True)
    assert loaded["x"].tolist() == [2.0] * 3
    assert read_state(path)["value"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_the_last_n_and_every_m_are_kept(tmp_path):
    store = CheckpointConfig(keep_last=2, keep_every=30).build(tmp_path, Alone())
    for number in range(10, 110, 10):
        store.save(number, {"x": torch.ones(1)}, {}, "")
    assert [path.name for path in store.list_checkpoints()] == [f"step-{n:08d}" for n in (30, 60, 90, 100)]
    assert store.latest() == tmp_path / "step-00000100"


def test_steps_beyond_eight_digits_are_still_the_newest(tmp_path):
    for number in (99_999_999, 100_000_000):
        (tmp_path / f"step-{number:08d}").mkdir()
    assert CheckpointManager(tmp_path, Alone()).latest() == tmp_path / "step-100000000"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a checkpoint"),
        ("{", "damaged"),
        ("[]", "damaged: state.json: holds a list, expected an object"),
        ("{}", "has no format number"),
        (json.dumps({"format": 99}), "format 99 and this version reads format 3"),
    ],
)
def test_a_state_that_cannot_be_read_says_why(tmp_path, text, message):
    if text is not None:
        (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(bad):
    model, optimizer = training(0)
    tensors = StateTensors(model, optimizer, Alone())
    assert tensors.find_nonfinite() == [], "before the first step there is no state of the optimizer"
    step(model, optimizer, 0)
    assert tensors.find_nonfinite() == []
    places = {name: parameter.data for name, parameter in model.named_parameters()}
    places |= {
        f"{name} ({key})": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    assert len(places) == 18
    for name, tensor in places.items():
        for position in (0, tensor.numel() - 1):
            before = tensor.flatten()[position].clone()
            tensor.view(-1)[position] = bad
            assert tensors.find_nonfinite() == [name]
            tensor.view(-1)[position] = before
    model.register_buffer("mask", torch.full((2, 2), -float("inf")))
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    assert tensors.find_nonfinite() == [], "a mask may well be infinite, and nothing is finite"
