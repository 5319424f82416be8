"""The training loss: of a sample alone whatever its neighbours, and sensitive to every window of its caption."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from recap.errors import UserError
from train_t2i.config import Train
from train_t2i.data import Batch
from train_t2i.ema import EMA
from train_t2i.loss import add_noise, target
from train_t2i.model import Diffusion
from train_t2i.sample import load_pipeline

SENTENCE = "A red circle lies to the left of a small blue ring, under a grey sky. "


@pytest.fixture(scope="module")
def model(world_models: Path) -> Diffusion:
    config = Train(model=str(world_models / "stable-diffusion-0"), resolution=64)
    return Diffusion(load_pipeline(config, "train", "cpu"), config)


def batch(*captions: str) -> Batch:
    pixels = torch.rand(len(captions), 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(pixels, list(captions), [hash(("seed", place)) % 2**31 for place in range(len(captions))],
                 [str(place) for place in range(len(captions))])


@pytest.mark.parametrize("captions", [("a cat", SENTENCE * 12, "", "a dog"), (SENTENCE * 12, "a cat", SENTENCE * 6)])
def test_a_samples_loss_is_the_same_in_any_batch(model: Diffusion, captions: tuple[str, ...]) -> None:
    whole = batch(*captions)
    with torch.no_grad():
        together = model(whole)
        alone = torch.cat([model(whole.slice(i, i + 1)) for i in range(len(captions))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_word_in_the_third_window_changes_the_loss_and_gets_a_gradient(model: Diffusion) -> None:
    red, green = (SENTENCE * 10 + f"Far behind stands a {colour} star." for colour in ("red", "green"))
    with torch.no_grad():
        assert model(batch(red)).item() != model(batch(green)).item()
    token = model.tokenizer("star", add_special_tokens=False).input_ids[0]
    assert len(model.tokenizer(red).input_ids) > 2 * 77
    model(batch(red)).sum().backward()
    gradient = model.text_encoder.get_input_embeddings().weight.grad[token]
    assert gradient.abs().max() > 0
    model.zero_grad()


def test_a_frozen_text_encoder_gets_no_gradient_and_the_vae_never(world_models: Path) -> None:
    config = Train(model=str(world_models / "stable-diffusion-0"), resolution=64, train_text_encoder=False)
    model = Diffusion(load_pipeline(config, "train", "cpu"), config)
    model(batch("a cat")).sum().backward()
    assert all(p.grad is None for p in (*model.text_encoder.parameters(), *model.vae.parameters()))
    assert any(p.grad is not None for p in model.unet.parameters())


def test_a_resolution_that_the_models_cannot_take_is_one_clear_line(world_models: Path) -> None:
    config = Train(model=str(world_models / "stable-diffusion-0"), resolution=60)
    with pytest.raises(UserError, match=r"train\.resolution: 60 is not a multiple of 8"):
        Diffusion(load_pipeline(config, "train", "cpu"), config)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_are_the_schedulers(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    steps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(add_noise(scheduler, latents, noise, steps), scheduler.add_noise(latents, noise, steps))
    wanted = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    torch.testing.assert_close(target(scheduler, latents, noise, steps), wanted)


def test_ema_is_the_weighted_mean_of_equation_and_warms_up() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    ema = EMA(layer, decay=0.5)
    layer.weight.data.fill_(1.0)
    ema.update(layer, step=0)  # decay 1/10
    assert ema.shadow["weight"].item() == pytest.approx(0.9)
    ema.update(layer, step=100)  # decay 0.5
    assert ema.shadow["weight"].item() == pytest.approx(0.95)
    ema.copy_to(layer)
    assert layer.weight.item() == pytest.approx(0.95)
