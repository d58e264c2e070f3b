"""Importances of units, one published method each."""

from torchprune_bayes.structured.importances.bmrs import BMRSImportance
from torchprune_bayes.structured.importances.consumer_gate_fisher import (
    ConsumerGateFisherImportance,
)
from torchprune_bayes.structured.importances.laplace_evidence import LaplaceEvidenceImportance
from torchprune_bayes.structured.importances.largest import LargestWeightImportance
from torchprune_bayes.structured.importances.magnitude import L1FilterImportance
from torchprune_bayes.structured.importances.opd import OPDImportance
from torchprune_bayes.structured.importances.random import RandomImportance
from torchprune_bayes.structured.importances.snapit import SNAPitImportance, halving_path
from torchprune_bayes.structured.importances.woodfisher import WoodFisherImportance

__all__ = [
    "BMRSImportance",
    "ConsumerGateFisherImportance",
    "L1FilterImportance",
    "LaplaceEvidenceImportance",
    "LargestWeightImportance",
    "OPDImportance",
    "RandomImportance",
    "SNAPitImportance",
    "WoodFisherImportance",
    "halving_path",
]
