from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from tests.contracts.state import snapshot, unchanged
from tests.integrations.processes import KILLS, fresh, kill_often
from torchprune_bayes import Calibration, GradualPruner, cubic
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.integrations._checkpoints import (
    check_zeros,
    fingerprint,
    read_pruner,
    save_pruner,
)
from torchprune_bayes.integrations.resume import (
    ResumableShrink,
    load_training,
    save_training,
)
from torchprune_bayes.structured import L1FilterImportance

STEPS = 200


def data(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


def parts(mode: str = "zeros", seed: int = 0) -> dict[str, Any]:
    """A network with dropout, so that random states count as well."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    calibration = Calibration(model, [data(99, 24)], cross_entropy, num_samples=16, seed=5)
    schedule = cubic(0.8, begin=5, end=STEPS - 5, every=5)
    pruner = GradualPruner(
        None,
        "woodfisher",
        schedule,
        calibration=calibration,
        optimizer=optimizer,
        mode=mode,
        damping=1e-3,
    )
    return {"model": model, "optimizer": optimizer, "pruner": pruner}


def train(path: Path, done: Any, mode: str = "zeros", stop: int = STEPS) -> dict[str, Any]:
    """Go on from the checkpoint, saving after each step; ``done`` tells how far it is."""
    torch.set_num_threads(1)
    found = parts(mode)
    torch.manual_seed(1)
    for step in range(load_training(path, **found), stop):
        found["optimizer"].zero_grad()
        inputs, labels = data(step)
        cross_entropy(found["model"](inputs), labels).backward()
        found["optimizer"].step()
        found["pruner"].step()
        save_training(path, step=step + 1, **found)
        done.value = step + 1
    return found


@pytest.mark.parametrize("mode", ["zeros", "hooks"])
def test_killed_and_started_again_ends_in_the_same_masks_and_weights(
    tmp_path: Path, mode: str
) -> None:
    counter = fresh.Value("i", 0, lock=False)
    whole = train(tmp_path / "whole.pt", counter, mode)
    counter.value = 0
    path = tmp_path / "killed.pt"
    kills = kill_often(train, (path, counter, mode), counter, every=5)
    assert kills == KILLS
    again = train(path, counter, mode)
    assert again["pruner"].history == whole["pruner"].history
    assert again["pruner"].sparsity == pytest.approx(0.8, abs=0.01)
    for name, mask in whole["pruner"].masks.items():
        assert torch.equal(again["pruner"].masks[name], mask)
    for name, value in whole["model"].state_dict().items():
        assert torch.equal(again["model"].state_dict()[name], value)


def shrinkable() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average = AveragedModel(model)
    shrinking = ResumableShrink(model, optimizer=optimizer, ema=[average])
    return {"model": model, "optimizer": optimizer, "average": average, "shrinking": shrinking}


def train_and_shrink(found: dict[str, Any], begin: int, stop: int) -> None:
    for step in range(begin, stop):
        if step in (3, 6):  # each cuts half of what is left
            importance = L1FilterImportance()
            found["shrinking"].shrink(data(0)[0], importance, sparsity=0.5, target="channels")
        inputs, labels = data(step)
        found["optimizer"].zero_grad()
        cross_entropy(found["model"](inputs), labels).backward()
        found["optimizer"].step()
        found["average"].update_parameters(found["model"])


@pytest.mark.parametrize("saved_at", [2, 3, 5, 8])
def test_a_shrunk_training_goes_on_bit_for_bit(tmp_path: Path, saved_at: int) -> None:
    whole = shrinkable()
    train_and_shrink(whole, 0, saved_at)
    save_training(tmp_path / "last.pt", step=saved_at, **whole)
    train_and_shrink(whole, saved_at, 10)
    again = shrinkable()
    train_and_shrink(again, load_training(tmp_path / "last.pt", **again), 10)
    assert again["model"][0].out_features < 6
    for part in ("model", "average"):
        for name, value in whole[part].state_dict().items():
            assert torch.equal(again[part].state_dict()[name], value)
    assert again["shrinking"].state_dict()["plans"][1]["shapes"]["0.weight"][0] < 12
    with pytest.raises(ArgumentError, match="original size"):
        again["shrinking"].load_state_dict(whole["shrinking"].state_dict())


def test_a_fresh_start_is_step_zero(tmp_path: Path) -> None:
    assert load_training(tmp_path / "none.pt", **parts()) == 0


def test_refuses_other_parts(tmp_path: Path) -> None:
    found = parts()
    save_training(tmp_path / "last.pt", step=1, **found)
    with pytest.raises(ArgumentError, match="parts"):
        load_training(tmp_path / "last.pt", model=found["model"])


class Failing:
    """A part whose state does not load, after all others."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        raise RuntimeError("does not load")


@pytest.mark.parametrize("mode", ["zeros", "hooks"])
def test_a_part_that_does_not_load_leaves_all_others(tmp_path: Path, mode: str) -> None:
    saved: dict[str, Any] = train(
        tmp_path / "run.pt", fresh.Value("i", 0, lock=False), mode, stop=30
    )
    save_training(tmp_path / "last.pt", step=30, **saved, failing=Failing())
    found = parts(mode, seed=4)
    pruner = found["pruner"].state_dict()
    with (
        unchanged(found["model"], found["optimizer"]),
        pytest.raises(ArgumentError, match="does not load"),
    ):
        load_training(tmp_path / "last.pt", **found, failing=Failing())
    assert found["pruner"].state_dict() == pruner


@pytest.mark.parametrize("saved_at", [4, 8])
def test_cuts_are_undone_when_another_part_does_not_load(tmp_path: Path, saved_at: int) -> None:
    whole = shrinkable()
    train_and_shrink(whole, 0, saved_at)
    save_training(tmp_path / "last.pt", step=saved_at, **whole, failing=Failing())
    found = shrinkable()
    with (
        unchanged(found["model"], found["optimizer"]),
        unchanged(found["average"]),
        pytest.raises(ArgumentError, match="does not load"),
    ):
        load_training(tmp_path / "last.pt", **found, failing=Failing())
    save_training(tmp_path / "last.pt", step=saved_at, **whole)
    assert load_training(tmp_path / "last.pt", **found) == saved_at
    assert found["model"][0].out_features < 12


def test_damaged_and_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    found = parts()
    path = tmp_path / "last.pt"
    save_training(path, step=1, **found)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    flipped = [
        content[:place] + bytes([content[place] ^ 32]) + content[place + 1 :]
        for place in torch.randint(len(content), (40,), generator=generator).tolist()
    ]
    for damaged in (b"", b"text", content[:-40], content[: len(content) // 2], *flipped):
        path.write_bytes(damaged)
        model, optimizer = found["model"], found["optimizer"]
        before, refused = snapshot(model, optimizer), False
        try:
            load_training(path, **found)
        except ArgumentError:  # no other kind
            refused = True
        assert not refused or snapshot(model, optimizer) == before
        found = parts()
    torch.save({"parts": {}}, path)
    with pytest.raises(ArgumentError, match="a training"):
        load_training(path, **parts())


def test_the_file_of_a_pruner_is_checked(tmp_path: Path) -> None:
    found = train(tmp_path / "last.pt", fresh.Value("i", 0, lock=False), stop=30)
    path = tmp_path / "masks.safetensors"
    save_pruner(found["pruner"], path)
    record, masks = read_pruner(path)
    assert record["step"] == 30
    assert record["history"] == found["pruner"].history
    assert fingerprint(masks) == fingerprint(found["pruner"].masks)
    check_zeros(found["pruner"].space, masks)
    with pytest.raises(AlignmentError, match="different checkpoints"):
        check_zeros(parts(seed=3)["pruner"].space, masks)
    changed = {name: ~mask for name, mask in masks.items()}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(changed, path, metadata)
    with pytest.raises(ArgumentError, match="masks of the record"):
        read_pruner(path)
    save_file(masks, path)
    with pytest.raises(ArgumentError, match="masks of a pruner"):
        read_pruner(path)
