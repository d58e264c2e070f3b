"""Gradients kept in a folder: gone on with when killed, and never those of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from tests.calibration.checkpointed_cases import (
    GRADIENTS,
    ONE_AT_A_TIME,
    Counted,
    arguments,
    checkpointed,
    collect,
    data,
    rows_of,
)
from tests.integrations.processes import fresh, kill_often
from torchprune_bayes import Calibration, EmpiricalFisher
from torchprune_bayes.calibration import CheckpointedCalibration
from torchprune_bayes.errors import ArgumentError, CalibrationError
from torchprune_bayes.integrations import resume


def test_a_killed_collection_of_gradients_goes_on(tmp_path: Path) -> None:
    counter = fresh.Value("i", 0, lock=False)
    args = (tmp_path / "kept", counter, tmp_path / "rows")
    assert kill_often(collect, args, counter, every=6) > 3
    collect(*args)
    expected, _ = rows_of(Calibration(**arguments(memory_mb=ONE_AT_A_TIME)))
    assert torch.equal(load_file(tmp_path / "rows")["rows"], expected)


def test_kept_gradients_are_not_computed_again(tmp_path: Path) -> None:
    fisher = EmpiricalFisher(damping=0.1).fit(checkpointed(tmp_path))
    Counted.samples = 0
    again = EmpiricalFisher(damping=0.1).fit(checkpointed(tmp_path))
    assert Counted.samples < GRADIENTS  # a few tell that the loss is the same
    assert torch.equal(fisher.inverse_diagonal(), again.inverse_diagonal())


@given(kept=st.integers(1, 9), first=st.integers(1, 5), then=st.integers(1, 5))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_it_goes_on_wherever_it_stopped_and_whatever_fits_at_once(
    tmp_path_factory: pytest.TempPathFactory, kept: int, first: int, then: int
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    row_mb = 4 * (48 + 24) / 2**20

    def at_once(count: int) -> dict[str, Any]:
        return {"memory_mb": 4.5 * count * row_mb, "vectorize": "auto", "data": [data(1, 40)]}

    begun = checkpointed(folder, **at_once(first)).gradients()
    for _ in range(kept):
        next(begun, None)
    found, _ = rows_of(checkpointed(folder, **at_once(then)))
    expected, _ = rows_of(Calibration(**arguments(data=[data(1, 40)])))
    torch.testing.assert_close(found, expected)


def other_data() -> list[Any]:
    batches = [data(seed) for seed in range(8)]
    batches[5][0][3, 2] += 1e-3  # in one entry of one late sample
    return batches


OTHERS: dict[str, Any] = {
    "loss": {"loss_fn": lambda o, t: cross_entropy(5 * o, t)},
    "gradient": {
        "loss_fn": lambda o, t: cross_entropy(o.detach(), t) + 0.1 * (o - o.detach()).sum()
    },
    "smoothing": {"loss_fn": lambda o, t: cross_entropy(o, t, label_smoothing=0.01)},
    "data": {"data": other_data()},
    "order": {"data": [data(seed) for seed in reversed(range(8))]},
    "labels": {"data": [(x, (y + 1) % 3) for x, y in (data(seed) for seed in range(8))]},
    "mini_batch": {"mini_batch": 4},
    "num_samples": {"num_samples": 64},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_gradients_depend_on_has_gradients_of_its_own(tmp_path: Path, what: str) -> None:
    first, _ = rows_of(checkpointed(tmp_path))
    found, samples = rows_of(checkpointed(tmp_path, **OTHERS[what]))
    expected, _ = rows_of(Calibration(**arguments(**OTHERS[what])))
    assert torch.equal(found, expected)
    assert not torch.equal(found, first)
    assert samples >= len(expected)
    again, samples = rows_of(checkpointed(tmp_path))
    assert torch.equal(again, first)
    assert samples < GRADIENTS


def test_other_weights_masks_and_draws_are_other_gradients(tmp_path: Path) -> None:
    calibration, plain = checkpointed(tmp_path), Calibration(**arguments())
    moved = {name: value + 1 for name, value in calibration.space.values().items()}
    masks = {name: torch.rand(value.shape) > 0.5 for name, value in moved.items()}
    rows_of(calibration)
    changes: list[Any] = [
        lambda c: rows_of(c, weights=moved),
        lambda c: rows_of(c.with_space(c.space.with_masks(masks))),
        lambda c: rows_of(c.redrawn(1)),
        lambda c: rows_of(c.with_loss(lambda o, t: cross_entropy(2 * o, t))),
    ]
    for change in changes:
        found, samples = change(calibration)
        expected, _ = change(plain)
        assert torch.equal(found, expected)
        assert samples >= GRADIENTS


def test_batches_of_another_size_are_the_same_samples(tmp_path: Path) -> None:
    first, _ = rows_of(checkpointed(tmp_path))
    inputs, labels = (torch.cat(part) for part in zip(*(data(s) for s in range(8)), strict=True))
    found, samples = rows_of(checkpointed(tmp_path, data=[(inputs, labels)]))
    assert torch.equal(found, first)
    assert samples < GRADIENTS


# Damage


def parts_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    save_file({"rows": torch.zeros(1, 2)}, path)


def _unlike(path: Path) -> None:
    torch.save({"rows": torch.zeros(1, 2)}, path)


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _foreign, _unlike])
def test_damaged_parts_are_named_and_computed_again_when_deleted(
    tmp_path: Path, damage: Any
) -> None:
    small = {"memory_mb": ONE_AT_A_TIME}
    expected, _ = rows_of(checkpointed(tmp_path, **small))
    parts = parts_in(tmp_path)
    damage(parts[3])
    with pytest.raises(CalibrationError, match=rf"{parts[3].name}.*: delete the file") as caught:
        rows_of(checkpointed(tmp_path, **small))
    assert str(caught.value).count("\n") == 0
    parts[3].unlink()
    found, _ = rows_of(checkpointed(tmp_path, **small))
    assert torch.equal(found, expected)


def test_parts_beyond_the_samples_are_refused(tmp_path: Path) -> None:
    rows_of(checkpointed(tmp_path, memory_mb=ONE_AT_A_TIME))
    parts = parts_in(tmp_path)
    everything = {"rows": torch.cat([load_file(part)["rows"] for part in parts])}
    from torchprune_bayes._files import save_tensors
    from torchprune_bayes.calibration.checkpointed import _digest

    save_tensors(parts[3], everything, {"sha256": _digest(everything)})
    with pytest.raises(CalibrationError, match="others than were kept"):
        rows_of(checkpointed(tmp_path, memory_mb=ONE_AT_A_TIME))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="Expected to write"):
        rows_of(checkpointed(tmp_path / "file" / "kept"))


def test_refuses_labels_drawn_along_the_way(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="true"):
        checkpointed(tmp_path, fisher="true")


def test_it_is_found_where_it_was() -> None:
    assert resume.CheckpointedCalibration is CheckpointedCalibration
