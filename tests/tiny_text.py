"""A tiny random model with a tokenizer of its own, learnt from the shipped text, for the tests."""

from pathlib import Path

import tokenizers
from tiny import save_tiny
from transformers import PreTrainedTokenizerFast

from calibration import BUNDLED

VOCABULARY = 384


def save_tiny_with_tokenizer(directory: Path, **changes):
    """A Hugging Face directory with a byte-level BPE; returns (directory, reference model)."""
    directory, reference = save_tiny(
        directory, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, **changes
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([BUNDLED.read_text(encoding="utf-8")[:50_000]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return directory, reference
