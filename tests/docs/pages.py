"""Code of the documentation's pages: what is run, and what it says it prints.

All ``python`` blocks of a page run one after the other in one namespace, in an empty folder. A
comment ``<!-- setup ... -->`` runs before them, ``<!-- not executed: REASON -->`` right before a
block leaves it out, and ``<!-- output: TOLERANCE -->`` right before a ``text`` block says that it
is what the blocks since the last one print, numbers up to the tolerance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_PART = re.compile(
    r"<!-- setup\n(?P<setup>.*?)\n-->"
    r"|(?P<skip><!-- not executed: [^\n]+ -->\n)?```python\n(?P<code>.*?)\n```"
    r"|<!-- output: (?P<tolerance>[\d.]+) -->\n```text\n(?P<output>.*?)\n```",
    re.DOTALL,
)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Step:
    """Code to run, or the output that is expected of the code since the last output."""

    code: str | None
    line: int
    output: str = ""
    tolerance: float = 0.0


def pages_with_code() -> list[Path]:
    """The README and every page of the site that has code in it."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if "```python\n" in page.read_text(encoding="utf-8")]


def steps(page: Path) -> list[Step]:
    """What a page asks to run and promises to print, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["output"] is not None:
            found.append(Step(None, line, part["output"], float(part["tolerance"])))
        elif not part["skip"]:
            code = part["code"] if part["setup"] is None else part["setup"]
            found.append(Step(code, line + 1))
    return found


def differs(printed: str, promised: str, tolerance: float) -> bool:
    """Whether words differ, or a number by more than the tolerance.

    Example:
        >>> differs("accuracy 90.1%", "accuracy 90.7%", 1.0), differs("90.1", "92.7", 1.0)
        (False, True)
    """
    words = [" ".join(_NUMBER.sub("#", text).split()) for text in (printed, promised)]
    numbers = [
        [float(number.replace(",", "")) for number in _NUMBER.findall(text)]
        for text in (printed, promised)
    ]
    return words[0] != words[1] or any(
        abs(a - b) > tolerance for a, b in zip(*numbers, strict=True)
    )
