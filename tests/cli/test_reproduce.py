import json

import pytest
import torch
from safetensors.torch import save_file

from torchprune_bayes.cli import main
from torchprune_bayes.cli._headlines import HEADLINES
from torchprune_bayes.cli._options import checked_options
from torchprune_bayes.cli.reproduce import mlpnet
from torchprune_bayes.methods import find_method

pytest.importorskip("torchvision")


def write_mnist(folder, images=400):
    """The four files of MNIST: bars whose place is the class."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = torch.arange(images, dtype=torch.uint8) % 10
    pixels = torch.randint(60, (images, 28, 28), dtype=torch.uint8)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[2 * label + 3 : 2 * label + 6] = 250
    for split in ("train", "t10k"):
        sizes = b"".join(size.to_bytes(4, "big") for size in (0x803, images, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(sizes + pixels.numpy().tobytes())
        sizes = b"".join(size.to_bytes(4, "big") for size in (0x801, images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(sizes + labels.numpy().tobytes())
    return folder


@pytest.mark.parametrize("name", HEADLINES)
def test_settings_are_those_of_registered_methods(name):
    for setting in HEADLINES[name].settings:
        assert checked_options(setting.method, setting.options) == dict(setting.options)
        assert find_method(setting.method).needs_calibration == bool(setting.samples)
        assert setting.published


def test_the_paper_s_numbers_stand_beside_ours(tmp_path, capsys):
    torch.manual_seed(0)
    data, out = write_mnist(tmp_path / "data"), tmp_path / "out"
    words = ["--data", str(data), "--scale", "0.004", "--seeds", "2", "--output", str(out)]
    assert main(["reproduce", "woodfisher-mlpnet", *words]) == 0
    rows = json.loads((out / "reproduce.json").read_text())
    assert [(r["label"], r["paper"]) for r in rows[:2]] == [("dense", 93.97), ("magnitude", 90.30)]
    assert sum(row["label"] == "kfac" for row in rows) == 2  # seeds
    assert all(0 <= row["ours"] <= 100 for row in rows)
    printed = capsys.readouterr().out
    assert "arXiv:2004.14340" in printed
    assert "At 0.004 of the epochs and calibration samples of the paper." in printed


def test_a_checkpoint_is_not_trained(tmp_path):
    torch.manual_seed(1)
    data, model = write_mnist(tmp_path / "data"), mlpnet()
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    words = ["--data", str(data), "--checkpoint", str(tmp_path / "mine.safetensors")]
    words += ["--scale", "0.004", "--output", str(tmp_path)]
    assert main(["reproduce", "woodfisher-mlpnet", *words]) == 0
    rows = json.loads((tmp_path / "reproduce.json").read_text())
    assert rows[0]["ours"] < 40  # of random weights; a trained network knows the bars


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "Expected MNIST in `nowhere` as torchvision lays it out"),
        (["--data", "nowhere", "--scale", "0"], "Expected `--scale` above 0, got 0."),
        (["--data", "nowhere", "--scale", "2"], "Expected `--scale`"),
        (["--data", "nowhere", "--seeds", "0"], "Expected `--seeds`"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert main(["reproduce", "cbs-mlpnet", *words, "--output", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not out.exists()
