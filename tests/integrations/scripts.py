"""Running the recipes in this process, where everything is imported already."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).resolve().parents[2] / "integrations"


@contextmanager
def recipe(framework: str, name: str) -> Iterator[ModuleType]:
    """Import ``integrations/<framework>/<name>.py`` as Python does when it is run."""
    folder = RECIPES / framework
    before, modules = list(sys.path), set(sys.modules)
    handlers = list(logging.root.handlers)
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        logging.root.handlers[:] = handlers
        for new in set(sys.modules) - modules:
            if str(getattr(sys.modules[new], "__file__", "")).startswith(str(RECIPES)):
                del sys.modules[new]
