from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.contracts.state import unchanged
from torchprune_bayes import prunable_parameters
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, ParameterError
from torchprune_bayes.params import (
    ParameterSpace,
    is_hf_conv1d,
    leaf,
    mask_of,
    unwrap,
    without_repeats,
)


def two_layers() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def tied() -> Any:
    """An embedding, a first layer, and a head that shares the embedding's weight."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    return model


def listed(model: nn.Module, **options: Any) -> list[str]:
    names = {module: name for name, module in unwrap(model).named_modules()}
    return [f"{names[module]}.{name}" for module, name in prunable_parameters(model, **options)]


# Which tensors


def test_weights_of_linear_and_convolution_layers_are_listed_in_order() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 1, 1),
        nn.BatchNorm1d(1),
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.LayerNorm(1)),
        nn.ConvTranspose1d(1, 1, 1),
        nn.ConvTranspose2d(1, 1, 1),
        nn.ConvTranspose3d(1, 1, 1),
        nn.Embedding(2, 2),
        nn.LSTM(1, 1),
        nn.Linear(1, 1),
        nn.Bilinear(1, 1, 1),
    )
    layers = ["0", "2.0", "2.1", "3", "4", "5", "8"]
    assert listed(model) == [f"{layer}.weight" for layer in layers]


def test_the_input_projections_of_attention_are_listed() -> None:
    model = nn.ModuleDict(
        {"same": nn.MultiheadAttention(4, 2), "other": nn.MultiheadAttention(4, 2, kdim=3, vdim=5)}
    )
    assert listed(model) == [
        "same.in_proj_weight",
        *(f"other.{kind}_proj_weight" for kind in "qkv"),
    ]


def test_frozen_and_parametrized_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    parametrizations.weight_norm(model[1])
    assert listed(model) == ["2.weight"]


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes_are_left_out() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert listed(model) == ["1.weight"]


def test_a_weight_that_is_tied_to_an_embedding_is_left_out_wherever_the_embedding_is() -> None:
    assert listed(tied()) == ["1.weight"]
    model = nn.Sequential(*reversed(tied()))
    assert listed(model) == ["1.weight"]


def test_other_tied_weights_are_listed_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert listed(model) == ["0.weight", "1.weight"]
    layer = nn.Linear(3, 3)
    assert listed(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


def test_pruned_weights_are_listed_under_their_own_name() -> None:
    model = two_layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert listed(model) == ["0.weight", "2.weight"]


def test_modules_can_be_left_out_with_everything_inside() -> None:
    inner = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model = nn.Sequential(nn.Linear(1, 1), inner)
    model.add_module("10", nn.Linear(1, 1))
    assert listed(model, exclude=["1"]) == ["0.weight", "10.weight"]  # "10" is not inside "1"
    assert listed(model, exclude=[inner[0], "0"]) == ["1.1.weight", "10.weight"]
    assert listed(model, exclude=iter(["0"])) == ["1.0.weight", "1.1.weight", "10.weight"]


@pytest.mark.parametrize("everything", [["0", "2"], [""], "self"])
def test_a_model_with_nothing_left_is_refused(everything: Any) -> None:
    model = two_layers()
    exclude = [model] if everything == "self" else everything
    with pytest.raises(ParameterError, match="weights in Sequential, got none"):
        prunable_parameters(model, exclude=exclude)


@pytest.mark.parametrize("item", ["3", "0.weight", nn.Linear(1, 1), 0])
def test_names_that_do_not_exist_cannot_be_left_out(item: Any) -> None:
    with pytest.raises(ParameterError, match="`exclude` to name modules of the model"):
        prunable_parameters(two_layers(), exclude=[item])


def test_one_name_is_not_a_list_of_names() -> None:
    with pytest.raises(ArgumentTypeError, match="`exclude` to be a list of names, got '0'"):
        prunable_parameters(two_layers(), exclude="0")


@pytest.mark.parametrize("model", [None, "resnet18", lambda inputs: inputs])
def test_something_that_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"`model` to be an nn\.Module"):
        prunable_parameters(model)


def test_wrappers_are_looked_through() -> None:
    model = two_layers()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert unwrap(wrapped) is model  # type: ignore[arg-type]  # typed as a function
    assert listed(wrapped) == ["0.weight", "2.weight"]  # type: ignore[arg-type]
    assert unwrap(model) is model


def test_only_hugging_faces_conv1d_is_a_linear_layer() -> None:
    mine = type("Conv1D", (nn.Linear,), {})
    theirs = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    assert not is_hf_conv1d(mine(2, 2))
    assert is_hf_conv1d(theirs())


# One tensor


def test_the_leaf_is_the_same_object_before_and_after_pruning() -> None:
    model = two_layers()
    weight = model[0].weight
    (tensor, _) = ParameterSpace(model)
    assert (leaf(model[0], "weight"), tensor.leaf, tensor.leaf_name) == (weight, weight, "0.weight")
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert tensor.leaf is weight
    assert tensor.leaf_name == "0.weight_orig"
    assert tensor.name == "0.weight"
    assert leaf(model[0], "nothing") is None


def test_values_are_masked_also_where_the_optimizer_moved_the_leaf() -> None:
    model = two_layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[0].weight_orig.fill_(7.0)
    space = ParameterSpace(model)
    mask = model[0].weight_mask
    assert torch.equal(space.masks()["0.weight"], mask.bool())
    assert torch.equal(space.values()["0.weight"], 7 * mask)
    assert space.values()["2.weight"].data_ptr() == model[2].weight.data_ptr()  # not copied
    assert space.masks()["2.weight"].all()
    assert not any(value.requires_grad for value in space.values().values())


def test_masks_of_half_precision_weights_are_boolean() -> None:
    model = two_layers().bfloat16()
    prune.l1_unstructured(model[0], "weight", 0.5)
    tensor = ParameterSpace(model)[0]
    assert tensor.mask.dtype == torch.bool
    assert tensor.value.dtype == torch.bfloat16


def test_a_buffer_called_mask_is_not_taken_for_the_hosts() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("weight_mask", torch.zeros(2, 2))
    assert mask_of(layer, "weight") is None
    assert ParameterSpace(layer)[0].mask.all()


def test_a_tensor_that_was_removed_since_is_an_error() -> None:
    model = two_layers()
    tensor = ParameterSpace(model)[0]
    del model[0].weight
    with pytest.raises(ParameterError, match=r"a parameter `0\.weight`, got none: was it removed"):
        _ = tensor.leaf


# Spaces


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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_the_first_place_of_each_tensor_is_kept_in_order(numbers: list[int]) -> None:
    layers = [nn.Linear(1, 1) for _ in range(4)]
    layers[3].weight = layers[0].weight
    found = without_repeats((layers[number], "weight") for number in numbers)
    seen: dict[int, int] = {}
    for number in numbers:
        seen.setdefault(number % 3, number)
    assert [layers.index(module) for module, _ in found] == list(seen.values())  # type: ignore[arg-type]


def _lazy() -> Any:
    return nn.Sequential(nn.LazyLinear(2))


def _frozen() -> Any:
    return two_layers().requires_grad_(False)


def _parametrized() -> Any:
    model = two_layers()
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def _complex() -> Any:
    return nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "missing": (two_layers, "gain", r"Expected a parameter `0\.gain`, got none in Linear"),
    "frozen": (_frozen, "weight", r"got `0\.weight` with requires_grad=False"),
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


# Parts, masks and comparisons


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
    with pytest.raises(AlignmentError, match=r"Expected the 16 live entries .*, got 18: pass"):
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
