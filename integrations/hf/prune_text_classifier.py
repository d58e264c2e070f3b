"""Train and prune a small DistilBERT that classifies texts.

Runs offline in minutes on passages of Python's documentation (which topic is this from?); --data
takes a folder with train.tsv and dev.tsv (SST-2), --model a trained model:

    python integrations/hf/prune_text_classifier.py --method woodfisher --sparsity 0.8
    accelerate launch integrations/hf/prune_text_classifier.py --data sst2
"""

from __future__ import annotations

import argparse

from accelerate import PartialState
from offline_text import labelled_texts, train_tokenizer
from recipe import parser, run
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    set_seed,
)

VOCABULARY = 2000
HEAD = ["classifier"]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command."""
    options = parser(__doc__, lr=1e-3, epochs=10.0)
    options.add_argument("--max-length", type=int, default=64, help="tokens of a sample at most")
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--layers", type=int, default=2)
    args = options.parse_args(argv)
    set_seed(args.seed)
    whole = labelled_texts(args.data)
    classes = 1 + max(label for part in whole for _, label in part)
    parts = [part[: args.max_samples] for part in whole]
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    else:
        tokenizer = train_tokenizer([text for text, _ in parts[0]], VOCABULARY)
        model = _small_model(args, len(tokenizer), tokenizer.pad_token_id, classes)
    train, evaluation = (
        [
            {
                "input_ids": tokenizer(text, truncation=True, max_length=args.max_length)[
                    "input_ids"
                ],
                "labels": label,
            }
            for text, label in part
        ]
        for part in parts
    )
    collator = DataCollatorWithPadding(tokenizer)
    return run(args, model, train, evaluation, exclude=HEAD, collator=collator, tokenizer=tokenizer)


def _small_model(
    args: argparse.Namespace, vocabulary: int, padding: int, classes: int
) -> DistilBertForSequenceClassification:
    config = DistilBertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=args.max_length,
        dim=args.width,
        hidden_dim=2 * args.width,
        n_layers=args.layers,
        n_heads=4,
        num_labels=classes,
        pad_token_id=padding,
    )
    return DistilBertForSequenceClassification(config)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
