"""Gates in two processes: every rank draws its own noise and sees its own data, and all agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import Trainer

from tests.integrations.hf_cases import Sentences, arguments
from tests.integrations.processes import (
    PROCESSES,
    accelerator,
    in_two_processes,
    load_all,
    save_from,
)
from torchprune_bayes.gates import attach_gates, fold_gates, gates_of
from torchprune_bayes.integrations.hf import GateCallback
from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.bmrs import BMRSImportance
from torchprune_bayes.training import GateTraining, gate_parameter_groups

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3)
    )


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two ranks hold the same tensors, bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def samples(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(64, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def _both_precisions(folder: Path) -> None:
    rank = accelerator().process_index
    found = {autocast: _trained(rank, autocast) for autocast in (False, True)}
    save_from(rank, found, folder / "found")


def _trained(rank: int, autocast: bool) -> dict[str, Any]:
    model = network()
    gates = attach_gates(model)
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(rank)
    training = GateTraining(wrapped, kl=0.05, prune_every=1)
    optimizer = torch.optim.Adam(gate_parameter_groups(wrapped, 5e-3, multiplier=40.0))
    x, y = samples(rank)
    masks = []
    for _ in range(3):
        for _ in range(15):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = cross_entropy(wrapped(x), y)
            (loss + training.penalty()).backward()
            optimizer.step()
            training.step()
        training.end_epoch()
        masks.append({name: mask.clone() for name, mask in gates.masks.items()})
    noise = gates["2:in"].train()(torch.ones(2, 24)).detach()
    model.eval()
    before = model(x)
    importance = BMRSImportance(gates, criterion=None)
    fold_gates(model)
    shrink(model, x, importance, target="evidence")
    return {
        "masks": masks,
        "noise": noise,
        "state": model.state_dict(),
        "difference": float((model(x) - before).abs().max().detach()),
    }


def test_ranks_close_the_same_gates_and_shrink_to_the_same_model(tmp_path: Path) -> None:
    in_two_processes(_both_precisions, tmp_path)
    ranks = load_all(tmp_path / "found")
    for autocast in (False, True):
        first, second = (found[autocast] for found in ranks)
        assert not torch.equal(first["noise"], second["noise"])
        for ours, theirs in zip(first["masks"], second["masks"], strict=True):
            assert same(ours, theirs)
        closed = [sum(int((~mask).sum()) for mask in masks.values()) for masks in first["masks"]]
        assert 0 < closed[-1] < 36
        assert closed == sorted(closed)
        assert same(first["state"], second["state"])
        left = len(first["state"]["0.weight"]) + len(first["state"]["2.weight"])
        assert left == 36 - closed[-1]
        assert max(first["difference"], second["difference"]) < 1e-5
    assert not same(ranks[0][False]["state"], ranks[0][True]["state"])


class Gated(nn.Module):
    """A network with gates and the interface of a Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        attach_gates(self.body)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(input_ids[:, :6].float() / 30)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def _trained_by_transformers(folder: Path) -> None:
    model = Gated()
    callback = GateCallback(data_size=32, amount=0.25, beyond=True, finetune_epochs=1)
    settings = arguments(folder, max_grad_norm=0.0, num_train_epochs=3, bf16=True)
    run = Trainer(
        model,
        settings,
        train_dataset=Sentences(),
        callbacks=[callback],
        optimizers=(AdamW(gate_parameter_groups(model, 1e-2)), None),
    )
    assert run.accelerator.num_processes == PROCESSES
    run.train()
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    assert callback.training is not None
    closed = [event["closed"] for event in callback.training.history]
    found = (gates_of(model).masks, model.state_dict(), closed)
    save_from(settings.process_index, found, folder / "found")


def test_the_callback_closes_the_same_gates_on_all_ranks(tmp_path: Path) -> None:
    in_two_processes(_trained_by_transformers, tmp_path)
    first, second = load_all(tmp_path / "found")
    assert same(first[0], second[0])
    assert same(first[1], second[1])
    assert first[2] == second[2]
    assert 0 < first[2][0] < first[2][1] == first[2][2] < 36  # the last epoch only trains
    assert first[2][2] == sum(int((~mask).sum()) for mask in first[0].values())
