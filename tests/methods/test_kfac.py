from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist, shuffled_batches
from tests.references.second_order import damped_kronecker_product
from torchprune_bayes import (
    KFAC,
    Calibration,
    LayerCurvature,
    Magnitude,
    prune_global,
    registered_methods,
)
from torchprune_bayes.calibration import MeanLoss
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    CalibrationError,
)
from torchprune_bayes.params import ParameterSpace


def _model() -> Any:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 2), nn.Linear(12, 4)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear).double()


def _data(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 2, 3, 3, generator=generator).to(dtype)
    return [(x, torch.randint(4, (32,), generator=generator))]


def _calibration(model: nn.Module, **options: Any) -> Calibration:
    return Calibration(model, _data(next(model.parameters()).dtype), cross_entropy, **options)


def _dense_blocks(
    calibration: Calibration, damping: float, *, pi: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Damped Fisher and flat weights by name."""
    factors = LayerCurvature(structure="kronecker").fit(calibration)
    return {
        name: (
            damped_kronecker_product(*factors.factors(name), damping, pi=pi),
            weight.flatten(),
        )
        for name, weight in calibration.space.values().items()
    }


@pytest.mark.parametrize("pi", [False, True])
def test_equals_the_dense_matrices_of_the_paper(pi: bool) -> None:
    calibration = _calibration(_model())
    method = KFAC(0.6, calibration=calibration, damping=1e-3, pi=pi)
    decision = method.decide(calibration.space)
    assert decision.updates is not None
    assert decision.scores is not None
    for name, (fisher, weight) in _dense_blocks(calibration, 1e-3, pi=pi).items():
        inverse = torch.linalg.inv(fisher)
        scores = weight.square() / (2 * inverse.diagonal())
        torch.testing.assert_close(decision.scores[name].flatten(), scores)
        keep = decision.masks[name].flatten()
        moved = weight - inverse @ torch.where(keep, 0.0, weight / inverse.diagonal())
        expected = torch.where(keep, moved, 0.0)
        torch.testing.assert_close(decision.updates[name].flatten(), expected)
    kept = sum(int(mask.sum()) for mask in decision.masks.values())
    assert kept == 72 - round(0.6 * 72)


def test_the_update_for_one_weight_is_optimal() -> None:
    calibration = _calibration(_model())
    method = KFAC(1, calibration=calibration, damping=0.1, pi=False)
    decision = method.decide(calibration.space)
    assert decision.updates is not None
    assert decision.scores is not None
    (name,) = (name for name, mask in decision.masks.items() if not mask.all())
    fisher, weight = _dense_blocks(calibration, 0.1, pi=False)[name]
    change = decision.updates[name].flatten() - weight
    # Stationary: no kept weight can lower ½ δᵀFδ, whose value is the score.
    slope = (fisher @ change)[decision.masks[name].flatten()]
    torch.testing.assert_close(slope, torch.zeros_like(slope))
    torch.testing.assert_close(change @ fisher @ change / 2, decision.scores[name].min())


def test_with_large_damping_ranks_by_magnitude_and_moves_nothing() -> None:
    calibration = _calibration(_model())
    space = calibration.space
    decision = KFAC(0.5, calibration=calibration, damping=1e12, pi=False).decide(space)
    by_size = Magnitude(0.5).decide(space).masks
    torch.testing.assert_close(decision.masks, by_size)
    assert decision.updates is not None
    expected = {name: value * by_size[name] for name, value in space.values().items()}
    torch.testing.assert_close(decision.updates, expected, rtol=1e-4, atol=0)


def test_only_selects_without_update() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = _calibration(model)
    both = [
        KFAC(0.5, calibration=calibration, update=update).decide(calibration.space)
        for update in ("none", "single")
    ]
    torch.testing.assert_close(both[0].masks, both[1].masks)
    assert both[0].updates is None
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_scope_layer_prunes_each_tensor_alike() -> None:
    calibration = _calibration(_model())
    masks = prune_global(None, KFAC, amount=0.5, calibration=calibration, scope="layer").masks
    assert [int(mask.sum()) for mask in masks.values()] == [12, 24]


def test_pruning_again_leaves_the_dead_alone() -> None:
    calibration = _calibration(_model())
    first = prune_global(None, KFAC, amount=0.5, calibration=calibration).masks
    again = prune_global(None, KFAC, amount=0.5, calibration=calibration)
    assert again.updates is not None
    for name, mask in first.items():
        assert not (again.masks[name] & ~mask).any()
        assert not again.updates[name][~mask].any()
    assert sum(int(mask.sum()) for mask in again.masks.values()) == 18


def test_keeps_the_dtype_of_the_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        calibration = _calibration(_model().to(dtype))
        decision = KFAC(0.5, calibration=calibration).decide(calibration.space)
        assert decision.updates is not None
        assert {value.dtype for value in decision.updates.values()} == {dtype}


def test_fitted_factors_take_the_place_of_a_pass(tmp_path: Path) -> None:
    calibration = _calibration(_model())
    factors = LayerCurvature(structure="kronecker").fit(calibration)
    expected = KFAC(0.5, calibration=calibration).decide(calibration.space)
    found = KFAC(0.5, curvature=factors).decide(calibration.space)
    assert found.updates is not None
    torch.testing.assert_close(found.updates, expected.updates)
    factors.save(tmp_path / "factors.safetensors")
    loaded = LayerCurvature.load(tmp_path / "factors.safetensors")
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, KFAC, amount=0.5, curvature=loaded)
    read = prune_global(None, KFAC, amount=0.5, curvature=loaded, calibration=calibration)
    torch.testing.assert_close(read.masks, expected.masks)
    with pytest.raises(AlignmentError, match="fit it again"):
        prune_global(None, KFAC, amount=0.5, curvature=factors)


def test_prunes_one_tensor_with_the_factors_of_all_and_lets_go_of_them() -> None:
    model = _model()
    factors = LayerCurvature(structure="kronecker").fit(_calibration(model))
    hook = KFAC.apply(model[3], "weight", amount=0.5, curvature=factors)
    assert int(model[3].weight_mask.sum()) == 24
    assert vars(hook)["curvature"] is None
    assert vars(hook)["calibration"] is None


def test_refuses_impossible_options_and_layers() -> None:
    for options, word in (
        ({"damping": 0.0}, "damping"),
        ({"update": "joint"}, "update"),
        ({"scope": "network"}, "scope"),
    ):
        with pytest.raises(ArgumentError, match=word):
            KFAC(0.5, **options)
    with pytest.raises(ArgumentTypeError, match="KFAC to be a fitted LayerCurvature, got str"):
        KFAC(0.5, curvature="kron")  # type: ignore[arg-type]


def test_layers_without_factors_are_pruned_by_their_diagonal() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)]
    model: Any = nn.Sequential(*layers).double()
    calibration = _calibration(model)
    decision = KFAC(0.5, calibration=calibration, damping=1e-3).decide(calibration.space)
    assert decision.scores is not None
    assert decision.updates is not None
    weight = model[0].weight.detach()
    diagonal = LayerCurvature().fit(calibration).diagonal()["0.weight"]
    torch.testing.assert_close(decision.scores["0.weight"], weight**2 * (diagonal + 1e-3) / 2)
    kept = decision.masks["0.weight"]
    torch.testing.assert_close(decision.updates["0.weight"], weight * kept)
    assert (
        decision.updates["3.weight"][decision.masks["3.weight"]]
        .ne(model[3].weight[decision.masks["3.weight"]])
        .any()
    )


class _Counted(Calibration):
    """Counts held-out losses, and notes the weights that they were measured at."""

    def held_out_loss(self, weights: Any = None) -> Any:
        found = super().held_out_loss(weights)
        self.losses = [*getattr(self, "losses", []), found.value]
        return found


def _counted(model: nn.Module, **options: Any) -> _Counted:
    return _Counted(model, _data(), cross_entropy, num_samples=24, **options)


@pytest.mark.parametrize("update", ["none", "single"])
def test_auto_damping_is_the_best_that_was_tried(update: Any) -> None:
    calibration = _counted(_model())
    space = calibration.space
    decision = KFAC(0.6, calibration=calibration, update=update).decide(space)
    assert decision.info["loss"] == min(calibration.losses)
    assert decision.info["in_sample"] is False
    assert decision.info["dampings_tried"] == len(calibration.losses)
    damping = decision.info["damping"]
    fixed = KFAC(0.6, calibration=calibration, update=update, damping=damping).decide(space)
    torch.testing.assert_close(fixed.masks, decision.masks)
    torch.testing.assert_close(fixed.updates, decision.updates)


@given(power=st.integers(-8, 8))
def test_auto_damping_follows_the_scale_of_the_loss(power: int) -> None:
    """A loss times ``c`` has a curvature times ``c²``, and is pruned alike."""
    scale = 4.0**power

    def scaled(output: Tensor, target: Tensor) -> Tensor:
        return scale * cross_entropy(output, target)

    calibration = _calibration(_model())
    expected = KFAC(0.6, calibration=calibration).decide(calibration.space)
    calibration = calibration.with_loss(scaled)
    found = KFAC(0.6, calibration=calibration).decide(calibration.space)
    assert found.info["relative_damping"] == pytest.approx(expected.info["relative_damping"])
    torch.testing.assert_close(found.masks, expected.masks)


def test_without_data_the_damping_is_the_mean_curvature() -> None:
    model = _model()
    curvature = LayerCurvature(structure="kronecker").fit(_calibration(model))
    curvature.calibration = None
    space = ParameterSpace(model)
    decision = KFAC(0.5, curvature=curvature).decide(space)
    assert decision.info["damping"] == curvature.mean()
    assert "loss" not in decision.info


def test_refuses_data_that_decides_nothing() -> None:
    flat = _calibration(_model()).with_loss(lambda output, target: 0.0 * output.sum())
    with pytest.raises(CalibrationError, match="zeros alone"):
        KFAC(0.5, calibration=flat).decide(flat.space)
    calibration = _calibration(_model())
    curvature = LayerCurvature(structure="kronecker").fit(calibration)
    curvature.sums = {key: 0 * value for key, value in curvature.sums.items()}
    with pytest.raises(CalibrationError, match="gradients of zero"):
        KFAC(0.5, curvature=curvature).decide(calibration.space)


def test_refuses_held_out_losses_that_are_no_numbers() -> None:
    class Broken(Calibration):
        def held_out_loss(self, weights: Any = None) -> MeanLoss:
            return MeanLoss(float("nan"), 8, False)

    broken = Broken(_model(), _data(), cross_entropy)
    with pytest.raises(CalibrationError, match="Expected a finite held-out loss"):
        KFAC(0.5, calibration=broken).decide(broken.space)
    assert KFAC(0.5, calibration=broken, damping=0.1).decide(broken.space).updates


def test_is_not_magnitude_pruning_on_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(16, (16, 16))
    params = [(m, "weight") for m in model.modules() if type(m).__name__ == "Conv1D"]
    calibration = Calibration(model, [{"input_ids": ids, "labels": ids}], None, params)
    by_size = Magnitude(0.9).decide(calibration.space).masks
    masks = KFAC(0.9, calibration=calibration, update="none").decide(calibration.space).masks
    shared = sum(int((masks[name] & by_size[name]).sum()) for name in masks)
    assert shared < 0.9 * sum(int(mask.sum()) for mask in masks.values())


def test_reproduces_the_published_accuracy(shared_data: Path) -> None:
    train_x, train_y, test_x, test_y = load_mnist(shared_data)
    loader = shuffled_batches(train_x, train_y)
    found = []
    for seed in range(6):
        model = load_mlpnet(shared_data)
        calibration = Calibration(model, loader, cross_entropy, num_samples=100, seed=seed)
        prune_global(None, KFAC, amount=0.95, calibration=calibration, damping=1e-5, pi=False)
        found.append(accuracy(model, test_x, test_y))
    assert 80.5 < sum(found) / 6 < 82.5


class _Fetches(TorchDispatchMode):
    """Counts how often a number is fetched from the device."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += "local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["kfac", "diagonal-fisher"])
def test_the_device_is_asked_as_often_for_many_layers_as_for_few(method: str) -> None:
    counts = []
    for depth in (2, 12):
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]
        data = [(torch.randn(64, 4), torch.randint(4, (64,)))]
        calibration = Calibration(nn.Sequential(*layers), data, cross_entropy, num_samples=32)
        options: dict[str, Any] = {"damping": 0.01} if method == "kfac" else {}
        with _Fetches() as fetches:
            prune = registered_methods()[method].method
            prune(0.5, calibration=calibration, **options).decide(calibration.space)  # type: ignore
        counts.append(fetches.count)
    assert counts[0] == counts[1]
    assert counts[0] < 50
