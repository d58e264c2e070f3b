import json

import torch

from torchprune_bayes.cli import main
from torchprune_bayes.cli.digits import trained_network
from torchprune_bayes.reports import evaluate
from torchprune_bayes.structured import load_shrunk

DIGITS = ["--model", "torchprune_bayes.cli.digits:trained_network", "--data", "digits"]


def shrink(*words):
    return main(["shrink", *map(str, words)])


def test_the_smaller_model_is_saved_measured_and_loads_again(tmp_path, capsys):
    words = ["--sparsity", 0.4, "--num-samples", 64, "--output", tmp_path]
    assert shrink(*DIGITS, *words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    model = load_shrunk(trained_network(), tmp_path)
    sizes = sum(parameter.numel() for parameter in model.parameters())
    assert sizes == report["parameters"]["after"] <= 0.6 * report["parameters"]["before"]
    assert report["units"]["0"]["before"] == 8
    assert report["speedup"]["low"] <= report["speedup"]["median"] <= report["speedup"]["high"]
    from torchprune_bayes.cli.digits import load_digits

    measured = evaluate(model, load_digits().test.batches())
    assert abs(measured.accuracy - report["metrics"]["after"]["accuracy"]) < 1e-6
    out = capsys.readouterr().out
    assert out.startswith("plan: gradients of 64 samples, 60 evaluations of the loss on 64 of them")
    assert "without fine-tuning" in out
    assert str(tmp_path / "shrunk.safetensors") in out


def test_another_importance_and_target(tmp_path, capsys):
    words = ["--importance", "l1filter", "--target", "channels", "--sparsity", 0.5]
    assert shrink(*DIGITS, *words, "--output", tmp_path, "--exclude", "2") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["units"]["0"] == {"before": 8, "after": 4}
    out = capsys.readouterr().out
    assert out.startswith("plan: a repair on 1,000 samples, no gradients\n")
    assert "layers were fitted anew" in out


def test_wrong_usage_is_one_sentence(tmp_path, capsys):
    for words, message in [
        (["--sparsity", 1.5], "sparsity"),
        (["--sparsity", 0.5, "--importance", "nothing"], "Expected one of"),
    ]:
        assert shrink(*DIGITS, *words, "--output", tmp_path / "out", "--num-samples", 32) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert shrink("--model", "tests.cli.toys:make_model", "--sparsity", 0.5) == 2
    assert "Expected --data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert torch.is_grad_enabled()
