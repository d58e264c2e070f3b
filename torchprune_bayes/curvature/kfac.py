"""Kronecker factors of the Fisher of linear and convolution layers (K-FAC)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import pad, unfold

from torchprune_bayes._numerics.fisher_blocks import gram
from torchprune_bayes._numerics.kronecker import KroneckerInverse
from torchprune_bayes.calibration import Calibration, batch_size
from torchprune_bayes.curvature._leaves import leaves_of
from torchprune_bayes.curvature._sample_sums import SampleSums
from torchprune_bayes.errors import CalibrationError, ParameterError
from torchprune_bayes.params import ParameterSpace, PrunableTensor, is_hf_conv1d
from torchprune_bayes.types import Masks

_BATCH = 64


class KroneckerFactors(SampleSums):
    """``F ≈ G ⊗ A`` of each layer's weight ``[out, in]``, the two factors apart.

    `K-FAC (Martens and Grosse, 2015) <https://arxiv.org/abs/1503.05671>`_: the gradient of a sample
    is ``g aᵀ``, with the layer's input ``a`` and the gradient ``g`` by its output, and the Fisher
    ``E[ggᵀ ⊗ aaᵀ]`` is taken as ``E[ggᵀ] ⊗ E[aaᵀ]``. A layer that is used at ``S`` positions per
    sample (a convolution, or a linear layer on tokens) has a gradient that is a sum over
    positions; with these independent of each other (`arXiv 1602.01407
    <https://arxiv.org/abs/1602.01407>`_)::

        A = (1/N) Σ_n Σ_s (a_ns/S)(a_ns/S)ᵀ        G = (1/NS) Σ_n Σ_s (S g_ns)(S g_ns)ᵀ

    Biases and dependences between layers are left out, and of a tied weight the uses in other
    layers than the listed one. Gradients are of single samples, whatever the calibration's
    mini-batch; the loss has to be a mean over the batch.

    Supported are ``nn.Linear``, ``nn.Conv2d`` without groups and Hugging Face's ``Conv1D``.

    Attributes:
        calibration: Where the samples came from; ``None`` after ``load``.
        masks: Entries that were alive, by qualified name.
        count: Number of samples ``N``.
        sums: ``N`` times the factors, float64: ``"rows:<name>"``, the factor over the first
            dimension of the weight, and ``"columns:<name>"``, the one over the others.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 2))
        >>> data = [(torch.randn(16, 3), torch.randint(2, (16,)))]
        >>> calibration = Calibration(model, data, nn.functional.cross_entropy)
        >>> factors = KroneckerFactors().fit(calibration)
        >>> [tuple(factor.shape) for factor in factors.factors("0.weight")]
        [(2, 2), (3, 3)]
        >>> factors.inverse("0.weight", damping=1e-3).diagonal().shape
        torch.Size([2, 3])
    """

    def fit(
        self,
        calibration: Calibration,
        weights: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> KroneckerFactors:
        """Sum over the calibration samples at ``weights``; returns itself.

        Args:
            calibration: Data, model and loss.
            weights: Values by qualified name; default the model's own.
            masks: Live entries; default those of the model. The factors do not depend on them.

        Raises:
            CalibrationError: If a factor is not finite, or there are too few samples.
            ParameterError: If a layer is not supported.

        Cost: one forward and backward pass, ``N S (in² + out²)`` multiplications and
        ``8(in² + out²)`` bytes per layer.
        """
        self.masks = calibration.space.masks() if masks is None else masks
        space = calibration.space.subset(self.masks)
        space.check_hookable()
        for tensor in space:
            _check_supported(tensor)
        self.sums = {
            key: torch.zeros(size, size, dtype=torch.float64, device=calibration.device)
            for tensor in space
            for key, size in zip(_keys(tensor.name), tensor.leaf.flatten(1).shape, strict=True)
        }
        leaves = leaves_of(calibration, weights)
        for batch in calibration.fisher_batches(leaves, _BATCH):
            with _recorded(space) as layers, torch.enable_grad():
                loss = calibration.loss(leaves, batch)
            self._add(layers, loss, batch_size(batch))
        self.count, self.calibration = calibration.num_samples, calibration
        _check_finite_sums(self.sums)
        return self

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The factors over the first and over the other dimensions of a weight, float64.

        For ``[out, in]`` these are ``G`` and ``A``; for Hugging Face's ``Conv1D``, whose weights
        are ``[in, out]``, ``A`` and ``G``.
        """
        rows, columns = (self.sums[key] / self.count for key in _keys(name))
        return rows, columns

    def inverse(self, name: str, damping: float, *, pi: bool = False) -> KroneckerInverse:
        """Damped inverse of the block of one weight.

        Args:
            name: Qualified name of the weight.
            damping: ``λ``.
            pi: Whether the damping is shared out by the mean eigenvalues of the factors.
        """
        return KroneckerInverse(*self.factors(name), damping, pi=pi)

    def _add(self, layers: Collection[_Layer], loss: Tensor, samples: int) -> None:
        edges = [edge for layer in layers for edge in layer.outputs]
        found = iter(torch.autograd.grad(loss, edges, allow_unused=True))
        for layer in layers:
            positions = layer.uses / samples
            outputs = sum(
                gram(_output_columns(layer.module, gradient))
                for gradient in islice(found, len(layer.outputs))
                if gradient is not None
            )
            # The loss is a mean, so a sample's own gradient is `samples` times larger.
            both = [samples**2 * positions * outputs, layer.inputs / positions**2]
            if is_hf_conv1d(layer.module):
                both.reverse()
            for key, value in zip(_keys(layer.name), both, strict=True):
                self.sums[key] += value


@dataclass
class _Layer:
    """What one layer saw in one forward pass."""

    name: str
    module: nn.Module
    uses: int = 0
    """Samples times positions."""
    inputs: Tensor = field(default_factory=partial(torch.zeros, ()))
    """``Σ aaᵀ`` over the uses."""
    outputs: list[GradientEdge] = field(default_factory=list)
    """Where in the graph its outputs are, one per call."""


@contextmanager
def _recorded(space: ParameterSpace) -> Iterator[Collection[_Layer]]:
    """Record, by hooks, the layers that run inside; the hooks are gone afterwards."""
    layers: dict[str, _Layer] = {}

    def record(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        columns = _input_columns(module, [*args, *kwargs.values()][0].detach())
        layer = layers.setdefault(name, _Layer(name, module))
        layer.uses += columns.shape[-1]
        layer.inputs = layer.inputs + gram(columns)
        if output.requires_grad:
            # An edge, because the tensor itself may be overwritten in place by what follows.
            layer.outputs.append(get_gradient_edge(output))

    with ExitStack() as stack:
        for tensor in space:
            hook = partial(record, tensor.name)
            handle = tensor.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield layers.values()


def _input_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """What the weight is multiplied with, ``[in, uses]``."""
    if not isinstance(module, nn.Conv2d):
        return inputs.reshape(-1, inputs.shape[-1]).mT
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = pad(inputs, module._reversed_padding_repeated_twice, mode)
    patches = unfold(padded, module.kernel_size, module.dilation, stride=module.stride)
    return patches.transpose(0, 1).flatten(1)


def _output_columns(module: nn.Module, outputs: Tensor) -> Tensor:
    """The same of outputs or their gradients, ``[out, uses]``."""
    channels = 1 if isinstance(module, nn.Conv2d) else -1
    return outputs.movedim(channels, 0).flatten(1)


def _keys(name: str) -> tuple[str, str]:
    return f"rows:{name}", f"columns:{name}"


def _check_supported(tensor: PrunableTensor) -> None:
    module = tensor.module
    known = isinstance(module, nn.Linear) or is_hf_conv1d(module)
    if isinstance(module, nn.Conv2d):
        known = module.groups == 1
    if not known or tensor.tensor_name != "weight":
        raise ParameterError(
            "Expected weights of nn.Linear, nn.Conv2d without groups or Hugging Face's Conv1D for "
            f"Kronecker factors, got `{tensor.name}` of {module}: leave it out of the parameters."
        )


def _check_finite_sums(sums: Mapping[str, Tensor]) -> None:
    bad = [key.partition(":")[2] for key, value in sums.items() if not value.isfinite().all()]
    if bad:
        raise CalibrationError(
            f"Expected finite Kronecker factors, got NaN or infinite entries in "
            f"{', '.join(dict.fromkeys(bad))}: check the loss, the data and the weights."
        )
