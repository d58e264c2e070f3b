"""Places for gates in blocks that are known by class name and attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from torchprune_bayes.gates._silence import silent_in_block, silent_in_stem
from torchprune_bayes.gates.site import Site, entries_of
from torchprune_bayes.layer_kinds import kind_of


@dataclass(frozen=True)
class BlockRule:
    """Where a transformer block has its heads and hidden units, relative to the block."""

    preset: str
    block: str
    attention: str
    heads: str
    producer: str
    consumer: str


BLOCKS = (
    BlockRule("timm-vit", "Block", "attn.proj", "attn.num_heads", "mlp.fc1", "mlp.fc2"),
    BlockRule(
        "hf-vit",
        "ViTLayer",
        "attention.o_proj",
        "attention.num_attention_heads",
        "mlp.fc1",
        "mlp.fc2",
    ),
    BlockRule(  # as it was named before transformers 5
        "hf-vit",
        "ViTLayer",
        "attention.output.dense",
        "attention.attention.num_attention_heads",
        "intermediate.dense",
        "output.dense",
    ),
    BlockRule(
        "bert",
        "BertLayer",
        "attention.output.dense",
        "attention.self.num_attention_heads",
        "intermediate.dense",
        "output.dense",
    ),
    BlockRule(
        "distilbert",
        "TransformerBlock",
        "attention.out_lin",
        "attention.n_heads",
        "ffn.lin1",
        "ffn.lin2",
    ),
    BlockRule("gpt2", "GPT2Block", "attn.c_proj", "attn.num_heads", "mlp.c_fc", "mlp.c_proj"),
)

RESNET_BLOCKS = ("BasicBlock", "Bottleneck")


def transformer_sites(model: nn.Module, preset: str, heads: bool) -> Iterator[Site]:
    """Yield the hidden units and heads of the blocks of a preset."""
    for name, block in model.named_modules():
        for rule in BLOCKS:
            if rule.preset != preset or type(block).__name__ != rule.block:
                continue
            at = f"{name}." if name else ""
            attention, consumer = _lookup(block, rule.attention), _lookup(block, rule.consumer)
            count = _lookup(block, rule.heads)
            if heads and isinstance(attention, nn.Module) and isinstance(count, int):
                entries = entries_of(attention, "in")
                if entries:
                    yield Site(at + rule.attention, "in", count, entries // count, "head")
            if isinstance(consumer, nn.Module) and (entries := entries_of(consumer, "in")):
                yield Site(at + rule.consumer, "in", entries, producer=at + rule.producer)


def resnet_sites(model: nn.Module, residual: bool) -> Iterator[Site]:
    """Yield the batch norms of residual blocks whose zeros reach what reads them as zeros."""
    modules = dict(model.named_modules())
    blocks = {
        name: block
        for name, block in modules.items()
        if type(block).__name__ in RESNET_BLOCKS and hasattr(block, "conv2")
    }
    if residual and blocks and silent_in_stem(model, "bn1", next(iter(blocks))):
        yield from _batch_norms(modules, [("bn1", "conv1")])
    for name, block in blocks.items():
        last = 3 if hasattr(block, "conv3") else 2
        silent = silent_in_block(block, last)
        yield from _batch_norms(modules, [
            (f"{name}.bn{i}", f"{name}.conv{i}") for i in range(1, last) if i in silent
        ])  # fmt: skip
        if residual and last in silent:
            shortcuts = (f"{name}.downsample.", f"{name}.shortcut.")
            yield from _batch_norms(modules, [(f"{name}.bn{last}", f"{name}.conv{last}")])
            yield from _batch_norms(modules, [(k, "") for k in modules if k.startswith(shortcuts)])


def _batch_norms(modules: dict[str, nn.Module], places: list[tuple[str, str]]) -> Iterator[Site]:
    for name, producer in places:
        module = modules.get(name)
        if module is None or not kind_of(module).is_norm:
            continue
        if entries := entries_of(module, "out"):
            yield Site(name, "out", entries, kind="channel", producer=producer or None)


def _lookup(module: object, path: str) -> object:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module
