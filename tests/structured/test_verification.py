"""What tells a wrongly wired cut: precision, weights off their start, and something to compare."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from tests.contracts.state import unchanged
from tests.structured.families.models import build, inputs_of
from tests.structured.shrink_cases import RowNorm
from torchprune_bayes.errors import ArgumentError, NumericalError, ParameterError
from torchprune_bayes.structured import UnitGroup, UnitSlice, find_units, shrink
from torchprune_bayes.structured._verification import check_equal, failing_groups
from torchprune_bayes.structured.slicing import plan_of
from torchprune_bayes.wiring.trace import observe


class Block(nn.Module):
    """A residual block behind a scale that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.b(torch.relu(self.a(x)))


def shifted(shift: int) -> UnitGroup:
    """The units of ``Block``, read at the right places if not shifted."""
    units = torch.arange(6)[:, None]
    slices = (
        UnitSlice("a.weight", 0, units, "producer"),
        UnitSlice("a.bias", 0, units, "producer"),
        UnitSlice("b.weight", 1, units.roll(shift), "consumer"),
    )
    return UnitGroup("a", "hidden", 6, slices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_precision_and_no_zero_hides_a_wrong_wiring(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = Block().to(dtype), torch.randn(3, 4).to(dtype)
    kept = {"a": torch.tensor([0, 2, 5])}
    with unchanged(model):
        right = check_equal(model, plan_of(model, [shifted(0)], kept), inputs, None)
        assert right < 1e-6
        with pytest.raises(NumericalError, match="its wiring is not understood"):
            check_equal(model, plan_of(model, [shifted(1)], kept), inputs, None)


@pytest.mark.parametrize("inputs", [torch.full((2, 4), float("nan")), torch.zeros(0, 4)])
def test_nothing_to_compare_is_said(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    with unchanged(model), pytest.raises(ArgumentError, match="outputs to compare, got none"):
        shrink(model, inputs, RowNorm(), sparsity=0.3, target="channels")
    report = shrink(model, inputs, RowNorm(), sparsity=0.3, target="channels", verify=False)
    assert report.difference is None


def test_a_model_that_returns_nothing_is_compared_inside() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.b(torch.relu(self.a(x)))
            return scores[scores > 1e9]

    model, inputs = Detector(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    kept = {"a": torch.tensor([0, 2, 5])}
    assert check_equal(model, plan_of(model, [shifted(0)], kept), inputs, None) < 1e-6
    with pytest.raises(NumericalError):
        check_equal(model, plan_of(model, [shifted(1)], kept), inputs, None)


class Best(nn.Module):
    """Returns the best of many scores that are nearly the same, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        values = self.b(torch.relu(self.a(x)))
        scores = 1 + 1e-7 * values.sum(1)
        return values[scores.topk(len(scores) // 2).indices]


def test_choices_that_rounding_decides_are_compared_inside() -> None:
    model = Best()
    inputs = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    kept = {"a": torch.tensor([0, 2, 5])}
    with unchanged(model):
        assert check_equal(model, plan_of(model, [shifted(0)], kept), inputs, None) < 1e-5
        with pytest.raises(NumericalError):
            check_equal(model, plan_of(model, [shifted(1)], kept), inputs, None)
        assert failing_groups(model, [shifted(0)], inputs, None) == {}
        assert list(failing_groups(model, [shifted(1)], inputs, None)) == ["a"]


class Mixed(nn.Module):
    """One layer whose code names its width, one that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * torch.ones(6)
        return self.c(torch.relu(self.b(x)))


def test_a_group_that_fails_is_left_out_and_named() -> None:
    model, inputs = Mixed(), torch.ones(2, 4)
    with unchanged(model):
        units = find_units(model, inputs)
    assert [group.name for group in units.groups] == ["b"]
    assert "RuntimeError" in units.left_out["a"]
    report = shrink(model, inputs, RowNorm(), sparsity=0.2, target="params")
    assert (model.a.out_features, model.b.out_features < 8) == (6, True)
    assert report.left_out == units.left_out
    assert "left whole: `a`, since " in str(report)


def test_groups_that_fail_are_told_apart() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block(), Block())
    groups = []
    for place, shift in enumerate((0, 1, 0)):
        slices = [
            UnitSlice(f"{place}.{piece.name}", piece.dim, piece.positions, piece.role)
            for piece in shifted(shift).slices
        ]
        groups.append(UnitGroup(f"{place}.a", "hidden", 6, tuple(slices)))
    with unchanged(model):
        reasons = failing_groups(model, groups, torch.ones(2, 4), None)
    assert list(reasons) == ["1.a"]
    assert "change by" in reasons["1.a"]


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    model.open = (number for number in range(3))  # type: ignore[assignment]
    with pytest.raises(ParameterError, match=r"that `copy.deepcopy` can copy"):
        shrink(model, torch.ones(2, 4), RowNorm(), sparsity=0.3, target="channels")


@pytest.mark.parametrize("name", ["gpt2-lm", "distilbert", "timm-vit", "timm-swin", "llama-gqa"])
@pytest.mark.parametrize("kind", ["GroupMagnitudeImportance", "GroupTaylorImportance"])
def test_importances_of_torch_pruning_score_every_family(name: str, kind: str) -> None:
    model = build(name)
    inputs = inputs_of(name)
    output = model(**inputs)
    (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
    report = shrink(model, inputs, getattr(tp.importance, kind)(), sparsity=0.3, target="channels")
    assert report.units.sparsity >= 0.3
    assert report.difference is not None


def test_an_importance_of_torch_pruning_that_fails_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    with (
        unchanged(model),
        pytest.raises(ParameterError, match=r"GroupTaylorImportance to score.*`backward"),
    ):
        shrink(
            model, torch.ones(2, 4), tp.importance.GroupTaylorImportance(), sparsity=0.3,
            target="channels",
        )  # fmt: skip


class OfTwoSizes(nn.Module):
    """Convolutions; large images may take a way of their own."""

    def __init__(self, *, special: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
        self.special = special

    def forward(self, x: Tensor) -> Tensor:
        last = self.c if self.special and x.shape[-1] > 100 else self.b
        return last(torch.relu(self.a(x))).mean((2, 3))


def channels(shift: int, reader: str) -> UnitGroup:
    """The channels of ``OfTwoSizes``, read at the right places if not shifted."""
    slices = [
        UnitSlice(piece.name.replace("b.", f"{reader}."), piece.dim, piece.positions, piece.role)
        for piece in shifted(shift).slices
    ]
    return UnitGroup("a", "channel", 6, tuple(slices))


@pytest.mark.parametrize("special", [False, True])
def test_smaller_images_are_compared_where_they_go_the_same_way(special: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = OfTwoSizes(special=special), torch.randn(1, 3, 224, 224)
    wiring = observe(model, inputs, None)
    kept, reader = {"a": torch.tensor([0, 2, 5])}, "c" if special else "b"
    right, wrong = channels(0, reader), channels(1, reader)
    sides: list[int] = []

    def seen(model: nn.Module, x: Tensor) -> Tensor:
        sides.append(x.shape[-1])
        return model(x)

    arguments = (inputs, seen, wiring.operations)
    assert failing_groups(model, [right], *arguments) == {}
    assert check_equal(model, plan_of(model, [right], kept), *arguments) < 1e-6
    assert (56 in sides, 224 in sides) == (True, special)
    assert list(failing_groups(model, [wrong], *arguments)) == ["a"]
    assert 224 in sides  # those of the example decide
    with pytest.raises(NumericalError):
        check_equal(model, plan_of(model, [wrong], kept), *arguments)


def test_images_that_have_to_be_large_are_compared_as_they_are() -> None:
    layers = (nn.Conv2d(3, 6, 5, 4), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(6 * 53 * 53, 2))
    report = shrink(model, torch.ones(1, 3, 224, 224), RowNorm(), sparsity=0.3, target="channels")
    assert report.units.after <= 8
    assert (report.left_out, report.difference is not None) == ({}, True)
