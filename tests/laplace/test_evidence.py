from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.references import laplace as reference
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.laplace import Posterior

NAMES = ["scalar", "layerwise", "unitwise", "diag"]
Curvature = dict[str, Tensor | tuple[Tensor, Tensor]]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _curvature(kind: str) -> Curvature:
    roots = {name: (_random(n, n + 1, seed=n), _random(m, m + 1, seed=m)) for name, n, m in SIZES}
    factors = {name: (r @ r.mT, c @ c.mT) for name, (r, c) in roots.items()}
    if kind == "kron":
        return dict(factors)
    shapes = {name: (n, m) if m > 1 else (n,) for name, n, m in SIZES}
    return {
        name: torch.outer(r.diagonal(), c.diagonal()).reshape(shapes[name])
        for name, (r, c) in factors.items()
    }


SIZES = [("weight", 4, 5), ("bias", 4, 1)]
MEAN = {"weight": 0.4 * _random(4, 5, seed=1), "bias": 0.4 * _random(4, seed=2)}


def _posterior(kind: str, **options: float) -> Posterior:
    return Posterior(MEAN, _curvature(kind), loss=12.0, **options)  # type: ignore[arg-type]


def _log_precisions(posterior: Posterior) -> list[Tensor]:
    return [f.double().log() for fs in posterior.prior.factors.values() for f in fs]


@pytest.mark.parametrize("kind", ["diag", "kron"])
@pytest.mark.parametrize("structure", NAMES)
def test_the_best_prior_is_stationary_for_an_autograd_evidence(kind: str, structure: str) -> None:
    if kind == "kron" and structure == "diag":
        pytest.skip("the evidence has a lower bound only")
    posterior = _posterior(kind, temperature=0.5)
    best = posterior.with_best_prior(structure, steps=2000, tolerance=1e-12)
    logs = {
        name: [f.double().log().requires_grad_() for f in factors]
        for name, factors in best.prior.factors.items()
    }
    if structure == "scalar":
        logs["bias"] = logs["weight"]
    values = {}
    for name, log in logs.items():
        product = log[0].exp()
        for other in log[1:]:
            product = product * other.exp()
        values[name] = product.squeeze(2).expand(4, 5) if name == "weight" else product.reshape(-1)
    values["bias"] = values["bias"].expand(4)
    evidence = reference.log_evidence(-24.0, _curvature(kind), values, MEAN, scale=2.0)
    leaves = {id(one): one for found in logs.values() for one in found}
    for leaf in leaves.values():
        (slope,) = torch.autograd.grad(evidence, leaf, retain_graph=True)
        # Precisions of single weights are held in float32.
        assert float(slope.abs().max()) < (1e-5 if structure == "diag" else 1e-7)
    assert best.log_marginal_likelihood() == pytest.approx(float(evidence.detach()), rel=1e-6)


@pytest.mark.parametrize("solver", ["fixed_point", "adam"])
@pytest.mark.parametrize("kind", ["diag", "kron"])
def test_richer_structures_have_higher_evidence(kind: str, solver: str) -> None:
    posterior = _posterior(kind)
    found = [
        posterior.with_best_prior(s, solver=solver, steps=200).log_marginal_likelihood()
        for s in NAMES
    ]
    if kind == "kron":
        found.pop()  # a lower bound
    assert found == sorted(found)
    assert found[0] > posterior.log_marginal_likelihood()


@pytest.mark.parametrize("kind", ["diag", "kron"])
@pytest.mark.parametrize("structure", NAMES)
def test_long_runs_of_adam_end_where_the_fixed_point_does(kind: str, structure: str) -> None:
    posterior = _posterior(kind)
    ours = posterior.with_best_prior(structure, steps=500)
    adam = posterior.with_best_prior(structure, solver="adam", steps=600, lr=0.05)
    assert adam.log_marginal_likelihood() == pytest.approx(ours.log_marginal_likelihood(), abs=2e-2)
    assert adam.log_marginal_likelihood() <= ours.log_marginal_likelihood() + 1e-4


@pytest.mark.parametrize("kind", ["diag", "kron"])
@pytest.mark.parametrize("structure", NAMES)
def test_updates_never_lower_the_evidence(kind: str, structure: str) -> None:
    posterior = _posterior(kind).with_best_prior(structure, steps=1)
    for _ in range(5):
        better = posterior.with_best_prior(steps=1)
        before = posterior.log_marginal_likelihood()
        assert better.log_marginal_likelihood() >= before - 1e-5 * abs(before)
        posterior = better


def test_a_hundred_steps_of_adam_stop_short_of_far_precisions() -> None:
    # A step moves a log precision by about the learning rate, so by 10 in all; these are at 14.
    tiny = {name: 1e-6 * value for name, value in MEAN.items()}
    posterior = Posterior(tiny, _curvature("diag"))
    ours, adam = (posterior.with_best_prior("diag", solver=s) for s in ("fixed_point", "adam"))
    missed = (
        (a - b).abs().min()
        for a, b in zip(_log_precisions(ours), _log_precisions(adam), strict=True)
    )
    assert min(map(float, missed)) > 1
    assert ours.log_marginal_likelihood() > adam.log_marginal_likelihood()


def test_temperature_and_noise_have_the_right_sign() -> None:
    base = _posterior("diag")
    # Cold: the data count more, so the likelihood is lower and the curvature larger.
    cold = _posterior("diag", temperature=0.5)
    assert cold.log_likelihood == 2 * base.log_likelihood == -24.0
    torch.testing.assert_close(cold.curvature("weight"), 2 * base.curvature("weight"))
    noisy = _posterior("diag", noise=2.0, observations=3)
    torch.testing.assert_close(noisy.curvature("weight"), base.curvature("weight") / 4)


def test_refuses_impossible_options() -> None:
    posterior = _posterior("diag")
    for options in ({"solver": "newton"}, {"lr": 0.0}, {"steps": 0}, {"tolerance": -1.0}):
        with pytest.raises(ArgumentError):
            posterior.with_best_prior(**options)
    with pytest.raises(ArgumentError, match="prior structure"):
        posterior.with_best_prior("blockwise")
