from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from tests.integrations.processes import fresh
from torchprune_bayes import Calibration, EmpiricalFisher, GradualPruner, cubic
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.integrations._checkpoints import (
    check_zeros,
    fingerprint,
    read_pruner,
    save_pruner,
)
from torchprune_bayes.integrations.resume import (
    CheckpointedCalibration,
    ResumableShrink,
    load_training,
    save_training,
)
from torchprune_bayes.structured import L1FilterImportance

KILLS = 20
STEPS = 200
ONE_AT_A_TIME = 1e-3  # MiB, less than two gradients take


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


def wait_for(progress: Any, wanted: int, process: BaseProcess) -> None:
    while progress.value < wanted and process.is_alive():
        time.sleep(1e-4)


def kill_often(target: Callable[..., Any], args: tuple[Any, ...], progress: Any, every: int) -> int:
    """Start ``target`` again and again and kill it within its next ``every`` steps."""
    kills = 0
    while kills < KILLS:
        process = fresh.Process(target=target, args=args)
        process.start()
        wait_for(progress, progress.value + random.randrange(1, every), process)
        time.sleep(random.random() * 0.004)  # so that it is hit anywhere in a step, saving included
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    return kills


@pytest.mark.parametrize("mode", ["zeros", "hooks"])
def test_killed_and_started_again_ends_in_the_same_masks_and_weights(
    tmp_path: Path, mode: str
) -> None:
    counter = fresh.Value("i", 0)
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


def collect(folder: Path, done: Any, path: Path) -> None:
    torch.set_num_threads(1)
    calibration = checkpointed(folder, memory_mb=ONE_AT_A_TIME)
    rows = []
    for part in calibration.gradients():
        rows.append(part)
        done.value += 1
        time.sleep(1e-3)  # as a large model would take
    save_file({"rows": torch.cat(rows)}, path)


class Counted(nn.Sequential):
    forwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        type(self).forwards += 1
        return super().forward(inputs)


def checkpointed(folder: Path, memory_mb: float = 1024.0) -> CheckpointedCalibration:
    torch.manual_seed(0)
    model = Counted(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return CheckpointedCalibration(
        folder,
        model,
        [data(seed) for seed in range(8)],
        cross_entropy,
        mini_batch=2,
        memory_mb=memory_mb,
    )


def test_a_killed_collection_of_gradients_goes_on(tmp_path: Path) -> None:
    counter = fresh.Value("i", 0)
    plain = Calibration(
        checkpointed(tmp_path).model,
        [data(seed) for seed in range(8)],
        cross_entropy,
        mini_batch=2,
        memory_mb=ONE_AT_A_TIME,  # other batches round differently
    )
    args = (tmp_path / "kept", counter, tmp_path / "rows")
    assert kill_often(collect, args, counter, every=6) > 3
    collect(*args)
    assert torch.equal(load_file(tmp_path / "rows")["rows"], torch.cat(list(plain.gradients())))


def test_kept_gradients_are_not_computed_again(tmp_path: Path) -> None:
    calibration = checkpointed(tmp_path)
    fisher = EmpiricalFisher(damping=0.1).fit(calibration)
    Counted.forwards = 0
    again = EmpiricalFisher(damping=0.1).fit(checkpointed(tmp_path))
    assert Counted.forwards == 0
    assert torch.equal(fisher.inverse_diagonal(), again.inverse_diagonal())


def test_other_weights_masks_and_draws_are_other_gradients(tmp_path: Path) -> None:
    calibration = checkpointed(tmp_path)
    list(calibration.gradients())
    moved = {name: value + 1 for name, value in calibration.space.values().items()}
    masks = {name: torch.rand(value.shape) > 0.5 for name, value in moved.items()}
    seen = calibration.with_space(calibration.space.with_masks(masks))
    for other, weights in ((calibration, moved), (seen, None), (calibration.fresh(1), None)):
        Counted.forwards = 0
        plain = Calibration.gradients(other, weights)
        assert all(map(torch.equal, other.gradients(weights), plain))
        assert Counted.forwards > 0


def test_refuses_labels_drawn_along_the_way(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="true"):
        CheckpointedCalibration(tmp_path, nn.Linear(2, 2), [], cross_entropy, fisher="true")


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
    with pytest.raises(ArgumentError, match="still whole"):
        again["shrinking"].load_state_dict(whole["shrinking"].state_dict())


def test_a_fresh_start_is_step_zero(tmp_path: Path) -> None:
    assert load_training(tmp_path / "none.pt", **parts()) == 0


def test_refuses_other_parts(tmp_path: Path) -> None:
    found = parts()
    save_training(tmp_path / "last.pt", step=1, **found)
    with pytest.raises(ArgumentError, match="parts"):
        load_training(tmp_path / "last.pt", model=found["model"])


def test_the_file_of_a_pruner_is_checked(tmp_path: Path) -> None:
    found = train(tmp_path / "last.pt", fresh.Value("i", 0), stop=30)
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
    with pytest.raises(ArgumentError, match="on record"):
        read_pruner(path)
    save_file(masks, path)
    with pytest.raises(ArgumentError, match="record"):
        read_pruner(path)
