from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.laplace import Posterior, fit_posterior
from torchprune_bayes.structured import UnitGroup, UnitSlice, find_groups, shrink
from torchprune_bayes.structured.importances.opd import OPDImportance

INPUTS = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """A stem and a block whose outputs are added, so that they share their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.norm(self.stem(x)).relu()
        return self.head((stem + self.block(stem)).mean((2, 3)))


def _model() -> Any:
    torch.manual_seed(0)
    return Residual().eval()


def _calibration(model: nn.Module) -> Calibration:
    data = [(INPUTS, torch.arange(12) % 4)]
    return Calibration(model, data, cross_entropy, params=trainable_parameters(model))


def _posterior(model: nn.Module) -> Posterior:
    return fit_posterior(_calibration(model), kind="empirical").with_best_prior("unitwise")


def test_sums_rows_columns_or_all_over_coupled_layers() -> None:
    model = _model()
    posterior = _posterior(model)
    scores = posterior.scores()
    groups = find_groups(model, INPUTS[:1])
    (group,) = (g for g in groups if any(s.name == "stem.weight" for s in g.slices))
    rows = sum(
        scores[f"{layer}.weight"].flatten(1).sum(1) + scores[f"{layer}.bias"]
        for layer in ("stem", "block")
    )
    columns = scores["head.weight"].sum(0) + scores["block.weight"].sum((0, 2, 3))
    norms = scores["norm.weight"] + scores["norm.bias"]
    for members, expected in (
        ("rows", rows),
        ("columns", columns),
        ("all", rows + columns + norms),
    ):
        found = OPDImportance(posterior, members=members).score(group, model)
        torch.testing.assert_close(found, expected)


def test_units_may_own_several_entries() -> None:
    # Two channels flattened to three positions each, read by a linear layer.
    layer = nn.Linear(6, 2, bias=False)
    nn.init.ones_(layer.weight)
    h = torch.arange(12.0).reshape(2, 6)
    importance = OPDImportance(
        Posterior({"weight": layer.weight}, {"weight": h}), members="columns"
    )
    positions = torch.tensor([[0, 1, 2], [3, 4, 5]])
    group = UnitGroup("", "channel", 2, (UnitSlice("weight", 1, positions, "consumer"),))
    found = importance.score(group, layer)
    expected = (h + 1).sum(0).reshape(2, 3).sum(1)
    torch.testing.assert_close(found, expected.double())
    assert (
        OPDImportance(Posterior({"weight": layer.weight}, {"weight": h})).score(group, layer)
        is None
    )


def test_a_hugging_face_conv1d_has_its_outputs_second() -> None:
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D(3, 4)
    h = torch.rand(4, 3)
    posterior = Posterior({"weight": conv.weight}, {"weight": h})
    outputs = UnitSlice("weight", 1, torch.arange(3).unsqueeze(1), "producer")
    found = OPDImportance(posterior).score(UnitGroup("", "hidden", 3, (outputs,)), conv)
    torch.testing.assert_close(found, posterior.scores()["weight"].sum(0))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("fitted", [True, False])
def test_shrinks_a_model(steps: int, fitted: bool) -> None:
    model = _model()
    options: dict[str, Any] = {"calibration": _calibration(model), "kind": "empirical"}
    importance = OPDImportance(_posterior(model)) if fitted else OPDImportance(**options)
    assert importance.needs_recalibration == (not fitted)
    report = shrink(model, INPUTS[:2], importance, sparsity=0.4, target="channels", steps=steps)
    assert report.units.sparsity >= 0.4
    assert model(INPUTS).shape == (12, 4)
    assert model.stem.out_channels == model.block.out_channels < 8


def test_removes_the_units_of_least_damage() -> None:
    model = _model()
    with torch.no_grad():
        for tensor in (model.stem.weight, model.stem.bias, model.block.weight, model.block.bias):
            tensor[[2, 5]] *= 1e-3
    importance = OPDImportance(_posterior(model))
    report = shrink(model, INPUTS[:2], importance, sparsity=0.25, target="channels")
    (name,) = (name for name in report.plan.kept if name == "stem.weight")
    assert report.plan.kept[name][0].tolist() == [0, 1, 3, 4, 6, 7]


def test_serves_torch_prunings_own_pruner() -> None:
    tp = pytest.importorskip("torch_pruning")
    for importance in (
        OPDImportance(_posterior(_model())),
        None,
    ):
        model = _model()
        importance = importance or OPDImportance(calibration=_calibration(model), kind="empirical")
        tp.pruner.BasePruner(
            model, INPUTS[:1], importance=importance, pruning_ratio=0.5, ignored_layers=[model.head]
        ).step()
        assert model.stem.out_channels == 4
        assert model(INPUTS).shape == (12, 4)


def test_refuses_what_does_not_fit() -> None:
    model = _model()
    posterior = _posterior(model)
    with pytest.raises(ArgumentTypeError, match="got neither"):
        OPDImportance()
    with pytest.raises(ArgumentTypeError, match="got both"):
        OPDImportance(_calibration(model), posterior=posterior)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"members": "heads"}, "members"),
        ({"mode": "saliency"}, "mode"),
        ({"prior": "blockwise"}, "prior structure"),
        ({"kind": "exact"}, "kind"),
    ]
    for options, word in wrong:
        with pytest.raises(ArgumentError, match=word):
            OPDImportance(posterior, **options)
    other = Posterior(
        {"stem.weight": torch.ones(4, 3, 3, 3)}, {"stem.weight": torch.ones(4, 3, 3, 3)}
    )
    group = find_groups(model, INPUTS[:1])[0]
    with pytest.raises(AlignmentError, match=r"shape \(8, 3, 3, 3\)"):
        OPDImportance(other).score(group, model)
