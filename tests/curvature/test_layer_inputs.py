"""Second moments of layers' inputs: every kind of layer, padding, repeated and unreached layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.curvature.layer_inputs import LayerInputs
from torchprune_bayes.curvature.layers.inputs import matrix_of, weight_of
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.memory import MemoryBudget


def inputs_of(model, data, params=None, **options) -> LayerInputs:
    params = prunable_parameters(model) if params is None else params
    samples = sum(len(next(iter(b.values())) if isinstance(b, dict) else b[0]) for b in data)
    loss = None if isinstance(data[0], dict) else nn.functional.cross_entropy
    calibration = Calibration(model, data, loss, params=params, num_samples=samples)
    return LayerInputs(calibration, **options)


def seen_by(model, module, batches) -> torch.Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch[0])
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def gpt2() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    ids = torch.randint(20, (6, 8))
    return GPT2LMHeadModel(config).eval(), [{"input_ids": b, "labels": b} for b in ids.split(4)]


def bert(*, pad: bool) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    ids, mask = torch.randint(1, 20, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    if pad:
        mask[1, 4:] = 0
        mask[3, 2:] = 0
    labels = torch.tensor([0, 1, 0, 1])
    data = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    return BertForSequenceClassification(config).eval(), data


def test_all_tokens_of_all_samples_count():
    model, data = gpt2()
    moments = inputs_of(model, data).moments()
    layer = model.transformer.h[1].mlp.c_proj
    rows = seen_by(model, layer, data).double()
    moment = moments["transformer.h.1.mlp.c_proj.weight"]
    assert moment.tokens == 48
    torch.testing.assert_close(moment.mean[0].double(), rows.mT @ rows / 48, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ignore", [True, False])
def test_padding_is_left_out(ignore):
    model, data = bert(pad=True)
    moments = inputs_of(model, data, ignore_padding=ignore).moments()
    layer = model.bert.encoder.layer[0].intermediate.dense
    rows = seen_by(model, layer, data).double()
    rows = rows[data[0]["attention_mask"].flatten() != 0] if ignore else rows
    moment = moments["bert.encoder.layer.0.intermediate.dense.weight"]
    assert moment.tokens == len(rows) == (18 if ignore else 24)
    torch.testing.assert_close(
        moment.mean[0].double(), rows.mT @ rows / len(rows), atol=1e-6, rtol=1e-5
    )
    assert moments["classifier.weight"].tokens == 4


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    config = BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=8,
    )
    return BartForConditionalGeneration(config)


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("masked", [True, False])
def test_encoder_and_decoder_have_padding_of_their_own(build, masked):
    """Sequences of one length, so that shapes do not tell them apart."""
    torch.manual_seed(0)
    model, source, target = build().eval(), torch.ones(4, 6).long(), torch.ones(4, 6).long()
    source[1, 4:] = 0
    target[:2, 5:], target[3, 2:] = 0, 0
    ids = torch.randint(3, 20, (2, 4, 6))
    batch = {"input_ids": ids[0], "attention_mask": source, "labels": ids[1]}
    if masked:
        batch["decoder_attention_mask"] = target
    else:
        target = torch.ones_like(target)
    params = prunable_parameters(model, exclude=["lm_head"])
    for name, moment in inputs_of(model, [batch], params).moments().items():
        parts = set(name.split("."))
        reads = parts & {"encoder_attn", "EncDecAttention"} and parts & {
            "k",
            "v",
            "k_proj",
            "v_proj",
        }
        real = source if "encoder" in parts or reads else target
        seen = []
        layer = model.get_submodule(name.removesuffix(".weight"))
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        rows = seen[0][real != 0].double()
        assert moment.tokens == len(rows), name
        torch.testing.assert_close(
            moment.mean[0].double(), rows.mT @ rows / len(rows), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_see_patches(groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(24, 2))
    x = torch.randn(5, 4, 4, 4)
    moment = inputs_of(model, [(x, torch.zeros(5).long())]).moments()["0.weight"]
    patches = unfold(x, 3, padding=1, stride=2).unflatten(1, (groups, -1))
    expected = torch.einsum("bgip,bgjp->gij", patches, patches) / 20
    torch.testing.assert_close(moment.mean, expected)
    rows = matrix_of(conv, conv.weight)
    assert torch.equal(weight_of(conv, rows, conv.weight), conv.weight)


class Twice(nn.Module):
    """One layer at two places, with other numbers of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.shared(x)
        return self.last(self.shared(x[:, None].expand(-1, 2, -1)).sum(1))


def test_a_layer_that_is_called_twice_adds_up():
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(5, 3)
    inputs = inputs_of(model, [(x, torch.zeros(5).long())])
    rows = seen_by(model, model.shared, [(x,)])
    assert len(rows) == 15
    moment = inputs.moments()["shared.weight"]
    torch.testing.assert_close(moment.mean[0], rows.mT @ rows / 15)
    order = []
    inputs.update(lambda name, m: order.append((name, m.tokens)))
    assert order == [("shared.weight", 15), ("last.weight", 5)]


class Experts(nn.Module):
    """A mixture whose second expert sees samples with a positive first entry, the third none."""

    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(inputs, 2) for _ in range(3))

    def forward(self, x):
        second = x[:, 0] > 0
        out = x.new_zeros(len(x), 2)
        for index, chosen in enumerate((~second, second)):
            if chosen.any():
                out[chosen] = self.experts[index](x[chosen])
        return out


def test_experts_see_their_tokens_alone():
    x = torch.tensor([[-1.0, 0, 0], [1.0, 2, 0], [3.0, 0, 1]])
    inputs = inputs_of(Experts(), [(x, torch.zeros(3).long())])
    moments = inputs.moments()
    assert [moment.tokens for moment in moments.values()] == [1, 2, 0]
    assert moments["experts.2.weight"].mean.isfinite().all()
    seen = {}
    inputs.update(lambda name, moment: seen.update({name: moment.tokens}))
    assert list(seen.values()) == [1, 2, 0]


@pytest.mark.parametrize("whole", [True, False])
def test_later_layers_see_what_the_updates_before_give(whole):
    model, data = gpt2()
    inputs = inputs_of(model, data)
    if not whole:
        inputs.calibration.memory = MemoryBudget(1)
    halved = inputs.update(lambda name, moment: 0.5 * inputs.calibration.space.values()[name])
    torch.testing.assert_close(halved, {n: 0.5 * v for n, v in _weights(model).items()})
    found = {}
    inputs.update(lambda name, moment: (found.update({name: moment}), halved[name])[1])
    with torch.no_grad():
        for name, value in halved.items():
            model.get_parameter(name).copy_(value)
    expected = inputs_of(model, data).moments()
    for name, moment in found.items():
        assert moment.tokens == expected[name].tokens == 48
        torch.testing.assert_close(moment.mean, expected[name].mean, atol=1e-6, rtol=1e-4)


def _weights(model):
    return {
        name: p.detach() for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name
    }


def test_the_model_stays_as_it_is():
    model, data = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs_of(model, data).update(lambda name, moment: torch.zeros(()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_inputs_that_are_not_finite_are_refused():
    x = torch.full((4, 3), torch.nan)
    inputs = inputs_of(nn.Linear(3, 2), [(x, torch.zeros(4).long())])
    with pytest.raises(CalibrationError, match="finite inputs of the layer of `weight`"):
        inputs.moments()
