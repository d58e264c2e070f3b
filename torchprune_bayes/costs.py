"""FLOPs: of whatever runs, by module, and per weight of each tensor on one calibration sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.layer_kinds import kind_of


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count FLOPs, two for each multiplication with an addition, whichever kernels run.

    PyTorch's counter knows matrix products and convolutions, and of the fused kernels those of some
    devices: attention on a CPU, an encoder layer's inference path and a fused LSTM count nothing
    there. Here they count what their matrix products would; causal attention counts in full.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2).eval()
        >>> x = torch.zeros(3, 1, 4)
        >>> with torch.no_grad(), flop_counter() as counter:
        ...     _ = attention(x, x, x)
        >>> counter.get_total_flops()  # 2·3·4·(3·4) in, 2·2·3·3·4 attention, 2·3·4·4 out
        528
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that hides its products
    try:
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def counted_flops(model: nn.Module) -> Iterator[FlopsByTensor]:
    """Count the FLOPs of what a model runs, by the weights that it multiplies with.

    They are those of :func:`flop_counter`, without its tracking of the backward pass, which takes
    longer than small layers themselves.

    Args:
        model: The model.

    Yields:
        The counter, which holds what has run so far.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> with counted_flops(model) as counter:
        ...     _ = model(torch.zeros(3, 4))
        >>> counter.flops
        {'0.weight': 192}
    """
    counter = FlopsByTensor(model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(partial(counter.enter, name), prepend=True)
            leave = module.register_forward_hook(counter.leave, always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # one operation that hides its products
        with torch.inference_mode(False), counter:
            yield counter


class FlopsByTensor(TorchDispatchMode):
    """Adds the FLOPs of every operation to those of the weights that it takes.

    These are matrices and kernels among the parameters, or views of some; between several, as in
    recurrent layers, FLOPs are shared by size. Operations without any, as products inside of
    attention, count for the module that is running.

    Args:
        model: The model.

    Attributes:
        flops: By the first qualified name of the parameter, or that of the module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights: dict[int, list[tuple[int, int, str]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                start = int(parameter.storage_offset())
                place = start, start + int(parameter.numel()), name
                self._weights.setdefault(_storage(parameter), []).append(place)
        self._weights.pop(0, None)
        self.flops: dict[str, int] = {}
        self._running: list[str] = []
        known = FlopCounterMode(display=False, custom_mapping=_formulas())
        self._formulas: Mapping[Any, Callable[..., int]] = known.flop_registry

    def enter(self, name: str, *_: Any) -> None:
        """Before a module runs."""
        self._running.append(name)

    def leave(self, *_: Any) -> None:
        """After it."""
        self._running.pop()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        output = operation(*args, **kwargs)
        formula = self._formulas.get(operation.overloadpacket)
        if formula is not None:
            self._add(formula(*args, **kwargs, out_val=output), args)
        return output

    def _add(self, count: int, args: Any) -> None:
        sizes = {
            name: stop - start
            for tensor in tree_leaves(args)
            if isinstance(tensor, Tensor)
            for start, stop, name in self._weights.get(_storage(tensor), ())
            if start <= tensor.storage_offset() < stop
        } or {self._running[-1] if self._running else "": 1}
        for name, size in sizes.items():
            if count:
                total = sum(sizes.values())
                self.flops[name] = self.flops.get(name, 0) + count * size // total


def _storage(tensor: Tensor) -> int:
    """Of a tensor and all its views, on any device; 0 if it has none, as sparse ones."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


_Shape = Sequence[int]


def _formulas() -> dict[Any, Any]:
    """Formulas for the fused operations that this version of PyTorch has, by operation."""
    formulas = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "_scaled_dot_product_efficient_attention": _attention,
        "_scaled_dot_product_flash_attention": _attention,
        "_scaled_dot_product_cudnn_attention": _attention,
        "mkldnn_rnn_layer": _onednn_rnn,
        "_cudnn_rnn": _cudnn_rnn,
        "miopen_rnn": _cudnn_rnn,
    }
    operations = torch.ops.aten
    return {getattr(operations, n): f for n, f in formulas.items() if hasattr(operations, n)}


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Of ``q kᵀ`` and of its product with ``v``; grouped queries share keys and values."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _onednn_rnn(inputs: _Shape, to_hidden: _Shape, hidden: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(inputs[:-1]) * (prod(to_hidden) + prod(hidden))


def _cudnn_rnn(inputs: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    return 2 * prod(inputs[:-1]) * sum(prod(shape) for shape in weights if len(shape) == 2)


def flops_per_weight(calibration: Calibration) -> dict[str, float]:
    """Count the FLOPs of each layer's forward pass, per weight and sample.

    That is two, a multiplication and an addition, for every use of a weight: one per output
    position in a convolution, per input position in a transposed one, and per token in a linear
    layer. A layer that is called twice counts twice.

    Args:
        calibration: Model and data; one sample runs through the model.

    Returns:
        FLOPs per weight by qualified name, in the order of the calibration's parameters.

    Raises:
        ArgumentError: If a layer was not called, or is none of those.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 2))
        >>> data = [(torch.randn(4, 1, 4, 4), torch.randint(2, (4,)))]
        >>> flops_per_weight(Calibration(model, data, nn.functional.cross_entropy))
        {'0.weight': 8.0, '2.weight': 2.0}
    """
    flops = {tensor.name: 0.0 for tensor in calibration.space}

    def count(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        flops[name] += 2.0 * _uses(name, module, inputs, output)

    sample = next(calibration.batches(size=1))
    with ExitStack() as stack, torch.no_grad():
        for tensor in calibration.space:
            hook = partial(count, tensor.name)
            handle = tensor.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        calibration.loss(None, sample)
    _check_reached(flops)
    return flops


def _uses(name: str, module: nn.Module, inputs: list[Tensor], output: Any) -> float:
    """How often each weight is used in one call."""
    uses = kind_of(module).uses(module, name.rpartition(".")[2], inputs, output)
    if uses is not None:
        return uses
    raise ArgumentError(
        f"Expected a linear or convolution layer for FLOPs per weight, got `{name}` of "
        f"{type(module).__name__}: leave it out of the parameters, or use no FLOP-aware option."
    )


def _check_reached(flops: Mapping[str, float]) -> None:
    unused = [name for name, count in flops.items() if not count]
    if unused:
        raise ArgumentError(
            f"Expected every layer to be called for FLOPs per weight, got no call of the layer of "
            f"`{unused[0]}`: leave it out of the parameters, or use no FLOP-aware option."
        )
