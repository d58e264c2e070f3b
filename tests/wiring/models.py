"""Tiny networks, one for each way in which entries can be wired; inputs ``[2, ...]``.

Each entry of ``WIRED`` gives the model, its input, and for each group that must be found the number
of units and of entries that a unit owns in the layer that makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Wired:
    """A network and what must be found in it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, tuple[int, int]]


class Attention(nn.Module):
    """Heads known by a view alone; fused, separate or shared projections."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.e, self.f = nn.Linear(6, 24), nn.Linear(24, 3)
        kv = 8 if form == "shared" else 24
        if form in ("blocks", "interleaved"):
            self.qkv = nn.Linear(24, 72)
        else:
            self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, kv), nn.Linear(24, kv)
        if form == "normed":
            self.norm = nn.RMSNorm(4)
        self.o = nn.Linear(24, 24)
        self.after = nn.LayerNorm(24)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        if self.form == "blocks":
            return self.qkv(x).reshape(b, t, 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "interleaved":
            return self.qkv(x).view(b, t, -1, 12).transpose(1, 2).chunk(3, dim=-1)
        q, k, v = (layer(x).view(b, t, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.form == "shared":
            k, v = (y.repeat_interleave(3, dim=1) for y in (k, v))
        if self.form == "normed":
            q, k = self.norm(q), self.norm(k)
        if self.form == "rotary":
            angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
            q, k = (y * angle.cos() + y.roll(2, -1) * angle.sin() for y in (q, k))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        q, k, v = self.heads(x)
        if self.form == "written out":
            scores = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
            y = torch.einsum("bhij,bhjd->bihd", scores, v).flatten(2)
        else:
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.f(self.after(x + self.o(y)))


class Channelwise(nn.Module):
    """Attention between the channels of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 72), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, -1, 4).permute(2, 0, 3, 4, 1)
        scores = torch.softmax(
            functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT, -1
        )
        return self.o((scores @ v).permute(0, 3, 1, 2).flatten(2))


class C2f(nn.Module):
    """A block of YOLOv8: a layer is cut in halves, one of which goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1)
        self.n, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.a(x).chunk(2, 1))
        y.append(self.m(y[-1]))
        y.append(self.n(y[-1]))
        return self.b(torch.cat(y, 1))


class Shuffled(nn.Module):
    """Channels of two groups take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        n, c, h, w = y.shape
        return self.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Maxout(nn.Module):
    """The largest of two neighbours goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).unflatten(-1, (-1, 2)).amax(-1))


class Aside(nn.Module):
    """A head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.aside = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = torch.relu(self.a(x))
        return (self.b(y), self.aside(y)) if self.training else self.b(y)


class Asked(Aside):
    """A head that runs only if asked for."""

    def forward(self, x: Tensor, ask: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        y = torch.relu(self.a(x))
        return (self.b(y), self.aside(y)) if ask else self.b(y)


class Experts(nn.Module):
    """Rows of several matrices in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 5))
        self.down = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for number in range(3):
            gate, up = functional.linear(x, self.up[number]).chunk(2, dim=-1)
            made.append(functional.linear(functional.silu(gate) * up, self.down[number]))
        return torch.stack(made).sum(0)


class Scaled(nn.Module):
    """A buffer of one number for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)) * self.scale)))


class Standardized(nn.Conv2d):
    """Weights with the mean over their inputs taken away."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Recurrent(nn.Module):
    """A recurrent layer between two others."""

    def __init__(self, layer: Callable[[], nn.Module] | None = None, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(width, 3)
        self.g = layer() if layer else nn.GRU(16, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.g(torch.relu(self.a(x)))[0])


class Transformed(nn.Module):
    """Units go through an operation that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 6)
        self.c = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.fft.fft(self.a(x)).real)))


def _chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


SPACE, TOKENS, ROW = (2, 3, 8, 8), (2, 5, 6), (2, 5)
HEADS = (6, 4)
WIRED = {
    "heads in blocks": Wired(lambda: Attention("blocks"), TOKENS, {"qkv": (6, 12)}),
    "heads interleaved": Wired(lambda: Attention("interleaved"), TOKENS, {"qkv": (6, 12)}),
    "heads apart": Wired(lambda: Attention("apart"), TOKENS, {"q": HEADS}),
    "heads that share keys": Wired(lambda: Attention("shared"), TOKENS, {"q": (2, 12)}),
    "heads with norms": Wired(lambda: Attention("normed"), TOKENS, {"q": HEADS}),
    "heads with positions": Wired(lambda: Attention("rotary"), TOKENS, {"q": HEADS}),
    "heads written out": Wired(lambda: Attention("written out"), TOKENS, {"q": HEADS}),
    "heads over channels": Wired(Channelwise, TOKENS, {"qkv": (6, 12)}),
    "chunks": Wired(C2f, SPACE, {"a": (8, 2), "m": (8, 1), "n": (8, 1)}),
    "shuffles": Wired(Shuffled, SPACE, {"a": (4, 2)}),
    "maxout": Wired(Maxout, ROW, {"a": (4, 2)}),
    "gated halves": Wired(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.GLU(), nn.Linear(4, 3)), ROW, {"0": (4, 2)}
    ),
    "pixel shuffle": Wired(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)),
        SPACE,
        {"0": (4, 4)},
    ),
    "grouped convolutions": Wired(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
        ),
        SPACE,
        {"0": (3, 2), "1": (4, 2)},
    ),
    "transposed groups": Wired(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, groups=2), nn.Conv2d(8, 2, 1)
        ),
        SPACE,
        {"0": (3, 2), "1": (4, 1)},
    ),
    "norms over neighbours": Wired(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.LocalResponseNorm(2), nn.Conv2d(6, 2, 1)),
        SPACE,
        {},
    ),
    "group norms without parameters": Wired(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6, affine=False), nn.Conv2d(6, 2, 1)
        ),
        SPACE,
        {"0": (3, 2)},
    ),
    "aside in training": Wired(Aside, ROW, {"a": (8, 1)}),
    "aside if asked": Wired(Asked, ROW, {}),
    "experts": Wired(Experts, ROW, {"": (5, 2)}),
    "a buffer for each": Wired(Scaled, ROW, {"a": (8, 1), "b": (6, 1)}),
    "standardized weights": Wired(
        lambda: nn.Sequential(
            Standardized(3, 6, 1), nn.ReLU(), Standardized(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
        ),
        SPACE,
        {"2": (4, 1)},
    ),
    "an unknown operation": Wired(Transformed, ROW, {"b": (6, 1)}),
    "both directions": Wired(Recurrent, TOKENS, {"a": (16, 1), "g": (8, 3)}),
    "long memory": Wired(
        lambda: Recurrent(lambda: nn.LSTM(16, 8, 2, batch_first=True), 8),
        TOKENS,
        {"a": (16, 1), "g": (8, 4)},
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with weights off their start, and an input; the global generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wired = WIRED[name]
        model = wired.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval(), torch.randn(wired.shape)
