"""The base diffusion model: Stable Diffusion in the small, its UNet trained from scratch on the world's alt-text.

As Stable Diffusion 1.x was made: the text encoder is CLIP's, learnt from pairs of its own; it stays as it is while the
UNet learns, by the product's own loop, as one arm of an experiment: `alt`, on shards of its own. Without a trained text
encoder the UNet still drew no shape that its caption asked for after 14,000 steps.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.nn.functional import mse_loss

from recap.checkpoint import publish
from recap.clip_bpe import clip_tokenizer
from recap.pipeline import Experiment, run
from recap.rundir import StageDir
from recap.world.base import text_encoder
from recap.world.base import vae as vae_part
from recap.world.base.drawings import Drawings, to_float
from recap.world.base.fit import Schedule
from recap.world.base.fp16 import say_float32
from recap.world.words import clean_alt_text

SCHEDULE = Schedule(steps=6000, batch_size=128, lr=1e-3)
"""Of the text encoder."""
TRAIN = {"steps": 24_000, "batch_size": 32, "lr": 1.5e-3, "lr_scheduler": "cosine", "warmup_steps": 500,
         "caption_dropout": 0.1, "ema_decay": 0.999, "train_text_encoder": False, "checkpoint_every": 1000}
"""Of the UNet."""
WIDTHS = (64, 96)
NUM_HELD_OUT = 500


def build(size: int, vae: AutoencoderKL | None = None) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x pipeline with a random UNet and text encoder around a VAE, by default a random one."""
    vae = vae or vae_part.build(size)
    unet = UNet2DConditionModel(
        sample_size=vae.config.sample_size // 4, in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels, layers_per_block=1, block_out_channels=WIDTHS,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text_encoder.WIDTH, attention_head_dim=4, norm_num_groups=16)
    # The noise of Stable Diffusion, and a solver that draws well in few steps. Predicting v, as Stable Diffusion 2
    # does, gives weight to what is decided while there is much noise: that is all that captions speak of.
    scheduler: Any = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, steps_offset=1,
        prediction_type="v_prediction")
    pipeline: Any = StableDiffusionPipeline(vae, text_encoder.build(), clip_tokenizer(), unet, scheduler,
                                            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return pipeline


def save(pipeline: StableDiffusionPipeline, folder: Path, size: int) -> None:
    """A diffusers folder, fp16."""
    pipeline.scheduler.register_to_config(clip_sample=False)  # our solver ignores it; DDIM made from this one needs it
    pipeline.to(torch.float16).save_pretrained(folder)
    say_float32(folder / "text_encoder" / "config.json")


def train(stage: StageDir, seed: int, size: int, vae: Path, shards: str) -> dict[str, float]:
    """Write `stage.path/model`, a diffusers folder, fp16.

    Args:
        stage: where all of it goes; the training of the UNet below `run/`.
        seed: of the first weights, of the text encoder's drawings and of the training.
        size: of the images, in pixels.
        vae: folder of the trained VAE.
        shards: pattern of the base-training shards.

    Returns:
        See `caption_gain`.
    """
    start = stage.path / "start"
    if not start.exists():
        _begin(stage, start, seed, size, vae)
    run(Experiment.model_validate({
        "name": "run", "runs": str(stage.path), "arms": ["alt"], "seeds": [seed],
        "train": {"model": str(start), "shards": shards, "resolution": size, **TRAIN}}), "train")
    trained = stage.path / "run" / f"seed-{seed}" / "train" / "alt"
    pipeline: Any = StableDiffusionPipeline.from_pretrained(trained / "pipeline", safety_checker=None)
    figures = caption_gain(pipeline, seed, size)
    save(pipeline, stage.path / "model", size)
    with (stage.path / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write((trained / "log.jsonl").read_text(encoding="utf-8"))
    return figures


@torch.no_grad()
def caption_gain(pipeline: Any, seed: int, size: int) -> dict[str, float]:
    """What captions are worth to the UNet, on held-out drawings at noise levels from none to all.

    Returns:
        `loss` without a caption (mean squared error), and by how much it falls with the drawing's own clean alt-text
        (`gain_by_own`) and with another drawing's (`gain_by_other`; below 0 where captions are believed).
    """
    drawings = Drawings.draw(f"{seed}/stable diffusion/held out", NUM_HELD_OUT, size)
    latents = pipeline.vae.encode(to_float(drawings.pixels)).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.arange(NUM_HELD_OUT) * pipeline.scheduler.config.num_train_timesteps // NUM_HELD_OUT
    scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy, wanted = (make(latents, noise, timesteps) for make in (scheduler.add_noise, scheduler.get_velocity))

    def loss(captions: list[str]) -> float:
        ids = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        predicted = pipeline.unet(noisy, timesteps, pipeline.text_encoder(ids)[0]).sample
        return mse_loss(predicted, wanted).item()

    own, without = [clean_alt_text(scene) for scene in drawings.scenes], loss([""] * NUM_HELD_OUT)
    return {"loss": without, "gain_by_own": without - loss(own), "gain_by_other": without - loss(own[1:] + own[:1])}


def _begin(stage: StageDir, start: Path, seed: int, size: int, vae: Path) -> None:
    """Write the pipeline that the UNet's training starts from: it can read, and has never drawn."""
    torch.manual_seed(seed)
    pipeline = build(size, AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32))
    text_encoder.train(stage, pipeline.text_encoder, seed, size, SCHEDULE)
    temporary = stage.path / ".start.tmp"
    pipeline.save_pretrained(temporary)
    publish(temporary, start)
