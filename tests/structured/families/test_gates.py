"""A model that runs is not yet right: the shrunk model equals the dense one with zeroed units.

For every family: forward, backward in training mode, generation with and without a cache, and the
way through a folder, in this process and in a fresh one.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.structured.families.models import (
    FAMILY_MODELS,
    GENERATORS,
    build,
    inputs_of,
    output_of,
)
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.structured.families import family_of
from torchprune_bayes.structured.families.config import fit_config
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.saving import load_shrunk, save_shrunk
from torchprune_bayes.structured.slicing import apply_plan, plan_of


def groups_of(model: nn.Module) -> list[UnitGroup]:
    family = family_of(model)
    assert family is not None
    return family.groups(model)


def half(groups: list[UnitGroup], *, uniform: bool = False) -> dict[str, Tensor]:
    """Keep about half of the units, a different number in each group unless ``uniform``."""
    generator = torch.Generator().manual_seed(2)
    kept = {}
    for number, group in enumerate(groups):
        left = max(1, group.units // 2 + (0 if uniform else number % 3 - 1))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:left].sort().values
    return kept


def zeroed(model: nn.Module, groups: list[UnitGroup], kept: dict[str, Tensor]) -> nn.Module:
    """The slow twin: a copy in which all that belongs to a removed unit is set to zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            gone = sorted(set(range(group.units)) - set(kept[group.name].tolist()))
            for piece in group.slices:
                at = piece.positions[gone].flatten()
                twin.get_parameter(piece.name).index_fill_(piece.dim, at, 0.0)
    return twin


def shrunk_pair(name: str, *, uniform: bool = False) -> tuple[nn.Module, nn.Module]:
    """A shrunk model, and its dense twin with zeros."""
    model = build(name)
    groups = groups_of(model)
    kept = half(groups, uniform=uniform)
    twin = zeroed(model, groups, kept)
    apply_plan(model, plan_of(model, groups, kept))
    return model, twin


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_shrunk_equals_the_dense_model_with_zeroed_units(name: str) -> None:
    original = build(name)
    model, twin = shrunk_pair(name)
    with torch.no_grad():
        expected, dense = output_of(twin, inputs_of(name)), output_of(original, inputs_of(name))
        torch.testing.assert_close(output_of(model, inputs_of(name)), expected, rtol=0, atol=1e-5)
    assert (expected - dense).abs().max() > 1e-2  # the cut did something
    assert parameters(model) < parameters(original)


@pytest.mark.parametrize("name", [name for name in FAMILY_MODELS if name != "gpt2-upcast"])
def test_difference_in_float64_is_rounding(name: str) -> None:
    model, twin = shrunk_pair(name)
    inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in inputs_of(name).items()
    }
    with torch.no_grad():
        difference = output_of(model.double(), inputs) - output_of(twin.double(), inputs)
    assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_gradients_are_those_of_the_twin(name: str) -> None:
    model, twin = shrunk_pair(name)
    model.train()
    twin.train()
    for each in (model, twin):
        output_of(each, inputs_of(name)).square().sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    for (key, value), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if value.shape == other.shape:
            assert value.grad is not None
            assert other.grad is not None
            scale = float(other.grad.abs().max())
            torch.testing.assert_close(
                value.grad, other.grad, rtol=0, atol=1e-4 * max(scale, 1.0), msg=key
            )


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_shrinking_twice_works(name: str) -> None:
    model, _ = shrunk_pair(name)
    groups = groups_of(model)
    kept = {group.name: torch.arange(1) for group in groups}
    twin = zeroed(model, groups, kept)
    apply_plan(model, plan_of(model, groups, kept))
    with torch.no_grad():
        expected = output_of(twin, inputs_of(name))
        torch.testing.assert_close(output_of(model, inputs_of(name)), expected, rtol=0, atol=1e-5)
    assert {group.units for group in groups_of(model)} == {1}


@pytest.mark.parametrize(
    "cache", [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("name", GENERATORS)
def test_generates_the_tokens_of_its_twin(name: str, cache: dict[str, object]) -> None:
    model, twin = shrunk_pair(name)
    inputs = {key: value.flip(1) for key, value in inputs_of(name).items()}  # padding on the left
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**inputs, **settings, **cache)  # type: ignore[operator]
    expected = twin.generate(**inputs, **settings, use_cache=True)  # type: ignore[operator]
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_comes_back_from_a_folder(name: str, tmp_path: Path) -> None:
    model, _ = shrunk_pair(name)
    save_shrunk(model, tmp_path)
    fresh = load_shrunk(FAMILY_MODELS[name]().eval(), tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor)
    with torch.no_grad():
        assert torch.equal(output_of(fresh, inputs_of(name)), output_of(model, inputs_of(name)))
    output_of(fresh.train(), inputs_of(name)).sum().backward()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, _ = shrunk_pair("gpt2-lm")
    save_shrunk(model, tmp_path)
    fresh = load_shrunk(FAMILY_MODELS["gpt2-lm"](), tmp_path)
    for each in (model, fresh):
        assert each.lm_head.weight is each.transformer.wte.weight  # type: ignore[union-attr]


FRESH_PROCESS = """
import sys, torch, transformers
from torchprune_bayes.structured.saving import load_shrunk
folder = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(folder)
model = load_shrunk(transformers.AutoModelForCausalLM.from_config(config).eval(), folder)
tokens = torch.arange(1, 8)[None]
torch.set_num_threads(1)
torch.save(model.state_dict(), folder + "/state.pt")
torch.save(model(tokens).logits.detach(), folder + "/logits.pt")
torch.save(model.generate(tokens, max_new_tokens=5, do_sample=False), folder + "/tokens.pt")
"""


def test_reloads_in_a_fresh_process_next_to_save_pretrained(tmp_path: Path) -> None:
    model, _ = shrunk_pair("gpt2-lm")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    config = model.config.to_dict()  # type: ignore[union-attr,operator]
    save_shrunk(model, tmp_path)
    assert {"config.json", "model.safetensors", "shrunk.json", "shrunk.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert model.config.to_dict() == config  # type: ignore[union-attr,operator]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], check=True)
    tokens = torch.arange(1, 8)[None]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(tokens).logits)
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), expected)


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "hf-vit"])
def test_config_that_can_say_it_makes_from_pretrained_work(name: str, tmp_path: Path) -> None:
    model, _ = shrunk_pair(name, uniform=True)
    edits = fit_config(model)
    assert set(edits) >= {"num_attention_heads", "head_dim", "intermediate_size"}
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(output_of(again, inputs_of(name)), output_of(model, inputs_of(name)))
    save_shrunk(model, tmp_path)
    fresh = load_shrunk(type(model)(type(model.config).from_pretrained(tmp_path)).eval(), tmp_path)  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(output_of(fresh, inputs_of(name)), output_of(model, inputs_of(name)))


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("gpt2-lm", "n_inner"),
        ("bert", "intermediate_size"),
        ("roberta", "intermediate_size"),
        ("distilbert", "hidden_dim"),
    ],
)
def test_config_of_other_families_takes_hidden_units_only(
    name: str, entry: str, tmp_path: Path
) -> None:
    model = build(name)
    groups = [group for group in groups_of(model) if group.kind == "hidden"]
    apply_plan(model, plan_of(model, groups, half(groups, uniform=True)))
    assert fit_config(model) == {entry: groups[0].units // 2}
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(output_of(again, inputs_of(name)), output_of(model, inputs_of(name)))


@pytest.mark.parametrize("name", ["gpt2-lm", "bert", "distilbert"])
def test_config_that_cannot_say_it_is_left_alone(name: str) -> None:
    model, _ = shrunk_pair(name, uniform=True)
    before = copy.deepcopy(model.config.to_dict())  # type: ignore[union-attr,operator]
    assert fit_config(model) == {}
    assert model.config.to_dict() == before  # type: ignore[union-attr,operator]


def test_uneven_blocks_leave_the_config_alone() -> None:
    model, _ = shrunk_pair("llama-mha")
    assert fit_config(model) == {}


def test_config_of_no_hugging_face_model_is_refused() -> None:
    for model in (build("timm-vit"), nn.Linear(2, 2)):
        with pytest.raises(ArgumentTypeError, match="with a config"):
            fit_config(model)


def test_config_of_an_unserved_model_is_refused() -> None:
    config = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=10)
    with pytest.raises(ArgumentTypeError, match="with a config"):
        fit_config(transformers.T5ForConditionalGeneration(config))
