import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.references import fisher as reference
from torchprune_bayes._numerics.fisher_blocks import invert
from torchprune_bayes._numerics.gradient_tiles import TiledGradients, gram
from torchprune_bayes._numerics.obs import (
    Directions,
    joint_directions,
    joint_directions_from_kept,
    joint_directions_in_sample_space,
    single_directions,
)


def joint_directions_over_the_kept(gradients, damping, weights, keep):
    kept = int(keep.sum(-1).max())
    return joint_directions_from_kept(gradients, damping, weights, keep, kept)


def joint_directions_with_known_gram(gradients, damping, weights, keep):
    inner = gram(gradients, keep)
    return joint_directions_in_sample_space(gradients, damping, weights, keep, inner)


def joint_directions_tile_by_tile(gradients, damping, weights, keep):
    parts = [
        joint_directions(tiled(block), damping, w[None], k[None])
        for block, w, k in zip(gradients, weights, keep, strict=True)
    ]
    return Directions(
        torch.cat([part.compensation for part in parts]), torch.cat([part.newton for part in parts])
    )


def tiled(block):
    def read(start, stop):
        return block[:, start:stop]

    return TiledGradients(read, (1, *block.shape), block.dtype, block.device)


JOINT = [
    joint_directions,
    joint_directions_with_known_gram,
    joint_directions_tile_by_tile,
    joint_directions_over_the_kept,
    joint_directions_in_sample_space,
]


@st.composite
def problems(draw: st.DrawFn):
    number, size = draw(st.integers(1, 3)), draw(st.integers(1, 25))
    count = draw(st.sampled_from([1, max(size - 1, 1), size + 1, 3 * size]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    gradients = torch.randn(number, count, size, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        gradients[:, :, ::3] = 0.0
    if draw(st.booleans()):
        gradients[:, count // 2 :] = gradients[:, :1]
    weights = torch.randn(number, size, dtype=torch.float64, generator=generator)
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    keep = torch.rand(number, size, generator=generator) < density
    return gradients, 10.0 ** draw(st.integers(-3, 0)), weights, keep


@pytest.mark.parametrize("form", JOINT)
@given(problem=problems(), step=st.sampled_from([0.0, 0.3, 1.0]))
@settings(deadline=None, max_examples=50)
def test_joint_update_solves_its_kkt_system(form, problem, step):
    gradients, damping, weights, keep = problem
    found = form(gradients, damping, weights, keep)
    update = found.compensation + step * found.newton
    for block in range(len(weights)):
        exact = reference.joint_update(gradients[block], damping, weights[block], keep[block], step)
        scale = exact.abs().max() + weights[block].abs().max()
        assert (update[block] - exact).abs().max() <= 1e-10 * scale
    assert torch.equal(update[~keep], -weights[~keep])


@pytest.mark.parametrize("form", [joint_directions, joint_directions_in_sample_space])
@given(problem=problems())
@settings(deadline=None, max_examples=50)
def test_the_factor_of_the_update_gives_the_diagonal_of_what_is_kept(form, problem):
    gradients, damping, weights, keep = problem
    plain = form(gradients, damping, weights, keep)
    found = form(gradients, damping, weights, keep, diagonal=True)
    torch.testing.assert_close(found.compensation, plain.compensation, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.newton, plain.newton, rtol=1e-9, atol=1e-9)
    for g, k, diagonal in zip(gradients, keep, found.diagonal, strict=True):
        exact = torch.linalg.inv(reference.damped_fisher(g[:, k], damping)).diagonal()
        torch.testing.assert_close(diagonal[k], exact, rtol=1e-7, atol=1e-12 / damping)


@given(problem=problems(), step=st.sampled_from([0.0, 0.3, 1.0]))
@settings(deadline=None, max_examples=50)
def test_single_update_is_the_sum_of_the_updates_for_each_weight(problem, step):
    gradients, damping, weights, keep = problem
    found = single_directions(invert(gradients, damping), weights, keep)
    update = found.compensation + step * found.newton
    for block in range(len(weights)):
        exact = reference.single_update(
            gradients[block], damping, weights[block], keep[block], step
        )
        scale = exact.abs().max() + weights[block].abs().max()
        assert (update[block] - exact).abs().max() <= 1e-9 * scale


@given(problem=problems())
@settings(deadline=None, max_examples=30)
def test_the_joint_update_is_the_best_one_on_its_support(problem):
    gradients, damping, weights, keep = problem
    update = joint_directions(gradients, damping, weights, keep).compensation
    single = single_directions(invert(gradients, damping), weights, keep).compensation
    nothing = torch.where(keep, 0.0, -weights)
    for block in range(len(weights)):
        fisher = reference.damped_fisher(gradients[block], damping)
        best, other, none = (d[block] @ fisher @ d[block] for d in (update, single, nothing))
        assert best <= other * (1 + 1e-9) + 1e-12
        assert best <= none * (1 + 1e-9) + 1e-12


def test_float32_inputs_give_the_float64_answer():
    gradients, weights = torch.randn(2, 30, 80), torch.randn(2, 80)
    keep = torch.rand(2, 80) < 0.4
    # A damping that rounding to float32 would matter beside; see test_rounding.py for larger ones.
    wide = joint_directions(gradients.double(), 1e-5, weights.double(), keep)
    narrow = joint_directions(gradients, 1e-5, weights, keep)
    torch.testing.assert_close(narrow.compensation, wide.compensation)
    torch.testing.assert_close(narrow.newton, wide.newton)
