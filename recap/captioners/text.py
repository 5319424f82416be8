"""Captions as a language model's tokens: prompt, caption and end, padded on the right."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor
from transformers.generation import NoRepeatNGramLogitsProcessor

from recap.config import Draw, Style
from recap.errors import UserError
from recap.sample import visible

IGNORE = -100
"""Labels that the cross entropy skips."""


@dataclass(frozen=True, slots=True)
class Caption:
    """What a captioner says of an image in one style."""

    text: str
    ended: bool
    """Whether the captioner ended by itself, before the style's token limit."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token rows of equal length."""

    ids: torch.Tensor
    """(B, L) int64: prompt, caption, end, padding."""
    labels: torch.Tensor
    """(B, L) int64: the caption and its end; `IGNORE` elsewhere."""
    mask: torch.Tensor
    """(B, L) int64: 1, and 0 on padding."""


@dataclass(frozen=True)
class Text:
    """The tokens of one captioner."""

    tokenizer: Any
    """A fast tokenizer of transformers."""
    start: tuple[int, ...]
    """What every row begins with: BOS, where the model has one."""
    end: int
    """Ends a caption; the model's own, which is not always the tokenizer's."""
    pad: int
    space: str = " "
    """Before a caption, where the tokenizer takes the space for a part of the word that follows."""
    stop: tuple[int, ...] = ()
    """What ends a prompt: an encoder's EOS."""
    max_length: int | None = None
    """Positions that the model has for prompt and caption together; None where it has no limit."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """Start and prompt. By hand: whether a tokenizer adds BOS depends on its files and on transformers' version."""
        return [*self.start, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"], *self.stop]

    def caption_ids(self, caption: str) -> list[int]:
        """A caption with its end. What looks like a special token, which could end it before, is left out."""
        ids = self.tokenizer(self.space + self.special.sub(" ", caption), add_special_tokens=False, verbose=False)
        return [*ids["input_ids"], self.end]

    @cached_property
    def special(self) -> re.Pattern[str]:
        """The texts of special tokens."""
        return re.compile("|".join(map(re.escape, specials(self.tokenizer))) or r"(?!)")

    def batch(self, prompts: list[str], captions: list[str], device: str | torch.device) -> Batch:
        rows = [(self.prompt_ids(prompt), self.caption_ids(caption))
                for prompt, caption in zip(prompts, captions, strict=True)]
        return pad(rows, self.pad, device)

    def prompts(self, prompts: list[str], device: str | torch.device) -> Batch:
        """Prompts alone; of no length, where none says anything."""
        return pad([(self.prompt_ids(prompt), []) for prompt in prompts], self.pad, device)

    def room(self, prompt: str) -> int | None:
        """The longest caption, in tokens without its end, that the model has positions for after a prompt."""
        return None if self.max_length is None else self.max_length - len(self.prompt_ids(prompt)) - 1

    def decoding(self, style: Style, start: int = 0) -> dict[str, Any]:
        """What a style asks of transformers' `generate`: beams, greedy search, or a draw by lot, which it seeds.

        Args:
            style: asked for.
            start: how many ids of every row come before the caption.

        Raises:
            UserError: the model has no positions for so long a caption.
        """
        room = self.room(style.prompt)
        if room is not None and style.max_new_tokens > room:
            raise UserError(f"styles: max_new_tokens={style.max_new_tokens} after {style.prompt!r}, but this captioner "
                            f"has positions for {room}: lower it")
        rules: list[LogitsProcessor] = []
        if style.no_repeat_ngram_size:
            rules.append(NoRepeat(style.no_repeat_ngram_size, start))
        if isinstance(style, Draw):
            rules.append(Lot(style.temperature, style.seeds))
        return {"max_new_tokens": style.max_new_tokens, "num_beams": style.num_beams,
                "logits_processor": rules or None, "do_sample": False}

    def fit(self, caption: str, max_tokens: int) -> str:
        """The caption, cut at the last sentence end (else the last word) within `max_tokens`, if it is longer."""
        offsets = self.tokenizer(self.space + caption, add_special_tokens=False, return_offsets_mapping=True,
                                 verbose=False)["offset_mapping"]
        if len(offsets) <= max_tokens:
            return caption
        fitting = offsets[max_tokens - 1][1] - len(self.space)
        words_end = max((match.end() for match in re.finditer(r"\S+(?=\s)", caption) if match.end() <= fitting),
                        default=0)
        sentence_ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", caption[:words_end + 1])]
        return caption[:sentence_ends[-1] if sentence_ends else words_end]

    def read(self, ids: list[int]) -> Caption:
        """New tokens → caption: up to the end, without special tokens, one line, no control characters."""
        ended = self.end in ids
        text = self.tokenizer.decode(ids[:ids.index(self.end)] if ended else ids, skip_special_tokens=True)
        return Caption(visible(text), ended)


class NoRepeat(LogitsProcessor):
    """No run of so many tokens twice in a caption; what the prompt says may be repeated."""

    def __init__(self, size: int, start: int) -> None:
        self.rule, self.start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        return self.rule(input_ids[:, self.start:], scores)


class Lot(LogitsProcessor):
    """Makes of greedy search a draw by lot, which no other row of the batch has a part in.

    The largest of logits / temperature + Gumbel noise is a draw from their softmax (Maddison et al. 2014, A* Sampling,
    arXiv 1411.0030, section 2).
    """

    def __init__(self, temperature: float, seeds: list[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self.generators])
        return scores.float() / self.temperature - (-uniform.log()).log().to(scores.device)


def specials(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's special tokens, longer ones first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


def pad(rows: list[tuple[list[int], list[int]]], fill: int, device: str | torch.device) -> Batch:
    """(prompt, caption) token rows → a batch, padded on the right with `fill`."""
    length = max(len(prompt) + len(caption) for prompt, caption in rows)
    padded = [(prompt + caption, [IGNORE] * len(prompt) + caption, length - len(prompt) - len(caption))
              for prompt, caption in rows]
    columns = ([ids + [fill] * rest for ids, _, rest in padded],
               [labels + [IGNORE] * rest for _, labels, rest in padded],
               [[1] * len(ids) + [0] * rest for ids, _, rest in padded])
    return Batch(*(torch.tensor(column, dtype=torch.long, device=device) for column in columns))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the labels, each given the logits one position before it.

    Args:
        logits: (B, L, V).
        labels: (B, L) int64, `IGNORE` where nothing is to be predicted.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
