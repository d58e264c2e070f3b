"""Nothing is left whole without a word, and a run leaves a model as it was, its caches included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.structured import L1FilterImportance, check_shrinkable, find_units, shrink
from torchprune_bayes.structured._verification import failing_groups
from torchprune_bayes.wiring.forward import at_rest


class Residual(nn.Module):
    """A layer that is cut, a sum in front of a norm over all, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.head, self.aside = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(x + self.b(self.a(x).relu())))


def test_what_stays_is_named_once_and_outputs_are_not() -> None:
    units = find_units(Residual(), torch.ones(2, 4))
    assert [group.name for group in units.groups] == ["a"]
    assert units.left_out == {
        "stem": "`native_layer_norm` in `norm` takes them all together",
        "aside": "the example inputs do not reach it",
    }


def test_a_parametrized_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.utils.parametrizations.weight_norm(model[2])
    units = find_units(model, torch.ones(2, 4))
    assert [group.name for group in units.groups] == []
    assert "`2` is parametrized" in units.left_out["2"]
    assert "in `2`" in units.left_out["0"]
    with pytest.raises(ArgumentError, match="`2` is parametrized"):
        check_shrinkable(model, torch.ones(2, 4))


def test_a_model_without_units_is_refused_by_module_class_and_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(ArgumentError, match=r"`0` \(Linear\): `native_layer_norm` in `1` takes"):
        shrink(model, torch.ones(2, 4), L1FilterImportance(), sparsity=0.5)


def test_layers_that_differ_in_a_number_share_a_line_of_the_report() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    report = shrink(model, torch.randn(2, 4), L1FilterImportance(), sparsity=0.1)
    assert len(report.left_out) == 3
    line = "left whole: `0.0` and 2 like it, since `native_layer_norm` in `0.1` takes them all"
    assert line in str(report)


class Named(nn.Module):
    """Two layers, the second of which multiplies by a constant of its width if it is asked to."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.a, self.b, self.fixed = nn.Linear(4, 6), nn.Linear(6, 4), fixed

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.b(hidden * torch.ones(6) if self.fixed else hidden)


@pytest.mark.parametrize("fixed", [(1, 1, 1, 1, 1), (1, 0, 1, 0, 0), (0, 1, 1, 0, 0), (0,) * 5])
def test_groups_of_the_same_make_are_told_apart_where_they_differ(fixed: tuple[int, ...]) -> None:
    model, inputs = nn.Sequential(*(Named(bool(each)) for each in fixed)), torch.ones(2, 4)
    plain = nn.Sequential(*(Named(False) for _ in fixed))
    groups = [group for group in find_units(plain, inputs).groups if group.name.endswith("a")]
    failed = failing_groups(model, groups, inputs, None)
    assert list(failed) == [f"{place}.a" for place, each in enumerate(fixed) if each]


class Parts(nn.Module):
    """Cuts what a layer makes into parts of which it names the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 9), nn.Linear(5, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.a(x).split([5, 4], -1)
        return self.b(one.relu()) + self.c(other.relu())


def test_parts_of_which_the_code_names_the_sizes_are_left_whole() -> None:
    units = find_units(Parts(), torch.ones(2, 4))
    assert "split_sizes=[5, 4]" in units.left_out["a"]


class Scaled(nn.Module):
    """Its weight is a buffer, as that of FalconMamba's inner norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_weight_may_be_a_buffer() -> None:
    units = find_units(nn.Sequential(nn.Linear(4, 6), Scaled(), nn.Linear(6, 2)), torch.ones(2, 4))
    assert ([group.name for group in units.groups], units.left_out) == (["0"], {})


class Caching(nn.Module):
    """Keeps what it computes from its weights in evaluation mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.num_heads = 4
        self.cache: dict[str, Tensor] = {}
        self.seen: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        self.seen.append(x.shape)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) + self.cache["bias"]).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


def test_a_run_leaves_no_caches_behind() -> None:
    model, inputs = Caching().eval(), torch.randn(2, 5, 6)
    report = shrink(model, inputs, L1FilterImportance(), sparsity=0.5, target="channels")
    assert [group.kind for group in report.groups] == ["head"]
    assert (model.cache, model.seen, model.num_heads) == ({}, [], 2)
    assert model(inputs).shape == (2, 5, 3)


class Exchanging(nn.Module):
    """Puts another module in its own place at the first call, as BigBird does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.a = nn.Linear(4, 6)
        return self.b(self.a(x).relu())


def test_a_model_that_exchanges_its_modules_is_refused_and_comes_out_as_it_went_in() -> None:
    model = Exchanging()
    before = model.a
    with pytest.raises(
        ParameterError, match=r"keeps its modules, got Exchanging, .* Linear at `a`"
    ):
        find_units(model, torch.ones(2, 4))
    assert model.a is before
    with at_rest(model):
        model(torch.ones(2, 4))
    assert model.a is before
