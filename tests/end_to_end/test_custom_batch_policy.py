"""Every tool treats a custom adaptive policy, derived from no class of the project, like a built-in one."""

from __future__ import annotations

import pytest

from recipes.config import load
from tools import inspect_data, plot

pytestmark = pytest.mark.usefixtures("clean_imports")

MODULE = '''
class Doubling:
    """Twice the batch after every measured step."""

    def __init__(self, *, first: int = 4, most: int = 16) -> None:
        self.first, self.most = first, most

    def build(self, *, schedule, sequence_length, total_tokens):
        assert schedule.warmup_tokens > 0 and total_tokens > sequence_length
        return Policy(self.first, self.most)


class Policy:
    def __init__(self, size, most):
        self.size, self.max_size = size, most

    def next_batch_size(self, progress):
        return self.size

    def observe(self, progress, noise):
        if self.max_size == 17:
            raise ArithmeticError("by hand")
        if noise is not None:
            self.size = min(2 * self.size, self.max_size)

    def state_dict(self):
        return {"size": self.size}

    def load_state_dict(self, state):
        self.size = state["size"]
'''


@pytest.fixture
def own(tiny):
    (tiny.folder / "mine_policy.py").write_text(MODULE)
    table = tiny.recipe.read_text().partition("[batch]\n")
    rest = table[2][table[2].index("\n\n") :]
    tiny.recipe.write_text(f'{table[0]}[batch]\nuse = "mine_policy:Doubling"\n{rest}')
    return tiny


def test_it_trains_and_resumes_with_its_state(own):
    assert own.launch("--training.total_tokens=1200", "--checkpoint.interval_steps=2") == 0
    sizes = [row["global_batch_size"] for row in own.rows() if "loss" in row]
    assert sizes[:4] == [4, 8, 16, 16]
    assert own.launch("--training.total_tokens=2400", "--resume") == 0
    assert {row["global_batch_size"] for row in own.rows() if "loss" in row and row["step"] > len(sizes)} == {16}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gradient_noise.interval_steps=none"], "Doubling needs the gradient noise"),
        (["--batch.first=2"], "a step of 2 samples is one micro-batch, and gradient noise needs at least 2"),
    ],
)
def test_a_policy_that_could_never_adapt_is_refused(own, capsys, arguments, said):
    assert own.launch(*arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.quick
def test_the_dry_run_reports_what_is_unknown(own, capsys):
    assert own.launch("--dry-run") == 0
    assert "Doubling depends on the gradient noise, which is unknown" in capsys.readouterr().out
    assert own.launch("--dry-run", "--batch.first=2") == 2
    assert "needs at least 2 micro-batches per step, so the batch could never change" in capsys.readouterr().out
    assert own.launch("--dry-run", "--batch.most=15") == 0
    assert "15 samples become 16: a multiple of 2 = 1 ranks x 2 per micro-batch" in capsys.readouterr().out


@pytest.mark.quick
def test_samples_of_an_unknown_step_are_not_shown(own, capsys):
    assert inspect_data.main([str(own.recipe), "--step", "3"]) == 2
    assert "the batch is adaptive" in capsys.readouterr().err


@pytest.mark.quick
def test_its_schedule_is_plotted_at_both_bounds(own):
    assert list(plot.schedule_curves(load(own.recipe), 1)) == ["batch at initial_size = 4", "batch at max_size = 16"]


def test_a_run_does_not_change_its_recipe(own):
    config = load(own.recipe)
    before = vars(config.recipe.batch).copy()
    assert config.recipe.main(config, None) == 0
    assert vars(config.recipe.batch) == before


def test_an_error_of_the_policy_names_its_section(own, capsys):
    with pytest.raises(ArithmeticError, match="by hand"):
        own.launch("--batch.most=17")
    assert "the run crashed in [batch]; the traceback is also in log.txt" in capsys.readouterr().out
