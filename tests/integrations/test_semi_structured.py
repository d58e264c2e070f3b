from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from torchprune_bayes import Calibration, bake, prunable_parameters, prune_global
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.integrations.semi_structured import follows_pattern, to_semi_structured

# PyTorch says once that the interface may change.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


@pytest.fixture
def model() -> nn.Module:
    """Two wide linear layers pruned 2:4 by WoodFisher, and a dense classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.Linear(64, 4))
    params = prunable_parameters(net, exclude=["3"])
    data = [(torch.randn(16, 64), torch.randint(4, (16,))) for _ in range(4)]
    calibration = Calibration(net, data, cross_entropy, params=params, num_samples=32)
    prune_global(params, "woodfisher", amount=None, calibration=calibration, pattern="2:4")
    bake(net)
    return net


def test_the_pattern_runs_along_the_inputs(model: nn.Module) -> None:
    for index in (0, 2):
        weight: Tensor = model[index].weight.detach()  # type: ignore[index]
        assert ((weight != 0).view(len(weight), -1, 4).sum(-1) == 2).all()
        assert not ((weight.mT != 0).reshape(weight.shape[1], -1, 4).sum(-1) == 2).all()


def test_pytorch_packs_the_weights_without_loss(model: nn.Module) -> None:
    for index in (0, 2):
        weight: Tensor = model[index].weight.detach().half()  # type: ignore[index]
        packed, places = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.numel() == weight.numel() // 2
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, places), weight)


def test_what_is_no_pattern() -> None:
    assert not follows_pattern(torch.ones(4, 8))
    assert not follows_pattern(torch.zeros(4, 6))
    assert not follows_pattern(torch.zeros(4, 8, 1))
    assert follows_pattern(torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]))
    assert not follows_pattern(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]))


def test_a_cpu_is_refused_and_nothing_changes(model: nn.Module) -> None:
    before = deepcopy(model.state_dict())
    with pytest.raises(ParameterError, match=r"`0\.weight`.* on cpu"):
        to_semi_structured(model.half())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(model[0].weight, before["0.weight"].half())  # type: ignore[index]


def test_a_dense_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="got none among 1"):
        to_semi_structured(model, exclude=["0", "2"])


def test_all_layers_with_the_pattern_are_packed(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing itself needs no GPU, only the products do."""
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    check = "_validate_device_dim_dtype_shape"
    monkeypatch.setattr(
        SparseSemiStructuredTensorCUTLASS, check, classmethod(lambda cls, tensor: None)
    )
    before = deepcopy(model.half().state_dict())
    assert to_semi_structured(model) == ["0", "2"]
    assert type(model[3].weight) is nn.Parameter  # type: ignore[index]
    for index in (0, 2):
        packed = model[index].weight  # type: ignore[index]
        assert isinstance(packed, SparseSemiStructuredTensor)
        found = sparse_semi_structured_to_dense_cutlass(packed.packed, packed.meta)
        assert torch.equal(found, before[f"{index}.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse products need a GPU")
def test_packed_layers_compute_the_same(model: nn.Module) -> None:
    inputs = torch.randn(64, 64, device="cuda", dtype=torch.float16)
    model.half().cuda()
    with torch.no_grad():
        expected = model(inputs)
        assert to_semi_structured(model) == ["0", "2"]
        torch.testing.assert_close(model(inputs), expected, rtol=1e-2, atol=1e-2)
