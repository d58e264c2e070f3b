from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.calibration.cases import CLASSES, collected, mlp_calibration, mlp_data
from torchprune_bayes import Calibration
from torchprune_bayes.errors import CalibrationError


class Branching(nn.Module):
    """Control flow that depends on data, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.layer(inputs)
        return -output if bool(output.sum() > 0) else output


class _WrongUnderVmap(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], inputs: Tensor) -> tuple[Tensor, int]:
        return 2 * inputs, in_dims[0]


class ChangedByVmap(nn.Module):
    """Runs under vmap and gives something else there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return _WrongUnderVmap.apply(self.layer(inputs))


def test_the_engine_is_known_after_the_first_pass() -> None:
    calibration = mlp_calibration()
    assert calibration.engine is None
    collected(calibration)
    assert calibration.engine == "vmap"


def test_forbidding_vmap_is_said() -> None:
    calibration = mlp_calibration(vectorize=False)
    collected(calibration)
    assert calibration.engine == "sequential (vectorize=False)"


def test_a_model_that_cannot_be_vmapped_falls_back_and_says_why() -> None:
    calibration = mlp_calibration(Branching().double())
    found = collected(calibration)
    assert str(calibration.engine).startswith("sequential (vmap fails: vmap:")
    expected = collected(mlp_calibration(calibration.model, vectorize=False))
    assert torch.equal(found, expected)


def test_mini_batches_through_convolutions_go_one_by_one_unless_vmap_is_forced() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(8, CLASSES)).double()
    data = [(inputs.unsqueeze(1), targets) for inputs, targets in mlp_data((4, 5, 3))]
    one_by_one = Calibration(model, data, cross_entropy, mini_batch=4)
    expected = collected(one_by_one)
    assert one_by_one.engine == "sequential (mini-batches through convolutions)"
    forced = Calibration(model, data, cross_entropy, mini_batch=4, vectorize=True)
    torch.testing.assert_close(collected(forced), expected)
    assert forced.engine == "vmap"


def test_forced_vmap_does_not_fall_back() -> None:
    with pytest.raises(CalibrationError, match="vmap can run for vectorize=True, got: vmap"):
        collected(mlp_calibration(Branching().double(), vectorize=True))


def test_a_model_that_vmap_changes_falls_back_and_says_by_how_much() -> None:
    calibration = mlp_calibration(ChangedByVmap().double())
    found = collected(calibration)
    assert str(calibration.engine).startswith("sequential (vmap differs by ")
    expected = collected(mlp_calibration(calibration.model, vectorize=False))
    assert torch.equal(found, expected)


def test_a_first_sample_without_gradients_does_not_prevent_vmap() -> None:
    data = mlp_data((4,))
    data[0][0][0] = 0.0
    model = nn.Linear(5, CLASSES, bias=False).double()
    calibration = Calibration(model, data, cross_entropy)
    assert not collected(calibration)[0].any()
    assert calibration.engine == "vmap"


def test_operations_that_vmap_loops_over_give_no_warning() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(24, CLASSES))
    data = [(torch.randn(4, 3, 8), torch.randint(CLASSES, (4,)))]
    vectorized = Calibration(model, data, cross_entropy)
    found = collected(vectorized)
    assert vectorized.engine == "vmap"
    expected = collected(Calibration(model, data, cross_entropy, vectorize=False))
    torch.testing.assert_close(found, expected)
