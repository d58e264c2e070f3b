"""Which tensors are pruned, by which names, and how they are seen as one vector.

In plain words: a tensor with a mask of PyTorch's pruning lives in ``<name>_orig`` (the leaf, an
``nn.Parameter``) and ``<name>_mask`` (a buffer), and ``<name>`` is a view made of the two. What a
method works on is always ``leaf * mask``: the optimizer may have moved masked entries of the leaf.
"""

from torchprune_bayes.params._adapters import adapted_base
from torchprune_bayes.params._layers import prunable_parameters, unwrap
from torchprune_bayes.params._pairs import ParameterPair, without_repeats
from torchprune_bayes.params._space import ParameterSpace
from torchprune_bayes.params._tensors import PrunableTensor, is_pruned, leaf, mask_of

__all__ = [
    "ParameterPair",
    "ParameterSpace",
    "PrunableTensor",
    "adapted_base",
    "is_pruned",
    "leaf",
    "mask_of",
    "prunable_parameters",
    "unwrap",
    "without_repeats",
]
