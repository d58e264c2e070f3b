"""Seeds made from seeds: unrelated for all purposes and neighbours, and made in one place."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchprune_bayes
from torchprune_bayes.seeds import derived_seed

purposes = st.lists(st.one_of(st.integers(0, 10**6), st.sampled_from(["labels", "model"])))


@given(first=st.tuples(st.integers(0, 2**40), purposes), second=st.tuples(st.integers(), purposes))
def test_other_seeds_and_purposes_are_other_seeds(
    first: tuple[int, list[int | str]], second: tuple[int, list[int | str]]
) -> None:
    a, b = derived_seed(first[0], *first[1]), derived_seed(second[0], *second[1])
    assert (a == b) == (first == second)
    assert 0 <= a < 2**32
    torch.Generator().manual_seed(a)
    np.random.RandomState(a)


def test_no_part_counts_on_from_a_seed() -> None:
    root = Path(torchprune_bayes.__file__).parent
    counting = re.compile(r"\bseed\s*\+\s*\w|\w\s*\+\s*(self\.)?_?seed\b")
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        if path.name != "seeds.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if counting.search(line)
    ]
    assert not found
