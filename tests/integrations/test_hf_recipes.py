from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.integrations.processes import in_two_processes, load_all, save_from
from tests.integrations.scripts import recipe

QUICK = ["--max-steps", "6", "--max-samples", "24", "--batch-size", "6", "--layers", "1"]
QUICK += ["--width", "24", "--calibration-samples", "8", "--prune-steps", "2"]


def run(name: str, folder: Path, *more: str) -> dict[str, Any]:
    with recipe("hf", name) as module:
        found: dict[str, Any] = module.main([*QUICK, "--output", str(folder), *more])
    return found


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("prune_language_model", ["--method", "diagonal-fisher"]),
        ("prune_text_classifier", ["--method", "woodfisher", "--bf16"]),
        ("prune_image_classifier", ["--method", "snip"]),
    ],
)
def test_recipes_train_prune_and_save(tmp_path: Path, name: str, more: list[str]) -> None:
    dense = run(name, tmp_path / "dense", "--sparsity", "0")
    assert dense["eval_sparsity"] == 0
    found = run(name, tmp_path / "sparse", *more)
    assert found["eval_sparsity"] == pytest.approx(0.8, abs=2e-3)
    written = json.loads((tmp_path / "sparse" / "results.json").read_text())
    assert written["metrics"]["eval_nll"] == found["eval_nll"]
    again = run(name, tmp_path / "again", "--model", str(tmp_path / "dense" / "model"), "--distill")
    assert again["eval_sparsity"] == pytest.approx(0.8, abs=2e-3)
    written = json.loads((tmp_path / "again" / "results.json").read_text())
    assert written["settings"]["method"] == "layerwise"


def _in_a_process(folder: Path) -> None:
    found = run("prune_text_classifier", folder, "--method", "diagonal-fisher")
    save_from(dist.get_rank(), found["eval_sparsity"], folder.with_suffix(".found"))


def test_a_recipe_runs_in_two_processes(tmp_path: Path) -> None:
    in_two_processes(_in_a_process, tmp_path / "out")
    assert load_all(tmp_path / "out.found") == [pytest.approx(0.8, abs=2e-3)] * 2


def test_a_recipe_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = run("prune_text_classifier", tmp_path)
    again = run("prune_text_classifier", tmp_path, "--resume")
    assert again["eval_nll"] == first["eval_nll"]


@pytest.mark.parametrize("source", ["wikitext-2", "tinyshakespeare"])
def test_language_texts_of_local_folders(shared_data: Path, source: str) -> None:
    with recipe("hf", "offline_text") as module:
        train, test = module.language_texts(shared_data / source)
        tokenizer = module.train_tokenizer([train[:20_000]], 300)
        blocks = module.blocks_of(test[:5000], tokenizer, 16)
    assert len(train) > len(test[:100_000])
    assert all(len(block["input_ids"]) == 16 for block in blocks)
    assert tokenizer.decode(tokenizer(test[:200])["input_ids"]) == test[:200]


def test_local_text_and_image_folders(shared_data: Path, tmp_path: Path) -> None:
    data = ["--data", str(shared_data / "sst2")]
    assert run("prune_text_classifier", tmp_path / "text", *data)["eval_sparsity"] > 0.79
    data = ["--data", str(shared_data / "cifar10-jpeg")]
    assert run("prune_image_classifier", tmp_path / "images", *data)["eval_sparsity"] > 0.79
