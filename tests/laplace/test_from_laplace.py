from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.laplace import JointPosterior, Posterior, posterior_from_laplace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of that package and of what it imports
    laplace = pytest.importorskip("laplace")

pytestmark = pytest.mark.filterwarnings("ignore")

PARAMETERS = 5 * 4 + 4 + 4 * 3 + 3
PRECISIONS = {"scalar": 1, "layerwise": 4, "diag": PARAMETERS}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _loader(likelihood: str) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (30,), generator=generator)
    if likelihood == "regression":
        y = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=10)


def _fitted(likelihood: str, structure: str, precision: Tensor, **options: Any) -> Any:
    if likelihood == "regression":
        options = {"sigma_noise": 0.7, **options}
    model = options.pop("model", None) or _model()
    found = laplace.Laplace(
        model,
        likelihood,
        hessian_structure=structure,
        prior_precision=precision,
        temperature=0.5,
        **{"subset_of_weights": "all", **options},
    )
    found.fit(_loader(likelihood))
    return found


def _diagonals(fitted: Any) -> tuple[Tensor, Tensor]:
    """Diagonals of precision and covariance in laplace-torch's own words."""
    precision = fitted.posterior_precision
    if not isinstance(precision, Tensor):
        return precision.diag(), precision.diag(exponent=-1)
    if precision.ndim == 1:
        return precision, fitted.posterior_variance
    return precision.diagonal(), fitted.posterior_covariance.diagonal()


def _flat(posterior: Posterior, what: str) -> Tensor:
    return torch.cat([getattr(posterior, what)(name).flatten() for name in posterior.names])


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("prior", PRECISIONS)
def test_has_its_evidence_precisions_and_variances(
    likelihood: str, structure: str, prior: str
) -> None:
    if structure == "kron" and prior == "diag":
        pytest.skip("laplace-torch has no such prior")
    generator = torch.Generator().manual_seed(2)
    precision = torch.rand(PRECISIONS[prior], generator=generator).double() + 0.5
    fitted = _fitted(likelihood, structure, precision, prior_mean=0.1)
    posterior = posterior_from_laplace(fitted)
    # Its full GGN of a classification is symmetric to float32 only.
    precise: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-6} if structure == "full" else {"rtol": 1e-10, "atol": 1e-9}
    )
    evidence = torch.tensor(posterior.log_marginal_likelihood(), dtype=torch.float64)
    torch.testing.assert_close(evidence, fitted.log_marginal_likelihood(), **precise)
    expected = _diagonals(fitted)
    torch.testing.assert_close(_flat(posterior, "precision"), expected[0], **precise)
    torch.testing.assert_close(_flat(posterior, "variance"), expected[1], **precise)
    assert posterior.prior.structure.value == prior
    assert posterior.names == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_takes_the_last_layer(structure: str) -> None:
    fitted = _fitted("classification", structure, torch.tensor(3.0), subset_of_weights="last_layer")
    posterior = posterior_from_laplace(fitted)
    assert posterior.names == ["2.weight", "2.bias"]
    assert posterior.log_marginal_likelihood() == pytest.approx(
        float(fitted.log_marginal_likelihood()), abs=1e-6
    )
    torch.testing.assert_close(
        _flat(posterior, "precision"), _diagonals(fitted)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("prior", [1, 4])
def test_takes_a_subnetwork(structure: str, prior: int) -> None:
    chosen = torch.tensor([30, 1, 7, 22])
    fitted = _fitted(
        "classification",
        structure,
        torch.rand(prior, generator=torch.Generator().manual_seed(3)).double() + 0.5,
        subset_of_weights="subnetwork",
        subnetwork_indices=chosen,
    )
    posterior = posterior_from_laplace(fitted)
    assert posterior.log_marginal_likelihood() == pytest.approx(
        float(fitted.log_marginal_likelihood()), abs=1e-6
    )
    precision, variance = _flat(posterior, "precision"), _flat(posterior, "variance")
    expected = _diagonals(fitted)
    torch.testing.assert_close(precision[chosen], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance[chosen], expected[1], rtol=1e-5, atol=1e-6)
    others = torch.ones(PARAMETERS).bool()
    others[chosen] = False
    assert torch.isinf(precision[others]).all()
    assert not variance[others].any()


def test_takes_the_low_rank_form() -> None:
    # Its only backend is a package that is rarely there, so this is what `fit` leaves behind.
    generator = torch.Generator().manual_seed(4)
    vectors, _ = torch.linalg.qr(torch.randn(PARAMETERS, 3, generator=generator).double())
    values = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    model = _model()
    mean = nn.utils.parameters_to_vector(model.parameters()).detach()
    fitted = SimpleNamespace(
        model=model,
        mean=mean,
        H=(vectors, values),
        prior_precision=torch.tensor([2.0]).double(),
        prior_mean=torch.tensor(0.0),
        sigma_noise=torch.tensor(1.0),
        temperature=1.0,
        likelihood="classification",
        loss=torch.tensor(3.0),
        n_data=30,
        n_outputs=3,
    )
    posterior = posterior_from_laplace(fitted)
    assert isinstance(posterior, JointPosterior)
    dense = vectors * values @ vectors.mT + 2 * torch.eye(PARAMETERS)
    torch.testing.assert_close(_flat(posterior, "precision"), dense.diagonal())
    torch.testing.assert_close(_flat(posterior, "variance"), torch.linalg.inv(dense).diagonal())
    ratio = torch.logdet(dense) - PARAMETERS * torch.tensor(2.0).double().log()
    expected = -3.0 - float(ratio + 2 * mean.square().sum()) / 2
    assert posterior.log_marginal_likelihood() == pytest.approx(expected)


def test_its_kronecker_factors_take_other_priors_too() -> None:
    fitted = _fitted("classification", "kron", torch.tensor(1.0))
    posterior = posterior_from_laplace(fitted)
    found = [
        posterior.with_best_prior(structure).log_marginal_likelihood()
        for structure in ("scalar", "layerwise", "unitwise")
    ]
    assert found == sorted(found)
    fitted.optimize_prior_precision(n_steps=400, lr=0.1, prior_structure="layerwise")
    assert found[1] == pytest.approx(float(fitted.log_marginal_likelihood()), abs=1e-2)


def test_names_of_pruned_models_are_those_of_dense_ones() -> None:
    model = _model()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    fitted = SimpleNamespace(
        model=model,
        mean=nn.utils.parameters_to_vector(model.parameters()).detach(),
        H=torch.ones(PARAMETERS),
        prior_precision=torch.ones(1),
        prior_mean=torch.tensor(0.0),
        sigma_noise=torch.tensor(1.0),
        temperature=1.0,
        likelihood="classification",
        loss=torch.tensor(3.0),
        n_data=30,
        n_outputs=3,
    )
    assert "0.weight" in posterior_from_laplace(fitted).names


def test_refuses_what_is_no_fitted_posterior() -> None:
    unfitted = laplace.Laplace(_model(), "classification", hessian_structure="diag")
    with pytest.raises(ArgumentError, match="before `fit`"):
        posterior_from_laplace(unfitted)
    with pytest.raises(ArgumentTypeError, match="without `mean`"):
        posterior_from_laplace(nn.Linear(2, 2))
