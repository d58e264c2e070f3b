"""A calibration whose samples are divided among processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from torchprune_bayes._checks import check_count
from torchprune_bayes._distributed import all_gathered, on_all_ranks, rank, share_of, world_size
from torchprune_bayes.calibration import Calibration, GradientCost, MeanLoss
from torchprune_bayes.calibration.batches import Batch, map_tensors
from torchprune_bayes.calibration.functional import LossFunction
from torchprune_bayes.calibration.request import GradientRequest
from torchprune_bayes.calibration.verification import check_num_samples
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations._ranks import exchanged, exchanged_rows, refuse_sharded, summed
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import ParameterPairs

_EVALUATION_BATCH = 256


class ShardedCalibration(Calibration):
    """One calibration in several processes: each computes the gradients of its share of the data.

    In every process it is used as a :class:`~torchprune_bayes.Calibration` is, by all at the same
    time, and gives all of them the result of one process on the union of the shares, in the
    order of rounds, first process first. So every method makes the same decision everywhere.
    Gradients are computed through the bare module and are local; averages are computed from sums
    and counts, so shares may have different sizes. An error in one process is raised in all.

    For a Fisher single gradients are sent, ``N D`` numbers in all; a mean gradient is
    summed, ``D`` numbers. Curvature that is a sum over samples is cheaper fitted on a share's own
    calibration and joined with :func:`~torchprune_bayes.integrations.accelerate.merged`.

    Args:
        model: The model, with equal weights in all processes; prepared or not.
        data: Batches. With ``split``, the same in every process.
        loss_fn: See :class:`~torchprune_bayes.Calibration`.
        params: See :class:`~torchprune_bayes.Calibration`.
        num_samples: Samples over all processes; by default those of 1024 gradients at most,
            ``"all"`` uses all.
        mini_batch: See :class:`~torchprune_bayes.Calibration`.
        seed: See :class:`~torchprune_bayes.Calibration`.
        split: Whether process ``r`` of ``R`` takes batches ``r, r + R, ...`` of ``data``;
            otherwise ``data`` is the process's share already.
        options: Further arguments of :class:`~torchprune_bayes.Calibration`.

    Raises:
        ArgumentError: If there are fewer mini-batches than processes.
        ParameterError: If weights are sharded.
        CalibrationError: If it fails in another process, now or in a later pass.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 2)  # one process alone works too
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> ShardedCalibration(model, data, nn.functional.cross_entropy).num_gradients
        8
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        loss_fn: LossFunction | None = None,
        params: ParameterPairs | None = None,
        num_samples: int | str | None = None,
        mini_batch: int = 1,
        seed: int = 0,
        *,
        split: bool = True,
        **options: Any,
    ) -> None:
        def start() -> Calibration:
            refuse_sharded(model)
            own = EveryNth(data) if split else data
            number = _share_of(num_samples, mini_batch)
            alone = Calibration(model, own, loss_fn, params, number, mini_batch, seed, **options)
            super(ShardedCalibration, self).__init__(
                model, alone.data, loss_fn, params, number, mini_batch, seed, **options
            )
            return alone.share(rank(), world_size())

        self.local = on_all_ranks(start)
        self._total = check_num_samples(num_samples, mini_batch)

    def with_space(self, space: ParameterSpace) -> Calibration:
        """See :meth:`Calibration.with_space`."""
        return self._beside(self.local.with_space(space), super().with_space(space))

    def with_loss(self, loss_fn: LossFunction) -> Calibration:
        """See :meth:`Calibration.with_loss`."""
        return self._beside(self.local.with_loss(loss_fn), super().with_loss(loss_fn))

    def reseeded(self, seed: int) -> Calibration:
        """See :meth:`Calibration.reseeded`."""
        return self._beside(self.local.reseeded(seed), super().reseeded(seed))

    def redrawn(self, index: int) -> Calibration:
        """See :meth:`Calibration.redrawn`."""
        return self._beside(self.local.redrawn(index), super().redrawn(index))

    @property
    def engine(self) -> str | None:
        """How gradients are computed in this process."""
        return self.local.engine

    @property
    def cost(self) -> GradientCost:
        """Gradients of this process, and the seconds for them."""
        return self.local.cost

    @property
    def num_samples(self) -> int:
        """Samples over all processes; queried once if the number was not given."""
        if self._total is None:
            self._total = sum(all_gathered(on_all_ranks(lambda: self.local.num_samples)))
        return self._total

    @property
    def num_data(self) -> int:
        """Samples of the training data, over all processes."""
        return sum(all_gathered(on_all_ranks(lambda: self.local.num_data)))

    def gradient_rows(self, request: GradientRequest) -> Iterator[Tensor]:
        """Stream the gradients of all processes; each leaves out its own first ones."""
        done = 0
        own = self.local.gradient_rows(replace(request, out=None))
        for rows in exchanged_rows(own, self.device):
            if request.out is not None:
                request.out[done : done + len(rows)] = rows
            done += len(rows)
            yield rows

    def mean_gradient(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Gradient of the mean loss over the samples of all processes."""
        local = on_all_ranks(lambda: self.local.mean_gradient(weights))
        mine = self.local.num_samples
        total = summed({name: gradient * mine for name, gradient in local.items()})
        samples = self.num_samples
        return {name: gradient / samples for name, gradient in total.items()}

    def batches(self, size: int = _EVALUATION_BATCH) -> Iterator[Batch]:
        """Yield the calibration samples of all processes."""
        return self._moved(exchanged(map(_on_cpu, self.local.batches(size))))

    def fisher_batches(
        self, weights: Mapping[str, Tensor] | None = None, size: int = _EVALUATION_BATCH
    ) -> Iterator[Batch]:
        """Yield batches as :meth:`batches`, with the labels of a Fisher."""
        return self._moved(exchanged(map(_on_cpu, self.local.fisher_batches(weights, size))))

    def held_out_loss(self, weights: Mapping[str, Tensor] | None = None) -> MeanLoss:
        """Mean loss over the held-out samples of all processes that have some."""
        losses = all_gathered(on_all_ranks(lambda: self.local.held_out_loss(weights)))
        in_sample = all(part.in_sample for part in losses)
        used = [part for part in losses if in_sample or not part.in_sample]
        samples = sum(part.samples for part in used)
        total = sum(part.value * part.samples for part in used)
        return MeanLoss(total / samples, samples, in_sample)

    def _moved(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return (map_tensors(batch, self.functional.move_input) for batch in batches)

    @staticmethod
    def _beside(local: Calibration, whole: Calibration) -> Calibration:
        """A changed copy, with the share that was changed alike."""
        assert isinstance(whole, ShardedCalibration)
        whole.local = local
        return whole


class EveryNth:
    """This process's batches of ``data``, every ``R``-th one.

    Every process draws all of them, in the same order, so that a shuffling loader is divided
    without repeating or losing a sample.

    Example:
        >>> list(EveryNth([1, 2, 3]))
        [1, 2, 3]
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        self._data = list(data) if isinstance(data, Iterator) else data

    def __iter__(self) -> Iterator[Batch]:
        return islice(self._data, rank(), None, world_size())

    def __getattr__(self, name: str) -> Any:
        # A loader's generators are reached through its sampler and data set.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._data, name)


def _share_of(num_samples: int | str | None, mini_batch: int) -> int | str | None:
    check_count("mini_batch", mini_batch)
    number = check_num_samples(num_samples, mini_batch)
    if number is None:
        return num_samples
    groups = number // mini_batch
    if groups < world_size() and world_size() > 1:
        raise ArgumentError(
            f"Expected num_samples of at least {world_size() * mini_batch}, a mini-batch of "
            f"{mini_batch} for each of {world_size()} processes, got {num_samples}."
        )
    return share_of(groups, rank(), world_size()) * mini_batch


def _on_cpu(batch: Batch) -> Batch:
    return map_tensors(batch, Tensor.cpu)
