"""What a weight costs: FLOPs per weight of each tensor, counted on one calibration sample."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError


def flops_per_weight(calibration: Calibration) -> dict[str, float]:
    """Count the FLOPs of each layer's forward pass, per weight and sample.

    A convolution's weight is used once per output position, a linear layer's once per token, so
    this is twice the number of uses (a multiplication and an addition each). Counted by
    ``torch.utils.flop_counter`` while one sample runs through the model.

    Args:
        calibration: Model and data.

    Returns:
        FLOPs per weight by qualified name, in the order of the calibration's parameters.

    Raises:
        ArgumentError: If a layer was not reached, or does nothing that is counted.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 2))
        >>> data = [(torch.randn(4, 1, 4, 4), torch.randint(2, (4,)))]
        >>> flops_per_weight(Calibration(model, data, nn.functional.cross_entropy))
        {'0.weight': 8.0, '2.weight': 2.0}
    """
    sample = next(calibration.batches(size=1))
    # The counter follows modules by name only when it sees the model itself being called.
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        calibration.loss(None, sample)
    counts = counter.get_flop_counts()
    root = type(calibration.model).__name__
    found = {}
    for tensor in calibration.space:
        layer = tensor.name.removesuffix(f".{tensor.tensor_name}")
        flops = sum(counts.get(f"{root}.{layer}", {}).values())
        if not flops:
            raise ArgumentError(
                f"Expected countable FLOPs in the layer of `{tensor.name}`, got none: leave it "
                "out of the parameters, or use no FLOP-aware option."
            )
        found[tensor.name] = flops / tensor.leaf.numel()
    return found
