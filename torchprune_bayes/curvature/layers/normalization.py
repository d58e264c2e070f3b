"""Normalisation layers: a weight that multiplies the normalised input ``x̂``, and a bias."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, group_norm, layer_norm

from torchprune_bayes.curvature.layers.gradients import DenseGradients, SampleGradients
from torchprune_bayes.curvature.layers.rule import LayerRule


class _ScaleRule(LayerRule):
    """``∂ℓ_n/∂w = Σ_t g_nt x̂_nt`` and ``∂ℓ_n/∂b = Σ_t g_nt``."""

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
        """See :meth:`LayerRule.gradients`."""
        scaled = g * self.normalised(module, saved).to(g)
        return {
            "weight": DenseGradients(self.per_sample(module, scaled, samples)),
            "bias": DenseGradients(self.per_sample(module, g, samples)),
        }


class LayerNormRule(_ScaleRule):
    """``nn.LayerNorm``, and timm's and torchvision's ``LayerNorm2d`` over channels."""

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        return isinstance(module, nn.LayerNorm) and module.elementwise_affine

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """What is kept of the forward pass."""
        return _channels_last(module, inputs.detach())

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        return layer_norm(saved, module.normalized_shape, None, None, module.eps)

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        """See :meth:`LayerRule.gradients`."""
        return super().gradients(module, saved, _channels_last(module, g), samples)


class RMSNormRule(_ScaleRule):
    """``nn.RMSNorm``, and modules named so as in Hugging Face's and timm's models."""

    names = ("weight",)

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        weight = getattr(module, "weight", None)
        named = type(module).__name__.lower().endswith("rmsnorm")
        return named and isinstance(weight, Tensor) and weight.ndim == 1

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        eps = torch.finfo(saved.dtype).eps if eps is None else eps
        return saved * torch.rsqrt(saved.square().mean(-1, keepdim=True) + eps)


class _ChannelRule(_ScaleRule):
    """Weights per channel, and channels in the second dimension."""

    def per_sample(self, module: Any, values: Tensor, samples: int) -> Tensor:
        channels = values.shape[1]
        return values.reshape(samples, -1, channels, values[0, 0].numel()).sum((1, 3))


class BatchNormRule(_ChannelRule):
    """Batch normalisation in eval mode, with running statistics."""

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        return isinstance(module, kinds) and module.affine and module.track_running_stats

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """What is kept of the forward pass."""
        # The buffers in use: those of the module itself may be on another device.
        layer = cast("nn.BatchNorm2d", module)
        return inputs.detach(), layer.running_mean, layer.running_var

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        inputs, mean, variance = saved
        return batch_norm(inputs, mean, variance, eps=module.eps)


class GroupNormRule(_ChannelRule):
    """``nn.GroupNorm``."""

    def applies_to(self, module: nn.Module) -> bool:
        """Whether this is such a layer."""
        return isinstance(module, nn.GroupNorm) and module.affine

    def normalised(self, module: Any, saved: Any) -> Tensor:
        """``x̂``."""
        return group_norm(saved, module.num_groups, None, None, module.eps)


def _channels_last(module: nn.Module, values: Tensor) -> Tensor:
    return values.movedim(1, -1) if type(module).__name__ == "LayerNorm2d" else values
