"""Classified texts in the layouts of the Hub and of IMDB, and what is said of others."""

from __future__ import annotations

import pytest
import torch

from tests.experiments import generated
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.texts import load_classifier, load_texts

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(generated.write_transformer(tmp_path_factory.mktemp("model"), "distilbert"))


def test_tables_and_imdb_folders_give_the_same(tmp_path, model):
    table = load_texts(generated.write_texts(tmp_path / "table"), 8, model)
    assert table.shape == (8,)
    assert table.classes == 2
    for split in ("train", "test"):
        for row in range(64):
            label = row % 2
            folder = tmp_path / "imdb" / split / ("good", "poor")[label]
            folder.mkdir(parents=True, exist_ok=True)
            text = ("a good film", "a bad film")[label] + " indeed" * (row % 3)
            (folder / f"{row:03d}.txt").write_text(text)
        (tmp_path / "imdb" / "train" / "unsup").mkdir(exist_ok=True)
        (tmp_path / "imdb" / "train" / "unsup" / "0.txt").write_text("film")
    imdb = load_texts(tmp_path / "imdb", 8, model)
    assert len(imdb.train) == len(table.train) == 64
    counted = [sorted(map(tuple, part.train.inputs.tolist())) for part in (table, imdb)]
    assert counted[0] == counted[1]


def test_padding_is_no_part_of_a_text(tmp_path, model):
    classifier = load_classifier(model, 2)
    short = torch.tensor([[2, 3, 5]])
    padded = torch.tensor([[2, 3, 5, 0, 0]])
    torch.testing.assert_close(classifier(padded), classifier(short))


def test_tables_without_a_header_are_told_by_their_labels(tmp_path, model):
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text("a good film\t1\na bad film\t0\n" * 4)
    found = load_texts(tmp_path, 8, model)
    assert len(found.train) == 8
    assert found.train.labels.tolist() == [1, 0] * 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"to hold train\.csv, \.tsv, \.jsonl or \.parquet with the columns text and label"),
        ("words,class\na,b\n", "Expected the columns text and label in"),
        ("", "Expected the columns text and label in"),
    ],
)
def test_other_layouts_are_one_sentence(tmp_path, model, rows, message):
    if rows is not None:
        for split in ("train", "test"):
            (tmp_path / f"{split}.csv").write_text(rows)
    with pytest.raises(ArgumentError, match=message):
        load_texts(tmp_path, 8, model)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ArgumentError, match="Expected a tokenizer beside the model"):
        load_classifier(str(tmp_path), 2)
