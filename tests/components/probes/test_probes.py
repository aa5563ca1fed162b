"""Probes by themselves: groups, reductions, hidden units, attention within documents, and what is left behind."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.data.loader import MicroBatch
from components.distributed.context import DistributedContext
from components.distributed.parallel_dims import DataParallelGroup
from components.errors import InputError
from components.gradient_noise import GradientNoiseHooks
from components.probes import Activations, AttentionLogits, LayerNoise, Norms
from components.probes.attention_logits import attention_statistics, query_positions
from components.probes.groups import group_of
from models.attention import AttentionRule
from models.document_attention import PerDocumentAttention
from models.flex_attention import FlexAttention
from models.llama import Llama
from recipes.probe_runner import ProbeRunner
from recipes.probes import complete_probe

CPU = torch.device("cpu")


class Gated(nn.Module):
    """A feed-forward with one dead unit, one with a saturated gate, and two others."""

    def __init__(self) -> None:
        super().__init__()
        self.w_gate, self.w_up, self.w_down = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            self.w_up.weight[0], self.w_up.bias[0] = 0.0, 1e-4
            self.w_gate.weight[1], self.w_gate.bias[1] = 0.0, 5.0

    def forward(self, x):
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = Gated()

    def forward(self, x):
        return x + self.feed_forward(x)


class Model(nn.Module):
    """The sum of the outputs is the loss, with dropout that would show a forward pass in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.dropout = nn.Dropout(0.5)
        self.layers = nn.ModuleDict({"0": Block(), "1": Block()})

    def forward(self, tokens, labels):
        x = self.dropout(self.embedding(tokens))
        for layer in self.layers.values():
            x = layer(x)
        return x.square().sum()


def probes_of(model: nn.Module, **probes: object) -> ProbeRunner:
    step = SimpleNamespace(
        model=model, compute_context=nullcontext, noise_hooks=GradientNoiseHooks(model.parameters(), CPU)
    )
    complete = {name: complete_probe(probe) for name, probe in probes.items()}
    for probe in complete.values():
        probe.check_model(model)
    return ProbeRunner(step, complete, DistributedContext(0, 1, CPU), DataParallelGroup(0, 1, CPU))  # type: ignore[arg-type]


def micro_batches(count: int, size: int = 2, length: int = 5, first: int = 0) -> list[MicroBatch]:
    torch.manual_seed(1)
    return [
        MicroBatch(
            torch.randint(10, (size, length)), torch.randint(10, (size, length)),
            torch.arange(first + number * size, first + (number + 1) * size),
        )
        for number in range(count)
    ]  # fmt: skip


def measure(probes: ProbeRunner, batches: list[MicroBatch], number: int = 1) -> dict[str, float]:
    """Return the numbers of a step that changes no parameter."""
    probes.before_step(number, batches)
    probes.on_gradients()
    results = probes.after_update()
    return {} if results is None else results.read()


@pytest.mark.quick
def test_parameters_are_grouped_by_layer_or_module():
    assert group_of("layers.3.attention.wq.weight") == "layer_3"
    assert group_of("layers.3.attention.wq.weight", by_module=True) == "attention_layer_3"
    assert group_of("tok_embeddings.weight") == group_of("tok_embeddings.weight", by_module=True) == "tok_embeddings"


@pytest.mark.quick
def test_dead_and_saturated_units_are_counted():
    row = measure(probes_of(Model(), a=Activations()), micro_batches(2))
    for layer in (0, 1):
        assert row[f"probe_a_dead_units_layer_{layer}"] == 0.25
        assert row[f"probe_a_saturated_units_layer_{layer}"] == 0.25
    assert not [name for name in row if "attention" in name], "the blocks have none"


@pytest.mark.quick
@pytest.mark.parametrize("sequences", [1, 3, 4, 100])
def test_the_sample_is_the_first_sequences_of_the_batch(sequences):
    torch.manual_seed(0)
    model, batches = Model(), micro_batches(3, first=40)
    row = measure(probes_of(model, a=Activations(sequences=sequences)), batches)
    x = model.embedding(torch.cat([each.tokens for each in batches])[:sequences]).detach()
    for layer, block in enumerate(model.layers.values()):
        x = block(x).detach()
        assert row[f"probe_a_residual_rms_layer_{layer}"] == pytest.approx(float(x.square().mean().sqrt()))
        assert row[f"probe_a_residual_max_layer_{layer}"] == pytest.approx(float(x.abs().max()))


@pytest.mark.quick
def test_probes_leave_no_hook_no_random_draw_and_no_mode_behind():
    model = Model()
    probes = probes_of(model, a=Activations(interval_steps=2), b=Norms(interval_steps=2))
    before = torch.get_rng_state()
    assert measure(probes, micro_batches(1), number=1).keys() > {"probe_seconds"}
    torch.manual_seed(0)
    assert measure(probes, micro_batches(1), number=2) == {}
    assert model.training
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert probes.step.noise_hooks.observer is None
    torch.set_rng_state(before)


@pytest.mark.quick
def test_the_numbers_of_a_skipped_step_are_dropped():
    probes = probes_of(Model(), b=Norms(interval_steps=1))
    probes.before_step(1, micro_batches(1))
    probes.on_gradients()  # the step is bad: there is no update
    row = measure(probes, micro_batches(1), number=2)
    assert row["probe_b_update_norm_layer_1"] == 0
    assert row["probe_b_update_ratio_layer_1"] == 0


@pytest.mark.quick
def test_norms_of_a_model_without_layers():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.requires_grad_(False)
    model.append(nn.Linear(2, 2, bias=False))
    probes = probes_of(model, n=Norms())
    probes.before_step(1, micro_batches(1))
    model[1].weight.grad = torch.full((2, 2), 2.0)
    probes.on_gradients()
    with torch.no_grad():
        model[1].weight.add_(3.0)
    results = probes.after_update()
    assert results is not None
    row = results.read()
    assert (row["probe_n_grad_norm_1"], row["probe_n_update_norm_1"]) == pytest.approx((4.0, 6.0))
    assert row["probe_n_param_norm_0"] == pytest.approx(float(model[0].weight.norm()))
    assert "probe_n_update_norm_0" not in row


@pytest.mark.quick
@pytest.mark.parametrize(
    ("probe", "model", "message"),
    [
        (Activations(), nn.Linear(2, 2), "container named `layers`, and Linear has none"),
        (AttentionLogits(), Model(), r"needs an `attention` .* layer 0 of Model has none"),
        (AttentionLogits(), nn.Linear(2, 2), "container named `layers`, and Linear has none"),
    ],
)
def test_a_model_without_the_needed_parts_is_refused(probe, model, message):
    with pytest.raises(InputError, match=message):
        probes_of(model, a=probe)


@pytest.mark.quick
def test_what_is_not_a_probe_is_refused():
    with pytest.raises(InputError, match="dict is not a probe: it has none of watch_forward, on_micro_gradient"):
        complete_probe({})
    with pytest.raises(InputError, match="interval_steps: 0: expected a whole number >= 1"):
        complete_probe(SimpleNamespace(on_update=print, interval_steps=0))


@pytest.mark.quick
def test_queries_are_spread_over_the_sequence():
    assert query_positions(8, 4, CPU).tolist() == [1, 3, 5, 7]
    assert query_positions(3, 64, CPU).tolist() == [0, 1, 2]
    assert query_positions(10, 3, CPU).tolist() == [2, 5, 9]


@pytest.mark.quick
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_attention_statistics_stay_within_documents(attention):
    torch.manual_seed(0)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[0, 5], starts[1, 0], starts[1, 3] = True, True, True
    backend = (
        PerDocumentAttention(starts.cumsum(-1))
        if attention == "sdpa"
        else FlexAttention(starts.cumsum(-1), starts.shape[1], starts.device, compiled=False)
    )
    q, k = torch.randn(2, 12, 4, 6), torch.randn(2, 12, 2, 6)
    largest, entropy = attention_statistics(
        q, k, torch.tensor([2, 6, 11]), AttentionRule(scale=0.5), backend.documents()
    )
    assert largest.shape == entropy.shape == (2, 2, 2, 3)
    for row, bounds in enumerate(([0, 5], [0, 3])):
        for number, at in enumerate((2, 6, 11)):
            first = max(bound for bound in bounds if bound <= at)
            for head in range(4):
                logits = k[row, first : at + 1, head // 2].double() @ q[row, at, head].double() * 0.5
                place = (row, head // 2, head % 2, number)
                assert float(largest[place]) == pytest.approx(float(logits.max()), rel=1e-5)
                p = logits.softmax(-1)
                assert float(entropy[place]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5, abs=1e-6)


@pytest.mark.quick
def test_attention_of_a_decoder_within_documents():
    """The whole path: the backend of a forward pass with documents reaches the probe."""
    model = Llama(size="debug", dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=32).build(
        vocab_size=10, sequence_length=8
    )
    model.init_weights(0)
    (batch,) = batches = micro_batches(1, length=8)
    batch.tokens.remainder_(9)[:, 4] = 9
    plain = measure(probes_of(model, a=AttentionLogits()), batches)
    model.enable_document_masking(9)
    within = measure(probes_of(model, a=AttentionLogits()), batches)
    assert within["probe_a_entropy_layer_0"] < plain["probe_a_entropy_layer_0"] - 0.3
    # logits are nearly 0: the entropy is that of equal weights over the keys of each query's document
    expected = sum(2 * torch.arange(1, 5).log()) / 8
    assert within["probe_a_entropy_layer_0"] == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.quick
def test_noise_is_not_reported_for_a_step_that_does_not_measure_it():
    model = Model()
    probes = probes_of(model, n=LayerNoise())
    assert measure(probes, micro_batches(1)).keys() == {"probe_seconds"}


@pytest.mark.quick
def test_a_custom_probe_records_sums_means_and_vectors():
    class Custom:
        def on_gradients(self, step):
            step.record_sum("sum", torch.tensor([1.0, 2.0]))
            step.record_mean("mean", torch.tensor([1.0, 2.0]))
            step.record_mean("mean", torch.tensor([6.0]))
            step.record_rms("rms", torch.tensor([3.0, 4.0]))
            step.record_norm("norm", torch.tensor([3.0]))

        def on_update(self, step):
            step.record_norm("norm", torch.tensor([4.0]))
            step.record_max("max", torch.tensor([1.0, -2.0]))
            step.record_maxima("vector", torch.tensor([1.0, -2.0]))

        def finish(self, step, values):
            assert values.pop("vector").tolist() == [1.0, -2.0]
            return values

    row = measure(probes_of(nn.Linear(1, 1), c=Custom()), micro_batches(1))
    row.pop("probe_seconds")
    names = {"sum": 3.0, "mean": 3.0, "rms": 12.5**0.5, "norm": 5.0, "max": 1.0}
    assert row == pytest.approx({f"probe_c_{name}": value for name, value in names.items()})


def test_compiled_blocks_are_probed_without_compiling_again():
    """The backend "eager" compiles no kernels; the compiler traces the blocks, and guards them, as with any other."""
    from torch._dynamo.utils import counters

    model = Llama(size="debug", dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=32).build(
        vocab_size=10, sequence_length=8
    )
    model.init_weights(0)
    batches = micro_batches(2, length=8)
    probes = [Activations(interval_steps=2), AttentionLogits(interval_steps=2)]
    expected = measure(probes_of(model, a=probes[0], l=probes[1]), batches)
    for block in model.layers.values():
        block.compile(backend="eager")
    compiled = probes_of(model, a=probes[0], l=probes[1])

    def train() -> None:
        model(batches[0].tokens, batches[0].labels).backward()
        model.zero_grad()

    train()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    row = measure(compiled, batches)
    train()
    assert counters["stats"]["unique_graphs"] == graphs
    expected.pop("probe_seconds"), row.pop("probe_seconds")
    assert row == pytest.approx(expected, rel=1e-6)
