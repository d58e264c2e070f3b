"""``shrink`` interrupted at any line leaves model, averages and optimizer as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.interruptions import interrupted_everywhere
from torchprune_bayes.structured import L1FilterImportance, shrink

CHANGING = {"shrink", "_cut", "undo", "redo", "slice_ema", "slice_optimizer", "_report"}


def contents(models: list[nn.Module], optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything by identity, and values where they may be written to."""
    found: list[Any] = []
    for model in models:
        for module in model.modules():
            plain = {key: v for key, v in vars(module).items() if not key.startswith("_")}
            tensors = {**module._parameters, **module._buffers}
            found.append({key: (id(t), t.tolist()) for key, t in tensors.items() if t is not None})
            found.append(plain)
    found += [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for parameter, state in optimizer.state.items():
        found.append((id(parameter), {key: value.tolist() for key, value in state.items()}))
    return found


def test_shrinking_is_done_or_not_done() -> None:
    def prepare() -> tuple[Callable[[], Any], Any]:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2)]
        model, x = nn.Sequential(*layers), torch.randn(3, 4)
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.Adam(model.parameters())
        model(x).sum().backward()
        optimizer.step()
        models: list[nn.Module] = [model, average]
        before = contents(models, optimizer)

        def run() -> None:
            shrink(
                model,
                x,
                L1FilterImportance(),
                sparsity=0.5,
                target="channels",
                optimizer=optimizer,
                ema=average,
            )

        return run, (models, optimizer, before)

    for models, optimizer, before in interrupted_everywhere(prepare, CHANGING, stride=13):
        assert contents(models, optimizer) == before
