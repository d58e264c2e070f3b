import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.cli._plan import Taken, estimate, in_mib, in_words, watched

MIB = 2**20


def calibration(samples=64, **options):
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(samples, 32), torch.randint(4, (samples,)))]
    return Calibration(model, data, cross_entropy, **options)


def test_sizes_are_those_of_the_gradients():
    plan = estimate(calibration())
    assert (plan.samples, plan.gradients, plan.weights) == (64, 64, 576)
    assert plan.gradient_mb == 64 * 576 * 4 / MIB
    assert plan.disk_mb == 0
    assert plan.engine == "layers"
    assert plan.gradient_seconds > 0


def test_mini_batches_make_fewer_gradients():
    plan = estimate(calibration(mini_batch=4))
    assert (plan.samples, plan.gradients, plan.engine) == (64, 16, "layers")


def test_float64_gradients_take_twice_the_memory():
    model = nn.Linear(32, 4, dtype=torch.float64)
    data = [(torch.randn(64, 32, dtype=torch.float64), torch.randint(4, (64,)))]
    assert estimate(Calibration(model, data, cross_entropy)).gradient_mb == 64 * 128 * 8 / MIB


def test_gradients_over_half_the_budget_go_to_a_file():
    size = 64 * 576 * 4 / MIB
    assert estimate(calibration(memory_mb=2.01 * size)).disk_mb == 0
    assert estimate(calibration(memory_mb=size)).disk_mb == size
    assert estimate(calibration(memory_mb=size, offload="host")).disk_mb == 0


def test_the_peak_is_smaller_where_gradients_are_in_a_file():
    size = 64 * 576 * 4 / MIB
    peaks = [estimate(calibration(memory_mb=size * share)).peak_mb for share in (0.5, 3, 1000)]
    assert peaks[0] + size <= peaks[1] <= peaks[2]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_planned_gradients_are_those_that_are_taken(steps):
    planned = calibration(mini_batch=2)
    plan = estimate(planned, steps)
    with watched(planned, torch.device("cpu")) as watch:
        prune_global(None, "woodtaylor", amount=0.5, calibration=planned, steps=steps)
    assert watch.taken.gradients == plan.gradients * steps == 32 * steps
    assert 0 < watch.taken.gradient_seconds < watch.taken.seconds


def test_the_comparison_names_both():
    plan = estimate(calibration(), 2)
    words = plan.comparison(Taken(100, 3.0, 9.0, 12.0))
    assert words.startswith("took 9 s in all, 100 gradients (planned 128) in 3 s (planned ")
    assert "memory grew by 12 MiB (planned up to " in words
    plan = estimate(calibration(), 2, keeps_gradients=False)
    assert plan.comparison(Taken(0, 0.0, 2.0, None)) == "took 2 s in all"


def test_methods_that_keep_sums_alone_have_no_plan_for_gradients():
    assert len(estimate(calibration()).lines()) == 3
    (line,) = estimate(calibration(), keeps_gradients=False).lines()
    assert "64 samples, sums over their gradients" in line


def test_pruned_weights_do_not_count():
    pruned = calibration()
    prune_global(pruned.pairs(), "magnitude", amount=0.5)
    assert estimate(pruned).weights == 288


def test_only_a_few_samples_are_drawn_and_the_calibration_stays_usable():
    drawn = []

    class Counting:
        def __iter__(self):
            for _ in range(1000):
                drawn.append(1)
                yield torch.randn(1, 32), torch.randint(4, (1,))

    model = nn.Linear(32, 4)
    counted = Calibration(model, Counting(), cross_entropy, num_samples=1000, vectorize=False)
    before = torch.get_rng_state()
    estimate(counted)
    assert len(drawn) < 50
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert sum(len(rows) for rows in counted.gradients()) == 1000


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0312, "0.031 s"), (9.96, "10 s"), (99.9, "100 s"), (119, "119 s"), (120, "2 min"),
     (5400, "90 min"), (7200, "2 h"), (86400, "24 h")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"), [(0.0123, "0.012 MiB"), (3.69, "3.7 MiB"), (1024, "1,024 MiB")]
)
def test_sizes_in_words(size, words):
    assert in_mib(size) == words
