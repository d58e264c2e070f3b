"""What methods share that take a Laplace posterior of a model's weights."""

from __future__ import annotations

from torch import nn

from torchprune_bayes.errors import AlignmentError
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.params import ParameterSpace, prunable_parameters

_TOLERANCE = 1e-3  # of the largest weight: a posterior in half precision still fits


def space_of_posterior(model: nn.Module, posterior: Posterior) -> ParameterSpace:
    """The prunable parameters of a model that are in a posterior.

    Raises:
        AlignmentError: If there are none.
    """
    space = ParameterSpace(model, prunable_parameters(model))
    found = [name for name in space.names if name in posterior.mean]
    if not found:
        raise AlignmentError(
            "Expected a posterior of weights of the model, got one of "
            f"{', '.join(posterior.names[:3])}."
        )
    return space.subset(found)


def check_fitted_to(posterior: Posterior, space: ParameterSpace) -> None:
    """Refuse a posterior of other tensors or at other weights.

    Raises:
        AlignmentError: In these cases.
    """
    for tensor in space:
        mean = posterior.mean.get(tensor.name)
        if mean is None or mean.shape != tensor.leaf.shape:
            raise AlignmentError(f"Expected a posterior of `{tensor.name}` as well, got none.")
        moved = (mean.to(tensor.leaf.device) - tensor.value)[tensor.mask].abs()
        largest = float(tensor.leaf.detach().abs().max())
        if moved.numel() and float(moved.max()) > _TOLERANCE * largest:
            raise AlignmentError(
                f"Expected a posterior at the weights of `{tensor.name}`, got one at others: fit "
                "it again."
            )
