"""A multiplicative noise gate over the units of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_count
from torchprune_bayes._numerics.log_normal import (
    HIGH,
    LOG_SIGMA_HIGH,
    LOG_SIGMA_LOW,
    LOW,
    TruncatedLogNormal,
)
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes.errors import ArgumentError

NOISES = ("example", "batch", "element", "none")


class NoiseGate(nn.Module):
    """Multiply each unit by its own θ: a draw while training, E[θ] otherwise, zero once closed.

    θ has a log-uniform prior and a truncated log-normal posterior (Neklyudov et al. 2017,
    arXiv:1705.07283), whose computations are in float64 whatever the parameters' dtype.

    Args:
        units: Number of gates.
        repeat: Neighbouring entries that share a gate, such as the features of an attention head.
        dim: Dimension of the activations that holds the ``units * repeat`` entries.
        noise: What gets a draw of its own: every ``"example"`` along the first dimension, the whole
            ``"batch"``, every ``"element"`` of the activations (as in the code released with
            arXiv:2406.01345), or nothing (``"none"``: E[θ] while training too).
        low: Lower bound of log θ.
        high: Upper bound of log θ.
        mu: First location of log θ.
        log_sigma: First logarithm of its scale.

    Raises:
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If a count is no int.

    Cost: a pass over the activations; while training also a draw for each example and unit.

    Example:
        >>> gate = NoiseGate(3, dim=1).eval()
        >>> gate.close(torch.tensor([False, True, False]))
        1
        >>> gate(torch.ones(1, 3, 1, 1)).flatten()
        tensor([0.9946, 0.0000, 0.9946], grad_fn=<ViewBackward0>)
    """

    mask: Tensor

    def __init__(
        self,
        units: int,
        *,
        repeat: int = 1,
        dim: int = -1,
        noise: str = "example",
        low: float = LOW,
        high: float = HIGH,
        mu: float = 0.0,
        log_sigma: float = -5.0,
    ) -> None:
        super().__init__()
        check_count("units", units)
        check_count("repeat", repeat)
        check_choice("noise", noise, NOISES)
        if not low <= mu <= high or low == high:
            raise ArgumentError(
                f"Expected `low` < `high` with `mu` between them, got {low}, {high} and {mu}."
            )
        self.units, self.repeat, self.dim, self.noise = units, repeat, dim, noise
        self.low, self.high = float(low), float(high)
        self.mu = nn.Parameter(torch.full((units,), float(mu)))
        self.log_sigma = nn.Parameter(torch.full((units,), float(log_sigma)))
        self.register_buffer("mask", torch.ones(units, dtype=torch.bool))

    @property
    def posterior(self) -> TruncatedLogNormal:
        """The posteriors of all gates, closed ones included."""
        return TruncatedLogNormal(self.mu, self.log_sigma, self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the activations; they keep their shape and dtype."""
        place = self.dim % x.ndim
        if x.shape[place] != self.units * self.repeat:
            raise ArgumentError(
                f"Expected {self.units * self.repeat} entries along dimension {self.dim}, got "
                f"activations of shape {tuple(x.shape)}."
            )
        return x * _like(self._theta(x, place), x)

    def kl(self) -> Tensor:
        """KL divergence from the prior for each gate, float64 ``[units]``; zero where closed."""
        kl = self.posterior.kl()
        return kl * self.mask.to(kl.device)

    def scale(self) -> Tensor:
        """What an entry is multiplied by when not training, float64 ``[units * repeat]``."""
        mean = self.posterior.mean()
        return (mean * self.mask.to(mean.device)).repeat_interleave(self.repeat)

    @torch.no_grad()
    def close(self, closed: Tensor, *, regrow: bool = False) -> int:
        """Close gates.

        Args:
            closed: Boolean ``[units]``, ``True`` where the gate closes.
            regrow: Whether closed gates that are not in ``closed`` reopen.

        Returns:
            How many gates are closed now.
        """
        if closed.shape != self.mask.shape or closed.dtype != torch.bool:
            raise ArgumentError(
                f"Expected a boolean tensor of shape {tuple(self.mask.shape)} for `closed`, got "
                f"{closed.dtype} of shape {tuple(closed.shape)}."
            )
        stays_open = ~closed.to(self.mask.device)
        self.mask.copy_(stays_open if regrow else self.mask & stays_open)
        return int((~self.mask).sum())

    @torch.no_grad()
    def project_(self) -> None:
        """Move μ and log σ back into the bounds in which everything is finite.

        Clamping them in the forward pass instead would leave those beyond the bounds, μ starting
        at one, without gradients.
        """
        self.mu.clamp_(self.low, self.high)
        self.log_sigma.clamp_(LOG_SIGMA_LOW, LOG_SIGMA_HIGH)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.units}, repeat={self.repeat}, dim={self.dim}, noise={self.noise!r}"

    def _theta(self, x: Tensor, place: int) -> Tensor:
        sizes = [1] * x.ndim
        sizes[place] = self.units * self.repeat
        if not self.training or self.noise == "none":
            return self.scale().view(sizes)
        if self.noise == "element":
            return self._theta_of_elements(x, place)
        if self.noise == "example" and place > 0:
            sizes[0] = x.shape[0]
        draws = self._draw((sizes[0] if place else 1, self.units))
        draws = draws * self.mask.to(draws.device)
        return draws.repeat_interleave(self.repeat, dim=-1).view(sizes)

    def _theta_of_elements(self, x: Tensor, place: int) -> Tensor:
        last = x.movedim(place, -1).shape
        draws = self._draw((*last[:-1], self.repeat, self.units))
        draws = draws * self.mask.to(draws.device)
        return draws.transpose(-1, -2).reshape(last).movedim(-1, place)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        device = float64_device(self.mu.device)
        uniform = torch.rand(shape, dtype=torch.float64, device=device)
        return self.posterior.sample(uniform)


def _like(scale: Tensor, x: Tensor) -> Tensor:
    """In the dtype of the activations before it goes to their device, which may lack float64."""
    return scale.to(x.dtype).to(x.device)
