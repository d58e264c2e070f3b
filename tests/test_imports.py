import subprocess
import sys

import pytest

OPTIONAL = (
    "transformers",
    "accelerate",
    "timm",
    "torch_pruning",
    "laplace",
    "datasets",
    "matplotlib",
    "sklearn",
    "torchvision",
    "foolbox",
    "codecarbon",
    "scipy",
    "torch._dynamo",  # not optional, but seconds to load
)


@pytest.mark.parametrize("module", ["torchprune_bayes", "torchprune_bayes.cli"])
def test_importing_the_package_loads_no_optional_package(module: str) -> None:
    program = f"import sys, {module}; print(*(m for m in {OPTIONAL} if m in sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == ""


def test_everything_exported_exists_and_is_documented() -> None:
    import torchprune_bayes

    for name in torchprune_bayes.__all__:
        assert getattr(torchprune_bayes, name).__doc__
