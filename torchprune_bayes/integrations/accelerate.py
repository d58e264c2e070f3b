"""Pruning in several processes that ``accelerate`` started: one calibration, one set of masks.

In a training loop::

    model, optimizer = accelerator.prepare(model, optimizer)
    calibration = calibrate(accelerator, model, loader, loss_fn)
    pruner = GradualPruner(..., calibration=calibration, optimizer=optimizer)
    ...
    optimizer.step()
    if accelerator.sync_gradients:
        step(accelerator, pruner)
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer

from torchprune_bayes._distributed import (
    all_gathered,
    entered_on_all_ranks,
    errors_shared,
    on_all_ranks,
)
from torchprune_bayes._extras import optional
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import EmpiricalFisher, LayerCurvature
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, ParameterError
from torchprune_bayes.integrations._checkpoints import fingerprint
from torchprune_bayes.integrations._distributed_steps import (
    agreed,
    decision_applied,
    step_on_all_ranks,
    uncut_on_error,
)
from torchprune_bayes.integrations._ranks import (
    refuse_sharded,
    same_everywhere,
    shared_buffers,
    summed,
    take_from_first,
)
from torchprune_bayes.integrations._sharded import ShardedCalibration
from torchprune_bayes.methods.global_pruning import decide_globally
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured import ShrinkReport, shrink
from torchprune_bayes.training import GradualPruner, bare_optimizer
from torchprune_bayes.types import Decision, Masks, ParameterPairs

with optional("accelerate", "accelerate"):
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

__all__ = [
    "ShardedCalibration",
    "calibrate",
    "check_same_masks",
    "merged",
    "prune_distributed",
    "shrink_distributed",
    "step",
]

_WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU")

Statistic = TypeVar("Statistic", bound=LayerCurvature | EmpiricalFisher)


def calibrate(
    accelerator: Accelerator,
    model: nn.Module,
    data: Iterable[Any],
    *args: Any,
    **options: Any,
) -> ShardedCalibration:
    """Share the calibration on ``data`` out over the processes.

    Args:
        accelerator: The accelerator; all processes make this call, with the same arguments.
        model: The model, prepared or not.
        data: The loader as it was before ``accelerator.prepare``.
        args: Arguments of :class:`ShardedCalibration`.
        options: Arguments of :class:`ShardedCalibration`.

    Returns:
        What every method takes as ``calibration=``.

    Raises:
        ArgumentTypeError: If the loader is a prepared one, which repeats samples to make shares
            equal.
        ParameterError: If weights or optimizer state are sharded (FSDP, DeepSpeed).
    """
    on_all_ranks(lambda: _check_plain(accelerator, model, data))
    return ShardedCalibration(model, data, *args, **options)


def prune_distributed(
    accelerator: Accelerator,
    params: ParameterPairs | None,
    method: type[BasePruningMethod] | str,
    **options: Any,
) -> Decision:
    """Prune as :func:`~torchprune_bayes.prune_global` does, with the same result everywhere.

    Masks and weights are those of the first process, so that processes that computed on unlike
    devices do not drift apart.

    Args:
        accelerator: The accelerator; all processes make this call.
        params: See :func:`~torchprune_bayes.prune_global`.
        method: See :func:`~torchprune_bayes.prune_global`.
        options: See :func:`~torchprune_bayes.prune_global`.

    Returns:
        The decision, with the masks that hold.

    Raises:
        ArgumentTypeError: If there are neither ``params`` nor a calibration.
        CalibrationError: If it failed in another process.
        ParameterError: If weights are sharded.
    """
    calibration: Calibration | None = options.get("calibration")
    pairs = on_all_ranks(lambda: _checked_pairs(accelerator, params, calibration))
    model = nn.Module() if calibration is None else calibration.model
    with errors_shared(), shared_buffers(model):
        space, decision = on_all_ranks(lambda: decide_globally(pairs, method, **options))
        decision = agreed(decision, space)
        with entered_on_all_ranks(lambda: decision_applied(space, decision, pairs)):
            take_from_first(tensor.leaf for tensor in space)
            all_gathered(None)
    return dataclasses.replace(decision, masks=space.masks())


def step(accelerator: Accelerator, pruner: GradualPruner) -> dict[str, Any] | None:
    """Call ``pruner.step()`` in every process and make sure that all have pruned the same.

    Call it after ``optimizer.step()`` where ``accelerator.sync_gradients`` is true. Masks and
    weights are those of the first process wherever they should differ. If anything fails in any
    process, nothing is changed in any.

    Args:
        accelerator: The accelerator; all processes make this call.
        pruner: The pruner, made before or after ``prepare``.

    Returns:
        What ``pruner.step()`` returned.

    Raises:
        CalibrationError: If it failed in another process.
        ParameterError: If weights are sharded.
    """
    on_all_ranks(lambda: _check(accelerator, pruner.space.model))
    return step_on_all_ranks(pruner)


def shrink_distributed(
    accelerator: Accelerator,
    model: nn.Module,
    example_inputs: Any,
    importance: Any,
    *,
    optimizer: Optimizer,
    **options: Any,
) -> tuple[nn.Module, Optimizer, ShrinkReport]:
    """Remove channels and heads of a prepared model: unwrap, shrink, prepare again.

    Args:
        accelerator: The accelerator; all processes make this call.
        model: The prepared model.
        example_inputs: See :func:`~torchprune_bayes.structured.shrink`.
        importance: See :func:`~torchprune_bayes.structured.shrink`; it must score the same in all
            processes, as it does with a calibration of :func:`calibrate`.
        optimizer: The prepared optimizer; its state is cut too.
        options: Further arguments of :func:`~torchprune_bayes.structured.shrink`.

    Returns:
        The prepared model and optimizer to use from now on, and the report. Learning rate
        schedulers and loaders are not changed.

    Raises:
        AlignmentError: If processes have removed different units. Nothing is changed in any process
            then.
        CalibrationError: If it failed in another process.
        ParameterError: If weights are sharded.
    """
    on_all_ranks(lambda: _check(accelerator, model))
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    inner = on_all_ranks(lambda: bare_optimizer(optimizer))
    with errors_shared(), shared_buffers(model), uncut_on_error(bare, inner):
        report = on_all_ranks(
            lambda: shrink(bare, example_inputs, importance, optimizer=inner, **options)
        )
        state = {name: parameter.data for name, parameter in bare.named_parameters()}
        if not same_everywhere(_digest(state)):
            raise AlignmentError(
                "Expected the same units to be removed in all processes, got different ones."
            )
    # Otherwise it would also save and load the objects prepared before.
    accelerator._models = [other for other in accelerator._models if unwrap(other) is not bare]
    accelerator._optimizers = [other for other in accelerator._optimizers if other is not optimizer]
    model, optimizer = accelerator.prepare(bare, inner)
    return model, optimizer, report


def check_same_masks(masks: Masks) -> str:
    """Compare a hash of the masks over all processes.

    Returns:
        The hash.

    Raises:
        AlignmentError: If the masks differ.

    Example:
        >>> from torch import tensor
        >>> len(check_same_masks({"weight": tensor([True, False])}))
        64
    """
    digest = fingerprint(masks)
    if not same_everywhere(digest):
        raise AlignmentError("Expected the same masks in all processes, got different ones.")
    return digest


def merged(statistic: Statistic) -> Statistic:
    """Merge curvature that each process has fitted on its share (``ShardedCalibration.local``).

    Sums over samples are added up before anything is computed from them (an absolute value, a
    square root); the gradients of a Fisher are collected.

    Args:
        statistic: Fitted at the same weights and masks in every process.

    Returns:
        The statistic over all samples. A Fisher has no calibration any more: pass one with it.

    Raises:
        AlignmentError: If the processes have different remaining entries.
        CalibrationError: If a Fisher streams its gradients.
    """
    if isinstance(statistic, EmpiricalFisher):
        parts = all_gathered(on_all_ranks(lambda: _packed(statistic)))
        return cast(Statistic, on_all_ranks(lambda: _joined(type(statistic), parts)))
    check_same_masks(statistic.masks)
    keys: dict[str, Tensor] = dict(sorted(statistic.sums.items()))
    statistic.sums, statistic.count = summed(keys), sum(all_gathered(statistic.count))
    return statistic


def _check_plain(accelerator: Accelerator, model: nn.Module, data: Iterable[Any]) -> None:
    _check(accelerator, model)
    if isinstance(data, (DataLoaderShard, DataLoaderDispatcher)):
        raise ArgumentTypeError(
            "Expected the loader as it was before `accelerator.prepare`, got a prepared one, which "
            "repeats samples to make the shares of all processes equal."
        )


def _checked_pairs(
    accelerator: Accelerator, params: ParameterPairs | None, calibration: Calibration | None
) -> list[tuple[nn.Module, str]]:
    if params is None and calibration is None:
        raise ArgumentTypeError("Expected `params` or `calibration`, got neither.")
    pairs = list(params) if params is not None else cast(Calibration, calibration).pairs()
    for module, _ in pairs:
        _check(accelerator, module)
    return pairs


def _digest(tensors: dict[str, Tensor]) -> str:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return hashlib.sha256(save(plain)).hexdigest()


def _joined(kind: type[EmpiricalFisher], parts: list[bytes]) -> EmpiricalFisher:
    first, *others = (_unpacked(kind, part) for part in parts)
    for other in others:
        first.merge(other)
    return first


def _packed(fisher: EmpiricalFisher) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fisher.safetensors"
        fisher.save(path)
        return path.read_bytes()


def _unpacked(kind: type[EmpiricalFisher], data: bytes) -> EmpiricalFisher:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fisher.safetensors"
        path.write_bytes(data)
        return kind.load(path)


def _check(accelerator: Accelerator, model: nn.Module) -> None:
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in _WHOLE:
        raise ParameterError(
            f"Expected whole weights and optimizer state in every process, got {kind}: decide on "
            "masks before sharding, then keep the zeros with `keep_sparse(optimizer, masks)`."
        )
    refuse_sharded(model)
