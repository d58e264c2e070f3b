"""What callbacks log, where it arrives, and with what a training begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from tests.integrations.hf_cases import Gated, Sentences, arguments, classifier
from torchprune_bayes import cubic, one_shot, prunable_parameters
from torchprune_bayes.errors import TorchPruneBayesWarning
from torchprune_bayes.integrations.hf import (
    GateCallback,
    PruningCallback,
    SpaMCallback,
    calibrate_on,
)

HEAD = ["classifier", "pre_classifier"]
SHORT: dict[str, Any] = {"weight_decay": 0.0, "learning_rate": 1e-3}


def callbacks() -> dict[str, tuple[nn.Module, TrainerCallback, str]]:
    spam = SpaMCallback(
        calibrate_on(Sentences(), num_samples=8, check_deterministic=False), every=1
    )
    gate = GateCallback(data_size=32, amount=0.5, beyond=True)
    pruning = PruningCallback("magnitude", cubic(0.8, 1, 3))
    return {
        "pruning": (classifier(), pruning, "train/sparsity"),
        "spam": (classifier(), spam, "train/log_marginal_likelihood"),
        "gates": (Gated(), gate, "train/closed_gates"),
    }


@pytest.mark.parametrize("kind", callbacks())
def test_numbers_reach_tensorboard(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model, callback, tag = callbacks()[kind]
    settings = arguments(tmp_path, report_to=["tensorboard"], **SHORT)
    run = Trainer(model, settings, train_dataset=Sentences(), callbacks=[callback])
    run.train()
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    logged = {e["step"]: e[tag.removeprefix("train/")] for e in run.state.log_history[3:]}
    written = {event.step: event.value for event in events.Scalars(tag)}
    assert len(logged) >= 4
    assert {step: written[step] for step in logged} == pytest.approx(logged)


class Order(TrainerCallback):
    """Notes down what is logged when it is its turn."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.begun = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_callbacks_keep_their_order_and_each_begins_once(tmp_path: Path) -> None:
    first, last = Order(), type("Last", (Order,), {})()
    pruning = PruningCallback("magnitude", one_shot(0.5, at=1))
    run = Trainer(
        classifier(),
        arguments(tmp_path),
        train_dataset=Sentences(),
        callbacks=[first, pruning, last],
    )
    before = [c for c in run.callback_handler.callbacks if c is not pruning]
    run.train()
    assert run.callback_handler.callbacks == [pruning, *before]
    assert first.begun == last.begun == 1
    assert all("sparsity" in logs for logs in first.seen + last.seen)
    assert len(first.seen) == len(last.seen) > 8


def zeros_of(model: nn.Module) -> float:
    weights = [getattr(*pair) for pair in prunable_parameters(model, exclude=HEAD)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def train(folder: Path, model: nn.Module, **options: Any) -> PruningCallback:
    schedule = options.pop("schedule", one_shot(0.7, at=6))
    pruning = PruningCallback("magnitude", schedule, exclude=HEAD, **options)
    Trainer(model, arguments(folder), train_dataset=Sentences(), callbacks=[pruning]).train()
    return pruning


def test_a_new_callback_takes_the_zeros_up(tmp_path: Path) -> None:
    model = classifier()
    train(tmp_path, model, schedule=one_shot(0.5, at=1))
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim == 2}
    assert zeros_of(model) == pytest.approx(0.5, abs=1e-3)
    pruning = train(tmp_path, model)
    assert pruning.sparsity == pytest.approx(0.7, abs=1e-3)
    found = dict(model.named_parameters())
    places = [t.name for t in pruning.pruner.space]  # type: ignore[union-attr]
    assert all(bool((found[name][zeros[name]] == 0).all()) for name in places)
    grown = train(tmp_path, model, schedule=one_shot(0.1, at=1), keep_zeros=False)
    assert grown.sparsity == pytest.approx(0.1, abs=1e-3)
    assert zeros_of(model) < 0.2


def test_a_weight_that_starts_at_zero_is_new_and_said_to_be(tmp_path: Path) -> None:
    model = classifier()
    blank = model.distilbert.transformer.layer[0].ffn.lin2.weight
    nn.init.zeros_(blank)
    with pytest.warns(TorchPruneBayesWarning, match=r"ffn\.lin2\.weight` is zero"):
        pruning = train(tmp_path, model, schedule=one_shot(0.0, at=1))
    assert pruning.sparsity == 0.0
    assert bool((blank != 0).any())


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Sentences one after the other, of a length that nobody tells."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from (Sentences()[index] for index in range(32))


def test_streams_calibrate_and_train(tmp_path: Path) -> None:
    given = calibrate_on(Stream(), num_samples=12, batch_size=5)
    model = classifier()
    calibration = given(model, prunable_parameters(model))
    first = [batch["input_ids"] for batch in calibration.batches()]
    assert torch.equal(torch.cat(first), Sentences().ids[:12])
    pruning = PruningCallback(
        "diagonal-fisher",
        cubic(0.5, 0, 2),
        unit="epoch",
        exclude=HEAD,
        calibration=given,
    )
    settings = arguments(tmp_path, max_steps=8)  # two epochs, which the Trainer cannot know
    Trainer(model, settings, train_dataset=Stream(), callbacks=[pruning]).train()
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)
