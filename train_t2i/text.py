"""Text of any length → the CLIP states that the UNet attends to: 77 positions for each window of 75 content tokens.

The inner windows keep their BOS and EOS states, and the last is padded as the tokenizer pads, so one window is exactly
the plain encoding. Windows that only fill up a batch are masked, so that a sample does not feel its neighbours.
"""

from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from recap.chunks import Windows, split

WINDOW = 77


@dataclass
class PromptEmbeds:
    """Encoded texts of a batch."""

    states: torch.Tensor
    """(B, 77·n, D) CLIP states, n the largest number of windows; zeros where a text has fewer."""
    mask: torch.Tensor | None
    """(B, 77·n) bool, False on the filling windows; None where every text has n windows."""
    num_cut: int
    """Content tokens that `max_windows` cut, over the batch."""


def window_ids(windows: Windows, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Windows → token ids (n, 77) int64, each BOS, content, EOS, padding."""
    rows = []
    for content in windows.ids:
        row = [tokenizer.bos_token_id, *content, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (WINDOW - len(row)))
    return torch.tensor(rows, dtype=torch.int64)


def encode_prompts(texts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel,
                   max_windows: int | None = None) -> PromptEmbeds:
    """Encode texts of any length; all windows of the batch go through the encoder together."""
    windows = [split(text, tokenizer, max_windows) for text in texts]
    ids = torch.cat([window_ids(each, tokenizer) for each in windows])
    states = text_encoder(ids.to(text_encoder.device))[0]  # (Σn, 77, D)
    counts = [len(each.ids) for each in windows]
    joined = [part.reshape(-1, part.shape[-1]) for part in states.split(counts)]  # (77·nᵢ, D) each
    num_cut = sum(each.num_cut for each in windows)
    if len(set(counts)) == 1:
        return PromptEmbeds(torch.stack(joined), None, num_cut)
    lengths = torch.tensor(counts, device=states.device) * WINDOW
    mask = torch.arange(max(counts) * WINDOW, device=states.device) < lengths[:, None]
    return PromptEmbeds(torch.nn.utils.rnn.pad_sequence(joined, batch_first=True), mask, num_cut)


def encode_unconditional(num_windows: int, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """The empty text for classifier-free guidance beside texts of n windows: (1, 77·n, D).

    The empty window is repeated n times: with equal keys and values repeated, attention gives what n = 1 gives.
    """
    return encode_prompts([""], tokenizer, text_encoder).states.repeat(1, num_windows, 1)
