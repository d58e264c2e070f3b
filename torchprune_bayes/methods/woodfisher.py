"""WoodFisher: second-order pruning with the inverse empirical Fisher."""

from __future__ import annotations

from torchprune_bayes.methods._obs import ObsPruning
from torchprune_bayes.methods.registry import register


@register(
    "woodfisher",
    title="optimal brain surgeon with the empirical Fisher",
    paper="arXiv:2004.14340",
)
class WoodFisher(ObsPruning):
    """Prune the weights whose removal raises a local quadratic model of the loss the least.

    `WoodFisher (Singh and Alistarh, 2020) <https://arxiv.org/abs/2004.14340>`_: with the damped
    empirical Fisher ``F = λI + (1/N) Σ g gᵀ`` in the place of the Hessian, removing weight ``q``
    and moving the others optimally costs ``ρ_q = w_q²/(2F⁻¹_qq)``. The smallest ``ρ`` are pruned,
    and the survivors move to make up for it.

    The Fisher is inverted exactly in the space of the samples, so a block may be a layer or the
    whole network. Two things matter more than anything else. *Stages* score what is left anew, with
    the same gradients, after each part of the pruning. *Steps* also take fresh gradients at the
    weights that the last step left: on MLPNet at 98 % sparsity, magnitude pruning is right on
    32.3 % of the test images, one step with four stages on 60.6 %, sixteen steps on 89.1 %.

    Args:
        amount: Fraction (float) or number (int) of the live entries to prune; ``None`` with
            ``flops_target``, and with an N:M pattern, which fixes it.
        calibration: Data, model and loss.
        curvature: An :class:`~torchprune_bayes.curvature.EmpiricalFisher` fitted already.
        block_size: Blocks of the Fisher: ``"full"``, ``"tensor"``, an int, or ``"auto"``: one
            block or blocks of ``2N`` entries, whichever has the smaller loss on held-out samples;
            where the budget does not hold the gradients, the largest blocks that it holds.
        damping: ``λ``, or ``"auto"``: the value, in units of the mean squared gradient, whose
            result has the smallest loss on held-out samples.
        update: ``"none"`` only selects; ``"single"`` adds up the updates for removing each weight
            alone, as the paper does; ``"joint"`` solves for all of them together.
        update_scale: Share of the update to take, or ``"auto"``, a line search on held-out loss.
        steps: Steps with fresh gradients.
        stages: Parts of each step, or ``"auto"``: 4 for one step with the joint update, else 1.
        path: Sparsity over the steps, ``"cubic"``, ``"geometric"`` or ``"linear"``.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.
        across_tensors: Whether blocks of a given size may span several tensors.
        active_only: Whether blocks are cut from live entries alone.
        centred: Whether the mean gradient is subtracted from the gradients.
        flops_power: Scores are divided by the FLOPs per weight to this power.
        flops_target: Share of the dense FLOPs of these tensors to keep.
        pattern: ``"2:4"`` keeps two of every four inputs of an output, any ``"N:M"`` likewise;
            ``"1x4"`` keeps or prunes four inputs of an output together, and ``amount`` is a
            fraction of such groups. Groups count from the first input of a linear layer, and from
            the first input channel at each place of a convolution's kernel; the number of inputs
            must be a multiple of their size. A group is scored by what its removal costs with the
            interactions within it, ``½ w_gᵀ(F⁻¹_gg)⁻¹w_g``.
        compat: ``"paper"`` takes over the published code's threshold and its epsilon, for
            comparison with its numbers.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is neither calibration nor curvature.
        ParameterError: If the inputs of a tensor cannot be cut into the groups of the pattern.

    Cost per step: ``N`` gradients; ``2N²D`` operations for the scores and as many for the update;
    ``4ND`` bytes, or as much of it as the calibration's memory budget allows.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torchprune_bayes import Calibration, WoodFisher, prunable_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> params = prunable_parameters(model)
        >>> calibration = Calibration(
        ...     model, data, torch.nn.functional.cross_entropy, params=params, num_samples=64
        ... )
        >>> prune.global_unstructured(
        ...     params, pruning_method=WoodFisher, amount=0.5, calibration=calibration
        ... )
        >>> sum(int((module.weight == 0).sum()) for module, _ in params)
        88
    """
