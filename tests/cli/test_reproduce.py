import json

import pytest
import torch
from safetensors.torch import save_file

from tests.experiments.generated import write_mnist
from torchprune_bayes.cli import main
from torchprune_bayes.experiments.networks import mlpnet

pytest.importorskip("torchvision")


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
    data, model = write_mnist(tmp_path / "data"), mlpnet((1, 28, 28), 10)
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
        (["--data", "nowhere", "--scale", "0"], "Expected `--scale`"),
        (["--data", "nowhere", "--scale", "2"], "Expected `--scale` of at most 1, got 2."),
        (["--data", "nowhere", "--width", "1.5"], "Expected `--width` of at most 1, got 1.5."),
        (["--data", "nowhere", "--image-size", "2"], "Expected `--image-size`"),
        (["--data", "nowhere", "--device", "moon"], "Expected an available device, got 'moon'"),
        (["--data", "nowhere", "--masks", "none"], "Expected a file of masks, got `none`"),
        (["--data", "nowhere", "--masks", __file__], "Expected a file of masks, got `"),
        (["--data", "nowhere", "--matched", "none"], "Expected"),
        (["--data", "nowhere", "--matched", __file__], "Expected"),
        (["--data", "nowhere", "--model", "gpt2"], "Expected an experiment on texts"),
        (["--data", "nowhere", "--options.speed", "9"], "Expected an option of the experiment's"),
        (["--data", "nowhere", "--options.rho", "x"], "Expected `swap_range` to be int, got 'x'"),
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


def test_options_go_by_the_names_of_the_paper_and_its_methods(tmp_path):
    data = write_mnist(tmp_path / "data")
    words = ["--data", str(data), "--scale", "0.004", "--output", str(tmp_path / "out")]
    options = [
        "--options.tau",
        "2",
        "--options.perturbations",
        "2",
        "--options.max_iterations",
        "3",
    ]
    assert main(["reproduce", "cbs-mlpnet", *words, *options]) == 0
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "tau: '2'" in config or "tau: 2" in config
    again = ["--config", str(tmp_path / "out" / "config.yaml"), "--output", str(tmp_path / "two")]
    assert main(["reproduce", *again]) == 0
    first, second = (
        json.loads((tmp_path / name / "reproduce.json").read_text()) for name in ("out", "two")
    )
    assert first == second


def test_saved_masks_are_updated_alone(tmp_path, capsys):
    data, model = write_mnist(tmp_path / "data"), mlpnet((1, 28, 28), 10)
    masks = {name: torch.rand(p.shape) > 0.5 for name, p in model.named_parameters()}
    save_file(masks, tmp_path / "masks.safetensors")
    words = ["--data", str(data), "--scale", "0.004", "--output", str(tmp_path / "out")]
    words += [
        "--options.perturbations",
        "2",
        "--options.max_iterations",
        "2",
        "--masks",
        str(tmp_path / "masks.safetensors"),
    ]
    assert main(["reproduce", "cbs-mlpnet", *words]) == 0
    rows = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    [row] = [row for row in rows if row["label"] == "cbs, update of saved masks"]
    weights = sum(p.numel() for p in model.parameters())
    assert row["compression"] == pytest.approx(100 * pruned / weights, abs=0.01)

    save_file({"other": torch.ones(2, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    assert main(["reproduce", "cbs-mlpnet", *words]) == 2
    assert "Expected masks of the network in" in capsys.readouterr().err
    assert main(["reproduce", "woodfisher-mlpnet", *words[:6], *words[-2:]]) == 2
    assert "Expected an experiment of CBS with `--masks`" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--tuning", "--random-labels"])
def test_held_out_and_random_labels_are_said(tmp_path, capsys, flag):
    torch.manual_seed(0)
    data, out = write_mnist(tmp_path / "data", images=400), tmp_path / "out"
    words = ["--data", str(data), "--scale", "0.2", "--output", str(out), flag]
    assert main(["reproduce", "woodfisher-mlpnet", *words]) == 0
    printed = capsys.readouterr().out
    dense = json.loads((out / "reproduce.json").read_text())[0]["ours"]
    if flag == "--tuning":
        assert "accuracy on held-out training examples" in printed
        assert (dense * 80 / 100) % 1 == pytest.approx(0.0, abs=1e-6)  # of 80 images
    else:
        assert "Trained on labels drawn at random." in printed
        assert dense < 40  # the test labels are as they were


def test_what_would_fail_at_the_end_is_refused_at_once(tmp_path, capsys):
    table = tmp_path / "table.json"
    table.write_text(json.dumps([{"label": "BMRS_N", "seed": 0, "ours": 90.0}]))
    words = ["--data", "nowhere", "--output", str(tmp_path / "out")]
    assert main(["reproduce", "bmrs-mlp-mnist", *words, "--matched", str(table)]) == 2
    assert "Expected a row `BMRS_N` with the column `closed`" in capsys.readouterr().err
    assert main(["reproduce", "cbs-mlpnet", *words, "--matched", str(table)]) == 2
    assert "Expected an experiment of BMRS with `--matched`" in capsys.readouterr().err
    weights = tmp_path / "w.safetensors"
    save_file(mlpnet((1, 28, 28), 10).state_dict(), weights)
    assert main(["reproduce", "bmrs-mlp-mnist", *words, "--checkpoint", str(weights)]) == 2
    assert "Expected no `--checkpoint` with bmrs-mlp-mnist" in capsys.readouterr().err
