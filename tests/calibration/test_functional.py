from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.calibration.cases import assert_same, collected, conv_net
from tests.contracts.state import unchanged
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.calibration.functional import FunctionalModel, preserved
from torchprune_bayes.errors import ArgumentTypeError, CalibrationError
from torchprune_bayes.params import ParameterSpace


class Noting(nn.Module):
    """Notes down in attributes and in buffers what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.calls = 0
        self.moved: Tensor
        self.register_buffer("uses", torch.zeros(()))
        self.register_buffer("moved", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.layer(inputs)
        self.get_buffer("uses").add_(1)
        self.moved = self.moved + 1
        return self.last


class Merging(nn.Linear):
    """Adds something to its weight when it is put into eval mode, as adapters do."""

    def train(self, mode: bool = True) -> "Merging":
        if not mode:
            self.weight.data += 1.0
        return super().train(mode)


def test_the_model_is_in_eval_mode_inside_and_in_its_own_modes_after() -> None:
    model = conv_net()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with preserved(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_layers_that_change_their_weights_in_eval_mode_do_not() -> None:
    model = nn.Sequential(Merging(2, 2))
    with unchanged(model), preserved(model):
        assert not model[0].training


def test_what_a_model_notes_down_is_forgotten() -> None:
    model = Noting()
    functional = FunctionalModel(ParameterSpace(model), cross_entropy, torch.device("cpu"))
    batch = (torch.randn(4, 5), torch.randint(3, (4,)))
    with unchanged(model), preserved(model):
        leaves, constants = functional.bind(None, functional.space.names)
        functional.mean_gradients(leaves, constants, [batch])
    assert model.calls == 0
    assert not hasattr(model, "last")


@pytest.mark.parametrize("ran_before", [True, False])
def test_the_hosts_view_of_a_pruned_weight_stays_the_same_object(ran_before: bool) -> None:
    model = conv_net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[0], "weight", amount=0.5)  # a container of two hooks
    if ran_before:
        model(torch.randn(2, 2, 6, 6).double())
    view, data = model[0].weight, _conv_batch()
    with unchanged(model):
        collected(Calibration(model, data, cross_entropy))
    assert model[0].weight is view


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_other_hooks_that_assign_weights_leave_nothing_behind(norm: Any) -> None:
    model = conv_net()
    norm(model[0])
    data = _conv_batch()
    model.eval()(data[0][0])
    with unchanged(model):
        collected(Calibration(model, data, cross_entropy, [(model[6], "weight")]))


def test_a_tied_weight_can_be_given_by_either_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids).tanh())

    torch.manual_seed(0)
    model = Tied().double()
    data = [(torch.arange(6), torch.randint(6, (6,)))]
    cross_entropy(model(data[0][0]), data[0][1]).backward()
    expected = model.head.weight.grad
    assert expected is not None
    for layer in (model.embedding, model.head):
        calibration = Calibration(model, data, cross_entropy, [(layer, "weight")])
        (found,) = calibration.mean_gradient().values()
        assert_same(found, expected)
        torch.testing.assert_close(collected(calibration).mean(0), found.flatten())


def test_inputs_may_be_tensors_tuples_or_mappings() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(left + right)

    model, left, right = Sum(), torch.randn(3, 4), torch.randn(3, 4)
    target = torch.tensor([0, 1, 1])
    expected = collected(Calibration(model.layer, [(left + right, target)], cross_entropy))
    batches: list[Any] = [
        ((left, right), target),
        ([left, right], target),
        ({"left": left, "right": right}, target),
        {"left": left, "right": right, "labels": target},
    ]
    for batch in batches:
        torch.testing.assert_close(collected(Calibration(model, [batch], cross_entropy)), expected)


def test_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="a tensor, a tuple or a mapping, got str"):
        collected(Calibration(nn.Linear(2, 2), [("text", torch.zeros(2))], cross_entropy))


def test_data_that_require_gradients_stay_out_of_it() -> None:
    inputs = torch.randn(3, 4, requires_grad=True)
    calibration = Calibration(nn.Linear(4, 2), [(inputs, torch.tensor([0, 1, 1]))], cross_entropy)
    assert not any(rows.requires_grad for rows in calibration.gradients())
    assert inputs.grad is None


def test_only_the_wanted_tensors_are_differentiated() -> None:
    model = conv_net()
    space = ParameterSpace(model, prunable_parameters(model))
    functional = FunctionalModel(space, cross_entropy, torch.device("cpu"))
    leaves, constants = functional.bind(None, ["3.weight"])
    assert list(leaves) == ["3.weight"]
    assert "3.weight" not in constants
    assert "0.weight" in constants
    assert not any(value.requires_grad for value in constants.values())
    assert list(functional.mean_gradients(leaves, constants, _conv_batch())) == ["3.weight"]


def _conv_batch() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 2, 6, 6).double(), torch.tensor([0, 1, 2, 0]))]


class Overwriting(nn.Module):
    """Keeps a running state in one tensor, as RWKV does when it caches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = self.a(x)
        squares = state * state
        state[:, 0] = 0.0
        return self.b(squares)


def test_a_model_that_overwrites_what_gradients_need_is_refused_with_a_remedy() -> None:
    model = Overwriting()
    data = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with unchanged(model), pytest.raises(CalibrationError, match="use_cache=False"):
        collected(Calibration(model, data, cross_entropy))
