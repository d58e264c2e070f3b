"""The pruning methods, and what applies them to models."""

from torchprune_bayes.methods.alps import ALPS
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.bmrs import BMRS, prune_gated
from torchprune_bayes.methods.cbs import CBS, PostUpdateCBS
from torchprune_bayes.methods.diagonal_fisher import DiagonalFisher
from torchprune_bayes.methods.force import FORCE
from torchprune_bayes.methods.global_pruning import (
    apply_decision,
    bake,
    detach_views,
    prune_global,
)
from torchprune_bayes.methods.grasp import GraSP
from torchprune_bayes.methods.greedy_obs import GreedyOBS
from torchprune_bayes.methods.hessian_diagonal import HessianDiagonal
from torchprune_bayes.methods.kfac import KFAC
from torchprune_bayes.methods.laplace_evidence import LaplaceEvidence
from torchprune_bayes.methods.layerwise import Layerwise
from torchprune_bayes.methods.magnitude import LayerMagnitude, Magnitude
from torchprune_bayes.methods.masks import export_masks, import_masks, masks_of
from torchprune_bayes.methods.opd import OPD
from torchprune_bayes.methods.paper_variant import PaperVariant
from torchprune_bayes.methods.random import Random
from torchprune_bayes.methods.registry import (
    RegisteredMethod,
    find_method,
    register,
    registered_methods,
)
from torchprune_bayes.methods.snip import SNIP, IterativeSNIP
from torchprune_bayes.methods.snipit import SNIPit
from torchprune_bayes.methods.sparsegpt import SparseGPT
from torchprune_bayes.methods.synflow import SynFlow
from torchprune_bayes.methods.wanda import Wanda
from torchprune_bayes.methods.woodfisher import WoodFisher
from torchprune_bayes.methods.woodtaylor import WoodTaylor

__all__ = [
    "ALPS",
    "BMRS",
    "CBS",
    "FORCE",
    "KFAC",
    "OPD",
    "SNIP",
    "DiagonalFisher",
    "GraSP",
    "GreedyOBS",
    "HessianDiagonal",
    "IterativeSNIP",
    "LaplaceEvidence",
    "LayerMagnitude",
    "Layerwise",
    "Magnitude",
    "PaperVariant",
    "PostUpdateCBS",
    "PruningMethod",
    "Random",
    "RegisteredMethod",
    "SNIPit",
    "SparseGPT",
    "SynFlow",
    "Wanda",
    "WoodFisher",
    "WoodTaylor",
    "apply_decision",
    "bake",
    "detach_views",
    "export_masks",
    "find_method",
    "import_masks",
    "masks_of",
    "prune_gated",
    "prune_global",
    "register",
    "registered_methods",
]
