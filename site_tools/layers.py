"""The layers of the package, read from the import contract and drawn as a stack."""

from __future__ import annotations

import sys
from html import escape
from importlib import import_module
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def contract() -> list[list[str]]:
    """Modules of each layer, from the top down, as the import contract lists them.

    Example:
        >>> contract()[-1]
        ['types', 'errors']
    """
    settings = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    [layered] = [entry for entry in contracts if entry["type"] == "layers"]
    return [[name.strip() for name in layer.split("|")] for layer in layered["layers"]]


def drawn() -> str:
    """A row for each layer, a box for each module with the first line of its docstring."""
    rows = ["".join(_box(name) for name in layer) for layer in contract()]
    body = "\n".join(f'<div class="layer">{row}</div>' for row in rows)
    return f'<div class="layers">\n{body}\n</div>'


def _box(name: str) -> str:
    # __main__ would run the command line.
    text = None if name == "__main__" else import_module(f"torchprune_bayes.{name}").__doc__
    first = (text or "``python -m torchprune_bayes``").strip().partition("\n")[0]
    first = escape(first.replace("``", ""))
    return f'<div class="box"><code>{escape(name)}</code><span>{first}</span></div>'
