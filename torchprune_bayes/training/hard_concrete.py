"""Hard-concrete gates: a penalty on the expected number of nonzero weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_count, check_fraction, check_positive
from torchprune_bayes.errors import ArgumentError

_LOG_ALPHA_RANGE = (math.log(1e-2), math.log(1e2))  # from the published code
_SPREAD = 1e-2  # standard deviation of the initial `log_alpha`, from there too


class HardConcreteGate(nn.Module):
    """Multiplies units by random gates in [0, 1] that are 0 or 1 with positive probability.

    `Louizos, Welling and Kingma (2018) <https://arxiv.org/abs/1712.01312>`_, eq. 10 to 13, with
    uniform ``u``, location ``log α``, temperature ``β`` and the interval ``(γ, ζ)`` around [0, 1]:

    * in training ``s = σ((log u − log(1 − u) + log α)/β)``, ``z = clip(s(ζ − γ) + γ, 0, 1)``;
    * ``P(z ≠ 0) = σ(log α − β log(−γ/ζ))``, whose sum is :meth:`expected_l0`, to be added to the
      loss, times a factor;
    * in eval mode ``z = clip(σ(log α)(ζ − γ) + γ, 0, 1)``.

    Args:
        units: Number of gates.
        dim: Dimension of the input that the gates multiply; -1 for the last.
        repeat: Neighbouring entries along it that share a gate.
        weights_per_unit: How many weights a gate switches off, the weight of its probability.
        keep_probability: ``σ(log α)`` at the start.
        temperature: ``β``.
        stretch: ``(γ, ζ)``.
        per_sample: Whether every sample of a batch, the first dimension, has its own draw.

    Raises:
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If an argument has the wrong type.

    Example:
        >>> gate = HardConcreteGate(3, weights_per_unit=4)
        >>> with torch.no_grad():
        ...     _ = gate.log_alpha.copy_(torch.tensor([-9.0, 0.0, 9.0]))
        >>> gate.eval()(torch.ones(1, 3))
        tensor([[0.0000, 0.5000, 1.0000]], grad_fn=<MulBackward0>)
        >>> round(gate.expected_l0().item(), 2)  # of 12 weights
        7.33
    """

    def __init__(
        self,
        units: int,
        *,
        dim: int = 1,
        repeat: int = 1,
        weights_per_unit: float = 1.0,
        keep_probability: float = 0.5,
        temperature: float = 2.0 / 3.0,
        stretch: tuple[float, float] = (-0.1, 1.1),
        per_sample: bool = False,
    ) -> None:
        super().__init__()
        check_count("units", units)
        if dim != -1:
            check_count("dim", dim, minimum=1 if per_sample else 0)
        check_count("repeat", repeat)
        check_positive("weights_per_unit", weights_per_unit)
        check_positive("keep_probability", keep_probability)
        check_fraction("keep_probability", keep_probability, closed=False)
        check_positive("temperature", temperature)
        low, high = stretch
        if not low < 0.0 < 1.0 < high:
            raise ArgumentError(f"Expected `stretch` around [0, 1], got {stretch}.")
        self.dim, self.per_sample, self.stretch = dim, per_sample, (float(low), float(high))
        self.repeat = repeat
        self.temperature, self.weights_per_unit = float(temperature), float(weights_per_unit)
        location = math.log(keep_probability / (1.0 - keep_probability))
        self.log_alpha = nn.Parameter(location + _SPREAD * torch.randn(units))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` by the gates, random ones in training mode.

        Raises:
            ArgumentError: If ``x`` has another number of units.
        """
        units = self.log_alpha.numel()
        entries = units * self.repeat
        if x.ndim <= self.dim or x.shape[self.dim] != entries:
            raise ArgumentError(
                f"Expected {entries} units in dimension {self.dim}, got shape {tuple(x.shape)}."
            )
        shape = [1] * x.ndim
        shape[self.dim] = entries
        if not self.training:
            return x * self._repeated(self.expected_gate()).view(shape)
        rows = len(x) if self.per_sample else 1
        uniform = torch.rand(rows, units, dtype=self.log_alpha.dtype, device=self.log_alpha.device)
        shape[0] = rows if self.per_sample else shape[0]
        return x * self._repeated(self.gate_at(uniform)).view(shape)

    def gate_at(self, uniform: Tensor) -> Tensor:
        """Gates ``z`` for uniform numbers ``[..., units]`` in [0, 1)."""
        tiny = torch.finfo(uniform.dtype).eps
        noise = torch.logit(uniform, eps=tiny)
        return self._clipped(torch.sigmoid((noise + self.log_alpha) / self.temperature))

    def expected_gate(self) -> Tensor:
        """The gates of eval mode, ``[units]``; no longer random, and zero for closed units."""
        return self._clipped(torch.sigmoid(self.log_alpha))

    def open_probability(self) -> Tensor:
        """``P(z ≠ 0)``, ``[units]``."""
        low, high = self.stretch
        return torch.sigmoid(self.log_alpha - self.temperature * math.log(-low / high))

    def expected_l0(self) -> Tensor:
        """Expected number of weights that are not switched off, a differentiable scalar."""
        return self.weights_per_unit * self.open_probability().sum()

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep ``α`` in [0.01, 100]; call it after each ``optimizer.step()``, as published.

        A gate that is fully closed or open has no gradient and could never change again.
        """
        self.log_alpha.clamp_(*_LOG_ALPHA_RANGE)

    def extra_repr(self) -> str:
        """Extra text of the module's representation."""
        return f"{self.log_alpha.numel()}, dim={self.dim}, temperature={self.temperature:.3g}"

    def _repeated(self, gate: Tensor) -> Tensor:
        return gate if self.repeat == 1 else gate.repeat_interleave(self.repeat, dim=-1)

    def _clipped(self, s: Tensor) -> Tensor:
        low, high = self.stretch
        return (s * (high - low) + low).clamp(0.0, 1.0)


def expected_l0(model: nn.Module) -> Tensor:
    """Expected number of weights that the hard-concrete gates of a model leave on.

    Raises:
        ArgumentError: If the model has none.

    Example:
        >>> model = nn.Sequential(HardConcreteGate(8, weights_per_unit=4), nn.Linear(8, 4))
        >>> 0 < expected_l0(model).item() < 32
        True
    """
    gates = [module for module in model.modules() if isinstance(module, HardConcreteGate)]
    if not gates:
        raise ArgumentError(
            "Expected a model with HardConcreteGate modules, got one without: "
            "attach_l0_gates(model) inserts them."
        )
    return torch.stack([gate.expected_l0() for gate in gates]).sum()
