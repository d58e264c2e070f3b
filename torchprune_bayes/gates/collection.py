"""All gates of a model, and operations on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.log_normal import TruncatedLogNormal
from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.gates.criteria import Criterion, choose_closed, find_criterion
from torchprune_bayes.gates.noise_gate import NoiseGate
from torchprune_bayes.gates.scaling import unit_norms
from torchprune_bayes.gates.site import Site


class Gates(Mapping[str, NoiseGate]):
    """The gates of a model by site.

    Args:
        model: The model that contains them.
        gates: The gates by name of their site.
        sites: The sites by the same names.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> gates = attach_gates(model)
        >>> gates.prune("snr"), gates.closed, gates.units  # nothing is learnt yet
        (0, 0, 3)
    """

    def __init__(
        self, model: nn.Module, gates: Mapping[str, NoiseGate], sites: Mapping[str, Site]
    ) -> None:
        self.model = model
        self._gates = dict(gates)
        self.sites = dict(sites)

    def __getitem__(self, name: str) -> NoiseGate:
        return self._gates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gates)

    def __len__(self) -> int:
        return len(self._gates)

    def __repr__(self) -> str:
        listed = [f"{name}: {site.units} {site.kind}" for name, site in self.sites.items()]
        return f"Gates({', '.join(listed)})"

    @property
    def units(self) -> int:
        """Number of gates, open or not."""
        return sum(gate.units for gate in self.values())

    @property
    def closed(self) -> int:
        """Number of closed gates."""
        return self.units - sum(int(gate.mask.sum()) for gate in self.values())

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by site, ``True`` where the gate is open; the gates' own buffers."""
        return {name: gate.mask for name, gate in self.items()}

    def parameters(self) -> list[nn.Parameter]:
        """μ and log σ of all gates."""
        return [parameter for gate in self.values() for parameter in gate.parameters()]

    def kl(self) -> Tensor:
        """Sum of the KL divergences of all open gates, a float64 scalar."""
        return self._weighted_kl([1.0] * len(self))

    def mean_kl(self) -> Tensor:
        """Mean over sites of the mean over units, weighted as in the code of arXiv:2406.01345."""
        return self._weighted_kl([1.0 / (len(self) * gate.units) for gate in self.values()])

    def _weighted_kl(self, weights: list[float]) -> Tensor:
        # All gates of the same bounds in one vector: each would cost a few dozen small operations.
        device = float64_device(next(iter(self.values())).mu.device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for low, high in dict.fromkeys((gate.low, gate.high) for gate in self.values()):
            pairs = zip(self.values(), weights, strict=True)
            alike = [(gate, w) for gate, w in pairs if (gate.low, gate.high) == (low, high)]
            mu, log_sigma, share = (
                torch.cat([wide(part).to(device) for part in parts])
                for parts in (
                    [gate.mu for gate, _ in alike],
                    [gate.log_sigma for gate, _ in alike],
                    [gate.mask * weight for gate, weight in alike],
                )
            )
            total = total + (TruncatedLogNormal(mu, log_sigma, low, high).kl() * share).sum()
        return total

    @torch.no_grad()
    def margins(self, criterion: Criterion | str = "bmrs-n") -> dict[str, Tensor]:
        """Margins in favour of closing by site, see :class:`Criterion`; float64 ``[units]``."""
        rule = find_criterion(criterion)
        return {
            name: rule.margin(gate.posterior, lambda name=name: self.weight_norms(name))  # type: ignore[misc]
            for name, gate in self.items()
        }

    def weight_norms(self, name: str) -> Tensor:
        """L2 norms of the weights that produce a site's units, or read them if unknown."""
        site = self.sites[name]
        if site.producer is not None:
            return unit_norms(self.model.get_submodule(site.producer), "out", site.repeat)
        return unit_norms(self.model.get_submodule(site.module), site.side, site.repeat)

    def prune(
        self,
        criterion: Criterion | str = "bmrs-n",
        *,
        amount: float | int | None = None,
        beyond: bool = False,
        keep: int = 1,
        regrow: bool = False,
    ) -> int:
        """Close gates; see :func:`~torchprune_bayes.gates.choose_closed` for the arguments.

        Args:
            criterion: A criterion or its name.
            amount: At most this fraction or number of the open gates.
            beyond: Close ``amount`` even where the criterion is against it.
            keep: Gates that stay open at each site.
            regrow: Decide on all gates again, so that closed ones may reopen.

        Returns:
            How many gates have been closed; negative if more have reopened.
        """
        before = self.closed
        masks = self.masks
        if regrow:
            masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
        chosen = choose_closed(
            self.margins(criterion), masks, amount=amount, beyond=beyond, keep=keep
        )
        for name, closed in chosen.items():
            self[name].close(closed, regrow=regrow)
        return self.closed - before

    def project_(self) -> None:
        """Move all parameters back into their bounds; call it after every optimizer step."""
        for gate in self.values():
            gate.project_()
