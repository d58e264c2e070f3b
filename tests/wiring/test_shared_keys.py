"""Heads that share one key and one value: the queries go, the key and the value stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from torchprune_bayes.structured import (
    L1FilterImportance,
    find_units,
    load_shrunk,
    save_shrunk,
    shrink,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
BIG_CODE = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "n_positions": 32}


def built(stem: str, attention: str) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 99}
    sizes = BIG_CODE if stem == "GPTBigCode" else SIZES
    config = getattr(transformers, f"{stem}Config")(**sizes, **special)
    config._attn_implementation = attention
    return getattr(transformers, f"{stem}ForCausalLM")(config).eval()


shared_in_torch = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"),
    reason="the shared key may be expanded, whose dimensions are then units, and not its heads",
)


@pytest.mark.parametrize(
    ("stem", "attention"),
    [
        ("Gemma", "sdpa"),
        ("Gemma", "eager"),
        ("Gemma2", "eager"),
        ("Llama", "sdpa"),
        pytest.param("GPTBigCode", "sdpa", marks=shared_in_torch),
    ],
)
def test_queries_of_a_shared_key_are_heads(stem: str, attention: str, tmp_path: Any) -> None:
    model = built(stem, attention)
    inputs = {"input_ids": torch.randint(3, 99, (2, 12), generator=torch.Generator())}
    heads = [group for group in find_units(model, inputs).groups if group.kind == "head"]
    assert [group.units for group in heads] == [4, 4]
    report = shrink(model, inputs, L1FilterImportance(), sparsity=0.4, target="channels")
    assert report.difference is not None
    assert report.difference < 1e-5
    assert any(group.units.after < 4 for group in report.groups if group.kind == "head")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    save_shrunk(model, tmp_path)
    again: Any = load_shrunk(built(stem, attention), tmp_path)
    assert torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
