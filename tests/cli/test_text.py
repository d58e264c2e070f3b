import json

import pytest
import torch

from torchprune_bayes.cli import main
from torchprune_bayes.cli._sources import load_model
from torchprune_bayes.cli._text import TextOptions, text_batches
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError

transformers = pytest.importorskip("transformers")

WORDS = ["good", "bad", "film", "a", "very", "not"]
ROWS = [("a good film", "yes"), ("a bad film", "no"), ("very good", "yes"), ("not good", "no")] * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier and a language model, each with the same small tokenizer beside it."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )
    size = len(vocabulary)
    torch.manual_seed(0)
    classifier = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=size, dim=8, hidden_dim=16, n_layers=1, n_heads=2, num_labels=2,
            max_position_embeddings=16, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
        )
    )  # fmt: skip
    language = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=size, n_embd=8, n_layer=1, n_head=2, n_positions=16,
            bos_token_id=2, eos_token_id=2,
        )
    )  # fmt: skip
    found = {}
    for name, model in [("classifier", classifier), ("language", language)]:
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def written(folder, ending):
    path = folder / f"rows.{ending}"
    records = [{"text": text, "label": label} for text, label in ROWS]
    if ending == "csv":
        path.write_text("text,label\n" + "\n".join(f'"{t}",{y}' for t, y in ROWS))
    elif ending == "tsv":
        path.write_text("text\tlabel\n" + "\n".join(f"{t}\t{y}" for t, y in ROWS))
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif ending == "json":
        path.write_text(json.dumps(records))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def model_in(folder):
    return load_model(f"hf:{folder}", checkpoint=None, random_init=False)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_batches(folders, tmp_path, ending):
    options = TextOptions(batch_size=6)
    model = model_in(folders["classifier"])
    batches = text_batches(str(written(tmp_path, ending)), model, options)
    expected = text_batches(str(written(tmp_path, "csv")), model, options)
    assert [len(batch["labels"]) for batch in batches] == [6, 6, 4]
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in ("input_ids", "labels"))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.sum() == 8  # "yes" is class 1 by the model's own names


def test_a_file_without_a_header_has_numbers_for_columns(folders, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(f"{text}\t{int(label == 'yes')}" for text, label in ROWS))
    options = TextOptions(columns=("0",), label="1")
    [batch] = text_batches(str(path), model_in(folders["classifier"]), options)
    assert batch["labels"].sum() == 8


def test_texts_of_a_language_model_are_blocks_of_tokens(folders, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text for text, _ in ROWS))
    options = TextOptions(max_length=8, batch_size=2)
    batches = text_batches(str(path), model_in(folders["language"]), options)
    tokens = sum(len(text.split()) for text, _ in ROWS)
    assert sum(len(batch["labels"]) for batch in batches) == tokens // 8
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)


def test_what_does_not_fit_is_named(folders, tmp_path):
    path, model = written(tmp_path, "csv"), model_in(folders["classifier"])
    with pytest.raises(ArgumentError, match=r"a column 'review' in .* got text, label: name it"):
        text_batches(str(path), model, TextOptions(columns=("review",)))
    many = tmp_path / "many.csv"
    many.write_text("text,label\na,x\nb,y\nc,z\n")
    with pytest.raises(ArgumentError, match="labels for 2 classes"):
        text_batches(str(many), model, TextOptions())
    with pytest.raises(ArgumentError, match="file of texts"):
        text_batches(str(tmp_path / "missing.csv"), model, TextOptions())
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(ArgumentError, match="got none"):
        text_batches(str(tmp_path / "empty.csv"), model, TextOptions())
    with pytest.raises(ArgumentTypeError, match="a transformers model"):
        text_batches(str(path), torch.nn.Linear(1, 1), TextOptions())


@pytest.mark.parametrize("command", ["prune", "shrink"])
@pytest.mark.parametrize("kind", ["classifier", "language"])
def test_text_from_file_to_file(folders, tmp_path, capsys, command, kind):
    data = written(tmp_path, "csv")
    chosen = {
        "prune": ["--method", "magnitude", "--amount", "0.5"],
        "shrink": ["--sparsity", "0.1"],
    }[command]
    words = ["--model", f"hf:{folders[kind]}", "--data", str(data), "--max-length", "8", *chosen]
    output = tmp_path / "out"
    code = main([command, *words, "--num-samples", "4", "--output", str(output)])
    assert code == 0, capsys.readouterr().err
    metrics = json.loads((output / "report.json").read_text())["metrics"]["after"]
    if command == "prune":  # the folder is a whole model, tokenizer included
        again = ["--model", f"hf:{output}", "--data", str(data), "--max-length", "8", *chosen]
        assert main(["prune", *again, "--output", str(tmp_path / "again")]) == 0
    assert ("accuracy" if kind == "classifier" else "loss") in metrics
