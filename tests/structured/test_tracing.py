"""Which units are found, what they own, and what is left alone."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.contracts.state import unchanged
from tests.references.masked_twin import masked_twin, random_kept
from tests.structured.models import SMALL, build, images, timm_model, torchvision_model, unsettled
from torchprune_bayes.errors import (
    ArgumentError,
    ArgumentTypeError,
    ParameterError,
)
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup
from torchprune_bayes.structured.slicing import apply_plan, plan_of
from torchprune_bayes.structured.tracing import find_groups, unit_group


def described(groups: list[UnitGroup]) -> dict[str, tuple[int, list[tuple[str, int, str]]]]:
    return {
        group.name: (
            group.units,
            [(piece.name, piece.dim, piece.role) for piece in group.slices],
        )
        for group in groups
    }


def by_name(groups: list[UnitGroup]) -> dict[str, UnitGroup]:
    return {group.name: group for group in groups}


def test_a_chain_with_flattened_maps():
    groups = by_name(find_groups(build("vgg"), images()))
    assert list(groups) == ["0", "3", "7"]
    assert [group.kind for group in groups.values()] == ["channel", "channel", "hidden"]
    last = {piece.name: piece for piece in groups["3"].slices}
    assert last["7.weight"].role == "consumer"
    assert torch.equal(last["7.weight"].positions, torch.arange(128).reshape(8, 16))
    assert last["4.running_mean"].role == last["4.running_var"].role == "norm"


def test_residual_stages_are_one_group():
    found = described(find_groups(build("resnet"), images()))
    assert list(found) == ["0", "3.conv1", "4.conv1", "4.conv2"]
    units, slices = found["0"]
    assert units == 8
    consumers = [name for name, dim, role in slices if role == "consumer" and dim == 1]
    assert sorted(consumers) == ["3.conv1.weight", "4.conv1.weight", "4.shortcut.0.weight"]
    producers = [name for name, dim, role in slices if role == "producer" and dim == 0]
    assert sorted(producers) == ["0.weight", "3.conv2.weight"]
    norms = {name.rpartition(".")[0] for name, _, role in slices if role == "norm"}
    assert norms == {"1", "3.bn2"}


def test_depthwise_convolutions_scales_and_rectifiers_are_passed_through():
    found = described(find_groups(build("depthwise"), images()))
    inner = dict.fromkeys(found["1.expand.0"][1])
    assert ("1.depthwise.0.weight", 0, "norm") in inner
    assert ("1.depthwise.1.weight", 0, "norm") in inner
    assert ("1.excite.weight", 0, "producer") in inner
    assert ("1.squeeze.weight", 1, "consumer") in inner
    assert ("1.scale", 0, "norm") in found["0"][1]


def test_concatenated_maps_are_read_at_their_places():
    groups = by_name(find_groups(build("dense"), images()))
    assert {name: group.units for name, group in groups.items()} == {"stem": 6, "one": 4, "two": 4}
    reads = {
        name: {piece.name: piece.positions[:, 0].tolist() for piece in group.slices}
        for name, group in groups.items()
    }
    assert reads["one"]["two.weight"] == [6, 7, 8, 9]
    assert reads["two"]["head.weight"] == reads["two"]["norm.bias"] == [10, 11, 12, 13]


def test_channels_that_share_statistics_are_one_unit():
    model = build("group norm")
    groups = by_name(find_groups(model, images()))
    assert {name: group.units for name, group in groups.items()} == {"0": 4, "3": 3}
    apply_plan(model, plan_of(model, list(groups.values()), {"3": torch.tensor([0, 2])}))
    assert (model[4].num_channels, model[4].num_groups) == (8, 2)


def test_the_outputs_of_the_model_are_left_alone_wherever_they_are_made():
    outputs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten(2))
    assert list(described(find_groups(outputs, images()))) == ["0"]

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            features = self.body(x)
            return {"features": (features,), "logits": self.head(features)}

    assert find_groups(Several(), images()) == []


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.body = nn.Linear(4, 4)
        self.after = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.body(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.after(x)))


def test_layers_that_run_twice_are_cut_for_all_their_calls_alike():
    groups = by_name(find_groups(Reused(), torch.zeros(1, 3)))
    assert list(groups) == ["stem", "after"]
    pieces = [(piece.name, piece.dim, piece.role) for piece in groups["stem"].slices]
    assert ("body.weight", 0, "producer") in pieces
    assert ("body.weight", 1, "consumer") in pieces


def test_tied_parameters_go_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert list(described(find_groups(model, torch.zeros(1, 4)))) == ["0", "2"]
    model[2].weight = model[0].weight
    # The inputs of the model stay, and with them the columns and rows of the shared weight.
    assert find_groups(model, torch.zeros(1, 4)) == []


class OddNorm(nn.Module):
    """A norm of one's own over all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, OddNorm])
def test_units_in_front_of_a_norm_over_all_of_them_are_left_alone(norm):
    model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert list(described(find_groups(model, torch.ones(1, 3)))) == ["2"]


def test_grouped_convolutions_lose_the_same_place_in_every_group():
    grouped = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
    )
    groups = by_name(find_groups(grouped, images()))
    assert {name: group.units for name, group in groups.items()} == {"0": 2, "1": 4, "2": 6}
    made = {piece.name: piece.positions.tolist() for piece in groups["0"].slices}
    assert made["0.weight"] == [[0, 2], [1, 3]]
    assert made["1.weight"] == [[0], [1]]


class Halves(nn.Module):
    """Half of a layer's channels scales the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.both(x).chunk(2, dim=1)
        return self.head(one * torch.sigmoid(other))


def test_the_halves_of_a_gated_layer_go_together():
    [group] = find_groups(Halves(), images())
    assert (group.name, group.units) == ("both", 4)
    assert group.slices[0].positions.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("name", SMALL)
def test_tracing_leaves_no_trace(name):
    model, inputs = build(name), images()
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    model(inputs).sum().backward()
    with unchanged(model), torch.no_grad():
        groups = find_groups(model, inputs)
    assert any(piece.name == "stem.weight" or piece.name == "0.weight"
               for group in groups for piece in group.slices)  # fmt: skip
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_forward_pass_leaves_no_trace():
    model = build("resnet")
    with unchanged(model), pytest.raises(ArgumentError, match="run on `example_inputs`"):
        find_groups(model, torch.zeros(1, 7, 16, 16))
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_may_be_off():
    for mode in (torch.no_grad, torch.inference_mode):
        model, inputs = build("vgg"), images()
        with mode():
            assert len(find_groups(model, inputs)) == 3


def test_inputs_come_in_any_form():
    model = Reused()
    inputs = torch.zeros(1, 3)
    forms: list[Any] = [inputs, (inputs,), [inputs], {"x": inputs}]
    names = [list(described(find_groups(model, form))) for form in forms]
    assert names == [["stem", "after"]] * 4
    found = find_groups(model, SimpleNamespace(x=inputs), forward_fn=lambda m, i: m(i.x))
    assert list(described(found)) == ["stem", "after"]
    with pytest.raises(ArgumentTypeError, match="`example_inputs` to be a tensor"):
        find_groups(model, 3)


def test_ignored_layers_keep_their_outputs():
    model, inputs = build("resnet"), images()
    for ignored in (model[4], "4", model[4].conv1):
        names = list(described(find_groups(model, inputs, ignored=[ignored])))
        assert "4.conv1" not in names
        assert "0" in names
    assert find_groups(model, inputs, ignored=[model]) == []
    # A norm of the stage stands for the stage.
    assert "0" not in described(find_groups(model, inputs, ignored=["3.bn2"]))
    for stranger in ("5.conv", nn.ReLU()):
        with pytest.raises(ArgumentError, match="a module or group of the model to ignore"):
            find_groups(model, inputs, ignored=[stranger])


def test_weights_that_a_hook_computes_are_refused():
    masked = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    prune.random_unstructured(masked[0], "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hooked = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    for model, message in ((masked, r"masked; call `bake"), (hooked, "computed from others")):
        with unchanged(model), pytest.raises(ParameterError, match=f"got `0`, .* is {message}"):
            find_groups(model, torch.zeros(1, 3))


class Doubled(nn.Module):
    """A weight that is twice its parameter."""

    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("computed", ["norm", "spectral", "entry by entry"])
def test_what_a_parametrized_layer_makes_or_reads_is_left_whole(computed):
    layers = [nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3), nn.Conv1d(6, 5, 3), nn.Conv1d(5, 4, 3),
              nn.Conv1d(4, 2, 1)]  # fmt: skip
    wrapped = {
        "norm": lambda layer: parametrizations.weight_norm(layer, dim=2),
        "spectral": parametrizations.spectral_norm,
        "entry by entry": lambda layer: parametrize.register_parametrization(
            layer, "weight", Doubled()
        ),
    }
    layers[2] = wrapped[computed](layers[2])
    model, inputs = nn.Sequential(*layers).double().eval(), torch.randn(2, 3, 12).double()
    with unchanged(model):
        groups = find_groups(model, inputs)
    assert list(described(groups)) == ["0", "3"]
    kept = random_kept(groups)
    expected = masked_twin(model, groups, kept)(inputs)
    apply_plan(model, plan_of(model, groups, kept))
    torch.testing.assert_close(model(inputs), expected)


def test_a_family_of_another_make_is_seen_in_a_run():
    model, inputs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), images(2, 32)
    model.blocks[0].mlp.norm = nn.LayerNorm(768)
    with pytest.raises(ParameterError, match="Expected no"):
        find_groups(model)
    kinds = [(group.name, group.kind) for group in find_groups(model, inputs)]
    assert ("blocks.1.mlp.fc1", "hidden") in kinds
    assert ("blocks.0.attn.qkv", "head") in kinds
    assert not any(name == "blocks.0.mlp.fc1" for name, _ in kinds)


def test_part_of_a_host_group_in_any_order():
    model, inputs = build("vgg"), images()
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    part = graph.get_pruning_group(model[3], tp.prune_conv_out_channels, [5, 2])
    group = unit_group(part, model)
    assert group is not None
    assert (group.name, group.units) == ("3", 2)
    positions = {piece.name: piece.positions for piece in group.slices}
    assert positions["3.weight"].tolist() == [[5], [2]]
    assert torch.equal(positions["7.weight"], torch.arange(128).reshape(8, 16)[[5, 2]])


PUBLISHED = [
    (torchvision_model, "resnet18", 12, 64),
    (torchvision_model, "resnet50", 37, 64),
    (torchvision_model, "vgg16_bn", 15, 64),
    (torchvision_model, "mobilenet_v2", 25, 64),
    (timm_model, "resnet18", 12, 64),
    (timm_model, "resnet50", 37, 64),
    (timm_model, "convnext_tiny", 18, 64),
]


@pytest.mark.parametrize(("make", "name", "count", "size"), PUBLISHED)
def test_published_architectures(make, name, count, size):
    with torch.random.fork_rng():
        model = unsettled(make(name)).eval()
    inputs = images(1, size)
    groups = find_groups(model, inputs)
    assert len(groups) == count
    kept = random_kept(groups)
    with torch.no_grad():
        twin = masked_twin(model, groups, kept)
        expected = twin(inputs)
        del twin
        apply_plan(model, plan_of(model, groups, kept))
        found = model(inputs)
    scale = float(expected.abs().max())
    assert 1e-3 < scale < 1e6
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=0)


def test_numbers_that_timm_keeps_for_the_head_follow():
    model = timm_model("resnet18").eval()
    groups = find_groups(model, images(1, 64))
    last = next(group for group in groups if group.name == "layer4.0.conv2")
    assert AttributeRule("", "num_features") in last.attributes
    apply_plan(model, plan_of(model, groups, {last.name: torch.arange(100)}))
    assert model.num_features == model.fc.in_features == 100
    model.reset_classifier(3)
    assert model(images(1, 64)).shape == (1, 3)


WITHOUT_HOST = """
import sys
import torchprune_bayes.structured as structured
assert "torch_pruning" not in sys.modules
sys.modules["torch_pruning"] = None
import timm, torch
class Random(structured.UnitImportance):
    def score(self, group, model):
        return torch.rand(group.units)
for name in ("vit_tiny_patch16_224", "convnext_atto"):
    sizes = {"img_size": 32, "depth": 1} if "vit" in name else {"depths": (1, 1, 1, 1)}
    model = timm.create_model(name, **sizes)
    report = structured.shrink(model, torch.ones(1, 3, 32, 32), Random(), sparsity=0.1)
    assert report.parameters.sparsity >= 0.1
"""


def test_finding_and_shrinking_need_no_torch_pruning():
    subprocess.run([sys.executable, "-c", WITHOUT_HOST], check=True)
