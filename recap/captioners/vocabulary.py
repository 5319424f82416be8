"""A vocabulary of one's own, for a captioner that is trained from scratch."""

import json
from collections.abc import Iterable
from typing import Any

END, PAD = "<|endoftext|>", "<|pad|>"


def learn_vocabulary(captions: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) learned from captions, as a `GPT2Tokenizer`.

    Any text makes a round trip, unknown words too. `<|endoftext|>` starts and ends a caption, as GPT-2's does.

    Args:
        captions: what the words are learned from.
        vocab_size: at most so many tokens, the 256 bytes and two special ones included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    learned.train_from_iterator((f" {caption}" for caption in captions), trainer)
    bpe = json.loads(learned.to_str())["model"]
    merges: Any = [tuple(pair) for pair in bpe["merges"]]  # annotated as strings, read as pairs
    return GPT2Tokenizer(vocab=bpe["vocab"], merges=merges, bos_token=END, eos_token=END, unk_token=END, pad_token=PAD)
