from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.integrations.accelerate_cases import (
    METHODS,
    batches,
    network,
    options_of,
    taken_in_turns,
)
from tests.integrations.processes import accelerator, in_two_processes, load_all, save_from
from torchprune_bayes import (
    Calibration,
    EmpiricalFisher,
    GradualPruner,
    LayerCurvature,
    cubic,
    keep_sparse,
    masks_of,
    prunable_parameters,
    prune_global,
)
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentTypeError,
    CalibrationError,
    ParameterError,
)
from torchprune_bayes.integrations.accelerate import (
    ShardedCalibration,
    calibrate,
    check_same_masks,
    merged,
    prune_distributed,
    shrink_distributed,
    step,
)
from torchprune_bayes.structured.importances.opd import OPDImportance


def _masks_by_every_method(path: Path) -> None:
    acc = accelerator()
    found = {}
    for method in METHODS:
        model = network()
        calibration = calibrate(acc, model, batches(7), cross_entropy)
        options = {"calibration": calibration, **options_of(method)}
        decision = prune_distributed(acc, None, method, amount=0.5, **options)
        check_same_masks(decision.masks)
        found[method] = ({n: m.clone() for n, m in masks_of(model).items()}, model.state_dict())
    save_from(acc.process_index, found, path)


def test_every_method_prunes_as_one_process_on_the_union_of_unequal_shares(tmp_path: Path) -> None:
    in_two_processes(_masks_by_every_method, tmp_path / "found")
    first, second = load_all(tmp_path / "found")
    for method in METHODS:
        model = network()
        calibration = Calibration(model, taken_in_turns(batches(7)), cross_entropy)
        options = {"calibration": calibration, **options_of(method)}
        prune_global(None, method, amount=0.5, **options)
        for name, mask in masks_of(model).items():
            assert torch.equal(first[method][0][name], second[method][0][name]), method
            if method != "layerwise":  # its rounds carry the rounding of sums on to later choices
                assert torch.equal(first[method][0][name], mask), method
        for name, value in model.state_dict().items():
            assert torch.equal(first[method][1][name], second[method][1][name]), method
            if method == "layerwise":
                continue
            torch.testing.assert_close(first[method][1][name], value, rtol=1e-3, atol=1e-5)


def _passes(path: Path) -> None:
    acc = accelerator()
    found: dict[str, Any] = {}
    for name, options in {"all": {}, "some": {"num_samples": 18, "mini_batch": 2}}.items():
        calibration = calibrate(acc, network(), batches(7), cross_entropy, **options)
        held_out = calibration.held_out_loss()
        found[name] = {
            "rows": torch.cat(list(calibration.gradients())),
            "mean": calibration.mean_gradient(),
            "samples": calibration.num_samples,
            "local": calibration.local.num_samples,
            "loss": (held_out.value, held_out.samples, held_out.in_sample),
            "inputs": torch.cat([x for x, _ in calibration.batches(5)]),
        }
    save_from(acc.process_index, found, path)


def test_passes_give_the_union_of_the_shares(tmp_path: Path) -> None:
    in_two_processes(_passes, tmp_path / "found")
    first, second = load_all(tmp_path / "found")
    union = Calibration(network(), taken_in_turns(batches(7)), cross_entropy)
    assert first["all"]["samples"] == second["all"]["samples"] == 28
    assert (first["all"]["local"], second["all"]["local"]) == (16, 12)
    for found in (first["all"], second["all"]):
        rows = torch.cat(list(union.gradients()))
        torch.testing.assert_close(sorted_rows(found["rows"]), sorted_rows(rows))
        torch.testing.assert_close(found["mean"], union.mean_gradient())
        assert found["inputs"].sum() == pytest.approx(float(sum(x.sum() for x, _ in batches(7))))
        value, samples, in_sample = found["loss"]
        assert (samples, in_sample) == (28, True)
        assert value == pytest.approx(union.held_out_loss().value)
    assert torch.equal(first["some"]["rows"], second["some"]["rows"])
    assert len(first["some"]["rows"]) == 9
    assert (first["some"]["local"], second["some"]["local"]) == (10, 8)
    _, samples, in_sample = first["some"]["loss"]
    assert (samples, in_sample) == (16 - 10 + 12 - 8, False)


def sorted_rows(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def _statistics(path: Path) -> None:
    acc = accelerator()
    data = batches(7)
    local = ShardedCalibration(network(), data, cross_entropy).local
    diagonal = merged(LayerCurvature().fit(local))
    factors = merged(LayerCurvature(structure="kronecker").fit(local))
    fisher = merged(EmpiricalFisher(damping=0.1, block_size=20).fit(local))
    save_from(
        acc.process_index,
        {"diagonal": diagonal.diagonal(), "count": diagonal.count, "factors": factors.sums}
        | {"inverse": fisher.inverse_diagonal(), "rows": fisher.count},
        path,
    )


def test_merged_statistics_are_those_of_the_union(tmp_path: Path) -> None:
    in_two_processes(_statistics, tmp_path / "found")
    union = Calibration(network(), batches(7), cross_entropy)
    diagonal = LayerCurvature().fit(union).diagonal()
    factors = LayerCurvature(structure="kronecker").fit(union)
    fisher = EmpiricalFisher(damping=0.1, block_size=20).fit(union)
    for found in load_all(tmp_path / "found"):
        assert found["count"] == found["rows"] == 28
        torch.testing.assert_close(found["diagonal"], diagonal)
        torch.testing.assert_close(found["factors"], dict(factors.sums))
        torch.testing.assert_close(found["inverse"], fisher.inverse_diagonal())


def _trained(path: Path, mixed: str) -> None:
    acc = accelerator(gradient_accumulation_steps=2, mixed_precision=mixed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    data = batches(16)
    calibration = calibrate(acc, model, data, cross_entropy, num_samples=24)
    model, optimizer = acc.prepare(model, optimizer)
    pruner = GradualPruner(
        None,
        "woodfisher",
        cubic(0.8, begin=1, end=5, every=2),
        calibration=calibration,
        optimizer=optimizer.optimizer,
    )
    for inputs, target in data[acc.process_index :: 2]:
        with acc.accumulate(model):
            acc.backward(cross_entropy(model(inputs), target))
            optimizer.step()
            optimizer.zero_grad()
            if acc.sync_gradients:
                step(acc, pruner)
    # Another two updates, so that the last pruning is trained on too.
    check_same_masks(pruner.masks)
    assert {type(model).__name__} == {"DistributedDataParallel"}
    bare = acc.unwrap_model(model)
    save_from(acc.process_index, (pruner.masks, bare.state_dict(), pruner.sparsity), path)


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_gradual_pruning_under_ddp_keeps_replicas_equal(tmp_path: Path, mixed: str) -> None:
    in_two_processes(_trained, tmp_path / "found", mixed)
    first, second = load_all(tmp_path / "found")
    assert first[2] == pytest.approx(0.5, abs=0.3)
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name])
    for name, mask in first[0].items():
        assert not first[1][name][~mask].any()


class Disagreeing(Calibration):
    """Inputs that are different in each process, as faulty hardware would give."""

    def fisher_batches(self, *args: Any, **options: Any) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(dist.get_rank())
        for inputs, target in super().fisher_batches(*args, **options):
            yield inputs * torch.rand(inputs.shape, generator=generator), target


def _disagreeing(path: Path) -> None:
    acc = accelerator()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    calibration = Disagreeing(model, batches(4), cross_entropy, check_deterministic=False)
    model, optimizer = acc.prepare(model, optimizer)
    pruner = GradualPruner(
        None,
        "diagonal-fisher",
        cubic(0.6, 1, 2),
        calibration=calibration,
        optimizer=optimizer.optimizer,
    )
    differed = []
    for inputs, target in batches(3):
        acc.backward(cross_entropy(model(inputs), target))
        optimizer.step()
        optimizer.zero_grad()
        own = prune_global_copy(calibration)
        differed.append(own)
        step(acc, pruner)
    check_same_masks(pruner.masks)
    moments = [optimizer.optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    save_from(acc.process_index, (acc.unwrap_model(model).state_dict(), moments, differed[0]), path)


def prune_global_copy(calibration: Calibration) -> dict[str, Tensor]:
    from torchprune_bayes import DiagonalFisher

    return DiagonalFisher(0.5, calibration=calibration).decide(calibration.space).masks


def test_processes_that_disagree_take_the_first_ones_masks(tmp_path: Path) -> None:
    in_two_processes(_disagreeing, tmp_path / "found")
    first, second = load_all(tmp_path / "found")
    assert any(not torch.equal(first[2][name], second[2][name]) for name in first[2])
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def _failures() -> None:
    acc = accelerator()
    inputs, labels = batches(4)[acc.process_index]
    if acc.process_index == 1:
        inputs = inputs * float("nan")
    calibration = calibrate(acc, network(), [(inputs, labels)], cross_entropy, split=False)
    for run in (
        lambda: prune_distributed(acc, None, "woodfisher", amount=0.5, calibration=calibration),
        lambda: list(calibration.gradients()),
        calibration.mean_gradient,
        lambda: calibrate(acc, network(), batches(1), cross_entropy, num_samples=8).mean_gradient(),
    ):
        with pytest.raises(CalibrationError, match="Expected"):
            run()
    masks = {"weight": torch.tensor([True, acc.is_main_process])}
    with pytest.raises(AlignmentError, match="same masks"):
        check_same_masks(masks)


def test_an_error_in_one_process_is_raised_in_all() -> None:
    in_two_processes(_failures)


def _shrunk(path: Path) -> None:
    acc = accelerator(mixed_precision="bf16")
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.02)
    data = batches(8)
    calibration = calibrate(acc, model, data, cross_entropy)
    model, optimizer = acc.prepare(model, optimizer)

    def train() -> None:
        for inputs, target in data[acc.process_index :: 2]:
            acc.backward(cross_entropy(model(inputs), target))
            optimizer.step()
            optimizer.zero_grad()

    train()
    model, optimizer, _ = shrink_distributed(
        acc,
        model,
        data[0][0],
        OPDImportance(calibration=calibration),
        optimizer=optimizer,
        sparsity=0.5,
        target="channels",
    )
    train()
    assert type(model).__name__ == "DistributedDataParallel"
    assert len(acc._models) == len(acc._optimizers) == 1
    acc.save_state(str(path.parent / "state"))
    bare = acc.unwrap_model(model)
    steps = {int(optimizer.optimizer.state[p]["step"]) for p in bare.parameters()}
    save_from(acc.process_index, (bare.state_dict(), steps), path)


def test_shrinking_a_prepared_model_keeps_replicas_equal(tmp_path: Path) -> None:
    in_two_processes(_shrunk, tmp_path / "found")
    first, second = load_all(tmp_path / "found")
    assert first[0]["0.weight"].shape == (6, 6)
    assert first[1] == second[1] == {8}
    running = ("running_mean", "running_var")  # each process has its own
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]) or name.rpartition(".")[2] in running


def _fully_sharded(path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    acc = accelerator()
    model = network()
    masks = prune_global_masks(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    with pytest.raises(ParameterError, match="sharded"):
        calibrate(acc, model, batches(2), cross_entropy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    parameters = dict(model.named_parameters())
    keep_sparse(optimizer, {parameters[name]: mask for name, mask in masks.items()})
    before = whole(model)
    for inputs, target in batches(6)[acc.process_index :: 2]:
        cross_entropy(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = whole(model)
    for name, mask in masks.items():
        assert not after[name][~mask].any()
        assert (after[name][mask] != before[name][mask]).any()
    save_from(acc.process_index, after, path)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, collected from all processes."""
    sharded: dict[str, Any] = dict(model.named_parameters())
    return {name: value.full_tensor().clone() for name, value in sharded.items()}


def prune_global_masks(model: nn.Module) -> dict[str, Tensor]:
    return prune_global_plan(model, prunable_parameters(model))


def prune_global_plan(model: nn.Module, pairs: list[tuple[nn.Module, str]]) -> dict[str, Tensor]:
    from torchprune_bayes import Magnitude
    from torchprune_bayes.params import ParameterSpace

    return Magnitude(0.6).decide(ParameterSpace(model, pairs)).masks


def test_zeros_stay_in_fully_sharded_parameters(tmp_path: Path) -> None:
    in_two_processes(_fully_sharded, tmp_path / "found")
    first, second = load_all(tmp_path / "found")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_refuses_strategies_that_shard(kind: str) -> None:
    sharding: Any = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    with pytest.raises(ParameterError, match=kind):
        calibrate(sharding, network(), batches(1), cross_entropy)


def test_refuses_a_prepared_loader() -> None:
    acc = Accelerator(cpu=True)
    data: Any = [(inputs[0], target[0]) for inputs, target in batches(4)]
    loader = acc.prepare(torch.utils.data.DataLoader(data, batch_size=2))
    with pytest.raises(ArgumentTypeError, match="prepared one"):
        calibrate(acc, network(), loader, cross_entropy)


def test_one_process_alone_is_a_plain_calibration() -> None:
    acc = Accelerator(cpu=True)
    both: list[Callable[..., Calibration]] = [
        Calibration,
        lambda *args, **options: calibrate(acc, *args, **options),
    ]
    plain, sharded = (make(network(), batches(3), cross_entropy) for make in both)
    assert all(map(torch.equal, plain.gradients(), sharded.gradients()))
    with pytest.raises(ArgumentTypeError, match="neither"):
        prune_distributed(acc, None, "magnitude", amount=0.5)
    model = network()
    prune_distributed(acc, prunable_parameters(model), "magnitude", amount=0.5)
    kept = sum(int(mask.sum()) for mask in masks_of(model).values())
    assert kept == sum(mask.numel() for mask in islice(masks_of(model).values(), None)) / 2


def test_an_iterator_of_batches_can_be_shared_out() -> None:
    calibration = ShardedCalibration(network(), iter(batches(3)), cross_entropy)
    assert calibration.num_samples == 12
    assert len(torch.cat(list(calibration.gradients()))) == 12
