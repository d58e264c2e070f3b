"""An extension of griffe that turns the reStructuredText of docstrings into Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_", re.DOTALL)
_LITERAL = re.compile(r"``([^`]+)``")
_ENDING = re.compile(r"(?<=\S)::$", re.MULTILINE)


class Markdown(Extension):
    """Rewrites roles, links and literals of every docstring."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring; called by griffe for everything that has one."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Rewrite reStructuredText inline markup.

    Example:
        >>> as_markdown("As :class:`~torch.nn.Linear` and ``x`` in `a paper <https://a.b/c>`_::")
        'As `Linear` and `x` in [a paper](https://a.b/c):'
    """
    text = _ROLE.sub(lambda role: f"`{role.group(1).rpartition('.')[2]}`", text)
    text = _LINK.sub(lambda link: f"[{' '.join(link.group(1).split())}]({link.group(2)})", text)
    return _ENDING.sub(":", _LITERAL.sub(r"`\1`", text))
