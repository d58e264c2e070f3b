"""Models of the real ``peft``: the base is pruned, under adapters that go on learning."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from tests.integrations.hf_cases import Sentences, arguments, classifier
from torchprune_bayes import (
    Calibration,
    GradualPruner,
    bake,
    masks_of,
    one_shot,
    prunable_parameters,
    prune_global,
)
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.integrations.hf import PruningCallback, merge_adapters
from torchprune_bayes.params import ParameterSpace

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # said to peft by transformers
)
BASE = [
    "attention.q_lin.base_layer",
    "attention.k_lin",
    "attention.v_lin.base_layer",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
]
HEAD = ["pre_classifier.modules_to_save.default", "classifier.modules_to_save.default"]


def adapted(**options: Any) -> nn.Module:
    """A classifier with LoRA in two of its layers, whose adapters are not at zero."""
    config = peft.LoraConfig(r=2, target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS", **options)
    model = peft.get_peft_model(classifier(), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def listed(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module, _ in prunable_parameters(model)]


def sentences() -> dict[str, Tensor]:
    ids = Sentences(8).ids
    return {"input_ids": ids, "labels": (ids[:, 0] > 16).long()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=Sentences(8).ids).logits
    return found


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["classifier"]}]
)
def test_the_base_is_listed_and_adapters_are_not(options: dict[str, Any]) -> None:
    layer = "base_model.model.distilbert.transformer.layer.0."
    head = [name for name in HEAD if options.get("modules_to_save") is None or "." in name]
    assert listed(adapted(**options)) == [
        *(f"{layer}{name}" for name in BASE),
        *(f"base_model.model.{name}" for name in head),
    ]


def test_of_other_kinds_of_adapters_too() -> None:
    plain = len(listed(classifier()))
    target = {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS"}
    sizes = {"token_dim": 16, "num_layers": 1, "num_attention_heads": 2, "encoder_hidden_size": 4}
    for config in (
        peft.IA3Config(**target, feedforward_modules=[]),
        peft.LoHaConfig(r=2, **target),
        peft.OFTConfig(r=2, oft_block_size=0, **target),
        peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2, **sizes),
    ):
        names = listed(peft.get_peft_model(classifier(), config))
        assert not any("prompt" in name or "original_module" in name for name in names)
        assert len(names) == plain


def test_conv1d_and_adapters_that_were_injected() -> None:
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    plain = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    model = peft.inject_adapter_in_model(config, plain)
    assert [name.rpartition("h.0.")[2] for name in listed(model)] == [
        "attn.c_attn.base_layer",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


def test_whoever_wants_adapters_pruned_lists_them() -> None:
    model = adapted()
    pairs = [(m, "weight") for n, m in model.named_modules() if n.endswith("lora_A.default")]
    prune_global(pairs, "magnitude", amount=0.5)
    assert [name.rpartition(".")[0][-14:] for name in masks_of(model)] == ["lora_A.default"] * 2


@pytest.mark.parametrize("method", ["magnitude", "woodfisher"])
@pytest.mark.parametrize("hooks", [True, False])
def test_merging_leaves_the_zeros(method: str, hooks: bool) -> None:
    model = adapted()
    options: dict[str, Any] = {}
    if method == "woodfisher":
        options = {"calibration": Calibration(model, [sentences()]), "damping": 1e-3}
    decision = prune_global(prunable_parameters(model), method, amount=0.6, **options)
    if not hooks:
        bake(model)
    space = ParameterSpace(model)
    before = {name.replace(".base_layer", ""): v.clone() for name, v in space.values().items()}
    layers = {name: module for name, module in model.named_modules() if "base_layer" not in name}
    deltas: dict[str, Tensor] = {
        f"{name}.weight": layer.get_delta_weight("default")
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
    }
    assert len(deltas) == 2
    merged = merge_adapters(model)
    found = dict(merged.named_parameters())
    for name, value in before.items():
        expected = value + deltas.get(name, torch.zeros(())) * (value != 0)
        place = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        torch.testing.assert_close(found[place].detach(), expected.detach())
    weights = [getattr(*pair) for pair in prunable_parameters(merged.requires_grad_(True))]
    kept = sum(int(mask.sum()) for mask in decision.masks.values())
    assert sum(int(weight.count_nonzero()) for weight in weights) == kept
    assert not any("lora" in name or name.endswith("_orig") for name in found)


def test_masks_go_by_the_names_of_the_merged_model() -> None:
    name = "distilbert.transformer.layer.0.attention.q_lin.weight"
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    merged = merge_adapters(adapted(), {name: mask})
    assert torch.equal(merged.get_parameter(name) != 0, mask)
    model = adapted()
    before = deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=r"shape \(16, 16\)"):
        merge_adapters(model, {name: mask[0]})
    model.merge_adapter()  # type: ignore[operator]
    with pytest.raises(ArgumentError, match="unmerge first"):
        merge_adapters(model, {name: mask})
    model.unmerge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(dict(before), dict(model.state_dict()))


@pytest.mark.parametrize("mode", ["zeros", "hooks"])
def test_adapters_learn_around_a_base_that_is_pruned(mode: str) -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    pruner = GradualPruner(model, "magnitude", one_shot(0.5, at=2), optimizer=optimizer, mode=mode)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    for _ in range(4):
        before = [p.detach().clone() for p in adapters]
        optimizer.zero_grad()
        model(**sentences()).loss.backward()
        optimizer.step()
        pruner.step()
        assert not any(map(torch.equal, before, adapters))
    zeros = sum(int((v == 0).sum()) for v in ParameterSpace(model).values().values())
    assert zeros == round(0.5 * pruner.space.numel)


# Up to 0.20 peft looks for a model without a name on the Hub.
@pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning")
def test_a_trainer_prunes_the_base(tmp_path: Path) -> None:
    model = adapted()
    callback = PruningCallback("magnitude", one_shot(0.5, at=2))
    run = Trainer(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=4),
        train_dataset=Sentences(),
        callbacks=[callback],
    )
    run.train()
    assert callback.sparsity == pytest.approx(0.5, abs=1e-3)
    again = Trainer(
        adapted(),
        arguments(tmp_path),
        train_dataset=Sentences(),
        callbacks=[PruningCallback("magnitude", one_shot(0.5, at=2))],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(logits(again.model), logits(model), rtol=0, atol=0)
    other = adapted()
    with torch.no_grad():
        prunable_parameters(other)[0][0].get_parameter("weight").add_(1.0)
    foreign = Trainer(
        other,
        arguments(tmp_path),
        train_dataset=Sentences(),
        callbacks=[PruningCallback("magnitude", one_shot(0.5, at=2))],
    )
    with pytest.raises(AlignmentError, match="a checkpoint of adapters does not hold them"):
        foreign.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
