from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports import MetricSums, collect_sums, evaluate


def data(samples: int = 12) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
    return inputs, torch.arange(samples) % 3


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))


class LanguageModel(nn.Module):
    """As Hugging Face models: keyword arguments in, an object with ``.logits`` out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.embedding(input_ids))


class Probe(nn.Module):
    """Notes the modes in which it is called."""

    def __init__(self, modes: list[tuple[bool, bool, bool]]) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.note = modes.append  # a list of the module would be as before after a run

    def forward(self, x: Tensor) -> Tensor:
        self.note((self.training, self.dropout.training, torch.is_grad_enabled()))
        return x


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) <= 12))
def test_streaming_equals_all_at_once(sizes):
    model, (inputs, labels) = classifier(), data()
    sizes.append(12 - sum(sizes))
    batches = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
    with torch.no_grad():
        logits = model.eval()(inputs)
    expected = MetricSums().update(logits, labels).compute()
    assert vars(evaluate(model, batches)) == pytest.approx(vars(expected), rel=1e-6)


def test_lists_tuples_and_mappings_of_inputs():
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    a, labels = data()
    expected = MetricSums().update(a + a.flip(0), labels).compute()
    for inputs in [(a, a.flip(0)), [a, a.flip(0)], {"b": a.flip(0), "a": a}]:
        assert evaluate(Sum(), [(inputs, labels)]) == expected
        assert evaluate(Sum(), [[inputs, labels]]) == expected


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_hugging_face_tokens_with_ignored_positions(mapping):
    model, tokens = LanguageModel(), torch.arange(10).reshape(2, 5)
    labels = tokens + 1
    labels[0, :2] = -100
    found = evaluate(model, [mapping(input_ids=tokens, labels=labels)])
    kept = labels != -100
    expected = MetricSums().update(model.embedding(tokens)[kept], labels[kept]).compute()
    assert found == expected
    assert found.samples == 8


def test_causal_shift_by_the_caller():
    model, tokens = LanguageModel(), torch.arange(10).reshape(2, 5)

    def shifted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(**batch).logits[:, :-1], batch["labels"][:, 1:]

    found = evaluate(model, [{"input_ids": tokens, "labels": tokens}], forward=shifted)
    logits = model.embedding(tokens[:, :-1])
    assert found == MetricSums().update(logits, tokens[:, 1:]).compute()


def test_eval_mode_without_gradients():
    modes: list[tuple[bool, bool, bool]] = []
    probe = Probe(modes)
    evaluate(probe, [data(), data()])
    assert modes == [(False, False, False)] * 2
    assert probe.training
    assert torch.is_grad_enabled()


def failing_batches() -> Any:
    yield data()
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([data()], None),
        (failing_batches(), OSError),
        ([(torch.zeros(2, 7), torch.zeros(2).long())], RuntimeError),
        ([(torch.full((2, 4), torch.nan), torch.zeros(2).long())], ArgumentError),
    ],
    ids=["success", "data", "forward", "metrics"],
)
def test_training_flags_are_restored(batches, error):
    model = classifier()
    model.train()
    model[1].eval()  # a frozen batch norm inside a model in training
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if error is None:
        evaluate(model, batches)
    else:
        with pytest.raises(error):
            evaluate(model, batches)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_pruned_view_is_restored():
    model = classifier()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    view = model[0].weight
    evaluate(model, [data()])
    assert model[0].weight is view


def test_batches_move_to_the_first_parameter_or_the_named_device() -> None:
    def spy(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        devices.append((batch["nested"][0].device.type, batch["labels"].device.type))
        return torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)

    devices: list[tuple[str, str]] = []
    batches = [{"nested": [torch.zeros(1)], "labels": torch.zeros(1), "name": "a"}]
    evaluate(nn.Linear(1, 1, device="meta"), batches, forward=spy)
    evaluate(nn.Linear(1, 1, device="meta"), batches, forward=spy, device="cpu")
    evaluate(nn.Linear(1, 1), batches, forward=spy, device=torch.device("meta"))
    evaluate(nn.Identity(), batches, forward=spy)
    assert devices == [("meta", "meta"), ("cpu", "cpu"), ("meta", "meta"), ("cpu", "cpu")]


def test_ranks_merge_to_the_whole_and_may_be_empty() -> None:
    model, (inputs, labels) = classifier(), data()
    shards: list[list[Any]] = [[(inputs[:5], labels[:5])], [(inputs[5:], labels[5:])], []]
    merged = MetricSums(10)
    for shard in shards:
        merged.merge(collect_sums(model, shard, bins=10))
    whole = collect_sums(model, [(inputs, labels)], bins=10)
    assert vars(merged.compute()) == pytest.approx(vars(whole.compute()), rel=1e-6)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_bar(capsys, progress):
    evaluate(nn.Identity(), [data()], progress=progress)
    assert ("evaluate" in capsys.readouterr().err) == progress


def test_no_data():
    with pytest.raises(ArgumentError, match="at least one sample"):
        evaluate(classifier(), [])


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 4), {"input_ids": torch.zeros(1)}, (torch.zeros(1),), "text"]
)
def test_batches_of_other_forms(batch):
    with pytest.raises(ArgumentTypeError, match="pass `forward`"):
        evaluate(classifier(), [batch])


def test_outputs_of_other_forms():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ArgumentTypeError, match=r"object with `\.logits`, got tuple"):
        evaluate(Pair(), [data()])
