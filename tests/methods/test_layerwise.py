"""Scores of any method, and layers that are solved anew for what is left of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.curvature.test_layer_inputs import Experts, Twice, bert, gpt2
from tests.references.layer_update import solved_rows, swept
from torchprune_bayes import (
    Calibration,
    GradualPruner,
    linear,
    prunable_parameters,
    prune_global,
)
from torchprune_bayes._numerics.layer_update import damped
from torchprune_bayes.curvature.layer_inputs import LayerInputs
from torchprune_bayes.curvature.layers.inputs import matrix_of
from torchprune_bayes.errors import ArgumentError, CalibrationWarning
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import registered_methods

SCORES = ["magnitude", "opd", "kfac", "diagonal-fisher", "snip", "synflow", "woodfisher"]
OURS = {
    name: entry.method
    for name, entry in registered_methods().items()
    if issubclass(entry.method, PruningMethod) and not entry.is_structured
}
MOVING = [name for name, kind in OURS.items() if kind.always_moves]
SCORING = [name for name, kind in OURS.items() if not kind.always_moves]


def calibrated(model: nn.Module, data, params=None) -> Calibration:
    params = prunable_parameters(model, exclude=excluded_from(model)) if params is None else params
    samples = sum(len(next(iter(b.values())) if isinstance(b, dict) else b[0]) for b in data)
    loss = None if isinstance(data[0], dict) else cross_entropy
    return Calibration(model, data, loss, params=params, num_samples=samples)


def excluded_from(model: nn.Module) -> list[str]:
    return ["lm_head"] if hasattr(model, "lm_head") else []


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    x = torch.randn(64, 8)
    return model, [(x, torch.randint(4, (64,)))]


@pytest.mark.parametrize("scores", SCORES)
def test_every_method_that_scores_chooses_the_masks_of_a_step(scores):
    model, data = mlp()
    alone = {"update": "none"} if scores in ("kfac", "woodfisher") else {}
    calibration = calibrated(model, data)
    needed = {} if scores == "magnitude" else {"calibration": calibration}
    expected = prune_global(calibrated(*mlp()).pairs(), "magnitude", amount=0.5)
    if needed:
        other, _ = mlp()
        expected = prune_global(
            None, scores, amount=0.5, calibration=calibrated(other, data), **alone
        )
    found = prune_global(
        None, "layerwise", amount=0.5, calibration=calibration, scores=scores, steps=1
    )
    assert found.masks.keys() == {"0.weight", "2.weight"}
    for ours, theirs in zip(found.masks.values(), expected.masks.values(), strict=True):
        assert torch.equal(ours, theirs)


def convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    return model, [(torch.randn(64, 3, 6, 6), torch.randint(4, (64,)))]


@pytest.mark.parametrize("build", [mlp, convolutions, gpt2, lambda: bert(pad=True)])
@pytest.mark.parametrize(("solver", "literal"), [("exact", solved_rows), ("sequential", swept)])
def test_the_rows_are_least_squares_on_what_the_pruned_model_sees(build, solver, literal):
    model, data = build()
    calibration = calibrated(model, data)
    dense = {name: value.clone() for name, value in calibration.space.values().items()}
    method_options = {"scores": "magnitude", "steps": 1, "damping": 0.05, "solver": solver}
    decision = prune_global(
        None, "layerwise", amount=0.6, calibration=calibration, **method_options
    )
    moments = LayerInputs(calibration).moments()  # of the pruned model
    assert decision.updates is not None
    for name, moment in moments.items():
        tensors = (dense[name], decision.masks[name], decision.updates[name])
        parts = (matrix_of(moment.module, tensor) for tensor in tensors)  # one for each group
        for gram, rows, keep, found in zip(moment.mean, *parts, strict=True):
            expected = literal(damped(gram, 0.05), rows, keep)
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("scores", "amount", "pattern"),
    [
        (scores, amount, pattern)
        for scores in SCORING
        for amount, pattern in [(0.75, None), (None, "2:4"), (0.5, "1x4")]
        if (scores, pattern) != ("wanda", "1x4")
    ],
)
def test_all_that_scores_goes_with_updates_and_patterns(scores, amount, pattern):
    model, data = mlp()
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    calibration = calibrated(model, data)
    options = {"amount": amount, "pattern": pattern, "scores": scores, "steps": 2}
    decision = prune_global(None, "layerwise", calibration=calibration, **options)
    assert decision.updates is not None
    left = sum(int(mask.sum()) for mask in decision.masks.values())
    assert left == (36 if amount == 0.75 else 72)
    for name, mask in decision.masks.items():
        assert not decision.updates[name][~mask].any()
        groups = mask.unflatten(1, (-1, 4)).sum(-1)
        assert {None: True, "2:4": (groups == 2).all(), "1x4": (groups % 4 == 0).all()}[pattern]
    assert any(
        not torch.equal(decision.updates[n], dense[n] * m) for n, m in decision.masks.items()
    )


def test_the_scores_of_a_method_that_knows_no_patterns_are_ranked_in_them():
    model, data = mlp()
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    masks = prune_global(
        None,
        "layerwise",
        amount=None,
        pattern="2:4",
        calibration=calibrated(model, data),
        scores="magnitude",
        steps=1,
    ).masks
    for name, mask in masks.items():
        groups = dense[name].abs().unflatten(1, (-1, 4))
        expected = groups >= groups.sort(-1).values[..., 2:3]
        assert torch.equal(mask, expected.flatten(1))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_whole_groups_go_in_rounds(scope):
    model, data = mlp()
    decision = prune_global(
        None,
        "layerwise",
        amount=0.75,
        pattern="1x4",
        calibration=calibrated(model, data),
        steps=3,
        path="linear",
        scope=scope,
    )
    assert [step["kept"] for step in decision.info["steps"]] == [108, 72, 36]
    for mask in decision.masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) % 4 == 0).all()


def test_the_tokens_of_a_layer_are_squared_one_by_one():
    """Scores are ``½ w² (F_ii + λ)`` with ``F_ii = (1/N) Σ_n Σ_t g_nt² a_nt²``, by autograd."""
    model, data = gpt2()
    calibration = calibrated(model, data)
    decision = prune_global(
        None,
        "layerwise",
        amount=0.5,
        calibration=calibration,
        steps=1,
        score_options={"damping": 1e-9},
    )
    model, _ = gpt2()
    layer = model.transformer.h[1].mlp.c_fc
    squares = torch.zeros_like(layer.weight)
    for batch in data:
        for row in batch["input_ids"]:
            kept = {}
            handle = layer.register_forward_hook(
                lambda _, args, out, kept=kept: kept.update(a=args[0][0], f=out)
            )
            loss = model(input_ids=row[None], labels=row[None]).loss * 7
            handle.remove()
            (g,) = torch.autograd.grad(loss, kept["f"])
            squares += kept["a"].square().mT @ g[0].square()
    expected = layer.weight.detach().double().square() * squares / 6 / 2
    found = decision.scores["transformer.h.1.mlp.c_fc.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-12)


def test_the_token_fisher_is_found_once_from_as_many_samples_as_have_labels_enough():
    model, data = gpt2()
    found = prune_global(
        None,
        "layerwise",
        amount=0.5,
        calibration=calibrated(model, data),
        score_options={"labels": 20},
    )
    assert [step["scores"] for step in found.info["steps"]] == [{"samples": 4}] * 4


def test_an_expert_that_no_token_reaches_is_ranked_by_magnitude():
    torch.manual_seed(0)
    model = Experts()
    dense = model.experts[2].weight.detach().abs().flatten()
    calibration = calibrated(model, [(torch.randn(32, 3), torch.arange(32) % 2)])
    with pytest.warns(CalibrationWarning, match=r"weights of experts\.2\.weight stay") as warned:
        masks = prune_global(None, "layerwise", amount=9, calibration=calibration).masks
    assert len(warned) == 1  # and not one for each round
    kept = masks["experts.2.weight"].flatten()
    assert 0 < int(kept.sum()) < 6
    assert dense[kept].min() > dense[~kept].max()


def test_it_helps():
    """The pruned network's outputs are nearer to the dense ones than with the masks alone."""
    model, data = mlp()
    with torch.no_grad():
        wanted = model(data[0][0])
    errors = []
    for name, options in [("magnitude", {}), ("layerwise", {"scores": "magnitude"})]:
        model, data = mlp()
        cal = {"calibration": calibrated(model, data)} if name == "layerwise" else {}
        prune_global(prunable_parameters(model), name, amount=0.6, **cal, **options)
        with torch.no_grad():
            errors.append(float((model(data[0][0]) - wanted).square().mean()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("solver", ["iterative", "exact", "sequential"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_rounds_follow_the_path_and_end_at_the_amount(solver, scope):
    model, data = mlp()
    decision = prune_global(
        None,
        "layerwise",
        amount=0.75,
        calibration=calibrated(model, data),
        steps=3,
        path="linear",
        solver=solver,
        scope=scope,
    )
    assert [step["kept"] for step in decision.info["steps"]] == [108, 72, 36]
    assert all(not model[i].weight[~decision.masks[f"{i}.weight"]].any() for i in (0, 2))


def test_rounds_score_the_weights_that_the_last_one_left():
    results, options = [], {"scores": "opd", "solver": "exact"}
    for again in (False, True):
        model, data = mlp()
        calibration = calibrated(model, data)
        if again:
            for _ in range(2):
                decision = prune_global(
                    None, "layerwise", amount=48, calibration=calibration, steps=1, **options
                )
        else:
            decision = prune_global(
                None,
                "layerwise",
                amount=96,
                calibration=calibration,
                steps=2,
                path="linear",
                **options,
            )
        results.append((decision, model))
    (first, one), (second, two) = results
    assert all(torch.equal(first.masks[n], second.masks[n]) for n in first.masks)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("4:8", 4)])
def test_patterns(pattern, kept):
    model, data = gpt2()
    decision = prune_global(
        None, "layerwise", amount=None, pattern=pattern, calibration=calibrated(model, data)
    )
    for name, mask in decision.masks.items():
        groups = mask.mT.unflatten(1, (-1, 2 * kept)).sum(-1)
        assert (groups == kept).all(), name
    entries = sum(mask.numel() for mask in decision.masks.values())
    rounds = [step["kept"] * 2 * kept / entries for step in decision.info["steps"]]
    assert rounds == list(range(2 * kept - 1, kept - 1, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "random"}, "that scores for `scores`"),
        *[({"scores": name}, f"'{name}', which moves weights") for name in MOVING],
        ({"scores": "wanda", "pattern": "1x4"}, "like '2:4'"),
        ({"pattern": "4:2"}, "like '2:4' or '1x4'"),
        ({"score_options": {"structure": "diagonal"}}, "Expected `kind`, `labels` and `damping`"),
        ({"score_options": {"labels": 0}}, "labels"),
        ({"score_options": {"damping": 0.0}}, "damping"),
        ({"scores": "opd", "score_options": {"structure": "full"}}, "structure"),
        ({"scores": "opd", "score_options": {"posterior": None}}, "found anew in each round"),
        ({"steps": 0}, "steps"),
        ({"solver": "none"}, "solver"),
        ({"damping": 0.0}, "damping"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(options, message):
    model, data = mlp()
    with pytest.raises(ArgumentError, match=message):
        prune_global(
            None, "layerwise", **{"amount": 0.5, **options}, calibration=calibrated(model, data)
        )
    assert not hasattr(model[0], "weight_mask")


def test_layers_without_tokens_are_named_and_keep_their_weights():
    torch.manual_seed(0)
    model = Experts()
    x = torch.randn(16, 3)
    dense = model.experts[2].weight.detach().clone()
    calibration = calibrated(model, [(x, torch.zeros(16).long())])
    with pytest.warns(CalibrationWarning, match=r"weights of experts\.2\.weight stay"):
        decision = prune_global(
            None, "layerwise", amount=0.3, calibration=calibration, scores="magnitude", steps=1
        )
    mask = decision.masks["experts.2.weight"]
    assert torch.equal(model.experts[2].weight, dense * mask)
    assert decision.updates is not None
    assert not torch.equal(decision.updates["experts.0.weight"], dense)


def test_inputs_that_are_always_zero_change_nothing_else():
    model, data = mlp()
    data[0][0][:, 3] = 0.0
    calibration = calibrated(model, data)
    dense = model[0].weight.detach().clone()
    decision = prune_global(
        None, "layerwise", amount=0.4, calibration=calibration, scores="magnitude", steps=1
    )
    kept = decision.masks["0.weight"][:, 3]
    torch.testing.assert_close(model[0].weight[kept, 3], dense[kept, 3])
    assert all(value.isfinite().all() for value in decision.updates.values())


def test_a_layer_that_is_called_twice():
    torch.manual_seed(0)
    model = Twice()
    calibration = calibrated(model, [(torch.randn(16, 3), torch.zeros(16).long())])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_global(None, "layerwise", amount=0.4, calibration=calibration, scores="magnitude")
    assert int(model.shared.weight_mask.sum() + model.last.weight_mask.sum()) == 9


def test_gradual_pruning():
    model, data = mlp()
    pruner = GradualPruner(
        None,
        "layerwise",
        linear(0.5, begin=1, end=3, every=1),
        calibration=calibrated(model, data),
        steps=1,
        scores="magnitude",
    )
    for _ in range(3):
        pruner.step()
    assert pruner.sparsity == 0.5
