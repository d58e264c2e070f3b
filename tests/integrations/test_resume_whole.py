"""A training is loaded whole or not at all."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.training.gradual_cases import Network, batch
from torchprune_bayes import GradualPruner, linear
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations.resume import ResumableShrink, load_training, save_training
from torchprune_bayes.structured import L1FilterImportance


class Last:
    """A part that is loaded after all others, and fails."""

    def __init__(self) -> None:
        self.fails = False

    def state_dict(self) -> dict[str, Any]:
        return {"fails": False}

    def load_state_dict(self, state_dict: Any, /) -> None:
        if self.fails:
            raise KeyError("nothing of mine")


def trained(mode: str, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = linear(0.5, 1, 4)
    pruner = GradualPruner(model, "magnitude", schedule, optimizer=optimizer, mode=mode)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        scheduler.step()
        pruner.step()
    named = {"model": model, "optimizer": optimizer, "pruner": pruner, "scheduler": scheduler}
    return {**named, "zlast": Last()}


def described(parts: dict[str, Any]) -> list[Any]:
    model, optimizer = parts["model"], parts["optimizer"]
    state = copy.deepcopy({n: parts[n].state_dict() for n in parts if n != "zlast"})
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    held = [len(p._backward_hooks or ()) for p in model.parameters()]
    steps = [len(optimizer._optimizer_step_post_hooks)]
    ours = [id(p) for p in model.parameters()] + [
        id(p) for group in optimizer.param_groups for p in group["params"]
    ]
    return [state, hooks, held, steps, ours, random.getstate(), torch.get_rng_state()]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def damaged(content: bytes, kind: str) -> bytes:
    return {"empty": b"", "cut": content[: len(content) // 2], "foreign": b"PK" * 99}[kind]


@pytest.mark.parametrize(("mode", "steps"), [("zeros", 0), ("zeros", 3), ("hooks", 0)])
def test_what_fails_at_the_last_part_changes_none(tmp_path: Path, mode: str, steps: int) -> None:
    path = tmp_path / "last.pt"
    save_training(path, step=4, **trained(mode, 4, seed=0))
    parts = trained(mode, steps, seed=1)
    before = described(parts)
    parts["zlast"].fails = True
    with pytest.raises(ArgumentError, match=r"Expected a training of these parts in .*nothing"):
        load_training(path, **parts)
    assert same(before, described(parts))
    parts["zlast"].fails = False
    assert load_training(path, **parts) == 4
    assert parts["pruner"].sparsity == 0.5


@pytest.mark.parametrize("kind", ["empty", "cut", "foreign"])
def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.pt"
    save_training(path, step=4, **trained("zeros", 4, seed=0))
    content = path.read_bytes()
    path.write_bytes(damaged(content, kind))
    parts = trained("zeros", 2, seed=1)
    before = described(parts)
    with pytest.raises(ArgumentError, match="Expected a training"):
        load_training(path, **parts)
    assert same(before, described(parts))


def test_a_model_of_another_size_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    small = nn.Linear(6, 2)
    save_training(path, step=1, model=small, optimizer=torch.optim.SGD(small.parameters(), lr=0.1))
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ArgumentError, match="a training of these parts"):
        load_training(path, model=model, optimizer=optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_cut_is_taken_back_too(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters())
        model(batch(0)[0]).sum().backward()
        optimizer.step()
        shrinking = ResumableShrink(model, optimizer=optimizer)
        return {"model": model, "optimizer": optimizer, "shrink": shrinking, "zlast": Last()}

    first = make()
    example = batch(0)[0]
    first["shrink"].shrink(example, L1FilterImportance(), sparsity=0.5, target="channels")
    save_training(tmp_path / "last.pt", step=1, **first)
    again = make()
    before = described(again)
    again["zlast"].fails = True
    with pytest.raises(ArgumentError, match="nothing"):
        load_training(tmp_path / "last.pt", **again)
    assert same(before, described(again))
    assert again["model"][0].out_features == 8
    again["zlast"].fails = False
    load_training(tmp_path / "last.pt", **again)
    assert again["model"][0].out_features == 4
