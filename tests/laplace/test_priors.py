from __future__ import annotations

import pytest
import torch

from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.laplace import PriorPrecision, PriorStructure

SHAPES = {"conv": (4, 3, 2, 2), "linear": (5, 4), "bias": (5,), "scale": ()}
NUMBERS = {
    "scalar": {"conv": 1, "linear": 1, "bias": 1, "scale": 1},
    "layerwise": {"conv": 1, "linear": 1, "bias": 1, "scale": 1},
    "unitwise": {"conv": 4 + 3, "linear": 5 + 4, "bias": 5, "scale": 1},
    "diag": {"conv": 48, "linear": 20, "bias": 5, "scale": 1},
}


@pytest.mark.parametrize("structure", NUMBERS)
def test_holds_as_few_numbers_as_the_structure_needs(structure):
    prior = PriorPrecision.constant(SHAPES, structure, 3.0)
    for name, shape in SHAPES.items():
        assert sum(f.numel() for f in prior.factors[name]) == NUMBERS[structure][name]
        assert prior.values(name).shape == shape
        assert (prior.values(name) == 3).all()
        assert torch.equal(prior.broadcastable(name).expand(shape), prior.values(name))
        rows = shape[0] if shape else 1
        assert prior.matrix(name).dense().shape == (rows, prior.values(name).numel() // rows)


def test_units_of_a_convolution_are_its_channels():
    prior = PriorPrecision.constant(SHAPES, "unitwise")
    outputs, inputs = torch.rand(4, 1, 1) + 1, torch.rand(1, 3, 1) + 1
    found = prior.with_factors(prior.factors | {"conv": (outputs, inputs)})
    expected = outputs.reshape(4, 1, 1, 1) * inputs.reshape(1, 3, 1, 1)
    torch.testing.assert_close(found.values("conv").float(), expected.expand(4, 3, 2, 2))
    torch.testing.assert_close(found.broadcastable("conv").float(), expected)
    torch.testing.assert_close(
        found.matrix("conv").dense(), found.values("conv").reshape(4, 12).double()
    )


@pytest.mark.parametrize("structure", NUMBERS)
def test_the_state_comes_back(structure, tmp_path):
    prior = PriorPrecision.constant(SHAPES, structure)
    moved = prior.with_factors(
        {name: [f * 2.5 for f in factors] for name, factors in prior.factors.items()}
    )
    torch.save(moved.state_dict(), tmp_path / "prior.pt")
    state = torch.load(tmp_path / "prior.pt", weights_only=True)
    again = prior.from_state_dict(state)
    for name in SHAPES:
        assert torch.equal(again.values(name), moved.values(name))


def test_refuses_a_state_of_another_prior():
    state = PriorPrecision.constant(SHAPES, "unitwise").state_dict()
    with pytest.raises(AlignmentError, match="layerwise prior"):
        PriorPrecision.constant(SHAPES, "layerwise").from_state_dict(state)
    with pytest.raises(AlignmentError, match="same tensors"):
        PriorPrecision.constant({"other": (3,)}, "unitwise").from_state_dict(state)


def test_names_of_structures():
    assert PriorStructure.of("parameterwise") is PriorStructure.of("diag") is PriorStructure.DIAG
    with pytest.raises(ArgumentError, match="'parameterwise', got 'diagonal'"):
        PriorPrecision.constant(SHAPES, "diagonal")
    with pytest.raises(ArgumentError, match="positive"):
        PriorPrecision.constant(SHAPES, "diag", 0.0)
