"""Squares and outer products of the gradients of samples, summed batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes.calibration import Batch
from torchprune_bayes.curvature.layers.losses import Evaluated, cotangents
from torchprune_bayes.curvature.layers.passes import Passes, Routes
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.layer_kinds.gradients import SampleGradients, add_squares, new_total
from torchprune_bayes.layer_kinds.grams import Gram, PatchGram
from torchprune_bayes.layer_kinds.outer_products import OuterProducts
from torchprune_bayes.layer_recording import Layer, Recording
from torchprune_bayes.params import leaf
from torchprune_bayes.seeds import derived_seed
from torchprune_bayes.types import Masks


class BatchSums:
    """The sums of one fit while it runs.

    Args:
        passes: The model.
        routes: How gradients of samples are computed, see :func:`needed`.
        factors: Layers that have Kronecker factors, likewise.
        kind: What is squared, see :func:`cotangents`.
        every: Whether parameters with Kronecker factors have a diagonal as well.
        draws: Draws per sample.
        stream: Draws of other streams are others.
        by_position: Whether positions of samples are squared one by one.

    Attributes:
        routes: As given.
        samples: Samples that were added, or mini-batches.
    """

    def __init__(
        self,
        passes: Passes,
        routes: Routes,
        factors: Mapping[str, Layer],
        *,
        kind: str,
        every: bool,
        draws: int,
        stream: int,
        by_position: bool = False,
    ) -> None:
        self._passes, self.routes = passes, routes
        self._by_position = by_position
        self.samples = 0
        self._kind, self._draws = kind, draws
        self._generator = torch.Generator().manual_seed(
            derived_seed(passes.calibration.seed, "curvature", stream)
        )
        self._kronecker = factors
        self._whole = set(_names_of(routes.whole))
        if by_position:  # whichever sample each of them is of
            self._whole -= _weights_of(routes.whole)
        in_factors = set(_names_of(factors.values()))
        self._diagonal = {
            name: new_total(value)
            for name, value in passes.leaves.items()
            if every or name not in in_factors
        }
        self._outputs: dict[str, Gram] = {}
        self._inputs: dict[str, Gram | PatchGram] = {}
        self._notes: dict[str, Tensor] = {}
        self._place = float64_device(passes.calibration.device)
        self._loss = torch.zeros((), dtype=torch.float64, device=self._place)
        self._terms = self._loss.clone()

    @property
    def terms(self) -> int:
        """Terms of the loss so far."""
        return int(self._terms)

    def add(self, batch: Batch) -> set[str]:
        """Add the sums over one batch.

        Returns:
            Parameters of layers that did not see whole samples, such as experts that only some of
            the tokens reach; if there are any, nothing has been added.
        """
        passes = self._passes
        evaluated, recording = passes.forward(batch, self.routes)
        if recording.unbatched:
            return recording.unbatched
        self.samples += len(evaluated.terms)
        self._loss = self._loss + evaluated.total_loss.to(self._place)
        self._terms = self._terms + evaluated.terms.sum().to(self._place)
        vectors = list(
            cotangents(self._kind, passes.losses, evaluated, self._draws, self._generator)
        )
        for index, vector in enumerate(vectors):
            self._add_pass(batch, evaluated, recording, vector, index, len(vectors))
        return set()

    def finished(self, masks: Masks) -> dict[str, Tensor]:
        """All sums, checked; on the CPU if the device has no float64.

        Raises:
            CalibrationError: If one is not finite.
        """
        sums = {
            f"diagonal:{name}": total * masks[name].to(total.device)
            for name, total in self._diagonal.items()
        }
        for layer in list(self._outputs):
            sums[f"outputs:{layer}"] = self._outputs.pop(layer).matrix()
            sums[f"inputs:{layer}"] = self._inputs.pop(layer).matrix()
        sums |= {**self._notes, "terms": self._terms, f"loss:{self._kind}": self._loss}
        # NaN is both the least and the greatest; no large tensor of truth values is made.
        sums = {key: value.to(self._place) for key, value in sums.items()}
        finite = [torch.stack(value.aminmax()).isfinite().all() for value in sums.values()]
        bad = [
            key for key, fine in zip(sums, torch.stack(finite).tolist(), strict=True) if not fine
        ]
        if bad:
            names = dict.fromkeys(map(_what, bad))
            raise CalibrationError(
                f"Expected a finite curvature, got NaN or infinite entries in {', '.join(names)}: "
                "check the loss, the data and the weights."
            )
        return sums

    def _add_pass(
        self,
        batch: Batch,
        evaluated: Evaluated,
        recording: Recording,
        vector: Tensor | None,
        index: int,
        passes: int,
    ) -> None:
        weights = self._passes.losses.weights(evaluated.terms) if vector is None else None
        with torch.enable_grad():
            scalar = evaluated.loss if vector is None else (evaluated.logits * vector).sum()
        last = index == passes - 1
        device = scalar.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            for name, uses in recording.sample_gradients(scalar, weights, keep_graph=not last):
                if name in self._diagonal and name not in self._whole:
                    add_squares(uses, self._diagonal[name], by_position=self._by_position)
                if name in self._kronecker:
                    self._add_factors(name, uses, with_inputs=not index)
        if self.routes.singles:
            vectorized = self.routes.vectorized
            for rows in self._passes.one_by_one(
                batch, self.routes.singles, vector, vectorized=vectorized
            ):
                for name, row in rows.items():
                    self._diagonal[name] += row.square().sum(0)

    def _add_factors(
        self, name: str, uses: Sequence[SampleGradients], *, with_inputs: bool
    ) -> None:
        layer, like = layer_of(name), self._passes.leaves[name]
        products = [use for use in uses if isinstance(use, OuterProducts)]
        for use in products:
            if layer not in self._outputs:
                self._outputs[layer] = Gram(use.factor_sizes[0], like)
            use.add_output_gram(self._outputs[layer])
            if with_inputs:
                self._add_inputs(layer, use, like)

    def _add_inputs(self, layer: str, use: OuterProducts, like: Tensor) -> None:
        if layer not in self._inputs:
            self._inputs[layer] = use.new_input_gram(like)
        use.add_input_gram(self._inputs[layer])
        count, positions = f"positions:{layer}", use.samples * use.positions
        self._notes[count] = self._notes.get(count, self._terms.new_zeros(())) + positions
        if use.inputs_left:
            self._notes[f"inputs first:{layer}"] = self._terms.new_ones(())


def _what(key: str) -> str:
    kind, _, name = key.partition(":")
    if kind in ("inputs", "outputs"):
        return f"{name}.weight" if name else "weight"
    return name if kind == "diagonal" else "the loss"


def needed(
    routes: Routes, structure: str, limit: int, *, by_position: bool = False
) -> tuple[Routes, dict[str, Layer]]:
    """What a structure takes of the routes, and the layers with factors by their weight's name.

    Args:
        routes: How gradients of samples are computed.
        structure: ``"diagonal"``, ``"kronecker"`` or ``"both"``.
        limit: Rows of a Kronecker factor at most.
        by_position: Whether positions are squared one by one: for weights a batch is then as good
            as its samples.
    """
    if by_position:
        known = _weights_of(routes.whole)
        routes = replace(routes, singles=[name for name in routes.singles if name not in known])
    if structure == "diagonal":
        return (routes if by_position else replace(routes, whole=())), {}
    factors = _with_factors([*routes.layers, *routes.whole], limit)
    if not by_position:
        whole = [layer for layer in routes.whole if layer.names.get("weight") in factors]
        routes = replace(routes, whole=whole)
    if structure == "kronecker":
        in_factors = set(_names_of(factors.values()))
        singles = [name for name in routes.singles if name not in in_factors]
        routes = replace(routes, singles=singles)
    return routes, factors


def _weights_of(layers: Iterable[Layer]) -> set[str]:
    return {layer.names["weight"] for layer in layers if "weight" in layer.names}


def _names_of(layers: Iterable[Layer]) -> Iterator[str]:
    return (name for layer in layers for name in layer.names.values())


def _with_factors(layers: Sequence[Layer], limit: int) -> dict[str, Layer]:
    places: dict[str, int] = {}
    for layer in layers:
        for name in layer.names.values():
            places[name] = places.get(name, 0) + 1
    used_by = {}
    for layer in layers:
        weight = layer.names.get("weight")
        sizes = _factor_sizes(layer.module)
        alone = all(places[name] == 1 for name in layer.names.values())
        if layer.rule.has_factors and weight and alone and sizes and max(sizes) <= limit:
            used_by[weight] = layer
    return used_by


def _factor_sizes(module: nn.Module) -> tuple[int, int] | None:
    weight = leaf(module, "weight")
    if weight is None or getattr(module, "groups", 1) != 1:
        return None
    return weight.shape[0], weight[0].numel()


def layer_of(name: str) -> str:
    """Qualified name of the layer of a parameter."""
    return name.rpartition(".")[0]
