"""ClipCap (Mokady et al. 2021, arXiv 2111.09734): CLIP's vector of an image, mapped to a prefix for GPT-2.

Names of weights are those of the authors' code, so that its users can load what is written here, and the reverse.

Their captions have no prompt. Ours have one that names a style, and the Transformer mapper reads it, too: GPT-2 behind
it is frozen, so nothing else could learn what a style means. Without a prompt it is the authors' mapper.
"""

import json
import pickle
from pathlib import Path
from typing import Any, Self

import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from recap.captioners import Tunable
from recap.captioners.text import IGNORE, Batch, Caption, Text, next_token_loss
from recap.config import Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.captioner import ClipCap as Config
from recap.config.captioner import Part
from recap.config.finetune import Finetune
from recap.errors import UserError
from recap.pretrained import checkpoint_folder, find_local, load_pretrained
from recap.rundir import hash_file

WEIGHTS, RECORD = "model.safetensors", "clipcap.json"
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")


# --- mappers -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """CLIP's vector → hidden layer of half the prefix, tanh → prefix."""

    def __init__(self, clip_dim: int, prefix_dim: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(clip_dim, prefix_dim // 2), nn.Tanh(),
                                   nn.Linear(prefix_dim // 2, prefix_dim))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(B, C) → (B, prefix_length · D)."""
        found: torch.Tensor = self.model(vectors)
        return found


class TransformerMapper(nn.Module):
    """CLIP's vector, unfolded to `clip_length` positions, beside as many learned constants as the prefix is long.

    Beside both stands the prompt, whose words come without their order, as GPT-2 embeds them; the authors have none.
    """

    def __init__(self, clip_dim: int, dim: int, prefix_length: int, clip_length: int, num_layers: int,
                 num_heads: int) -> None:
        super().__init__()
        self.clip_length, self.dim = clip_length, dim
        self.linear = nn.Linear(clip_dim, clip_length * dim)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, dim))
        self.transformer: Any = nn.Module()
        self.transformer.layers = nn.ModuleList(_Layer(dim, num_heads) for _ in range(num_layers))

    def forward(self, vectors: torch.Tensor, prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """CLIP vectors (B, C), embedded prompts (B, P, D) and what of them is no padding (B, P) → (B, prefix, D)."""
        unfolded = self.linear(vectors).view(len(vectors), self.clip_length, self.dim)
        prefix = self.prefix_const.expand(len(vectors), -1, -1)
        x = torch.cat([unfolded, prefix, prompts], dim=1)
        seen = nn.functional.pad(mask.bool(), (x.shape[1] - mask.shape[1], 0), value=True)[:, None, None]
        for layer in self.transformer.layers:
            x = layer(x, seen)
        return x[:, self.clip_length:self.clip_length + prefix.shape[1]]


class _Layer(nn.Module):
    """Attention and a ReLU network of twice the width, each after a norm and beside a residual connection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Attention(dim, num_heads)
        self.mlp: Any = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """(B, N, D), and of all positions those that may be looked at, (B, 1, 1, N) bool."""
        x = x + self.attn(self.norm1(x), seen)
        return x + self.mlp.fc2(torch.relu(self.mlp.fc1(self.norm2(x))))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, 2 * dim, bias=False)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        queries, keys, values = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                                 for part in (self.to_queries(x), *self.to_keys_values(x).chunk(2, dim=-1)))
        found = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        projected: torch.Tensor = self.project(found.transpose(1, 2).flatten(2))
        return projected


class ClipCapModel(nn.Module):
    """Mapper and GPT-2, by the names of the authors' code; and CLIP's image side, which their checkpoints leave out."""

    def __init__(self, clip_project: Mlp | TransformerMapper, gpt: Any, clip: nn.Module) -> None:
        super().__init__()
        self.clip_project, self.clip = clip_project, clip
        self.gpt: Any = gpt

    @property
    def prefix_length(self) -> int:
        if isinstance(self.clip_project, TransformerMapper):
            return len(self.clip_project.prefix_const)
        width: int = self.clip_project.model[-1].out_features  # type: ignore[assignment]
        return width // int(self.gpt.config.n_embd)

    def prefix(self, vectors: torch.Tensor, prompts: Batch) -> torch.Tensor:
        """CLIP vectors (B, C) and prompts of as many rows → what GPT-2 goes on from, (B, prefix_length, D)."""
        found: torch.Tensor
        if isinstance(self.clip_project, TransformerMapper):
            found = self.clip_project(vectors, self.gpt.get_input_embeddings()(prompts.ids), prompts.mask)
        else:
            found = self.clip_project(vectors)
        return found.reshape(len(vectors), -1, self.gpt.config.n_embd)


# --- the captioner -------------------------------------------------------------------------------------------------


class ClipCap(Tunable):
    """CLIP is frozen, so its vectors are worth keeping; the mapper is trained, and GPT-2 where that is asked for."""

    model: ClipCapModel

    def __init__(self, model: ClipCapModel, transform: Any, tokenizer: Any, clip_version: str, config: CaptionerConfig,
                 device: str) -> None:
        self.model, self.transform, self.config, self.device = model.to(device), transform, config, device
        self.clip_version = clip_version
        self.text = Text(tokenizer, start=(), end=tokenizer.eos_token_id, pad=tokenizer.eos_token_id,
                         max_length=model.gpt.config.n_positions - model.prefix_length)
        self.set_training(False)

    @classmethod
    def open(cls, config: CaptionerConfig, device: str, tuned: Path | None) -> Self:
        """CLIP and GPT-2 with a new mapper; or with what was tuned: a folder of ours, or of the authors' `.pt`."""
        logging.disable_progress_bar()
        parts = config.clipcap
        folder = tuned or (find_local(config, "captioner") if config.model else None)
        if config.model and folder is None:
            folder = checkpoint_folder(config, "captioner")
        gpt2 = Part.of(str(folder) if folder and (folder / "config.json").is_file() else parts.gpt2)
        clip, transform, version, dim = _open_clip(parts.clip, device)
        weights = _weights(folder, version) if folder else None
        gpt = _gpt2(gpt2, device, weights is None)
        with torch.device("meta" if device == "meta" else "cpu"):
            mapper = _mapper(parts, dim, gpt.config.n_embd) if weights is None else _mapper_of(weights, dim, parts)
        model = ClipCapModel(mapper, gpt, clip)
        if weights is not None:
            _load(model, weights, folder)
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, gpt2, "captioner.clipcap.gpt2", weights=False,
                                    trust_remote_code=False)
        return cls(model.requires_grad_(False), transform, tokenizer, version, config, device)

    def prepare(self, config: Finetune, captions: list[str]) -> None:
        self.model.clip_project.requires_grad_(True)
        self.model.gpt.requires_grad_(self.config.clipcap.train_gpt2)

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([self.transform(image) for image in images])

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """CLIP's vectors, (B, C), not normalised."""
        found: torch.Tensor = self.model.clip(pixels.to(self.device))
        return found.float()

    @torch.no_grad()
    def caption(self, features: torch.Tensor, style: Style) -> list[Caption]:
        prompts = self.text.prompts([style.prompt] * len(features), features.device)
        embeds = self._after(features, prompts, prompts.ids)
        ids = self.model.gpt.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            eos_token_id=self.text.end, pad_token_id=self.text.pad, **self.text.decoding(style))
        return [self.text.read(row) for row in ids.tolist()]

    def loss(self, features: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        batch = self.text.batch(prompts, captions, features.device)
        embeds = self._after(features, self.text.prompts(prompts, features.device), batch.ids)
        image = embeds.shape[1] - batch.ids.shape[1]
        mask = nn.functional.pad(batch.mask, (image, 0), value=1)
        logits = self.model.gpt(inputs_embeds=embeds, attention_mask=mask,
                                logits_to_keep=batch.ids.shape[1] + 1).logits  # the prefix may be all of the prompt
        return next_token_loss(logits, nn.functional.pad(batch.labels, (1, 0), value=IGNORE))

    def _after(self, features: torch.Tensor, prompts: Batch, ids: torch.Tensor) -> torch.Tensor:
        """The prefix, and then the embeddings of token ids (B, L): (B, prefix_length + L, D)."""
        return torch.cat([self.model.prefix(features, prompts), self.model.gpt.get_input_embeddings()(ids)], dim=1)

    def frozen(self) -> list[nn.Module]:
        """CLIP; and GPT-2, unless it is tuned."""
        gpt_is_trained = self.model.gpt.get_input_embeddings().weight.requires_grad
        return [self.model.clip] if gpt_is_trained else [self.model.clip, self.model.gpt]

    def save(self, folder: Path) -> None:
        """Mapper and GPT-2 as the authors' state dict has them, in safetensors; GPT-2's config and tokenizer beside."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
                 if not name.startswith("clip.")}  # cloned: the authors' dict has tied weights twice
        save_file(state, folder / WEIGHTS)
        self.model.gpt.config.save_pretrained(str(folder))
        self.text.tokenizer.save_pretrained(str(folder))
        (folder / RECORD).write_text(json.dumps({"clip": self.clip_version}))


# --- loading -------------------------------------------------------------------------------------------------------


def _open_clip(name: str, device: str) -> tuple[nn.Module, Any, str, int]:
    """CLIP's image side, its transform, a hash of its weights, and the length of its vectors."""
    where = "captioner.clipcap.clip"
    folder = checkpoint_folder(Part.of(name), where, weights=device != "meta")
    try:
        record = json.loads((folder / "open_clip_config.json").read_bytes())
        dim = int(record["model_cfg"]["embed_dim"])
        if "trust_remote_code" in json.dumps(record):
            raise ValueError("it asks for trust_remote_code, which is never given")
        if device == "meta":
            kind = open_clip.CustomTextCLIP if record["model_cfg"].get("custom_text") else open_clip.CLIP
            with torch.device("meta"):
                return kind(**record["model_cfg"]).visual, None, "", dim
        weights = next(folder / file for file in CLIP_WEIGHTS if (folder / file).is_file())
        clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", weights_only=True)
    except StopIteration:
        raise UserError(f"{where}: no {CLIP_WEIGHTS[0]} in {folder} (pickled weights are not opened)") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise UserError(f"{where}: cannot open {name} with open_clip: {' '.join(str(error).split())[:200]}") from None
    return clip.visual.eval(), transform, hash_file(weights), dim


def _gpt2(ref: Part, device: str, weights: bool) -> Any:
    """GPT-2: from its configuration alone on `meta`, or where its weights come with the mapper's."""
    where = "captioner.clipcap.gpt2"
    if weights and device != "meta":
        return load_pretrained(GPT2LMHeadModel.from_pretrained, ref, where, dtype=torch.float32, use_safetensors=True)
    config = load_pretrained(AutoConfig.from_pretrained, ref, where, weights=False, trust_remote_code=False)
    with torch.device("meta" if device == "meta" else "cpu"):
        return GPT2LMHeadModel(config)


def _mapper(config: Config, clip_dim: int, dim: int) -> Mlp | TransformerMapper:
    if config.mapper == "mlp":
        return Mlp(clip_dim, dim * config.prefix_length)
    return TransformerMapper(clip_dim, dim, config.prefix_length, config.clip_length, config.num_layers,
                             config.num_heads)


def _mapper_of(weights: dict[str, torch.Tensor], clip_dim: int, config: Config) -> Mlp | TransformerMapper:
    """The mapper that weights are of, by their shapes; `load_state_dict` says what doesn't fit."""
    if "clip_project.prefix_const" not in weights:
        return Mlp(clip_dim, len(weights.get("clip_project.model.2.bias", torch.zeros(2))))
    prefix_length, dim = weights["clip_project.prefix_const"].shape
    clip_length = len(weights["clip_project.linear.bias"]) // dim
    num_layers = sum(name.endswith(".attn.project.bias") for name in weights if name.startswith("clip_project."))
    return TransformerMapper(clip_dim, dim, prefix_length, clip_length, num_layers, config.num_heads)


def _weights(folder: Path, clip_version: str) -> dict[str, torch.Tensor]:
    """The weights in a folder: ours, else the only `.pt` there, read without unpickling anything but tensors."""
    try:
        known = json.loads((folder / RECORD).read_bytes())["clip"] if (folder / RECORD).is_file() else clip_version
        if known != clip_version:
            raise UserError(f"captioner.tuned: the ClipCap in {folder} was trained on vectors of another CLIP than "
                            "captioner.clipcap.clip: name that one")
        if (folder / WEIGHTS).is_file():
            return load_file(folder / WEIGHTS)
        if len(pickled := list(folder.glob("*.pt"))) == 1:
            found = torch.load(pickled[0], map_location="cpu", weights_only=True)
            if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
                raise ValueError(f"{pickled[0].name} holds no state dict")
            return found
    except (OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError,
            pickle.UnpicklingError) as error:
        raise UserError(f"captioner: cannot read a ClipCap in {folder}: {' '.join(str(error).split())[:200]}") from None
    raise UserError(f"captioner: no ClipCap in {folder}: it needs {WEIGHTS}, or one .pt of the authors' code")


def _load(model: ClipCapModel, weights: dict[str, torch.Tensor], folder: Path | None) -> None:
    # Buffers of older transformers' GPT-2, which hold no weights.
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    try:
        found = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise UserError(f"captioner: the ClipCap in {folder} is of another CLIP or GPT-2: "
                        f"{' '.join(str(error).split())[:200]}") from None
    missing = [name for name in found.missing_keys if not name.startswith("clip.") and name != "gpt.lm_head.weight"]
    if missing or found.unexpected_keys:
        raise UserError(f"captioner: the ClipCap in {folder} is damaged: it lacks {missing[:1] or 'nothing'}, and has "
                        f"{found.unexpected_keys[:1] or 'nothing'} too much")
