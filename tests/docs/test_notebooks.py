"""The notebooks run from top to bottom, as they were saved."""

import contextlib
import io
import json

import pytest
import torch

from tests.docs.pages import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEEDS = {"vit": "timm", "bmrs": "torch_pruning", "spam": "sklearn"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip(NEEDS[path.stem])
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for more
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
                assert bool(printed.getvalue()) == bool(cell["outputs"])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_saved_after_a_run_from_top_to_bottom(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    counts = [c["execution_count"] for c in book["cells"] if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = [output["output_type"] for c in book["cells"] for output in c.get("outputs", [])]
    assert kinds
    assert "error" not in kinds
