"""A model as a function of its weights: losses and gradients that do not change the model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from torchprune_bayes.calibration._checkpointing import without_checkpoints
from torchprune_bayes.calibration.batches import Batch, batch_size
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, CalibrationError
from torchprune_bayes.params import ParameterSpace

LossFunction = Callable[[Any, Any], Tensor]


_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes in which :class:`torch.nn.Module` itself keeps parameters, modules and hooks."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; afterwards restore all its plain attributes.

    These are the modes; the tensors that PyTorch's pruning hooks and the like assign at every
    forward pass (``module.weight = weight_orig * weight_mask``), which would leave a graph of this
    pass behind; and what a model stores about its inputs, also in its dictionaries and
    lists, such as the attention biases that LeViT keeps in evaluation mode; and its modules, which
    BigBird replaces for a short sequence.
    """
    held = [(module, dict(vars(module))) for module in model.modules()]
    contents = [
        (value, value.copy())
        for _, attributes in held
        for name, value in attributes.items()
        if name == "_modules" or (name not in _INTERNAL and type(value) in (dict, list, set))
    ]
    for module, _ in held:
        module.training = False  # not by `eval()`, which layers overload to merge their weights
    try:
        yield
    finally:
        for module, attributes in held:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


class FunctionalModel:
    """The loss of a model at any weights, computed on copies of what a forward pass may change.

    Args:
        space: The tensors whose values can be given; keys below are their qualified names.
        loss_fn: ``loss_fn(output, target) -> scalar mean loss``; ``None`` takes ``output.loss``.
        device: Where to compute; the model itself is not moved. ``None`` computes where the
            model is, and follows it.

    Half-precision weights, buffers and inputs are computed with in float32.
    """

    def __init__(
        self,
        space: ParameterSpace,
        loss_fn: LossFunction | None,
        device: torch.device | None = None,
    ) -> None:
        if loss_fn is not None and not callable(loss_fn):
            raise ArgumentTypeError(f"Expected `loss_fn` to be callable, got {loss_fn!r}.")
        self.space = space
        self.model = space.model
        self.loss_fn = loss_fn
        self._device = device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation: float64 for a model that is in float64 now, else float32."""
        dtypes = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        doubles = (dtype == torch.float64 for dtype in dtypes)
        return torch.float64 if all(doubles) else torch.float32

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.space[0].leaf.device if self._device is None else self._device

    def of(self, space: ParameterSpace, loss_fn: LossFunction | None) -> FunctionalModel:
        """The same model for other tensors or another loss."""
        return FunctionalModel(space, loss_fn, self._device)

    def move(self, tensor: Tensor) -> Tensor:
        """Detach a tensor, on the device and, if it is a float, in the dtype of the computation."""
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(self.device, dtype)

    def move_input(self, tensor: Tensor) -> Tensor:
        """Move data to the device; half-precision inputs follow the weights to float32."""
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.detach().to(self.device, self.dtype if half else tensor.dtype)

    def constants(self) -> dict[str, Tensor]:
        """Parameters, detached, and copies of buffers, by the names they have in the model now."""
        held = {tensor.leaf_name: self.move(tensor.value) for tensor in self.space}
        ours = {id(tensor.leaf) for tensor in self.space}  # tied ones come up by another name too
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in ours:
                held[name] = self.move(parameter)
        for name, buffer in self.model.named_buffers():
            is_mask = name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in held
            held[name] = self.move(buffer) if is_mask else self.move(buffer).clone()
        return held

    def bind(
        self, weights: Mapping[str, Tensor] | None, trainable: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split the model's state, with ``weights`` put in, into trainable leaves and constants."""
        constants, leaf_names = self.constants(), self.leaf_names()
        for name, value in (weights or {}).items():
            if name not in leaf_names:
                raise AlignmentError(
                    f"Expected weights of the calibration's tensors only, got {name!r}."
                )
            constants[leaf_names[name]] = self.move(value)
        leaves = {name: constants.pop(leaf_names[name]) for name in trainable}
        return leaves, constants

    def loss(
        self, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor], batch: Batch
    ) -> Tensor:
        """Mean loss over a batch, a scalar."""
        return self.loss_of(*self.output(leaves, constants, batch))

    def loss_of(self, output: Any, target: Any) -> Tensor:
        """Mean loss of the result of :meth:`output`, a scalar."""
        if self.loss_fn is None:
            loss = getattr(output, "loss", None)
        else:
            loss = self.loss_fn(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise CalibrationError(
                f"Expected one scalar loss per batch, got {got}: pass a loss_fn with mean "
                "reduction, or batches with labels for the model's own loss."
            )
        return loss.reshape(())

    def output(
        self, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Any, Any]:
        """Run the model on a batch; returns its output and the target (``None``: its own loss)."""
        leaf_names = self.leaf_names()
        state = {**constants, **{leaf_names[name]: leaf for name, leaf in leaves.items()}}

        def run(*args: Any, **kwargs: Any) -> Any:
            # Weights that autocast has cached without gradients would have none.
            torch.clear_autocast_cache()
            with _uncompiled(), without_checkpoints():
                return functional_call(self.model, state, args, kwargs)

        if isinstance(batch, Mapping):
            if self.loss_fn is None:
                return run(**batch), None
            output = run(**{key: value for key, value in batch.items() if key != "labels"})
            return getattr(output, "logits", output), batch.get("labels")
        inputs, target = batch
        if isinstance(inputs, Mapping):
            return run(**inputs), target
        return run(*_as_args(inputs)), target

    def row_gradients(
        self, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor], rows: Batch
    ) -> dict[str, Tensor]:
        """Gradients of the mean losses of several mini-batches, by one vmapped pass.

        Args:
            leaves: Values to differentiate by.
            constants: The other values of the state.
            rows: A batch whose tensors are ``[rows, samples of a mini-batch, ...]``.

        Returns:
            ``{name: [rows, *shape]}``.
        """

        def row_loss(trainable: dict[str, Tensor], row: Batch) -> Tensor:
            return self.loss(trainable, constants, row)

        with warnings.catch_warnings():
            # An operation that vmap loops over (attention on a CPU) is slower, not wrong.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return vmap(grad(row_loss), in_dims=(None, 0))(dict(leaves), rows)

    def mean_gradients(
        self, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor], pieces: list[Batch]
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss over the samples of all ``parts``, ``{name: shape}``."""
        trainable = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        samples = sum(batch_size(piece) for piece in pieces)
        total: dict[str, Tensor] = {}
        for piece in pieces:
            with torch.enable_grad():
                loss = self.loss(trainable, constants, piece) * (batch_size(piece) / samples)
            for name, gradient in _gradients(loss, trainable).items():
                gradient = torch.zeros_like(trainable[name]) if gradient is None else gradient
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def unreached(
        self, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor], batch: Batch
    ) -> list[str]:
        """Names of leaves that the loss of a batch depends on but has no gradient for.

        Somewhere the graph is cut: ``detach``, ``no_grad``, or a part that is recomputed in
        the backward pass. Detected by changing all leaves without a gradient, each entry by its own
        share, which has no effect if the input does not reach them.
        """
        trainable = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        with torch.enable_grad():
            loss = self.loss(trainable, constants, batch)
        missing = [name for name, g in _gradients(loss, trainable).items() if g is None]
        if not missing:
            return []
        with torch.no_grad():
            again = self.loss(leaves, constants, batch)
            moved = {name: _moved(leaves[name]) for name in missing}
            other = self.loss({**leaves, **moved}, constants, batch)
        # A loss that is not deterministic or not finite proves nothing.
        depends = bool(again == loss) and bool((other - loss).abs() > 1e-5 * loss.abs())
        return missing if depends else []

    def leaf_names(self) -> dict[str, str]:
        """Names that the tensors have in the model now, by their qualified names."""
        return {tensor.name: tensor.leaf_name for tensor in self.space}


def _gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients by the leaves; ``None`` where the loss is not computed from one."""
    if not loss.requires_grad:
        return dict.fromkeys(leaves)
    try:
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise CalibrationError(
            "Expected a model with gradients in evaluation mode, got one that writes over what they"
            " are computed from: switch its cache off, as `use_cache=False` does in transformers."
        ) from error
    return dict(zip(leaves, gradients, strict=True))


def _moved(value: Tensor) -> Tensor:
    shares = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
    return value * shares.view_as(value) + 1e-2 * value.abs().mean() + 1e-3


def _uncompiled() -> AbstractContextManager[Any]:
    # Compiled parts would be compiled again for these weights, and Dynamo traces hooks too.
    # Where it was never loaded there are none, and loading it takes seconds.
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _as_args(inputs: Any) -> tuple[Any, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs)
    raise ArgumentTypeError(
        f"Expected model inputs to be a tensor, a tuple or a mapping, got {type(inputs).__name__}."
    )
