"""What is wrong with a call of ``shrink`` that a training will make later, said before it."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.structured._recipe import check_recipe
from torchprune_bayes.structured._steps import sparsities
from torchprune_bayes.structured.shrink import shrink

_OF_THE_RECIPE = ("allocation", "repair", "evaluations", "min_keep", "round_to")
_GIVEN = ("model", "example_inputs", "importance", "optimizer", "ema")


def check_later_call(importance: Any, options: Mapping[str, Any]) -> None:
    """Check what makes the importance, and the names and values of options.

    Args:
        importance: Expected to be a function ``model -> importance``, which is not called.
        options: Further arguments of :func:`~torchprune_bayes.structured.shrink`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If an option has the wrong type or is none, or the importance is given
            itself, which would speak of the model as it was.

    Example:
        >>> check_later_call(lambda model: None, {"taget": "flops"})
        Traceback (most recent call last):
        ...
        torchprune_bayes.errors.ArgumentTypeError: Expected options of `shrink`, got `taget`.
    """
    # Imported here because it loads torch-pruning, which a training without it does not need.
    from torchprune_bayes.structured.importance import UnitImportance

    theirs = type(importance).__module__.partition(".")[0] == "torch_pruning"
    if theirs or isinstance(importance, (Calibration, UnitImportance)) or not callable(importance):
        raise ArgumentTypeError(
            f"Expected a function of the model as `importance`, got {importance!r:.80}: write "
            "`lambda model: ...` around it, which is called before every cut."
        )
    names = signature(shrink).parameters.keys() - {*_GIVEN}
    unknown = [f"`{name}`" for name in options if name not in names]
    if unknown:
        raise ArgumentTypeError(f"Expected options of `shrink`, got {', '.join(unknown)}.")
    check_recipe(**{key: options[key] for key in _OF_THE_RECIPE if key in options})
    target = options.get("target", "params")
    sparsity = options.get("sparsity", None if target == "evidence" else 0.0)
    if "sparsity" in options or "steps" not in options or isinstance(options["steps"], int):
        sparsities(sparsity, target, options.get("steps", 1))
