"""Peak memory of WoodFisher on a ResNet-50 with 25.6 million parameters, beyond the model.

    python -m tests.benchmarks.resnet50_memory

Random weights and inputs: memory depends on shapes alone. The peak resident memory of the process
is compared with that after one forward and backward pass, which any use of the model needs. Linux.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import nn

from torchprune_bayes import Calibration, prunable_parameters, prune_global


def peak_mib() -> float:
    """Largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prune to 90 % and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--block-size", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--update", default="none", choices=["none", "single", "joint"])
    arguments = parser.parse_args()
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet50").eval()
    images = torch.randn(arguments.samples, 3, arguments.image_size, arguments.image_size)
    labels = torch.randint(1000, (arguments.samples,))
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    loss = nn.functional.cross_entropy(model(images[:1]), labels[:1])
    loss.backward()
    model.zero_grad(set_to_none=True)
    before = peak_mib()
    params = prunable_parameters(model)
    calibration = Calibration(
        model, batches, nn.functional.cross_entropy, params, progress=True, vectorize=False
    )
    start = time.perf_counter()
    prune_global(
        params,
        "woodfisher",
        amount=0.9,
        calibration=calibration,
        block_size=arguments.block_size,
        damping=1e-5,
        update=arguments.update,
        update_scale=1.0,
        stages=1,
    )
    masks_mib = sum(getattr(module, f"{name}_mask").nbytes for module, name in params) / 2**20
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{weights / 1e6:.1f} M parameters, N = {arguments.samples}, blocks of "
        f"{arguments.block_size}, update {arguments.update}: peak {peak_mib() - before:.0f} MiB "
        f"beyond the model (of these {masks_mib:.0f} MiB are PyTorch's masks, and as much the "
        f"masked weights), {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
