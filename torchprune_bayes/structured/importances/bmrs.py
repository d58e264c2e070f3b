"""Trained noise gates as an importance: the evidence for removing coupled units together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import AlignmentError
from torchprune_bayes.gates import Criterion, Gates, Site, find_criterion
from torchprune_bayes.gates.site import weight_dim
from torchprune_bayes.params import leaf
from torchprune_bayes.structured.groups import Kept, UnitGroup, UnitSlice
from torchprune_bayes.structured.importance import UnitImportance


class BMRSImportance(UnitImportance):
    """Minus the change of the log evidence when a unit is removed wherever it appears.

    Gates are independent, so that the evidence of several is exactly the sum of theirs
    (arXiv:2406.01345, equation 6). A unit of a residual stream is removed where the sum over all
    gates on the layers that write to the stream says so, which no gate can decide alone. Criteria
    that do not add up need every gate to agree. Gates that are closed already cost nothing more.

    Make it before the gates are folded: it stores their decisions and nothing of the model.
    With ``shrink(..., target="evidence")`` exactly the units with a score below zero are removed,
    and with ``calibration`` there the layers that read them are fitted anew.

    Args:
        gates: The trained gates.
        criterion: A criterion or its name; its ``tau`` counts once for each gate. ``None`` removes
            only units that are closed already.

    Raises:
        ArgumentError: If the criterion is unknown.

    Cost: a few evaluations of log Φ for each gate.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> gates = attach_gates(model)
        >>> with torch.no_grad():  # the second hidden unit has collapsed
        ...     _ = gates["2:in"].mu.copy_(torch.tensor([0.0, -19.0, 0.0]))
        ...     _ = gates["2:in"].log_sigma.copy_(torch.tensor([-5.0, 1.0, -5.0]))
        >>> reads = UnitSlice("2.weight", 1, torch.arange(3)[:, None], "consumer")
        >>> importance = BMRSImportance(gates)
        >>> importance.score(UnitGroup("0", "hidden", 3, (reads,)), model) < 0
        tensor([False,  True, False])
    """

    threshold = 0.0

    def __init__(self, gates: Gates, criterion: Criterion | str | None = "bmrs-n") -> None:
        super().__init__()
        result = None if criterion is None else find_criterion(criterion)
        self.additive = result is None or result.additive
        if result is None:
            margins = {name: torch.full_like(gate.mu, -torch.inf) for name, gate in gates.items()}
        else:
            margins = gates.margins(result)
        self._taken = {
            _place(gates.model, site): _Decision(
                site, margins[name].detach().cpu().double(), gates[name].mask.detach().cpu().clone()
            )
            for name, site in gates.sites.items()
        }
        self._current = dict(self._taken)

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Start from the decisions as they were taken."""
        self._current = dict(self._taken)

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Minus the joint margin of each unit; the lowest number where all its gates are closed.

        Args:
            group: Units that go together.
            model: The model without its gates.

        Returns:
            Float64 ``[units]``; ``None`` unless gates hold all that the units write, or all that
            reads them.

        Raises:
            AlignmentError: If the model has been shrunk since the gates were read.
        """
        gated = list(self._gated(group))
        if not _holds_all(group, gated):
            return None
        margins = torch.stack([decision.of_units(owned.positions) for owned, decision in gated])
        silent = torch.stack([decision.closed(owned.positions) for owned, decision in gated])
        if self.additive:
            joint = margins.masked_fill(silent, 0.0).sum(0)
        else:
            joint = margins.masked_fill(silent, torch.inf).amin(0)
        return -joint.masked_fill(silent.all(0), torch.finfo(torch.float64).max)

    def update(self, model: nn.Module, groups: Sequence[UnitGroup], kept: Kept) -> None:
        """Follow a cut: gates of removed units are dropped. No weights move."""
        gone: dict[tuple[str, int], list[Tensor]] = {}
        for group in groups:
            if group.name not in kept:
                continue
            stays = torch.zeros(group.units, dtype=torch.bool)
            stays[kept[group.name].cpu()] = True
            for owned, _ in self._gated(group):
                gone.setdefault((owned.name, owned.dim), []).append(owned.positions.cpu()[~stays])
        for key, pieces in gone.items():
            self._current[key] = self._current[key].without(
                torch.cat([p.flatten() for p in pieces])
            )

    def _gated(self, group: UnitGroup) -> Iterator[tuple[UnitSlice, _Decision]]:
        for owned in group.slices:
            decision = self._current.get((owned.name, owned.dim))
            if decision is not None:
                yield owned, decision


class _Decision:
    """Margins and masks of the gates at one site."""

    def __init__(self, site: Site, margins: Tensor, mask: Tensor) -> None:
        self.site, self.margins, self.mask = site, margins, mask

    def of_units(self, positions: Tensor) -> Tensor:
        """Margin of each unit: the sum over the gates that its entries belong to."""
        return torch.where(self._owned(positions), self.margins, 0.0).sum(1)

    def closed(self, positions: Tensor) -> Tensor:
        """Whether all gates of a unit are closed."""
        return ~(self._owned(positions) & self.mask).any(1)

    def without(self, entries: Tensor) -> _Decision:
        """The gates but for those of these entries."""
        stay = ~self._owned(entries[:, None]).any(0)
        return _Decision(self.site, self.margins[stay], self.mask[stay])

    def _owned(self, positions: Tensor) -> Tensor:
        # [units, gates], whether an entry of the unit belongs to the gate.
        gates = positions.cpu() // self.site.repeat
        if gates.numel() and int(gates.max()) >= len(self.mask):
            raise AlignmentError(
                f"Expected {len(self.mask)} gated units at `{self.site.name}`, got "
                f"{int(gates.max()) + 1} or more: take the importance anew from trained gates."
            )
        owned = torch.zeros(len(positions), len(self.mask), dtype=torch.bool)
        return owned.scatter_(1, gates, True)


def _place(model: nn.Module, site: Site) -> tuple[str, int]:
    module = model.get_submodule(site.module)
    weight = leaf(module, "weight")
    assert weight is not None
    name = f"{site.module}.weight" if site.module else "weight"
    return name, weight_dim(module, site.side) if weight.ndim > 1 else 0


def _holds_all(group: UnitGroup, gated: Sequence[tuple[UnitSlice, _Decision]]) -> bool:
    # A unit is silent when all that writes it is, or all that reads it ignores it. A gate on
    # a norm stands for the one layer in front of it.
    def weights(role: str) -> int:
        return sum(s.role == role and s.name.endswith("weight") for s in group.slices)

    sides = [decision.site.side for _, decision in gated]
    written, read = weights("producer"), weights("consumer")
    return (0 < written <= sides.count("out")) or (0 < read <= sides.count("in"))
