"""WoodFisher and WoodTaylor against the papers' equations, and on the papers' own model."""

from math import ceil
from statistics import mean

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from tests.references import fisher as reference
from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist
from torchprune_bayes import Calibration, EmpiricalFisher, WoodFisher, WoodTaylor, prune_global
from torchprune_bayes._numerics.partition import partition
from torchprune_bayes.costs import flops_per_weight
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.methods import PaperVariant, _obs_step, woodfisher

FIXED = {"damping": 1e-2, "update_scale": 1.0, "stages": 1, "block_size": "full"}
METHODS = [WoodFisher, WoodTaylor]


def make_calibration(seed: int = 0, **options) -> Calibration:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    ).double()
    x, y = torch.randn(96, 1, 6, 6, dtype=torch.float64), torch.randint(3, (96,))
    data = list(zip(x.split(16), y.split(16), strict=True))
    options = {"num_samples": 48, **options}
    return Calibration(model, data, nn.functional.cross_entropy, **options)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("update", ["none", "single", "joint"])
def test_one_step_is_the_paper_s_selection_and_update(update):
    calibration = make_calibration()
    gradients = torch.cat(list(calibration.gradients()))
    weights = flat(calibration.space.values())
    inverse = torch.linalg.inv(reference.damped_fisher(gradients, 1e-2))
    scores = weights.square() / (2 * inverse.diagonal())
    keep = scores > scores.kthvalue(round(0.6 * len(scores))).values
    decision = WoodFisher(0.6, calibration=calibration, update=update, **FIXED).decide(
        calibration.space
    )
    torch.testing.assert_close(flat(decision.scores), scores)
    assert torch.equal(flat(decision.masks), keep)
    if update == "none":
        assert decision.updates is None
    else:
        twin = {"single": reference.single_update, "joint": reference.joint_update}[update]
        moved = weights + twin(gradients, 1e-2, weights, keep, step=0.0)
        torch.testing.assert_close(flat(decision.updates), moved, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_woodtaylor_is_the_paper_s_first_order_rule(eta):
    calibration = make_calibration()
    gradients = torch.cat(list(calibration.gradients()))
    weights = flat(calibration.space.values())
    inverse = torch.linalg.inv(reference.damped_fisher(gradients, 1e-2))
    descent = eta * inverse @ gradients.mean(0)
    scores = (weights - descent).square() / (2 * inverse.diagonal())
    keep = scores > scores.kthvalue(round(0.6 * len(scores))).values
    method = WoodTaylor(0.6, calibration=calibration, gradient_step=eta, **FIXED)
    decision = method.decide(calibration.space)
    assert torch.equal(flat(decision.masks), keep)
    moved = weights + reference.joint_update(gradients, 1e-2, weights, keep, step=eta)
    torch.testing.assert_close(flat(decision.updates), moved, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("first", [0, 1, 2], ids=["small", "large", "every second gradient first"])
@pytest.mark.parametrize("block_size", ["full", "tensor", 40, 5])
def test_stages_prune_by_scores_of_what_the_stage_before_left(block_size, first, monkeypatch):
    """In blocks that are cut once and lose entries, or in a small network cut anew for scores."""
    if first:
        monkeypatch.setattr(_obs_step, "_MOST_FOR_TRIALS", 10)
    if first == 2:
        monkeypatch.setattr(woodfisher, "_MANY_GRADIENTS", 2)
    calibration = make_calibration()
    blocks = EmpiricalFisher(block_size=block_size).fit(calibration).blocks
    gradients = torch.cat(list(calibration.gradients()))
    weights = flat(calibration.space.values())
    keep, moved = torch.ones_like(weights, dtype=torch.bool), weights
    for share in (0.3, 0.6):
        scores, left = torch.full_like(weights, -torch.inf), keep.nonzero().flatten()
        if first:
            parts = [left[(left >= start) & (left < stop)] for start, stop in blocks]
        else:
            entries = [tensor.leaf.numel() for tensor in calibration.space]
            sizes = [int(part.sum()) for part in keep.split(entries)]
            parts = [left[start:stop] for start, stop in partition(sizes, block_size)]
        for left in parts:
            used = gradients[:: 2 if first == 2 and share == 0.3 and len(blocks) > 1 else 1, left]
            inverse = torch.linalg.inv(reference.damped_fisher(used, 1e-2))
            scores[left] = moved[left].square() / (2 * inverse.diagonal())
        keep, moved = scores > scores.kthvalue(round(share * len(scores))).values, weights.clone()
        for part in (slice(*block) for block in blocks):
            moved[part] += reference.joint_update(
                gradients[:, part], 1e-2, weights[part], keep[part], step=0.0
            )
    options = {**FIXED, "stages": 2, "path": "linear", "block_size": block_size}
    decision = WoodFisher(0.6, calibration=calibration, **options).decide(calibration.space)
    assert torch.equal(flat(decision.masks), keep)
    torch.testing.assert_close(flat(decision.updates), moved, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weights", [1, 2, 3])
def test_a_stage_may_leave_nothing_for_the_next(weights):
    model = nn.Linear(weights, 1, bias=False)
    data = [(torch.randn(8, weights), torch.randn(8, 1))]
    calibration = Calibration(model, data, nn.functional.mse_loss)
    decision = WoodFisher(1.0, calibration=calibration, stages=6).decide(calibration.space)
    assert not flat(decision.masks).any()


@pytest.mark.parametrize("block_size", [16, "tensor", "full"])
def test_after_all_stages_the_update_is_that_of_all_that_was_pruned(block_size):
    calibration = make_calibration()
    options = {**FIXED, "stages": 3, "block_size": block_size}
    decision = WoodFisher(0.7, calibration=calibration, **options).decide(calibration.space)
    fisher = EmpiricalFisher(block_size=block_size).fit(calibration)
    gradients = torch.cat(list(calibration.gradients()))
    weights, keep = flat(calibration.space.values()), flat(decision.masks)
    moved = torch.cat(
        [
            weights[start:stop]
            + reference.joint_update(
                gradients[:, start:stop], 1e-2, weights[start:stop], keep[start:stop], step=0.0
            )
            for start, stop in fisher.blocks
        ]
    )
    torch.testing.assert_close(flat(decision.updates), moved, rtol=1e-7, atol=1e-9)


def test_steps_take_fresh_gradients_at_the_moved_weights():
    calibration = make_calibration()
    options = {**FIXED, "path": "linear"}
    first = WoodFisher(0.3, calibration=calibration, **options).decide(calibration.space)
    both = WoodFisher(0.6, calibration=calibration, steps=2, **options).decide(calibration.space)
    again = calibration.redrawn(1)
    fisher = EmpiricalFisher(block_size="full", damping=1e-2).fit(again, first.updates, first.masks)
    moved = fisher.remaining.gather(first.updates)
    scores = moved.square() / (2 * fisher.inverse_diagonal())
    total = sum(mask.numel() for mask in first.masks.values())
    pruned = round(0.6 * total) - round(0.3 * total)
    keep = scores > scores.kthvalue(pruned).values
    assert torch.equal(fisher.remaining.gather(both.masks), keep)
    assert [round(step["sparsity"], 2) for step in both.info["steps"]] == [0.3, 0.6]


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_of_damping_and_scale_lowers_the_held_out_loss(method):
    calibration = make_calibration()
    chosen = method(0.7, calibration=calibration).decide(calibration.space)
    report = chosen.info["steps"][0]
    assert report["in_sample"] is False
    assert report["loss"] == calibration.held_out_loss(chosen.updates).value
    masked = {name: v * chosen.masks[name] for name, v in calibration.space.values().items()}
    if method is WoodFisher:  # a scale of 0 is among the candidates
        assert report["loss"] <= calibration.held_out_loss(masked).value


def test_a_calibration_without_further_samples_says_so():
    calibration = make_calibration(num_samples=96)
    decision = WoodFisher(0.5, calibration=calibration).decide(calibration.space)
    assert decision.info["steps"][0]["in_sample"] is True


def test_flops_power_and_target_count_the_work_of_each_layer():
    calibration = make_calibration()
    plain = WoodFisher(0.5, calibration=calibration, **FIXED).decide(calibration.space)
    aware = WoodFisher(0.5, calibration=calibration, compat=PaperVariant(flops_power=1.0), **FIXED)
    aware_decision = aware.decide(calibration.space)
    costs = flops_per_weight(calibration)

    def flops(masks):
        return sum(costs[name] * int(mask.sum()) for name, mask in masks.items())

    assert flops(aware_decision.masks) < flops(plain.masks)
    dense = sum(costs[t.name] * t.leaf.numel() for t in calibration.space)
    met = WoodFisher(None, calibration=calibration, flops_target=0.4, **FIXED)
    kept = flops(met.decide(calibration.space).masks)
    assert 0.4 * dense - max(costs.values()) < kept <= 0.4 * dense


def test_layer_scope_prunes_every_tensor_alike():
    calibration = make_calibration()
    decision = WoodFisher(0.5, calibration=calibration, scope="layer", **FIXED).decide(
        calibration.space
    )
    for mask in decision.masks.values():
        assert int((~mask).sum()) == round(0.5 * mask.numel())


def test_paper_compatibility_prunes_one_more_and_keeps_its_epsilon():
    calibration = make_calibration()
    options = {**FIXED, "update": "none"}
    exact = WoodFisher(0.5, calibration=calibration, **options).decide(calibration.space)
    paper = WoodFisher(0.5, calibration=calibration, compat="paper", **options).decide(
        calibration.space
    )
    total = len(flat(exact.masks))
    assert int(flat(exact.masks).sum()) == total - round(0.5 * total)
    assert int(flat(paper.masks).sum()) == ceil(0.5 * total) - 1
    assert (flat(exact.masks) | ~flat(paper.masks)).all()
    torch.testing.assert_close(flat(paper.scores), 2 * flat(exact.scores))


@pytest.mark.parametrize("method", METHODS)
def test_a_fitted_curvature_takes_the_place_of_the_data(method):
    calibration = make_calibration()
    fisher = EmpiricalFisher(block_size="full", damping=1e-2).fit(calibration)
    options = {"update_scale": 1.0, "stages": 1}
    if method is WoodTaylor:
        options["gradient_step"] = 0.1
    by_curvature = method(0.5, curvature=fisher, damping=1e-2, **options).decide(calibration.space)
    by_data = method(0.5, calibration=calibration, **(FIXED | options)).decide(calibration.space)
    assert torch.equal(flat(by_curvature.updates), flat(by_data.updates))


def test_a_curvature_of_other_entries_is_refused():
    calibration = make_calibration()
    fisher = EmpiricalFisher().fit(calibration)
    masks = {name: torch.rand(m.shape) < 0.5 for name, m in calibration.space.masks().items()}
    other = EmpiricalFisher().fit(calibration, masks=masks)
    with pytest.raises(AlignmentError, match="fit it again"):
        WoodFisher(0.5, curvature=other, **FIXED).decide(calibration.space)
    with pytest.raises(ArgumentError, match="fresh gradients"):
        WoodFisher(0.5, curvature=fisher, steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "best"}, "`update` to be one of"),
        ({"damping": 0.0}, "`damping`"),
        ({"damping": "small"}, "`damping`"),
        ({"update_scale": 2.0}, "`update_scale`"),
        ({"steps": 0}, "`steps`"),
        ({"stages": 0}, "`stages`"),
        ({"path": "straight"}, "`path` to be one of"),
        ({"scope": "model"}, "`scope` to be one of"),
        ({"compat": "code"}, "`compat` to be None, 'paper', or a PaperVariant"),
        ({"flops_target": 0.5}, "either `amount` or `flops_target`"),
        ({"block_size": 0}, "`block_size`"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        WoodFisher(0.5, calibration=make_calibration(), **options)


def test_without_calibration_and_curvature_it_says_what_is_missing():
    with pytest.raises(ArgumentTypeError, match="calibration=Calibration"):
        prune_global(None, WoodFisher, amount=0.5)


@pytest.fixture(scope="module")
def mnist(shared_data):
    return load_mnist(shared_data)


def pruned_accuracy(shared_data, mnist, method, amount, seed, num_samples=100, **options):
    train_x, train_y, test_x, test_y = mnist
    model, data = load_mlpnet(shared_data), TensorDataset(train_x, train_y)
    sampler = BatchSampler(RandomSampler(data), 1000, drop_last=False)
    loader = DataLoader(data, sampler=sampler, batch_size=None)
    mini_batch = options.pop("mini_batch", 1)
    calibration = Calibration(
        model,
        loader,
        nn.functional.cross_entropy,
        num_samples=num_samples,
        mini_batch=mini_batch,
        seed=seed,
    )
    prune_global(None, method, amount=amount, calibration=calibration, **options)
    return accuracy(model, test_x, test_y)


PAPER = {"block_size": "tensor", "damping": 1e-5, "update": "single", "update_scale": 1.0}


def test_golden_dense_and_magnitude(shared_data, mnist):
    _, _, test_x, test_y = mnist
    assert round(accuracy(load_mlpnet(shared_data), test_x, test_y), 2) == 93.97
    published = [93.93, 93.78, 93.62, 92.89, 90.30, 83.64, 32.25]
    for sparsity, expected in zip([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98], published, strict=True):
        model = load_mlpnet(shared_data)
        pairs = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)]
        prune_global(pairs, "magnitude", amount=sparsity, compat="paper")
        assert round(accuracy(model, test_x, test_y), 2) == expected


@pytest.mark.parametrize("compat", [None, "paper"])
def test_golden_woodfisher_at_95_percent(shared_data, mnist, compat):
    found = [
        pruned_accuracy(shared_data, mnist, WoodFisher, 0.95, seed, compat=compat, **PAPER)
        for seed in range(8)
    ]
    assert 83.7 <= mean(found) <= 84.8


@pytest.mark.parametrize(("sparsity", "published"), [(0.9, 90.88), (0.8, 93.20), (0.5, 93.93)])
def test_golden_woodfisher_below(shared_data, mnist, sparsity, published):
    found = [
        pruned_accuracy(shared_data, mnist, WoodFisher, sparsity, seed, **PAPER)
        for seed in range(8)
    ]
    assert abs(mean(found) - published) <= 0.3


def test_several_steps_beat_one(shared_data, mnist):
    options = {"num_samples": 100 * 16, "mini_batch": 16, "damping": 3e-3, "seed": 0}
    one = pruned_accuracy(shared_data, mnist, WoodFisher, 0.98, **options)
    several = pruned_accuracy(shared_data, mnist, WoodFisher, 0.98, steps=8, **options)
    descending = pruned_accuracy(shared_data, mnist, WoodTaylor, 0.98, steps=8, **options)
    assert several > one + 10
    assert descending > several
