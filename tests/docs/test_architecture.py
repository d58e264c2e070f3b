"""The files that the page on the architecture tells to read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torchprune_bayes

PACKAGE = Path(torchprune_bayes.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def _lists() -> dict[str, list[str]]:
    """The files under each call, in order."""
    if not PAGE.is_file():
        pytest.skip("the documentation is not here")
    _, _, text = PAGE.read_text(encoding="utf-8").partition("## From a call to the mathematics")
    parts = re.split(r"\*\*`(\w+)`\*\*", text)[1:]
    return {
        call: re.findall(r"^\d\. .*?`([\w/]+\.py)`", body, flags=re.MULTILINE)
        for call, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_six_files_lead_from_a_call_to_the_mathematics() -> None:
    lists = _lists()
    assert set(lists) == {"WoodFisher", "shrink", "PruningCallback"}
    for call, files in lists.items():
        assert 3 <= len(files) <= 6
        first, *others = [(PACKAGE / file).read_text(encoding="utf-8") for file in files]
        assert re.search(rf"^(class|def) {call}\b", first, flags=re.MULTILINE)
        assert len(others) == len(files) - 1


@pytest.mark.parametrize("call", ["WoodFisher", "shrink", "PruningCallback"])
def test_each_file_is_imported_by_one_before_it(call: str) -> None:
    files = _lists()[call]
    for index, file in enumerate(files[1:], start=1):
        parts = ["torchprune_bayes", *file.removesuffix(".py").split("/")]
        names = {".".join(parts), ".".join(parts[:-1])} - {"torchprune_bayes"}
        before = "".join((PACKAGE / other).read_text(encoding="utf-8") for other in files[:index])
        chosen_by_the_user = call == "PruningCallback" and file == "methods/woodfisher.py"
        assert chosen_by_the_user or any(f"from {name} import" in before for name in names), file
