"""Pruning by the evidence of a Laplace posterior."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.cases import calibration_of, mlp, pairs
from torchprune_bayes import prune_global
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.methods import LaplaceEvidence


def fitted(model: nn.Module, curvature: float = 3.0) -> Posterior:
    means = {f"{i}.weight": model[i].weight for i in (0, 2)}  # type: ignore[index]
    generator = torch.Generator().manual_seed(5)
    found = {
        name: curvature * torch.rand(mean.shape, generator=generator)
        for name, mean in means.items()
    }
    return Posterior(means, found)


def expected_changes(posterior: Posterior) -> dict[str, Tensor]:
    """−½ log(s² δ) − m²/(2 s²), from the posterior's own numbers."""
    return {
        name: -0.5 * (posterior.variance(name) * posterior.prior.values(name)).log()
        - mean.double().square() / (2 * posterior.variance(name))
        for name, mean in posterior.mean.items()
    }


def test_without_an_amount_what_raises_the_evidence_goes_and_no_more():
    model = mlp()
    posterior = fitted(model)
    decision = prune_global(None, LaplaceEvidence, amount=None, posterior=posterior, model=model)
    changes = expected_changes(posterior)
    for name, mask in decision.masks.items():
        assert torch.equal(mask, changes[name] < 0)
    assert 0 < sum(int(mask.sum()) for mask in decision.masks.values()) < 45
    gain = sum(float(changes[name][~mask].sum()) for name, mask in decision.masks.items())
    assert decision.info["delta_f"] == pytest.approx(gain)
    assert gain > 0
    assert torch.equal(model[0].weight_mask.bool(), decision.masks["0.weight"])


def test_again_nothing_more_goes():
    model = mlp()
    posterior = fitted(model)
    first = prune_global(None, LaplaceEvidence, amount=None, posterior=posterior, model=model)
    again = prune_global(None, LaplaceEvidence, amount=None, posterior=posterior, model=model)
    assert all(torch.equal(first.masks[name], again.masks[name]) for name in first.masks)
    assert again.info["delta_f"] == 0


def test_tau_puts_up_with_evidence_against_it():
    counts = []
    for tau in (-2.0, 0.0, 0.5, 100.0):
        model = mlp()
        options = {"posterior": fitted(model), "model": model, "tau": tau}
        masks = prune_global(None, LaplaceEvidence, amount=None, **options).masks
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert counts[0] > counts[1]


def test_an_amount_ranks_by_the_evidence():
    model = mlp()
    posterior = fitted(model)
    masks = prune_global(None, LaplaceEvidence, amount=10, posterior=posterior, model=model).masks
    changes = torch.cat([value.flatten() for value in expected_changes(posterior).values()])
    gone = ~torch.cat([mask.flatten() for mask in masks.values()])
    assert set(gone.nonzero().flatten().tolist()) == set(changes.topk(10).indices.tolist())


def test_a_posterior_is_fitted_where_none_is_given():
    model = mlp()
    decision = prune_global(
        None, LaplaceEvidence, amount=None, calibration=calibration_of(model), prior="scalar"
    )
    assert 0 < sum(int(mask.sum()) for mask in decision.masks.values()) < 45
    assert decision.info["delta_f"] > 0


def test_more_data_keep_more():
    left = []
    for num_data in (16, 16_000):
        model = mlp()
        masks = prune_global(
            None,
            LaplaceEvidence,
            amount=None,
            calibration=calibration_of(model),
            num_data=num_data,
            kind="ggn",
        ).masks
        left.append(sum(int(mask.sum()) for mask in masks.values()))
    assert left[0] < left[1]


def test_one_tensor_by_the_hosts_call():
    model = mlp()
    posterior = fitted(model)
    LaplaceEvidence.apply(model[0], "weight", posterior=posterior, model=model)
    assert torch.equal(model[0].weight_mask.bool(), expected_changes(posterior)["0.weight"] < 0)
    assert not hasattr(model[2], "weight_mask")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ArgumentTypeError, "Expected `calibration="),
        ({"model": nn.Linear(2, 2)}, ArgumentTypeError, "with `model=`, got neither"),
        ({"amount": 1.5}, ArgumentError, "fraction in"),
        ({"kind": "exact"}, ArgumentError, "`kind` to be one of"),
        ({"structure": "full"}, ArgumentError, "`structure` to be one of"),
    ],
)
def test_impossible_arguments(options, error, message):
    with pytest.raises(error, match=message):
        prune_global(None, LaplaceEvidence, **{"amount": None, **options})


def test_a_posterior_of_other_weights():
    model = mlp()
    posterior = fitted(model)
    with pytest.raises(AlignmentError, match="posterior of weights of the model"):
        LaplaceEvidence(posterior=posterior, model=nn.Linear(2, 2))
    with torch.no_grad():
        model[2].weight += 1
    with pytest.raises(AlignmentError, match=r"at the weights of `2\.weight`, got one at others"):
        prune_global(pairs(model), LaplaceEvidence, amount=None, posterior=posterior, model=model)
    assert not hasattr(model[0], "weight_mask")
