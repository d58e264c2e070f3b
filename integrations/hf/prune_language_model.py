"""Train and prune a small GPT-2, evaluated by perplexity.

Runs offline in minutes on the documentation that comes with Python; --data takes a text file or a
folder (WikiText-2, tiny Shakespeare), --model a trained model:

    python integrations/hf/prune_language_model.py --method woodfisher --sparsity 0.8
    accelerate launch integrations/hf/prune_language_model.py --data wikitext-2
"""

from __future__ import annotations

from accelerate import PartialState
from offline_text import blocks_of, language_texts, train_tokenizer
from recipe import parser, run
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

VOCABULARY = 1000


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command."""
    options = parser(__doc__, lr=2e-3, epochs=6.0)
    options.add_argument("--block-size", type=int, default=64, help="tokens of a sample")
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--layers", type=int, default=3)
    args = options.parse_args(argv)
    set_seed(args.seed)
    texts = language_texts(args.data)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        tokenizer = train_tokenizer(texts[:1], VOCABULARY)
        end = tokenizer.eos_token_id
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=args.block_size,
                n_embd=args.width,
                n_layer=args.layers,
                n_head=4,
                bos_token_id=end,
                eos_token_id=end,
            )
        )
    train, evaluation = (
        blocks_of(text, tokenizer, args.block_size)[: args.max_samples] for text in texts
    )
    return run(args, model, train, evaluation, causal=True, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
