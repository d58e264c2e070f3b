"""A shrunk model comes back bit for bit, and whatever does not fit is refused untouched."""

from __future__ import annotations

import json
import pickletools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.damage import flipped, truncated
from tests.interruptions import interrupted_everywhere
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.structured.saving import load_shrunk, save_shrunk


class Net(nn.Module):
    """A convolution with a norm, tied layers, a frozen tensor and a buffer outside the state."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width, bias=False)
        self.layer_norm = nn.LayerNorm(width)
        self.encoder = nn.Linear(width, 4, bias=False)
        self.decoder = nn.Linear(width, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.units = width
        self.register_buffer("scratch", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.convolution(x))).mean(dim=(2, 3))
        x = self.layer_norm(x)
        return self.encoder(x) + self.decoder(x) * self.units + self.frozen.sum()


IMAGES = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def small(width: int = 4) -> Net:
    torch.manual_seed(0)
    model = Net(width)
    model(IMAGES)  # running statistics
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {
        name: (id(tensor), tensor.detach().clone())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (identity, tensor) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], tensor)


def test_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = small()
    save_shrunk(model, tmp_path / "new" / "folder")
    fresh = Net().eval()
    assert load_shrunk(fresh, tmp_path / "new" / "folder") is fresh
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
        assert fresh.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(fresh(IMAGES), model(IMAGES))


def test_sizes_ties_and_modes_follow(tmp_path: Path) -> None:
    save_shrunk(small(), tmp_path)
    fresh = load_shrunk(Net().train(), tmp_path)
    assert isinstance(fresh, Net)
    assert (fresh.units, fresh.depthwise.groups, fresh.norm.num_features) == (4, 4, 4)
    assert fresh.layer_norm.normalized_shape == (4,)
    assert fresh.encoder.weight is fresh.decoder.weight
    assert fresh.training
    assert not fresh.frozen.requires_grad
    assert fresh.encoder.weight.requires_grad


def test_ties_that_were_cut_stay_cut(tmp_path: Path) -> None:
    model = small()
    model.decoder.weight = nn.Parameter(model.encoder.weight.detach() * 2)
    save_shrunk(model, tmp_path)
    fresh = load_shrunk(Net(), tmp_path)
    assert isinstance(fresh, Net)
    assert torch.equal(fresh.decoder.weight, 2 * fresh.encoder.weight)


def test_numbers_that_a_run_sets_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.last_length = 7  # type: ignore[assignment]
    save_shrunk(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(3, 2))
    fresh.last_length = None  # type: ignore[assignment]
    load_shrunk(fresh, tmp_path)
    assert fresh.last_length == 7


def test_views_of_one_memory_are_stored_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    memory = torch.randn(6, 3)
    model[0].weight, model[1].weight = nn.Parameter(memory[:3]), nn.Parameter(memory[2:5])
    save_shrunk(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    load_shrunk(fresh, tmp_path)
    assert torch.equal(fresh.state_dict()["0.weight"], memory[:3])
    assert torch.equal(fresh.state_dict()["1.weight"], memory[2:5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_the_saved_one(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    save_shrunk(model, tmp_path)
    fresh = load_shrunk(Net(), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
        assert fresh.state_dict()[name].dtype == tensor.dtype


def test_channels_last_weights_are_saved(tmp_path: Path) -> None:
    model = small().to(memory_format=torch.channels_last)
    save_shrunk(model, tmp_path)
    fresh = load_shrunk(Net().eval(), tmp_path)
    torch.testing.assert_close(fresh(IMAGES), model(IMAGES))


def test_loaded_model_does_not_hang_on_to_the_file(tmp_path: Path) -> None:
    model = small()
    save_shrunk(model, tmp_path)
    fresh = load_shrunk(Net(), tmp_path)
    path = tmp_path / "shrunk.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_trains_after_loading(tmp_path: Path) -> None:
    save_shrunk(small(), tmp_path)
    fresh = load_shrunk(Net().train(), tmp_path)
    fresh(IMAGES).square().sum().backward()
    assert all(p.grad is not None for p in fresh.parameters() if p.requires_grad)


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    save_shrunk(nn.DataParallel(small()), tmp_path)
    wrapped = nn.DataParallel(Net())
    assert load_shrunk(wrapped, tmp_path) is wrapped
    assert wrapped.module.units == 4


def test_saving_changes_nothing_and_pickles_nothing(tmp_path: Path) -> None:
    model = small()
    before = snapshot(model)
    save_shrunk(model, tmp_path)
    assert_untouched(model, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shrunk.json", "shrunk.safetensors"]
    json.loads((tmp_path / "shrunk.json").read_text())
    with pytest.raises(ValueError, match=r"opcode|pickle exhausted"):
        list(pickletools.genops((tmp_path / "shrunk.safetensors").read_bytes()))


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "shrunk.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def _overwrite(text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "shrunk.json").write_text(text)

    return apply


def _cut_file(folder: Path) -> None:
    path = folder / "shrunk.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "shrunk.safetensors")
    tensors.pop("norm.bias")
    save_file(tensors, folder / "shrunk.safetensors")


BREAKAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda folder: (folder / "shrunk.json").unlink(), "a file `shrunk.json`"),
    "no tensors": (lambda folder: (folder / "shrunk.safetensors").unlink(), "a file `shrunk.safe"),
    "truncated": (_cut_file, "a safetensors file"),
    "no JSON": (_overwrite("{"), "in JSON"),
    "a list": (_overwrite("[]"), "of format"),
    "version": (_edit(lambda content: content.update(version=2)), "version 1"),
    "format": (_edit(lambda content: content.update(format="other")), "of format"),
    "no section": (_edit(lambda content: content.pop("aliases")), "`aliases` in the manifest"),
    "shape": (_edit(lambda c: c["tensors"]["norm.bias"].update(shape=[5])), "`norm.bias` of"),
    "no shape": (_edit(lambda c: c["tensors"]["norm.bias"].pop("shape")), "shape and dtype"),
    "negative": (_edit(lambda c: c["tensors"]["norm.bias"].update(shape=[-4])), "shape and dtype"),
    "dtype": (_edit(lambda c: c["tensors"]["norm.bias"].update(dtype="nn")), "name of a dtype"),
    "other dtype": (_edit(lambda c: c["tensors"]["norm.bias"].update(dtype="int8")), "`norm.bias`"),
    "alias": (_edit(lambda c: c["aliases"].update({"norm.x": "nowhere"})), "tied to a stored"),
    "alias type": (_edit(lambda c: c["aliases"].update({"norm.x": 3})), "name of a tensor"),
    "attribute": (_edit(lambda c: c["attributes"]["norm"].update(other=3)), "`norm.other`"),
    "module": (_edit(lambda c: c["attributes"].update(nowhere={"a": 1})), "a module `nowhere`"),
    "value": (_edit(lambda c: c["attributes"]["norm"].update(num_features="4")), "whole numbers"),
    "float": (_edit(lambda c: c["attributes"]["norm"].update(num_features=4.0)), "whole numbers"),
    "kind": (_edit(lambda c: c["attributes"]["norm"].update(num_features=[4])), "num_features"),
    "dropped tensor": (_drop_tensor, "to list the file's tensors"),
}


@pytest.mark.parametrize("case", BREAKAGES)
def test_broken_folder_is_refused_before_anything_changes(tmp_path: Path, case: str) -> None:
    save_shrunk(small(), tmp_path)
    damage, message = BREAKAGES[case]
    damage(tmp_path)
    fresh = Net()
    before = snapshot(fresh)
    with pytest.raises(ArgumentError, match=message):
        load_shrunk(fresh, tmp_path)
    assert_untouched(fresh, before)
    assert fresh.units == 6


class NoAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.units


class OtherRank(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm.bias = nn.Parameter(torch.zeros(6, 1))


class More(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (NoAttribute, "`units` to be a number"),
        (OtherRank, "`norm.bias` with 1 dimensions"),
        (More, "2 tensors more and 0 fewer"),
        (lambda: nn.Linear(2, 2), "2 tensors more and"),
    ],
)
def test_other_model_is_refused(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    save_shrunk(small(), tmp_path)
    other = build()
    before = snapshot(other)
    with pytest.raises(ArgumentError, match=message):
        load_shrunk(other, tmp_path)
    assert_untouched(other, before)


def test_masks_and_extra_state_are_refused(tmp_path: Path) -> None:
    model = small()
    prune.l1_unstructured(model.encoder, "weight", 0.5)
    with pytest.raises(ParameterError, match="pruned `encoder`"):
        save_shrunk(model, tmp_path)

    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"anything": 1}

    with pytest.raises(ParameterError, match="extra state in `0`"):
        save_shrunk(nn.Sequential(Extra(2, 2)), tmp_path)
    assert not list(tmp_path.iterdir())


def _retyped(folder: Path) -> None:
    """Both files agree on a type that no weight can have, and nothing says that they changed."""
    tensors = load_file(folder / "shrunk.safetensors")
    tensors["norm.bias"] = tensors["norm.bias"].long()
    save_file(tensors, folder / "shrunk.safetensors")

    def change(content: dict) -> None:
        content["tensors"]["norm.bias"]["dtype"] = "int64"
        del content["sha256"]

    _edit(change)(folder)


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    save_shrunk(small(), tmp_path)
    _retyped(tmp_path)
    fresh = Net()
    before = snapshot(fresh)
    with pytest.raises(ArgumentError, match=r"`norm\.bias` of a type like .* got int64"):
        load_shrunk(fresh, tmp_path)
    assert_untouched(fresh, before)


@pytest.mark.parametrize("name", ["shrunk.json", "shrunk.safetensors"])
@settings(max_examples=30)
@given(st.data())
def test_damaged_files_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder, model, fresh = tmp_path_factory.mktemp("damaged"), small(), Net()
    save_shrunk(model, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(st.one_of(flipped(content), truncated(content))))
    before = snapshot(fresh)
    try:
        load_shrunk(fresh, folder)
    except ArgumentError:
        assert_untouched(fresh, before)
        assert fresh.units == 6
    else:
        assert fresh.units == 4
        for key, tensor in model.state_dict().items():
            assert torch.equal(fresh.state_dict()[key], tensor)


def test_a_folder_holds_the_older_model_or_the_new_one() -> None:
    older, newer = small(), small()
    with torch.no_grad():
        newer.norm.bias.add_(1.0)

    def prepare() -> tuple[Callable[[], None], Path]:
        folder = Path(tempfile.mkdtemp())
        save_shrunk(older, folder)
        return lambda: save_shrunk(newer, folder), folder

    found = set()
    functions = {"save_shrunk", "save_tensors", "write_whole", "sync"}
    for folder in interrupted_everywhere(prepare, functions):
        loaded = load_shrunk(Net(), folder).state_dict()
        alike = [
            all(torch.equal(loaded[name], t) for name, t in one.state_dict().items())
            for one in (older, newer)
        ]
        assert alike.count(True) == 1
        found.add(alike.index(True))
        shutil.rmtree(folder)
    assert found == {0, 1}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArgumentError, match=r"Expected to write .*file"):
        save_shrunk(small(), tmp_path / "file")
