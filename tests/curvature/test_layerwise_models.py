from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.references.layer_curvature import empirical_diagonal
from torchprune_bayes import Calibration
from torchprune_bayes.curvature import LayerCurvature, trainable_parameters
from torchprune_bayes.seeds import derived_seed

_SIZES = {"vocab_size": 20, "num_labels": 3}


def _bert() -> nn.Module:
    config = BertConfig(
        **_SIZES,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = DistilBertConfig(**_SIZES, dim=8, n_layers=1, n_heads=2, hidden_dim=12)
    return DistilBertForSequenceClassification(config)


def _gpt2(kind: Any = GPT2LMHeadModel) -> nn.Module:
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(**_SIZES, **special, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return kind(config)


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _texts(labels: str, lengths: tuple[int, ...] = (7, 4, 6, 2)) -> list[dict[str, Tensor]]:
    """Two batches of sequences of several lengths, padded, with attention masks."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for pair in (lengths[:3], lengths[3:]):
        ids = torch.randint(1, 20, (len(pair), max(pair)), generator=generator)
        mask = (torch.arange(max(pair)) < torch.tensor(pair).unsqueeze(1)).long()
        ids = ids * mask
        target = ids.masked_fill(mask == 0, -100) if labels == "tokens" else ids[:, 0] % 3
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    return batches


LANGUAGE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (_bert, "classes"),
    "distilbert": (_distilbert, "classes"),
    "gpt2-classifier": (lambda: _gpt2(GPT2ForSequenceClassification), "classes"),
    "gpt2": (_gpt2, "tokens"),
    "llama": (_llama, "tokens"),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_with_padding(name: str) -> None:
    torch.manual_seed(0)
    make, labels = LANGUAGE[name]
    model, data = make().double(), _texts(labels)
    found = LayerCurvature().fit_model(model, data)
    # A model's own loss for one sequence is a mean over its tokens but the first.
    terms = [int((b >= 0).sum()) - 1 for batch in data for b in batch["labels"]]
    sums = terms if labels == "tokens" else []
    expected = empirical_diagonal(model, data, None, trainable_parameters(model), sums)
    largest = max(float(value.max()) for value in expected.values())
    for key, value in expected.items():
        # Losses of tokens and Llama's norms compute in float32.
        rtol, atol = (1e-4, 1e-7) if labels == "tokens" else (1e-9, 1e-16)
        torch.testing.assert_close(
            found.diagonal()[key], value, rtol=rtol, atol=atol * largest, msg=key
        )
    assert not any("one" in how for how in found.coverage.values()), found.coverage
    assert found.count == 4
    assert found.num_terms == (sum(terms) if labels == "tokens" else 4)


def test_mean_over_the_tokens_is_what_calibrations_take() -> None:
    torch.manual_seed(0)
    model, data = _gpt2().double(), _texts("tokens")
    found = LayerCurvature(token_loss="mean").fit_model(model, data)
    expected = empirical_diagonal(model, data, None, trainable_parameters(model))
    for key, value in expected.items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=1e-5, atol=1e-9)


def test_tied_output_layer_is_named_with_the_table() -> None:
    torch.manual_seed(0)
    found = LayerCurvature(structure="kronecker").fit_model(_gpt2(), _texts("tokens"))
    assert found.coverage["transformer.wte.weight"] == "Embedding and Linear"
    assert "lm_head.weight" not in found.masks
    assert "transformer.wte.weight" in found.diagonal()
    rows, columns = found.factors("transformer.h.0.attn.c_attn.weight")
    assert (rows.shape, columns.shape) == ((8, 8), (24, 24))


def test_monte_carlo_of_a_language_model_is_that_of_its_draws() -> None:
    torch.manual_seed(0)
    model, data = _gpt2().double(), _texts("tokens")[:1]
    found = LayerCurvature("monte_carlo").fit_model(model, data)
    generator = torch.Generator().manual_seed(derived_seed(0, "curvature", 0))
    (batch,) = data
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        below = model.eval()(**inputs).logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(below.shape[:2], generator=generator).double()
    drawn = (below < uniform.unsqueeze(-1)).sum(-1).roll(1, 1)
    drawn = torch.where(batch["labels"] == -100, -100, drawn)
    terms = [6, 3, 5]
    expected = empirical_diagonal(
        model, [{**batch, "labels": drawn}], None, trainable_parameters(model), terms
    )
    for key, value in expected.items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=1e-5, atol=1e-9)


def _timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=3, **options)


VISION: dict[str, Callable[[], nn.Module]] = {
    "timm-resnet": lambda: _timm("resnet10t", channels=(4, 4, 8, 8)),
    "timm-vit": lambda: _timm(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=1,
        embed_dim=12,
        num_heads=2,
        init_values=0.1,
    ),
    "timm-convnext": lambda: _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
}


@pytest.mark.parametrize("name", VISION)
def test_vision_models(name: str) -> None:
    torch.manual_seed(0)
    model = VISION[name]().double()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    y = torch.tensor([0, 2, 1])
    expected = empirical_diagonal(model, [(x, y)], cross_entropy, trainable_parameters(model))
    found = LayerCurvature().fit_model(model, [(x, y)], cross_entropy)
    # What is zero but for rounding (biases of keys) is so beside the largest entry.
    largest = max(float(value.max()) for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(
            found.diagonal()[key], value, rtol=1e-9, atol=1e-16 * largest, msg=key
        )
    slow = {key for key, how in found.coverage.items() if "one by one" in how}
    # ConvNeXt reshapes its layer scales, so that they cannot be given per sample.
    assert slow == {key for key in found.coverage if key.endswith("gamma") and "stages" in key}


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_float32(autocast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 3
    exact = LayerCurvature(structure="both").fit_model(model, [(x, y)], cross_entropy)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = LayerCurvature(structure="both").fit_model(model, [(x, y)], cross_entropy)
    else:
        found = LayerCurvature(structure="both").fit_model(
            model.bfloat16(), [(x.bfloat16(), y)], cross_entropy
        )
    for key, value in exact.diagonal().items():
        assert found.diagonal()[key].dtype is torch.float32
        # bfloat16 has 8 bits: relative errors of its rounding, and none that grow with the sums
        assert float((found.diagonal()[key] - value).norm()) < 0.05 * float(value.norm())
    for ours, expected in zip(found.factors("0.weight"), exact.factors("0.weight"), strict=True):
        assert ours.dtype is torch.float32
        assert float((ours - expected).norm()) < 0.05 * float(expected.norm())


def test_a_calibration_s_weights_alone_are_covered() -> None:
    torch.manual_seed(0)
    model = _gpt2()
    calibration = Calibration(model, _texts("tokens"))
    found = LayerCurvature().fit(calibration)
    assert list(found.diagonal()) == calibration.space.names


class UnusedBeside(nn.Module):
    """A layer that nothing reads, without a rule, and values in the way of vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aside = nn.Linear(4, 3), nn.Bilinear(3, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 1e9 else self.a(x)


def test_what_the_outputs_do_not_depend_on_has_no_curvature() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 4), torch.arange(8) % 3)]
    found = LayerCurvature().fit_model(UnusedBeside(), data, cross_entropy).diagonal()
    assert not found["aside.weight"].any()
    assert found["a.weight"].any()
