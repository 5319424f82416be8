"""Tiny checkpoints of the real classes, in their stock folder formats, randomly initialised: where training begins.

Every library opens them as it opens the real ones. Weights are safetensors, seeded per part, so that a change of one
part leaves the others as they were.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers.utils import logging

from recap.checkpoint import publish
from recap.clip_bpe import MAX_LENGTH, VOCAB_SIZE, clip_tokenizer
from recap.errors import UserError
from recap.progress import say
from recap.world import marker
from recap.world.scene import COLOURS, KINDS, draw_scene
from recap.world.words import alt_text, describe

FORMAT = 1
"""Raised when the same settings would give other checkpoints."""
NUM_QUERY_TOKENS = 8
TEXT_STD = 0.1
"""Of OPT's weights: its output layer is its embedding, so with 0.02 no adapter could make a token likely."""
OPT_VOCAB_SIZE = 1000
NUM_TOKENIZER_SCENES = 2000
VISION_STD = 0.1
"""Of BLIP-2's vision weights: with transformers' default, 1e-10, an untrained model says the same of all images."""


def init(out: Path, size: int = 64, seed: int = 0) -> None:
    """Write `blip2`, `stable-diffusion`, `detr`, `clip` and `features` below `out`, for images of `size` pixels.

    Does nothing where it has been done. Below 40 MB together.

    Raises:
        UserError: `size` is not a multiple of 16, or `out` holds checkpoints of other settings.
    """
    if size < 32 or size % 16:
        raise UserError(f"size {size}: give a multiple of 16, from 32 on")
    settings = {"format": FORMAT, "size": size, "seed": seed}
    if marker.is_done(out, settings):
        say(f"{out}: the checkpoints are there already")
        return
    logging.disable_progress_bar()
    for name, write in PARTS.items():
        temporary = out / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.manual_seed(seed)
        write(temporary, size)
        publish(temporary, out / name)
    marker.finish(out, settings)
    say(f"{out}: {', '.join(PARTS)}")


# --- BLIP-2 --------------------------------------------------------------------------------------------------------


def write_blip2(folder: Path, size: int) -> None:
    """BLIP-2 with ViT, Q-Former and OPT, and its processor, with the token ids of `Salesforce/blip2-opt-2.7b`.

    As there, captions end in a newline: it is the `eos_token_id` of the language model, while the tokenizer's own
    EOS, `</s>`, is also the BOS that starts every text.
    """
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    tokenizer = opt_tokenizer()
    processor = Blip2Processor(BlipImageProcessor(size={"height": size, "width": size}), tokenizer, NUM_QUERY_TOKENS)
    newline = tokenizer.encode("\n")[-1]
    config = Blip2Config(
        vision_config={"image_size": size, "patch_size": size // 4, "hidden_size": 64, "intermediate_size": 128,
                       "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": VISION_STD},
        qformer_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "encoder_hidden_size": 64, "cross_attention_frequency": 2, "vocab_size": len(tokenizer),
                        "initializer_range": VISION_STD},
        text_config={"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 128, "word_embed_proj_dim": 128,
                     "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 640,
                     "init_std": TEXT_STD, "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": newline},
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    # transformers starts all queries at zero, where they stay alike; LAVIS draws them.
    torch.nn.init.normal_(model.query_tokens, std=VISION_STD)
    model.generation_config.update(bos_token_id=2, pad_token_id=1, eos_token_id=newline)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def opt_tokenizer() -> Any:
    """A byte-level BPE of OPT's class and special ids, trained on the world's captions; any text makes a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=OPT_VOCAB_SIZE, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(_texts(), trainer)
    bpe = json.loads(trained.to_str())["model"]
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    merges: Any = [tuple(pair) for pair in bpe["merges"]]  # annotated as strings, read as pairs
    return GPT2Tokenizer(vocab=bpe["vocab"], merges=merges, add_bos_token=True, **special)


def _texts() -> list[str]:
    texts = []
    for index in range(NUM_TOKENIZER_SCENES):
        rng = Random(f"tokenizer/{index}")
        scene = draw_scene(rng)
        texts += [describe(scene, rng), alt_text(scene, rng)[1]]
    return texts


# --- Stable Diffusion ----------------------------------------------------------------------------------------------


def write_stable_diffusion(folder: Path, size: int) -> None:
    """A Stable Diffusion 1.x pipeline: CLIP's tokenizer, 4 latent channels at a quarter of the size, SD's noise."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=128, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=MAX_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=size)
    unet = UNet2DConditionModel(
        sample_size=size // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8)
    # The values of CompVis/stable-diffusion-v1-4's scheduler_config.json.
    scheduler: Any = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
        set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    scheduler.register_to_config(clip_sample=False)  # PNDM ignores it; DDIM made from this configuration needs it
    pipeline: Any = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
                                            feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)


# --- the others ----------------------------------------------------------------------------------------------------


def write_detr(folder: Path, size: int) -> None:
    """DETR on a small ResNet, whose labels are the world's object names (`red circle`), and its image processor."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    names = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    backbone = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
                "layer_type": "basic", "out_features": ["stage4"]}
    config = DetrConfig(
        backbone_config=backbone, d_model=32, num_queries=12, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": size, "longest_edge": size * 3 // 2}).save_pretrained(folder)


def write_clip(folder: Path, size: int) -> None:
    """An open_clip model folder: a ViT and a text Transformer, with CLIP's own tokenizer and preprocessing."""
    from open_clip import CLIP
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from safetensors.torch import save_file

    model_config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": size, "layers": 2, "width": 64, "head_width": 32, "patch_size": size // 4},
        "text_cfg": {"context_length": MAX_LENGTH, "vocab_size": VOCAB_SIZE, "width": 32, "heads": 2, "layers": 2},
    }
    preprocess_config = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    _write_json(folder / "open_clip_config.json", {"model_cfg": model_config, "preprocess_cfg": preprocess_config})
    weights = {name: tensor.contiguous() for name, tensor in CLIP(**model_config).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def write_features(folder: Path, size: int) -> None:
    """A timm model folder: a small convolutional network of 64 features, for the Fréchet distance."""
    import timm
    from safetensors.torch import save_file

    sizes: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 64]}
    preprocessing = {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                     "crop_pct": 1.0}
    _write_json(folder / "config.json", {
        "architecture": "convnext_atto", "num_classes": 0, "num_features": 64, "model_args": sizes,
        "pretrained_cfg": {**preprocessing, "num_classes": 0, "first_conv": "stem.0", "classifier": "head.fc"}})
    model = timm.create_model("convnext_atto", num_classes=0, **sizes)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


PARTS: dict[str, Callable[[Path, int], None]] = {
    "blip2": write_blip2, "stable-diffusion": write_stable_diffusion, "detr": write_detr, "clip": write_clip,
    "features": write_features,
}
