"""The denoising loss: diffusers' noise and targets, the papers' weights, and levels without signal or noise."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from pipelines import STOCK

from train_t2i.loss import NoiseLevels, per_sample_mse
from train_t2i.model import with_zero_terminal_snr

KINDS = ["epsilon", "v_prediction"]
STEPS = torch.tensor([0, 1, 500, 998, 999])


def scheduler(**settings: Any) -> Any:
    return DDPMScheduler(**{**STOCK, "steps_offset": 0, **settings})


def levels(scheduler: Any) -> NoiseLevels:
    return NoiseLevels(scheduler.alphas_cumprod, scheduler.config.prediction_type)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_target_are_the_schedulers(kind: str, zero: bool) -> None:
    theirs = scheduler(prediction_type=kind, rescale_betas_zero_snr=zero)
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    ours = levels(theirs)
    assert torch.equal(ours.add_noise(latents, noise, STEPS), theirs.add_noise(latents, noise, STEPS))
    wanted = noise if kind == "epsilon" else theirs.get_velocity(latents, noise, STEPS)
    assert torch.equal(ours.target(latents, noise, STEPS), wanted)


@given(st.floats(1e-3, 0.999), st.floats(0.5, 20), st.integers(0, 2**32 - 1))
def test_min_snr_weighs_the_error_of_the_image_by_the_paper(alpha_bar: float, gamma: float, seed: int) -> None:
    """min(SNR, γ)·‖x₀ − x̂₀‖², whatever is predicted: Hang et al. 2023, section 3.4."""
    latents, noise, error = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(seed),
                                        dtype=torch.float64).unbind()
    alpha, sigma, step = alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5, torch.tensor([0])
    noisy = alpha * latents + sigma * noise
    for kind in KINDS:
        ours = NoiseLevels(torch.tensor([alpha_bar], dtype=torch.float64), kind)
        prediction = ours.target(latents, noise, step).double() + error
        image = (noisy - sigma * prediction) / alpha if kind == "epsilon" else alpha * noisy - sigma * prediction
        of_image = (image - latents).square().mean() * min(alpha_bar / (1 - alpha_bar), gamma)
        weighed = ours.min_snr_weights(step, gamma) * error.square().mean()
        torch.testing.assert_close(weighed.double(), of_image[None], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_one_where_there_is_no_signal_and_finite_everywhere(kind: str) -> None:
    zero = levels(scheduler(prediction_type=kind, rescale_betas_zero_snr=True))
    assert zero.alphas_cumprod[-1] == 0
    weights = zero.min_snr_weights(torch.arange(1000), 5)
    assert weights.isfinite().all() and (weights > 0).all() and (weights <= 1).all()
    assert weights[-1] == 1
    assert NoiseLevels(torch.tensor([1.0]), kind).min_snr_weights(torch.tensor([0]), 5).isfinite()


def test_another_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        NoiseLevels(torch.ones(1), "sample")


def test_the_loss_of_each_sample_is_its_own_mean_in_float32() -> None:
    prediction, wanted = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(2, 1, 2, 2)
    wanted[1] = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2)
    losses = per_sample_mse(prediction, wanted)
    assert losses.tolist() == [0.0, 7.5] and losses.dtype == torch.float32


@pytest.mark.parametrize("theirs", [
    PNDMScheduler(**STOCK, skip_prk_steps=True, prediction_type="v_prediction"),
    DDIMScheduler(**STOCK, prediction_type="v_prediction", clip_sample=False),
    scheduler(prediction_type="v_prediction", clip_sample=False),
    EulerDiscreteScheduler(**STOCK, prediction_type="v_prediction"),
    DPMSolverMultistepScheduler(**STOCK, prediction_type="v_prediction")], ids=lambda each: type(each).__name__)
def test_a_scheduler_with_a_last_level_of_noise_alone_starts_from_it_and_finds_the_image(theirs: Any) -> None:
    """Of a UNet that knows the image, a sampler that starts from the right level ends there: Lin et al. 2023."""
    zero = with_zero_terminal_snr(theirs)
    assert type(zero) is (DDIMScheduler if isinstance(theirs, PNDMScheduler) else type(theirs))
    assert zero.config.beta_start == STOCK["beta_start"] and zero.config.prediction_type == "v_prediction"
    assert not zero.config.get("clip_sample", False)
    zero.set_timesteps(10)
    assert zero.timesteps[0] == 999
    trained = levels(DDPMScheduler.from_config(zero.config))
    assert trained.alphas_cumprod[-1] == 0
    generator = torch.Generator().manual_seed(0)
    image = 3 * torch.randn(1, 4, 8, 8, generator=generator)  # latents are not within ±1
    noisy = torch.randn(1, 4, 8, 8, generator=generator) * zero.init_noise_sigma
    for step in zero.timesteps:
        scaled = zero.scale_model_input(noisy, step)
        alpha_bar = trained.alphas_cumprod[int(step)].double()
        # v = (α·x_t − x₀) / σ of the noise that is in x_t now
        velocity = (alpha_bar.sqrt() * scaled - image) / (1 - alpha_bar).sqrt()
        noisy = zero.step(velocity.float(), step, noisy, generator=generator).prev_sample
    torch.testing.assert_close(noisy, image, rtol=0, atol=0.3)
