"""Training batches, whole or in parts."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from train_t2i.order import Cursor


@dataclass(frozen=True)
class Recipe:
    """What a model needs of its batches."""

    tokenizers: list[Any]
    """One for each text encoder."""
    latent_channels: int
    latent_scale: int
    """Pixels of the image's side for one of the latents'."""
    num_timesteps: int


@dataclass
class Batch:
    """Images of one size with their captions, and what is drawn for them."""

    images: torch.Tensor
    """(B, 3, H, W) uint8; or, where they are kept, the VAE's moments, (B, 2·C, h, w) float16."""
    posterior_noise: torch.Tensor
    """(B, C, h, w) float32, what the latents are drawn from their moments by."""
    noise: torch.Tensor
    """(B, C, h, w) float32."""
    timesteps: torch.Tensor
    """(B,) int64."""
    weights: torch.Tensor
    """(B,) float32: 1, or 0 for a place whose image could not be decoded."""
    size_ids: torch.Tensor
    """(B, 6) float32, see `images.size_ids`."""
    tokens: list[torch.Tensor]
    """B of (n, E, 77) int64: token ids of n windows, for each of E text encoders."""
    uids: list[str]

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def num_windows(self) -> list[int]:
        return [len(each) for each in self.tokens]

    def select(self, places: list[int]) -> "Batch":
        return self._map(lambda tensor: tensor[places], lambda items: [items[place] for place in places])

    def slice(self, start: int, stop: int) -> "Batch":
        return self._map(lambda tensor: tensor[start:stop], lambda items: items[start:stop])

    def longest_first(self) -> "Batch":
        """Captions of about a length together, so that few windows only fill a batch; what takes most memory, first."""
        order = sorted(range(len(self)), key=lambda place: -len(self.tokens[place]))
        return self if order == list(range(len(self))) else self.select(order)

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device. Of pinned memory, the copy is not waited for."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True), list)
        moved.tokens = [each.to(device, non_blocking=True) for each in self.tokens]
        return moved

    def pin_memory(self) -> "Batch":
        pinned = self._map(torch.Tensor.pin_memory, list)
        pinned.tokens = list(torch.cat(self.tokens).pin_memory().split(self.num_windows))
        return pinned

    @staticmethod
    def cat(batches: list["Batch"]) -> "Batch":
        def joint(name: str) -> Any:
            values = [getattr(batch, name) for batch in batches]
            return torch.cat(values) if isinstance(values[0], torch.Tensor) else [each for value in values
                                                                                  for each in value]
        return batches[0] if len(batches) == 1 else Batch(**{each.name: joint(each.name) for each in fields(Batch)})

    def _map(self, of_tensor: Callable[[torch.Tensor], torch.Tensor], of_list: Callable[[list[Any]], Any]) -> "Batch":
        def mapped(value: Any) -> Any:
            return of_tensor(value) if isinstance(value, torch.Tensor) else of_list(value)
        return Batch(**{each.name: mapped(getattr(self, each.name)) for each in fields(Batch)})

    def __getstate__(self) -> dict[str, Any]:
        """All tokens as one tensor: on its way from a worker, each is an open file."""
        return vars(self) | {"tokens": (torch.cat(self.tokens), self.num_windows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ids, num_windows = state["tokens"]
        vars(self).update(state, tokens=list(ids.split(num_windows)))


@dataclass
class Part:
    """Some of a step's samples, in their order."""

    batches: list[Batch] = field(default_factory=list)
    """One for each size."""
    cursors: dict[int, Cursor] = field(default_factory=dict)
    """Lane → where it stands after this step; each is told of in one part only."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Samples that were left out, by reason."""
    num_cut: int = 0
    """Content tokens beyond `max_windows`."""

    def __add__(self, other: "Part") -> "Part":
        return Part([*self.batches, *other.batches], self.cursors | other.cursors, self.rejects + other.rejects,
                    self.num_cut + other.num_cut)

    def by_size(self) -> list[Batch]:
        """The same samples in one batch for each size."""
        found: dict[Any, list[Batch]] = {}
        for batch in self.batches:
            found.setdefault(batch.images.shape[1:], []).append(batch)
        return [Batch.cat(batches) for _, batches in sorted(found.items())]
