"""Training with the marginal likelihood, so that weights can be pruned afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchprune_bayes._checks import check_choice, check_count, check_keys, check_positive
from torchprune_bayes._distributed import entered_on_all_ranks
from torchprune_bayes._numerics.marginal_likelihood import fixed_point_noise
from torchprune_bayes._numerics.precision import has_float64
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.laplace.evidence import SOLVERS
from torchprune_bayes.laplace.fitting import LaplaceOptions, fit_posterior
from torchprune_bayes.laplace.posterior import MODES, Posterior
from torchprune_bayes.laplace.priors import PriorPrecision, PriorStructure
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.training._online_pruning import OnlinePruning
from torchprune_bayes.training._optimizers import bare_optimizer
from torchprune_bayes.training._pruner_state import check_history
from torchprune_bayes.training.prior_decay import PriorDecay
from torchprune_bayes.training.undo import tensors_kept_on_error
from torchprune_bayes.types import Masks

logger = logging.getLogger("torchprune_bayes")

# Sequences differ in length, and so do averages over some of them.
_LABEL_ROOM = 1.5
_STATE = {"step", "history", "prior", "noise", "masks", "best"}


class SpaM:
    """Learn prior precisions while a model is trained; call :meth:`step` once per epoch.

    Sparsifiability via the marginal likelihood (`Dhahri et al., 2024
    <https://arxiv.org/abs/2402.15978>`_). The weights are trained on the log joint, with a Gaussian
    prior that acts as weight decay through a hook of the optimizer. Every few epochs a Laplace
    approximation is fitted at the current weights, and the prior precisions become those of
    highest marginal likelihood. Weights that the data do not need are thereby drawn to zero, and
    :class:`~torchprune_bayes.OPD` prunes them with the same posterior::

        spam = SpaM(optimizer, calibration, prior="diag", burn_in=20, every=5)
        for epoch in range(epochs):
            for inputs, targets in loader:
                ...                        # forward, backward, optimizer.step(), as ever
            spam.step()
        prune_global(None, OPD, amount=0.95, calibration=calibration, posterior=spam.posterior())

    Of the prior structures ``"diag"`` and ``"unitwise"`` make networks sparse; ``"scalar"`` and
    ``"layerwise"`` regularise more than they sparsify. The evidence is meant for a maximum of the
    joint, which weights during training are not, nor those of decoupled decay: then it is a
    guide only.

    *In several processes* all make the same calls. Each fits the curvature of its own share of the
    data, they add these up, and so get the same prior and masks::

        shares = calibrate(accelerator, model, loader, loss_fn)
        spam = SpaM(optimizer, shares.local, all_reduce=True, num_data=len(dataset))

    Args:
        optimizer: Any ``torch.optim`` optimizer without weight decay on these tensors; accelerate's
            wrapper is looked through.
        calibration: Data, model and loss, for the curvature; its tensors have the prior. For all of
            a model's, biases and norms included, pass ``params=trainable_parameters(model)``.
            With ``num_samples`` each fit uses another random subset.
        prior: Structure: ``"scalar"``, ``"layerwise"``, ``"unitwise"`` or ``"diag"``.
        burn_in: Calls of :meth:`step` before the prior may change.
        every: Calls from one update to the next.
        initial: Prior precision until the first update.
        labels_per_sample: Labels per sample over which the training loss is also averaged, such as
            the tokens of a sequence: their mean number. The prior is weakened by this factor.
        noise: ``σ`` of the observations, for regression; ``"fit"`` learns it, from 1.
        solver: ``"fixed_point"`` or the paper's ``"adam"``.
        solver_options: Further options of
            :func:`~torchprune_bayes.laplace.maximise_evidence`.
        decoupled: Whether weights decay separately from the gradients, as in AdamW.
        schedule: Sparsity of the weights to reach while training, by the number of the call;
            ``None`` prunes nothing.
        regrow: Whether weights that the schedule prunes are set to zero once and may regrow, as in
            the paper; otherwise they remain zero.
        mode: What the schedule ranks weights by: ``"opd"``, the posterior damage, or
            ``"posterior"``, their posterior precision alone; the paper's code calls these
            ``posterior_and_weights`` and ``posterior``. ``"obd"`` ignores the prior.
        patience: Updates without higher evidence after which :attr:`finished` is true; ``None`` for
            never.
        enabled: ``False`` gives the MAP baseline: the prior keeps its initial value.
        options: ``curvature``, ``kind``, ``num_data``, ``temperature``, ``loss_scale``, ``outputs``
            and ``all_reduce``, see :class:`~torchprune_bayes.laplace.LaplaceOptions`.

    Attributes:
        optimizer: The optimizer.
        prior: Prior precisions now, a :class:`~torchprune_bayes.laplace.PriorPrecision`.
        noise: ``σ`` now, or ``None``.
        history: A dict of plain values for each update or pruning: ``step``, ``updated``,
            ``log_marginal_likelihood`` (under the new prior, before pruning),
            ``effective_parameters`` and ``sparsity``.

    Raises:
        AlignmentError: If a tensor is not in the optimizer.
        ArgumentError: If an option has an impossible value, or the optimizer has weight decay.
            In :meth:`step`, if samples have other numbers of labels.
        ArgumentTypeError: If the optimizer takes no hooks.

    Cost: one pass over the weights per training step; at an update that of the curvature, a few
    passes over the calibration samples. A ``"diag"`` prior holds 4 bytes per weight.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> spam = SpaM(optimizer, Calibration(model, data, torch.nn.functional.cross_entropy))
        >>> for epoch in range(5):
        ...     for x, y in data:
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        ...     _ = spam.step()
        >>> [event["step"] for event in spam.history]
        [5]
        >>> spam.posterior().scores()["weight"].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        calibration: Calibration,
        prior: str | PriorStructure = PriorStructure.DIAG,
        *,
        burn_in: int = 0,
        every: int = 5,
        initial: float = 1.0,
        labels_per_sample: float = 1.0,
        noise: float | str | None = None,
        solver: str = "fixed_point",
        solver_options: Mapping[str, Any] | None = None,
        decoupled: bool = False,
        schedule: Schedule | None = None,
        regrow: bool = False,
        mode: str = "opd",
        patience: int | None = None,
        enabled: bool = True,
        **options: Any,
    ) -> None:
        check_choice("solver", solver, SOLVERS)
        check_choice("mode", mode, MODES)
        check_count("burn_in", burn_in, minimum=0)
        check_count("every", every)
        check_positive("labels_per_sample", labels_per_sample)
        if patience is not None:
            check_count("patience", patience)
        optimizer = bare_optimizer(optimizer)
        self._options, self._labels = options, labels_per_sample
        self._fit = LaplaceOptions(**options)
        self._fits_noise = noise == "fit"
        self.noise = 1.0 if noise == "fit" else _as_number(noise)
        self._fit.check_noise(self.noise)
        self.optimizer, self._calibration, self._space = optimizer, calibration, calibration.space
        self._burn_in, self._every, self._enabled = burn_in, every, enabled
        self._solver = {"solver": solver, **(solver_options or {})}
        self._patience = patience
        shapes = {tensor.name: tensor.leaf.shape for tensor in self._space}
        device = self._space[0].leaf.device
        self.prior = PriorPrecision.constant(shapes, prior, initial, device=device)
        self.history: list[dict[str, Any]] = []
        self._step = 0
        self._best: dict[str, Any] | None = None
        self._pruning = OnlinePruning(self._space, optimizer, schedule, regrow=regrow, mode=mode)
        self._decay = PriorDecay(optimizer, self._precisions(), self._factor(), decoupled=decoupled)

    @property
    def finished(self) -> bool:
        """Whether the evidence has not risen for ``patience`` updates."""
        if self._patience is None or self._best is None:
            return False
        updates = [event for event in self.history if event["updated"]]
        since = sum(event["step"] > self._best["step"] for event in updates)
        return since >= self._patience

    @property
    def masks(self) -> Masks:
        """Boolean masks by qualified name, of the tensors that are permanently pruned."""
        return dict(self._pruning.masks)

    def step(self) -> dict[str, Any] | None:
        """Count an epoch; update the prior, and prune, if that is due.

        Returns:
            What was added to :attr:`history`, or ``None``. If anything fails, nothing is changed,
            and with ``all_reduce`` in no process.
        """
        if self._fit.all_reduce:
            with entered_on_all_ranks(self.stepped) as event:
                return event
        with self.stepped() as event:
            return event

    @contextmanager
    def stepped(self) -> Iterator[dict[str, Any] | None]:
        """Do what :meth:`step` does; if the body fails as well, everything is restored."""
        now = self._step + 1
        updates = self._enabled and now > self._burn_in and (now - self._burn_in) % self._every == 0
        prunes = self._pruning.is_due(now)
        posterior = self._fitted() if updates or prunes else None
        if posterior is None:
            with self._kept_on_error({}):
                self._step = now
                yield None
            return
        if updates:
            posterior = self._improved(posterior)
        evidence = posterior.log_marginal_likelihood()
        effective = posterior.effective_parameters()
        masks = self._pruning.chosen(posterior, now) if prunes else {}
        with self._kept_on_error(masks):
            self._take_over(posterior, evidence, now, updates)
            if prunes:
                self._pruning.prune(masks)
            event = {
                "step": now,
                "updated": updates,
                "log_marginal_likelihood": evidence,
                "effective_parameters": effective,
                "sparsity": self._pruning.sparsity,
            }
            self.history, self._step = [*self.history, event], now
            logger.info("Epoch %d: log marginal likelihood %.1f.", now, evidence)
            yield event

    def posterior(self) -> Posterior:
        """Fit the posterior at the current weights and under the current prior."""
        return self._fitted()

    def restore_best(self) -> None:
        """Go back to the weights, prior and noise of the update with the highest evidence.

        Raises:
            ArgumentError: If there has been no update, or ``patience`` is ``None``, for which none
                is stored.
        """
        if self._best is None:
            raise ArgumentError("Expected an update with `patience` before this, got none.")
        best = self._best
        masks = self._pruning.check(best["masks"])
        leaves = [(tensor.leaf, None) for tensor in self._space]
        with tensors_kept_on_error(leaves), self._kept_on_error(masks), torch.no_grad():
            for tensor in self._space:
                tensor.leaf.copy_(best["weights"][tensor.name])
            self._set_prior(self.prior.from_state_dict(best["prior"]), best["noise"])
            self._pruning.hold(masks)

    def state_dict(self) -> dict[str, Any]:
        """Step, history, prior and masks, as tensors and plain values; ``torch.load`` reads it.

        The states of model and optimizer are not included, nor are the arguments.
        """
        return {
            "step": self._step,
            "history": [dict(event) for event in self.history],
            "prior": self.prior.state_dict(),
            "noise": self.noise,
            "masks": self.masks,
            "best": self._best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; pruned entries are set to zero at once.

        Raises:
            AlignmentError: If the state belongs to another prior or to other tensors.
            ArgumentError: If ``state`` is not a state of this class.
        """
        check_keys("SpaM's state", state, _STATE)
        check_count("step", state["step"], minimum=0)
        check_history(state["history"])
        prior = self.prior.from_state_dict(state["prior"])
        masks = self._pruning.check(state["masks"])
        with self._kept_on_error(masks):
            self._set_prior(prior, state["noise"])
            self._pruning.hold(masks)
            self._step = int(state["step"])
            self.history = [dict(event) for event in state["history"]]
            self._best = None if state["best"] is None else dict(state["best"])

    def remove(self) -> None:
        """End the weight decay and stop keeping zeros."""
        self._decay.remove()
        self._pruning.remove()

    def _fitted(self) -> Posterior:
        calibration = self._calibration.redrawn(len(self.history))
        calibration = calibration.with_space(self._pruning.space)
        posterior = fit_posterior(calibration, self.prior, noise=self.noise, **self._options)
        labels = posterior.labels_per_sample
        if labels and not 1 / _LABEL_ROOM <= self._labels / labels <= _LABEL_ROOM:
            raise ArgumentError(
                f"Expected labels_per_sample={labels:.3g}, over which the mean loss averages, got "
                f"{self._labels:.3g}."
            )
        return posterior

    def _improved(self, posterior: Posterior) -> Posterior:
        posterior = posterior.with_best_prior(**self._solver)
        if self._fits_noise:
            effective = posterior.effective_parameters()
            error, count = 2.0 * posterior.loss, posterior.observations
            noise = fixed_point_noise(error, count, effective, posterior.temperature)
            posterior = posterior.with_noise(noise)
        return posterior

    def _take_over(self, posterior: Posterior, evidence: float, now: int, updated: bool) -> None:
        self._set_prior(posterior.prior, posterior.noise)
        if not updated or self._patience is None:
            return
        if self._best is None or evidence > self._best["evidence"]:
            self._best = {
                "step": now,
                "evidence": evidence,
                "weights": {t.name: t.leaf.detach().clone() for t in self._space},
                "prior": self.prior.state_dict(),
                "noise": self.noise,
                "masks": self.masks,
            }

    @contextmanager
    def _kept_on_error(self, masks: Masks) -> Iterator[None]:
        """Restore everything if the body, which holds ``masks``, fails."""
        ours = {key: vars(self)[key] for key in ("prior", "noise", "_best", "_step", "history")}
        decay = (self._decay.precisions, self._decay.factor)
        with self._pruning.kept_on_error(masks):
            try:
                yield
            except BaseException:
                vars(self).update(ours)
                self._decay.precisions, self._decay.factor = decay
                raise

    def _set_prior(self, prior: PriorPrecision, noise: float | None) -> None:
        self.prior, self.noise = prior, noise
        self._decay.precisions = self._precisions()
        self._decay.factor = self._factor()

    def _precisions(self) -> dict[Tensor, Tensor]:
        """Precisions on the weights' devices, in float32 where there is no float64."""
        by_leaf = {tensor.leaf: self.prior.broadcastable(tensor.name) for tensor in self._space}
        return {
            leaf: (value if has_float64(leaf.device) else value.float()).to(leaf.device)
            for leaf, value in by_leaf.items()
        }

    def _factor(self) -> float:
        """``c`` with which ``c δ w`` is the prior's gradient beside that of the mean loss."""
        data = self._fit.num_data or self._calibration.num_data
        variance = (self.noise or 1.0) ** 2
        return self._fit.temperature * variance / (data * self._labels * self._fit.loss_scale)


def _as_number(noise: float | str | None) -> float | None:
    if isinstance(noise, str):
        raise ArgumentError(f"Expected `noise` to be a number, 'fit' or None, got {noise!r}.")
    return noise
