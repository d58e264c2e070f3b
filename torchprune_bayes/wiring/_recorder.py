"""Tracing a model's operations and tracking the labels of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from torchprune_bayes.wiring import _convolutions as convolutions
from torchprune_bayes.wiring import _norms as norms
from torchprune_bayes.wiring import _products as products
from torchprune_bayes.wiring import _rules as rules
from torchprune_bayes.wiring._labels import Ledger, State
from torchprune_bayes.wiring._rules import Call, Rule, tensors_of
from torchprune_bayes.wiring.operations import computes

_NAMES: tuple[tuple[Rule, str], ...] = (
    (
        rules.same,
        "clone contiguous _to_copy detach alias lift_fresh dropout zeros_like ones_like empty_like "
        "rand_like randn_like full_like bernoulli bernoulli_ to",
    ),
    (
        rules.moved,
        "view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze "
        "flip roll repeat pixel_shuffle pixel_unshuffle constant_pad_nd unfold tril triu "
        "channel_shuffle native_channel_shuffle",
    ),
    (
        rules.parted,
        "select slice narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk "
        "unsafe_chunk unbind",
    ),
    (rules.looked_up, "index index_select gather"),
    (
        rules.reduced,
        "sum mean amax amin max min var std var_mean std_mean prod norm linalg_vector_norm "
        "logsumexp argmax argmin any all",
    ),
    (
        rules.along,
        "_softmax _log_softmax _safe_softmax cumsum cumprod sort topk kthvalue logcumsumexp",
    ),
    (rules.concatenated, "cat stack"),
    (
        rules.elementwise,
        "hardswish hardswish_ hardsigmoid _prelu_kernel leaky_relu silu mish native_dropout "
        "hardtanh hardtanh_ elu softplus where masked_fill masked_fill_ threshold rrelu_with_noise",
    ),
    (products.multiplied, "mm bmm addmm baddbmm mv addmv"),
    (products.grouped, "_grouped_mm"),
    (convolutions.convolved, "convolution"),
    (
        norms.normalized,
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "cudnn_batch_norm native_group_norm native_layer_norm _fused_rms_norm "
        "_batch_norm_no_update _batch_norm_with_update",
    ),
    (
        products.attended,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable",
    ),
    (products.embedded, "embedding"),
    (
        convolutions.spatial,
        "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool1d "
        "upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d "
        "upsample_nearest3d _upsample_nearest_exact2d "
        "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d grid_sampler_2d "
        "mkldnn_max_pool2d max_pool2d roi_align",
    ),
    (convolutions.columns, "im2col"),
    (products.gated, "glu"),
    (products.written, "copy_"),
    (products.added_at, "index_add index_add_"),
)
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES for name in names.split()}

_MADE = frozenset(
    (
        "zeros",
        "ones",
        "empty",
        "full",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "empty_strided",
        "new_empty_strided",
        "scalar_tensor",
    )
)
"""What makes a tensor of a size that the running code works out."""


class Recorder(TorchDispatchMode):
    """Follows labels through every operation that runs while it is entered.

    Args:
        known: States of parameters and buffers.
        inputs: The model's input tensors.

    Attributes:
        ledger: The records of the run.
        used: Parameters and buffers that some operation has read, by ``id``.
        called: Names of the modules that were called.
        operations: Names of the modules that were called and of the operations that computed
            something, one after the other.
    """

    def __init__(self, states: Sequence[tuple[Tensor, State]], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.used: set[int] = set()
        self.called: set[str] = set()
        self.operations: list[str] = []
        self._known = {id(tensor) for tensor, _ in states}
        self._states: Any = WeakTensorKeyDictionary()
        for tensor, state in states:
            self._states[tensor] = state
        for tensor in inputs:
            self._states[tensor] = State()
        # If the inputs are not visible, any tensor may depend on them.
        self._constant = State(weight=bool(inputs))
        self._stack: list[str] = []

    def state_of(self, tensor: Tensor) -> State:
        """Return the state of a tensor."""
        state = self._states.get(tensor)
        return self._constant if state is None else state

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Keep track of which module is running."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                enter = module.register_forward_pre_hook(
                    lambda module, inputs, name=name: self._enter(name, module, inputs),
                    prepend=True,
                )
                leave = module.register_forward_hook(
                    lambda _, __, ___: self._leave(), always_call=True
                )
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and record its effect on the labels."""
        kwargs = kwargs or {}
        output = operation(*args, **kwargs)
        if computes(operation):
            self.operations.append(str(operation))
        with _disable_current_modes():
            self._note(operation, args, kwargs, output)
        return output

    def _note(self, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs = tensors_of([*args, *kwargs.values()])
        self.used.update(self._known.intersection(map(id, inputs)))
        states = [self.state_of(tensor) for tensor in inputs]
        name = operation.overloadpacket.__name__
        outputs = tensors_of([output])
        if not any(state.layers for state in states):
            pliable = name in _MADE or (states and all(state.pliable for state in states))
            if pliable:
                for tensor in outputs:
                    self._states[tensor] = State(weight=True, pliable=True)
            elif not all(state.weight for state in states):
                for tensor in outputs:
                    self._states[tensor] = State()
            return
        module = self._stack[-1] if self._stack else ""
        call = Call(operation, tuple(args), kwargs, output, module, self.ledger, self.state_of)
        try:
            results = self._rule(operation, name)(call)
        except Exception:  # an unusual form of an operation: all its inputs are fixed
            results = rules.everything(call)
        results = [results] if isinstance(results, State) else list(results)
        for tensor, state in zip(outputs, results, strict=False):
            self._states[tensor] = state

    @staticmethod
    def _rule(operation: Any, name: str) -> Rule:
        rule = RULES.get(name) or (RULES.get(name[:-1]) if name.endswith("_") else None)
        if rule is None:
            pointwise = torch.Tag.pointwise in operation.tags
            rule = rules.elementwise if pointwise else rules.everything
        return rule

    def _enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._stack.append(name)
        self.called.add(name)
        self.operations.append(name)
        if (
            inputs
            and isinstance(inputs[0], Tensor)
            and isinstance(module, (_NormBase, nn.GroupNorm))
        ):
            for layer in self.state_of(inputs[0]).layers:
                if layer.shape[1] == inputs[0].shape[1] == layer.numel():
                    self._count(name, module, layer.reshape(-1))

    def _count(self, name: str, module: nn.Module, channels: Tensor) -> None:
        """Record the numbers that a norm without parameters, or one in groups, keeps on itself."""
        numbers = self.ledger.numbers
        if isinstance(module, _NormBase):
            if not [*module.parameters(), *module.buffers()]:
                numbers.append((name, "num_features", channels))
            return
        if not [*module.parameters()]:
            numbers.append((name, "num_channels", channels))
        groups = int(module.num_groups)  # type: ignore[arg-type]
        numbers.append((name, "num_groups", channels.reshape(groups, -1)[:, 0]))

    def _leave(self) -> None:
        self._stack.pop()
