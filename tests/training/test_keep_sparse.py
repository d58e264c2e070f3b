from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from torchprune_bayes import bake, prune_global
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.training import keep_sparse

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def pruned(self) -> Network:
        """Half of all weights pruned by PyTorch, in place."""
        prune_global([(self.first, "weight"), (self.last, "weight")], "magnitude", amount=0.5)
        return self


def masks_for(model: nn.Module) -> dict[Tensor, Tensor]:
    return {p: torch.rand_like(p) < 0.5 for p in model.parameters() if p.ndim == 2}


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> Iterator[None]:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        yield


def moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    return [
        value
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("state", [True, False])
def test_zeros_hold_after_every_step(name: str, state: bool) -> None:
    model = Network()
    optimizer = OPTIMIZERS[name](model.parameters())
    list(train(model, optimizer, 3))  # so that there is momentum to hold back
    masks = masks_for(model)
    keep_sparse(optimizer, masks, state=state)
    for _ in train(model, optimizer, 10):
        for parameter, mask in masks.items():
            assert torch.equal(parameter != 0, mask)
            found = moments(optimizer, parameter)
            assert found
            assert all(bool((moment[~mask] == 0).all()) == state for moment in found)


def test_zeros_hold_at_once_and_without_a_sign() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[-torch.inf, -1.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    keep_sparse(optimizer, {layer.weight: torch.tensor([[0.0, 1.0]])})
    assert torch.equal(1 / layer.weight, torch.tensor([[torch.inf, -1.0]]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_go_their_way_as_without_it(name: str) -> None:
    torch.manual_seed(0)
    paths = []
    for masked in (True, False):
        weight = nn.Parameter(torch.linspace(-1, 1, 12))
        optimizer = OPTIMIZERS[name]([weight])
        if masked:
            keep_sparse(optimizer, {weight: torch.arange(12) % 2 == 1})
        for step in range(5):
            weight.grad = torch.sin(step + torch.arange(12.0))
            optimizer.step()
        paths.append(weight.detach()[1::2])
    assert torch.equal(*paths)


def test_removed_handle_lets_zeros_go() -> None:
    model = Network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    masks = masks_for(model)
    keep_sparse(optimizer, masks).remove()
    list(train(model, optimizer, 1))
    assert not any(torch.equal(parameter != 0, mask) for parameter, mask in masks.items())


@pytest.mark.parametrize("baked", [True, False])
def test_model_brings_its_own_masks(baked: bool) -> None:
    model = Network().pruned()
    if baked:
        bake(model)
    nn.init.zeros_(model.last.bias)  # never pruned, so it learns
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    leaves = [p for p in model.parameters() if p.ndim == 2]
    keep_sparse(optimizer, model)
    for _ in train(model, optimizer, 3):
        assert sum(int((leaf == 0).sum()) for leaf in leaves) == 36
    assert torch.all(model.last.bias != 0)


def test_model_with_any_tensor_pruned_by_the_host() -> None:
    model = Network()
    prune.random_unstructured(model.first, "bias", amount=3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    keep_sparse(optimizer, model)
    list(train(model, optimizer, 2))
    assert int((model.state_dict()["first.bias_orig"] == 0).sum()) == 3


def test_of_a_model_only_what_the_optimizer_has() -> None:
    model = Network().pruned()
    optimizer = OPTIMIZERS["sgd"](model.first.parameters())
    keep_sparse(optimizer, model)
    assert torch.all(model.state_dict()["last.weight_orig"] != 0)


def test_refusals_change_nothing() -> None:
    model, other = Network(), Network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(AlignmentError, match="got 2 others, the first of shape"):
        keep_sparse(optimizer, masks_for(other))
    zeros = {model.first.weight: torch.zeros(8, 6), model.last.weight: torch.zeros(8, 3)}
    with pytest.raises(AlignmentError, match=r"shape \(3, 8\) like its parameter, got \(8, 3\)"):
        keep_sparse(optimizer, zeros)
    with pytest.raises(ArgumentError, match="Expected a pruned model"):
        keep_sparse(optimizer, model)
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer._optimizer_step_post_hooks


@pytest.fixture
def one_process_group() -> Iterator[None]:
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented, not typed

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_sharded_parameters_hold_zeros_in_their_local_part(one_process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Network()
    masks = {name: torch.rand_like(p) < 0.5 for name, p in model.named_parameters() if p.ndim == 2}
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    sharded: dict[str, Any] = dict(model.named_parameters())
    keep_sparse(optimizer, {sharded[name]: mask for name, mask in masks.items()})
    for _ in train(model, optimizer, 3):
        for name, mask in masks.items():
            assert torch.equal(sharded[name].full_tensor() != 0, mask)
    optimizer.zero_grad()
    model(torch.randn(16, 6)).square().mean().backward()
    for name, mask in masks.items():  # before any optimizer has seen them
        gradient = sharded[name].grad.full_tensor()
        assert gradient.any()
        assert not gradient[~mask].any()
