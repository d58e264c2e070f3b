"""Dimensions inside of heads: found, tried, chosen head by head, cut without changing the rest."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.utils._pytree import tree_map

from tests.structured.families.models import build, inputs_of, output_of
from torchprune_bayes import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import (
    ConsumerGateFisherImportance,
    L1FilterImportance,
    UnitCosts,
    UnitGroup,
    UnitImportance,
    apply_plan,
    check_shrinkable,
    find_groups,
    find_units,
    load_shrunk,
    measure_curves,
    plan_of,
    repair,
    save_shrunk,
    shrink,
    zero_units,
)
from torchprune_bayes.structured.families.config import fit_config

SERVED = ["timm-vit", "timm-swin", "gpt2-lm", "distilbert", "bert", "hf-vit"]
ROTARY = ["llama-mha", "llama-gqa", "qwen3"]


class Attention(nn.Module):
    """Attention whose queries and keys may have another size than its values.

    Args:
        scale: ``"default"`` computes it from what is left, ``"kept"`` has a number of its own.
    """

    def __init__(
        self,
        heads: int = 2,
        shared: int = 1,
        queries: int = 4,
        values: int = 3,
        scale: str = "kept",
    ) -> None:
        super().__init__()
        self.count, self.shared = heads, shared
        self.q = nn.Linear(5, heads * shared * queries)
        self.k = nn.Linear(5, heads * queries)
        self.v = nn.Linear(5, heads * values, bias=False)
        self.out = nn.Linear(heads * shared * values, 2)
        self.kept = None if scale == "default" else 0.7

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            layer(x).reshape(n, t, count, -1).transpose(1, 2)
            for layer, count in (
                (self.q, self.count * self.shared), (self.k, self.count), (self.v, self.count)
            )
        )  # fmt: skip
        if self.shared > 1:
            k, v = (each.repeat_interleave(self.shared, 1) for each in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, scale=self.kept)
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


class Given(UnitImportance):
    """Scores drawn once for each layer and dimension, not joint."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + group.units)
        return torch.rand(group.units, generator=generator)


def attention_case(**changes: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Attention(**changes)).double(), torch.randn(3, 6, 5, dtype=torch.float64)


def family_case(name: str) -> tuple[Any, Any]:
    def wide(leaf: Any) -> Any:
        return leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf

    return build(name).double().eval(), tree_map(wide, inputs_of(name))


@pytest.mark.parametrize("name", SERVED)
def test_equals_the_whole_model_with_zeroed_dimensions(name: str) -> None:
    model, inputs = family_case(name)
    masked = copy.deepcopy(model)
    report = shrink(
        model, inputs, L1FilterImportance(), sparsity=0.4, target="channels", heads="dimensions"
    )
    assert not report.left_out
    cut = [group for group in report.groups if "mlp" not in group.name]
    assert any(group.units.after < group.units.before for group in cut)
    zero_units(masked, report.plan)
    with torch.no_grad():
        expected, found = output_of(masked, inputs), output_of(model, inputs)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)


@given(
    heads=st.integers(2, 3),
    shared=st.integers(1, 2),
    queries=st.integers(2, 5),
    values=st.integers(2, 5),
    scale=st.sampled_from(["default", "kept"]),
    sparsity=st.floats(0.1, 0.5),
    seed=st.integers(0, 9),
)
@settings(max_examples=12, deadline=None)
def test_any_attention_equals_itself_with_zeroed_dimensions(
    heads: int, shared: int, queries: int, values: int, scale: str, sparsity: float, seed: int
) -> None:
    model, inputs = attention_case(
        heads=heads, shared=shared, queries=queries, values=values, scale=scale
    )
    whole = copy.deepcopy(model)
    report = shrink(
        model, inputs, Given(seed), sparsity=sparsity, target="channels", heads="dimensions",
        steps=2,
    )  # fmt: skip
    zero_units(whole, report.plan)
    assert torch.allclose(model(inputs), whole(inputs), rtol=1e-9, atol=1e-11)
    assert report.flops is not None
    assert report.units.before == queries + values


def test_queries_and_values_go_apart_where_the_module_lets_them() -> None:
    model, inputs = attention_case()
    units = find_units(model, inputs, heads="dimensions")
    assert not units.left_out
    assert [(group.units, len(group.parts)) for group in units.groups] == [(4, 1), (3, 1)]
    assert not find_groups(model, inputs)  # heads are counted under a name that is not known


@pytest.mark.parametrize("name", ["apart", "timm-vit", "bert"])
def test_flops_of_the_shrunk_attention_are_the_predicted_ones(name: str) -> None:
    apart = name == "apart"
    model, inputs = attention_case(queries=4, values=4) if apart else family_case(name)
    report = shrink(model, inputs, Given(), sparsity=0.2, target="flops", heads="dimensions")
    assert report.flops is not None
    assert UnitCosts.measure(model, [], inputs).flops({}) == report.flops.after


def t5_case() -> tuple[Any, Any]:
    """All layers of an encoder share the heads of one table of positions, but not their size."""
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    tokens = torch.arange(3, 11).view(2, 4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    return model, {"input_ids": tokens, "decoder_input_ids": tokens}


def test_layers_that_share_heads_lose_dimensions_by_themselves() -> None:
    model, inputs = t5_case()
    units = find_units(model, inputs, heads="dimensions")
    inside = [group for group in units.groups if group.parts]
    assert len(inside) == 6  # two layers, of which the decoder's have two attentions each
    assert all(len(group.parts) == 2 and group.units == 4 for group in inside)


def test_every_head_keeps_what_matters_most_to_it() -> None:
    model, inputs = attention_case(heads=2, queries=4)
    strong = {0: [1, 3], 1: [0, 2]}
    with torch.no_grad():
        for head, dims in strong.items():
            model[0].q.weight[[4 * head + dim for dim in dims]] *= 100
    groups = [group for group in find_groups(model, inputs, heads="dimensions") if group.unread]
    report = shrink(
        model, inputs, L1FilterImportance(), sparsity=0.5, target="channels", groups=groups
    )
    assert report.plan.kept["0.q.weight"][0].tolist() == [1, 3, 4, 6]
    assert report.plan.kept["0.k.weight"][0].tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_is_that_of_the_whole_model_in_every_kernel(fused: bool) -> None:
    model, inputs = family_case("timm-vit")
    shrink(model, inputs, Given(), sparsity=0.5, target="channels", heads="dimensions")
    expected = output_of(model, inputs)
    for block in model.blocks:
        block.attn.fused_attn = fused
    attention = model.blocks[0].attn
    assert attention.scale == attention.head_dim**-0.5
    assert torch.allclose(output_of(model, inputs), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_embeddings_and_norms_leave_heads_whole_and_say_so(name: str) -> None:
    model, inputs = family_case(name)
    units = find_units(model, inputs, heads="dimensions")
    assert {group.kind for group in units.groups} == {"hidden"}
    layers = [f"model.layers.{block}.self_attn" for block in range(2)]
    assert set(units.left_out) == {f"{at}.{p}" for at in layers for p in ("q_proj", "v_proj")}
    why = units.left_out[f"{layers[0]}.q_proj"]
    assert why.startswith("dimensions of its heads go together: `")


@pytest.mark.parametrize("name", ROTARY)
def test_either_removes_whole_heads_where_dimensions_cannot_go(name: str) -> None:
    model, inputs = family_case(name)
    either, whole = (find_units(model, inputs, heads=heads) for heads in ("either", "whole"))
    assert [group.name for group in either.groups] == [group.name for group in whole.groups]
    assert either.left_out == whole.left_out


@pytest.mark.parametrize("name", SERVED)
def test_either_removes_dimensions_where_they_can_go(name: str) -> None:
    model, inputs = family_case(name)
    either, finer = (find_units(model, inputs, heads=heads) for heads in ("either", "dimensions"))
    assert [group.name for group in either.groups] == [group.name for group in finer.groups]


def test_either_decides_for_each_attention() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"free": Attention(), "fixed": Fixed()})

    def run(both: Any, x: Tensor) -> Tensor:
        total: Tensor = both["free"](x) + both["fixed"](x)
        return total

    found = find_units(model, torch.randn(3, 6, 5), heads="either", forward_fn=run)
    kinds = {group.name.partition(".")[0]: group.kind for group in found.groups}
    assert kinds == {"free": "dimension", "fixed": "head"}


@pytest.mark.parametrize(
    ("target", "kind"), [("flops", "dimension"), ("params", "head"), ("channels", "head")]
)
def test_the_recommended_call_removes_dimensions_for_flops(target: Any, kind: str) -> None:
    model, inputs = build("timm-vit").eval(), inputs_of("timm-vit")
    calibration = Calibration(
        model, [(inputs["x"], torch.arange(len(inputs["x"])) % 3)], cross_entropy
    )
    report = shrink(model, inputs, calibration, sparsity=0.1, target=target, evaluations=12)
    assert {group.kind for group in report.groups} - {"hidden"} == {kind}


class Fixed(Attention):
    """The same with a number of dimensions written down."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).reshape(n, t, -1, s) for f, s in ((self.q, 4), (self.k, 4), (self.v, 3)))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


def test_sizes_written_into_the_code_leave_heads_whole() -> None:
    torch.manual_seed(0)
    model, inputs = Fixed(), torch.randn(3, 6, 5)
    units = find_units(model, inputs, heads="dimensions")
    assert not units.groups
    assert "its heads cannot have another size" in units.left_out["q"]
    with pytest.raises(ArgumentError, match="Expected units that can be removed"):
        check_shrinkable(model, inputs, sparsity=0.5, heads="dimensions")


def test_gates_are_those_on_products_of_queries_and_keys() -> None:
    model, inputs = attention_case()
    labels = torch.tensor([0, 1, 1])
    [group] = [each for each in find_groups(model, inputs, heads="dimensions") if each.unread]
    calibration = Calibration(model, [(inputs, labels)], cross_entropy, mini_batch=1)
    found = ConsumerGateFisherImportance(calibration).score(group, model)
    gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    handle = model[0].q.register_forward_hook(lambda _, __, y: y * gate.repeat(2))
    derivatives = torch.stack([
        torch.autograd.grad(cross_entropy(model(x[None]), y[None]), gate)[0]
        for x, y in zip(inputs, labels, strict=True)
    ])  # fmt: skip
    handle.remove()
    assert found is not None
    assert torch.allclose(found, 0.5 * derivatives.square().mean(0))


def taken_over(model: Any, inputs: Tensor, kept: Tensor, ridge: float) -> Any:
    """A copy without some dimensions of queries and keys, of which the keys take over the rest.

    ``q_Z ≈ B q_K`` by least squares over all tokens, and ``k_K + Bᵀ k_Z``, head by head, slowly.
    """
    result = copy.deepcopy(model)
    gone = torch.tensor([dim for dim in range(4) if dim not in kept.tolist()])
    with torch.no_grad():
        queries = model[0].q(inputs).reshape(-1, 2, 4)
        for head in range(2):
            q = queries[:, head]
            inner = q[:, kept].T @ q[:, kept] / len(q)
            inner += ridge * inner.diagonal().mean() * torch.eye(len(kept))
            b = (q[:, gone].T @ q[:, kept] / len(q)) @ torch.linalg.inv(inner)
            for tensor in (result[0].k.weight.view(2, 4, 5), result[0].k.bias.view(2, 4, 1)):
                tensor[head, kept] += b.T @ tensor[head, gone]
        for layer in (result[0].q, result[0].k):
            layer.weight.view(2, 4, 5)[:, gone] = 0.0
            layer.bias.view(2, 4)[:, gone] = 0.0
    return result


def test_curves_of_queries_and_keys_are_losses_without_them() -> None:
    model, inputs = attention_case()
    target = torch.randn(3, 2, dtype=torch.float64)
    calibration = Calibration(model, [(inputs, target)], mse_loss)
    [group] = [each for each in find_groups(model, inputs, heads="dimensions") if each.unread]
    [curve] = measure_curves(calibration, [group], {group.name: torch.arange(4)})
    assert curve.removed[-1] == 3
    expected = taken_over(model, inputs, torch.tensor([3]), 1e-3)(inputs).detach()
    assert curve.loss[-1] == pytest.approx(float(mse_loss(expected, target)), rel=1e-9)


def test_keys_take_over_what_goes_of_the_queries() -> None:
    model, inputs = attention_case()
    calibration = Calibration(model, [(inputs, inputs[:, 0, :2])], mse_loss)
    [group] = [each for each in find_groups(model, inputs, heads="dimensions") if each.unread]
    kept = {group.name: torch.tensor([0, 2])}
    found = repair(calibration, [group], kept, damping=1e-6)
    expected = taken_over(model, inputs, kept[group.name], 1e-6)
    assert [layer.name for layer in found.layers] == ["0.k"]
    assert 0 < found.layers[0].error < found.layers[0].cut_error
    apply_plan(model, plan_of(model, [group], kept), values=found.values)
    assert torch.allclose(model(inputs), expected(inputs), rtol=1e-9)


def test_all_queries_that_share_a_key_take_over_what_goes_of_it() -> None:
    model, inputs = attention_case(shared=2)
    with torch.no_grad():  # the last two dimensions of a key are sums of the first two
        for tensor in (model[0].k.weight.view(2, 4, 5), model[0].k.bias.view(2, 4, 1)):
            tensor[:, 2:] = tensor[:, :1] + tensor[:, 1:2]
    before = model(inputs).detach()
    calibration = Calibration(model, [(inputs, inputs[:, 0, :2])], mse_loss)
    [group] = [each for each in find_groups(model, inputs, heads="dimensions") if each.unread]
    kept = {group.name: torch.arange(2)}
    found = repair(calibration, [group], kept, damping=1e-10)
    apply_plan(model, plan_of(model, [group], kept), values=found.values)
    assert torch.allclose(model(inputs), before, rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2-lm", "hf-vit"])
def test_what_queries_have_twice_costs_nothing(name: str) -> None:
    model, inputs = build(name).double(), inputs_of(name)
    inputs = tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    groups = [each for each in find_groups(model, inputs, heads="dimensions") if each.parts]
    with torch.no_grad():
        for group in groups:  # the last three dimensions repeat the first three
            for place in group.parts[0].slices:
                piece = group.slices[place]
                tensor = model.get_parameter(piece.name).movedim(piece.dim, 0)
                tensor[piece.positions[3:].flatten()] = tensor[piece.positions[:3].flatten()]
    parts = [replace(group, slices=tuple(group.slices[at] for at in group.parts[0].slices),
                     parts=group.parts[:1]) for group in groups]  # fmt: skip
    kept = {group.name: torch.arange(3) for group in parts}
    before = output_of(model, inputs)
    batch = {**inputs, "labels": torch.zeros(3, dtype=torch.long)}
    batch["labels"] = inputs["input_ids"] if "input_ids" in inputs else batch["labels"]
    found = repair(Calibration(model, [batch]), parts, kept, damping=1e-9)
    zero = copy.deepcopy(model)
    for name, value in found.values.items():
        zero.get_parameter(name).data.copy_(value)
    zero_units(zero, plan_of(zero, parts, kept))
    assert torch.allclose(output_of(zero, inputs), before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["timm-vit", "bert"])
def test_the_default_with_repair_optimizer_and_average(name: str) -> None:
    model, inputs = build(name).eval(), inputs_of(name)
    average = copy.deepcopy(model)
    labels = torch.arange(len(output_of(model, inputs))) % 3
    batch: Any = {**inputs, "labels": labels}
    calibration = Calibration(model, [batch if name == "bert" else (inputs["x"], labels)],
                              None if name == "bert" else cross_entropy)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters())
    report = shrink(
        model, inputs, calibration, sparsity=0.2, target="flops", heads="dimensions", steps=2,
        evaluations=12, optimizer=optimizer, ema=average,
    )  # fmt: skip
    assert report.flops is not None
    assert report.flops.sparsity >= 0.2 - 1e-9
    assert len(report.repairs) == 2
    output_of(model, inputs).square().mean().backward()
    optimizer.step()
    names = dict(average.named_parameters())
    assert all(names[name].shape == p.shape for name, p in model.named_parameters())


def test_gradients_are_those_of_the_shrunk_model() -> None:
    model, inputs = family_case("timm-vit")
    groups = find_groups(model, inputs, heads="dimensions")
    queries = [group for group in groups if any(part.rescaled for part in group.parts)]
    kept = {group.name: torch.arange(group.units // 2) for group in queries}
    plan = plan_of(model, queries, kept)
    zeroed = copy.deepcopy(model)
    zero_units(zeroed, plan)
    output_of(zeroed, inputs).square().mean().backward()
    for parameter, source in zip(model.parameters(), zeroed.parameters(), strict=True):
        parameter.grad = source.grad
    apply_plan(model, plan)
    assert plan.factors
    before = {name: model.get_parameter(name).grad for name in plan.factors}
    model.zero_grad()
    output_of(model, inputs).square().mean().backward()
    for name, gradient in before.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_comes_back_from_a_folder_with_its_scales(tmp_path: Path) -> None:
    model, inputs = family_case("timm-vit")
    shrink(model, inputs, Given(), sparsity=0.5, target="channels", heads="dimensions")
    save_shrunk(model, tmp_path)
    loaded: Any = load_shrunk(build("timm-vit").double(), tmp_path).eval()
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    assert loaded.blocks[1].attn.scale == model.blocks[1].attn.scale


def test_a_config_that_cannot_say_the_size_of_heads_is_left_alone() -> None:
    for name, said in (("bert", False), ("hf-vit", True)):
        model, inputs = build(name), inputs_of(name)
        groups = [g for g in find_groups(model, inputs, heads="dimensions") if g.parts]
        kept = {group.name: torch.arange(3) for group in groups}
        apply_plan(model, plan_of(model, groups, kept))
        edits = fit_config(model)
        assert bool(edits) == said
        if said:
            assert edits["head_dim"] == 3


def test_inputs_are_needed_to_tell_dimensions_apart() -> None:
    with pytest.raises(ArgumentError, match="to tell dimensions of heads apart"):
        find_groups(build("gpt2-lm"), heads="dimensions")
    with pytest.raises(ArgumentError, match="heads"):
        find_groups(build("gpt2-lm"), heads="halves")  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", ["whole", "dimensions", "either"])
def test_flops_are_those_that_a_run_of_their_own_counts(heads: Any) -> None:
    model, inputs = attention_case()
    units = find_units(model, inputs, heads=heads)
    assert units.flops is not None
    handed_on = UnitCosts.measure(model, units.groups, inputs, flops=units.flops)
    counted = UnitCosts.measure(model, units.groups, inputs)
    assert handed_on == counted
    assert counted.flops({}) > 0
