"""Models inside the wrappers that training puts around them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.calibration.cases import Sequential, assert_same, collected, conv_data, conv_net
from tests.contracts.state import unchanged
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.params import unwrap


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _compiled_in_place(model: Sequential) -> Sequential:
    model.compile(backend="eager")
    return model


def _with_a_compiled_part(model: Sequential) -> Sequential:
    model[0] = torch.compile(model[0], backend="eager")
    return model


WRAPPERS: dict[str, Callable[[Sequential], Any]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "compile": _compiled_in_place,
    "compiled part": _with_a_compiled_part,
    "compiled and distributed": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(model), backend="eager"
    ),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("vectorize", ["auto", False])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_has_the_gradients_of_the_model_inside(
    wrap: Callable[[Sequential], Any], vectorize: bool | str
) -> None:
    expected = collected(Calibration(conv_net(), conv_data(), cross_entropy))
    wrapped = wrap(conv_net()).eval()
    cross_entropy(wrapped(conv_data()[0][0]), conv_data()[0][1]).backward()
    wrapped.train()
    params = prunable_parameters(wrapped)
    with unchanged(unwrap(wrapped)):
        calibration = Calibration(wrapped, conv_data(), cross_entropy, params, vectorize=vectorize)
        found = collected(calibration)
    assert_same(found, expected)


def test_channels_last_weights_have_the_same_gradients() -> None:
    expected = collected(Calibration(conv_net(), conv_data(), cross_entropy))
    model = conv_net().to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    with unchanged(model):
        found = collected(Calibration(model, conv_data(), cross_entropy))
    assert_same(found, expected)
