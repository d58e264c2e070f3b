"""The figure of loss curves."""

from __future__ import annotations

import math

import pytest

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports import loss_curves, plot_loss_curves
from torchprune_bayes.structured import LossCurve


def test_every_group_is_a_line_and_infinite_losses_are_left_out(tmp_path):
    curves = [
        LossCurve("first", 8, (0, 4, 7), (0.5, 0.7, math.inf)),
        LossCurve("second", 4, (0, 3), (0.5, 2.0)),
    ]
    path = plot_loss_curves(curves, tmp_path / "curves.svg", title="Curves")
    text = path.read_text()
    assert "first" in text
    assert "second" in text


def test_nothing_to_draw_and_other_formats_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="loss curves to draw, got none"):
        plot_loss_curves([], tmp_path / "curves.svg")
    with pytest.raises(ArgumentError, match="suffix"):
        plot_loss_curves([LossCurve("a", 2, (0, 1), (1.0, 2.0))], tmp_path / "curves.txt")


@pytest.mark.parametrize(
    ("losses", "scale"), [((0.1, 2.0), "log"), ((1.0, 1.2), "linear"), ((-3.0, 5.0), "linear")]
)
def test_the_scale_shows_all_losses(tmp_path, monkeypatch, losses, scale):
    drawn = []
    monkeypatch.setattr(loss_curves, "save_figure", lambda figure, path: drawn.append(figure))
    plot_loss_curves([LossCurve("a", 4, (0, 3), losses)], tmp_path / "curves.svg")
    assert drawn[0].axes[0].get_yscale() == scale
