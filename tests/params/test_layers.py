from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.params.cases import tied, two_layers
from torchprune_bayes import prunable_parameters
from torchprune_bayes.errors import ArgumentTypeError, ParameterError, ParameterWarning
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.params import ParameterSpace, unwrap


def listed(model: nn.Module, **options: Any) -> list[str]:
    names = {module: name for name, module in unwrap(model).named_modules()}
    return [f"{names[module]}.{name}" for module, name in prunable_parameters(model, **options)]


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


class Stack(nn.Module):
    """Experts in one tensor, as newer versions of transformers have them."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.ones(experts, 2, 2)) for _ in range(2))


def test_stacks_of_matrices_that_no_kind_of_layer_knows_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Stack(experts=6))
    with pytest.warns(ParameterWarning, match=r"`1\.up` and 1 more, with 75% of the weights"):
        assert listed(model) == ["0.weight"]


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(lambda: Stack(experts=1), id="one matrix, as of positions"),
        pytest.param(lambda: Stack(experts=6).requires_grad_(False), id="frozen"),
        pytest.param(lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), id="computed"),
        pytest.param(lambda: nn.LSTM(4, 4), id="matrices"),
    ],
)
def test_other_tensors_that_are_not_listed_are_not_reported(layer: Any) -> None:
    assert listed(nn.Sequential(nn.Linear(4, 4), layer())) == ["0.weight"]


def test_excluded_stacks_are_not_reported() -> None:
    assert listed(nn.Sequential(nn.Linear(4, 4), Stack(6)), exclude=["1"]) == ["0.weight"]


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
    assert kind_of(mine(2, 2)).input_dim == 1
    assert kind_of(theirs()).input_dim == 0


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.spectral_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
    ],
)
def test_weights_that_are_computed_from_others_are_left_out_or_refused(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert listed(model) == ["1.weight"]
    with pytest.raises(ParameterError, match=r"computes from others|parametrized"):
        ParameterSpace(model, [(model[0], "weight")])
