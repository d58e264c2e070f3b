"""What the page for users of the originals names exists, with the arguments that it names."""

import inspect
import re
from functools import cache
from importlib import import_module

import pytest

from tests.docs.pages import ROOT
from torchprune_bayes.cli._options import options_of
from torchprune_bayes.experiments import EXPERIMENTS
from torchprune_bayes.methods import PruningMethod

PAGE = (ROOT / "docs" / "originals.md").read_text()
MODULES = ("", ".training", ".gates", ".structured", ".reports", ".laplace", ".schedules")
# The cell of the counterpart, which is the last one.
CELLS = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("|")]
SPANS = [span for cell in CELLS for span in re.findall(r"`([^`]+)`", cell)]
CALLS = sorted({m.groups() for span in SPANS if (m := re.match(r"(\w+)\((\w+)=", span))})
NAMES = sorted({m[0] for span in SPANS if (m := re.match(r"[A-Z]\w+|[a-z]+(_[a-z0-9]+)+", span))})
ELSEWHERE = {
    "None",
    "Trainer",
    "report_to",
    "loss_fn",
    "max_iterations",
    "AveragedModel",
}  # of Python, of others, arguments


@cache
def found(name):
    for module in MODULES:
        value = getattr(import_module(f"torchprune_bayes{module}"), name, None)
        if value is not None:
            return value
    pytest.importorskip("transformers")
    return getattr(import_module("torchprune_bayes.integrations.hf"), name, None)


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name):
    assert name in ELSEWHERE or found(name) is not None


@pytest.mark.parametrize(("name", "argument"), CALLS)
def test_arguments_exist(name, argument):
    value = found(name)
    if inspect.isclass(value) and issubclass(value, PruningMethod):
        assert argument in options_of(value)
    else:
        assert argument in inspect.signature(value).parameters


def test_there_is_something_to_test():
    assert len(CALLS) > 30
    assert len(NAMES) > 40


def test_every_published_table_is_listed():
    text = PAGE.partition("### The headlines")[2].partition("\n## ")[0]
    assert set(re.findall(r"`((?:woodfisher|cbs|bmrs|spam|snipit)-[^`]+)`", text)) == set(
        EXPERIMENTS
    )
