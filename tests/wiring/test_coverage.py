"""A third of the architectures, chosen by the day: what the published table says still holds.

The table is printed by ``python -m tests.benchmarks.coverage``.
"""

from __future__ import annotations

import datetime
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.benchmarks.architectures import Architecture, architectures
from tests.benchmarks.coverage import Row, chosen, examine, known_rows, wired
from tests.benchmarks.coverage_depth import WrongError, distance

PAGE = Path(__file__).parents[2] / "docs" / "results" / "coverage.md"
TABLE = PAGE.read_text().partition("\n## ")[0]
CELLS = [line.split("|") for line in TABLE.splitlines() if line.startswith("| t")]
RESULTS = {cells[1].strip(): cells[2].strip() for cells in CELLS}
TODAY = datetime.date.today().toordinal()
KNOWN = ("supported", "refused")
WHOLLY = [
    *chosen("transformers ", Fraction(1, 12), TODAY),
    *chosen("torchvision ", Fraction(1, 24), TODAY),
    *chosen("timm ", Fraction(1, 40), TODAY),
]
"""Those that are compared, trained, saved and loaded today."""

NAMES = {case.name for case in WHOLLY}
WIRED = [case for case in chosen("", Fraction(1, 3), TODAY) if case.name not in NAMES]
"""Those that are shrunk today, with the comparison that ``shrink`` makes itself."""


def check(case: Architecture, row: Row) -> None:
    assert row.result == RESULTS[case.name], (
        f"{case.name}: {row.result} in place of {RESULTS[case.name]} ({row.detail}); to repeat it, "
        f"python -m tests.benchmarks.coverage --shallow --only '{case.name}'"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WHOLLY, ids=lambda case: case.name)
def test_architectures_are_supported_or_refused_as_published(case: Architecture) -> None:
    check(case, examine(case, 0.3, deep=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WIRED, ids=lambda case: case.name)
def test_architectures_shrink_or_are_refused_as_published(case: Architecture) -> None:
    check(case, wired(case, 0.3))


def test_the_page_has_every_architecture() -> None:
    assert RESULTS.keys() == {case.name for case in architectures()}
    assert set(RESULTS.values()) <= set(KNOWN)


def test_most_of_the_published_architectures_are_supported():
    assert sum(result == "supported" for result in RESULTS.values()) >= 120


def test_every_architecture_has_its_day():
    for share, days in ((Fraction(1, 3), 3), (Fraction(1, 12), 12)):
        seen = [case.name for day in range(days) for case in chosen("", share, TODAY + day)]
        assert sorted(seen) == sorted(case.name for case in architectures())


def test_a_run_goes_on_from_its_rows(tmp_path):
    file = tmp_path / "rows.md"
    assert known_rows(file) == {}
    rows = [
        Row("torch LSTM, 1 layers", "supported", "2 of hidden units", 0.5, 2e-16, "none: why", "8"),
        Row("timm x", "refused", "Expected units, got none.", 0.1),
        Row("timm x", "supported", "1 of channels", 0.2, 0.0),
    ]
    file.write_text("".join(f"{row}\n" for row in rows))
    assert known_rows(file) == {rows[0].name: rows[0], "timm x": rows[2]}


def test_where_there_is_nothing_to_compare_there_is_no_distance():
    nothing, one, two = torch.zeros(0, 4), torch.ones(3), torch.full((3,), 2.0)
    assert distance([nothing], [nothing]) is None
    assert distance([], []) is None
    assert distance([nothing, one], [nothing, two]) == 0.5
    with pytest.raises(WrongError, match="outputs of shape"):
        distance([nothing], [one])
