"""``shrink`` works on every family without model-specific arguments."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from tests.structured.families.models import (
    FAMILY_MODELS,
    build,
    gpt2_config,
    inputs_of,
    output_of,
)
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.structured.shrink import shrink
from torchprune_bayes.structured.slicing import zero_units


class ProducerNorm(UnitImportance):
    """Norm of everything that makes a unit."""

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor:
        total = torch.zeros(group.units)
        for piece in group.slices:
            if piece.role == "producer":
                entries = model.get_parameter(piece.name).detach().movedim(piece.dim, 0)
                total += entries[piece.positions].square().flatten(1).sum(1)
        return total


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_half_of_the_units_go_and_the_optimizer_follows(name: str) -> None:
    model = build(name)
    inputs = inputs_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    output_of(model.train(), inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    twin = copy.deepcopy(model.eval())
    report = shrink(
        model,
        inputs,
        ProducerNorm(),
        sparsity=0.5,
        target="channels",
        allocation="layer",
        optimizer=optimizer,
    )
    assert all(change.units.after == change.units.before // 2 for change in report.groups)
    assert report.difference is not None
    assert report.difference < 1e-5
    zero_units(twin, report.plan)
    with torch.no_grad():
        torch.testing.assert_close(
            output_of(model, inputs), output_of(twin, inputs), rtol=0, atol=1e-5
        )
    output_of(model.train(), inputs).square().mean().backward()
    optimizer.step()
    assert all(int(optimizer.state[each]["step"]) == 2 for each in model.parameters())


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_published_names_of_timm_are_served(name: str) -> None:
    small = {"depths": (1, 1, 1, 1)} if "swin" in name else {"depth": 1}
    model = timm.create_model(name, num_classes=7, **small)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    report = shrink(model, images, ProducerNorm(), sparsity=0.3, target="channels")
    assert report.parameters.after < report.parameters.before
    assert report.difference is not None
    assert report.difference < 1e-5


def test_refused_variant_stays_as_it_was() -> None:
    model = transformers.GPT2LMHeadModel(gpt2_config(add_cross_attention=True))
    before = {name: (id(each), each.clone()) for name, each in model.named_parameters()}
    with pytest.raises(ParameterError, match="crossattention"):
        shrink(model, None, ProducerNorm(), sparsity=0.5, target="channels", verify=False)
    for name, each in model.named_parameters():
        assert id(each) == before[name][0]
        assert torch.equal(each, before[name][1])
