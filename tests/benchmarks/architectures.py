"""Real architectures with small configurations and random weights, and inputs for them.

Named as their packages name them: transformers by the stem of its classes, timm and torchvision by
the model. Sizes that a configuration does not know are left out of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]

DECODERS = """
    Llama Mistral Qwen2 Qwen3 GPT2 Gemma Gemma2 Gemma3Text Phi Phi3 GPTNeoX GPTNeoXJapanese GPTJ OPT
    Bloom Falcon StableLm Cohere Cohere2 Olmo Olmo2 Olmo3 Granite SmolLM3 Starcoder2 Mixtral
    Qwen2Moe Qwen3Moe GraniteMoe Olmoe Nemotron Persimmon GPTBigCode CodeGen Glm Glm4 Helium
    Ministral Exaone4 Arcee DiffLlama Mpt BioGpt XGLM CTRL Mamba FalconMamba Rwkv JetMoe Ernie4_5
    Apertus Lfm2 HunYuanDenseV1 SeedOss Phimoe MiniMax GptOss Doge BitNet
"""
ENCODERS = """
    Bert Roberta DistilBert XLMRoberta Camembert Electra DebertaV2 Deberta MPNet Albert ModernBert
    RoFormer Ernie Data2VecText NomicBert MobileBert SqueezeBert ConvBert FNet MegatronBert
    Nystromformer RemBert Flaubert XLM Longformer BigBird Esm IBert LayoutLM Splinter Yoso
    RobertaPreLayerNorm EuroBert Canine
"""
IMAGES = """
    ViT DeiT Dinov2 Dinov2WithRegisters Beit Data2VecVision ViTMAE ViTMSN ResNet RegNet MobileNetV1
    MobileNetV2 MobileViT PoolFormer FocalNet ConvNext ConvNextV2 Segformer Swin Swinv2
"""
SEQUENCES = "T5 Bart MBart Pegasus Marian Blenderbot MT5 UMT5 M2M100"
WAVES = "Wav2Vec2 Hubert WavLM"
TIMM = """
    resnet18 resnet26d resnext50_32x4d seresnet18 ecaresnet26t res2net50_14w_8s skresnet18
    densenet121 vgg11_bn dla34 dpn48b hrnet_w18_small mobilenetv2_050 mobilenetv3_small_050
    mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0 mnasnet_small ghostnet_050 regnetx_002
    regnety_002 nfnet_l0 nf_resnet26 convnext_atto convnextv2_atto cspresnet50 cspdarknet53
    repvgg_a0 vovnet39a tresnet_m resnetv2_50x1_bit vit_tiny_patch16_224 deit_tiny_patch16_224
    vit_relpos_small_patch16_224 cait_xxs24_224 beit_base_patch16_224 eva02_tiny_patch14_224
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 twins_svt_small twins_pcpvt_small pvt_v2_b0
    levit_128s xcit_nano_12_p16_224 efficientformer_l1 efficientformerv2_s0 edgenext_xx_small
    mobilevit_xxs mobilevitv2_050 maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 coat_lite_tiny
    convit_tiny focalnet_tiny_srf poolformer_s12 caformer_s18 mixer_s16_224 resmlp_12_224
    gmlp_ti16_224 visformer_tiny pit_ti_224 inception_v3 fastvit_t8 starnet_s1 fasternet_t0 shvit_s1
    hgnetv2_b0 lcnet_050 tinynet_e rexnet_100 tiny_vit_5m_224 inception_next_atto mambaout_femto
    efficientvit_b0 botnet26t_256 lambda_resnet26t
"""
TORCHVISION = """
    alexnet vgg11 resnet18 resnext50_32x4d densenet121 squeezenet1_1 googlenet inception_v3
    mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf mnasnet0_5 shufflenet_v2_x0_5
    convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t fcn_resnet50 lraspp_mobilenet_v3_large
    deeplabv3_mobilenet_v3_large
"""
DETECTORS = """
    fcos_resnet50_fpn retinanet_resnet50_fpn ssdlite320_mobilenet_v3_large
    fasterrcnn_mobilenet_v3_large_320_fpn
"""

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "embedding_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "global_attn_every_n_layers"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 64),
    **dict.fromkeys(("sliding_window", "local_attention", "num_mel_bins"), 16),
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "vocab_size": 99,
    "image_size": 32,
    "patch_size": 8,
    "max_source_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "drop_path_rate": 0.0,
}

ADDED: Mapping[str, Mapping[str, Any]] = {
    "BigBird": {"attention_type": "original_full"},  # it would exchange its modules in a run
}
"""Configured beside :data:`SIZES`."""

_TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "ConvNext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "ConvNextV2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "Segformer": {"image_size": 64},
    "Swin": {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
             "window_size": 4},
    "Swinv2": {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
               "window_size": 4},
    "CLIP": {"text_config": {**_TINY, "vocab_size": 99, "eos_token_id": 2},
             "vision_config": {**_TINY, "image_size": 32, "patch_size": 8}},
    "Siglip": {"text_config": {**_TINY, "vocab_size": 99, "max_position_embeddings": 12},
               "vision_config": {**_TINY, "image_size": 32, "patch_size": 8}},
    "Detr": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 6,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
             "decoder_ffn_dim": 48, "backbone": "resnet18", "use_timm_backbone": True,
             "use_pretrained_backbone": False, "image_size": 64},
}  # fmt: skip
"""Configurations that say their sizes in another way; others of :data:`SIZES` are not given."""


CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "Marian": "MarianMTModel"}
"""Classes that are called neither after their configuration nor by an ending."""


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: The package and what it calls it.
        build: Makes it, with random weights.
        inputs: Makes keyword arguments for so many samples.
        generates: Whether it continues texts.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    generates: bool = False


def architectures() -> Iterator[Architecture]:
    """Yield all architectures, in a fixed order."""
    yield from _transformers(DECODERS, "ForCausalLM", _text, generates=True)
    yield from _transformers(ENCODERS, "Model", _text)
    yield from _transformers(IMAGES, "Model", _picture)
    yield from _transformers(SEQUENCES, "ForConditionalGeneration", _pair, generates=True)
    yield from _transformers("Whisper", "ForConditionalGeneration", _speech)
    yield from _transformers("CLIP Siglip", "Model", _captioned)
    yield from _transformers("Detr", "Model", _picture)
    yield from _transformers(WAVES, "Model", _wave)
    for name in TIMM.split():
        yield Architecture(f"timm {name}", partial(_timm, name), partial(_timm_images, name))
    for name in TORCHVISION.split():
        side = {"vit_b_16": 224, "maxvit_t": 224, "inception_v3": 96}.get(name, 64)
        key = "input" if name.startswith("lraspp") else "x"
        inputs = partial(_images, key, side)
        yield Architecture(f"torchvision {name}", partial(_torchvision, name), inputs)
    for name in DETECTORS.split():
        yield Architecture(f"torchvision {name}", partial(_detector, name), _pictures)
    yield from _torch()


def _torch() -> Iterator[Architecture]:
    layer = partial(nn.TransformerEncoderLayer, 16, 4, 32, batch_first=True)
    yield Architecture("torch TransformerEncoderLayer", layer, partial(_tokens, "src", 16))
    yield Architecture(
        "torch TransformerEncoder",
        lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False),
        partial(_tokens, "src", 16),
    )
    for kind in (nn.LSTM, nn.GRU):
        for layers, both in ((1, False), (2, True)):
            name = f"torch {kind.__name__}, {layers} layers{', both ways' if both else ''}"
            build = partial(Tagger, kind, layers, both)
            yield Architecture(name, build, partial(_tokens, "x", 6))


class Tagger(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: Callable[..., nn.Module], layers: int, both: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16 if both else 8, 3)
        self.g = kind(16, 8, layers, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every token."""
        return self.b(self.g(torch.relu(self.a(x)))[0])


def seeded() -> torch.Generator:
    """A generator that always starts alike."""
    return torch.Generator().manual_seed(0)


def _ids(count: int, length: int) -> Tensor:
    return torch.randint(5, 90, (count, length), generator=seeded())


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded())


def _tokens(key: str, width: int, count: int) -> Inputs:
    return {key: _normal(count, 5, width)}


def _images(key: str, side: int, count: int) -> Inputs:
    return {key: _normal(count, 3, side, side)}


def _text(count: int) -> Inputs:
    return {"input_ids": _ids(count, 12)}


def _picture(count: int, side: int = 32) -> Inputs:
    return {"pixel_values": _normal(count, 3, side, side)}


def _pair(count: int) -> Inputs:
    return {"input_ids": _ids(count, 12), "decoder_input_ids": _ids(count, 7)}


def _speech(count: int) -> Inputs:
    return {"input_features": _normal(count, 16, 32), "decoder_input_ids": _ids(count, 7)}


def _captioned(count: int) -> Inputs:
    return {**_text(count), **_picture(count)}


def _wave(count: int) -> Inputs:
    return {"input_values": _normal(count, 2000)}


def _pictures(count: int) -> Inputs:
    return {"images": list(_normal(count, 3, 64, 64))}


def _transformers(
    stems: str, ending: str, inputs: Callable[[int], Inputs], *, generates: bool = False
) -> Iterator[Architecture]:
    for stem in stems.split():
        side = SPECIAL.get(stem, {}).get("image_size", 32)
        made = partial(_picture, side=side) if inputs is _picture else inputs
        name = f"transformers {stem}"
        yield Architecture(name, partial(_hugging_face, stem, ending), made, generates)


def _hugging_face(stem: str, ending: str) -> nn.Module:
    import transformers

    kind = getattr(transformers, f"{stem}Config")
    default = kind()
    given = dict(SPECIAL.get(stem, ()))
    if not given:
        properties = {key for base in kind.__mro__ for key, value in vars(base).items()
                      if isinstance(value, property)}  # fmt: skip
        given = {
            key: value
            for key, value in SIZES.items()
            if hasattr(default, key) and key not in properties
        } | dict(ADDED.get(stem, {}))
    names = (f"{stem}{ending}", f"{stem}LMHeadModel", f"{stem}Model")
    name = next(name for name in names if hasattr(transformers, name))
    model: nn.Module = getattr(transformers, CLASSES.get(stem, name))(kind(**given))
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=5)
    return model


def _timm_images(name: str, count: int) -> Inputs:
    import timm

    settings = timm.get_pretrained_cfg(name)
    fixed = settings.fixed_input_size or any(part in name for part in ("botnet", "lambda"))
    side = settings.input_size[-1] if fixed else 96 if name == "inception_v3" else 64
    return {"x": _normal(count, 3, side, side)}


def _torchvision(name: str) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {}
    if name not in TORCHVISION.split()[:-3]:
        options["weights_backbone"] = None
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
    return model


def _detector(name: str) -> nn.Module:
    """A detector that finds something: any score counts, and norms know their inputs."""
    import torchvision

    options: dict[str, Any] = {"weights_backbone": None}
    options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
    if not name.startswith("ssd"):
        options |= {"min_size": 128, "max_size": 128}
    model = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(**_pictures(2))
    model.eval()
    found: nn.Module = model
    return found
