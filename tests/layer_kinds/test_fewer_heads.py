"""Attention with fewer heads computes what PyTorch's computes with the others zeroed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts.state import unchanged
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import attach_gates
from torchprune_bayes.layer_kinds.fewer_heads import FewerHeads
from torchprune_bayes.structured import (
    L1FilterImportance,
    apply_plan,
    find_groups,
    load_shrunk,
    plan_of,
    save_shrunk,
    shrink,
    zero_units,
)

WIDTH, HEADS, KEPT = 12, 4, torch.tensor([0, 2, 3])


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """The whole attention with a head zeroed, and the one without it, in double precision."""
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    call = {"query": x, "key": x, "value": x, "need_weights": False}
    [group] = find_groups(whole, call)
    plan = plan_of(whole, [group], {group.name: KEPT})
    small = copy.deepcopy(whole)
    apply_plan(small, plan)
    zero_units(whole, plan)
    return whole, small


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": torch.triu(torch.ones(5, 5), 1).bool(), "is_causal": True},
    "added": {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()},
    "both": {
        "attn_mask": torch.triu(torch.ones(5, 5), 1).bool(),
        "key_padding_mask": torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool(),
    },
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_it_computes_what_the_masked_attention_computes(
    mask: str, weights: bool, batch_first: bool, bias: bool
) -> None:
    whole, small = pair(batch_first=batch_first, bias=bias)
    assert type(small) is FewerHeads
    assert small.num_heads == 3
    assert len(small.in_proj_weight) == 27
    shape = (2, 5, WIDTH) if batch_first else (5, 2, WIDTH)
    query, key = torch.randn(2, *shape, dtype=torch.float64)
    options = {"need_weights": weights, "average_attn_weights": False, **MASKS[mask]}
    expected, scores = whole(query, key, key, **options)
    found, fewer = small(query, key, key, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if weights:
        torch.testing.assert_close(fewer, scores[:, KEPT], rtol=1e-12, atol=1e-12)


def test_a_single_sample_needs_no_batch() -> None:
    whole, small = pair()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    mask = torch.triu(torch.ones(5, 5), 1).bool()
    expected, found = (each(x, x, x, attn_mask=mask)[0] for each in (whole, small))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_masks_for_every_head_and_sample_are_those_of_the_heads_that_remain() -> None:
    whole, small = pair(batch_first=True)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mask = torch.randn(2, HEADS, 5, 5, dtype=torch.float64)
    expected = whole(x, x, x, attn_mask=mask.flatten(0, 1))[0]
    found = small(x, x, x, attn_mask=mask[:, KEPT].flatten(0, 1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_copies_pickles_and_gradients() -> None:
    _, small = pair(batch_first=True)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    expected = small(x, x, x)[0]
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x, x, x)[0], expected)
    small.train()(x, x, x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_hint_alone_is_refused_as_by_pytorch() -> None:
    _, small = pair()
    x = torch.randn(5, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="attn_mask"):
        small(x, x, x, is_causal=True)


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 6, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_encoders_lose_whole_heads_and_come_back_from_a_folder(tmp_path: Any) -> None:
    model, x = _encoder(), torch.randn(2, 5, 16)
    report = shrink(model, x, L1FilterImportance(), sparsity=0.4, target="params", min_keep=2)
    assert {group.kind for group in report.groups} == {"head", "hidden"}
    attention = model.get_submodule("layers.0.self_attn")
    assert attention.num_heads < 4  # type: ignore[operator]
    save_shrunk(model, tmp_path)
    loaded = load_shrunk(_encoder(), tmp_path)
    assert type(loaded.get_submodule("layers.0.self_attn")) is FewerHeads
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_decoders_with_cross_attention_lose_heads_too() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 4, 6).eval()
    inputs = {"tgt": torch.randn(5, 2, 16), "memory": torch.randn(7, 2, 16)}
    groups = find_groups(model, inputs)
    assert [(group.name, group.kind, group.units) for group in groups] == [
        ("self_attn", "head", 4),
        ("multihead_attn", "head", 4),
        ("linear1", "hidden", 6),
    ]


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6}])
def test_attention_of_another_make_is_left_whole(options: dict[str, Any]) -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    x = torch.randn(3, 2, WIDTH)
    inputs = (x, x[..., : options.get("kdim", WIDTH)], x)
    assert not find_groups(model, inputs)


def test_a_failure_leaves_the_class(tmp_path: Any) -> None:
    small, x = _encoder(), torch.randn(2, 5, 16)
    shrink(small, x, L1FilterImportance(), sparsity=0.4, target="params", min_keep=2)
    save_shrunk(small, tmp_path)
    other = nn.TransformerEncoderLayer(16, 4, 6, batch_first=True)
    with unchanged(other), pytest.raises(ArgumentError):
        load_shrunk(other, tmp_path)
    assert type(other.self_attn) is nn.MultiheadAttention


def test_gates_stay_off_layers_that_are_never_called() -> None:
    model = _encoder()
    gates = attach_gates(model, "auto", torch.randn(2, 5, 16))
    assert list(gates) == ["layers.0.linear2:in", "layers.1.linear2:in"]
