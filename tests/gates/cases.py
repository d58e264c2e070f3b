"""Small models of every family with gates, and ways to make their gates differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchprune_bayes.gates import Gates


class LeNet(nn.Module):
    """Convolutions, pooling and linear layers joined by functions, not by modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).tanh(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
        return self.fc3(self.fc2(self.fc1(x).tanh()).tanh())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def vgg() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def torchvision_resnet(name: str = "resnet18") -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, num_classes=3)


def timm_model(name: str, **options: object) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=3, **options)


def timm_vit() -> nn.Module:
    return timm_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3)


class Logits(nn.Module):
    """A Hugging Face model that takes one tensor and gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ViTConfig(**sizes, intermediate_size=20, image_size=32, patch_size=16)
    return Logits(ViTForImageClassification(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return Logits(
        BertForSequenceClassification(BertConfig(**sizes, intermediate_size=20, vocab_size=30))
    )


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(dim=24, n_layers=2, n_heads=3, hidden_dim=20, vocab_size=30)
    return Logits(DistilBertForSequenceClassification(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=30, n_positions=16, **special)
    return Logits(GPT2LMHeadModel(config))


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(1))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "mlp": (mlp, lambda: image(2, 6), "chain"),
    "lenet": (LeNet, lambda: image(2, 1, 14, 14), "chain"),
    "vgg": (vgg, lambda: image(2, 3, 8, 8), "chain"),
    "torchvision-resnet18": (torchvision_resnet, lambda: image(2, 3, 32, 32), "resnet"),
    "timm-resnet18": (lambda: timm_model("resnet18"), lambda: image(2, 3, 32, 32), "resnet"),
    "timm-vit": (timm_vit, lambda: image(2, 3, 32, 32), "timm-vit"),
    "hf-vit": (hf_vit, lambda: image(2, 3, 32, 32), "hf-vit"),
    "bert": (bert, tokens, "bert"),
    "distilbert": (distilbert, tokens, "distilbert"),
    "gpt2": (gpt2, tokens, "gpt2"),
}


def built(family: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode and its inputs; the same at every call."""
    build, inputs, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        scatter_norms(model)
    return model, inputs()


def scatter_norms(model: nn.Module) -> None:
    """Batch norms that do more than nothing: the last of a ResNet's blocks start with weight 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


@torch.no_grad()
def scatter(gates: Gates, *, closed: bool = True) -> None:
    """Give every gate its own posterior, and close about a third of them."""
    generator = torch.Generator().manual_seed(2)
    for gate in gates.values():
        gate.mu.uniform_(-2.0, 0.0, generator=generator)
        gate.log_sigma.uniform_(-4.0, 1.0, generator=generator)
        if closed:
            pruned = torch.rand(gate.units, generator=generator) < 0.3
            pruned[0], pruned[-1] = False, True
            gate.close(pruned)
