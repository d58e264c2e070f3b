from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.references import laplace as reference
from torchprune_bayes import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.laplace import PriorPrecision, fit_posterior


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = _random(24, 5, seed=0)
LABELS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))
TARGETS = _random(24, 3, seed=2)


def _classifier() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _calibration(model: nn.Module, **options: Any) -> Calibration:
    batches = list(zip(X.split(10), LABELS.split(10), strict=True))
    return Calibration(model, batches, cross_entropy, **options)


def test_sums_loss_and_curvature_over_the_data() -> None:
    model = _classifier()
    posterior = fit_posterior(_calibration(model), kind="ggn", temperature=0.5)
    assert posterior.log_likelihood == pytest.approx(
        -2 * float(cross_entropy(model(X), LABELS, reduction="sum").detach())
    )
    # The last layer's GGN of one class: Σ_n p(1 − p) a².
    hidden, probabilities = model[1](model[0](X)), model(X).softmax(-1)
    variances = probabilities * (1 - probabilities)
    expected = 2 * torch.einsum("nc,ni->ci", variances, hidden.square())
    torch.testing.assert_close(posterior.curvature("2.weight"), expected.detach())


def test_subsets_of_the_data_are_scaled_to_all() -> None:
    calibration = _calibration(_classifier(), num_samples=12)
    small = fit_posterior(calibration, kind="ggn")
    large = fit_posterior(calibration, kind="ggn", num_data=120)
    assert large.loss == pytest.approx(10 * small.loss)
    torch.testing.assert_close(large.curvature("0.weight"), 10 * small.curvature("0.weight"))


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_the_evidence_of_a_linear_regression_is_exact(structure: str) -> None:
    noise, precision = 0.8, torch.full((3, 5), 1.7, dtype=torch.float64)
    model = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(reference.regression_mode(X, TARGETS, precision, noise))
    data = list(zip(X.split(7), TARGETS.split(7), strict=True))
    prior = PriorPrecision.constant({"weight": (3, 5)}, "scalar", 1.7)
    posterior = fit_posterior(
        Calibration(model, data, mse_loss),
        prior,
        noise=noise,
        loss_scale=3 / 2,  # the mean over three outputs as half a sum
        outputs=3,
        kind="ggn",
        structure=structure,
    )
    exact = reference.regression_log_evidence(X, TARGETS, precision, noise)
    if structure == "kronecker":
        assert posterior.log_marginal_likelihood() == pytest.approx(exact, abs=1e-10)
    else:
        expected = X.square().sum(0).expand(3, 5) / noise**2
        torch.testing.assert_close(posterior.curvature("weight"), expected)
        assert posterior.log_marginal_likelihood() < exact


def test_what_is_pruned_is_left_out() -> None:
    calibration = _calibration(_classifier())
    mask = {"0.weight": _random(4, 5, seed=3) > 0, "2.weight": torch.ones(3, 4).bool()}
    posterior = fit_posterior(calibration, kind="empirical", masks=mask)
    gone = ~mask["0.weight"]
    assert not posterior.mean["0.weight"][gone].any()
    assert not posterior.curvature("0.weight")[gone].any()
    assert (posterior.curvature("0.weight")[~gone] > 0).all()


def test_takes_kronecker_factors_where_there_are_any() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    pairs = [(module, name) for module in model for name, _ in module.named_parameters()]
    calibration = _calibration(model, params=pairs)
    posterior = fit_posterior(calibration, structure="kronecker", kind="ggn").with_best_prior(
        "unitwise"
    )
    assert posterior.is_exact
    assert set(posterior.names) == {name for name, _ in model.named_parameters()}


def test_the_model_stays_as_it_was() -> None:
    model = _classifier().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fit_posterior(_calibration(model))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_refuses_impossible_options() -> None:
    calibration = _calibration(_classifier())
    for options, word in (
        ({"kind": "hessian"}, "kind"),
        ({"structure": "full"}, "structure"),
        ({"num_data": 0}, "num_data"),
        ({"temperature": -1.0}, "temperature"),
        ({"noise": 1.0, "kind": "empirical"}, "not the Hessian"),
        ({"noise": 0.0}, "noise"),
        ({"all_reduce": True}, "num_data"),
        ({"all_reduce": True, "num_data": 24}, "process group"),
    ):
        with pytest.raises(ArgumentError, match=word):
            fit_posterior(calibration, **options)
