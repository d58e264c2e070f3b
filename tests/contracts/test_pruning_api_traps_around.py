"""T15 to T21: ``torch.nn.utils.prune`` among copies, checkpoints, optimizers and wrappers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.contracts.cases import batches, calibration_of, live_count, masks_by_place, mlp, pairs
from tests.contracts.state import unchanged
from torchprune_bayes import (
    Calibration,
    Magnitude,
    WoodFisher,
    bake,
    detach_views,
    masks_of,
    prunable_parameters,
    prune_global,
)
from torchprune_bayes.errors import (
    ParameterError,
)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    meeting = tmp_path_factory.mktemp("process_group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_t15_deepcopy_works_after_detach_views():
    """``deepcopy`` refuses the masked view, and with it EMA, SWA and FLOP counters fail."""
    model = mlp()
    prune_global(pairs(model), Magnitude, amount=0.5)
    x, y = batches()[0]
    cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    twin = copy.deepcopy(detach_views(model))
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[0].weight_orig.mul_(2)
    assert not torch.equal(twin(x), model(x))
    assert not torch.equal(twin[0].weight, model[0].weight)
    torch.optim.swa_utils.AveragedModel(detach_views(model))


def test_t16_hugging_face_checkpoints_are_equal_after_bake(tmp_path):
    """``from_pretrained`` gives pruned layers random weights, with a log line and no exception."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=8, hidden_dim=16, n_heads=2, n_layers=1, max_position_embeddings=8
    )
    kind = transformers.DistilBertForSequenceClassification
    model = kind(config).eval()
    prune_global(prunable_parameters(model), Magnitude, amount=0.5)
    tokens = torch.arange(10).view(2, 5)
    logits = model(tokens).logits
    bake(model).save_pretrained(tmp_path)
    assert torch.equal(kind.from_pretrained(tmp_path)(tokens).logits, logits)


def test_t16_a_checkpoint_loads_where_the_host_alone_is_installed(tmp_path):
    """What is left on a model are PyTorch's names and hooks."""
    model = mlp()
    prune_global(pairs(model), WoodFisher, amount=0.5, calibration=calibration_of(model))
    plain = mlp(seed=1)
    for module, name in pairs(plain):
        prune.identity(module, name)
    plain.load_state_dict(model.state_dict())
    x, _ = batches()[0]
    assert torch.equal(plain(x), model(x))
    assert b"torchprune_bayes" not in pickle.dumps(model)


def states_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name.removesuffix("_orig") for name, _ in model.named_parameters()]
    stored = [optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()]
    return dict(zip(names, stored, strict=True))


def test_t17_optimizer_states_fit_before_and_after():
    """States are matched by position, and PyTorch moves what it prunes to the end."""
    model = nn.Sequential(nn.Linear(4, 4, bias=True), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(torch.randn(8, 4)), torch.randint(4, (8,))).backward()
    optimizer.step()
    expected = states_by_name(model, optimizer)
    order = [name for name, _ in model.named_parameters()]
    prune_global([(model[0], "weight")], Magnitude, amount=0.5)
    Magnitude.apply(model[1], "weight", amount=0.5)
    assert [name.removesuffix("_orig") for name, _ in model.named_parameters()] == order
    for _ in ("pruned", "baked"):
        loaded = torch.optim.Adam(model.parameters())
        loaded.load_state_dict(optimizer.state_dict())
        found = states_by_name(model, loaded)
        assert all(torch.equal(found[name], state) for name, state in expected.items())
        bake(model)
    assert [name for name, _ in model.named_parameters()] == order


def test_t18_the_output_projection_of_attention_is_refused():
    """Its forward pre-hook never runs: masks would be invisible to the forward pass."""
    model = nn.MultiheadAttention(8, 2)
    place = [(model.out_proj, "weight")]
    options = {"amount": 0.5, "calibration": Calibration(model, [], cross_entropy, params=place)}
    for call in (
        lambda: prune_global(place, Magnitude, amount=0.5),
        lambda: Magnitude.apply(model.out_proj, "weight", amount=0.5),
        lambda: prune.global_unstructured(place, WoodFisher, **options),
    ):
        with unchanged(model), pytest.raises(ParameterError, match="whose hooks never run"):
            call()
    assert prunable_parameters(model) == [(model, "in_proj_weight")]
    prune_global(prunable_parameters(model), Magnitude, amount=1.0)
    x = torch.randn(3, 1, 8)
    assert torch.equal(model(x, x, x)[0], model.out_proj.bias.expand(3, 1, 8))


def size_of(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(detach_views(model), buffer)
    return len(buffer.getvalue())


def test_t19_repeated_pruning_keeps_no_masks_alive():
    """Every call of PyTorch leaves a flat mask of the whole model behind."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sizes = []
    for _ in range(5):
        prune_global(pairs(model), Magnitude, amount=0.2)
        sizes.append(size_of(model))
    assert set(sizes) == {sizes[0]}
    # The weights, their masks and the masked views, four bytes each; no other copy of the masks.
    assert sizes[0] < 3 * 4 * (2 * 64 * 64) + 7000


@pytest.mark.parametrize("method", ["random", "woodfisher"])
def test_t20_equal_seeds_give_equal_masks_on_every_rank(method):
    """Ranks whose masks differ train different models, without a word.

    Two models in one process stand for two ranks; their global generators differ, as they do
    where every rank seeds its own data.
    """
    found = []
    for rank in range(2):
        model = mlp()
        shuffled = torch.utils.data.DataLoader(
            [(x[0], y[0]) for x, y in batches()], batch_size=1, shuffle=True
        )
        options = {}
        torch.manual_seed(rank)
        if method == "woodfisher":
            options["calibration"] = Calibration(model, shuffled, cross_entropy, seed=5)
        else:
            torch.manual_seed(5)
        prune_global(pairs(model), method, amount=0.5, **options)
        found.append(masks_by_place(model))
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_t21_sharded_tensors_are_refused(process_group):
    """On a DTensor PyTorch fails somewhere inside, after it has renamed parameters."""
    tensors = pytest.importorskip("torch.distributed.tensor")
    mesh = tensors.init_device_mesh("cpu", (1,))
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(
        tensors.distribute_tensor(model.weight.detach(), mesh, [tensors.Shard(0)])
    )
    weight = model.weight
    for call in (
        lambda: prune_global([(model, "weight")], Magnitude, amount=0.5),
        lambda: Magnitude.apply(model, "weight", amount=0.5),
    ):
        with pytest.raises(ParameterError, match="Expected a whole tensor, got the sharded"):
            call()
    assert list(model._parameters) == ["weight", "bias"]
    assert model.weight is weight
    assert not model._forward_pre_hooks


def test_compiled_models():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    x, _ = batches()[0]
    before = compiled(x)
    calibration = calibration_of(compiled, prunable_parameters(compiled))
    for _ in range(2):
        prune_global(prunable_parameters(compiled), WoodFisher, amount=0.5, calibration=calibration)
        assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)
    assert list(masks_of(compiled)) == ["0.weight", "2.weight"]


def test_models_wrapped_for_distributed_training(process_group):
    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    calibration = calibration_of(wrapped, prunable_parameters(wrapped))
    prune_global(None, WoodFisher, amount=0.5, calibration=calibration)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    x, y = batches()[0]
    for _ in range(2):
        cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    assert live_count(model) == 23
    assert all(
        int((m.weight_orig.grad[m.weight_mask == 0] != 0).sum()) == 0 for m, _ in pairs(model)
    )
    assert list(masks_of(wrapped)) == ["0.weight", "2.weight"]
