import pytest
import torch
from torch import nn

from tests.references.fisher import damped_fisher
from torchprune_bayes import Calibration, EmpiricalFisher
from torchprune_bayes.errors import AlignmentError, ArgumentError

BLOCKS = ["full", "tensor", 7]


def make_calibration(seed: int = 0, **options) -> Calibration:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(48, 4, dtype=torch.float64), torch.randint(3, (48,))
    data = list(zip(x.split(10), y.split(10), strict=True))
    return Calibration(model, data, nn.functional.cross_entropy, **options)


def gradients_in_memory(fisher: EmpiricalFisher) -> bool:
    """Whether a memory-mapped file holds them."""
    return not fisher.store.rows.is_shared()


def dense(fisher: EmpiricalFisher, gradients: torch.Tensor) -> torch.Tensor:
    """The block-diagonal damped Fisher, formed from all gradients ``[N, D]``."""
    blocks = [
        damped_fisher(gradients[:, start:stop], fisher.damping) for start, stop in fisher.blocks
    ]
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("memory_mb", [1024.0, 0.01])
@pytest.mark.parametrize("across_tensors", [False, True])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_streamed_or_kept_it_is_the_inverse_of_the_dense_blocks(
    block_size, across_tensors, memory_mb
):
    calibration = make_calibration(memory_mb=memory_mb)
    fisher = EmpiricalFisher(
        block_size=block_size, across_tensors=across_tensors, damping=1e-2
    ).fit(calibration)
    matrix = dense(fisher, torch.cat(list(calibration.gradients())))
    inverse = torch.linalg.inv(matrix)
    vector = torch.randn(35, dtype=torch.float64)
    assert gradients_in_memory(fisher) == (memory_mb > 1)
    torch.testing.assert_close(fisher.inverse_diagonal(), inverse.diagonal(), rtol=1e-10, atol=0)
    torch.testing.assert_close(fisher.solve(vector), inverse @ vector, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fisher.multiply(vector), matrix @ vector, rtol=1e-10, atol=1e-12)
    wanted = torch.tensor([3, 34, 20, 0])
    torch.testing.assert_close(fisher.columns(wanted), inverse[:, wanted], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory_mb", [1024.0, 0.01])
@pytest.mark.parametrize("active_only", [True, False])
def test_masked_entries_are_dropped_or_have_gradients_of_zero(active_only, memory_mb):
    calibration = make_calibration(memory_mb=memory_mb)
    masks = {name: torch.rand(m.shape) < 0.5 for name, m in calibration.space.masks().items()}
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    fisher = EmpiricalFisher(block_size="full", active_only=active_only, damping=1e-2)
    fisher.fit(calibration, masks=masks)
    gradients = torch.cat(list(calibration.gradients())) * flat
    inverse = torch.linalg.inv(damped_fisher(gradients, 1e-2)).diagonal()
    expected = inverse[flat] if active_only else inverse
    torch.testing.assert_close(fisher.inverse_diagonal(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("memory_mb", [1024.0, 0.01])
@pytest.mark.parametrize("active_only", [True, False])
def test_restricting_equals_fitting_the_smaller_mask(active_only, memory_mb):
    calibration = make_calibration(memory_mb=memory_mb)
    masks = {name: torch.rand(m.shape) < 0.5 for name, m in calibration.space.masks().items()}
    options = {"block_size": "tensor", "active_only": active_only}
    restricted = EmpiricalFisher(**options).fit(calibration).restricted(masks, damping=0.1)
    fitted = EmpiricalFisher(**options, damping=0.1).fit(calibration, masks=masks)
    found, expected = restricted.inverse_diagonal(), fitted.inverse_diagonal()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_centred_subtracts_the_mean_gradient():
    calibration = make_calibration()
    gradients = torch.cat(list(calibration.gradients()))
    mean = gradients.mean(0)
    expected = damped_fisher(gradients, 0.1) - torch.outer(mean, mean)
    fisher = EmpiricalFisher(block_size="full", centred=True, damping=0.1).fit(calibration)
    torch.testing.assert_close(fisher.inverse_diagonal(), torch.linalg.inv(expected).diagonal())


def test_gradients_are_taken_at_the_given_weights():
    calibration = make_calibration()
    moved = {name: value * 0.5 for name, value in calibration.space.values().items()}
    at_moved = EmpiricalFisher().fit(calibration, weights=moved).inverse_diagonal()
    with torch.no_grad():
        for tensor in calibration.space:
            tensor.leaf.mul_(0.5)
    torch.testing.assert_close(at_moved, EmpiricalFisher().fit(calibration).inverse_diagonal())


def test_quadratic_is_the_predicted_rise_of_the_loss():
    calibration = make_calibration()
    fisher = EmpiricalFisher(block_size="full").fit(calibration)
    step = torch.randn(35, dtype=torch.float64)
    gradients = torch.cat(list(calibration.gradients()))
    assert fisher.quadratic(step) == pytest.approx(
        float((gradients @ step).square().mean() / 2), rel=1e-12
    )
    assert fisher.mean_square() == pytest.approx(float(gradients.square().mean()), rel=1e-12)


def test_merged_halves_equal_the_whole():
    whole = make_calibration(num_samples=48)
    model, batches = whole.model, list(whole.data)
    halves = [
        EmpiricalFisher(block_size="tensor").fit(
            Calibration(model, part, nn.functional.cross_entropy)
        )
        for part in (batches[:2], batches[2:])
    ]
    merged = halves[0].merge(halves[1])
    exact = EmpiricalFisher(block_size="tensor").fit(whole)
    assert merged.count == exact.count
    torch.testing.assert_close(merged.inverse_diagonal(), exact.inverse_diagonal())


def test_merging_refuses_other_entries():
    calibration = make_calibration()
    fisher = EmpiricalFisher().fit(calibration)
    masks = {name: ~torch.eye(*m.shape, dtype=bool) for name, m in fisher.remaining.masks.items()}
    with pytest.raises(AlignmentError, match="same remaining entries"):
        fisher.merge(EmpiricalFisher().fit(calibration, masks=masks))


@pytest.mark.parametrize("active_only", [True, False])
def test_saved_and_loaded_it_answers_the_same(tmp_path, active_only):
    calibration = make_calibration()
    masks = {name: torch.rand(m.shape) < 0.5 for name, m in calibration.space.masks().items()}
    fisher = EmpiricalFisher(block_size=7, damping=0.05, active_only=active_only)
    fisher.fit(calibration, masks=masks).save(tmp_path / "fisher.safetensors")
    loaded = EmpiricalFisher.load(tmp_path / "fisher.safetensors")
    assert (loaded.block_size, loaded.damping, loaded.count) == (7, 0.05, fisher.count)
    torch.testing.assert_close(loaded.inverse_diagonal(), fisher.inverse_diagonal())


@pytest.mark.parametrize("bad", ["layer", 0, -3])
def test_block_size_is_checked(bad):
    with pytest.raises(ArgumentError, match="block_size"):
        EmpiricalFisher(block_size=bad)


def test_nothing_left_to_prune_is_an_error():
    calibration = make_calibration()
    masks = {name: torch.zeros_like(m) for name, m in calibration.space.masks().items()}
    with pytest.raises(ArgumentError, match="everything is pruned"):
        EmpiricalFisher().fit(calibration, masks=masks)
