"""Models that pruning libraries were reported to cut wrongly: gates, unused branches, bfloat16."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, glu

from torchprune_bayes.structured import L1FilterImportance, shrink


class Gated(nn.Module):
    """Half of the channels multiply the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.pairs = nn.Conv2d(8, 12, 3, padding=1)
        self.last = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = glu(self.pairs(self.first(images).relu()), dim=1)
        return self.last(hidden.mean((2, 3)))


class Supervised(nn.Module):
    """A second head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.aside = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.more = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        hidden = self.body(images).relu()
        output = self.head(self.more(hidden).relu().mean((2, 3)))
        return (output, self.aside(hidden).mean((2, 3))) if self.training else (output,)


def test_channels_that_multiply_each_other_go_together_or_stay() -> None:
    torch.manual_seed(0)
    model, images = Gated().eval(), torch.randn(2, 3, 8, 8)
    report = shrink(model, images, L1FilterImportance(), sparsity=0.4, target="params")
    assert report.parameters.sparsity >= 0.4
    assert report.difference is not None
    assert report.difference < 1e-6
    assert model.pairs.out_channels == 2 * model.last.in_features
    assert model(images).shape == (2, 4)


def test_a_branch_that_only_training_runs_is_kept_compatible() -> None:
    torch.manual_seed(0)
    model, images = Supervised().eval(), torch.randn(2, 3, 8, 8)
    shrink(model, images, L1FilterImportance(), sparsity=0.3, target="params")
    outputs = model.train()(images)
    assert len(outputs) == 2
    losses = [cross_entropy(output, torch.tensor([0, 1])) for output in outputs]
    torch.stack(losses).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_auxiliary_classifier_of_googlenet_trains_after_the_cut() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.googlenet(aux_logits=True, init_weights=False).eval()
    shrink(model, torch.randn(1, 3, 64, 64), L1FilterImportance(), sparsity=0.2, target="params")
    outputs = model.train()(torch.randn(2, 3, 64, 64))
    assert outputs.aux_logits1.shape == outputs.logits.shape == (2, 1000)
    (outputs.logits.sum() + outputs.aux_logits1.sum() + outputs.aux_logits2.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_heads_of_cohere_go_whole_in_any_precision(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CohereConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.CohereForCausalLM(config).to(dtype).eval()
    whole, ids = copy.deepcopy(model), torch.randint(50, (2, 7))
    inputs = {"input_ids": ids, "use_cache": False}
    report = shrink(model, inputs, L1FilterImportance(), sparsity=0.4, target="channels")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features % attention.head_dim == 0
    assert report.difference is not None
    assert report.difference < 1e-4
    assert model(**inputs).logits.shape == whole(**inputs).logits.shape
