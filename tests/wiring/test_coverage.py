"""A share of the real architectures, chosen by the day: none wrong, none failing with a raw error.

The whole table is printed by ``python -m tests.benchmarks.coverage``.
"""

from __future__ import annotations

import datetime
from fractions import Fraction

import pytest

from tests.benchmarks.coverage import chosen, examine

TODAY = datetime.date.today().toordinal()
CASES = [
    *chosen("transformers ", Fraction(1, 12), TODAY),
    *chosen("torchvision ", Fraction(1, 24), TODAY),
    *chosen("timm ", Fraction(1, 40), TODAY),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_real_architectures_are_served_or_refused(case):
    row = examine(case, 0.3)
    assert row.verdict in ("served", "refused"), row.detail


def test_every_architecture_has_its_day():
    days = range(TODAY, TODAY + 12)
    seen = {case.name for day in days for case in chosen("transformers ", Fraction(1, 12), day)}
    assert seen == {case.name for case in chosen("transformers ", Fraction(1), 0)}
