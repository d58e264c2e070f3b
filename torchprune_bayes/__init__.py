"""Second-order and Bayesian pruning as drop-in methods for the pruning APIs you already use.

Prune with PyTorch's own function, with any method in the place of its own:

>>> import torch
>>> from torch.nn.utils import prune
>>> from torchprune_bayes import Calibration, WoodFisher, prunable_parameters
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> data = [(torch.randn(64, 8), torch.randint(2, (64,)))]
>>> params = prunable_parameters(model)
>>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy, params=params)
>>> prune.global_unstructured(
...     params, pruning_method=WoodFisher, amount=0.5, calibration=calibration
... )

Importing this package loads torch, safetensors and tqdm, and no optional dependency.
"""

from importlib.metadata import version as _version

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import (
    EmpiricalFisher,
    LayerCurvature,
)
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.methods import (
    BMRS,
    CBS,
    FORCE,
    KFAC,
    OPD,
    SNIP,
    DiagonalFisher,
    GraSP,
    GreedyOBS,
    HessianDiagonal,
    IterativeSNIP,
    LaplaceEvidence,
    LayerMagnitude,
    Layerwise,
    Magnitude,
    PaperVariant,
    PostUpdateCBS,
    PruningMethod,
    SNIPit,
    SparseGPT,
    SynFlow,
    Wanda,
    WoodFisher,
    WoodTaylor,
    bake,
    detach_views,
    export_masks,
    import_masks,
    masks_of,
    prune_global,
    registered_methods,
)
from torchprune_bayes.params import prunable_parameters
from torchprune_bayes.schedules import constant, cubic, geometric, halving, linear, one_shot
from torchprune_bayes.training import (
    GateTraining,
    GradualPruner,
    IterativeMagnitudePruning,
    SpaM,
    keep_sparse,
    reestimate_batch_norm,
)
from torchprune_bayes.types import Decision, Masks, Scores

__version__ = _version("torchprune_bayes")

__all__ = [
    "BMRS",
    "CBS",
    "FORCE",
    "KFAC",
    "OPD",
    "SNIP",
    "Calibration",
    "Decision",
    "DiagonalFisher",
    "EmpiricalFisher",
    "GateTraining",
    "GraSP",
    "GradualPruner",
    "GreedyOBS",
    "HessianDiagonal",
    "IterativeMagnitudePruning",
    "IterativeSNIP",
    "LaplaceEvidence",
    "LayerCurvature",
    "LayerMagnitude",
    "Layerwise",
    "Magnitude",
    "Masks",
    "PaperVariant",
    "PostUpdateCBS",
    "Posterior",
    "PruningMethod",
    "SNIPit",
    "Scores",
    "SpaM",
    "SparseGPT",
    "SynFlow",
    "Wanda",
    "WoodFisher",
    "WoodTaylor",
    "bake",
    "constant",
    "cubic",
    "detach_views",
    "export_masks",
    "geometric",
    "halving",
    "import_masks",
    "keep_sparse",
    "linear",
    "masks_of",
    "one_shot",
    "prunable_parameters",
    "prune_global",
    "reestimate_batch_norm",
    "registered_methods",
]
