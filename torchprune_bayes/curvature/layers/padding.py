"""Which tokens of a batch are padding, wherever in a model they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.calibration import Batch
from torchprune_bayes.params import unwrap


class RealTokens:
    """The tokens of a batch that its attention masks do not leave out.

    A model of an encoder and a decoder has sequences of two kinds, often of one length: its encoder
    and what reads the encoder's outputs see those of ``attention_mask``, all else those of
    ``decoder_attention_mask``, or no padding where the batch has none.

    Args:
        batch: The batch; only mappings have masks.
        model: The model.
    """

    def __init__(self, batch: Batch, model: nn.Module) -> None:
        inputs = batch if isinstance(batch, Mapping) else batch[0]
        masks = inputs if isinstance(inputs, Mapping) else {}
        self._encoder = _encoder_of(model)
        self._first = _real(masks.get("attention_mask"))
        self._second = _real(masks.get("decoder_attention_mask"))
        self._encoding = self._encoder is None
        self._encoded: list[Tensor] = []

    def rows(self, x: Tensor) -> Tensor:
        """The inputs ``[..., n]`` of a layer as rows, without those that are padding.

        The mask is matched to their first dimensions, so that tokens which a model has re-arranged,
        as mixtures of experts do, all count.
        """
        encoding = self._encoding or any(x is seen for seen in self._encoded)
        real = self._first if encoding else self._second
        if real is not None:
            if x.shape[:2] == real.shape and x.ndim == 3:
                x = x[real]
            elif x.ndim == 2 and len(x) == real.numel() != len(real):
                x = x[real.flatten()]
        return x.reshape(-1, x.shape[-1])

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow a pass, to know when the encoder runs and what it gives."""
        if self._encoder is None:
            yield
            return
        handles = [
            self._encoder.register_forward_pre_hook(self._enter),
            self._encoder.register_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._encoding = False
            self._encoded.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._encoding = True

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._encoding = False
        values = output.values() if isinstance(output, Mapping) else output
        values = [values] if isinstance(values, Tensor) else values
        self._encoded = [value for value in values if isinstance(value, Tensor)]


def all_tokens(x: Tensor) -> Tensor:
    """As :meth:`RealTokens.rows` where nothing is padding."""
    return x.reshape(-1, x.shape[-1])


Rows = Callable[[Tensor], Tensor]


def _real(mask: Any) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask != 0).all()):
        return None
    return mask != 0


def _encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a Hugging Face model that has a decoder as well."""
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    find = getattr(model, "get_encoder", None)
    found = find() if callable(find) else getattr(model, "encoder", None)
    return found if isinstance(found, nn.Module) else None
