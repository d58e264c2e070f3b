from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from torchprune_bayes import Calibration
from torchprune_bayes.calibration import LabelLayout, layout_of
from torchprune_bayes.errors import CalibrationError

CLASSES = 4


def _plain(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return cross_entropy(logits, labels, ignore_index=ignored)


def _tokens(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignored)


def _shifted(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return _tokens(logits[:, :-1], labels[:, 1:], ignored)


def _binary(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return binary_cross_entropy_with_logits(logits, labels.to(logits))


FAMILIES: dict[
    str,
    tuple[
        tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor, int], Tensor], int | None, int
    ],
] = {
    "classes": ((6, CLASSES), (6,), _plain, -1, 0),
    "tokens": ((6, 5, CLASSES), (6, 5), _tokens, -1, 0),
    "as many tokens as classes": ((6, CLASSES, CLASSES), (6, CLASSES), _tokens, -1, 0),
    "shifted": ((6, 5, CLASSES), (6, 5), _shifted, -1, 1),
    "dense": ((6, CLASSES, 2, 3), (6, 2, 3), _plain, 1, 0),
    "dense, as many places as classes": ((6, CLASSES, CLASSES), (6, CLASSES), _plain, 1, 0),
    "one logit": ((6,), (6,), _binary, None, 0),
    "one logit in a column": ((6, 1), (6, 1), _binary, None, 0),
    "binary and dense": ((6, 1, 2, 3), (6, 1, 2, 3), _binary, None, 0),
}


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 1000), ignored=st.sampled_from([-100, -1, 0, 255]))
def test_the_layout_is_found_and_draws_go_where_labels_count(
    family: str, seed: int, ignored: int
) -> None:
    shape, label_shape, loss_of, classes, shift = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(2 if classes is None else CLASSES, label_shape, generator=generator)
    if classes is not None:
        labels[torch.rand(label_shape, generator=generator) < 0.3] = ignored
        labels[0] = 1  # one counts in any case
    loss = loss_of(logits, labels, ignored)
    found = layout_of(loss, logits, labels, ignored)
    assert found == LabelLayout(classes, shift, ignored)
    drawn = found.as_labels(found.draw(logits, generator), labels)
    assert drawn.dtype == labels.dtype
    if classes is not None:
        unchanged = labels == ignored
        assert torch.equal(drawn[unchanged], labels[unchanged])
    assert layout_of(loss_of(logits, drawn, ignored), logits, drawn, ignored) == found
    assert torch.equal(found.as_logits(found.classes_last(logits)), logits)
    assert layout_of(1.01 * loss + 1e-3, logits, labels, ignored) is None


@pytest.mark.parametrize("family", ["dense", "one logit"])
def test_draws_follow_the_predictions(family: str) -> None:
    shape, label_shape, _, classes, _ = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, *shape[1:], generator=generator).expand(4000, *shape[1:])
    layout = LabelLayout(classes)
    drawn = layout.draw(logits, generator)
    assert drawn.shape == (4000, *label_shape[1:])
    if classes is None:
        assert abs(float(drawn.float().mean() - logits[0].sigmoid())) < 0.04
        return
    for label in range(CLASSES):
        share = (drawn == label).float().mean(0)
        assert (share - logits[0].softmax(0)[label]).abs().max() < 0.04


def test_labels_of_something_else_than_classes_are_no_classes() -> None:
    logits = torch.randn(6, CLASSES)
    assert layout_of(torch.tensor(1.0), logits, torch.arange(6)) is None
    assert layout_of(torch.tensor(1.0), None, torch.arange(6)) is None
    assert layout_of(torch.tensor(1.0), logits, None) is None
    assert layout_of(torch.tensor(1.0), torch.zeros(6, dtype=torch.long), torch.arange(6)) is None


def test_a_true_fisher_takes_another_ignored_label_dense_and_binary_ones() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 2, 3, 3)
    dense = torch.randint(3, (8, 3, 3))
    dense[:, 0] = 255
    convolution = nn.Conv2d(2, 3, 1)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target, ignore_index=255)

    calibration = Calibration(
        convolution, [(images, dense)], loss_fn, fisher="true", ignore_index=255
    )
    ((_, drawn),) = calibration.fisher_batches()
    assert torch.equal(drawn == 255, dense == 255)
    assert not torch.equal(drawn, dense)
    unnamed = Calibration(convolution, [(images, dense)], loss_fn, fisher="true")
    with pytest.raises(CalibrationError, match="named by ignore_index"):
        next(unnamed.fisher_batches())

    line = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    data = [(torch.randn(50, 3), torch.randint(2, (50,)).float())]
    binary = Calibration(line, data, binary_cross_entropy_with_logits, fisher="true")
    ((_, drawn),) = binary.fisher_batches()
    assert drawn.dtype == torch.float32
    assert set(drawn.tolist()) == {0.0, 1.0}
