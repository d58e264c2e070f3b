"""A calibration whose gradients are stored on disk, so that collecting them can resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._files import read_tensors, save_tensors, writing
from torchprune_bayes.calibration._loss_check import CHECKED_SAMPLES
from torchprune_bayes.calibration.batches import batch_size, cut, tensors_in
from torchprune_bayes.calibration.calibration import Calibration
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.calibration.request import GradientRequest
from torchprune_bayes.errors import ArgumentError, CalibrationError


class CheckpointedCalibration(Calibration):
    """A calibration that stores gradients in a folder, so that collecting resumes where it stopped.

    Each part of a pass is written when it is done, and read again by any later pass over the same
    samples at the same weights and masks and with the same loss, in this process or another. What
    differs in any of them has gradients of its own beside these. A restarted pass draws the samples
    that are done, without computing on them. Delete the folder when the curvature is fitted.

    Args:
        folder: Where to store them; created if it does not exist.
        args: Arguments of :class:`~torchprune_bayes.Calibration`.
        options: Arguments of :class:`~torchprune_bayes.Calibration`.

    Raises:
        ArgumentError: With ``fisher="true"``, whose labels are drawn during a pass; in a pass, if
            the folder cannot be written.
        CalibrationError: In a pass, if a part is damaged.

    Cost: ``4 N D`` bytes in the folder for each pass at new weights or of another range; drawing
    the samples once more, to know them.

    Example:
        >>> import tempfile
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> loss = torch.nn.functional.cross_entropy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     calibration = CheckpointedCalibration(folder, model, data, loss)
        ...     first = list(calibration.gradients())
        ...     all(map(torch.equal, first, calibration.gradients()))  # read, not computed
        True
    """

    def __init__(self, folder: str | Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.fisher == "true":
            raise ArgumentError("Expected fisher='empirical' for kept gradients, got 'true'.")
        self.folder = Path(folder)
        self._data_digests: dict[tuple[int, int], str] = {}

    def gradient_rows(self, request: GradientRequest) -> Iterator[Tensor]:
        """Stream the gradients, the stored ones first; see :meth:`Calibration.gradient_rows`."""
        if request.first:
            yield from super().gradient_rows(request)
            return
        folder = self.folder / self._key(request)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        columns = request.span[1] - request.span[0]
        index = done = 0
        while (path := folder / f"{index:06d}.safetensors").is_file():
            rows = _read(path, self.num_gradients - done, columns).to(self.device, self.dtype)
            if request.out is not None:
                request.out[done : done + len(rows)] = rows
            index, done = index + 1, done + len(rows)
            yield rows
        if done == self.num_gradients:
            return
        for number, rows in enumerate(super().gradient_rows(request.after(done)), start=index):
            stored = {"rows": rows.cpu()}
            marks = {"sha256": _digest(stored)}
            save_tensors(folder / f"{number:06d}.safetensors", stored, marks)
            yield rows

    def _key(self, request: GradientRequest) -> str:
        """A digest of all that the gradients depend on."""
        _, state = self._functional.bind(request.weights)
        options = request.span, self._samples.draw, self.num_samples, self.mini_batch
        parts = (
            _digest(state),
            _digest(request.remaining.masks),
            self._data_digest(),
            self._loss_mark(request.weights),
        )
        return hashlib.sha256(repr((options, parts)).encode()).hexdigest()[:24]

    def _data_digest(self) -> str:
        """Of all samples of this draw, independent of batch sizes."""
        draw = self._samples.draw
        if draw not in self._data_digests:
            digest = hashlib.sha256()
            for batch in self.batches():
                for index in range(batch_size(batch)):
                    sample = tensors_in(cut(batch, index, index + 1))
                    digest.update(_digest(dict(enumerate(sample))).encode())
            self._data_digests[draw] = digest.hexdigest()
        return self._data_digests[draw]

    def _loss_mark(self, weights: Mapping[str, Tensor] | None) -> str:
        """Identifies the loss: its value on a few samples, and the size of its gradient."""
        part = next(self.batches(CHECKED_SAMPLES))
        leaves, constants = self._functional.bind(weights, self.space.names)
        with preserved(self.model), self.randomness():
            gradients = self._functional.mean_gradients(leaves, constants, [part])
        norm = (
            sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
        )
        # Few digits: the number of threads must not matter.
        return f"{float(self.losses_at(weights)([part])[0]):.4e} {norm:.3e}"


def _read(path: Path, most_rows: int, columns: int) -> Tensor:
    """The rows of one part.

    Raises:
        CalibrationError: If it is damaged, or has another number of rows or columns.
    """
    try:
        stored = read_tensors(path, "kept gradients")
        whole = stored.metadata.get("sha256") == _digest(stored.tensors)
        rows = stored.tensors.get("rows") if whole else None
        fits = rows is not None and rows.ndim == 2 and rows.shape[1] == columns
        if rows is None or not fits or not 0 < len(rows) <= most_rows:
            raise ArgumentError(f"Expected whole gradients in {path}, got others than were kept.")
    except ArgumentError as error:
        raise CalibrationError(
            f"{str(error).removesuffix('.')}: delete the file to have them computed again."
        ) from error
    return rows


def _digest(tensors: Mapping[Any, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        digest.update(repr((name, plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
