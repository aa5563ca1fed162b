"""The comparison of batch policies: stored results, tuning and its report."""

from __future__ import annotations

import base64
import math
from types import SimpleNamespace

import pytest

from benchmarks.adaptive_batch import __main__ as comparison
from benchmarks.adaptive_batch import methods, runs, variants
from benchmarks.adaptive_batch.runs import ResultBook, Run
from components.batch import NormTest
from components.gradient_noise.moments import GradientMoments, GradientNoise
from components.lr_schedules import WSD
from tools.sweep.outcome import Outcome
from tools.sweep.runner import Results, Runner

ROW = ("constant 8", "wsd")


@pytest.fixture
def text(tmp_path):
    """The files that a digest reads; nothing is trained on them."""
    contents = {"data.path": "some text", "validation.data.path": "other text", "tokenizer.path": ranks()}
    for key, content in contents.items():
        (tmp_path / f"{key}.txt").write_text(content)
    return {key: tmp_path / f"{key}.txt" for key in contents}


def ranks() -> str:
    return "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))


@pytest.fixture
def trained(monkeypatch):
    """Runs whose loss is the distance of the learning rate from 0.0075; returns the jobs that were run."""
    jobs = []

    def train(runner, job):
        jobs.append(job)
        curve = [(5, 500, 5.0, 8), (10, 1000, 4.0, 8)] if runner.curve_points else []
        loss = abs(float(job.varied["lr"]) - 0.0075)
        outcome = Outcome(val_loss=loss, train_loss=4.0, steps=10, samples=80, tokens=1000, seconds=1.0, curve=curve)
        runner.results.add(job, outcome)
        return outcome

    monkeypatch.setattr(Runner, "_run", train)
    return jobs


def test_tuning_continues_while_the_best_lr_is_at_the_edge(trained, text, tmp_path):
    book = ResultBook(Results(tmp_path / "results"), text, final_tokens=1_500_000)
    best = comparison.tune_lrs(book, {ROW: methods.FIRST["wsd"]}, 375_000)
    assert best == {ROW: (0.008, pytest.approx(0.0005))}
    assert sorted(float(job.varied["lr"]) for job in trained) == [0.0014, 0.002, 0.0028, 0.004, 0.0056, 0.008, 0.011]
    assert {job.varied["tokens"] for job in trained} == {"375000"}


def test_a_row_is_run_at_the_best_lr_of_full_length_which_lies_between_two_others(trained, text, tmp_path):
    book = ResultBook(Results(tmp_path / "results"), text, final_tokens=1_500_000)
    comparison.run_rows(book, [ROW], seeds=3)
    finals = [(job.varied["seed"], job.varied["lr"]) for job in trained if job.varied["tokens"] == "1500000"]
    assert finals == [("0", "0.008"), ("0", "0.0056"), ("0", "0.011"), ("1", "0.008"), ("2", "0.008")]
    ((lr, outcomes),) = comparison.rows_of(book).values()
    assert (lr, len(outcomes)) == (0.008, 3)


def test_stored_runs_are_not_run_again_unless_their_settings_changed(trained, text, tmp_path, monkeypatch):
    def book():
        return ResultBook(Results(tmp_path / "results"), text, final_tokens=1_500_000)

    run = Run(ROW, 0.004, 0, 1_500_000)
    (first,) = book().run([run])
    (again,) = book().run([run])
    assert (again.loss, len(trained)) == (first.loss, 1)
    assert {row: list(found) for row, found in book().finals().items()} == {ROW: [0.004]}
    monkeypatch.setitem(methods.SIZES["0.7M"], "model.layers", "7")
    assert book().finals() == {}
    book().run([run])
    assert len(trained) == 2


def test_the_whole_comparison_ends_in_a_row_for_every_method(trained, text, tmp_path, capsys):
    places = [f"--{name}={path}" for name, path in zip(("train", "valid", "tokenizer"), text.values(), strict=True)]
    arguments = [*places, f"--results={tmp_path / 'results'}", f"--pictures={tmp_path}", "--seeds=2"]
    assert comparison.main(arguments) == 0
    found = capsys.readouterr().out
    finals = [job.varied for job in trained if job.varied["tokens"] == "4000000"]
    assert {job["seed"] for job in finals} == {"0", "1"}
    methods_run = len(methods.METHODS) - (len(methods.VARIANTS) - 1)  # of the ramps only the best
    wsd_only = sum(not method.power for method in methods.METHODS.values())
    # the first seed tries the best learning rate and its neighbors, of which there is one under Power, where the best
    # one is the smallest here
    assert len(finals) == 4 * methods_run + 3 * (methods_run - wsd_only)
    assert all(f"| {job['method']} | " in found for job in finals)
    before_and_after = "| 5.000 (5.000 to 5.000) | 4.000 (4.000 to 4.000) |"  # at half and at the end of its tokens
    assert all((before_and_after in line) != ("Seesaw" in line) for line in found.splitlines() if "4.000 (" in line)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"adaptive_batch_loss.svg", "adaptive_batch_size.svg"}
    before = len(trained)
    assert comparison.main([*arguments, "--report"]) == 0
    assert (capsys.readouterr().out, len(trained)) == (found, before)
    assert comparison.main([*arguments[3:], "--report"]) == 0, "results are known by their labels without the text"
    assert capsys.readouterr().out == found


def test_a_comparison_without_its_text_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        comparison.main([f"--results={tmp_path / 'results'}", f"--train={tmp_path}", "--report"])
    assert "--train, --valid and --tokenizer are required" in capsys.readouterr().err


def test_a_norm_test_follows_the_schedule():
    """Eta is halved with the learning rate, so the batch is four times as large."""
    settings = {"initial_size": 8, "max_size": 512, "multiple_of": 4, "eta": 1.6}
    schedule = WSD(max_lr=2e-3, decay_fraction=0.5, decay="linear", batch_scaling="sqrt", reference_batch_tokens=1024)
    build = {"schedule": schedule, "sequence_length": 128, "total_tokens": 1_000_000}
    following = variants.FollowingNormTest(**settings).build(**build)
    plain = NormTest(**settings).build(**build)
    moments = GradientMoments(
        micro_batch_size=4, num_micro_batches=2, sum_micro_grad_sq_norms=1.0, mean_grad_sq_norm=0.4
    )
    noise = GradientNoise(grad_cov_trace=100.0, grad_sq_norm=1.0, moments=moments)
    for tokens, factor in ((400_000, 1), (750_000, 4)):
        clock = SimpleNamespace(step=9, samples=tokens // 128, tokens=tokens, total_tokens=1_000_000)
        for policy in (following, plain):
            policy.observe(clock, noise)
        assert plain.next_batch_size(clock) == 40  # 100 / 1.6^2 = 39.06, in whole micro-batches of 4
        assert following.next_batch_size(clock) == math.ceil(factor * 100 / 1.6**2 / 4) * 4
    following.observe(SimpleNamespace(step=9, samples=7812, tokens=1_000_000, total_tokens=1_000_000), noise)
    assert following.next_batch_size(clock) == 160, "without a learning rate it stays"


def test_a_learning_rate_that_scales_up_to_a_batch():
    keys = {"max_lr": 2e-3, "batch_scaling": "sqrt", "reference_batch_tokens": 1024}
    limited = variants.LimitedWSD(**keys, scaled_up_to_tokens=4096)
    assert limited.lr(5000, 2048, 10**6) == WSD(**keys).lr(5000, 2048, 10**6)
    assert limited.lr(5000, 8192, 10**6) == WSD(**keys).lr(5000, 4096, 10**6) == pytest.approx(4e-3)


EVERY = [
    (name, kind)
    for name in [*methods.METHODS, "constant 20"]
    for kind in ("wsd", "power", "cosine")
    if kind != "power" or methods.method_of(name).power
]


@pytest.mark.parametrize("name, kind", EVERY)
def test_every_method_is_a_recipe(name, kind, tmp_path):
    """Keys, types and cross-checks, which need no text."""
    from recipes import cli

    settings = runs.settings_of(Run((name, kind), 0.002, 0, 100_000), "0.7M")
    extra = ["--tokenizer.path=x", "--data.path=x", "--validation.data.path=x", f"--run.dir={tmp_path / 'run'}"]
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    assert cli.main([str(runs.RECIPE), *arguments, *extra, "--lr_schedule.warmup_tokens=0", "--print-config"]) == 0
