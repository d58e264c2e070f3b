"""Report of a shrinking, as numbers and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torchprune_bayes.structured._cutting import RepairReport
from torchprune_bayes.structured.curves import LossCurve
from torchprune_bayes.structured.groups import Kind
from torchprune_bayes.structured.slicing import ShrinkPlan


@dataclass(frozen=True)
class Amount:
    """A quantity before and after shrinking."""

    before: int
    after: int

    @property
    def sparsity(self) -> float:
        """The removed fraction, zero if there was nothing.

        Example:
            >>> Amount(before=8, after=6).sparsity
            0.25
        """
        return 1.0 - self.after / self.before if self.before else 0.0

    def __str__(self) -> str:
        return f"{self.before:,} -> {self.after:,} ({0.0 - self.sparsity:+.1%})"


@dataclass(frozen=True)
class GroupChange:
    """Sizes of a group before and after.

    Attributes:
        name: The group.
        kind: Kind of its units.
        units: Units before and after.
    """

    name: str
    kind: Kind
    units: Amount


@dataclass(frozen=True)
class ShrinkReport:
    """Report of :func:`~torchprune_bayes.structured.shrink`.

    Attributes:
        target: What the sparsity counts.
        sparsity: The requested sparsity, ``None`` for ``target="evidence"``.
        units: Units of all groups.
        parameters: Parameters of the model.
        flops: FLOPs of one forward pass on the example inputs; ``None`` without these.
        groups: Sizes of each group.
        plan: Indices of the tensors that are kept, from the first model to the last.
        difference: Largest difference between the outputs of the shrunk model and of the whole one
            with the same units zeroed, relative to the largest output, on copies with moved weights
            and on two inputs; ``None`` if not verified.
        steps: Number of steps that removed something.
        left_out: Groups that cannot be cut, by the layer that produces their units, each with the
            reason.
        measured: For ``target="latency"`` nanoseconds of one forward pass, for ``"memory"`` bytes.
            A latency is measured once more at the end: it may differ from what was asked for by
            the noise of the machine, see :class:`~torchprune_bayes.structured.MeasuredCosts`.
        spread: Distance of the quartiles of that latency, relative to it.
        curves: The loss curves that the last step measured, see
            :class:`~torchprune_bayes.structured.curves.LossCurve`.
        repairs: Report of the repair of each step.
    """

    target: str
    sparsity: float | None
    units: Amount
    parameters: Amount
    flops: Amount | None
    groups: Sequence[GroupChange]
    plan: ShrinkPlan
    difference: float | None
    steps: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    measured: Amount | None = None
    spread: float = 0.0
    curves: Sequence[LossCurve] = ()
    repairs: Sequence[RepairReport] = ()

    def __str__(self) -> str:
        width = max([len(group.name) for group in self.groups], default=0)
        lines = [f"parameters  {self.parameters}"]
        if self.flops is not None:
            lines.append(f"FLOPs       {self.flops}")
        if self.measured is not None:
            within = f"ns, half of the passes within {self.spread:.0%}"
            unit = {"latency": within, "memory": "bytes"}[self.target]
            lines.append(f"{self.target:<10}  {self.measured} {unit}")
        lines.append(f"units       {self.units}")
        if self.difference is not None:
            lines.append(f"masked and shrunk outputs differ by at most {self.difference:.1e}")
        lines += [str(repaired) for repaired in self.repairs]
        lines += [
            f"  {group.name:<{width}}  {group.kind:<7}  {group.units}" for group in self.groups
        ]
        return "\n".join([*lines, *self._whole()])

    def _whole(self) -> Iterator[str]:
        """Yield a line for what is kept whole, one for layers that differ in a number only."""
        alike: dict[tuple[str, str], list[str]] = {}
        for name, why in self.left_out.items():
            plain = re.sub(r"\d+", "0", name), re.sub(r"\d+", "0", why)
            alike.setdefault(plain, []).append(name)
        for first, *others in alike.values():
            more = f" and {len(others)} like it" if others else ""
            yield f"left whole: `{first}`{more}, since {self.left_out[first]}"
