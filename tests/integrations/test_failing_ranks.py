"""Two processes of which one fails: both raise, neither waits, and nothing is changed in any.

Every case is a place where one process alone can fail. All cases of a test run in one launch, one
after the other, which also shows that the processes are in step again after each failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from tests.integrations.accelerate_cases import batches, network
from tests.integrations.hf_cases import Gated, Sentences, arguments, classifier
from tests.integrations.processes import accelerator, in_two_processes
from torchprune_bayes import (
    Calibration,
    EmpiricalFisher,
    GradualPruner,
    one_shot,
    prunable_parameters,
)
from torchprune_bayes._distributed import all_gathered, on_all_ranks, rank
from torchprune_bayes.errors import AlignmentError, ArgumentError, CalibrationError
from torchprune_bayes.integrations import _distributed_steps, accelerate
from torchprune_bayes.integrations._ranks import summed, take_from_first
from torchprune_bayes.integrations.accelerate import (
    ShardedCalibration,
    calibrate,
    merged,
    prune_distributed,
    shrink_distributed,
    step,
)
from torchprune_bayes.integrations.hf import (
    GateCallback,
    PruningCallback,
    SpaMCallback,
    calibrate_on,
)
from torchprune_bayes.structured import L1FilterImportance
from torchprune_bayes.training import SpaM, keep_sparse

FAILED = "only here"
METHOD: dict[str, Any] = {"damping": 1e-3, "update_scale": 1.0}


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError(FAILED)


@contextmanager
def failing(target: Any, name: str, source: int) -> Iterator[None]:
    """Let a function fail in process ``source`` alone."""
    with ExitStack() as stack:
        if rank() == source:
            stack.enter_context(mock.patch.object(target, name, fails))
        yield


def raised_everywhere(run: Callable[[], Any], source: int) -> None:
    """``run`` raises in all processes, with the reason of the one that failed."""
    error = RuntimeError if rank() == source else CalibrationError
    with pytest.raises(error, match=FAILED):
        run()
    assert all_gathered(rank()) == [0, 1]  # in step again


def snapshot(*parts: Any) -> list[Any]:
    """Values and identities of all that a failure has to leave as it was."""
    found: list[Any] = []
    for part in parts:
        if isinstance(part, nn.Module):
            found += [[n for n, _ in part.named_parameters()], [n for n, _ in part.named_buffers()]]
            found += [[len(m._forward_pre_hooks) for m in part.modules()]]
            found += [t.detach().clone() for t in (*part.parameters(), *part.buffers())]
        elif isinstance(part, torch.optim.Optimizer):
            states = part.state_dict()["state"].values()
            found += [v.clone() for s in states for v in s.values() if isinstance(v, Tensor)]
            found += [[id(p) for g in part.param_groups for p in g["params"]]]
        else:
            state = part.state_dict()
            found += [state["step"], list(state["history"])]
    return found


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def before_an_exchange(here: Callable[[], Any]) -> None:
    on_all_ranks(lambda: [here(), all_gathered(1)])


def within_an_exchange(here: Callable[[], Any]) -> None:
    on_all_ranks(lambda: on_all_ranks(lambda: on_all_ranks(here)))


def before_a_sum(here: Callable[[], Any]) -> None:
    on_all_ranks(lambda: [here(), summed({"a": torch.ones(2)})])


def before_a_broadcast(here: Callable[[], Any]) -> None:
    def run() -> None:
        here()
        take_from_first([torch.ones(2)])

    on_all_ranks(run)


def wrapped_on_its_way(here: Callable[[], Any]) -> None:
    def wrap() -> None:
        try:
            on_all_ranks(here)
        except Exception as error:
            raise type(error)(f"wrapped: {error}") from error

    on_all_ranks(wrap)


def _exchanges() -> None:
    for source in (0, 1):
        here = partial(lambda source: fails() if rank() == source else None, source)
        for run in (
            before_an_exchange,
            within_an_exchange,
            before_a_sum,
            before_a_broadcast,
            wrapped_on_its_way,
        ):
            raised_everywhere(partial(run, here), source)
    tensors = {"a": torch.ones(2 + rank())}
    with pytest.raises(AlignmentError, match="same tensors"):
        summed(tensors)
    with pytest.raises(AlignmentError, match="same tensors"):
        take_from_first(tensors.values())
    assert all_gathered(rank()) == [0, 1]


def _passes() -> None:
    acc = accelerator()
    for samples, size in ((1, 1), (4, 4)):
        few = {"num_samples": samples, "mini_batch": size}
        with pytest.raises(ArgumentError, match="for each of 2 processes"):
            calibrate(acc, network(), batches(4), cross_entropy, **few)
    for source in (0, 1):
        with failing(Calibration, "__init__", source):
            raised_everywhere(lambda: calibrate(acc, network(), batches(4), cross_entropy), source)
        shares = calibrate(acc, network(), batches(6), cross_entropy)
        raised_everywhere(partial(on_all_ranks, partial(_consume, shares, source)), source)
        fisher = EmpiricalFisher(damping=0.1).fit(shares.local)
        with failing(accelerate, "_joined", source):
            raised_everywhere(partial(merged, fisher), source)


def _consume(shares: Calibration, source: int) -> None:
    for index, _ in enumerate(shares.gradients()):
        if index == 1 and rank() == source:
            fails()


def _prepared(acc: Any) -> tuple[Any, Any, Any, nn.Module]:
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
    bare = model
    model, optimizer = acc.prepare(model, optimizer)
    x, y = batches(2)[rank()]
    acc.backward(cross_entropy(model(x), y))
    optimizer.step()
    with torch.no_grad():
        bare[1].running_mean += rank()  # as after steps on other samples
    return model, optimizer, calibrate(acc, bare, batches(4), cross_entropy), bare


PLACES: list[tuple[Any, str]] = [
    (GradualPruner, "plan"),  # deciding, before any gradient is exchanged
    (Calibration, "gradients"),  # a pass over the own share
    (_distributed_steps, "take_from_first"),  # agreeing
    (GradualPruner, "_commit"),  # doing
    (GradualPruner, "_hold"),  # done in part
]


def _steps() -> None:
    acc = accelerator()
    for target, name in PLACES:
        for source in (0, 1):
            _, optimizer, shares, bare = _prepared(acc)
            pruner = GradualPruner(
                None, "woodfisher", one_shot(0.5), calibration=shares, optimizer=optimizer, **METHOD
            )
            before = snapshot(bare, optimizer.optimizer, pruner)
            with failing(target, name, source):
                raised_everywhere(partial(step, acc, pruner), source)
            assert same(before, snapshot(bare, optimizer.optimizer, pruner)), name
            assert pruner.sparsity == 0.0
            assert step(acc, pruner) is not None
            assert pruner.sparsity == 0.5


def _prunings() -> None:
    acc = accelerator()
    for target, name in (
        (accelerate, "_check"),
        (accelerate, "decide_globally"),
        (Calibration, "gradients"),
        (_distributed_steps, "take_from_first"),
        (_distributed_steps, "apply_decision"),
    ):
        for source in (0, 1):
            _, _, shares, bare = _prepared(acc)
            before = snapshot(bare)
            options = {"amount": 0.5, "calibration": shares, **METHOD}
            with failing(target, name, source):
                run = partial(prune_distributed, acc, None, "woodfisher", **options)
                raised_everywhere(run, source)
            assert same(before, snapshot(bare)), name
            prune_distributed(acc, None, "woodfisher", **options)


def _cuts() -> None:
    acc = accelerator()
    for case in ("shrink", "prepared", "differently"):
        for source in (0, 1):
            model, optimizer, _, bare = _prepared(acc)
            before = snapshot(bare, optimizer.optimizer)
            example, importance = batches(1)[0][0], L1FilterImportance()
            options: dict[str, Any] = {"sparsity": 0.5, "target": "channels"}
            if case == "differently" and rank() == source:
                options["sparsity"] = 0.25
            place = (accelerate, "shrink") if case == "shrink" else (accelerate, "_digest")

            cut = partial(
                shrink_distributed, acc, model, example, importance, optimizer=optimizer, **options
            )
            if case == "differently":
                with pytest.raises(AlignmentError, match="same units to be removed"):
                    cut()
            else:
                with failing(*place, source):
                    raised_everywhere(cut, source)
            assert same(before, snapshot(bare, optimizer.optimizer)), case


def _evidence() -> None:
    for target, name in ((SpaM, "_improved"), (SpaM, "_take_over"), (SpaM, "_fitted")):
        for source in (0, 1):
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            local = ShardedCalibration(model, batches(4), cross_entropy).local
            options: dict[str, Any] = {"all_reduce": True, "num_data": 16, "every": 1}
            spam = SpaM(optimizer, local, schedule=one_shot(0.5, at=1), **options)
            before = snapshot(model, optimizer, spam)
            with failing(target, name, source):
                raised_everywhere(spam.step, source)
            assert same(before, snapshot(model, optimizer, spam)), name
            assert spam.step() is not None


def _in_turn(*places: Callable[[], None]) -> None:
    for place in places:
        place()


def test_an_error_reaches_whoever_waits_in_an_exchange() -> None:
    in_two_processes(_in_turn, _exchanges, _passes)


def test_models_are_changed_in_all_processes_or_in_none() -> None:
    in_two_processes(_in_turn, _steps, _prunings, _cuts, _evidence)


def _callbacks(folder: Path) -> None:
    data = calibrate_on(Sentences(), num_samples=8, check_deterministic=False)
    spam = lambda: SpaMCallback(data, every=1)  # noqa: E731
    gates = lambda: GateCallback(data_size=32, amount=0.5, beyond=True)  # noqa: E731
    pruning = lambda: PruningCallback("magnitude", one_shot(0.5, at=1))  # noqa: E731
    cases: list[tuple[Callable[[], Any], str]] = [
        (pruning, "_begin"),
        (pruning, "_save"),
        (pruning, "_end"),
        (spam, "_take_up"),
        (spam, "_save"),
        (gates, "_take_up"),
        (gates, "_save"),
    ]
    for index, (make, name) in enumerate(cases):
        source = index % 2
        callback = make()
        sgd = {"optim": "sgd", "weight_decay": 0.0}
        settings = arguments(
            folder / name,
            max_steps=2,
            per_device_train_batch_size=16,
            save_strategy="steps",
            save_steps=2,
            **({} if make is pruning else sgd),
        )
        model = Gated() if make is gates else classifier()
        run = Trainer(model, settings, train_dataset=Sentences(), callbacks=[callback])
        with failing(type(callback), name, source):
            raised_everywhere(run.train, source)


def test_callbacks_fail_in_all_processes(tmp_path: Path) -> None:
    in_two_processes(_callbacks, tmp_path)


def test_one_process_alone_raises_its_own_error() -> None:
    with pytest.raises(RuntimeError, match=FAILED):
        on_all_ranks(fails)
    assert all_gathered(3) == [3]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pairs = prunable_parameters(model)
    pruner = GradualPruner(pairs, "magnitude", one_shot(0.5), optimizer=optimizer)
    with failing(GradualPruner, "_commit", 0), pytest.raises(RuntimeError, match=FAILED):
        _distributed_steps.step_on_all_ranks(pruner)
    assert pruner.sparsity == 0.0
    keep_sparse(optimizer, {}).remove()
