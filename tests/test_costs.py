from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tests.contracts.state import unchanged
from tests.references.flops import flops_without_fused_kernels
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.costs import flop_counter, flops_per_weight
from torchprune_bayes.errors import ArgumentError


def found_for(model: nn.Module, *shape: int, classes: int = 2) -> dict[str, float]:
    data = [(torch.randn(3, *shape), torch.randint(classes, (3,)))]
    return flops_per_weight(Calibration(model, data, cross_entropy))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_convolution_uses_a_weight_once_per_output_position(
    stride: int, padding: int, groups: int, dilation: int
) -> None:
    conv = nn.Conv2d(4, 8, 3, stride, padding, dilation, groups)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    height, width = ((n + 2 * padding - 2 * dilation - 1) // stride + 1 for n in (9, 12))
    assert found_for(model, 4, 9, 12) == {"0.weight": 2 * height * width}


@pytest.mark.parametrize(("kind", "dimensions"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_convolutions_of_every_dimension_are_counted(
    kind: type[nn.Module], dimensions: int
) -> None:
    model = nn.Sequential(kind(1, 2, 3), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    assert found_for(model, 1, *[6] * dimensions) == {"0.weight": 2 * 4**dimensions}


def test_a_transposed_convolution_uses_a_weight_once_per_input_position() -> None:
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2, groups=1)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert found_for(model, 3, 5, 7) == {"0.weight": 2 * 5 * 7}


def test_a_linear_layer_uses_a_weight_once_per_token() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(6 * 5, 2))
    assert found_for(model, 5, 4) == {"0.weight": 2 * 5, "2.weight": 2}


def test_a_model_that_is_one_layer_is_counted() -> None:
    assert found_for(nn.Linear(4, 2), 4) == {"weight": 2}


def test_flops_add_up_to_what_torch_counts() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    found = found_for(model, 2, 9, 9)
    total = sum(
        found[f"{n}.weight"] * model.get_parameter(f"{n}.weight").numel() for n in (0, 1, 3)
    )
    assert total == flops_without_fused_kernels(model, torch.randn(1, 2, 9, 9))


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    layer = nn.Linear(3, 3)
    assert found_for(nn.Sequential(layer, nn.ReLU(), layer), 3, classes=3) == {"0.weight": 4}


@pytest.mark.parametrize("same_width", [True, False])
def test_attention_projections_are_used_once_per_token(same_width: bool) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = {} if same_width else {"kdim": 6, "vdim": 6}
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **widths)
            self.memory = nn.Parameter(torch.randn(1, 7, 4 if same_width else 6))
            self.head = nn.Linear(4, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.attention(tokens, self.memory, value=self.memory)[0].mean(1))

    found = found_for(Attending(), 3, 4)
    assert found.pop("head.weight") == 2
    if same_width:  # one tensor, whose rows are shared out to 3, 7 and 7 tokens
        assert found == {"attention.in_proj_weight": pytest.approx(2 * (3 + 7 + 7) / 3)}
    else:
        projections = {"q_proj_weight": 6, "k_proj_weight": 14, "v_proj_weight": 14}
        assert found == {f"attention.{name}": uses for name, uses in projections.items()}


def test_the_fast_path_of_torchs_encoder_is_counted_too() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(12, 2))
    found = found_for(model, 3, 4)
    assert found.pop("2.weight") == 2
    assert len(found) == 3
    assert set(found.values()) == {2 * 3}


def test_counting_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    data = [(torch.randn(3, 1, 4, 4), torch.randint(2, (3,)))]
    with unchanged(model):
        flops_per_weight(Calibration(model, data, cross_entropy))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_is_not_called_is_refused() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    with pytest.raises(ArgumentError, match=r"no call of the layer of `unused\.weight`"):
        found_for(Unused(), 3)


def test_a_layer_of_another_kind_is_refused_and_its_hook_removed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    data = [(torch.randn(3, 3), torch.randint(2, (3,)))]
    params = [*prunable_parameters(model), (model[1], "weight")]
    calibration = Calibration(model, data, cross_entropy, params)
    with unchanged(model), pytest.raises(ArgumentError, match=r"got `1\.weight` of LayerNorm"):
        flops_per_weight(calibration)
    assert not any(module._forward_hooks for module in model.modules())


FUSED: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: GroupedQueries(),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2
    ),
    "multihead": lambda: Multihead(),
    "lstm": lambda: nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(16, 8, batch_first=True),
}


class GroupedQueries(nn.Module):
    """Fewer keys and values than queries, values of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor, count: int) -> Tensor:
            return y.unflatten(-1, (count, -1)).transpose(1, 2)

        q, k, v = heads(self.q(x), 4), heads(self.k(x), 2), heads(self.v(x), 2)
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[:, :3], x[:, :3], need_weights=False)[0]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("gradients", [True, False])
def test_fused_kernels_count_what_their_products_would(name: str, gradients: bool) -> None:
    model, x = FUSED[name]().eval(), torch.randn(2, 5, 16)
    with torch.set_grad_enabled(gradients), flop_counter() as counter:
        model(x)
    found = counter.get_total_flops()
    assert found == flops_without_fused_kernels(model.double(), x.double()) > 0  # no oneDNN in it


def test_counting_keeps_the_switch_of_the_fast_path() -> None:
    for before in (False, True):
        torch.backends.mha.set_fastpath_enabled(before)
        with pytest.raises(ZeroDivisionError), flop_counter():
            _ = 1 / 0
        assert torch.backends.mha.get_fastpath_enabled() is before
