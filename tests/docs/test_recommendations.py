"""The calls that the README recommends are calls that run."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import torchprune_bayes
from tests.docs.pages import ROOT
from torchprune_bayes import Calibration, SpaM, gates, structured

PARTS = (torchprune_bayes, gates)
HF = ("PruningCallback", "calibrate_on")


def recommended():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| you have | take |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    assert len(rows) >= 8
    return [pytest.param(re.findall("`([^`]+)`", calls), id=who.strip()) for who, calls in rows]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def close_some(gates):
    """As training would: two units of every site have collapsed."""
    for gate in gates.values():
        with torch.no_grad():
            gate.mu[:2] = -19.0
            gate.log_sigma.fill_(-5.0)
            gate.log_sigma[:2] = 1.0


@pytest.mark.parametrize("calls", recommended())
def test_a_row_of_the_readme_runs(calls):
    data = [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(4)]
    model = network()
    names = {name: value for part in PARTS for name, value in vars(part).items()}
    names |= {name: getattr(structured, name) for name in structured.__all__}
    names |= {"model": model, "inputs": data[0][0], "begin": 1, "end": 3, "data": data}
    names["calibration"] = Calibration(model, data, cross_entropy)
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    if any(name in call for call in calls for name in HF):
        hf = pytest.importorskip("torchprune_bayes.integrations.hf")
        names |= {name: getattr(hf, name) for name in HF}
    for call in calls:
        result = eval(call, names)
        if isinstance(result, SpaM):
            names["spam"] = result
        elif isinstance(result, structured.UnitImportance):
            names["importance"] = result
        elif "attach_gates" in call:
            names["gates"] = result
            close_some(result)
        elif isinstance(result, structured.ShrinkReport):
            assert result.units.after < result.units.before
