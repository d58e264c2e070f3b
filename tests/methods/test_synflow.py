"""SynFlow against sums over paths, its conservation laws, and depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.contracts.state import unchanged
from tests.methods.sensitivity_cases import calibration_on, chain, conv_net, data_for
from tests.references.sensitivity import path_flows
from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.errors import ArgumentTypeError, CalibrationError
from torchprune_bayes.methods import SNIP, SynFlow


def test_scores_are_sums_over_paths():
    model, data = chain(4, 5, 3, 2), data_for(3, 4, classes=2)
    matrices = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    total, expected = path_flows(matrices)
    calibration = calibration_on(model, data)
    decision = prune_global(None, SynFlow, amount=1, calibration=calibration, steps=1)
    for score, flow in zip(decision.scores.values(), expected, strict=True):
        torch.testing.assert_close(score, flow, rtol=1e-12, atol=0)
        assert float(score.sum()) == pytest.approx(total, rel=1e-12)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x) + self.right(x))
        return self.head(x.mean((2, 3)))


def test_flow_is_conserved_through_a_residual_block_with_a_batch_norm():
    torch.manual_seed(0)
    model = Residual().double()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2.0)
    data = data_for(4, 2, 5, 5, classes=3)
    calibration = Calibration(model, [data], cross_entropy)
    scores = prune_global(None, SynFlow, amount=1, calibration=calibration, steps=1).scores
    flow = {name.removesuffix(".weight"): float(score.sum()) for name, score in scores.items()}
    assert flow["stem"] == pytest.approx(flow["head"], rel=1e-12)
    assert flow["left"] + flow["right"] == pytest.approx(flow["head"], rel=1e-12)
    # Channel by channel too: what enters through the stem leaves through both branches.
    entering = scores["stem.weight"].sum((1, 2, 3))
    leaving = sum(scores[f"{name}.weight"].sum((0, 2, 3)) for name in ("left", "right"))
    torch.testing.assert_close(entering, leaving, rtol=1e-12, atol=0)


def test_data_labels_and_loss_do_not_count():
    (x, y), first, second = data_for(6, 5, classes=3), chain(5, 7, 3), chain(5, 7, 3)
    one = prune_global(None, SynFlow, amount=0.6, calibration=calibration_on(first, (x, y)))
    other = Calibration(second, [(100 * x[:2], torch.zeros(2, 3).double())], mse_loss)
    two = prune_global(None, SynFlow, amount=0.6, calibration=other)
    assert all(torch.equal(two.masks[name], mask) for name, mask in one.masks.items())


def test_each_step_keeps_the_same_share():
    model, data = chain(16, 30, 10), data_for(15, 16, classes=10)
    calibration = calibration_on(model, data)
    decision = prune_global(None, SynFlow, amount=0.99, calibration=calibration)
    kept = [step["kept"] for step in decision.info["steps"]]
    counts = [780 - round(780 * (1 - 0.01 ** (t / 100))) for t in range(1, 101)]
    assert kept == sorted({*counts}, reverse=True)  # a step that prunes nothing is left out


def test_the_last_weights_of_a_deep_network_are_one_path_where_snip_empties_layers():
    # As many weights are kept as there are layers: the most that leaves a network connected.
    widths = [32] * 12
    deep, data = chain(*widths, bias=False), data_for(8, 32, classes=32)
    twin = chain(*widths, bias=False)
    kept = {}
    for model, method in ((deep, SynFlow), (twin, SNIP)):
        calibration = calibration_on(model, data)
        decision = prune_global(None, method, amount=0.999, calibration=calibration)
        kept[method] = [int(mask.sum()) for mask in decision.masks.values()]
    assert kept[SynFlow] == [1] * 11
    assert sum(kept[SNIP]) == 11
    assert min(kept[SNIP]) == 0
    flow = torch.ones(1, 32, dtype=torch.float64)
    with torch.no_grad():
        for layer in deep:
            flow = flow @ layer.weight.abs().T if isinstance(layer, nn.Linear) else flow
    assert flow.sum().item() > 0


def test_float32_models_do_not_underflow():
    model = chain(*[4] * 30, bias=False).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01)  # a product of 29 layers is about 1e-64
    data = [(torch.ones(2, 4), torch.zeros(2, 4))]
    calibration = Calibration(model, data, mse_loss)
    decision = prune_global(None, SynFlow, amount=0.5, calibration=calibration, steps=5)
    flows = [score.sum() for score in decision.scores.values()]
    assert 0 < float(flows[0]) < 1e-50
    torch.testing.assert_close(torch.stack(flows), flows[0].expand(29), rtol=1e-10, atol=0)


def test_refuses_a_flow_that_is_not_finite():
    model = chain(4, 4, 4, bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e200)
    calibration = calibration_on(model, data_for(4, 4, classes=4))
    with unchanged(model), pytest.raises(CalibrationError, match="finite flow"):
        prune_global(None, SynFlow, amount=0.5, calibration=calibration)


class Classifier(nn.Module):
    """Called with keywords, and with an output object, as Hugging Face models are."""

    def __init__(self, embeds: bool) -> None:
        super().__init__()
        self.first = nn.Embedding(5, 6) if embeds else nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, inputs, labels=None):
        logits = self.second(torch.relu(self.first(inputs)).flatten(1)[:, :6])
        loss = None if labels is None else cross_entropy(logits, labels)
        return type("Output", (), {"loss": loss, "logits": logits})()


def test_takes_mappings():
    model, labels = Classifier(embeds=False), torch.tensor([0, 1])
    calibration = Calibration(model, [{"inputs": torch.randn(2, 4), "labels": labels}])
    decision = prune_global(None, SynFlow, amount=0.5, calibration=calibration)
    assert sum(int(mask.sum()) for mask in decision.masks.values()) == 21


def test_refuses_token_ids():
    model, labels = Classifier(embeds=True), torch.tensor([0, 1])
    ids = torch.tensor([[1, 2], [3, 4]])
    calibration = Calibration(model, [{"inputs": ids, "labels": labels}])
    with unchanged(model), pytest.raises(ArgumentTypeError, match="floating-point inputs"):
        prune_global(None, SynFlow, amount=0.5, calibration=calibration)


def test_deciding_changes_nothing():
    model, data = conv_net().train(), data_for(9, 2, 5, 5, classes=3)
    cross_entropy(model(data[0]), data[1]).backward()
    calibration = calibration_on(model, data)
    with unchanged(model):
        SynFlow(0.5, calibration=calibration, steps=3).decide(calibration.space)


def test_needs_a_model():
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, SynFlow, amount=0.5)
