from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.references import laplace as reference
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.laplace import JointPosterior, Posterior, PriorPrecision

OUTPUTS, INPUTS, SAMPLES, NOISE = 3, 4, 20, 0.6


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = _random(SAMPLES, INPUTS, seed=0), _random(SAMPLES, OUTPUTS, seed=1)


def _prior(structure: str) -> PriorPrecision:
    prior = PriorPrecision.constant({"weight": (OUTPUTS, INPUTS)}, structure, 1.3)
    generator = torch.Generator().manual_seed(2)
    factors = [
        f * torch.rand(f.shape, generator=generator).add(0.5) for f in prior.factors["weight"]
    ]
    return prior.with_factors({"weight": factors})


def _regression(structure: str, form: str) -> tuple[Posterior, float]:
    """The posterior of a Bayesian linear regression at its mode, and the exact log evidence."""
    prior = _prior(structure)
    precision = prior.values("weight").double()
    mode = reference.regression_mode(X, Y, precision, NOISE)
    likelihood: dict[str, Any] = {
        "loss": float((Y - X @ mode.mT).square().sum()) / 2,
        "noise": NOISE,
        "observations": Y.numel(),
    }
    exact = reference.regression_log_evidence(X, Y, precision, NOISE)
    factors = torch.eye(OUTPUTS, dtype=torch.float64), X.mT @ X
    if form == "kron":
        return Posterior({"weight": mode}, {"weight": factors}, prior, **likelihood), exact
    values, vectors = torch.linalg.eigh(reference.dense_curvature(factors))
    return JointPosterior({"weight": mode}, vectors, values, None, prior, **likelihood), exact


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "unitwise", "diag"])
def test_a_linear_regression_has_the_exact_evidence_with_the_full_hessian(structure: str) -> None:
    posterior, exact = _regression(structure, "joint")
    assert posterior.log_marginal_likelihood() == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "unitwise"])
def test_a_linear_regression_has_the_exact_evidence_with_kronecker_factors(structure: str) -> None:
    posterior, exact = _regression(structure, "kron")
    assert posterior.is_exact
    assert posterior.log_marginal_likelihood() == pytest.approx(exact, abs=1e-10)


def test_a_linear_regression_with_a_prior_on_each_weight_is_bounded() -> None:
    posterior, exact = _regression("diag", "kron")
    assert not posterior.is_exact
    assert exact - 5 < posterior.log_marginal_likelihood() < exact


def test_a_linear_regression_with_the_diagonal_has_its_own_value() -> None:
    prior = _prior("diag")
    precision = prior.values("weight").double()
    mode = reference.regression_mode(X, Y, precision, NOISE)
    diagonal = X.square().sum(0).expand(OUTPUTS, -1)
    loss = float((Y - X @ mode.mT).square().sum()) / 2
    posterior = Posterior(
        {"weight": mode}, {"weight": diagonal}, prior, loss=loss, noise=NOISE, observations=60
    )
    fit = -loss / NOISE**2 - 60 * float(torch.tensor(NOISE * (2 * torch.pi) ** 0.5).log())
    terms = (1 + diagonal / NOISE**2 / precision).log() + precision * mode.square()
    expected = fit - float(terms.sum()) / 2
    assert posterior.log_marginal_likelihood() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("structure", ["scalar", "unitwise", "diag"])
def test_variances_are_those_of_the_exact_posterior(structure: str) -> None:
    posterior, _ = _regression(structure, "joint")
    precision = posterior.prior.values("weight").double()
    expected = [
        torch.linalg.inv(X.mT @ X / NOISE**2 + torch.diag(own)).diagonal() for own in precision
    ]
    torch.testing.assert_close(posterior.variance("weight"), torch.stack(expected))
    if structure != "diag":
        kron, _ = _regression(structure, "kron")
        torch.testing.assert_close(kron.variance("weight"), torch.stack(expected))


def test_posterior_damage_is_twice_the_fall_of_the_log_joint() -> None:
    # One output and orthogonal inputs: P is diagonal and the log joint quadratic.
    q, _ = torch.linalg.qr(X)
    x, y = q * torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64), Y[:, :1]
    precision = torch.rand(1, INPUTS, generator=torch.Generator().manual_seed(5)).double() + 0.5
    mode = reference.regression_mode(x, y, precision, NOISE)
    prior = PriorPrecision.constant({"weight": (1, INPUTS)}, "diag")
    prior = prior.with_factors({"weight": [precision.unsqueeze(2)]})
    precision = prior.values("weight").double()  # as it is held, in float32
    mode = reference.regression_mode(x, y, precision, NOISE)
    diagonal = x.square().sum(0, keepdim=True)
    posterior = Posterior({"weight": mode}, {"weight": diagonal}, prior, noise=NOISE)

    def log_joint(weight: Tensor) -> Tensor:
        fit = (y - x @ weight.mT).square().sum() / NOISE**2
        return -(fit + (precision * weight.square()).sum()) / 2

    for index in range(INPUTS):
        without = mode.clone()
        without[0, index] = 0.0
        damage = 2 * (log_joint(mode) - log_joint(without))
        torch.testing.assert_close(posterior.scores()["weight"][0, index], damage)


def test_scores_of_each_mode() -> None:
    mean = {"weight": torch.tensor([[1.0, -2.0]])}
    posterior = Posterior(
        mean,
        {"weight": torch.tensor([[3.0, 5.0]])},
        PriorPrecision.constant({"weight": (1, 2)}, "scalar", 2.0),
        temperature=0.5,
    )
    expected = {"opd": [8.0, 48.0], "obd": [6.0, 40.0], "posterior": [8.0, 12.0]}
    for mode, values in expected.items():
        assert posterior.scores(mode)["weight"].tolist() == [values]
    with pytest.raises(ArgumentError, match="mode"):
        posterior.scores("magnitude")


def test_golden_values_of_smoothing() -> None:
    # H = [[2, 1], [1, 2]] for a bias has the eigenvectors (1, ±1)/√2: all weights are one half.
    prior = PriorPrecision.constant({"weight": (2, 2)}, "diag")
    prior = prior.with_factors({"weight": [torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]])]})
    pair = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    posterior = Posterior({"weight": torch.ones(2, 2)}, {"weight": pair}, prior)
    torch.testing.assert_close(
        posterior.precision("weight"), torch.tensor([[5.0, 6.0], [7.0, 10.0]]).double()
    )
    smoothed = posterior.precision("weight", smoothed=True)
    torch.testing.assert_close(smoothed, torch.full((2, 2), 4.0 + 3.0).double())


def test_entries_held_fixed_go_last() -> None:
    mean = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0, 3.0])}
    entries = {"a": torch.tensor([1]), "b": torch.tensor([], dtype=torch.long)}
    posterior = JointPosterior(mean, torch.ones(1, 1), torch.tensor([3.0]), entries)
    assert posterior.precision("a").tolist() == [torch.inf, 4.0]
    assert posterior.variance("a").tolist() == [0.0, pytest.approx(0.25)]
    assert posterior.scores()["a"].tolist() == [torch.inf, 16.0]
    assert posterior.scores()["b"].tolist() == [0.0, torch.inf]


def test_a_joint_curvature_has_a_best_scalar_prior() -> None:
    posterior, _ = _regression("scalar", "joint")
    kron, _ = _regression("scalar", "kron")
    ours, theirs = (p.with_best_prior("scalar") for p in (posterior, kron))
    assert ours.log_marginal_likelihood() == pytest.approx(theirs.log_marginal_likelihood())
    assert ours.effective_parameters() == pytest.approx(theirs.effective_parameters())
    with pytest.raises(ArgumentError, match="'scalar'"):
        posterior.with_best_prior("diag")


def test_the_prior_may_have_a_mean() -> None:
    weight = torch.full((1, 2), 3.0)
    shifted = Posterior({"w": weight}, {"w": torch.ones(1, 2)}, prior_mean=3.0)
    at_zero = Posterior({"w": torch.zeros(1, 2)}, {"w": torch.ones(1, 2)})
    assert shifted.log_marginal_likelihood() == at_zero.log_marginal_likelihood()
    assert (shifted.scores()["w"] == 18).all()


def test_refuses_what_does_not_fit() -> None:
    mean = {"weight": torch.ones(2, 3)}
    with pytest.raises(AlignmentError, match=r"curvature of shape \(2, 3\)"):
        Posterior(mean, {"weight": torch.ones(3, 2)})
    with pytest.raises(AlignmentError, match="Kronecker factors that fit"):
        Posterior(mean, {"weight": (torch.eye(3), torch.eye(2))})
    with pytest.raises(AlignmentError, match="curvature for each of weight"):
        Posterior(mean, {"other": torch.ones(2, 3)})
    with pytest.raises(AlignmentError, match="prior of the posterior's tensors"):
        Posterior(mean, {"weight": torch.ones(2, 3)}, PriorPrecision.constant({"w": (2, 3)}))
    with pytest.raises(ArgumentError, match="temperature"):
        Posterior(mean, {"weight": torch.ones(2, 3)}, temperature=0.0)
    with pytest.raises(AlignmentError, match="6 entries"):
        JointPosterior(mean, torch.ones(5, 1), torch.ones(1))
