import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.cli import toys
from torchprune_bayes.cli._sources import load_data, load_model, normalisation_of
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError, MissingExtraError


def model_from(source, checkpoint=None, random_init=False):
    return load_model(source, checkpoint=checkpoint, random_init=random_init)


def data_from(source, evaluation=None, model=None, batch_size=4, num_samples=8):
    return load_data(
        source, evaluation, model or torch.nn.Identity(),
        batch_size=batch_size, num_samples=num_samples,
    )  # fmt: skip


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_a_file_of_torch_save_is_loaded(tmp_path, nest):
    wanted = {name: torch.randn_like(v) for name, v in toys.make_model().state_dict().items()}
    path = tmp_path / "weights.pt"
    torch.save({nest: wanted, "epoch": 3} if nest else wanted, path)
    found = model_from("tests.cli.toys:make_model", path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_file_that_runs_code_is_refused(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.save({"0.weight": Trap()}, path)
    with pytest.raises(ArgumentError, match="to hold the weights of Sequential"):
        model_from("tests.cli.toys:make_model", path)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.pt", None),
        ("missing.safetensors", None),
        ("bad.safetensors", b"no"),
        ("bad.pt", b"no"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=name):
        model_from("tests.cli.toys:make_model", path)


def test_safetensors_must_fit(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = toys.make_model().state_dict()
    save_file(state | {"more": torch.zeros(1)}, path)
    with pytest.raises(ArgumentError, match="more"):
        model_from("tests.cli.toys:make_model", path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18", "`module:callable`, got 'resnet18'"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("tests.cli.toys:nothing", "no attribute 'nothing'"),
        ("timm:no_such_model", "Unknown model"),
    ],
)
def test_a_model_that_does_not_exist_is_named(source, message):
    with pytest.raises(ArgumentError, match=message):
        model_from(source)


def test_a_model_is_a_module_from_a_callable():
    with pytest.raises(ArgumentTypeError, match=r"return a torch.nn.Module, got NoModel"):
        model_from("tests.cli.toys:NoModel")
    with pytest.raises(ArgumentTypeError, match="to be callable, got int"):
        model_from("tests.cli.toys:not_callable")


def test_a_folder_that_is_no_hugging_face_model_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="Expected a Hugging Face model"):
        model_from(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [("timm:resnet18", "timm", "timm"), ("hf:x", "transformers", "hf")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, source, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} .*\.\[{extra}\]"):
        model_from(source)


def test_digits_calibrate_and_evaluate_on_different_images():
    data = data_from("digits")
    assert data.evaluated_on == "the test images of digits"
    assert len(data.evaluation[0][1]) == 4
    first = next(iter(data.calibration))
    assert len(first[1]) == 8
    with pytest.raises(ArgumentError, match="at most 1000 samples"):
        data_from("digits", num_samples=1001)


def test_batches_of_a_callable_are_used_for_both_unless_told():
    data = data_from("tests.cli.toys:make_batches")
    assert data.calibration is data.evaluation
    assert "calibration data" in data.evaluated_on
    other = data_from("tests.cli.toys:make_batches", "digits")
    assert other.evaluated_on == "the test images of digits"
    assert len(other.evaluation) == 125


def test_data_must_be_batches():
    with pytest.raises(ArgumentTypeError, match="iterable of batches, got NoModel"):
        data_from("tests.cli.toys:NoModel")


@pytest.mark.parametrize(("name", "size"), [(None, 224), ("test_resnet", 160)])
def test_a_folder_of_images(tmp_path, name, size):
    timm, image = pytest.importorskip("timm"), pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for index in range(3):
            image.new("RGB", (40, 30), (index, 0, 0)).save(tmp_path / label / f"{index}.png")
    model = torch.nn.Identity() if name is None else timm.create_model(name, num_classes=2)
    batches = list(data_from(str(tmp_path), model=model).calibration)
    assert [inputs.shape for inputs, _ in batches] == [(4, 3, size, size), (2, 3, size, size)]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_folder_without_classes_is_refused(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(ArgumentError, match="a folder per class"):
        data_from(str(tmp_path))


def test_a_folder_of_other_classes_is_refused(tmp_path):
    timm, image = pytest.importorskip("timm"), pytest.importorskip("PIL.Image")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(ArgumentError, match="each of the 3 classes of ResNet, got 2 folders: use"):
        data_from(str(tmp_path), model=model)


@pytest.mark.parametrize("source", ["timm:test_resnet", "tests.cli.test_sources:make_model"])
def test_models_are_built_with_options(source):
    if source.startswith("timm"):
        pytest.importorskip("timm")
    options = {"num_classes": 7}
    model = load_model(source, checkpoint=None, random_init=True, options=options)
    assert list(model.parameters())[-1].numel() == 7
    with pytest.raises((ArgumentError, TypeError), match="nothing"):
        load_model(source, checkpoint=None, random_init=True, options={"nothing": 1})


def make_model(num_classes):
    return torch.nn.Linear(2, num_classes)


def test_published_weights_that_cannot_be_had_are_one_sentence(monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(*_, **__):
        raise OSError("no connection\nand much more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ArgumentError, match="weights of `resnet18`, got: no connection Pass"):
        load_model("timm:resnet18", checkpoint=None, random_init=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_as_many_channels_as_the_model_takes(tmp_path, channels):
    timm, image = pytest.importorskip("timm"), pytest.importorskip("PIL.Image")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        image.new("L", (32, 32)).save(tmp_path / name / "0.png")
    model = timm.create_model("test_resnet", num_classes=2, in_chans=channels)
    [(images, _)] = data_from(str(tmp_path), model=model).calibration
    assert images.shape[1] == channels
    assert model(images).shape == (2, 2)
    scale = normalisation_of(str(tmp_path), model)
    assert {len(values) for values in scale.values()} == {channels}
