from __future__ import annotations

import csv
import itertools
import json
import os
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import create_dataset, resolve_data_config
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from tests.integrations.processes import fresh
from tests.integrations.scripts import recipe
from torchprune_bayes import GradualPruner, constant, prunable_parameters
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.integrations.timm import (
    calibrate,
    classifier_names,
    hold_zeros,
    importance_of,
    importances_by_name,
    load_pruned,
    save_pruned,
)

# timm's image data set leaves closing its files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with recipe("timm", "digits_folder") as module:
        folder: Path = module.write_digits(tmp_path_factory.mktemp("images") / "digits", limit=90)
    return folder


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, img_size=32)


def test_calibrates_on_images_as_the_model_sees_them(digits: Path) -> None:
    model = vit()
    pairs = prunable_parameters(model, exclude=classifier_names(model))
    config = resolve_data_config({"img_size": 32}, model=model)
    dataset = create_dataset("", root=digits, split="train")
    calibration = calibrate(model, dataset, params=pairs, num_samples=12, data_config=config)
    assert "head.weight" not in calibration.space.names
    drawn = torch.cat([labels for _, labels in calibration.batches()])
    assert len(set(drawn.tolist())) > 1  # the folder is ordered by class
    images = torch.cat([images for images, _ in calibration.batches()])
    assert images.shape == (12, 3, 32, 32)
    assert images.min() == pytest.approx((0 - config["mean"][0]) / config["std"][0])
    assert next(calibration.gradients()).shape[1] == calibration.space.numel


def test_calibrates_on_a_torchvision_data_set() -> None:
    from torchvision.datasets import FakeData

    calibration = calibrate(vit(), FakeData(8, (3, 40, 40), num_classes=10), num_samples=4)
    assert calibration.loss(None, next(calibration.batches())).isfinite()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_finds_the_classifier(name: str) -> None:
    model = timm.create_model(name, num_classes=7)
    found = [model.get_submodule(name) for name in classifier_names(model)]
    assert any(getattr(module, "out_features", None) == 7 for module in found)


def average_of(kind: str, model: nn.Module) -> Any:
    return ModelEmaV3(model, decay=0.9) if kind == "timm" else AveragedModel(model)


@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_averages_have_the_zeros_of_the_model(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = average_of(kind, model)
    pruner = GradualPruner(model, "magnitude", constant(0.5, begin=3, end=3), optimizer=optimizer)
    for _ in range(6):
        cross_entropy(model(torch.randn(4, 8)), torch.zeros(4).long()).backward()
        optimizer.step()
        event = pruner.step()
        (average.update if kind == "timm" else average.update_parameters)(model)
        if event is not None:
            hold_zeros(average, pruner.masks)
    for name, mask in pruner.masks.items():
        found = dict(average.module.named_parameters())[name]
        assert not found[~mask].any()
        assert found[mask].all()


def test_averages_of_other_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = deepcopy(model.state_dict())
    masks = {"0.weight": torch.zeros(8, 8, dtype=torch.bool), "1.weight": torch.zeros(1).bool()}
    with pytest.raises(AlignmentError, match=r"1\.weight"):
        hold_zeros(model, masks)
    assert torch.equal(before["0.weight"], model[0].weight)  # type: ignore[arg-type]


def test_saved_models_load_here_and_in_timm(tmp_path: Path) -> None:
    model = vit()
    save_pruned(
        model, tmp_path, architecture="test_vit", model_kwargs={"num_classes": 10, "img_size": 32}
    )
    ours = load_pruned(tmp_path)
    theirs = timm.create_model("test_vit", num_classes=10, img_size=32)
    load_checkpoint(theirs, str(tmp_path / "model.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
        assert torch.equal(theirs.state_dict()[name], value)
    with pytest.raises(ArgumentError, match=r"architecture\.json"):
        load_pruned(tmp_path / "none")


QUICK = ["--batch-size", "35", "--epochs", "2", "--prune-begin", "0.5", "--prune-end", "1"]
QUICK += ["--prune-steps", "2", "--calib-samples", "16", "--seed", "1", "--num-classes", "10"]


def prune(*more: str, output: Path, data: Path) -> dict[str, float]:
    with recipe("timm", "prune_timm") as module:
        arguments = [*QUICK, "--output", str(output), "--experiment", "run", *more]
        found: dict[str, float] = module.main([*arguments, "--data-dir", str(data)])
    return found


@pytest.mark.parametrize(
    "more",
    [
        ["--model", "test_resnet", "--prune-method", "diagonal-fisher", "--model-ema", "--amp"],
        [
            *["--model", "test_vit", "--model-kwargs", "img_size=32", "--prune-scope", "layer"],
            *["--channels-last", "--opt", "sgd", "--sched", "step", "--clip-grad", "1.0"],
        ],
    ],
)
def test_the_script_prunes_trains_validates_and_saves(
    digits: Path, tmp_path: Path, more: list[str]
) -> None:
    found = prune(*more, output=tmp_path, data=digits)
    assert found["sparsity"] == pytest.approx(0.8, abs=2e-3)
    model = load_pruned(tmp_path / "run")
    pairs = prunable_parameters(model, exclude=classifier_names(model))
    weights = [getattr(*pair) for pair in pairs]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(w.numel() for w in weights) == pytest.approx(found["sparsity"], abs=1e-6)
    with open(tmp_path / "run" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[-1]["eval_top1"]) == found["top1"]
    assert "prune_method" in (tmp_path / "run" / "args.yaml").read_text()


def test_the_script_refuses_a_training_that_ends_before_pruning(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["--model", "test_resnet", "--epochs", "1"]
    with pytest.raises(ArgumentError, match="within the 1 epochs"):
        prune(*more, "--prune-begin", "1", "--prune-end", "2", output=tmp_path, data=digits)
    assert "ends before" not in caplog.text
    prune(*more, "--prune-begin", "0", "--prune-end", "2", output=tmp_path, data=digits)
    assert "ends before --prune-end" in caplog.text


def test_the_script_goes_on_where_it_stopped(digits: Path, tmp_path: Path) -> None:
    more = ["--model", "test_resnet", "--model-ema"]
    prune(*more, "--epochs", "1", output=tmp_path, data=digits)
    found = prune(*more, "--epochs", "2", "--resume", output=tmp_path, data=digits)
    assert found["sparsity"] == pytest.approx(0.8, abs=2e-3)
    lines = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "1"]


@pytest.mark.parametrize(
    ("model", "importance"), [("test_resnet", "opd"), ("test_vit", "recommended")]
)
def test_the_script_shrinks(digits: Path, tmp_path: Path, model: str, importance: str) -> None:
    more = ["--model", model, "--prune-structured", "--prune-importance", importance]
    more += ["--prune-amount", "0.4", "--prune-begin", "0.5", "--model-ema"]
    more += ["--model-kwargs", "img_size=32"] if model == "test_vit" else []
    found = prune(*more, output=tmp_path, data=digits)
    whole = timm.create_model(model, num_classes=10, **({"img_size": 32} if "vit" in model else {}))
    before = sum(p.numel() for p in whole.parameters())
    assert 0.5 * before < found["params"] <= 0.6 * before
    loaded = load_pruned(tmp_path / "run").eval()
    assert sum(p.numel() for p in loaded.parameters()) == found["params"]
    assert loaded(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_the_script_refuses_what_cannot_be_shrunk_so_far_before_training(
    digits: Path, tmp_path: Path
) -> None:
    more = ["--model", "test_resnet", "--prune-structured", "--prune-amount", "0.99999"]
    with pytest.raises(ArgumentError, match="a sparsity of at most"):
        prune(*more, output=tmp_path, data=digits)


def _shrink(output: Path, data: Path, killed_at: int | None = None) -> None:
    """Train four epochs of two updates, cut in the first ones; die before an update if asked."""
    torch.set_num_threads(1)
    more = ["--model", "test_resnet", "--prune-structured", "--prune-importance", "snapit"]
    more += ["--prune-amount", "0.4", "--prune-begin", "1", "--prune-end", "3", "--model-ema"]
    more += ["--epochs", "4", "--resume", "--output", str(output), "--experiment", "run"]
    with recipe("timm", "prune_timm") as module:
        update, updates = module.Run._update, itertools.count()

        def fatal(*args: Any) -> Any:
            if next(updates) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(*args)

        module.Run._update = fatal
        module.main([*QUICK, *more, "--data-dir", str(data)])


def test_a_killed_script_that_shrinks_goes_on_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    _shrink(tmp_path / "whole", digits)
    folder = tmp_path / "killed"
    for epochs in (1, 2):  # killed in the next one: what is resumed is whole, then cut
        process = fresh.Process(target=_shrink, args=(folder, digits, 3))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert torch.load(folder / "run" / "last.pt")["step"] == epochs
    _shrink(folder, digits)
    whole, again = (load_pruned(tmp_path / kind / "run") for kind in ("whole", "killed"))
    found = again.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(found[name], value)
    metrics = [
        json.loads((f / "run" / "architecture.json").read_text())
        for f in (folder, tmp_path / "whole")
    ]
    assert metrics[0] == metrics[1]


def test_importances_are_found_by_name(digits: Path) -> None:
    calibration = calibrate(vit(), create_dataset("", root=digits), num_samples=4)
    for name in importances_by_name():
        assert name in str(type(importance_of(name, calibration))).lower()
    with pytest.raises(ArgumentError, match="opd"):
        importance_of("none", calibration)


@pytest.mark.parametrize("name", ["architecture.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [None, b"", b"{}", b"\x00" * 40])
def test_damaged_models_are_refused_in_a_sentence(
    tmp_path: Path, name: str, damage: bytes | None
) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    kwargs = {"num_classes": 3}
    save_pruned(model, tmp_path, architecture="test_resnet", model_kwargs=kwargs)
    assert all(map(torch.equal, load_pruned(tmp_path).parameters(), model.parameters()))
    (tmp_path / name).unlink()
    if damage is not None:
        (tmp_path / name).write_bytes(damage)
    with pytest.raises(ArgumentError, match="Expected"):
        load_pruned(tmp_path)


def write_mnist(folder: Path, images: int = 40) -> Path:
    """The four files of MNIST, with random pixels whose mean follows the class."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = torch.arange(images, dtype=torch.uint8) % 10
    pixels = (labels[:, None, None] * 20 + torch.randint(20, (images, 28, 28))).to(torch.uint8)
    for split in ("train", "t10k"):
        sizes = b"".join(size.to_bytes(4, "big") for size in (0x803, images, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(sizes + pixels.numpy().tobytes())
        sizes = b"".join(size.to_bytes(4, "big") for size in (0x801, images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(sizes + labels.numpy().tobytes())
    return folder


@pytest.mark.parametrize("channels", [None, 1])
def test_grey_images_suit_any_model(tmp_path: Path, channels: int | None) -> None:
    words = ["--dataset", "torch/mnist", "--data-dir", str(write_mnist(tmp_path / "data"))]
    words += [] if channels is None else ["--in-chans", str(channels)]
    words += ["--epochs", "1", "--prune-begin", "0", "--prune-end", "1", "--prune-steps", "1"]
    words += ["--prune-method", "snip", "--calib-samples", "10", "--output", str(tmp_path)]
    words += ["--prune-no-decay-after", "--batch-size", "20", "--experiment", "grey"]
    with recipe("timm", "prune_timm") as module:
        metrics = module.main(words)
    assert metrics["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert metrics["top5"] >= metrics["top1"]
    first = load_pruned(tmp_path / "grey").get_submodule("conv1.0")
    assert first.in_channels == (channels or 3)
