"""The table of architectures: the same checks at a small size, and what a failure looks like."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.benchmarks.families import HEADER, Case, Row, cases, examine
from tests.structured.families.models import FAMILY_MODELS, inputs_of


@pytest.mark.parametrize("name", ["timm-swin", "gpt2-lm", "llama-gqa", "bert"])
def test_every_check_passes(name: str) -> None:
    generates = name in ("gpt2-lm", "llama-gqa")
    row = examine(Case(name, FAMILY_MODELS[name], inputs_of(name, batch=1), generates), 0.5)
    assert (row.forward, row.backward, row.reload) == (True, True, True)
    assert row.generate is (True if generates else None)
    assert row.parameters[1] < row.parameters[0]
    assert row.flops[1] < row.flops[0]


def test_rows_fit_the_header_and_failures_stand_out() -> None:
    row = Row("net", (11_700_000, 3_100_000), (4_000_000_000, 10**9), 1e-7, 0.5, True, None, True)
    text = str(row)
    assert text == "| net | 11.7 → 3.1 | 4.00 → 1.00 | 1e-07 of 0.5 | yes | yes | – | yes |"
    assert text.count("|") == HEADER.splitlines()[0].count("|")
    assert "**no**" in str(replace(row, difference=1.0))


def test_names_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) == 17
