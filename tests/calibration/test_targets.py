from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.calibration.cases import CLASSES, assert_same, collected, mlp, mlp_calibration, mlp_data
from torchprune_bayes import Calibration
from torchprune_bayes.calibration import Batch
from torchprune_bayes.errors import CalibrationError


class LanguageModel(nn.Module):
    """Returns logits, and the loss that Hugging Face's causal language models have."""

    def __init__(self, *, shifted: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)
        self.shifted = shifted

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        logits = 4 * self.head(self.embedding(ids))
        kept = slice(0, -1) if self.shifted else slice(None)
        moved = slice(1, None) if self.shifted else slice(None)
        loss = cross_entropy(logits[:, kept].flatten(0, 1), labels[:, moved].flatten())
        return type("Output", (), {"logits": logits, "loss": loss})()


def labels_of(batches: Any) -> Tensor:
    return torch.cat(
        [batch["labels"] if isinstance(batch, dict) else batch[1] for batch in batches]
    )


def language_data(samples: int, length: int = 5) -> list[Batch]:
    ids = torch.randint(7, (1, length)).expand(samples, -1)
    return [{"ids": part, "labels": part.clone()} for part in ids.split(100)]


def test_draws_follow_the_models_predictions() -> None:
    model = mlp()
    x = mlp_data((1,))[0][0]
    data = [(x.expand(2000, -1), torch.zeros(2000, dtype=torch.long))]
    calibration = mlp_calibration(model, data=data, fisher="true", num_samples="all")
    counts = labels_of(calibration.fisher_batches()).bincount(minlength=CLASSES)
    expected = 2000 * model.eval()(x).softmax(-1)[0].detach()
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 20  # with two degrees of freedom: exceeded once in 22,000 times


def test_draws_do_not_depend_on_how_samples_are_grouped() -> None:
    data = mlp_data((40, 60))
    calibration = mlp_calibration(data=data, fisher="true")
    drawn = labels_of(calibration.fisher_batches())
    assert torch.equal(labels_of(calibration.fisher_batches(size=7)), drawn)
    expected = collected(
        mlp_calibration(data=[(torch.cat([x for x, _ in data]), drawn)]),
    )
    for options in ({}, {"vectorize": False}, {"memory_mb": 0.01}):
        found = collected(mlp_calibration(data=data, fisher="true", **options))
        assert_same(found, expected)
    pairs = collected(mlp_calibration(data=data, fisher="true", mini_batch=2))
    torch.testing.assert_close(pairs, expected.unflatten(0, (-1, 2)).mean(1))


def test_draws_depend_on_the_seed_and_on_the_weights() -> None:
    calibration = mlp_calibration(data=mlp_data((100,)), fisher="true")
    drawn = labels_of(calibration.fisher_batches())
    assert not torch.equal(labels_of(calibration.reseeded(1).fisher_batches()), drawn)
    weights = {name: 10 * value for name, value in calibration.space.values().items()}
    assert not torch.equal(labels_of(calibration.fisher_batches(weights)), drawn)


def test_the_empirical_fisher_keeps_the_labels() -> None:
    drawn = labels_of(mlp_calibration().fisher_batches())
    assert torch.equal(drawn, labels_of(mlp_data()))


@pytest.mark.parametrize("shifted", [True, False])
def test_labels_are_drawn_where_the_loss_compares_them(shifted: bool) -> None:
    torch.manual_seed(0)
    model, samples = LanguageModel(shifted=shifted), 3000
    data = language_data(samples)
    calibration = Calibration(model, data, fisher="true", num_samples="all")
    drawn = labels_of(calibration.fisher_batches())
    ids = data[0]["ids"][:1]
    predicted = model(ids, ids).logits.softmax(-1)[0].detach()
    places = range(1, 5) if shifted else range(5)
    for place in places:
        found = drawn[:, place].bincount(minlength=7) / samples
        expected = predicted[place - 1 if shifted else place]
        assert (found - expected).abs().max() < 5 * (0.25 / samples) ** 0.5  # five deviations
    if shifted:
        assert torch.equal(drawn[:, 0], labels_of(data)[:, 0])


def test_ignored_labels_stay_ignored() -> None:
    model = LanguageModel(shifted=True)
    data = language_data(8)
    data[0]["labels"][:, 3:] = -100
    data[0]["labels"][2] = -100
    calibration = Calibration(model, data, fisher="true")
    drawn = labels_of(calibration.fisher_batches())
    assert torch.equal(drawn == -100, labels_of(data) == -100)
    rows = collected(calibration)
    assert not rows[2].any()
    assert rows[0].any()


@pytest.mark.parametrize(
    ("target", "loss_fn"),
    [
        (torch.randn(4, CLASSES, dtype=torch.float64), nn.functional.mse_loss),
        (torch.zeros(4, 2, dtype=torch.long), lambda output, target: output.sum()),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(target: Tensor, loss_fn: Any) -> None:
    data = [(mlp_data((4,))[0][0], target)]
    with pytest.raises(CalibrationError, match="integer labels for fisher='true'"):
        collected(mlp_calibration(data=data, loss_fn=loss_fn, fisher="true"))


def test_another_loss_than_the_cross_entropy_is_refused() -> None:
    def smoothed(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target, label_smoothing=0.1)

    with pytest.raises(CalibrationError, match="mean cross-entropy of the logits"):
        collected(mlp_calibration(loss_fn=smoothed, fisher="true"))
