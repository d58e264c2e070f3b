"""Small models with random weights of every family, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import timm
import torch
import transformers
from timm.layers.attention import Attention
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

VOCABULARY, LENGTH = 40, 9


def timm_vit() -> nn.Module:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5
    )


def timm_deit() -> nn.Module:
    return timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=32,
        embed_dim=24,
        depth=2,
        num_heads=4,
        num_classes=5,
    )


def timm_gated_vit() -> nn.Module:
    """Normalised queries and keys, a gate on the heads, no bias of the projections."""
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=4, qkv_bias=False, qk_norm=True
    )
    attention = model.blocks[0].attn
    attention.gate = nn.Linear(24, 24, bias=False)
    return model


def timm_swin() -> nn.Module:
    return SwinTransformer(
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=5,
        drop_path_rate=0.0,
    )


def gpt2_config(**changes: Any) -> Any:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.GPT2Config(**{**sizes, **dropouts, **tokens, **changes})


def gpt2_lm() -> nn.Module:
    return transformers.GPT2LMHeadModel(gpt2_config())


def gpt2_upcast() -> nn.Module:
    """The eager path with reordered products and scores scaled by the layer's number."""
    return transformers.GPT2LMHeadModel(
        gpt2_config(
            attn_implementation="eager",
            reorder_and_upcast_attn=True,
            scale_attn_by_inverse_layer_idx=True,
        )
    )


def gpt2_classifier() -> nn.Module:
    return transformers.GPT2ForSequenceClassification(gpt2_config(num_labels=3))


def gpt2_base() -> nn.Module:
    return transformers.GPT2Model(gpt2_config())


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        dim=24,
        n_layers=2,
        n_heads=4,
        hidden_dim=36,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        num_labels=3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )
    return transformers.DistilBertForSequenceClassification(config)


BERT_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(**changes: Any) -> nn.Module:
    config = transformers.BertConfig(**BERT_SIZES, **changes)
    return transformers.BertForSequenceClassification(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**BERT_SIZES, pad_token_id=0)
    return transformers.RobertaForSequenceClassification(config)


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=36,
        image_size=16,
        patch_size=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


def decoder(family: str, key_value_heads: int = 4, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        intermediate_size=36,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **changes},
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def llama_mha() -> nn.Module:
    return decoder("Llama", attention_bias=True, mlp_bias=True)


def llama_gqa() -> nn.Module:
    return decoder("Llama", key_value_heads=2)


def llama_gqa_eager() -> nn.Module:
    return decoder("Llama", key_value_heads=2, attn_implementation="eager")


def mistral() -> nn.Module:
    return decoder("Mistral", key_value_heads=2, sliding_window=4)


def qwen2() -> nn.Module:
    return decoder("Qwen2", key_value_heads=2)


def qwen3() -> nn.Module:
    return decoder("Qwen3", key_value_heads=2, head_dim=6)


FAMILY_MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm-vit": timm_vit,
    "timm-deit": timm_deit,
    "timm-gated-vit": timm_gated_vit,
    "timm-swin": timm_swin,
    "gpt2-lm": gpt2_lm,
    "gpt2-upcast": gpt2_upcast,
    "gpt2-classifier": gpt2_classifier,
    "gpt2-base": gpt2_base,
    "distilbert": distilbert,
    "bert": bert,
    "roberta": roberta,
    "hf-vit": hf_vit,
    "llama-mha": llama_mha,
    "llama-gqa": llama_gqa,
    "llama-gqa-eager": llama_gqa_eager,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
if "gated" not in signature(Attention).parameters:  # timm before 1.0.28
    del FAMILY_MODELS["timm-gated-vit"]
GENERATORS = (
    "gpt2-lm",
    "gpt2-upcast",
    "llama-mha",
    "llama-gqa",
    "llama-gqa-eager",
    "mistral",
    "qwen2",
    "qwen3",
)


def build(name: str) -> nn.Module:
    """Build a model whose every parameter is random, so that no bias hides behind a zero."""
    generator = torch.Generator().manual_seed(0)
    model = FAMILY_MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return model.eval()


def inputs_of(name: str, batch: int = 3) -> dict[str, Tensor]:
    """Make a batch: images, or token numbers of which the first row is padded."""
    generator = torch.Generator().manual_seed(1)
    if name.startswith("timm"):
        side = 16 if "vit" in name else 32
        return {"x": torch.randn(batch, 3, side, side, generator=generator)}
    if name == "hf-vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    tokens = torch.randint(1, VOCABULARY, (batch, LENGTH), generator=generator)
    attention = torch.ones_like(tokens)
    attention[0, -3:] = 0
    return {"input_ids": tokens, "attention_mask": attention}


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the main output as one tensor."""
    result = model(**inputs)
    if isinstance(result, tuple):
        return torch.stack(result)
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    return result.last_hidden_state if logits is None else logits
