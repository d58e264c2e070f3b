"""Models on a device that is not the CPU give what they give on the CPU.

Not collected with the other tests: an accelerator is there for the rest of the process, so
``test_in_a_process_of_its_own.py`` runs this file. It needs a C++ compiler, no GPU.
"""

from __future__ import annotations

import copy
import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import (
    Calibration,
    EmpiricalFisher,
    GateTraining,
    GradualPruner,
    LayerCurvature,
    Posterior,
    SpaM,
    bake,
    cubic,
    export_masks,
    import_masks,
    keep_sparse,
    masks_of,
    one_shot,
    prunable_parameters,
    prune_global,
    reestimate_batch_norm,
    registered_methods,
)
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.gates import attach_gates, fold_gates
from torchprune_bayes.laplace import fit_posterior
from torchprune_bayes.reports import evaluate
from torchprune_bayes.structured import (
    BMRSImportance,
    ConsumerGateFisherImportance,
    L1FilterImportance,
    LaplaceEvidenceImportance,
    OPDImportance,
    RandomImportance,
    SNAPitImportance,
    WoodFisherImportance,
    load_shrunk,
    save_shrunk,
    shrink,
)

ghost_device = importlib.import_module("ghost_device")

DEVICE = "ghost"
UNSTRUCTURED = [n for n, m in registered_methods().items() if n not in ("bmrs", "random")]
IMPORTANCES = ["calibration", "gates", "l1", "random", "snapit", "woodfisher", "opd", "laplace"]
PATTERNS = ["woodfisher", "woodtaylor", "greedy-obs", "cbs", "opd", "alps", "sparsegpt", "wanda"]
OTHER_DEVICE = [n for n in UNSTRUCTURED if registered_methods()[n].needs_calibration]


def model(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).to(device).eval()


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (24,), generator=generator)), 8)


def calibration(of: nn.Module, device: str | None = None, params: Any = None) -> Calibration:
    return Calibration(of, data(), cross_entropy, params, num_samples=16, device=device)


def state(of: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in of.state_dict().items()}


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = state(found), state(wanted)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def assert_on(of: nn.Module, device: str) -> None:
    for tensor in (*of.parameters(), *of.buffers()):
        assert tensor.device.type == torch.device(device).type


def pruned(name: str, device: str, where: str | None = None, **options: Any) -> nn.Sequential:
    made = model(device)
    needs = registered_methods()[name].needs_calibration
    if needs:
        linear = [(of, "weight") for of in made if isinstance(of, nn.Linear)]
        options["calibration"] = calibration(made, where, linear if "pattern" in options else None)
    prune_global(None if needs else prunable_parameters(made), name, amount=0.5, **options)
    assert_on(made, device)
    return made


@pytest.mark.parametrize("device", ["ghost", "ghost:1"])
@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_methods(name: str, device: str) -> None:
    assert_same(pruned(name, device), pruned(name, "cpu"))


@pytest.mark.parametrize("name", OTHER_DEVICE)
@pytest.mark.parametrize(("device", "where"), [("ghost", "cpu"), ("cpu", "ghost")])
def test_calibration_on_another_device(name: str, device: str, where: str) -> None:
    assert_same(pruned(name, device, where), pruned(name, "cpu"))


@pytest.mark.parametrize("damping", ["auto", 1e-3])
@pytest.mark.parametrize("name", ["woodfisher", "woodtaylor", "cbs", "greedy-obs"])
def test_the_device_is_asked_for_few_numbers(name: str, damping: str | float) -> None:
    of = model("ghost")
    with ghost_device.counted() as crossed:
        prune_global(None, name, amount=0.5, calibration=calibration(of), damping=damping)
    assert crossed["aten::_local_scalar_dense"] <= 50


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str) -> None:
    assert_same(pruned(name, DEVICE, pattern="2:4"), pruned(name, "cpu", pattern="2:4"))


@pytest.mark.parametrize("name", ["layer-magnitude", "woodfisher", "opd", "snip-it", "kfac"])
def test_gradual(name: str, tmp_path: Path) -> None:
    made = []
    for device in ("cpu", DEVICE):
        of = model(device)
        optimizer = torch.optim.Adam(of.parameters(), lr=1e-3)
        needs = registered_methods()[name].needs_calibration
        options: Any = {"calibration": calibration(of)} if needs else {}
        params, schedule = prunable_parameters(of), cubic(final=0.5, begin=0, end=2, every=1)
        pruner = GradualPruner(params, name, schedule, optimizer=optimizer, **options)
        for x, y in data():
            optimizer.zero_grad()
            cross_entropy(of(x.to(device)), y.to(device)).backward()
            optimizer.step()
            pruner.step()
        torch.save(pruner.state_dict(), tmp_path / "state")
        for place in (None, "cpu"):
            pruner.load_state_dict(torch.load(tmp_path / "state", map_location=place))
        made.append(of)
    assert_same(*made)


def importances(of: nn.Module) -> dict[str, Any]:
    c = calibration(of)
    return {
        "calibration": c,
        "gates": ConsumerGateFisherImportance(c),
        "l1": L1FilterImportance(),
        "random": RandomImportance(seed=0),
        "snapit": SNAPitImportance(c),
        "woodfisher": WoodFisherImportance(c),
        "opd": OPDImportance(calibration=c),
        "laplace": LaplaceEvidenceImportance(fit_posterior(c).with_best_prior("layerwise")),
    }


@pytest.mark.parametrize("name", IMPORTANCES)
def test_shrink(name: str, tmp_path: Path) -> None:
    made = []
    for device in ("cpu", DEVICE):
        of, x = model(device), next(iter(data()))[0].to(device)
        optimizer = torch.optim.Adam(of.parameters(), lr=1e-4)
        of(x).square().sum().backward()
        optimizer.step()
        average = torch.optim.swa_utils.AveragedModel(of)
        importance = importances(of)[name]
        shrink(of, x, importance, sparsity=0.3, target="channels", optimizer=optimizer, ema=average)
        of(x).square().sum().backward()
        optimizer.step()
        average.update_parameters(of)
        save_shrunk(of, tmp_path / device)
        fresh = model(device)
        load_shrunk(fresh, tmp_path / device)
        assert_on(fresh, device)
        assert_same(fresh, of)
        made.append(of)
    assert_same(*made)


def test_gates() -> None:
    of = model(DEVICE)
    gates, x = attach_gates(of), next(iter(data()))[0].to(DEVICE)
    training = GateTraining(of, data_size=24, prune_every=None)
    (of(x).square().mean() + training.penalty()).backward()
    training.step()
    training.end_epoch(metric=0.5)
    training.begin_finetuning()
    importance = BMRSImportance(gates, criterion=None)
    fold_gates(of)
    shrink(of, x, importance, target="evidence")
    assert_on(of, DEVICE)


def test_spam(tmp_path: Path) -> None:
    made = []
    for device in ("cpu", DEVICE):
        of = model(device)
        optimizer, c = torch.optim.Adam(of.parameters(), lr=1e-3), calibration(of)
        spam = SpaM(optimizer, c, prior="diag", every=1)
        for _ in range(2):
            for x, y in data():
                optimizer.zero_grad()
                cross_entropy(of(x.to(device)), y.to(device)).backward()
                optimizer.step()
            spam.step()
            torch.save(spam.state_dict(), tmp_path / "state")
            spam.load_state_dict(torch.load(tmp_path / "state", map_location="cpu"))
        prune_global(None, "opd", amount=0.5, calibration=c, posterior=spam.posterior())
        made.append(of)
    assert_same(*made)


def test_masks(tmp_path: Path) -> None:
    first, second = pruned("magnitude", DEVICE), model(DEVICE)
    export_masks(first, tmp_path / "masks")
    import_masks(second, tmp_path / "masks")
    assert all(map(torch.equal, masks_of(first).values(), masks_of(second).values()))
    bake(second)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    keep_sparse(optimizer, second)
    second(next(iter(data()))[0].to(DEVICE)).sum().backward()
    optimizer.step()
    copy.deepcopy(second)
    assert_on(second, DEVICE)


def test_host_call() -> None:
    made = model(DEVICE)
    method, params = registered_methods()["woodfisher"].method, prunable_parameters(made)
    prune.global_unstructured(params, method, amount=0.5, calibration=calibration(made))
    assert_same(made, pruned("woodfisher", "cpu"))


def test_batch_norm_and_metrics() -> None:
    ours, theirs = model(DEVICE), model()
    for made in (ours, theirs):
        reestimate_batch_norm(made, data())
    assert_same(ours, theirs)
    assert evaluate(ours, data()).nll == pytest.approx(evaluate(theirs, data()).nll, rel=1e-4)


def test_curvature_is_loaded_to_where_the_model_is(tmp_path: Path) -> None:
    made = model(DEVICE)
    c = calibration(made)
    EmpiricalFisher().fit(c).save(tmp_path / "fisher")
    loaded = EmpiricalFisher.load(tmp_path / "fisher")
    prune_global(None, "woodfisher", amount=0.5, calibration=c, curvature=loaded)


def test_fisher_merges_with_a_loaded_one(tmp_path: Path) -> None:
    fisher = EmpiricalFisher().fit(calibration(model(DEVICE)))
    fisher.save(tmp_path / "fisher")
    fisher.merge(EmpiricalFisher.load(tmp_path / "fisher"))


def test_posterior_of_a_loaded_curvature(tmp_path: Path) -> None:
    c = calibration(model(DEVICE))
    LayerCurvature().fit(c).save(tmp_path / "layers")
    diagonal = LayerCurvature.load(tmp_path / "layers").diagonal()
    Posterior(c.space.values(), diagonal).log_marginal_likelihood()


def test_random_numbers_of_the_device_are_isolated() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    made = nn.Sequential(nn.Flatten(), Noisy(16, 3)).to(DEVICE)
    generator: Any = torch.get_device_module(DEVICE)
    before = generator.get_rng_state()
    c = Calibration(made, data(), cross_entropy, vectorize=False, check_deterministic=False)
    first, second = (torch.cat(list(c.gradients())) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, generator.get_rng_state())


@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_without_float64(name: str) -> None:
    with ghost_device.no_float64():
        assert_same(pruned(name, DEVICE), pruned(name, "cpu"))


@pytest.mark.parametrize("name", OTHER_DEVICE)
@pytest.mark.parametrize(("device", "where"), [("ghost", "cpu"), ("cpu", "ghost")])
def test_calibration_elsewhere_without_float64(name: str, device: str, where: str) -> None:
    with ghost_device.no_float64():
        assert_same(pruned(name, device, where), pruned(name, "cpu"))


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_without_float64(name: str) -> None:
    with ghost_device.no_float64():
        assert_same(pruned(name, DEVICE, pattern="2:4"), pruned(name, "cpu", pattern="2:4"))


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("layerwise", {"solver": "exact"}),
        ("layerwise", {"solver": "sequential"}),
        ("sparsegpt", {"scope": "global"}),
        ("wanda", {"scope": "global"}),
        ("wanda", {"compare": "layer"}),
        ("woodfisher", {"block_size": 16}),
        ("woodfisher", {"update": "single"}),
        ("woodfisher", {"steps": 2}),
        ("greedy-obs", {"block_size": 8}),
    ],
)
def test_options(name: str, options: dict[str, Any], float64: bool) -> None:
    with nullcontext() if float64 else ghost_device.no_float64():
        assert_same(pruned(name, DEVICE, **options), pruned(name, "cpu", **options))


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("offload", ["device", "host", "folder"])
def test_gradients_kept_elsewhere(offload: str, float64: bool, tmp_path: Path) -> None:
    made = []
    with nullcontext() if float64 else ghost_device.no_float64():
        for device in ("cpu", DEVICE):
            of = model(device)
            place = tmp_path if offload == "folder" else offload
            c = Calibration(of, data(), cross_entropy, num_samples=16, offload=place)
            prune_global(None, "woodfisher", amount=0.5, calibration=c)
            made.append(of)
    assert_same(*made)


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_loaded_fisher_without_float64(device: str, tmp_path: Path) -> None:
    made = model(DEVICE)
    with ghost_device.no_float64():
        c = calibration(made)
        fisher = EmpiricalFisher().fit(c)
        fisher.save(tmp_path / "fisher")
        loaded = EmpiricalFisher.load(tmp_path / "fisher", device)
        prune_global(None, "woodfisher", amount=0.5, calibration=c, curvature=loaded)
        fisher.merge(EmpiricalFisher.load(tmp_path / "fisher", device))
        assert torch.isfinite(fisher.to(torch.device(DEVICE)).inverse_diagonal()).all()


@pytest.mark.parametrize("name", IMPORTANCES)
def test_shrink_without_float64(name: str) -> None:
    made = []
    for device in ("cpu", DEVICE):
        of, x = model(device), next(iter(data()))[0].to(device)
        with ghost_device.no_float64():
            shrink(of, x, importances(of)[name], sparsity=0.3, target="channels")
        assert_on(of, device)
        made.append(of)
    assert_same(*made)


@pytest.mark.parametrize("prior", ["diag", "layerwise"])
@pytest.mark.parametrize("where", [None, "cpu"])
def test_spam_elsewhere_and_without_float64(prior: str, where: str | None) -> None:
    made = []
    for device in ("cpu", DEVICE):
        of = model(device)
        optimizer, c = torch.optim.SGD(of.parameters(), lr=1e-2), calibration(of, where)
        with ghost_device.no_float64():
            spam = SpaM(optimizer, c, prior=prior, every=1, schedule=one_shot(0.5, at=2))
            for _ in range(2):
                for x, y in data():
                    optimizer.zero_grad()
                    cross_entropy(of(x.to(device)), y.to(device)).backward()
                    optimizer.step()
                spam.step()
        assert_on(of, device)
        made.append(of)
    assert_same(*made)


def test_gates_without_float64() -> None:
    with ghost_device.no_float64():
        test_gates()


def spread() -> nn.Sequential:
    """A model on two cards, which moves activations itself."""

    class To(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.device = device

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.device)

    torch.manual_seed(0)
    first, second = nn.Linear(16, 12).to("ghost:0"), nn.Linear(12, 3).to("ghost:1")
    return nn.Sequential(nn.Flatten(), To("ghost:0"), first, To("ghost:1"), second)


def test_weights_on_two_devices_are_ranked_together() -> None:
    ours = spread()
    theirs = copy.deepcopy(ours).to("cpu")
    for made in (ours, theirs):
        prune_global(prunable_parameters(made), "magnitude", amount=0.5)
    assert_same(ours, theirs)
    assert [made.weight.device.index for made in (ours[2], ours[4])] == [0, 1]


@pytest.mark.parametrize("name", ["woodfisher", "opd", "snip-it"])
def test_a_calibration_on_two_devices_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(CalibrationError, match="on one device, got ghost:0 and ghost:1"):
        prune_global(None, name, amount=0.5, calibration=calibration(spread()))
