"""Tables of methods and their options, from the registry, the signatures and the docstrings."""

from __future__ import annotations

import inspect
import re
from typing import Any

from griffe import Docstring, DocstringSectionKind

from torchprune_bayes.cli._options import options_of
from torchprune_bayes.methods import RegisteredMethod, find_method, registered_methods

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_DOI = re.compile(r"doi:(\S+[^\s,.])")
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


def summary(name: str) -> str:
    """How a method is called, what it needs and where it was published."""
    entry = find_method(name)
    kind = entry.method
    needs = "needed" if entry.needs_calibration else "not needed"
    rows = [
        ("name", f"`{entry.name}`"),
        ("class", f"`{kind.__module__.partition('.')[0]}.{kind.__name__}`"),
        ("prunes", "whole units" if entry.is_structured else "single weights"),
        ("calibration data", needs),
        ("paper", linked(entry.paper) or "none"),
    ]
    body = "\n".join(f"| {left} | {right} |" for left, right in rows)
    return f"| | |\n|---|---|\n{body}"


def everything() -> str:
    """All registered methods, a row each."""
    head = "| name | removes | calibration data | paper |\n|---|---|---|---|\n"
    return head + "\n".join(_row(entry) for entry in registered_methods().values())


def options(name: str) -> str:
    """The options of a method: default and meaning."""
    rows = described_options(name)
    if not rows:
        return "This method takes no options beside `amount`."
    body = "\n".join(
        f"| `{option}` | `{default!r}` | {_cell(meaning)} |" for option, default, meaning in rows
    )
    return f"| option | default | meaning |\n|---|---|---|\n{body}"


def described_options(name: str) -> list[tuple[str, Any, str]]:
    """Option, default and meaning, as signature and docstrings of a method have them.

    Example:
        >>> described_options("layer-magnitude")[0][:2]
        ('scope', 'layer')
    """
    method = find_method(name).method
    found = _signature(method) if find_method(name).is_structured else options_of(method)
    meanings = _meanings(method)
    return [(option, default, meanings.get(option, "")) for option, default in found.items()]


def linked(paper: str) -> str:
    """A reference with its arXiv numbers and DOIs as links."""
    text = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return _DOI.sub(r"[doi:\1](https://doi.org/\1)", text)


def _row(entry: RegisteredMethod) -> str:
    needs = "needed" if entry.needs_calibration else ""
    return f"| `{entry.name}` | {_cell(entry.title)} | {needs} | {linked(entry.paper)} |"


def _signature(method: type) -> dict[str, Any]:
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("amount", "gate")}


def _meanings(method: type) -> dict[str, str]:
    """Descriptions of arguments, the most special class first; those of WoodFisher for its kin."""
    kinds = [*method.__mro__]
    if any(kind.__name__ == "ObsPruning" for kind in kinds):
        kinds.append(find_method("woodfisher").method)
    found: dict[str, str] = {}
    for kind in kinds:
        for name, text in _arguments(kind).items():
            if not text.startswith("As of"):
                found.setdefault(name, text)
    return found


def _arguments(kind: type) -> dict[str, str]:
    sections = Docstring(inspect.getdoc(kind) or "").parse("google", warnings=False)
    return {
        item.name: item.description
        for section in sections
        if section.kind is DocstringSectionKind.parameters
        for item in section.value
    }


def _cell(text: str) -> str:
    plain = _ROLE.sub(lambda role: f"`{role.group(1).rpartition('.')[2]}`", text)
    return " ".join(plain.replace("``", "`").replace("|", "\\|").split())
