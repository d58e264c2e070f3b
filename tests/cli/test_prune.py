import json
import sys

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file

from tests.cli import toys
from torchprune_bayes import import_masks
from torchprune_bayes.cli import main
from torchprune_bayes.reports import evaluate

MODEL = ["--model", "tests.cli.toys:make_model"]
DATA = ["--data", "tests.cli.toys:make_batches"]


def prune(*words):
    return main(["prune", *map(str, words)])


def report_in(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("method", ["magnitude", "woodfisher"])
def test_weights_masks_and_report_come_back(tmp_path, capsys, method):
    code = prune(
        *MODEL, *DATA, "--method", method, "--amount", 0.75, "--num-samples", 20,
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    weights = load_file(tmp_path / "model.safetensors")
    fresh = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    fresh.load_state_dict(weights, strict=True)
    masks = load_file(tmp_path / "masks.safetensors")
    assert sorted(masks) == ["0.weight", "2.weight"]
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(weights[name] != 0, mask)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 90  # of 120

    report = report_in(tmp_path)
    assert report["sparsity"] == 0.75
    assert list(report["tensors"]) == ["0.weight", "2.weight"]
    assert report["tensors"]["0.weight"]["shape"] == [12, 6]
    assert sum(tensor["pruned"] for tensor in report["tensors"].values()) == 90
    assert report["metrics"]["after"]["accuracy"] == evaluate(fresh, toys.make_batches()).accuracy
    dense = evaluate(toys.make_model(), toys.make_batches())
    assert report["metrics"]["before"]["nll"] == dense.nll
    assert report["command"].startswith("torchprune-bayes prune --model tests.cli.toys:make_model")
    assert report["settings"]["output"] == str(tmp_path)
    out = capsys.readouterr().out
    assert "pruned 90 of 120 weights, sparsity 0.7500" in out
    assert "the calibration data" in out
    assert str(tmp_path / "model.safetensors") in out


def test_a_checkpoint_and_its_masks_can_be_used_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    words = [*MODEL, *DATA, "--method", "magnitude"]
    assert prune(*words, "--amount", 0.5, "--output", first) == 0
    checkpoint = first / "model.safetensors"
    assert prune(*words, "--amount", 0.0, "--checkpoint", checkpoint, "--output", second) == 0
    kept, again = load_file(checkpoint), load_file(second / "model.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert report_in(first)["metrics"]["after"] == report_in(second)["metrics"]["before"]
    model = toys.make_model()
    import_masks(model, first / "masks.safetensors")
    assert torch.equal(model[0].weight, kept["0.weight"])


def test_options_are_passed_on_and_told(tmp_path, capsys):
    code = prune(
        *MODEL, *DATA, "--method", "woodtaylor", "--amount", 60, "--options.steps", "3",
        "--options.damping", "1e-2", "--num-samples", 40, "--mini-batch", 2, "--exclude", "2",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    report = report_in(tmp_path)
    assert (report["pruned"], report["weights"]) == (60, 72)
    assert len(report["info"]["steps"]) == 3
    assert report["info"]["gradients"] == 20
    out = capsys.readouterr().out
    assert "40 samples, 20 gradients, one pass over the data in each of 3 steps" in out
    assert "estimated" in out


def test_the_same_command_gives_the_same_file(tmp_path):
    words = [*MODEL, *DATA, "--method", "random", "--amount", 0.5, "--seed", 3, "--output"]
    assert prune(*words, tmp_path / "a") == prune(*words, tmp_path / "b") == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_magnitude_needs_no_data(tmp_path, capsys):
    assert prune(*MODEL, "--method", "magnitude", "--amount", 0.5, "--output", tmp_path) == 0
    assert report_in(tmp_path)["metrics"] is None
    assert "->" not in capsys.readouterr().out


def test_data_without_labels_gives_no_metrics(tmp_path):
    words = ["--data", "tests.cli.toys:make_unlabelled", "--method", "magnitude"]
    assert prune(*MODEL, *words, "--amount", 0.5, "--output", tmp_path) == 0
    assert report_in(tmp_path)["metrics"] is None


def test_a_generator_is_read_once_and_used_often(tmp_path):
    code = prune(
        *MODEL, "--data", "tests.cli.toys:make_generator", "--method", "woodfisher",
        "--amount", 0.5, "--num-samples", 40, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert report_in(tmp_path)["metrics"]["after"]["samples"] == 40


def test_metrics_of_other_data(tmp_path):
    code = prune(
        *MODEL, *DATA, "--eval-data", "tests.cli.toys:make_generator", "--method", "magnitude",
        "--amount", 0.5, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert report_in(tmp_path)["metrics"]["data"] == "tests.cli.toys:make_generator"


def test_tied_weights_stay_tied(tmp_path):
    words = ["--model", "tests.cli.toys:Tied", *DATA, "--method", "magnitude", "--amount", 0.5]
    assert prune(*words, "--output", tmp_path) == 0
    assert report_in(tmp_path)["weights"] == 60
    model = toys.Tied()
    load_model(model, tmp_path / "model.safetensors", strict=True)
    assert model.first.weight is model.second.weight
    assert int((model.first.weight == 0).sum()) + int((model.head.weight == 0).sum()) == 30


def test_digits_are_measured_on_test_images(tmp_path):
    code = prune(
        "--model", "torchprune_bayes.cli.digits:trained_network", "--data", "digits",
        "--method", "magnitude", "--amount", 0.5, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    metrics = report_in(tmp_path)["metrics"]
    assert metrics["data"] == "the test images of digits"
    assert metrics["before"]["samples"] == 497
    assert metrics["before"]["accuracy"] > 0.93


def test_a_timm_model(tmp_path):
    timm = pytest.importorskip("timm")
    code = prune(
        "--model", "timm:test_resnet", "--random-init", "--data", "tests.cli.toys:make_images",
        "--method", "magnitude", "--amount", 0.6, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    fresh = timm.create_model("test_resnet", pretrained=False)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    report = report_in(tmp_path)
    assert report["sparsity"] == pytest.approx(0.6, abs=1e-4)
    zeros = sum(int((p == 0).sum()) for name, p in fresh.named_parameters() if p.ndim > 1)
    assert zeros == report["pruned"]


def test_a_hugging_face_model_loads_again_by_its_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        vocab_size=50,
        n_positions=16,
        architectures=["GPT2LMHeadModel"],
    )
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    transformers.GPT2LMHeadModel(config).save_pretrained(dense)
    code = prune(
        "--model", f"hf:{dense}", "--data", "tests.cli.toys:make_text", "--method", "magnitude",
        "--amount", 0.5, "--output", sparse,
    )  # fmt: skip
    assert code == 0
    report, masks = report_in(sparse), load_file(sparse / "masks.safetensors")
    assert set(report["metrics"]["before"]) == {"loss", "samples"}
    fresh = transformers.GPT2LMHeadModel.from_pretrained(sparse)
    modules = dict(fresh.named_modules())
    for name, mask in masks.items():
        weight = modules[name.removesuffix(".weight")].weight
        assert torch.equal(weight != 0, mask)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def test_the_callable_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "project_of_a_user.py").write_text(
        "from tests.cli.toys import make_model as mine\n"
    )
    monkeypatch.chdir(tmp_path)
    path = sys.path.copy()
    words = ["--method", "magnitude", "--amount", 0.5]
    assert prune("--model", "project_of_a_user:mine", *words) == 0
    assert (tmp_path / "pruned" / "model.safetensors").exists()
    assert sys.path == path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*MODEL, "--method", "nothing", "--amount", "0.5"], "Expected one of"),
        ([*MODEL, "--method", "magnitude", "--amount", "1.5"], "Expected a fraction in [0, 1]"),
        ([*MODEL, "--method", "magnitude"], "Expected `amount` to be a float"),
        ([*MODEL, "--method", "random"], ""),
        (
            [*MODEL, "--method", "magnitude", "--amount", "0.5", "--options.steps", "2"],
            "Expected an option of magnitude (scope",
        ),
        (
            [*MODEL, "--method", "woodfisher", "--amount", "0.5"],
            "Expected --data for woodfisher, which uses gradients, got none.",
        ),
        (
            [*MODEL, "--method", "magnitude", "--amount", "0.5", "--exclude", "9"],
            "Expected `exclude` to name modules of the model, got '9': model.named_modules()",
        ),
        (
            [*MODEL, "--method", "magnitude", "--amount", "0.5", "--device", "nowhere"],
            "Expected a device for --device, got 'nowhere'",
        ),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, words, message):
    folder = tmp_path / "out"
    assert prune(*words, "--output", folder) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not folder.exists()


def test_data_that_does_not_suffice_fails(tmp_path, capsys):
    words = ["--method", "woodfisher", "--amount", 0.5, "--num-samples", 1000]
    assert prune(*MODEL, *DATA, *words, "--output", tmp_path) == 1
    assert "Expected 1000 calibration samples, got 40" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(2, 2)}, path)
    words = ["--method", "magnitude", "--amount", 0.5, "--checkpoint", path]
    assert prune(*MODEL, *words, "--output", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: Expected `{path}` to hold the weights of Sequential")
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(
    tmp_path, capsys, monkeypatch
):
    def work(*_, **__):
        raise AssertionError("pruned before it looked")

    monkeypatch.setattr("torchprune_bayes.cli.prune.prune_global", work)
    (tmp_path / "file").write_text("in the way")
    words = [*MODEL, "--method", "magnitude", "--amount", "0.5"]
    assert prune(*words, "--output", tmp_path / "file") == 2
    assert capsys.readouterr().err.startswith("error: Expected to write ")
