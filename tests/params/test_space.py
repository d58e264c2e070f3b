from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from tests.contracts.state import unchanged
from tests.params.cases import tied, two_layers
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, ParameterError
from torchprune_bayes.params import (
    ParameterSpace,
)


def test_a_space_is_a_sequence_in_the_order_of_its_pairs() -> None:
    model = two_layers()
    pairs = [(model[2], "weight"), (model[0], "bias"), (model[0], "weight")]
    space = ParameterSpace(model, (pair for pair in pairs))  # a generator too
    assert space.names == ["2.weight", "0.bias", "0.weight"]
    assert space.pairs() == pairs
    assert (len(space), space.numel) == (3, 6 + 3 + 12)
    assert [tensor.name for tensor in space[1:]] == space.names[1:]


def test_a_model_that_is_one_layer_has_a_weight_without_a_prefix() -> None:
    assert ParameterSpace(nn.Linear(2, 2)).names == ["weight"]


def test_names_are_those_inside_a_wrapper() -> None:
    model = two_layers()
    assert ParameterSpace(nn.DataParallel(model)).names == ["0.weight", "2.weight"]


def test_a_space_without_its_model_counts_tied_tensors_once() -> None:
    model = tied()
    pairs = [(model[2], "weight"), (model[1], "weight"), (model[0], "weight")]
    space = ParameterSpace.of_pairs(pairs)
    assert space.pairs() == pairs[:2]


def _lazy() -> Any:
    return nn.Sequential(nn.LazyLinear(2))


def _parametrized() -> Any:
    model = two_layers()
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def _complex() -> Any:
    return nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "missing": (two_layers, "gain", r"Expected a parameter `0\.gain`, got none in Linear"),
    "parametrized": (_parametrized, "weight", r"got the parametrized `0\.weight`"),
    "complex": (_complex, "weight", r"floating-point weights, got torch\.complex64"),
    "lazy": (_lazy, "weight", r"a tensor with a shape, got the uninitialized `0\.weight`"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")  # of older versions of torch
@pytest.mark.parametrize(("make", "name", "message"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_cannot_be_pruned_are_refused(
    make: Callable[[], Any], name: str, message: str
) -> None:
    model = make()
    with pytest.raises(ParameterError, match=message):
        ParameterSpace(model, [(model[0], name)])


def test_a_bias_that_is_not_there_is_refused() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(ParameterError, match="Expected a parameter `bias`, got none"):
        ParameterSpace(layer, [(layer, "bias")])


def test_tied_tensors_are_refused_with_both_names() -> None:
    model = tied()
    with pytest.raises(ParameterError, match=r"`2\.weight` again as `0\.weight`: tied weights"):
        ParameterSpace(model, [(model[2], "weight"), (model[0], "weight")])


def test_modules_of_another_model_are_refused() -> None:
    with pytest.raises(ParameterError, match="of the model, got a Linear that is not in it"):
        ParameterSpace(two_layers(), [(nn.Linear(1, 1), "weight")])


@pytest.mark.parametrize(
    "pair", ["weight", ("weight", nn.Linear(1, 1)), (nn.Linear(1, 1),), [nn.Linear(1, 1), "weight"]]
)
def test_what_is_no_pair_is_refused(pair: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"\(module, tensor name\) pairs, got"):
        ParameterSpace(two_layers(), [pair])


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ParameterError, match="at least one"):
        ParameterSpace(two_layers(), [])


def test_parts_of_a_space_keep_its_order() -> None:
    model = two_layers()
    space = ParameterSpace(model, [(model[2], "weight"), (model[0], "weight"), (model[0], "bias")])
    assert space.restricted(model[0], "weight").names == ["0.weight"]
    assert space.subset(["0.bias", "2.weight"]).names == ["2.weight", "0.bias"]
    with pytest.raises(AlignmentError, match=r"among the calibration's parameters \(2\.weight,"):
        space.restricted(model[2], "bias")
    with pytest.raises(AlignmentError, match=r"got '2\.bias'"):
        space.subset(["2.bias"])


def test_masks_held_elsewhere_join_those_of_the_host() -> None:
    model = two_layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    held = torch.ones(3, 4, dtype=torch.bool)
    held[:, 0] = False
    with unchanged(model):
        space = ParameterSpace(model).with_masks({"0.weight": held})
        masks, values = space.masks(), space.values()
    assert torch.equal(masks["0.weight"], held & model[0].weight_mask.bool())
    assert torch.equal(values["0.weight"] != 0, masks["0.weight"])
    assert masks["2.weight"].all()
    assert ParameterSpace(model)[0].known_masks == [model[0].weight_mask]


def test_the_hosts_vector_is_compared_entry_by_entry() -> None:
    model = two_layers()
    prune.l1_unstructured(model[2], "weight", 2)
    space = ParameterSpace(model)
    kept = model[2].weight_orig[model[2].weight_mask == 1]
    flat = torch.cat([model[0].weight.flatten(), kept])
    space.check_alignment(flat)
    space.check_alignment(flat.double())
    with pytest.raises(AlignmentError, match=r"Expected the 16 remaining entries .*, got 18: pass"):
        space.check_alignment(torch.cat([flat, flat[:2]]))
    with pytest.raises(AlignmentError, match=r"the values of `0\.weight` at its place, got others"):
        space.check_alignment(flat.abs() + 1)
    reordered = ParameterSpace(model, reversed(space.pairs()))
    with pytest.raises(AlignmentError, match=r"the values of `2\.weight` at its place"):
        reordered.check_alignment(flat)


def test_the_same_tensors_in_any_order_pass_and_others_do_not() -> None:
    model = tied()
    pairs = [(model[1], "weight"), (model[2], "weight")]
    space = ParameterSpace(model, pairs)
    space.check_same_tensors(reversed(pairs))
    space.check_same_tensors([*pairs, (model[0], "weight")])  # tied to the second
    with pytest.raises(
        AlignmentError, match="the 2 parameters of the calibration, got a list of 1"
    ):
        space.check_same_tensors(pairs[:1])


def test_the_output_projection_of_attention_is_refused_for_hooks() -> None:
    attention = nn.MultiheadAttention(4, 2)
    ParameterSpace(attention).check_hookable()
    with pytest.raises(ParameterError, match=r"`out_proj\.weight` of nn\.MultiheadAttention"):
        ParameterSpace(attention, [(attention.out_proj, "weight")]).check_hookable()


def test_long_lists_of_names_are_shortened_in_messages() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    with pytest.raises(AlignmentError, match=r"0\.weight, .*3\.weight, \.\.\. \(6 in all\)"):
        ParameterSpace(model).check_alignment(torch.zeros(1))
