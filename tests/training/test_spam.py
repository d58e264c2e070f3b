from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.laplace import fit_posterior
from torchprune_bayes.methods import OPD
from torchprune_bayes.schedules import linear, one_shot
from torchprune_bayes.training import SpaM

STRUCTURES = ["scalar", "layerwise", "unitwise", "diag"]


def _model() -> Any:
    torch.manual_seed(0)
    layers = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3)
    return nn.Sequential(*layers)


def _data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return list(zip(x.split(16), y.split(16), strict=True))


def _spam(model: nn.Module, optimizer: Any = None, **options: Any) -> SpaM:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    calibration = Calibration(model, _data(), cross_entropy)
    return SpaM(optimizer, calibration, **{"every": 2, "kind": "ggn", **options})


def _train(model: nn.Module, spam: SpaM, epochs: int = 1) -> list[Any]:
    optimizer, events = spam.optimizer, []
    for _ in range(epochs):
        for x, y in _data():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        events.append(spam.step())
    return events


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("form", ["diagonal", "kronecker"])
def test_updates_the_prior_when_due(structure: str, form: str) -> None:
    model = _model()
    spam = _spam(model, prior=structure, structure=form, burn_in=2, every=2)
    events = _train(model, spam, 5)
    assert [event is not None for event in events] == [False, False, False, True, False]
    event = events[3]
    assert event == spam.history[0]
    assert event["step"] == 4
    assert 0 < event["effective_parameters"] < 108
    assert float((spam.prior.values("0.weight") - 1).abs().max()) > 0.1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_update_raises_the_evidence_at_fixed_weights(structure: str) -> None:
    model = _model()
    spam = _spam(model, prior=structure, every=1)
    before = [spam.posterior().log_marginal_likelihood()]
    for _ in range(3):
        spam.step()
        before.append(spam.posterior().log_marginal_likelihood())
    assert before[1] > before[0]
    assert all(later >= earlier - 1e-3 for earlier, later in pairwise(before[1:]))


def test_the_prior_pulls_as_a_penalty_on_the_mean_loss_does() -> None:
    model, reference = _model().eval(), _model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spam = _spam(model, optimizer, initial=4.0, temperature=0.5, num_data=960)
    x, y = _data()[0]
    cross_entropy(model(x), y).backward()
    optimizer.step()
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    # The log joint is −960 ℓ/T − ½ δ|w|², so that ℓ + T δ|w|²/(2 · 960) is what falls.
    squares = sum(reference[i].weight.square().sum() for i in (0, 4))
    (cross_entropy(reference(x), y) + 0.5 * 4.0 * squares / (2 * 960)).backward()
    other.step()
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert spam.prior.structure.value == "diag"


class _Tagger(nn.Module):
    """Classes of every position, as ``cross_entropy`` wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).mT


def test_a_loss_that_is_a_mean_over_positions_too_has_a_weaker_prior() -> None:
    """The mean over positions is the smaller part of a sample's likelihood the more there are."""
    torch.manual_seed(0)
    model, (x, y) = _Tagger(), (torch.randn(8, 5, 6), torch.randint(3, (8, 5)))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calibration = Calibration(model, [(x, y)], cross_entropy)
    SpaM(optimizer, calibration, initial=7.0, labels_per_sample=5)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    # The negative log joint, over the 40 labels that the mean loss is over.
    joint = cross_entropy(twin(x), y, reduction="sum") + 3.5 * twin.fc.weight.square().sum()
    (joint / 40).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.fc.weight, twin.fc.weight)


def test_refuses_another_number_of_labels_than_the_data_have() -> None:
    torch.manual_seed(0)
    model = _Tagger()
    data = [(torch.randn(8, 5, 6), torch.randint(3, (8, 5)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spam = SpaM(optimizer, Calibration(model, data, cross_entropy), every=1, kind="empirical")
    before = spam.state_dict()
    with pytest.raises(ArgumentError, match="Expected labels_per_sample=5"):
        spam.step()
    assert str(spam.state_dict()) == str(before)


def test_the_baseline_trains_with_the_initial_prior() -> None:
    models = _model(), _model()
    sgd = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    spam = _spam(models[0], sgd[0], enabled=False, initial=2.0)
    reference = sgd[1]
    for epoch in range(4):
        torch.manual_seed(epoch)
        _train(models[0], spam)
        torch.manual_seed(epoch)
        for x, y in _data():
            reference.zero_grad()
            penalty = sum(models[1][i].weight.square().sum() for i in (0, 4)) / 96
            (cross_entropy(models[1](x), y) + penalty).backward()
            reference.step()
    for ours, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert spam.history == []
    assert torch.equal(spam.posterior().prior.values("0.weight"), torch.full((12, 6), 2.0))


def test_learns_precisions_that_prune_well() -> None:
    # Two of six inputs matter, so most of the precisions become large.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    spam = _spam(model, every=2)
    _train(model, spam, 40)
    noise = spam.prior.values("0.weight")[:, 2:].log().mean()
    signal = spam.prior.values("0.weight")[:, :2].log().mean()
    assert float(noise - signal) > 1
    first, last = (spam.history[i]["log_marginal_likelihood"] for i in (0, -1))
    assert last > first
    x, y = (torch.cat(parts) for parts in zip(*_data(), strict=True))
    dense = float((model(x).argmax(1) == y).float().mean())
    prune_global(None, OPD, amount=0.6, posterior=spam.posterior(), model=model)
    assert float((model(x).argmax(1) == y).float().mean()) > dense - 0.05


def test_leaves_everything_else_as_it_was() -> None:
    model = _model()
    spam = _spam(model, every=1)
    model[1].eval()  # a mixture of modes
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    spam.step()
    assert [m.training for m in model] == [True, False, True, True, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert not model[0]._forward_hooks


def test_a_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    spam = _spam(model, every=1)
    before = spam.prior

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("torchprune_bayes.training.spam.fit_posterior", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        spam.step()
    assert spam.prior is before
    assert spam.history == []
    assert spam.state_dict()["step"] == 0


@pytest.mark.parametrize("regrow", [False, True])
def test_prunes_along_a_schedule(regrow: bool) -> None:
    model = _model()
    schedule = linear(0.6, begin=2, end=6, every=2)
    spam = _spam(model, schedule=schedule, regrow=regrow)
    events = _train(model, spam, 6)
    expected = [schedule(step) for step in (2, 4, 6)]
    assert [e["sparsity"] for e in events if e] == pytest.approx(expected, abs=0.01)
    weights = model[0].weight, model[4].weight
    _train(model, spam)
    zeros = sum(int((w == 0).sum()) for w in weights)
    if regrow:
        assert zeros < 0.1 * 108
        assert spam.masks == {}
    else:
        assert zeros == round(0.6 * 108)
        assert sum(int((~m).sum()) for m in spam.masks.values()) == zeros


@pytest.mark.parametrize("mode", ["opd", "posterior", "obd"])
def test_prunes_by_what_the_mode_says(mode: str) -> None:
    model = _model()
    spam = _spam(model, schedule=one_shot(0.5, at=1), every=1, enabled=False, mode=mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scores = spam.posterior().scores(mode)
    spam.step()
    weights = [name for name in scores if name.endswith("weight") and before[name].ndim > 1]
    ranked = torch.cat([scores[name].flatten() for name in weights])
    kept = torch.cat([spam.masks[name].flatten() for name in weights])
    assert ranked[kept].min() >= ranked[~kept].max()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ArgumentError, match="mode"):
        _spam(_model(), mode="weights")


def test_what_is_pruned_does_not_enter_the_next_posterior() -> None:
    model = _model()
    spam = _spam(model, schedule=one_shot(0.5, at=1), every=1)
    _train(model, spam, 2)
    gone = ~spam.masks["0.weight"]
    assert gone.any()
    assert not spam.posterior().curvature("0.weight")[gone].any()


def test_prunes_a_baseline_as_well() -> None:
    model = _model()
    spam = _spam(model, enabled=False, schedule=one_shot(0.5, at=1))
    (event,) = _train(model, spam)
    assert event["sparsity"] == 0.5
    assert not event["updated"]
    assert (spam.prior.values("0.weight") == 1).all()


def test_resumes_where_it_was(tmp_path: Any) -> None:
    def run(interrupted: bool) -> tuple[nn.Module, SpaM]:
        model = _model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        options = {"schedule": linear(0.5, begin=2, end=6, every=2), "patience": 3}
        spam = _spam(model, optimizer, **options)
        for epoch in range(6):
            if interrupted and epoch == 3:
                state = {"model": model, "optimizer": optimizer, "spam": spam}
                torch.save({k: v.state_dict() for k, v in state.items()}, tmp_path / "state.pt")
                model = _model()
                optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
                spam = _spam(model, optimizer, **options)
                loaded = torch.load(tmp_path / "state.pt", weights_only=True)
                model.load_state_dict(loaded["model"])
                optimizer.load_state_dict(loaded["optimizer"])
                spam.load_state_dict(loaded["spam"])
            torch.manual_seed(epoch)
            _train(model, spam)
        return model, spam

    (first, spam), (second, resumed) = run(False), run(True)
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()))
    assert spam.history == resumed.history
    assert all(torch.equal(spam.masks[n], resumed.masks[n]) for n in spam.masks)


def test_stops_early_and_goes_back_to_the_best() -> None:
    model = _model()
    spam = _spam(model, every=1, patience=2)
    _train(model, spam, 8)
    best = max(spam.history, key=lambda event: event["log_marginal_likelihood"])
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(12, 6) * 3)  # from here on it gets worse
    assert not spam.finished
    for _ in range(2 + best["step"] - 8 if best["step"] > 6 else 0):
        spam.step()
    spam.step()
    assert spam.finished
    spam.restore_best()
    assert spam.posterior().log_marginal_likelihood() == pytest.approx(
        best["log_marginal_likelihood"], rel=0.2
    )


def test_learns_the_noise_of_a_regression() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 5, generator=generator)
    y = x @ torch.randn(5, 2, generator=generator) + 0.3 * torch.randn(400, 2, generator=generator)
    model = nn.Linear(5, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calibration = Calibration(model, [(x, y)], mse_loss)
    spam = SpaM(
        optimizer, calibration, "layerwise", noise="fit", loss_scale=1.0, outputs=2, kind="ggn"
    )
    for _ in range(60):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        spam.step()
    assert spam.noise == pytest.approx(0.3, rel=0.05)
    # MacKay's noise is that of the residuals with the degrees of freedom left.
    residuals = float((y - model(x)).detach().square().sum())
    free = 800 - spam.posterior().effective_parameters()
    assert spam.noise == pytest.approx((residuals / free) ** 0.5, rel=1e-2)


def test_the_papers_steps_are_an_option() -> None:
    model = _model()
    spam = _spam(model, solver="adam", solver_options={"steps": 3, "lr": 0.1}, every=1)
    spam.step()
    moved = spam.prior.values("0.weight").log().abs().max()
    assert 0.1 < float(moved) < 0.4


def test_the_posterior_is_that_of_the_moment() -> None:
    model = _model()
    spam = _spam(model, prior="layerwise")
    _train(model, spam, 2)
    calibration = Calibration(model, _data(), cross_entropy)
    expected = fit_posterior(calibration, spam.prior, kind="ggn")
    found = spam.posterior()
    assert found.log_marginal_likelihood() == pytest.approx(expected.log_marginal_likelihood())


def test_refuses_impossible_options() -> None:
    model = _model()
    for options, word in (
        ({"prior": "blockwise"}, "prior structure"),
        ({"burn_in": -1}, "burn_in"),
        ({"every": 0}, "every"),
        ({"patience": 0}, "patience"),
        ({"labels_per_sample": 0.0}, "labels_per_sample"),
        ({"solver": "lbfgs"}, "solver"),
        ({"kind": "exact"}, "kind"),
        ({"noise": "guess"}, "noise"),
        ({"noise": 1.0, "kind": "empirical"}, "not the Hessian"),
        ({"temperature": 0.0}, "temperature"),
        ({"initial": 0.0}, "value"),
        ({"all_reduce": True}, "num_data"),
        ({"all_reduce": True, "num_data": 96}, "process group"),
    ):
        with pytest.raises(ArgumentError, match=word):
            _spam(model, **options)
    with pytest.raises(ArgumentError, match="weight_decay=0"):
        _spam(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    with pytest.raises(AlignmentError, match="parameters of the optimizer"):
        _spam(model, torch.optim.SGD(_model().parameters(), lr=0.1))
    spam = _spam(model)
    with pytest.raises(ArgumentError, match="patience"):
        spam.restore_best()
    with pytest.raises(ArgumentError, match="Expected the keys"):
        spam.load_state_dict({"step": 3})
    with pytest.raises(AlignmentError, match="diag prior"):
        spam.load_state_dict(_spam(model, prior="scalar").state_dict())
    assert not model[0]._forward_hooks
