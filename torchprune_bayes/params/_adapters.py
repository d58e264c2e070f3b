"""Models with adapters (those of ``peft``): what is the base in them, and what are adapters.

In plain words: a low-rank adapter stands around a frozen layer, its ``base_layer``, and all else
inside it is the adapter. A layer that is trained whole (``modules_to_save``) is stored beside a
frozen ``original_module`` that is not used. They are recognised by these names, so that ``peft``
need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn


def adapted_base(module: nn.Module) -> nn.Module | None:
    """The layer that an adapter stands around; ``None`` for a module that is no such adapter.

    Example:
        >>> adapted_base(nn.Linear(2, 2)) is None
        True
    """
    base = getattr(module, "base_layer", None)
    marks = ("adapter_layer_names", "get_delta_weight")
    return base if isinstance(base, nn.Module) and any(hasattr(module, m) for m in marks) else None


def has_adapters(modules: Mapping[str, nn.Module]) -> bool:
    """Whether any of a model's modules is an adapter."""
    return any(adapted_base(m) is not None or _is_prompted(m) for m in modules.values())


def adapter_modules(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the modules that are adapters, or unused originals of fully trained layers.

    Args:
        modules: A model's ``named_modules()``.
    """
    names: set[str] = set()
    for name, module in modules.items():
        if adapted_base(module) is not None:
            base = names_inside(modules, _joined(name, "base_layer"))
            names |= names_inside(modules, name) - base - {name}
        elif _is_trained_whole(module):
            for place in ("original_module", *_inactive(module)):
                names |= names_inside(modules, _joined(name, place))
        elif _is_prompted(module):
            names |= names_inside(modules, _joined(name, "prompt_encoder"))
    return names


def names_inside(modules: Iterable[str], root: str) -> set[str]:
    """Those of the qualified names that are ``root`` or lie inside it."""
    return {name for name in modules if f"{name}.".startswith(f"{root}." if root else "")}


def _is_prompted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "prompt_encoder", None), nn.ModuleDict)


def _is_trained_whole(module: nn.Module) -> bool:
    kept = getattr(module, "modules_to_save", None)
    return isinstance(kept, nn.ModuleDict) and hasattr(module, "original_module")


def _inactive(module: nn.Module) -> list[str]:
    copies = cast(nn.ModuleDict, module.modules_to_save)
    active = getattr(module, "active_adapters", list(copies))
    return [f"modules_to_save.{name}" for name in copies if name not in active]


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
