"""Where gradients are kept: the same numbers everywhere, and no file that stays."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes import Calibration, EmpiricalFisher
from torchprune_bayes.curvature.gradient_store import GradientStore, Placement
from torchprune_bayes.errors import CalibrationError

CPU = torch.device("cpu")


def placements(folder):
    room = 10**9
    return {
        "device": Placement("device", torch.float32, room),
        "host": Placement("host", torch.float32, room),
        "auto, too little memory": Placement("auto", torch.float32, 0),
        "folder": Placement(folder, torch.float32, room),
    }


def _written(chunks: Sequence[Tensor]) -> Callable[[Tensor | None], Iterator[Tensor]]:
    """Chunks as a calibration streams them."""

    def stream(out: Tensor | None) -> Iterator[Tensor]:
        done = 0
        for chunk in chunks:
            if out is not None:
                out[done : done + len(chunk)] = chunk
            done += len(chunk)
            yield chunk

    return stream


@pytest.mark.parametrize("name", ["device", "host", "auto, too little memory", "folder"])
def test_what_is_read_is_what_was_taken(name, tmp_path):
    rows = torch.randn(7, 40)
    store = GradientStore.filled(_written(rows.split(3)), (7, 40), placements(tmp_path)[name], CPU)
    assert torch.equal(store.read(3, 31), rows[:, 3:31])
    assert torch.equal(store.whole(), rows)


def test_the_scratch_file_is_gone_at_once_and_its_room_with_the_store(tmp_path):
    rows = torch.randn(4, 100)
    placement = placements(tmp_path)["folder"]
    store = GradientStore.filled(_written([rows]), (4, 100), placement, CPU)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(store.whole(), rows)
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_half_precision_rounds_to_eight_bits(tmp_path):
    rows = torch.randn(4, 100)
    placement = Placement(tmp_path, torch.bfloat16, 0)
    store = GradientStore.filled(_written([rows]), (4, 100), placement, CPU)
    assert store.whole().dtype == torch.float32
    torch.testing.assert_close(store.whole(), rows, rtol=2**-8, atol=0)


@given(data=st.data(), entries=st.integers(1, 30))
def test_views_are_what_indexing_gives(data, entries):
    rows = torch.randn(3, entries)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=entries, max_size=entries)))
    order = torch.tensor(data.draw(st.permutations(range(entries))))
    store = GradientStore(rows, CPU)
    assert torch.equal(store.reordered(order).whole(), rows[:, order])
    if keep.any():
        assert torch.equal(store.restricted(keep).whole(), rows[:, keep])
        both = store.reordered(order).restricted(keep)
        assert torch.equal(both.whole(), rows[:, order][:, keep])
    active = store.with_active(keep)
    assert torch.equal(active.whole(), rows * keep)


def test_a_folder_that_is_not_there_or_full_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(CalibrationError, match="name another one with `offload=`"):
        Placement(tmp_path / "missing", torch.float32, 0).new((1, 1), CPU)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    model = torch.nn.Linear(3, 2)
    data = [(torch.randn(8, 3), torch.randn(8, 2))]
    calibration = Calibration(model, data, torch.nn.functional.mse_loss, offload=tmp_path)
    before = model.weight.detach().clone()
    with pytest.raises(CalibrationError, match="lower num_samples, raise memory_mb"):
        EmpiricalFisher().fit(calibration)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model.weight, before)
