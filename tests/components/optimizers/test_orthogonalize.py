import pytest
import torch

from components.optimizers.orthogonalize import orthogonalize, orthogonalize_flops

pytestmark = pytest.mark.quick


def with_singular_values(rows: int, columns: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix with these singular values, and its polar factor U V^T."""
    generator = torch.Generator().manual_seed(rows + columns)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return left * values @ right.T, left @ right.T


# the range that the singular values of each iteration reach from 0.02 of the norm; see the sources in the module
@pytest.mark.parametrize(("name", "low", "high"), [("quintic", 0.68, 1.21), ("polar_express", 0.84, 1.15)])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 20), (20, 6)])
def test_singular_vectors_stay_and_singular_values_end_near_one(name, low, high, rows, columns):
    small = min(rows, columns)
    x, polar = with_singular_values(rows, columns, torch.linspace(0.05, 1, small, dtype=torch.float64))
    found = orthogonalize(x[None], name)[0]
    # in the basis of the singular vectors the result is diagonal: found = U S V^T, so found @ polar^T = U S U^T
    product = found @ polar.T if rows <= columns else found.T @ polar
    torch.testing.assert_close(product, product.T, rtol=0, atol=1e-10)
    values = torch.linalg.svdvals(found)
    assert low < values.min() and values.max() < high
    assert torch.linalg.vector_norm(found - polar, ord=float("inf")) < 0.35


def test_a_batch_equals_its_matrices_one_by_one():
    x = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = orthogonalize(x, "quintic")
    for matrix, found in zip(x, together, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None], "quintic")[0], found, rtol=0, atol=1e-13)


def test_zeros_stay_zero_and_a_rank_of_one_is_finite():
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4), "polar_express"), torch.zeros(1, 3, 4))
    ones = orthogonalize(torch.ones(1, 3, 4), "polar_express")
    assert torch.linalg.svdvals(ones[0])[0] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = orthogonalize(x, "quintic")
    torch.testing.assert_close(orthogonalize(x * scale, "quintic"), expected, rtol=1e-9, atol=1e-12)


def test_flops_are_those_of_the_products():
    """Gram 2 r^2 c, its square 2 r^3, times X 2 r^2 c, with r the smaller side; each step."""
    assert orthogonalize_flops(3, 5, steps=2) == orthogonalize_flops(5, 3, steps=2) == 2 * (2 * 45 + 2 * 27 + 2 * 45)
