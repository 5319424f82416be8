"""Text of any length → the CLIP states that the UNet attends to: 77 positions for each window of 75 content tokens.

The inner windows keep their BOS and EOS states, and the last is padded as the tokenizer pads, so one window is exactly
the plain encoding. Windows that only fill up a batch are masked, so that a sample does not feel its neighbours.

Stable Diffusion XL has two encoders: the states are those before the last layer of both, side by side, and the second
one's projection of the first window goes with them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPTokenizer

from recap.chunks import Windows, split

WINDOW = 77


@dataclass
class Tokens:
    """A text as token ids."""

    ids: torch.Tensor
    """(n, E, 77) int64: n windows for each of E encoders, which pad differently."""
    num_cut: int = 0
    """Content tokens that `max_windows` cut."""


@dataclass
class PromptEmbeds:
    """Encoded texts of a batch."""

    states: torch.Tensor
    """(B, 77·n, D) CLIP states, n the largest number of windows; zeros where a text has fewer."""
    mask: torch.Tensor | None
    """(B, 77·n) bool, False on the filling windows; None where every text has n windows."""
    pooled: torch.Tensor | None = None
    """(B, P), of Stable Diffusion XL."""


def tokenizers(pipe: Any) -> list[CLIPTokenizer]:
    """One for each text encoder of a pipeline."""
    return [each for name in ("tokenizer", "tokenizer_2") if (each := getattr(pipe, name, None)) is not None]


def text_encoders(pipe: Any) -> list[Any]:
    return [each for name in ("text_encoder", "text_encoder_2") if (each := getattr(pipe, name, None)) is not None]


def tokenize(text: str, tokenizers: list[CLIPTokenizer], max_windows: int | None = None) -> Tokens:
    """A text in windows. All tokenizers have CLIP's vocabulary; what they pad with is their own.

    One that pads with "!" reads it as padding in a text too: a second tokenizer's own tokens are taken, as the plain
    encoding takes them, unless they fill another number of windows than the first's.
    """
    first = split(text, tokenizers[0], max_windows)
    ids = []
    for tokenizer in tokenizers:
        own = split(text, tokenizer, max_windows)
        ids.append(window_ids(own if len(own.ids) == len(first.ids) else first, tokenizer))
    return Tokens(torch.stack(ids, dim=1), first.num_cut)


def window_ids(windows: Windows, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Windows → token ids (n, 77) int64, each BOS, content, EOS, padding."""
    rows = []
    for content in windows.ids:
        row = [tokenizer.bos_token_id, *content, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (WINDOW - len(row)))
    return torch.tensor(rows, dtype=torch.int64)


def encode(tokens: list[torch.Tensor], encoders: list[Any]) -> PromptEmbeds:
    """Encode texts of any length; all windows of the batch go through an encoder together.

    Args:
        tokens: (n, E, 77) int64 each, see `Tokens`; on the encoders' device.
        encoders: the E text encoders.
    """
    ids, counts = torch.cat(tokens), [len(each) for each in tokens]  # (Σn, E, 77)
    states, projected = _states(ids, encoders)
    pooled = None if projected is None else torch.stack([each[0] for each in projected.split(counts)])
    joined = [part.reshape(-1, part.shape[-1]) for part in states.split(counts)]  # (77·nᵢ, D) each
    if len(set(counts)) == 1:
        return PromptEmbeds(torch.stack(joined), None, pooled)
    mask = torch.ones(len(counts), max(counts) * WINDOW, dtype=torch.bool, device=states.device)
    for row, windows in zip(mask, counts, strict=True):  # no tensor is made of the counts: its copy would be waited for
        row[windows * WINDOW:] = False
    return PromptEmbeds(torch.nn.utils.rnn.pad_sequence(joined, batch_first=True), mask, pooled)


def _states(ids: torch.Tensor, encoders: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids (N, E, 77) → states (N, 77, D), and the last encoder's projection (N, P) where there are two."""
    if len(encoders) == 1:
        return encoders[0](ids[:, 0])[0], None
    found = [encoder(ids[:, place], output_hidden_states=True) for place, encoder in enumerate(encoders)]
    return torch.cat([each.hidden_states[-2] for each in found], dim=-1), found[-1][0]


def encode_prompts(texts: list[str], pipe: Any) -> PromptEmbeds:
    """Encode texts of any length by a pipeline's text encoders."""
    device = pipe.text_encoder.device
    return encode([tokenize(text, tokenizers(pipe)).ids.to(device) for text in texts], text_encoders(pipe))


def encode_unconditional(num_windows: int, pipe: Any) -> PromptEmbeds:
    """The empty text for classifier-free guidance beside texts of n windows: states (1, 77·n, D).

    The empty window is repeated n times: with equal keys and values repeated, attention gives what n = 1 gives. Where
    the pipeline says that it was trained with zeros for the empty text, as Stable Diffusion XL does, it is zeros.
    """
    found = encode_prompts([""], pipe)
    if zeros_for_empty(pipe):
        found = PromptEmbeds(torch.zeros_like(found.states), None,
                             None if found.pooled is None else torch.zeros_like(found.pooled))
    return PromptEmbeds(found.states.repeat(1, num_windows, 1), None, found.pooled)


def zeros_for_empty(pipe: Any) -> bool:
    """Whether zeros stand for the states of the empty text."""
    return bool(pipe.config.get("force_zeros_for_empty_prompt"))
