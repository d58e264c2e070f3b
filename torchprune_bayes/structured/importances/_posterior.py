"""What importances share that sum a number for each weight that a Laplace posterior gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.laplace import LaplaceOptions, Posterior, PriorStructure, fit_posterior
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.structured.groups import Kept, UnitGroup, UnitSlice
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.structured.importances._calibrated import (
    Versions,
    all_groups,
    check_model,
    pieces_of,
    sums_along,
)
from torchprune_bayes.structured.importances._gates import gate_precisions
from torchprune_bayes.structured.slicing import plan_of


class PosteriorImportance(UnitImportance):
    """Takes a posterior and follows the cuts of ``shrink``, or fits one whenever the model changed.

    Args:
        calibration: Data, model and loss to fit a posterior to, before every step, with the prior
            of highest evidence; or a posterior.
        posterior: A posterior at the model's weights, in its place.
        values: A number for each weight, by qualified name.
        gated: Whether units are scored by gates on all that reads them, see :meth:`gate`, which
            takes a calibration: a posterior says nothing of how the weights of a unit act together.
        prior: Structure of the prior to fit.
        options: Of the fit, see :class:`~torchprune_bayes.laplace.LaplaceOptions`.

    Raises:
        ArgumentError: If an option has an impossible value, or there are to be gates and no
            calibration.
        ArgumentTypeError: If there is not one of calibration and posterior.
    """

    def __init__(
        self,
        calibration: Calibration | Posterior | None,
        posterior: Posterior | None,
        values: Callable[[Posterior], Mapping[str, Tensor]],
        *,
        gated: bool,
        prior: str,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.calibration, given = _told_apart(calibration, posterior)
        if gated and self.calibration is None:
            raise ArgumentError(
                "Expected a calibration for members='gate', got a posterior, which does not say "
                "how the weights of a unit act together."
            )
        self._gated = gated
        self._gates: dict[str, tuple[Tensor, Tensor]] = {}
        self._values = values
        self._prior = PriorStructure.of(prior)
        self._options = LaplaceOptions(**options)
        self.needs_recalibration = given is None
        self._given: Mapping[str, Tensor] = {} if given is None else values(given)
        self._current = self._given
        self._versions: Versions | None = None
        self._draws = 0

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Fit the posterior if there is a calibration, else begin with the one that was given.

        Raises:
            AlignmentError: If the model is not the one of the calibration.
            CalibrationError: If the data gave no usable curvature.
        """
        if self.calibration is None:
            if _fits(self._given, model):
                self._current = self._given
            return
        check_model(model, self.calibration)
        fresh = _with_readers(self.calibration.redrawn(self._draws), groups)
        posterior = fit_posterior(fresh, **asdict(self._options)).with_best_prior(self._prior)
        if self._gated:
            readers = {g.name: [(p, 1.0) for p in pieces_of(g, "consumer")] for g in groups}
            samples = (self._options.num_data or fresh.num_data) * self._options.loss_scale**2
            self._gates = gate_precisions(fresh, posterior, readers, samples)
        else:
            self._current = self._values(posterior)
        self._versions = Versions(model)
        self._draws += 1

    def update(
        self, model: nn.Module, groups: Sequence[UnitGroup], kept: Kept
    ) -> dict[str, Tensor] | None:
        """Cut the numbers as the model is about to be cut; its values stay."""
        plan = plan_of(model, groups, kept)
        self._current = {name: plan.cut(name, value) for name, value in self._current.items()}
        return None

    def sums(
        self, group: UnitGroup, model: nn.Module, pieces: Sequence[UnitSlice]
    ) -> Iterator[Tensor]:
        """Sum over what each unit owns, ``[units]``, for each piece that the posterior has.

        Raises:
            AlignmentError: If the posterior is of other shapes than the model.
        """
        if self._is_stale(model):
            self.prepare(model, [group])
        for piece in pieces:
            if piece.name in self._current:
                values = self._current[piece.name]
                _check_shape(piece.name, values, model.get_parameter(piece.name))
                yield sums_along(values, piece)

    def gate(self, group: UnitGroup, model: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Precisions of a gate on all that reads a unit, from the data and from the prior.

        Returns:
            Two float64 tensors ``[units]``, see
            :func:`~torchprune_bayes.structured.importances._gates.gate_precisions`; ``None`` where
            a tensor that reads them is not in the posterior.
        """
        held = self._gates.get(group.name)
        if self._is_stale(model) or (held is not None and len(held[0]) != group.units):
            self.prepare(model, [group])
        return self._gates.get(group.name)

    def score_of(self, group: Any, converted: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score a group of torch-pruning's; with gates, the first one has all others gated too."""
        if self._gated and self._is_stale(model):
            self.prepare(model, all_groups(group, converted, model))
        return self.score(converted, model)

    def _is_stale(self, model: nn.Module) -> bool:
        """Whether the model has changed since the posterior was fitted to it here."""
        if self.calibration is None:
            return False
        return self._versions is None or self._versions.changed(model)


def _with_readers(calibration: Calibration, groups: Sequence[UnitGroup]) -> Calibration:
    """Count in what reads units and is in no list of weights to prune, as in recurrent layers."""
    space = calibration.space
    names = [piece.name for group in groups for piece in pieces_of(group, "consumer")]
    own = [
        (calibration.model.get_submodule(name.rpartition(".")[0]), name)
        for name in dict.fromkeys(names)
    ]
    more = [
        (module, name.rpartition(".")[2])
        for module, name in own
        if not kind_of(module).prunable and name not in space.names
    ]
    if not more:
        return calibration
    return calibration.with_space(ParameterSpace(calibration.model, [*space.pairs(), *more]))


def _told_apart(
    calibration: Calibration | Posterior | None, posterior: Posterior | None
) -> tuple[Calibration | None, Posterior | None]:
    if isinstance(calibration, Posterior) and posterior is None:
        calibration, posterior = None, calibration
    if (posterior is None) == (calibration is None):
        raise ArgumentTypeError(
            "Expected one of a calibration and a posterior, got "
            f"{'neither' if posterior is None else 'both'}."
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        raise ArgumentTypeError(
            f"Expected a Calibration or a Posterior, got {type(calibration).__name__}."
        )
    return calibration, posterior


def _fits(values: Mapping[str, Tensor], model: nn.Module) -> bool:
    shapes = {name: tensor.shape for name, tensor in model.named_parameters(remove_duplicate=False)}
    return all(shapes.get(name) == value.shape for name, value in values.items())


def _check_shape(name: str, values: Tensor, parameter: Tensor) -> None:
    if values.shape != parameter.shape:
        raise AlignmentError(
            f"Expected a posterior of `{name}` of shape {tuple(parameter.shape)}, got "
            f"{tuple(values.shape)}: a posterior does not follow the cuts of other pruners, fit it "
            "again or pass a calibration."
        )
