"""SpaM in two processes that talk through gloo, beside one process on all of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.integrations.processes import accelerator, in_two_processes, load_all, save_from
from torchprune_bayes import Calibration, masks_of, prune_global
from torchprune_bayes.curvature import LayerCurvature, trainable_parameters
from torchprune_bayes.errors import AlignmentError, CalibrationError
from torchprune_bayes.integrations.accelerate import calibrate
from torchprune_bayes.laplace import Posterior, fit_posterior
from torchprune_bayes.methods import OPD
from torchprune_bayes.training import SpaM

Batch = tuple[Tensor, Tensor]
SIZE, ROUNDS, EPOCHS = 4, 4, 4
STRUCTURES = ["scalar", "layerwise", "unitwise", "diag"]
FORMS = [
    ("diagonal", "ggn"),
    ("kronecker", "ggn"),
    ("kronecker", "empirical"),
    ("diagonal", "monte_carlo"),
]


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*convolution, nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def _batches() -> list[Batch]:
    """Batches of which each process takes every other one."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(2 * ROUNDS):
        x = torch.randn(SIZE, 1, 4, 4, generator=generator, dtype=torch.float64)
        found.append((x, (x[:, 0, 0, 0] > 0).long() + (x[:, 0, 1, 1] > 0.5).long()))
    return found


def _together(data: list[Batch]) -> list[Batch]:
    """What the two processes see in one step."""
    pairs = zip(data[0::2], data[1::2], strict=True)
    return [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in pairs]


def _described(posterior: Posterior) -> dict[str, Any]:
    return {
        "evidence": posterior.log_marginal_likelihood(),
        "scores": posterior.scores(),
        "precisions": {name: posterior.prior.broadcastable(name) for name in posterior.names},
    }


def _posteriors(calibration: Calibration, **options: Any) -> dict[str, Any]:
    """Evidence, scores and priors of every structure and form."""
    found = {}
    for form, kind in FORMS:
        fitted = fit_posterior(calibration, structure=form, kind=kind, **options)
        for structure in STRUCTURES:
            better = fitted.with_best_prior(structure)
            found[f"{form} {kind} {structure}"] = _described(better)
    return found


def _trained(model: Any, optimizer: Any, spam: SpaM, data: list[Batch]) -> dict[str, Any]:
    """Train, prune by the posterior that came of it, and describe all of it."""
    for _ in range(EPOCHS):
        for x, y in data:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        spam.step()
    posterior = spam.posterior()
    bare = getattr(model, "module", model)
    weights = {name: value.clone() for name, value in bare.state_dict().items()}
    prune_global(None, OPD, amount=0.6, posterior=posterior, model=bare)
    masks = {name: mask.clone() for name, mask in masks_of(bare).items()}
    return {"weights": weights, "masks": masks, "history": spam.history, **_described(posterior)}


def _spam(optimizer: Any, calibration: Calibration, form: str, **options: Any) -> SpaM:
    every: dict[str, Any] = {"every": 1, "burn_in": 1, "kind": "ggn", "structure": form}
    return SpaM(optimizer, calibration, "diag", **every, **options)


def _on_ranks(path: Path) -> None:
    acc, data = accelerator(), _batches()
    share = data[acc.process_index :: 2]
    model = _network()
    options = {"params": trainable_parameters(model)}
    calibration = calibrate(acc, model, data, cross_entropy, **options)
    found: dict[str, Any] = {
        "exchanged": _posteriors(calibration),
        "added": _posteriors(calibration.local, all_reduce=True, num_data=2 * SIZE * ROUNDS),
    }
    for form in ("diagonal", "kronecker"):
        model = _network()
        calibration = calibrate(acc, model, data, cross_entropy, params=trainable_parameters(model))
        prepared, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))
        spam = _spam(
            optimizer.optimizer,
            calibration.local,
            form,
            all_reduce=True,
            num_data=2 * SIZE * ROUNDS,
        )
        found[f"trained {form}"] = _trained(prepared, optimizer, spam, share)
    save_from(acc.process_index, found, path)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    path = tmp_path_factory.mktemp("ranks") / "found"
    in_two_processes(_on_ranks, path)
    return load_all(path)


def _assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["exchanged", "added"])
def test_evidence_and_prior_are_those_of_one_process_on_the_union(
    ranks: list[dict[str, Any]], way: str
) -> None:
    model = _network()
    union = Calibration(model, _batches(), cross_entropy, params=trainable_parameters(model))
    expected = _posteriors(union)
    for found in ranks:
        for case, value in expected.items():
            if "monte_carlo" not in case:  # draws labels by batch
                _assert_close({case: found[way][case]}, {case: value})


def test_priors_are_the_same_to_the_bit_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first.keys() == second.keys()
    for way in first:
        torch.testing.assert_close(first[way], second[way], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["diagonal", "kronecker"])
def test_training_prunes_as_one_process_with_larger_batches(
    ranks: list[dict[str, Any]], form: str
) -> None:
    model = _network()
    data = _together(_batches())
    calibration = Calibration(model, data, cross_entropy, params=trainable_parameters(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    spam = _spam(optimizer, calibration, form)
    expected = _trained(model, optimizer, spam, data)
    assert len(expected["history"]) == EPOCHS - 1
    for found in ranks:
        trained = found[f"trained {form}"]
        _assert_close(trained["weights"], expected["weights"])
        for name in expected["precisions"]:  # held in single precision
            found_precision, precision = (run["precisions"][name] for run in (trained, expected))
            torch.testing.assert_close(found_precision, precision, rtol=1e-6, atol=0.0)
        assert trained["evidence"] == pytest.approx(expected["evidence"], rel=1e-7)
        for name, mask in expected["masks"].items():
            assert torch.equal(trained["masks"][name], mask), name


def _drawn_and_failing(path: Path) -> None:
    acc = accelerator()
    model = _network()
    # Both ranks have the same images, so that only their draws can differ.
    own = Calibration(model, _batches(), cross_entropy)
    draws = [
        LayerCurvature("monte_carlo", stream=stream).fit(own).diagonal()["0.weight"]
        for stream in (0, acc.process_index)
    ]
    options: dict[str, Any] = {"all_reduce": True, "num_data": 64}
    labels = [(x, y if acc.process_index else y + 100) for x, y in _batches()]
    reason = ""
    try:
        fit_posterior(Calibration(model, labels, cross_entropy), **options)
    except (CalibrationError, IndexError) as error:
        reason = type(error).__name__
    structure: Any = ("diagonal", "kronecker")[acc.process_index]
    try:
        LayerCurvature(structure=structure).fit(own).all_reduce()
    except AlignmentError as error:
        reason += f" {error}"
    save_from(acc.process_index, (draws, reason), path)


def test_ranks_draw_labels_apart_and_fail_together(tmp_path: Path) -> None:
    in_two_processes(_drawn_and_failing, tmp_path / "found")
    (alone, first), (again, second) = load_all(tmp_path / "found")
    assert torch.equal(alone[0], alone[1])
    assert torch.equal(alone[0], again[0])
    assert not torch.equal(again[0], again[1])
    message = "Expected the same curvatures in all processes, got others."
    assert first.endswith(message)
    assert second == f"CalibrationError {message}"
