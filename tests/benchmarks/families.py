"""Every served architecture at its published size: shrunk, checked, trained one step, reloaded.

    python -m tests.benchmarks.families [--only vit] [--sparsity 0.5]

Random weights and inputs: nothing here depends on what they are. Half of the channels, hidden units
and heads of every group go, those with the smallest L1 norm. The shrunk model is compared with the
dense one in which all that belongs to these units is zero. Prints a Markdown table: the largest
difference between these two and the size of the outputs, whether it is rounding, whether a backward
pass in training mode reaches every parameter, whether both generate the same tokens with a cache,
and whether the model comes back from a folder bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from torchprune_bayes.costs import flop_counter
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.structured.saving import load_shrunk, save_shrunk
from torchprune_bayes.structured.shrink import shrink
from torchprune_bayes.structured.slicing import zero_units

TOKENS = 64
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One architecture."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    generates: bool = False


@dataclass(frozen=True)
class Row:
    """What was found for it."""

    name: str
    parameters: tuple[int, int]
    flops: tuple[int, int]
    difference: float
    scale: float
    backward: bool
    generate: bool | None
    reload: bool

    @property
    def forward(self) -> bool:
        """Whether the shrunk model computes what the masked one computes."""
        return self.difference <= TOLERANCE

    def __str__(self) -> str:
        millions = " → ".join(f"{count / 1e6:.1f}" for count in self.parameters)
        flops = " → ".join(f"{count / 1e9:.2f}" for count in self.flops)
        difference = f"{self.difference:.0e} of {self.scale:.1f}"
        marks = {True: "yes", False: "**no**", None: "–"}
        found = (self.forward, self.backward, self.generate, self.reload)
        checks = " | ".join(marks[check] for check in found)
        return f"| {self.name} | {millions} | {flops} | {difference} | {checks} |"


HEADER = (
    "| model | parameters (M) | GFLOPs | masked against shrunk | forward | backward | generate "
    "| save, reload |\n|---|---|---|---|---|---|---|---|"
)


def cases() -> Iterator[Case]:
    """All architectures, sizes as published."""
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(1, TOKENS + 1)[None] * 13
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for name in ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2"):
        yield Case(f"torchvision {name}", _torchvision(name), {"x": images})
    for name in (
        "resnet18",
        "resnet50",
        "convnext_tiny",
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
    ):
        yield Case(f"timm {name}", _timm(name), {"x": images})
    yield Case("GPT2LMHeadModel", _hugging_face("GPT2LMHeadModel", "GPT2Config"), text, True)
    for name, config in (
        ("GPT2ForSequenceClassification", "GPT2Config"),
        ("DistilBertForSequenceClassification", "DistilBertConfig"),
        ("BertForSequenceClassification", "BertConfig"),
    ):
        yield Case(name, _hugging_face(name, config, pad_token_id=0), text)
    yield Case(
        "ViTForImageClassification",
        _hugging_face("ViTForImageClassification", "ViTConfig"),
        {"pixel_values": images},
    )
    for label, sizes in LLAMAS.items():
        build = _hugging_face("LlamaForCausalLM", "LlamaConfig", **sizes)
        yield Case(f"LlamaForCausalLM, {label}", build, text, True)


LLAMAS = {
    "12 heads": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "9 heads on 3 key/value heads": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)()


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def _hugging_face(name: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**sizes))


def stir(model: nn.Module) -> nn.Module:
    """Move every vector, so that no channel hides behind a zero bias or a tiny layer scale."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits."""
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


def flops_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward pass of one sample."""
    with flop_counter() as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


def parameters_of(model: nn.Module) -> int:
    """Number of parameters, ties once."""
    return sum(parameter.numel() for parameter in model.parameters())


def all_get_gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a step in training mode reaches every parameter; two samples, for the norms."""
    batch = {name: torch.cat([value, value]) for name, value in inputs.items()}
    output_of(model.train(), batch).square().mean().backward()
    complete = all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    model.eval()
    return complete


def same_tokens(model: Any, twin: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether both continue a text alike, with the key/value cache."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return torch.equal(model.generate(**inputs, **settings), twin.generate(**inputs, **settings))


def comes_back(model: nn.Module, case: Case) -> bool:
    """Whether a model from the original constructor takes the saved one over, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        save_shrunk(model, folder)
        fresh = load_shrunk(case.build().eval(), folder)
    state = fresh.state_dict()
    if not all(torch.equal(state[name], value) for name, value in model.state_dict().items()):
        return False
    with torch.no_grad():
        return torch.equal(output_of(fresh, case.inputs), output_of(model, case.inputs))


class L1Importance(UnitImportance):
    """Mean absolute value of the weights that make a unit."""

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor:
        """One number for each unit."""
        sums, entries = torch.zeros(group.units), 0
        for piece in group.slices:
            weight = model.get_parameter(piece.name).detach() if piece.role == "producer" else None
            if weight is None or weight.dim() < 2:
                continue
            along = weight.transpose(0, piece.dim).flatten(1).abs().sum(1)
            sums += along[piece.positions].sum(1)
            entries += weight.numel() // group.units
        return sums / max(entries, 1)


def examine(case: Case, sparsity: float) -> Row:
    """Shrink one architecture and check everything."""
    model = stir(case.build())
    with torch.no_grad():
        model.train()(**{name: torch.cat([value] * 2) for name, value in case.inputs.items()})
    model.eval()  # the pass above gave batch norms their statistics
    twin = copy.deepcopy(model)
    report = shrink(
        model, case.inputs, L1Importance(), sparsity=sparsity, target="channels", allocation="layer"
    )
    zero_units(twin, report.plan)
    with torch.no_grad():
        expected = output_of(twin, case.inputs)
        difference = float((output_of(model, case.inputs) - expected).abs().max())
    generate = same_tokens(model, twin, case.inputs) if case.generates else None
    return Row(
        case.name,
        parameters=(parameters_of(twin), parameters_of(model)),
        flops=(flops_of(twin, case.inputs), flops_of(model, case.inputs)),
        difference=difference,
        scale=float(expected.abs().max()),
        generate=generate,
        reload=comes_back(model, case),
        backward=all_get_gradients(model, case.inputs),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of an architecture's name")
    parser.add_argument("--sparsity", type=float, default=0.5)
    arguments = parser.parse_args()
    print(HEADER)
    for case in cases():
        if arguments.only.lower() in case.name.lower():
            print(examine(case, arguments.sparsity), flush=True)


if __name__ == "__main__":
    main()
