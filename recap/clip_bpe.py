"""CLIP's tokenizer, built from the BPE file that ships inside open_clip: no hub is asked."""

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 49_408
NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2
"""The file lists more merges than CLIP was trained with; the vocabulary is each byte twice, the merges, BOS and EOS."""
MAX_LENGTH = 77


@cache
def clip_tokenizer() -> "CLIPTokenizer":
    """The tokenizer of OpenAI's CLIP and of Stable Diffusion 1.x, as transformers' fast class (it gives offsets).

    Ids equal those of `openai/clip-vit-large-patch14`: BOS 49406, EOS 49407, which also pads; `model_max_length` 77.

    Raises:
        UserError: open_clip, whose wheel holds the file, is not installed.
    """
    from transformers import CLIPTokenizer

    merges: Any = _merges(bpe_file())  # transformers annotates them as strings and reads pairs
    symbols = _byte_symbols()
    pieces = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def bpe_file() -> Path:
    """Where open_clip keeps its merges, found without importing it (which would take seconds)."""
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("open_clip is not installed, and its wheel holds CLIP's tokenizer: pip install open_clip_torch")
    return Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def _merges(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:NUM_MERGES + 1]  # the first line names the format's version
    pairs = [line.split(" ") for line in lines]
    return [(left, right) for left, right in pairs]


def _byte_symbols() -> list[str]:
    """The visible character that stands for each byte, in the order of CLIP's ids (GPT-2's byte-level BPE).

    Bytes that Latin-1 prints stand for themselves and come first; the others are moved behind U+0100, in order.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    return [chr(byte) for byte in printable] + [chr(256 + offset) for offset in range(256 - len(printable))]
