"""CBS against its literal version, the search and the update apart, and its memory.

*Search*: both start from the largest magnitudes and lower the same ``Q(P) = ‖G_P w_P‖²/N``; neither
is timed while it is judged, and neither evaluates a loss. *Update*: the literal one runs the
rank-one recursion for ``F⁻¹`` and solves with ``(F⁻¹)_PP`` by LU. It runs as a whole on some
consecutive weights. Over all of them it takes ``3ND² + 2|P|³/3`` operations, so there a few of the
``N`` equal steps are timed, in float32, and an LU of a smaller matrix, and the rest is reckoned.
*Memory* is what torch allocates at once beside the gradients, read from its profiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from tests.references.cbs_literal import literal_search
from tests.references.fisher import inverse_by_recursion
from torchprune_bayes import Calibration, EmpiricalFisher
from torchprune_bayes._numerics.obs import joint_directions
from torchprune_bayes._numerics.swaps import SelectionObjective, swap_search

Search = Callable[[], Iterable[Tensor]]
Curve = list[tuple[float, float]]
"""Seconds and the objective after every iteration, the start first."""
_UPDATED = 1000
_DAMPING = 1e-3
_TIMED_STEPS, _TIMED_ROWS = 5, 4000


def race(calibration: Calibration, *, sparsity: float, iterations: int) -> str:
    """Run both and say how their times and objectives compare.

    Args:
        calibration: Of a model whose gradients fit into memory.
        sparsity: Of the start.
        iterations: Outer iterations of the literal search at most.
    """
    fisher = EmpiricalFisher(block_size="full").fit(calibration)
    ((_, gradients),) = fisher.whole_blocks()
    flat = fisher.remaining.gather(calibration.space.values())
    kept = flat.abs().topk(round((1.0 - sparsity) * len(flat))).indices
    start = torch.zeros_like(flat).bool().scatter(0, kept, True)

    def value(keep: Tensor) -> float:
        return float(SelectionObjective(gradients, flat[None], keep.reshape(1, -1)).value())

    def tiles() -> Iterable[Tensor]:
        return swap_search(SelectionObjective(gradients, flat[None], start[None]))

    def literal() -> Iterable[Tensor]:
        return literal_search(gradients[0], flat, start, max_iterations=iterations)

    fast, slow = _curve(tiles, value, start), _curve(literal, value, start)
    lines = [f"{gradients.shape[-2]} gradients of {len(flat)} weights, sparsity {sparsity}"]
    lines += [_line("tiles", fast), _line("literal", slow)]
    reached = next((seconds for seconds, found in fast if found <= slow[-1][1]), None)
    if reached is not None:
        lines.append(f"to the literal one's end: {slow[-1][0] / reached:.0f} times faster")
    lines.append(f"seconds per fall of the objective: {_rate(fast) / _rate(slow):.0f} times fewer")
    lines += _part_of_update(gradients, flat, start)
    lines += _whole_race(gradients, flat, start, fast, slow)
    lines.append(f"memory beside the gradients: {_peak_bytes(tiles) / 2**20:.1f} MiB")
    lines.append(f"({gradients.nbytes / 2**20:.0f} MiB of gradients, 8 D is {_mib(8 * len(flat))})")
    return "\n".join(lines)


def _part_of_update(gradients: Tensor, flat: Tensor, keep: Tensor) -> list[str]:
    """Both updates of some weights in the middle."""
    middle = slice(len(flat) // 2, len(flat) // 2 + _UPDATED)
    part, w, k = gradients[0, :, middle].double(), flat[middle].double(), keep[middle]
    began = time.perf_counter()
    inverse = inverse_by_recursion(part, _DAMPING)
    expected = -inverse[:, ~k] @ torch.linalg.solve(inverse[~k][:, ~k], w[~k])
    slow = time.perf_counter() - began
    began = time.perf_counter()
    found = joint_directions(part[None], _DAMPING, w[None], k[None]).compensation[0]
    fast = time.perf_counter() - began
    difference = float((found - expected).abs().max() / expected.abs().max())
    return [
        f"update of {_UPDATED} weights: ours {fast:.4f} s, literal {slow:.2f} s, "
        f"{slow / fast:.0f} times faster, relative difference {difference:.0e}"
    ]


def _whole_race(
    gradients: Tensor, flat: Tensor, keep: Tensor, fast: Curve, slow: Curve
) -> list[str]:
    """Search and update together, of all weights."""
    began = time.perf_counter()
    joint_directions(gradients, _DAMPING, flat[None], keep[None])
    ours = time.perf_counter() - began
    literal = _literal_update(gradients[0], int((~keep).sum()))
    times = (slow[-1][0] + literal) / (fast[-1][0] + ours)
    falls = (fast[0][1] - fast[-1][1]) / (slow[0][1] - slow[-1][1])
    return [
        f"update of all {len(flat)} weights: ours {ours:.2f} s, literal reckoned {literal:.0f} s",
        f"search and update: {times:.0f} times faster, {times * falls:.0f} times per fall of the "
        "objective",
    ]


def _literal_update(gradients: Tensor, pruned: int) -> float:
    """Seconds that the recursion over all weights and the LU would take."""
    samples, weights = gradients.shape
    inverse = torch.zeros(weights, weights)
    inverse.diagonal().fill_(1.0 / _DAMPING)
    began = time.perf_counter()
    for g in gradients[:_TIMED_STEPS]:
        v = inverse @ g
        inverse.addr_(v, v, alpha=-1.0 / (samples + float(g @ v)))
    recursion = (time.perf_counter() - began) * samples / _TIMED_STEPS
    system = inverse[:_TIMED_ROWS, :_TIMED_ROWS].clone()
    began = time.perf_counter()
    torch.linalg.lu_factor(system)
    return recursion + (time.perf_counter() - began) * (pruned / _TIMED_ROWS) ** 3


def _curve(search: Search, value: Callable[[Tensor], float], start: Tensor) -> Curve:
    curve, seconds = [(0.0, value(start))], 0.0
    began = time.perf_counter()
    for keep in search():
        seconds += time.perf_counter() - began
        curve.append((seconds, value(keep)))
        began = time.perf_counter()
    return curve


def _rate(curve: Curve) -> float:
    return (curve[0][1] - curve[-1][1]) / curve[-1][0]


def _line(name: str, curve: Curve) -> str:
    return (
        f"{name}: {curve[0][1]:.5f} to {curve[-1][1]:.5f} in {curve[-1][0]:.2f} s "
        f"and {len(curve) - 1} iterations"
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _peak_bytes(search: Search) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in search():
            pass
    assert recorded.profiler is not None
    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    sizes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = torch.tensor([size for _, size in sorted(sizes)]).cumsum(0)
    return int(held.max())
