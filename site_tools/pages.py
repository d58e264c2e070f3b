"""Hooks of mkdocs: what pages ask for with ``<!-- word: argument -->`` is made from the code.

===========================  =====================================================
``method: NAME``             name, class, paper and needs of a registered method
``options: NAME``            its option table, from signature and docstring
``methods``                  the table of all registered methods
``api: MODULE``              every public name of a module, rendered by mkdocstrings
``layers``                   the layers of the import contract, drawn
``changelog``                CHANGELOG.md
===========================  =====================================================

Equations between ``$$`` become MathML, which browsers show without a script.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from site_tools import layers, method_tables  # noqa: E402  # mkdocs loads this file by its path

_DIRECTIVE = re.compile(r"^<!-- ([a-z]+)(?:: (\S+))? -->$", re.MULTILINE)
_EQUATION = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in directives and equations of a page; called by mkdocs."""
    filled = _DIRECTIVE.sub(_filled, markdown)
    return _EQUATION.sub(lambda found: _equation(found.group(1)), filled)


def public_names(module: str) -> list[str]:
    """Full names of what a module exports, classes first; without ``__all__`` what it defines."""
    found = import_module(module)
    names = getattr(found, "__all__", None) or [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]
    return [f"{module}.{name}" for name in sorted(names, key=lambda n: (n[0].islower(), n))]


def _filled(found: re.Match[str]) -> str:
    word, argument = found.groups()
    make = _MAKERS.get(word)
    return found.group(0) if make is None else make(argument)


def _api(module: str) -> str:
    return "\n\n".join(f"::: {name}" for name in public_names(module))


def _changelog(_: str | None) -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.partition("\n")[2].strip()


def _equation(latex: str) -> str:
    return f'<div class="equation">{convert(" ".join(latex.split()), display="block")}</div>'


_MAKERS: dict[str, Callable[[Any], str]] = {
    "api": _api,
    "changelog": _changelog,
    "layers": lambda _: layers.drawn(),
    "method": method_tables.summary,
    "methods": lambda _: method_tables.everything(),
    "options": method_tables.options,
}
