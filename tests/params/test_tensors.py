import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from tests.params.cases import two_layers
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.params import ParameterSpace, leaf, mask_of, without_repeats


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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_the_first_place_of_each_tensor_is_kept_in_order(numbers: list[int]) -> None:
    layers = [nn.Linear(1, 1) for _ in range(4)]
    layers[3].weight = layers[0].weight
    found = without_repeats((layers[number], "weight") for number in numbers)
    seen: dict[int, int] = {}
    for number in numbers:
        seen.setdefault(number % 3, number)
    assert [layers.index(module) for module, _ in found] == list(seen.values())  # type: ignore[arg-type]
