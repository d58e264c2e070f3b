"""Gradients of tiny models of timm and Hugging Face, with random weights, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.calibration.cases import CLASSES, assert_same, collected
from tests.contracts.state import unchanged
from tests.references.gradients import per_sample_loop
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.costs import flops_per_weight

pytest.importorskip("transformers")
pytest.importorskip("timm")

Family = tuple[Any, list[Any], Any]
"""Model, batches and loss function."""


def timm_model(name: str, **options: Any) -> Family:
    import timm

    model = timm.create_model(name, num_classes=CLASSES, **options)
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    labels = torch.randint(CLASSES, (5,))
    batches = list(zip(images.split([3, 2]), labels.split([3, 2]), strict=True))
    return model, batches, cross_entropy


def _gpt2_config(**options: Any) -> Any:
    import transformers

    return transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=16, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip


def gpt2_lm() -> Family:
    import transformers

    ids = torch.randint(3, 100, (4, 8))
    labels = ids.clone()
    labels[0, 5:] = -100  # padding
    labels[2, :4] = -100  # a prompt
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return transformers.GPT2LMHeadModel(_gpt2_config()), [batch], None


def gpt2_classifier() -> Family:
    import transformers

    config = _gpt2_config(num_labels=CLASSES)
    return transformers.GPT2ForSequenceClassification(config), padded_batches(), None


def distilbert() -> Family:
    import transformers

    config = transformers.DistilBertConfig(
        dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=100, num_labels=CLASSES,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config), padded_batches(), None


def llama() -> Family:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(3, 100, (3, 6))
    return transformers.LlamaForCausalLM(config), [{"input_ids": ids, "labels": ids}], None


def padded_batches() -> list[dict[str, Tensor]]:
    """Batches as a padding collator makes them, of different lengths."""
    batches = []
    for lengths in ((8, 5, 7), (4, 3)):
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, length in zip(ids, lengths, strict=True):
            row[:length] = torch.randint(3, 100, (length,))
        labels = torch.randint(CLASSES, (len(lengths),))
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    return batches


FAMILIES: dict[str, Callable[[], Family]] = {
    "ViT": lambda: timm_model("test_vit", img_size=32),
    "ResNet": lambda: timm_model("test_resnet"),
    "GPT-2": gpt2_lm,
    "GPT-2 classifier": gpt2_classifier,
    "DistilBERT": distilbert,
    "Llama": llama,
}


def made(name: str) -> Family:
    torch.manual_seed(0)
    model, batches, loss_fn = FAMILIES[name]()
    return model.double(), batches, loss_fn


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_a_backward_pass_per_sample(name: str) -> None:
    model, batches, loss_fn = made(name)
    with unchanged(model):
        params = prunable_parameters(model)
        calibration = Calibration(model, batches, loss_fn, params)
        found = collected(calibration)
    assert_same(found, per_sample_loop(model, batches, loss_fn, params))


@pytest.mark.parametrize("name", ["ViT", "ResNet", "Llama"])
def test_vmap_and_the_loop_agree(name: str) -> None:
    model, batches, loss_fn = made(name)
    vectorized = Calibration(model, batches, loss_fn, vectorize=True)
    found = collected(vectorized)
    assert vectorized.engine == "vmap"
    assert_same(found, collected(Calibration(model, batches, loss_fn, vectorize=False)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_has_gradients_at_its_live_entries(name: str) -> None:
    model, batches, loss_fn = made(name)
    params = prunable_parameters(model)
    for module, tensor_name in params:
        prune.l1_unstructured(module, tensor_name, amount=0.5)
    with unchanged(model):
        calibration = Calibration(model, batches, loss_fn, params)
        found = collected(calibration)
    kept = torch.cat([mask.flatten() for mask in calibration.space.masks().values()])
    assert_same(found, per_sample_loop(model, batches, loss_fn, params)[:, kept])


@pytest.mark.parametrize("name", ["GPT-2", "DistilBERT"])
def test_a_loss_function_of_ones_own_gets_the_logits(name: str) -> None:
    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        if name == "GPT-2":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return cross_entropy(logits, labels)

    model, batches, _ = made(name)
    with_own = collected(Calibration(model, batches, loss_fn))
    torch.testing.assert_close(with_own, collected(Calibration(model, batches)))


def test_mini_batches_of_one_length_are_means_of_their_samples() -> None:
    model, batches, _ = made("Llama")
    single = collected(Calibration(model, batches))
    found = collected(Calibration(model, batches, mini_batch=3))
    torch.testing.assert_close(found[0], single.mean(0))


def test_mini_batches_may_span_batches_of_different_lengths() -> None:
    model, batches, _ = made("DistilBERT")
    single = collected(Calibration(model, batches))
    found = collected(Calibration(model, batches, mini_batch=5))
    torch.testing.assert_close(found[0], single.mean(0))


def test_the_true_fisher_of_a_language_model_shifts_its_labels() -> None:
    model, batches, _ = made("GPT-2")
    calibration = Calibration(model, batches, fisher="true")
    (drawn,) = (batch["labels"] for batch in calibration.fisher_batches())
    labels = batches[0]["labels"]
    assert torch.equal(drawn[:, 0], labels[:, 0])
    assert torch.equal(drawn == -100, labels == -100)
    assert not torch.equal(drawn, labels)
    assert collected(calibration).isfinite().all()


def test_a_tied_embedding_is_not_pruned_unless_it_is_asked_for() -> None:
    model, batches, _ = made("GPT-2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(module is not model.lm_head for module, _ in prunable_parameters(model))
    params = [(model.lm_head, "weight")]
    found = collected(Calibration(model, batches, params=params))
    assert_same(found, per_sample_loop(model, batches, None, params))


def test_half_precision_models_are_differentiated_in_float32() -> None:
    model, batches, _ = made("DistilBERT")
    half = model.bfloat16()
    wide = copy.deepcopy(half).float()
    with unchanged(half):
        found = collected(Calibration(half, batches))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, collected(Calibration(wide, batches)))


# FLOPs


def test_flops_of_a_vision_transformer() -> None:
    model, batches, loss_fn = made("ViT")
    found = flops_per_weight(Calibration(model, batches, loss_fn))
    patches = (32 // model.patch_embed.patch_size[0]) ** 2
    tokens = patches + model.num_prefix_tokens
    assert found["patch_embed.proj.weight"] == 2 * patches
    assert {v for name, v in found.items() if name.startswith("blocks.")} == {2 * tokens}
    assert found["head.weight"] == 2


@pytest.mark.parametrize(("name", "tokens"), [("GPT-2", 8), ("DistilBERT", 8), ("Llama", 6)])
def test_flops_of_a_language_model(name: str, tokens: int) -> None:
    model, batches, loss_fn = made(name)
    found = flops_per_weight(Calibration(model, batches, loss_fn))
    heads = {"pre_classifier.weight": 1, "classifier.weight": 1}  # on the first token alone
    assert found == {weight: 2 * heads.get(weight, tokens) for weight in found}


@pytest.mark.parametrize("mini_batch", [1, 2])
@pytest.mark.parametrize("make", [gpt2_lm, distilbert], ids=["GPT-2", "DistilBERT"])
def test_the_layers_rules_serve_a_models_own_mean_cross_entropy(
    make: Callable[[], Family], mini_batch: int
) -> None:
    torch.manual_seed(0)
    model, batches, _ = make()
    batches = [{name: value[:2] for name, value in batch.items()} for batch in batches]
    params = [(m, "weight") for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    params = [pair for pair in params if pair[0] is not model.get_output_embeddings()]
    by_rules = Calibration(model, batches, None, params, mini_batch=mini_batch)
    found = collected(by_rules)
    assert by_rules.engine == "layers"
    loop = Calibration(model, batches, None, params, mini_batch=mini_batch, vectorize=False)
    torch.testing.assert_close(found, collected(loop), rtol=1e-4, atol=1e-6)


class Penalised(torch.nn.Module):
    """A model whose own loss has a term beside the cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        logits = self.layer(inputs)
        return SimpleNamespace(
            logits=logits, loss=cross_entropy(logits, labels) + logits.square().mean()
        )


def test_another_loss_of_the_models_own_is_left_to_vmap() -> None:
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(6, 4), "labels": torch.arange(6) % CLASSES}
    model = Penalised()
    calibration = Calibration(model, [batch])
    found = collected(calibration)
    assert calibration.engine == "vmap"
    assert_same(found, collected(Calibration(model, [batch], vectorize=False)))
