"""Splitting long text into CLIP windows: 75 content tokens each, cut where a reader would pause.

One function serves training, validation, evaluation and users' inference, so that what is trained is what is drawn.
The text is tokenized once and only the token list is split: no token is lost, whatever the text.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

CONTENT_TOKENS = 75
"""Tokens of text in a window; BOS and EOS make it 77, the length that CLIP was trained with."""

_SENTENCE_END = re.compile(r"""[.!?…。！？]["'”’»)\]]*$""")
_PHRASE_END = re.compile(r"""[,;:、，；：—–)\]]["'”’»]*$""")


@dataclass(frozen=True, slots=True)
class Windows:
    """A text in CLIP windows."""

    ids: list[list[int]]
    """Content token ids of each window, at most 75; one empty window for the empty text."""
    num_cut: int = 0
    """Content tokens beyond the last allowed window, which no window holds."""

    @property
    def num_tokens(self) -> int:
        """Content tokens of the whole text, cut ones included."""
        return sum(map(len, self.ids)) + self.num_cut


def split(text: str, tokenizer: Any, max_windows: int | None = None) -> Windows:
    """Split a text into windows: at sentence ends, where a sentence is too long at phrase ends, then between words.

    Args:
        text: any text; only a single word of more than 75 tokens is ever cut inside.
        tokenizer: a fast CLIP tokenizer of transformers (offsets are needed).
        max_windows: tokens beyond so many windows are counted, not kept.
    """
    encoding = tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoding["input_ids"]
    pauses = _pauses(text, encoding["offset_mapping"])
    windows, start = [], 0
    while len(ids) - start > CONTENT_TOKENS:
        end = max(range(start + 1, start + CONTENT_TOKENS + 1), key=lambda i: (pauses[i - 1], i))
        windows.append(ids[start:end])
        start = end
    windows.append(ids[start:])
    kept = windows[:max_windows]
    return Windows(kept, sum(map(len, windows)) - sum(map(len, kept)))


def _pauses(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """How good a place to cut follows each token: 3 sentence end, 2 phrase end, 1 word end, 0 inside a word."""
    ranks = []
    for (start, end), (following, _) in pairwise([*offsets, (len(text) + 1, 0)]):
        if following <= end:  # no white space between: "3.5", "o'clock", or the middle of a word
            ranks.append(0)
            continue
        before = text[max(start - 2, 0):end]
        ranks.append(3 if _SENTENCE_END.search(before) else 2 if _PHRASE_END.search(before) else 1)
    return ranks
