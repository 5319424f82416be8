"""Show and Tell (Vinyals et al. 2015, arXiv 1411.4555): a CNN's features, told by an LSTM; or with attention to them.

With attention, each word is chosen by what the LSTM knows and by the regions that it attends to, as in Show, Attend and
Tell (Xu et al. 2015, arXiv 1502.03044). The attention stands behind the LSTM (Luong et al. 2015, arXiv 1508.04025), so
that all words of a caption are trained at once.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import GenerationMixin, GPT2Tokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging

from recap.captioners import Assembled
from recap.captioners.text import Caption, Text, next_token_loss
from recap.captioners.vocabulary import learn_vocabulary
from recap.config import Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.captioner import CnnLstm as Config
from recap.config.captioner import Part
from recap.config.finetune import Finetune
from recap.errors import UserError
from recap.pretrained import load_model, load_pretrained

FETCHING = ("pretrained", "checkpoint", "cache_dir")
"""What arguments begin with that make timm load weights."""


class ShowTellConfig(PreTrainedConfig):
    """Of `ShowTell`: timm's name for the CNN and how it sees, and the sizes of the LSTM."""

    model_type = "recap_cnn_lstm"

    encoder: str = "resnet50"
    """timm's name of the architecture."""
    encoder_args: dict[str, Any] | None = None
    """What timm is given beside the name."""
    image_size: int = 224
    mean: tuple[float, ...] | list[float] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] | list[float] = (0.229, 0.224, 0.225)
    attention: bool = True
    vocab_size: int = 10_000
    hidden_size: int = 512
    num_hidden_layers: int = 1
    dropout: float = 0.1
    is_trained_encoder: bool = False
    """Whether the CNN has learnt to see by captioning alone."""


class LstmCache:
    """For `ShowTell.generate(…, past_key_values=LstmCache())`: an LSTM's state takes the place of keys and values."""

    is_compileable = False

    def __init__(self) -> None:
        self.num_words = 0
        self.state: tuple[torch.Tensor, torch.Tensor] | None = None
        """Hidden and cell state after these words, (layers, B, D) each."""

    def get_seq_length(self) -> int:
        """How many words have been read."""
        return self.num_words

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with these rows."""
        if self.state is not None:
            hidden, cell = self.state
            self.state = hidden[:, beam_idx], cell[:, beam_idx]


class ShowTell(PreTrainedModel, GenerationMixin):
    """A timm CNN and an LSTM."""

    config_class = ShowTellConfig
    base_model_prefix = "show_tell"
    main_input_name = "input_ids"
    _is_stateful = True  # there are no keys and values to cache

    def __init__(self, config: ShowTellConfig) -> None:
        super().__init__(config)
        # A configuration names an architecture; it must not fetch weights from elsewhere, or open files.
        arguments = config.encoder_args or {}
        if not timm.is_model(config.encoder) or any(key.startswith(FETCHING) for key in arguments):
            raise ValueError(f"encoder {config.encoder!r} with {sorted(arguments)} is no architecture of timm's")
        self.encoder: Any = timm.create_model(config.encoder, num_classes=0, global_pool="", **arguments)
        width = config.hidden_size
        # A CNN's features come in any scale, an LSTM's words in one.
        num_features = self.encoder.num_features
        self.project = nn.Sequential(nn.LayerNorm(num_features), nn.Linear(num_features, width))
        self.words = nn.Embedding(config.vocab_size, width)
        self.lstm = nn.LSTM(width, width, config.num_hidden_layers, batch_first=True,
                            dropout=config.dropout if config.num_hidden_layers > 1 else 0)
        for name, bias in self.lstm.named_parameters():
            # Open the forget gate (of i, f, g, o), so that the image is still there after the prompt (Jozefowicz et al.
            # 2015): else it takes thousands of steps.
            if name.startswith("bias_hh"):
                nn.init.constant_(bias.data[width:2 * width], 3.0)
        self.attend = nn.MultiheadAttention(width, 1, batch_first=True) if config.attention else None
        self.combine = nn.Linear(2 * width, width) if config.attention else None
        self.dropout = nn.Dropout(config.dropout)
        self.tell = nn.Linear(width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own first weights suit an LSTM; transformers' are for Transformers, and hide the image.

        But what a timm CNN computes and doesn't save, transformers leaves empty when it opens a folder.
        """
        fill: Any = getattr(module, "init_non_persistent_buffers", None)
        if fill is not None:
            fill()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → the CNN's last feature map as regions, (B, H'·W', C)."""
        found: torch.Tensor = self.encoder.forward_features(pixels)
        return found.flatten(2).transpose(1, 2) if found.ndim == 4 else found

    def forward(self, input_ids: torch.Tensor, regions: torch.Tensor, attention_mask: torch.Tensor | None = None,
                past_key_values: LstmCache | None = None, **kwargs: Any) -> CausalLMOutput:
        """Logits (B, L, V) of the token after each of `input_ids` (B, L), given regions (B, N, C).

        Rows are padded on the right, where an LSTM has not been yet: no mask is needed. With a cache, `input_ids` are
        those that follow what it has read.
        """
        seen, words = self.project(regions), self.dropout(self.words(input_ids))
        cache = past_key_values or LstmCache()
        if cache.state is None:  # the image is the LSTM's first word (Vinyals et al., equation 10)
            words = torch.cat([seen.mean(dim=1, keepdim=True), words], dim=1)
        with torch.autocast(words.device.type, enabled=False):  # many CPUs have no LSTM in bfloat16
            told, cache.state = self.lstm(words.float(), cache.state)
        cache.num_words += input_ids.shape[1]
        told = told[:, -input_ids.shape[1]:].to(seen.dtype)
        if self.attend is not None and self.combine is not None:
            context, _ = self.attend(told, seen, seen, need_weights=False)
            told = torch.tanh(self.combine(torch.cat([told, context], dim=-1)))
        return CausalLMOutput(logits=self.tell(self.dropout(told)))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, regions: torch.Tensor,
                                      past_key_values: Any = None, **kwargs: Any) -> dict[str, Any]:
        """What `forward` is given: all words, unless there is an `LstmCache`; generate's own holds keys and values."""
        cache = past_key_values if isinstance(past_key_values, LstmCache) else None
        return {"input_ids": input_ids[:, cache.num_words if cache else 0:], "regions": regions,
                "past_key_values": cache}


class CnnLstm(Assembled):
    """`ShowTell`, trained from scratch on a CNN that is kept as it is, or trained too."""

    def open_whole(self, whole: CaptionerConfig) -> None:
        logging.disable_progress_bar()
        tokenizer = load_pretrained(GPT2Tokenizer.from_pretrained, whole, "captioner", weights=False,
                                    trust_remote_code=False)
        self._take(load_model(ShowTell, whole, self.device), tokenizer)

    def prepare(self, config: Finetune, captions: list[str]) -> None:
        """Train the LSTM; the CNN where it is asked for, or was never trained."""
        if self.model is None:
            tokenizer = learn_vocabulary(captions, self.config.cnn_lstm.vocab_size)
            # From the configuration alone, with no caption seen, the vocabulary is taken to be full.
            vocab_size = len(tokenizer) if captions else self.config.cnn_lstm.vocab_size
            self._take(_assembled(self.config.cnn_lstm, vocab_size, self.device), tokenizer)
        self.encoder_is_trained = self.config.cnn_lstm.train_encoder or self.model.config.is_trained_encoder
        self.model.float().requires_grad_(True)
        self.model.encoder.requires_grad_(self.encoder_is_trained)

    def _take(self, model: Any, tokenizer: Any) -> None:
        self.model = model.to(self.device)
        self.model.lstm.float()
        self.text = Text(tokenizer, start=(tokenizer.eos_token_id,), end=tokenizer.eos_token_id,
                         pad=tokenizer.pad_token_id)
        config = model.config
        self.transform: Any = create_transform((3, config.image_size, config.image_size), interpolation="bicubic",
                                               mean=tuple(config.mean), std=tuple(config.std), crop_pct=1.0,
                                               crop_mode="squash")  # nothing is cropped away that a caption speaks of
        self.set_training(False)

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        self.check_whole()
        return torch.stack([self.transform(image) for image in images])

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The CNN's regions, (B, H'·W', C)."""
        with torch.set_grad_enabled(self.encoder_is_trained and torch.is_grad_enabled()):
            return self.model.see(pixels.to(self.device, self.model.dtype))

    @torch.no_grad()
    def caption(self, features: torch.Tensor, style: Style) -> list[Caption]:
        prompt = torch.tensor([self.text.prompt_ids(style.prompt)], device=features.device).expand(len(features), -1)
        start = prompt.shape[1]
        ids = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), regions=features,
                                  past_key_values=LstmCache(), eos_token_id=self.text.end, pad_token_id=self.text.pad,
                                  **self.text.decoding(style, start))
        return [self.text.read(row[start:]) for row in ids.tolist()]

    def loss(self, features: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        batch = self.text.batch(prompts, captions, features.device)
        return next_token_loss(self.model(batch.ids, features).logits, batch.labels)

    def frozen(self) -> list[nn.Module]:
        """The CNN; of one that is trained, its batch statistics, so that a loss depends on no neighbour."""
        if not self.encoder_is_trained:
            return [self.model.encoder]
        return [module for module in self.model.encoder.modules() if isinstance(module, nn.BatchNorm2d)]

    def save(self, folder: Path) -> None:
        """A transformers folder, which `ShowTell.from_pretrained(folder)` opens."""
        self.model.save_pretrained(str(folder))
        self.text.tokenizer.save_pretrained(str(folder))


def _assembled(config: Config, vocab_size: int, device: str) -> ShowTell:
    """A new LSTM on a timm CNN, which is trained where the configuration names a checkpoint."""
    where = "captioner.cnn_lstm.encoder"
    if config.is_from_scratch:
        try:
            cnn: Any
            arguments: dict[str, Any]
            cnn, arguments = timm.create_model(config.encoder, num_classes=0, global_pool=""), {}
        except RuntimeError as error:
            raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from None
    else:
        cnn, arguments = load_pretrained(lambda folder: _open_timm(Path(folder), device), Part.of(config.encoder),
                                         where, weights=device != "meta")
    seen = resolve_model_data_config(cnn)
    settings = ShowTellConfig(
        encoder=cnn.pretrained_cfg["architecture"], encoder_args=arguments, mean=seen["mean"], std=seen["std"],
        image_size=config.image_size or seen["input_size"][-1], attention=config.attention, vocab_size=vocab_size,
        hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, dropout=config.dropout,
        is_trained_encoder=config.is_from_scratch)
    with torch.device(device if device == "meta" else "cpu"):
        model = ShowTell(settings)
    if device != "meta":
        model.encoder = cnn
    return model


def _open_timm(folder: Path, device: str) -> tuple[Any, dict[str, Any]]:
    """A timm model from a folder, and what it is made of beside its name; weights only from safetensors."""
    arguments = json.loads((folder / "config.json").read_bytes()).get("model_args") or {}
    if device == "meta":
        return timm.create_model(f"local-dir:{folder}", num_classes=0, global_pool=""), arguments
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"no model.safetensors in {folder} (pickled weights are not opened)")
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, global_pool=""), arguments
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
