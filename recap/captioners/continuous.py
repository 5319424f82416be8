"""Greedy decoding in which a caption that ends gives its place to the next one (Yu et al., Orca, OSDI 2022).

transformers' `generate` goes on until the longest caption of a batch has ended, and begins the next batch after that.
Here the places of a batch stay filled for as long as captions are waiting. The prompt's part of the attention cache is
computed for many captions at once, and the image's part of it once for all styles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Generic, TypeVar

import torch
from transformers import DynamicCache

K = TypeVar("K")
BUCKET = 64
"""Positions by which the captured steps on a GPU differ in length."""


@dataclass(frozen=True, slots=True, eq=False)
class Begun(Generic[K]):
    """Captions whose prompts have been read."""

    names: list[K]
    """B of them; whatever tells them apart."""
    cache: torch.Tensor
    """(2, layers, B, heads, N, D): keys and values of the N positions of image and prompt."""
    first: list[int]
    """Their first tokens."""
    max_new_tokens: int

    def row(self, place: int) -> "Row[K]":
        return Row(self.names[place], [self.first[place]], self.max_new_tokens, self.cache.shape[4])


@dataclass(slots=True)
class Row(Generic[K]):
    """A caption that is being decoded."""

    name: K
    ids: list[int]
    max_new_tokens: int
    num_before: int
    """Positions of image and prompt."""

    @property
    def num_positions(self) -> int:
        """Positions that the cache holds; the last token's comes with the next step."""
        return self.num_before + len(self.ids) - 1


def read_prompts(model: Any, features: torch.Tensor,
                 prompts: list[list[int]]) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """The caches of image features followed by each prompt, and the tokens that come next.

    Args:
        model: a decoder-only language model of transformers.
        features: (B, N, D) in its embedding space.
        prompts: token ids, at least one in each.

    Yields:
        For each prompt (2, layers, B, heads, N + L, D) and B tokens.
    """
    seen = model(inputs_embeds=features, use_cache=True, logits_to_keep=1).past_key_values
    for prompt in prompts:
        ids = torch.tensor([prompt], device=features.device).expand(len(features), -1)
        cache = DynamicCache([(layer.keys, layer.values) for layer in seen.layers])
        found = model(inputs_embeds=model.get_input_embeddings()(ids).to(features.dtype), past_key_values=cache,
                      use_cache=True, logits_to_keep=1)
        layers = found.past_key_values.layers
        yield (torch.stack([torch.stack([layer.keys for layer in layers]),
                            torch.stack([layer.values for layer in layers])]), found.logits[:, -1].argmax(-1).tolist())


class Slots:
    """Places for captions that are decoded together; the first `num_rows` are taken.

    To the model it is the cache of what came before. Its tensors stay where they are, so that a GPU can record a step
    once and repeat it.
    """

    def __init__(self, model: Any, num_slots: int, length: int, like: torch.Tensor) -> None:
        """Make room for captions of a decoder-only language model.

        Args:
            model: of transformers.
            num_slots: captions at a time.
            length: positions of each: image, prompt and caption.
            like: a cache (2, layers, B, heads, N, D).
        """
        both, layers, _, heads, _, width = like.shape
        self.model, self.num_slots, self.length = model, num_slots, length
        self.cache = like.new_zeros(both, layers, num_slots, heads, length, width)
        self.lengths = torch.zeros(num_slots, dtype=torch.long, device=like.device)
        self.tokens = torch.zeros(num_slots, dtype=torch.long, device=like.device)
        self.places = torch.arange(num_slots, device=like.device)
        self.num_rows, self.num_seen = 0, 0  # of the step that is being computed
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def put(self, slots: list[int], begun: Begun[Any], rows: list[int]) -> None:
        """Captions whose prompts have been read take slots."""
        first = [begun.first[row] for row in rows]
        to, of, tokens = (torch.tensor(each, device=self.places.device) for each in (slots, rows, first))
        num_positions = begun.cache.shape[4]
        self.cache[:, :, to, :, :num_positions] = begun.cache[:, :, of]
        self.lengths[to], self.tokens[to] = num_positions, tokens

    def move(self, slot: int, to: int, num_positions: int) -> None:
        self.cache[:, :, to, :, :num_positions] = self.cache[:, :, slot, :, :num_positions]
        self.lengths[to], self.tokens[to] = self.lengths[slot], self.tokens[slot]

    def step(self, num_rows: int, num_positions: int) -> list[int]:
        """The next tokens of the first rows, whose longest has so many positions."""
        if self.places.is_cuda:
            with torch.cuda.device(self.places.device):  # streams and graphs are of the current one
                self._replay(self.bucket(num_positions))
        else:
            self._compute(num_rows, num_positions + 1)
        return self.tokens[:num_rows].tolist()

    def bucket(self, num_positions: int) -> int:
        """How many positions a recorded step looks at, where the longest row has so many."""
        return min(-(-(num_positions + 1) // BUCKET) * BUCKET, self.length)

    def _compute(self, num_rows: int, num_seen: int) -> None:
        """Put the next tokens of the first rows in the place of the last ones, looking at so many positions."""
        self.num_rows, self.num_seen = num_rows, num_seen
        lengths = self.lengths[:num_rows]
        hidden = torch.arange(num_seen, device=lengths.device) > lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=lengths.device)
        mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
        embeds = self.model.get_input_embeddings()(self.tokens[:num_rows, None]).to(self.cache.dtype)
        logits = self.model(inputs_embeds=embeds, attention_mask=mask[:, None, None], position_ids=lengths[:, None],
                            past_key_values=self, use_cache=True).logits
        self.tokens[:num_rows] = logits[:, -1].argmax(-1)
        self.lengths[:num_rows] = (lengths + 1).clamp(max=self.length - 1)

    def _replay(self, num_seen: int) -> None:
        """The same for all slots on a GPU, as recorded: a step is many small kernels, slow to ask for one by one."""
        if num_seen not in self.graphs:
            kept = self.lengths.clone(), self.tokens.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries choose their kernels at first use, which can't be recorded
                self._compute(self.num_slots, num_seen)
            torch.cuda.current_stream().wait_stream(stream)
            self.lengths.copy_(kept[0])
            self.tokens.copy_(kept[1])
            graph = torch.cuda.CUDAGraph()
            # Of other threads no account is taken: one may be scoring the next images on the same GPU.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._compute(self.num_slots, num_seen)
            self.graphs[num_seen] = graph
        self.graphs[num_seen].replay()

    # --- what the model asks of a cache ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_seen - 1

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int,
               *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Put (B, heads, 1, D) where each row has got to; all that the layer may look at."""
        rows, ends = self.places[:self.num_rows], self.lengths[:self.num_rows]
        found = []
        for cache, new in zip(self.cache[:, layer_idx], (keys, values), strict=True):
            cache[rows, :, ends] = new[:, :, 0]
            found.append(cache[:self.num_rows, :, :self.num_seen])
        return found[0], found[1]


def decode(slots: Slots, begun: Iterator[Begun[K]], end: int) -> Iterator[tuple[K, list[int]]]:
    """Captions whose prompts have been read → their tokens, with the end where they came to it.

    Those that end first come first. `begun` is asked for more when a slot is free.
    """
    waiting = ((each, place) for each in begun for place in range(len(each.names)))
    rows: list[Row[K]] = []
    while True:
        ended = [slot for slot, row in enumerate(rows) if row.ids[-1] == end or len(row.ids) == row.max_new_tokens]
        yield from [(rows[slot].name, rows[slot].ids) for slot in ended]
        free = [*ended, *range(len(rows), slots.num_slots)]
        new = list(islice(waiting, len(free)))
        for each, group in groupby(zip(free, new, strict=False), key=lambda pair: pair[1][0]):
            taken = [(slot, place) for slot, (_, place) in group]
            slots.put([slot for slot, _ in taken], each, [place for _, place in taken])
            for slot, place in taken:
                rows[slot:slot + 1] = [each.row(place)]
        for slot in reversed(ended[len(new):]):  # the rows stay together
            last = rows.pop()
            if slot < len(rows):
                slots.move(len(rows), slot, last.num_positions)
                rows[slot] = last
        if new:
            continue  # a caption may end with its first token
        if not rows:
            return
        tokens = slots.step(len(rows), max(row.num_positions for row in rows))
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
