"""Normalisation layers: a weight that multiplies the normalised input ``x̂``, and a bias."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, group_norm, layer_norm
from torch.nn.modules.batchnorm import _NormBase

from torchprune_bayes.layer_kinds.gradients import DenseGradients, SampleGradients
from torchprune_bayes.layer_kinds.kind import LayerKind, Side

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _NormKind(LayerKind):
    """``∂ℓ_n/∂w = Σ_t g_nt x̂_nt`` and ``∂ℓ_n/∂b = Σ_t g_nt``."""

    is_norm = True

    @abstractmethod
    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""

    def per_sample(self, module: Any, values: Tensor, samples: int) -> Tensor:
        """Sum over everything but samples and the weight's own dimensions; these come last."""
        shape = module.weight.shape
        return values.reshape(samples, -1, *shape).sum(1)

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerKind.gradients`."""
        scaled = g * self.normalised(module, saved).to(g)
        return {
            "weight": DenseGradients(self.per_sample(module, scaled, samples)),
            "bias": DenseGradients(self.per_sample(module, g, samples)),
        }


class LayerNormKind(_NormKind):
    """``nn.LayerNorm``, and timm's and torchvision's ``LayerNorm2d`` over channels."""

    units_dim = -1

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.LayerNorm)

    def is_per_unit(self, module: nn.Module) -> bool | None:
        """Over one dimension."""
        return True if len(cast("nn.LayerNorm", module).normalized_shape) == 1 else None

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``normalized_shape``."""
        return {"normalized_shape": tuple(tensors["weight"].shape)} if "weight" in tensors else {}

    def has_gradients(self, module: nn.Module) -> bool:
        """Where there are weights."""
        return cast("nn.LayerNorm", module).elementwise_affine

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """What is kept of the forward pass."""
        return _channels_last(module, inputs.detach())

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        return layer_norm(saved, module.normalized_shape, None, None, module.eps)

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerKind.gradients`."""
        return super().gradients(module, saved, _channels_last(module, g), samples)


class RMSNormKind(_NormKind):
    """``nn.RMSNorm``, and modules named so as in Hugging Face's and timm's models."""

    names = ("weight",)

    units_dim = -1

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return type(module).__name__.lower().endswith("rmsnorm")

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``normalized_shape`` of PyTorch's own."""
        own = isinstance(module, nn.RMSNorm) and "weight" in tensors
        return {"normalized_shape": tuple(tensors["weight"].shape)} if own else {}

    def has_gradients(self, module: nn.Module) -> bool:
        """Where there is a weight for each unit."""
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and weight.ndim == 1

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        eps = torch.finfo(saved.dtype).eps if eps is None else eps
        return saved * torch.rsqrt(saved.square().mean(-1, keepdim=True) + eps)


class _ChannelKind(_NormKind):
    """Weights per channel, and channels in the second dimension."""

    def per_sample(self, module: Any, values: Tensor, samples: int) -> Tensor:
        channels = values.shape[1]
        return values.reshape(samples, -1, channels, values[0, 0].numel()).sum((1, 3))


class BatchNormKind(_ChannelKind):
    """Batch normalisation in eval mode, with running statistics."""

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind, instance norms among them."""
        return isinstance(module, _NormBase)

    def gate_entries(self, module: nn.Module, side: Side) -> int | None:
        """Channels, behind affine batch norms; timm's variants apply an activation before hooks."""
        if type(module) not in _BATCH_NORMS or side == "in":
            return None
        layer = cast("nn.BatchNorm2d", module)
        return layer.num_features if layer.affine else None

    def is_per_unit(self, module: nn.Module) -> bool | None:
        """Always."""
        return True

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``num_features``."""
        return _length("num_features", tensors)

    def has_gradients(self, module: nn.Module) -> bool:
        """With weights and running statistics."""
        layer = cast("nn.BatchNorm2d", module)
        return isinstance(module, _BATCH_NORMS) and layer.affine and layer.track_running_stats

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """What is kept of the forward pass."""
        # The buffers in use: those of the module itself may be on another device.
        layer = cast("nn.BatchNorm2d", module)
        return inputs.detach(), layer.running_mean, layer.running_var

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        inputs, mean, variance = saved
        return batch_norm(inputs, mean, variance, eps=module.eps)


class GroupNormKind(_ChannelKind):
    """``nn.GroupNorm``."""

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, nn.GroupNorm)

    def is_per_unit(self, module: nn.Module) -> bool | None:
        """With weights, whose groups can then be told."""
        return True if cast("nn.GroupNorm", module).affine else None

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``num_channels``."""
        return _length("num_channels", tensors)

    def has_gradients(self, module: nn.Module) -> bool:
        """Where there are weights."""
        return cast("nn.GroupNorm", module).affine

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        return group_norm(saved, module.num_groups, None, None, module.eps)


def _length(attribute: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    vectors = [tensor for tensor in tensors.values() if tensor.dim() == 1]
    return {attribute: vectors[0].shape[0]} if vectors else {}


def _channels_last(module: nn.Module, values: Tensor) -> Tensor:
    return values.movedim(1, -1) if type(module).__name__ == "LayerNorm2d" else values
