"""The chunked loss against the plain one, in value, gradient and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.token_ids import IGNORE_INDEX
from models.loss import _fusible_loss, _loss_of_chunk, chunked_cross_entropy, working_bytes

pytestmark = pytest.mark.quick

N, D, V = 37, 12, 53


def inputs(dtype: torch.dtype = torch.float64, *, n: int = N, d: int = D, v: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Some labels are ignored, and some words occur more than once."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_N = torch.randint(v, (n,), generator=generator)
    labels_N[::5] = IGNORE_INDEX
    return x_ND, weight_VD, labels_N


def plain(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(x_ND @ weight_VD.T, labels_N, reduction="sum")


def with_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over the norm of `b`, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 5, 16, 36, 37, 38, 1000, None], ids=lambda chunk: f"chunk {chunk}")
def test_loss_and_gradients_are_those_of_the_plain_loss(dtype, chunk):
    x, weight, labels = inputs(dtype)
    brute = with_gradients(plain(*(exact := inputs(torch.float64))), *exact[:2])
    ours = with_gradients(chunked_cross_entropy(x, weight, labels, chunk_tokens=chunk), x, weight)
    for mine, reference in zip(ours, brute, strict=True):
        assert mine.dtype == dtype
        # float32: its rounding, 6e-8, and that of its inputs. float64: nothing but rounding.
        assert relative(mine, reference) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_a_sum_of_logits_too_large_for_exp_stays_finite():
    x, weight, labels = inputs(torch.float32)
    large = (x.detach() * 1e4).requires_grad_()
    for mine, reference in zip(
        with_gradients(chunked_cross_entropy(large, weight, labels, chunk_tokens=8), large, weight),
        with_gradients(plain(large.double(), weight.double(), labels), large, weight),
        strict=True,
    ):
        assert mine.isfinite().all()
        assert relative(mine, reference) < 1e-5  # logits of 1e4, whose float32 rounding is 1e-3: one in 1e7 of the sum


def test_the_upstream_gradient_scales_both_gradients():
    x, weight, labels = inputs()
    brute = with_gradients(plain(x, weight, labels) / 7, x, weight)
    ours = with_gradients(chunked_cross_entropy(x, weight, labels, chunk_tokens=8) / 7, x, weight)
    assert all(relative(a, b) < 1e-14 for a, b in zip(ours, brute, strict=True))


def test_two_losses_in_one_graph_accumulate():
    x, weight, labels = inputs()
    twice = chunked_cross_entropy(x, weight, labels, chunk_tokens=8) + chunked_cross_entropy(x.sin(), weight, labels)
    twice.backward()
    brute = torch.autograd.grad(plain(x, weight, labels) + plain(x.sin(), weight, labels), (x, weight))
    assert relative(x.grad, brute[0]) < 1e-14
    assert relative(weight.grad, brute[1]) < 1e-14


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_one_input_alone_can_ask_for_its_gradient(needs):
    x, weight, labels = inputs()
    frozen, free = (weight, x) if needs == "x" else (x, weight)
    frozen.requires_grad_(False)
    chunked_cross_entropy(x, weight, labels, chunk_tokens=8).backward()
    assert frozen.grad is None
    assert relative(free.grad, torch.autograd.grad(plain(x, weight, labels), free)[0]) < 1e-14


def test_strided_inputs_give_what_contiguous_ones_do():
    x, weight, labels = inputs()
    strided = x.detach().T.contiguous().T.requires_grad_(), weight.detach().T.contiguous().T.requires_grad_()
    assert not any(tensor.is_contiguous() for tensor in strided)
    ours = with_gradients(chunked_cross_entropy(*strided, labels, chunk_tokens=8), *strided)
    brute = with_gradients(plain(x, weight, labels), x, weight)
    assert all(relative(a, b) < 1e-14 for a, b in zip(ours, brute, strict=True))


def test_ignored_tokens_have_neither_loss_nor_gradient():
    x, weight, labels = inputs()
    kept = labels != IGNORE_INDEX
    chunked_cross_entropy(x, weight, labels, chunk_tokens=8).backward()
    assert not x.grad[~kept].any()
    assert x.grad[kept].abs().sum(-1).min() > 0
    shorter = x.detach()[kept].requires_grad_()
    loss, d_x, d_weight = with_gradients(chunked_cross_entropy(shorter, weight, labels[kept]), shorter, weight)
    assert loss.item() == pytest.approx(chunked_cross_entropy(x, weight, labels).item(), rel=1e-14)
    assert relative(x.grad[kept], d_x) < 1e-14
    assert relative(weight.grad, d_weight) < 1e-14


def test_the_features_of_ignored_tokens_do_not_matter_even_where_they_overflow():
    x, weight, labels = inputs(torch.float32)
    wild = torch.where((labels == IGNORE_INDEX)[:, None], 1e30, x.detach()).requires_grad_()
    ours = with_gradients(chunked_cross_entropy(wild, weight, labels, chunk_tokens=8), wild, weight)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            ours, with_gradients(chunked_cross_entropy(x, weight, labels, chunk_tokens=8), x, weight), strict=True
        )
    )


@pytest.mark.parametrize("n", [0, N], ids=["no tokens", "all ignored"])
def test_without_a_target_loss_and_gradients_are_zero_not_nan(n):
    x, weight, labels = inputs(torch.float32, n=n)
    nothing = torch.full_like(labels, IGNORE_INDEX)
    loss, d_x, d_weight = with_gradients(chunked_cross_entropy(x, weight, nothing), x, weight)
    assert loss.item() == 0
    assert d_x.shape == x.shape and not d_x.any()
    assert d_weight.shape == weight.shape and not d_weight.any()


@pytest.mark.parametrize("label", [-1, V, V + 7])
def test_a_label_outside_the_vocabulary_is_refused(label):
    x, weight, labels = inputs()
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match=f"{label} is out of bounds"):
        chunked_cross_entropy(x, weight, labels)


def test_without_gradients_the_loss_is_the_same_and_needs_none():
    x, weight, labels = inputs()
    with torch.no_grad():
        loss = chunked_cross_entropy(x, weight, labels, chunk_tokens=8)
    assert not loss.requires_grad
    assert torch.equal(loss, chunked_cross_entropy(x, weight, labels, chunk_tokens=8).detach())


def test_a_second_backward_is_an_error_not_a_wrong_gradient():
    x, weight, labels = inputs()
    loss = chunked_cross_entropy(x, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run only once"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_an_error():
    x, weight, labels = inputs()
    (d_x,) = torch.autograd.grad(chunked_cross_entropy(x, weight, labels).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_under_bf16_autocast_softmax_loss_and_sums_are_float32():
    x, weight, labels = inputs(torch.float32, n=512, d=64)
    brute = with_gradients(plain(x.double(), weight.double(), labels), x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x, weight, labels, chunk_tokens=4)
        straight = plain(x, weight, labels)
    assert loss.dtype == torch.float32
    ours = with_gradients(loss, x, weight)
    assert all(tensor.dtype == torch.float32 for tensor in ours)
    # bf16 keeps 8 bits: 2^-9 = 0.2 % of rounding in each of inputs, logits and their gradient, most of it averaging out
    assert relative(ours[0], brute[0]) < 1e-3
    assert all(relative(a, b) < 1e-2 for a, b in zip(ours[1:], brute[1:], strict=True))
    # and no worse than autocast does to the plain loss: 128 chunks add up in float32
    worst = [relative(a, b) for a, b in zip(with_gradients(straight, x, weight), brute, strict=True)]
    assert all(relative(a, b) < 1.2 * w + 1e-4 for a, b, w in zip(ours, brute, worst, strict=True))


def test_bf16_weights_have_a_float32_loss_and_bf16_gradients():
    x, weight, labels = inputs(torch.bfloat16, n=512, d=64)
    brute = with_gradients(plain(x.double(), weight.double(), labels), x, weight)
    ours = with_gradients(chunked_cross_entropy(x, weight, labels, chunk_tokens=100), x, weight)
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert all(relative(a, b) < 1e-2 for a, b in zip(ours, brute, strict=True))  # bf16, as above


class Memory(TorchDispatchMode):
    """What operations make, forward and backward: the most elements of one tensor, the most bytes alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.largest = max(self.largest, tensor.numel())
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_the_logits_of_all_tokens_never_exist_at_a_time(autocast):
    n, d, v, chunk = 2048, 16, 512, 64
    x, weight, labels = inputs(torch.float32, n=n, d=d, v=v)

    def measure(loss) -> Memory:
        with Memory() as memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss(x, weight, labels).backward()
        return memory

    ours = measure(lambda *given: chunked_cross_entropy(*given, chunk_tokens=chunk))
    assert ours.largest == chunk * v == n * d  # the logits of a chunk; features and their gradient are no larger here
    # of a chunk: logits, log-softmax and what is added to it; both gradients, float32, and under autocast bf16 copies
    assert ours.peak < 4 * (4 * chunk * v + 2 * (n * d + v * d))
    assert measure(chunked_cross_entropy).largest <= n * v // 8, "nor with the default chunk"
    assert measure(plain).largest == n * v, "the probe sees the logits where they are made"
    assert measure(plain).peak > 4 * n * v > 4 * ours.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "v", "d"), [(1024, 1000, 64), (100, 500, 64), (2048, 300, 1024)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_working_bytes_is_the_most_that_is_alive(n, v, d, dtype, softcap):
    given = inputs(dtype, n=n, d=d, v=v)
    with Memory() as memory:
        chunked_cross_entropy(*given, softcap=softcap)
    said = working_bytes(n, v, d, element_bytes=dtype.itemsize, device_type="cpu", softcap=bool(softcap))
    assert said == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.parametrize(("softcap", "z_coefficient"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.3), (2.0, 0.3)])
def test_the_loss_that_is_compiled_is_the_same(softcap, z_coefficient):
    x, weight, labels = inputs(torch.float32, n=9, d=8, v=30)
    logits = (x @ weight.T).detach() * 3
    labels = labels.flatten()
    eager = _loss_of_chunk(logits.clone(), labels, torch.float32, 0, None, True, softcap, z_coefficient)
    fused = _fusible_loss(logits, labels, softcap, z_coefficient)
    counted = (labels != IGNORE_INDEX).unsqueeze(-1)
    torch.testing.assert_close(fused[0], eager[0])
    torch.testing.assert_close(fused[1], eager[1])
    torch.testing.assert_close(fused[2] * counted, eager[2] * counted)
