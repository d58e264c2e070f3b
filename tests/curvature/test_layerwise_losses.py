"""What is the loss of a sample, for losses that are means in different ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from tests.references.layer_curvature import empirical_diagonal, ggn, split
from torchprune_bayes import OPD, Calibration, LayerCurvature, SpaM
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.laplace import fit_posterior

WORDS, IGNORED = 6, -1
CLASS_WEIGHTS = torch.tensor([1.0, 10.0, 0.1, 2.0, 5.0, 0.5], dtype=torch.float64)


def _classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, WORDS))


def _tagger() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, 4), nn.Tanh(), nn.Linear(4, WORDS))


def _vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(WORDS, (12,), generator=generator)


def _texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (12, 5), generator=generator)
    lengths = torch.randint(1, 6, (12, 1), generator=generator)
    return ids, torch.where(torch.arange(5) < lengths, ids.roll(1, 1), IGNORED)


def _of_tokens(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    return cross_entropy(f.mT, y, ignore_index=IGNORED, **options)


def _balanced(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f, y, weight=CLASS_WEIGHTS, reduction="none").mean()


def _of_sequences(f: Tensor, y: Tensor) -> Tensor:
    """A mean over sequences of means over their tokens."""
    tokens = _of_tokens(f, y, reduction="none")
    return (tokens.sum(1) / (y != IGNORED).sum(1)).mean()


def _padded_to_length(f: Tensor, y: Tensor) -> Tensor:
    """Tokens that do not count are in the denominator."""
    return _of_tokens(f, y, reduction="none").mean()


def _masked_elsewhere(f: Tensor, y: Tensor) -> Tensor:
    """A mask that the labels do not show."""
    mask = (y % 2 == 0) & (y != IGNORED)
    return (_of_tokens(f, y, reduction="none") * mask).sum() / mask.sum().clamp_min(1)


Loss = Callable[[Tensor, Tensor], Tensor]
Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Loss]
MEANS: dict[str, Case] = {
    "classes": (_classifier, _vectors, cross_entropy),
    "smoothed": (_classifier, _vectors, lambda f, y: cross_entropy(f, y, label_smoothing=0.1)),
    "weights over samples": (_classifier, _vectors, _balanced),
    "squares": (_classifier, lambda: (_vectors()[0], _vectors()[0][:, :1]), mse_loss),
    "tokens": (_tagger, _texts, _of_tokens),
    "sequences": (_tagger, _texts, _of_sequences),
    "padded": (_tagger, _texts, _padded_to_length),
}
OTHERS: dict[str, Case] = {
    "class weights": (
        _classifier,
        _vectors,
        lambda f, y: cross_entropy(f, y, weight=CLASS_WEIGHTS),
    ),
    "class weights of tokens": (
        _tagger,
        _texts,
        lambda f, y: _of_tokens(f, y, weight=CLASS_WEIGHTS),
    ),
    "sum": (_classifier, _vectors, lambda f, y: cross_entropy(f, y, reduction="sum")),
    "mask elsewhere": (_tagger, _texts, _masked_elsewhere),
    "compared": (_classifier, _vectors, lambda f, y: cross_entropy(f @ f.mT, y.argsort())),
}

orders = st.permutations(range(12))
cuts = st.lists(st.integers(1, 11), unique=True, max_size=3).map(sorted)


def _fit(case: Case, order: list[int], cut: list[int], **options: Any) -> LayerCurvature:
    make, data, loss_fn = case
    torch.manual_seed(0)
    x, y = data()
    rows = torch.tensor(order).tensor_split(cut)
    batches = [(x[part], y[part]) for part in rows]
    curvature = LayerCurvature(ignore_index=IGNORED, **options)
    model = make().double()
    return curvature.fit_model(model, batches, loss_fn)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", MEANS)
@settings(max_examples=10)
@given(order=orders, cut=cuts)
def test_means_give_the_same_in_any_order_and_batches(
    name: str, order: list[int], cut: list[int]
) -> None:
    make, data, loss_fn = MEANS[name]
    torch.manual_seed(0)
    model, (x, y) = make().double(), data()
    found = _fit(MEANS[name], order, cut)
    sums = (y != IGNORED).sum(1).tolist() if name == "tokens" else []
    expected = empirical_diagonal(model, [(x, y)], loss_fn, trainable_parameters(model), sums)
    for key, value in expected.items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=1e-8, atol=1e-14)
    assert not any("one by one" in how for how in found.coverage.values())


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "mask elsewhere"])
@settings(max_examples=10)
@given(order=orders, cut=cuts)
@example(order=[0, 7, 10, 4, 3, 5, 6, 1, 8, 9, 2, 11], cut=[4])  # agrees on all, not on halves
def test_other_losses_are_refused_in_any_order_and_batches(
    name: str, order: list[int], cut: list[int]
) -> None:
    with pytest.raises(CalibrationError, match="Expected a loss that is a mean over samples"):
        _fit(OTHERS[name], order, cut)


@pytest.mark.parametrize("order", [list(range(12)), list(range(12))[::-1]])
def test_a_mask_that_labels_do_not_show_is_refused_where_samples_show_it(order: list[int]) -> None:
    """In small batches it may happen to cover equal shares of all samples that are compared."""
    with pytest.raises(CalibrationError, match="Expected a loss that is a mean over samples"):
        _fit(OTHERS["mask elsewhere"], order, [])


def test_samples_that_differ_late_are_compared_as_well() -> None:
    """Class weights cancel among samples of one class, of which the first batches are."""
    y = _vectors()[1]
    order = y.argsort()
    with pytest.raises(CalibrationError, match="Expected a loss that is a mean over samples"):
        _fit(OTHERS["class weights"], order.tolist(), [int((y == y.min()).sum())])


def test_sums_begin_again_where_a_late_batch_tells_the_rule() -> None:
    same_length = (_texts()[1] != IGNORED).all(1)
    late = same_length.int().argsort(descending=True, stable=True).tolist()
    for name in ("padded", "sequences"):
        found = _fit(MEANS[name], late, [int(same_length.sum())])
        expected = _fit(MEANS[name], late[::-1], [])
        torch.testing.assert_close(found.diagonal(), expected.diagonal())
    y = _vectors()[1]
    order = y.argsort()
    one_class = [int((y == y.min()).sum()) // 2 * 2]
    weighted = [
        _fit(OTHERS["class weights"], order.tolist(), cut, mini_batch=2) for cut in (one_class, [])
    ]
    torch.testing.assert_close(weighted[0].diagonal(), weighted[1].diagonal())
    assert all("one by one" in how for how in weighted[0].coverage.values())


def test_unverified_the_loss_is_taken_as_it_is() -> None:
    assert _fit(OTHERS["class weights"], list(range(12)), [], verify=False).count == 12


def test_labels_that_are_all_ignored_are_refused() -> None:
    ids, _ = _texts()
    nothing = torch.full_like(ids, IGNORED)
    with pytest.raises(CalibrationError, match="no label counts"):
        LayerCurvature(ignore_index=IGNORED).fit_model(_tagger(), [(ids, nothing)], _of_tokens)


@pytest.mark.parametrize("ignored", [-1, 0, 5])
def test_one_option_reaches_all_that_is_made_of_curvature(ignored: int) -> None:
    """The same as with the label of PyTorch's default."""
    torch.manual_seed(0)
    ids, labels = _texts()
    labels = torch.where(labels == IGNORED, ignored, labels)
    plain = torch.where(labels == ignored, -100, labels)

    def loss_fn(f: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(f.mT, y, ignore_index=ignored)

    model = _tagger()
    named = Calibration(model, [(ids, labels)], loss_fn, ignore_index=ignored)
    usual = Calibration(model, [(ids, plain)], lambda f, y: cross_entropy(f.mT, y))
    pairs = [
        (fit_posterior(c).log_marginal_likelihood(), OPD(0.5, calibration=c).decide(c.space))
        for c in (named, usual)
    ]
    assert pairs[0][0] == pytest.approx(pairs[1][0], rel=1e-5)
    torch.testing.assert_close(pairs[0][1].masks, pairs[1][1].masks)
    terms = float((plain != -100).sum() / 12)
    spam = SpaM(torch.optim.SGD(model.parameters()), named, every=1, labels_per_sample=terms)
    assert spam.step() is not None
    fitted = LayerCurvature().fit(named)
    torch.testing.assert_close(fitted.diagonal(), LayerCurvature().fit(usual).diagonal())


def _segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))


def _one_logit() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))


def _images(classes: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (8, *shape), generator=generator)


DENSE: dict[str, Case] = {
    "dense": (_segmenter, lambda: _images(3, 3, 3), cross_entropy),
    "one logit": (
        _one_logit,
        lambda: (_vectors()[0], (_vectors()[1] % 2).double()),
        binary_cross_entropy_with_logits,
    ),
    "dense and binary": (
        lambda: nn.Conv2d(2, 1, 3, padding=1),
        lambda: (_images(2)[0], _images(2, 1, 3, 3)[1].double()),
        binary_cross_entropy_with_logits,
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_labels_and_single_logits_have_second_derivatives(name: str) -> None:
    make, data, loss_fn = DENSE[name]
    torch.manual_seed(0)
    model, (x, y) = make().double(), data()
    found = LayerCurvature("monte_carlo", draws=800).fit_model(model, [(x, y)], loss_fn)
    exact = split(ggn(model, x, y, loss_fn).diagonal(), model)
    labels = 9 if name == "dense" else 1  # its loss is a sum over the pixels
    for key, value in exact.items():
        difference = (found.diagonal()[key] - labels * value).norm() / (labels * value).norm()
        assert difference < 0.15, key
    calibration = Calibration(model, [(x, y)], loss_fn)
    assert OPD(0.5, calibration=calibration).decide(calibration.space).scores
    optimizer = torch.optim.SGD(model.parameters())
    spam = SpaM(optimizer, calibration, every=1, labels_per_sample=labels)
    assert spam.step() is not None


def test_one_logit_has_the_exact_gauss_newton_matrix() -> None:
    make, data, loss_fn = DENSE["one logit"]
    torch.manual_seed(0)
    model, (x, y) = make().double(), data()
    found = LayerCurvature("ggn", "both").fit_model(
        model, [(x[:5], y[:5]), (x[5:], y[5:])], loss_fn
    )
    exact = split(ggn(model, x, y, loss_fn).diagonal(), model)
    for key, value in exact.items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=1e-9, atol=1e-14)


def test_errors_do_not_recommend_what_already_ran() -> None:
    make, data, _ = DENSE["dense"]
    x, _ = data()
    recommended: list[tuple[Any, str]] = [
        ("monte_carlo", "kind='empirical'"),
        ("ggn", "kind='monte_carlo'"),
    ]
    for kind, advice in recommended:
        with pytest.raises(CalibrationError, match=f"take {advice}"):
            LayerCurvature(kind).fit_model(make().double(), [(x, x[:, :1])], _all_squares)


def _all_squares(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().mean()
