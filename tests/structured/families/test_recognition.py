"""Families are told by the classes of their blocks, and variants are refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.structured.families.models import (
    FAMILY_MODELS,
    bert,
    build,
    distilbert,
    gpt2_config,
    gpt2_lm,
    hf_vit,
    llama_gqa,
    timm_swin,
    timm_vit,
)
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.structured.families import family_of

NAMES = {
    "timm-vit": "ViT (timm)",
    "timm-deit": "ViT (timm)",
    "timm-gated-vit": "ViT (timm)",
    "timm-swin": "Swin (timm)",
    "gpt2-lm": "GPT-2",
    "gpt2-upcast": "GPT-2",
    "gpt2-classifier": "GPT-2",
    "gpt2-base": "GPT-2",
    "distilbert": "DistilBERT",
    "bert": "BERT",
    "roberta": "RoBERTa",
    "hf-vit": "ViT",
    "llama-mha": "Llama",
    "llama-gqa": "Llama",
    "llama-gqa-eager": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_model_has_its_family(name: str) -> None:
    family = family_of(build(name))
    assert family is not None
    assert family.name == NAMES[name]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_groups_cover_entries_of_real_tensors_once(name: str) -> None:
    model = build(name)
    family = family_of(model)
    assert family is not None
    groups = family.groups(nn.DataParallel(model))
    tensors = dict(model.named_parameters())
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        seen = set()
        for piece in group.slices:
            size = tensors[piece.name].shape[piece.dim]
            assert (piece.name, piece.dim) not in seen
            seen.add((piece.name, piece.dim))
            assert piece.positions.shape[0] == group.units
            assert sorted(piece.positions.flatten().tolist()) == list(range(size))
        for rule in group.attributes:
            value = getattr(model.get_submodule(rule.module), rule.attribute)
            assert value == rule.per_unit * group.units


def test_queries_follow_their_key_value_head() -> None:
    group = FAMILY_MODELS["llama-gqa"]().eval()
    family = family_of(group)
    assert family is not None
    heads = family.groups(group)[0]
    positions = {piece.name.split(".")[-2]: piece.positions for piece in heads.slices}
    assert heads.units == 2
    assert torch.equal(positions["q_proj"], torch.arange(32).view(2, 16))
    assert torch.equal(positions["k_proj"], torch.arange(16).view(2, 8))
    assert torch.equal(positions["o_proj"], positions["q_proj"])


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
    ],
)
def test_other_models_are_left_to_tracing(model: nn.Module) -> None:
    assert family_of(model) is None


class Block(nn.Module):
    """Has the names of a timm block and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(4, 12), nn.Linear(4, 4)


def test_a_class_of_the_same_name_is_not_enough() -> None:
    assert family_of(Block()) is None


def _vit(**changes: object) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 4}
    return VisionTransformer(**{**sizes, **changes})


def _with(build: Callable[[], nn.Module], path: str, module: nn.Module) -> nn.Module:
    model = build()
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
    return model


def _pruned() -> nn.Module:
    model = gpt2_lm()
    prune.l1_unstructured(model.get_submodule("transformer.h.1.attn.c_attn"), "weight", 0.5)
    return model


def _normalised() -> nn.Module:
    model = distilbert()
    parametrizations.weight_norm(model.get_submodule("distilbert.transformer.layer.0.ffn.lin1"))
    return model


def _wrong_count(
    build: Callable[[], nn.Module], path: str, attribute: str, value: object
) -> nn.Module:
    model = build()
    setattr(model.get_submodule(path), attribute, value)
    return model


class OtherAttention(nn.Linear):
    pass


VARIANTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm across heads": (
        lambda: _vit(scale_attn_norm=True),
        "no `blocks.0.attn.norm`, since its statistics run over all heads",
    ),
    "norm across hidden units": (lambda: _vit(scale_mlp_norm=True), "no `blocks.0.mlp.norm`"),
    "differential attention": (lambda: _vit(attn_layer="diff"), "`blocks.0.attn` to be a timm"),
    "gated MLP": (
        lambda: timm.create_model(
            "vit_small_patch14_reg4_dinov2", depth=1, mlp_layer=timm.layers.SwiGLU
        ),
        "`blocks.0.mlp` to be a timm.layers.mlp.Mlp, got timm.*SwiGLU",
    ),
    "other blocks": (
        lambda: _vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        "this variant is not supported",
    ),
    "cross attention of GPT-2": (
        lambda: transformers.GPT2LMHeadModel(gpt2_config(add_cross_attention=True)),
        "no `transformer.h.0.crossattention`",
    ),
    "cross attention of BERT": (
        lambda: bert(is_decoder=True, add_cross_attention=True),
        "no `bert.encoder.layer.0.crossattention`",
    ),
    "adapter in place of a projection": (
        lambda: _with(llama_gqa, "model.layers.0.self_attn.q_proj", OtherAttention(32, 32)),
        "`model.layers.0.self_attn.q_proj` to be a torch.nn.modules.linear.Linear",
    ),
    "other attention": (
        lambda: _with(hf_vit, "vit.layers.1.attention", nn.Identity()),
        "`vit.layers.1.attention` to be a transformers",
    ),
    "pruned with a mask": (_pruned, r"`transformer.h.1.attn.c_attn.weight` to be a plain"),
    "weight norm": (_normalised, "lin1` to be a|lin1.weight` to be a plain"),
    "wrong number of heads": (
        lambda: _wrong_count(timm_vit, "blocks.1.attn", "num_heads", 3),
        "`blocks.1.attn.qkv` to have 54 outputs for 3 units of 18, got 72",
    ),
    "no number of heads": (
        lambda: _wrong_count(
            distilbert, "distilbert.transformer.layer.0.attention", "n_heads", None
        ),
        "attention.n_heads` to be a positive int, got None",
    ),
    "bias table of other size": (
        lambda: _wrong_count(timm_swin, "layers.0.blocks.1.attn", "num_heads", 4),
        "relative_position_bias_table` with one column for each of 4",
    ),
    "other hidden size": (
        lambda: _with(hf_vit, "vit.layers.0.mlp.fc2", nn.Linear(30, 24)),
        "`vit.layers.0.mlp.fc2` to have 36 inputs for 36 units of 1, got 30",
    ),
    "two families": (
        lambda: nn.Sequential(timm_vit(), timm_swin()),
        r"one family, got blocks of several: ViT \(timm\), Swin \(timm\)",
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_are_refused(case: str) -> None:
    build_variant, message = VARIANTS[case]
    model = build_variant()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ParameterError, match=message):
        family_of(model).groups(model)  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_recognition_imports_no_model_library() -> None:
    code = (
        "import sys, torch; from torchprune_bayes.structured.families import family_of; "
        "assert family_of(torch.nn.Linear(2, 2)) is None; "
        "print([name for name in ('timm', 'transformers', 'torch_pruning') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
