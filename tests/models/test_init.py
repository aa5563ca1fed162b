"""Initial weights depend only on (seed, name), not on device, dtype, depth or order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.decoder import Decoder
from models.init import contiguous_runs, fill_normal, parameter_seed
from models.presets import LlamaShape

pytestmark = pytest.mark.quick

SIZE = LlamaShape(dim=64, layers=4, heads=4, kv_heads=2, ffn_dim=160)
V = 300


def weights(
    seed: int = 0, size: LlamaShape = SIZE, dtype: torch.dtype = torch.float32, **options
) -> dict[str, torch.Tensor]:
    model = Decoder(size, V, **options).to(dtype)
    model.init_weights(seed)
    return model.state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_made_on_meta_gets_the_same_weights(tied):
    size = LlamaShape(dim=64, layers=4, heads=4, kv_heads=2, ffn_dim=160, tied_embeddings=tied)
    with torch.device("meta"):
        model = Decoder(size, V)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights(0)
    assert_equal(model.state_dict(), weights(size=size))
    tokens = torch.arange(40)[None] % V
    direct = Decoder(size, V)
    direct.init_weights(0)
    assert torch.equal(model(tokens), direct(tokens)), "no state but the weights was lost on meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_same_weights():
    with torch.device("cuda"):
        model = Decoder(SIZE, V)
    model.init_weights(0)
    assert_equal({name: weight.cpu() for name, weight in model.state_dict().items()}, weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_a_cast_of_float32(dtype):
    assert_equal(weights(dtype=dtype), {name: weight.to(dtype) for name, weight in weights().items()})


def test_the_random_state_of_the_process_is_neither_read_nor_changed():
    torch.manual_seed(1)
    first, drawn = weights(), torch.rand(3)
    torch.manual_seed(2)
    assert_equal(weights(), first)
    torch.manual_seed(1)
    Decoder(SIZE, V)  # torch's own initialization of a Linear draws; ours on top must not
    assert torch.equal(torch.rand(3), drawn)


def test_weights_already_there_do_not_matter():
    model = Decoder(SIZE, V)
    model.init_weights(5)
    model.init_weights(0)
    assert_equal(model.state_dict(), weights())


def test_another_seed_changes_every_matrix_and_no_norm():
    zero, one = weights(0), weights(1)
    for name in zero:
        assert torch.equal(zero[name], one[name]) == ("norm" in name), name


def test_no_two_parameters_get_the_same_draw():
    matrices = [
        weight.flatten()[:100] for name, weight in weights(depth_scaled_init=False).items() if "norm" not in name
    ]
    for i, first in enumerate(matrices):
        assert not any(torch.equal(first, second) for second in matrices[i + 1 :])


@pytest.mark.parametrize("depth_scaled", [False, True])
def test_a_deeper_model_begins_with_the_layers_of_the_shallower(depth_scaled):
    def of_layers(layers: int) -> dict[str, torch.Tensor]:
        size = LlamaShape(dim=64, layers=layers, heads=4, kv_heads=2, ffn_dim=160)
        return weights(size=size, depth_scaled_init=depth_scaled)

    shallow, deep = of_layers(1), of_layers(4)
    for name, weight in shallow.items():
        into_residual = name.endswith((".wo.weight", ".w_down.weight"))
        expected = weight / 2 if into_residual and depth_scaled else weight  # sqrt(4 layers / 1 layer)
        torch.testing.assert_close(deep[name], expected, rtol=1e-6 if into_residual else 0, atol=0, msg=name)


@pytest.mark.parametrize("std", [0.02, 0.1])
@pytest.mark.parametrize("depth_scaled", [False, True])
def test_every_matrix_is_normal_with_the_std_it_should_have_and_gains_are_one(std, depth_scaled):
    for name, weight in weights(init_std=std, depth_scaled_init=depth_scaled).items():
        if "norm" in name:
            assert (weight == 1).all(), name
            continue
        expected = std
        if depth_scaled and name.split(".")[-2] in ("wo", "w_down"):
            expected /= math.sqrt(2 * 4)
        z, n = weight.double() / expected, weight.numel()
        # five standard errors of the mean, the second and the fourth moment of a normal
        assert abs(z.mean()) < 5 * math.sqrt(1 / n), name
        assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n), name
        assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n), name


def test_seeds_of_names_never_change():
    """A change here changes the start of every run: sha256 of "seed:name", the first 8 bytes, less one bit."""
    assert parameter_seed(0, "tok_embeddings.weight") == 3_858_584_360_995_275_935
    assert parameter_seed(42, "layers.0.attention.wq.weight") == 6_506_964_079_639_115_809
    assert (
        0 <= min(parameter_seed(s, "x") for s in range(100)) <= max(parameter_seed(s, "x") for s in range(100)) < 2**63
    )


def test_values_never_change():
    parameter = torch.nn.Parameter(torch.empty(8, 8))
    fill_normal(parameter, name="layers.0.attention.wq.weight", seed=42, std=1.0)
    assert parameter.flatten()[[0, 1, 31, 63]].tolist() == [
        1.6939518451690674,
        -0.32622480392456055,
        -0.7251201272010803,
        -1.600946307182312,
    ], "to the last bit, on every processor: no function is used that they round differently"


def test_a_part_of_a_tensor_is_runs_of_its_elements():
    elements = np.arange(5 * 4 * 6).reshape(5, 4, 6)
    for indices in (
        [None, None, None],
        [np.array([1, 2]), None, None],
        [np.array([0, 2, 3]), None, None],
        [None, np.array([1, 2]), None],
        [np.array([4]), np.array([0, 3]), np.array([2, 3, 4])],
        [None, None, np.array([], dtype=np.int64)],
    ):
        starts, length = contiguous_runs(elements.shape, indices)
        found = (starts[:, None] + np.arange(length)).reshape(-1)
        own = [np.arange(size) if some is None else some for size, some in zip(elements.shape, indices, strict=True)]
        assert found.tolist() == elements[np.ix_(*own)].reshape(-1).tolist(), indices
    assert contiguous_runs((5, 4, 6), [np.array([1, 2]), None, None])[1] == 48, "neighbors are one run"
    assert contiguous_runs((), [])[0].tolist() == [0]
