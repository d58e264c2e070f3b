"""Repair after torch-pruning's own pruners is what it is after ours."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.structured.models import build, images
from torchprune_bayes import Calibration
from torchprune_bayes.errors import AlignmentError
from torchprune_bayes.structured import apply_plan, find_groups, plan_of, repair, repairing


def pruner_of(model: nn.Module, ratio: float = 0.5, steps: int = 1) -> tp.pruner.BasePruner:
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return tp.pruner.BasePruner(
        model,
        images(),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        iterative_steps=steps,
        global_pruning=True,
        ignored_layers=[last],
    )


def calibrated(model: nn.Module) -> Calibration:
    x = images(32)
    return Calibration(model, [(x, model(x).detach().argmax(1))], cross_entropy)


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_the_pruned_model_has_the_same_shapes_and_is_nearer_to_the_dense_one(name):
    model = build(name)
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    pruner_of(plain).step()
    pruner = pruner_of(model)
    with repairing(pruner, calibrated(model)) as repairs:
        pruner.step()
    [made] = repairs
    assert made.skipped == ()
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    after = model.state_dict()
    moved = [key for key, v in plain.state_dict().items() if not torch.equal(v, after[key])]
    assert {layer.name for layer in made.layers} <= {key.rpartition(".")[0] for key in moved}
    x = images(32)
    with torch.no_grad():
        errors = [float((other(x) - dense(x)).square().mean()) for other in (plain, model)]
    assert errors[1] < errors[0]


def test_units_are_told_apart_over_several_steps_of_one_group():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 12), nn.ReLU(), nn.Linear(12, 5))
    with torch.no_grad():
        model[1].weight.mul_(torch.arange(1.0, 13.0).roll(5)[:, None])
    dense, x = copy.deepcopy(model), images(32)
    pruner = pruner_of(model, steps=3)
    with repairing(pruner, calibrated(model)) as nothing:
        pass
    assert nothing == []
    with repairing(pruner, calibrated(model)) as repairs:
        for _ in range(3):
            pruner.step()
    groups = find_groups(dense, x)
    gone = torch.arange(5, 11)  # the six smallest
    kept = {"1": torch.tensor([u for u in range(12) if u not in gone.tolist()])}
    expected = repair(calibrated(dense), groups, kept)
    apply_plan(dense, plan_of(dense, groups, kept), values=expected.values)
    assert len(repairs) == 1
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


class Heads(nn.Module):
    """Two heads of three dimensions over ``[n, tokens, 6]`` with a packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.qkv, self.out, self.last = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = (q @ k.mT).softmax(-1) @ v
        return self.last(self.out(context.transpose(1, 2).flatten(2)).mean(1))


def pruner_of_heads(model: Heads, x: Tensor) -> tp.pruner.BasePruner:
    return tp.pruner.BasePruner(
        model,
        x[:2],
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5,
        num_heads={model.qkv: 2},
        prune_num_heads=True,
        prune_head_dims=False,
        out_channel_groups={},  # the default is one object for all pruners
        ignored_layers=[model.out, model.last],
    )


def test_heads_and_what_reads_them_are_told_apart_from_what_the_reader_makes():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(64, 4, 6)
    with torch.no_grad():
        model.out.weight[:, :3] *= 0.1  # the first head goes, and is predicted from the second
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)

    pruner_of_heads(plain, x).step()
    plain.heads = 1
    pruner = pruner_of_heads(model, x)
    calibration = Calibration(model, [(x, torch.arange(64) % 5)], cross_entropy)
    with repairing(pruner, calibration) as repairs:
        pruner.step()
        model.heads = 1
    assert [layer.name for layer in repairs[0].layers] == ["out"]
    assert torch.equal(model.qkv.weight, plain.qkv.weight)
    with torch.no_grad():
        errors = [float((other(x) - dense(x)).square().mean()) for other in (plain, model)]
    assert errors[1] < errors[0]


def test_a_failing_body_is_left_alone_and_models_must_agree():
    model = build("vgg")
    pruner = pruner_of(model)
    other = calibrated(build("vgg"))
    match = "pruner's model"
    with unchanged(model), pytest.raises(AlignmentError, match=match), repairing(pruner, other):
        pass
    own = calibrated(model)
    with unchanged(model), pytest.raises(RuntimeError, match="no"), repairing(pruner, own):
        raise RuntimeError("no")
