from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss
from torch.utils.checkpoint import checkpoint

from tests.calibration.cases import CLASSES, collected, mlp_calibration, mlp_data
from tests.contracts.state import unchanged
from torchprune_bayes import Calibration
from torchprune_bayes.calibration import _engines
from torchprune_bayes.errors import CalibrationError


class Branching(nn.Module):
    """Control flow that depends on data, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.layer(inputs)
        return output if bool(output.isfinite().all()) else -output


class _WrongUnderVmap(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], inputs: Tensor) -> tuple[Tensor, int]:
        return 2 * inputs, in_dims[0]


class ChangedByVmap(nn.Module):
    """Runs under vmap and gives something else there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return _WrongUnderVmap.apply(self.layer(inputs))


@pytest.fixture
def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with layers that have no rule."""
    monkeypatch.setattr(_engines, "_rules_are_right", lambda *_: False)


def test_the_engine_is_known_after_the_first_pass() -> None:
    calibration = mlp_calibration()
    assert calibration.engine is None
    collected(calibration)
    assert calibration.engine == "layers"


def test_forbidding_vmap_is_said() -> None:
    calibration = mlp_calibration(vectorize=False)
    collected(calibration)
    assert calibration.engine == "sequential (vectorize=False)"


@pytest.mark.usefixtures("no_rules")
def test_a_model_that_cannot_be_vmapped_falls_back_and_says_why() -> None:
    calibration = mlp_calibration(Branching().double())
    found = collected(calibration)
    assert str(calibration.engine).startswith("sequential (vmap fails: vmap:")
    expected = collected(mlp_calibration(calibration.model, vectorize=False))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("no_rules")
def test_mini_batches_through_convolutions_go_one_by_one_unless_vmap_is_forced() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(8, CLASSES)).double()
    data = [(inputs.unsqueeze(1), targets) for inputs, targets in mlp_data((4, 5, 3))]
    one_by_one = Calibration(model, data, cross_entropy, mini_batch=4)
    expected = collected(one_by_one)
    assert one_by_one.engine == "sequential (mini-batches through convolutions)"
    forced = Calibration(model, data, cross_entropy, mini_batch=4, vectorize=True)
    torch.testing.assert_close(collected(forced), expected)
    assert forced.engine == "vmap"


def test_forced_vmap_does_not_fall_back() -> None:
    with pytest.raises(CalibrationError, match="vmap can run for vectorize=True, got: vmap"):
        collected(mlp_calibration(Branching().double(), vectorize=True))


@pytest.mark.usefixtures("no_rules")
def test_a_model_that_vmap_changes_falls_back_and_says_by_how_much() -> None:
    calibration = mlp_calibration(ChangedByVmap().double())
    found = collected(calibration)
    assert str(calibration.engine).startswith("sequential (vmap differs by ")
    expected = collected(mlp_calibration(calibration.model, vectorize=False))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("no_rules")
def test_a_first_sample_without_gradients_does_not_prevent_vmap() -> None:
    data = mlp_data((4,))
    data[0][0][0] = 0.0
    model = nn.Linear(5, CLASSES, bias=False).double()
    calibration = Calibration(model, data, cross_entropy)
    assert not collected(calibration)[0].any()
    assert calibration.engine == "vmap"


def test_operations_that_vmap_loops_over_give_no_warning() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(24, CLASSES))
    data = [(torch.randn(4, 3, 8), torch.randint(CLASSES, (4,)))]
    vectorized = Calibration(model, data, cross_entropy)
    found = collected(vectorized)
    assert vectorized.engine == "vmap"
    expected = collected(Calibration(model, data, cross_entropy, vectorize=False))
    torch.testing.assert_close(found, expected)


# Gradients that are not


class Checkpointed(nn.Module):
    """A part that is computed again in the backward pass; its input needs no gradient."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.outer, self.reentrant = nn.Linear(8, CLASSES), reentrant

    def part(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden).tanh()

    def forward(self, ids: Tensor) -> Tensor:
        found = checkpoint(self.part, self.embedding(ids), use_reentrant=self.reentrant)
        return self.outer(found.mean(1))


class Plain(Checkpointed):
    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(self.part(self.embedding(ids)).mean(1))


def token_data(samples: int = 12) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (samples, 5), generator=source)
    return [(ids, torch.randint(CLASSES, (samples,), generator=source))]


@pytest.mark.parametrize("vectorize", ["auto", False])
@pytest.mark.parametrize("at_other_weights", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_through_checkpoints_are_those_without(
    reentrant: bool, at_other_weights: bool, vectorize: bool | str
) -> None:
    model, twin = Checkpointed(reentrant=reentrant), Plain(reentrant=False)
    calibration = Calibration(model, token_data(), cross_entropy, vectorize=vectorize)
    expected = Calibration(twin, token_data(), cross_entropy, vectorize=False)
    weights = None
    if at_other_weights:
        weights = {name: value.roll(1) for name, value in calibration.space.values().items()}
    with unchanged(model):
        found = collected(calibration, weights=weights)
        mean = calibration.mean_gradient(weights)
    torch.testing.assert_close(found, collected(expected, weights=weights))
    torch.testing.assert_close(mean, expected.mean_gradient(weights))
    assert found[:, :64].any()


def test_checkpoints_of_the_caller_work_as_before() -> None:
    collected(Calibration(Checkpointed(reentrant=True), token_data(), cross_entropy))
    model = Checkpointed(reentrant=False)
    calls: list[Tensor] = []
    model.inner.register_forward_hook(lambda *_: calls.append(_[2]))
    cross_entropy(model(token_data()[0][0]), token_data()[0][1]).backward()
    assert len(calls) == 2  # once forward, once again


class Cut(nn.Module):
    """A layer that the loss depends on and autograd does not reach."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.way = nn.Linear(5, 5), nn.Linear(5, CLASSES), way

    def forward(self, inputs: Tensor) -> Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                return self.outer(self.inner(inputs))
        hidden = self.inner(inputs)
        return self.outer(hidden.detach() if self.way == "detach" else _again(self.inner, inputs))


class _Again(torch.autograd.Function):
    """Computes a layer in the backward pass, as other libraries' checkpoints do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(inputs)


def _again(layer: nn.Module, inputs: Tensor) -> Tensor:
    return _Again.apply(layer, inputs)


@pytest.mark.parametrize("vectorize", ["auto", True, False])
@pytest.mark.parametrize("way", ["no_grad", "detach", "function"])
def test_weights_that_autograd_does_not_reach_are_refused(way: str, vectorize: Any) -> None:
    model = Cut(way).double()
    calibration = mlp_calibration(model, vectorize=vectorize)
    names = "inner.weight, outer.weight" if way == "no_grad" else r"inner\.weight: the graph"
    with unchanged(model), pytest.raises(CalibrationError, match=f"got none by {names}"):
        collected(calibration)
    if way == "detach" or (way == "function" and vectorize is not True):
        alone = mlp_calibration(model, params=[(model.outer, "weight")], vectorize=vectorize)
        assert collected(alone).any()


class Routed(nn.Module):
    """Experts that the first sample does not reach have gradients of zero, and are right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(5, CLASSES) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        places = (inputs[:, 0] * 10).long() % 3
        found = [self.experts[int(place)](x) for place, x in zip(places, inputs, strict=True)]
        return torch.stack(found)


def test_weights_that_some_inputs_do_not_reach_are_no_fault() -> None:
    calibration = mlp_calibration(Routed().double())
    rows = collected(calibration).unflatten(1, (3, -1)).any(2)
    assert (rows.sum(1) == 1).all()
    assert rows.any(0).sum() > 1
    assert str(calibration.engine).startswith("sequential (vmap fails")


def ctc(output: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return ctc_loss(output.transpose(0, 1), *target)


@pytest.mark.usefixtures("no_rules")
def test_losses_whose_rows_differ_go_one_by_one() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 5), nn.LogSoftmax(-1)).double()
    labels = torch.randint(1, 5, (4, 4))
    target = labels, torch.full((4,), 12), torch.tensor([1, 2, 3, 4])
    inputs = torch.randn(4, 12, 8, dtype=torch.float64)
    calibration = Calibration(model, [(inputs, target)], ctc)
    found = collected(calibration)
    assert str(calibration.engine).startswith("sequential")
    for index, row in enumerate(found):
        one = slice(index, index + 1)
        loss = ctc(model(inputs[one]), (labels[one], target[1][one], target[2][one]))
        (expected,) = torch.autograd.grad(loss, [model[0].weight])
        torch.testing.assert_close(row, expected.flatten())


class Late(nn.Module):
    """Looks at values of some samples alone, which are not the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls = nn.Linear(5, CLASSES), Counter[str]()  # a list would be restored

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls["forward"] += 1
        if self.calls["forward"] > 25:  # past the samples by which the engine is chosen
            assert inputs.isfinite().all()
        return self.layer(inputs)


@pytest.mark.usefixtures("no_rules")
def test_vmap_that_fails_later_on_gives_way_to_the_loop() -> None:
    model = Late().double()
    options: dict[str, Any] = {"check_deterministic": False, "memory_mb": 0.005}
    calibration = mlp_calibration(model, data=mlp_data((20, 30)), **options)
    found = collected(calibration)
    assert str(calibration.engine).startswith("sequential (vmap fails: vmap:")
    model.calls.clear()
    expected = mlp_calibration(model, data=mlp_data((20, 30)), vectorize=False, **options)
    assert torch.equal(found, collected(expected))


class Unlike(nn.Module):
    """Raises an error of its own under vmap, and only there."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(5, CLASSES), error

    def forward(self, inputs: Tensor) -> Tensor:
        if torch._C._functorch.is_gradtrackingtensor(self.layer.weight):
            raise self.error
        return self.layer(inputs)


@pytest.mark.usefixtures("no_rules")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        CalibrationError("one of our own"),
        KeyError("a mistake in the model"),
    ],
)
def test_only_errors_of_vmap_itself_are_caught(error: Exception) -> None:
    with pytest.raises(type(error), match=r"memory|own|mistake"):
        collected(mlp_calibration(Unlike(error).double()))


def test_errors_of_the_model_are_raised_as_they_are() -> None:
    class Broken(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            raise RuntimeError("a mistake in the model")

    with pytest.raises(RuntimeError, match="a mistake in the model"):
        collected(mlp_calibration(Broken(5, CLASSES).double(), check_deterministic=False))
