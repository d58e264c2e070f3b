"""Data sets in the folders of their libraries, and what is said of other folders."""

from __future__ import annotations

import pytest
import torch

from tests.experiments import generated
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.data import SOURCES
from torchprune_bayes.experiments.examples import Examples, Split

pytest.importorskip("torchvision")


def split(count: int = 50) -> Split:
    inputs = torch.arange(count, dtype=torch.float32)[:, None]
    examples = Examples(inputs, torch.arange(count) % 5)
    return Split(examples, Examples(inputs + 100, examples.labels), 5)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_files_of_mnist_are_normalised_and_resized(tmp_path, name):
    folder = generated.write_mnist(tmp_path, name={"mnist": "MNIST"}.get(name, "FashionMNIST"))
    plain, large = (SOURCES[name](folder, size, None) for size in (None, 32))
    assert plain.shape == (1, 28, 28)
    assert large.shape == (1, 32, 32)
    assert plain.classes == 10
    assert len(plain.train) == len(plain.test) == 200
    pixels, labels = generated.bars(200, 28)
    source = SOURCES[name]
    expected = (pixels[:, None] / 255.0 - source.mean[0]) / source.std[0]
    torch.testing.assert_close(plain.train.inputs, expected)
    assert torch.equal(plain.test.labels, labels)


@pytest.mark.parametrize(("name", "column"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_parquet_files_of_the_hub_are_read(tmp_path, name, column):
    pytest.importorskip("pyarrow")
    found = SOURCES[name](generated.write_cifar(tmp_path, label=column), None, None)
    assert found.shape == (3, 32, 32)
    pixels, labels = generated.bars(120, 32)
    first = (pixels[0] / 255.0 - 0.4822) / 0.1994  # green
    torch.testing.assert_close(found.train.inputs[0, 1], first)
    assert torch.equal(found.train.labels, labels)


def test_folders_of_images_are_read_when_they_are_needed(tmp_path):
    found = SOURCES["image folders"](generated.write_folders(tmp_path), 32, None)
    assert found.classes == 10
    assert found.shape == (3, 32, 32)
    part = found.train.first(20)
    images, labels = next(iter(part.loader(20, shuffle=False)))
    assert images.shape == (20, 3, 32, 32)
    assert len(labels.unique()) == 10  # of every class, though the files are sorted by class
    assert found.with_random_labels().train.labels.tolist() != found.train.labels.tolist()


def test_every_layout_has_its_sentence(tmp_path):
    for name, source in SOURCES.items():
        if name != "texts":
            with pytest.raises(ArgumentError, match=r"^Expected .*`") as caught:
                source(tmp_path, None, None)
            assert str(tmp_path) in str(caught.value)


def test_classes_of_both_parts_must_be_the_same(tmp_path):
    generated.write_folders(tmp_path)
    for file in (tmp_path / "val" / "n09").iterdir():
        file.unlink()
    (tmp_path / "val" / "n09").rmdir()
    with pytest.raises(ArgumentError, match="Expected the same classes"):
        SOURCES["image folders"](tmp_path, 32, None)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ArgumentError, match="Expected a folder of images per class"):
        SOURCES["image folders"](tmp_path, 32, None)


def test_columns_of_parquet_files_that_are_missing_are_named(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(ArgumentError, match=r"Expected the columns img and label in .*got img, x"):
        SOURCES["cifar10"](generated.write_cifar(tmp_path, label="x"), None, None)


def test_what_is_held_out_is_not_trained_on_and_the_test_set_stays_untouched():
    found = split().held_out()
    train, out = (set(part.inputs.flatten().tolist()) for part in (found.train, found.test))
    assert len(train) == 40
    assert len(out) == 10
    assert train | out == set(range(50))
    again = split().held_out()
    assert torch.equal(again.test.inputs, found.test.inputs)


def test_random_labels_are_drawn_for_training_alone():
    whole = split(1000)
    found = whole.with_random_labels()
    assert torch.equal(found.test.labels, whole.test.labels)
    assert torch.equal(found.train.inputs, whole.train.inputs)
    agreement = (found.train.labels == whole.train.labels).float().mean()
    assert 0.1 < agreement < 0.3  # a fifth by chance
    assert torch.equal(whole.with_random_labels().train.labels, found.train.labels)
