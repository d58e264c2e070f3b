from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from torchprune_bayes import Calibration, Magnitude, prunable_parameters, prune_global
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.laplace import JointPosterior, Posterior, PriorPrecision, fit_posterior
from torchprune_bayes.methods import OPD


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def _calibration(model: nn.Module, **options: Any) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (24,), generator=generator)
    return Calibration(model, [(x, y)], cross_entropy, **options)


def _kept(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("mode", ["opd", "obd", "posterior"])
@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("prior", ["scalar", "unitwise", "diag"])
def test_prunes_what_scores_lowest_in_the_posterior(mode: str, structure: Any, prior: str) -> None:
    calibration = _calibration(_model())
    method = OPD(
        0.6, calibration=calibration, mode=mode, prior=prior, structure=structure, kind="ggn"
    )
    decision = method.decide(calibration.space)
    posterior = fit_posterior(calibration, structure=structure, kind="ggn").with_best_prior(prior)
    weights = calibration.space.values()
    joined = []
    for name, weight in weights.items():
        precision = posterior.curvature(name) + posterior.prior.values(name)
        values = {
            "opd": precision * weight.square(),
            "obd": posterior.curvature(name) * weight.square(),
            "posterior": precision,
        }[mode]
        joined.append(values.flatten())
        assert decision.scores is not None
        torch.testing.assert_close(decision.scores[name], values)
    threshold = torch.cat(joined).sort().values[round(0.6 * 72)]
    mask = torch.cat([m.flatten() for m in decision.masks.values()])
    assert torch.equal(mask, torch.cat(joined) >= threshold)
    assert decision.updates is None


def test_with_a_strong_scalar_prior_ranks_by_magnitude() -> None:
    calibration = _calibration(_model())
    shapes = {name: value.shape for name, value in calibration.space.values().items()}
    strong = PriorPrecision.constant(shapes, "scalar", 1e8)
    posterior = fit_posterior(calibration, strong)
    masks = prune_global(None, OPD, amount=0.5, calibration=calibration, posterior=posterior).masks
    expected = Magnitude(0.5).decide(_calibration(_model()).space).masks
    torch.testing.assert_close(masks, expected)


def test_with_the_best_prior_on_each_weight_ranks_as_obd() -> None:
    calibration = _calibration(_model())
    found = [
        OPD(0.7, calibration=calibration, prior="diag", mode=mode).decide(calibration.space).masks
        for mode in ("opd", "obd")
    ]
    torch.testing.assert_close(found[0], found[1])


def test_a_posterior_takes_the_place_of_a_pass_and_of_a_calibration() -> None:
    model, other, third = _model(), _model(), _model()
    calibration = _calibration(model)
    posterior = fit_posterior(calibration).with_best_prior("unitwise")
    first = prune_global(None, OPD, amount=0.5, calibration=calibration, posterior=posterior)
    second = prune_global(None, OPD, amount=0.5, posterior=posterior, model=other)
    torch.testing.assert_close(first.masks, second.masks)
    pairs = [(third[0], "weight"), (third[2], "weight")]
    prune.global_unstructured(pairs, OPD, amount=0.5, posterior=posterior, model=third)
    assert torch.equal(third[0].weight_mask.bool(), first.masks["0.weight"])
    # What is pruned stays so, with the same posterior.
    again = prune_global(None, OPD, amount=0.5, posterior=posterior, model=other).masks
    assert _kept(again) == 18
    assert not any((again[name] & ~mask).any() for name, mask in first.masks.items())


def test_prunes_one_tensor_by_the_posterior_of_all() -> None:
    model = _model()
    posterior = fit_posterior(_calibration(model))
    hook: Any = OPD.apply(model[2], "weight", amount=0.5, posterior=posterior, model=model)
    assert int(model[2].weight_mask.sum()) == 12
    assert not hasattr(model[0], "weight_mask")
    held = [v for v in vars(hook).values() if isinstance(v, (Tensor, nn.Module, Posterior))]
    assert not held


def test_the_posterior_may_have_more_tensors_than_are_pruned() -> None:
    model = _model()
    everything = _calibration(model, params=trainable_parameters(model))
    posterior = fit_posterior(everything)
    assert "0.bias" in posterior.names
    masks = prune_global(None, OPD, amount=0.5, posterior=posterior, model=model).masks
    assert list(masks) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("method", ["opd", "laplace-evidence"])
@pytest.mark.parametrize("known", [True, False])
def test_the_posterior_of_all_layers_prunes_some(method: str, known: bool) -> None:
    whole, model = _model(), _model()
    posterior = fit_posterior(_calibration(whole))
    options: dict[str, Any] = {"posterior": posterior} | ({"model": model} if known else {})
    options |= {"amount": 0.5}
    some = prunable_parameters(model, exclude=["2"])
    decision = prune_global(some, method, **options)
    assert list(decision.masks) == ["0.weight"]
    assert int(model[0].weight_mask.sum()) * 2 == model[0].weight.numel()
    assert not hasattr(model[2], "weight_mask")


def test_tensors_that_are_not_in_the_posterior_are_refused() -> None:
    model = _model()
    posterior = fit_posterior(_calibration(model, params=[(model[0], "weight")]))
    with pytest.raises(AlignmentError, match=r"got `2\.weight`: fit"):
        prune_global(prunable_parameters(model), OPD, amount=0.5, posterior=posterior)
    by_hand = [(model[0], "weight")]
    with pytest.raises(AlignmentError, match="pass `model=`"):
        prune_global(by_hand, OPD, amount=0.5, posterior=posterior)
    prune_global(by_hand, OPD, amount=0.5, posterior=posterior, model=model)


def test_weights_that_a_posterior_holds_fixed_go_last() -> None:
    layer = nn.Linear(4, 1, bias=False)
    nn.init.constant_(layer.weight, 1e-3)
    entries = {"weight": torch.tensor([1, 3])}
    posterior = JointPosterior(
        {"weight": layer.weight}, torch.eye(2), torch.tensor([1e6, 1e7]), entries
    )
    masks = prune_global(None, OPD, amount=3, posterior=posterior, model=layer).masks
    assert masks["weight"].tolist() == [[False, False, True, False]]


def test_smoothing_is_another_ranking() -> None:
    calibration = _calibration(_model())
    shapes = {name: value.shape for name, value in calibration.space.values().items()}
    prior = PriorPrecision.constant(shapes, "diag")
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: [(3 * torch.randn(f.shape, generator=generator)).exp() for f in found]
        for name, found in prior.factors.items()
    }
    posterior = fit_posterior(calibration, prior.with_factors(factors), structure="kronecker")
    scores = [
        OPD(0.5, calibration=calibration, posterior=posterior, smoothed=smoothed)
        .decide(calibration.space)
        .scores
        for smoothed in (False, True)
    ]
    exact, smoothed = (posterior.scores(smoothed=s) for s in (False, True))
    for found, expected in zip(scores, (exact, smoothed), strict=True):
        assert found is not None
        torch.testing.assert_close(found["0.weight"], expected["0.weight"])
    assert not torch.allclose(exact["0.weight"], smoothed["0.weight"])


def test_patterns_run_along_the_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(), nn.Linear(8, 4)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 2, 2, generator=generator, dtype=torch.float64)
    calibration = Calibration(model, [(x, torch.arange(6) % 4)], cross_entropy)
    masks = prune_global(None, OPD, amount=None, calibration=calibration, pattern="2:4").masks
    assert (masks["0.weight"].sum(1) == 2).all()
    assert (masks["2.weight"].unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_patterns_run_along_the_first_dimension_of_a_hugging_face_conv1d() -> None:
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D(3, 8)
    posterior = Posterior({"weight": conv.weight}, {"weight": torch.rand(8, 3)})
    masks = prune_global(
        None, OPD, amount=0.5, posterior=posterior, model=conv, pattern="2:4"
    ).masks
    assert (masks["weight"].unflatten(0, (-1, 4)).sum(1) == 2).all()


def test_refuses_what_does_not_fit() -> None:
    model = _model()
    posterior = fit_posterior(_calibration(model))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mode": "saliency"}, "mode"),
        ({"prior": "blockwise"}, "prior structure"),
        ({"structure": "full"}, "structure"),
        ({"kind": "exact"}, "kind"),
        ({"pattern": "4:2"}, "pattern"),
        ({"scope": "network"}, "scope"),
    ]
    for options, word in wrong:
        with pytest.raises(ArgumentError, match=word):
            OPD(0.5, **options)
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, OPD, amount=0.5)
    with pytest.raises(ArgumentError, match=r"amount=0\.5"):
        prune_global(None, OPD, amount=0.7, posterior=posterior, model=model, pattern="1:2")
    with pytest.raises(ArgumentTypeError, match="posterior="):
        OPD(0.5, model=model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(AlignmentError, match="at others: fit it again"):
        prune_global(None, OPD, amount=0.5, posterior=posterior, model=model)
    with pytest.raises(AlignmentError, match="weights of the model"):
        OPD(0.5, posterior=posterior, model=nn.Linear(2, 2))
    assert not hasattr(model[0], "weight_mask")
