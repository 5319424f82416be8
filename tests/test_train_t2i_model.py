"""The training loss: of a sample alone whatever its neighbours, of every word, and of all that is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, EDMEulerScheduler, UNet2DConditionModel
from pipelines import CROSS_DOWN, CROSS_UP, sd, stirred, text_config, unet, vae

from recap.errors import UserError
from recap.processes import open_accelerator
from train_t2i.batch import Batch
from train_t2i.checkpoint import Checkpoint, Progress
from train_t2i.config import Buckets, Lora, Train
from train_t2i.ema import EMA
from train_t2i.images import size_ids
from train_t2i.model import Diffusion
from train_t2i.sample import load_pipeline
from train_t2i.text import tokenize
from train_t2i.train import open_optimizer

SENTENCE = "A red circle lies to the left of a small blue ring, under a grey sky. "
LONG = SENTENCE * 9
KINDS = ["sd1", "sd2", "sdxl"]
SIDE = 32
WHAT = {"all": {}, "unet": {"train_text_encoder": False}, "text": {"train_unet": False}}
HOW = {"full": None, "lora": Lora(rank=2, alpha=4, text_encoder=["q_proj", "fc1"])}


def build(folder: Path, **changes: Any) -> Diffusion:
    config = Train(model=str(folder), resolution=SIDE, **changes)
    pipe = load_pipeline(config, "train", "cpu")
    torch.manual_seed(0)  # the first weights of LoRA
    return Diffusion(pipe, config).train()


def batch(model: Diffusion, *captions: str, side: int = SIDE) -> Batch:
    generator, number, recipe = torch.Generator().manual_seed(1), len(captions), model.recipe
    shape = (recipe.latent_channels, side // recipe.latent_scale, side // recipe.latent_scale)
    return Batch(torch.randint(0, 256, (number, 3, side, side), generator=generator, dtype=torch.uint8),
                 *torch.randn(2, number, *shape, generator=generator), torch.linspace(100, 900, number).long(),
                 torch.ones(number), torch.tensor([size_ids(40 + each, 30, (side, side)) for each in range(number)]),
                 [tokenize(caption, recipe.tokenizers).ids for caption in captions], list(map(str, range(number))))


def gradients(model: Diffusion, part: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(part).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def models(tiny_pipelines: Path) -> dict[str, Diffusion]:
    return {kind: build(tiny_pipelines / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, models: dict[str, Diffusion]) -> Diffusion:
    return models[request.param]


# --- whose loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [("a cat", LONG, "", "a dog"), (LONG, "a cat", SENTENCE * 5)])
def test_a_samples_loss_is_the_same_in_any_batch(model: Diffusion, captions: tuple[str, ...]) -> None:
    whole = batch(model, *captions)
    assert len(set(whole.num_windows)) > 1
    with torch.no_grad():
        together = model(whole)
        alone = torch.cat([model(whole.slice(place, place + 1)) for place in range(len(captions))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_samples_gradient_is_the_same_in_any_batch(model: Diffusion) -> None:
    whole = batch(model, "a cat", LONG)
    alone = gradients(model, whole.slice(0, 1))
    whole.weights[1] = 0
    together = gradients(model, whole)
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_empty_place_has_no_loss_and_changes_no_other(model: Diffusion) -> None:
    whole = batch(model, "a cat", "a dog")
    with torch.no_grad():
        before = model(whole)
        whole.weights[0] = 0
        after = model(whole)
    assert after[0] == 0 and after[1] == before[1] > 0


def test_a_word_in_the_third_window_changes_the_loss_and_moves_every_text_encoder(model: Diffusion) -> None:
    red, green = (batch(model, SENTENCE * 8 + f"Far behind stands a {colour} star.") for colour in ("red", "green"))
    assert red.num_windows == [3]
    with torch.no_grad():
        assert model(red).item() != model(green).item()
    star = model.recipe.tokenizers[0]("star", add_special_tokens=False).input_ids[0]
    found = gradients(model, red)
    tables = [gradient for name, gradient in found.items() if name.endswith("token_embedding.weight")]
    assert len(tables) == len(model.encoders)
    assert all(table[star].abs().max() > 0 for table in tables)


def test_stable_diffusion_xl_is_trained_with_zeros_for_no_text_where_its_pipeline_says_so(
        models: dict[str, Diffusion], monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = models["sdxl"], {}
    assert model.zeros_for_empty

    def take(_: Any, arguments: Any, named: dict[str, Any]) -> None:
        taken.update(named)

    handle = model.unet.register_forward_pre_hook(take, with_kwargs=True)
    # The second begins as no text does, and is one.
    part = batch(model, "", "<|endoftext|> a cat", "a cat", LONG)
    for zeros in (True, False):
        monkeypatch.setattr(model, "zeros_for_empty", zeros)
        model(part)
        found = zip(taken["encoder_hidden_states"], taken["added_cond_kwargs"]["text_embeds"], strict=True)
        assert [(bool(states.any()), bool(pooled.any())) for states, pooled in found] == \
            [(not zeros, not zeros)] + 3 * [(True, True)]
        assert torch.equal(taken["added_cond_kwargs"]["time_ids"], part.size_ids)
    handle.remove()


def test_latents_are_drawn_from_the_posterior_and_scaled_as_the_pipeline_unscales_them(model: Diffusion) -> None:
    part = batch(model, "a cat", "a dog")
    latents = model.latents(part)
    posterior = model.vae.encode(part.images.float() / 127.5 - 1).latent_dist
    wanted = (posterior.mean + posterior.std * part.posterior_noise) * model.vae.config.scaling_factor
    torch.testing.assert_close(latents, wanted.detach())
    part.images = posterior.parameters.detach().half()  # as they are kept
    torch.testing.assert_close(model.latents(part), wanted.detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_min_snr_weighs_each_sample_by_its_level(models: dict[str, Diffusion], kind: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    model = models[kind]
    part = batch(model, "a cat", "a dog", "a cow")
    with torch.no_grad():
        plain = model(part)
        monkeypatch.setattr(model, "min_snr_gamma", 5.0)
        weighed = model(part)
    alpha_bar = model.levels.alphas_cumprod[part.timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(weighed / plain, snr.clamp_max(5) / (snr if kind == "sd1" else snr + 1))


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_all_that_is_trained_gets_a_gradient_and_nothing_else(tiny_pipelines: Path, kind: str, what: str,
                                                              how: str) -> None:
    """So that processes need not look for parameters that were not used."""
    model = build(tiny_pipelines / kind, lora=HOW[how], **WHAT[what])
    model(batch(model, "a cat", "", LONG, side=64)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    parts = {name.split(".")[0] for name in trained}
    text = {"text_encoder", "text_encoder_2"} if kind == "sdxl" else {"text_encoder"}
    assert parts == {"all": {"unet", *text}, "unet": {"unet"}, "text": text}[what]
    assert all(("lora" in name) is (how == "lora") for name in trained)
    moving = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    # LoRA begins with B at zero, through which A gets nothing yet.
    assert {name.split(".")[0] for name in moving} == parts
    assert set(moving) >= {name for name in trained if how == "full" or "lora_B" in name}


def test_unet_and_text_encoders_learn_at_their_own_rates(models: dict[str, Diffusion]) -> None:
    model = models["sdxl"]
    groups = model.parameter_groups(Train(lr=1e-4, text_encoder_lr=1e-6))
    assert [group["peak_lr"] for group in groups] == [group["lr"] for group in groups] == [1e-4, 1e-6]
    names = {id(p): name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert [{names[id(p)] for p in group["params"]} for group in groups] == [{"unet"}, {"text_encoder",
                                                                                      "text_encoder_2"}]
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert [group["peak_lr"] for group in model.parameter_groups(Train(lr=1e-4))] == [1e-4, 1e-4]


def test_the_average_is_that_of_the_equation_and_warms_up() -> None:
    layer = torch.nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    layer.weight.data.fill_(0.0)
    each, third = EMA(layer, decay=0.5), EMA(layer, decay=0.5, every=3)
    layer.weight.data.fill_(1.0)
    each.update(layer, step=0)  # by (1 + 0) / (10 + 0)
    assert each.whole()["weight"].item() == pytest.approx(0.9)
    each.update(layer, step=100)  # by 0.5
    assert each.whole()["weight"].item() == pytest.approx(0.95)
    third.update(layer, step=99)
    assert third.whole()["weight"].item() == 0
    third.update(layer, step=101)  # by 0.5 three times
    assert third.whole()["weight"].item() == pytest.approx(1 - 0.5**3)
    third.update(layer, step=102)
    assert third.whole()["weight"].item() == pytest.approx(1 - 0.5**3)
    third.update(layer, step=102, is_last=True)  # by 0.5 once
    assert third.whole()["weight"].item() == pytest.approx(1 - 0.5**4)
    assert list(each.whole()) == ["weight"]


# --- how it is computed ----------------------------------------------------------------------------------------------


def prepared(model: Diffusion, precision: str) -> tuple[Accelerator, Any, Any]:
    accelerator = open_accelerator(precision, "cpu")
    optimizer = torch.optim.AdamW(model.parameter_groups(Train()))
    return accelerator, *accelerator.prepare(model, optimizer)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_in_bf16_losses_are_about_the_same_and_what_is_trained_stays_float32(tiny_pipelines: Path, kind: str,
                                                                             what: str, how: str) -> None:
    model = build(tiny_pipelines / kind, lora=HOW[how], **WHAT[what])
    part = batch(model, "a cat", "", LONG)
    wanted = model(part).detach()
    model = build(tiny_pipelines / kind, lora=HOW[how], precision="bf16", **WHAT[what])
    accelerator, wrapped, optimizer = prepared(model, "bf16")
    losses = wrapped(part)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, wanted, rtol=2e-2, atol=0)
    accelerator.backward(losses.sum())
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
    moments = [value for p in trained for name, value in optimizer.optimizer.state[p].items() if name != "step"]
    assert len(moments) == 2 * len(trained) and {value.dtype for value in moments} == {torch.float32}
    assert all(p.isfinite().all() for p in trained)
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    if how == "lora" or what != "all":
        assert any(p.dtype == torch.bfloat16 for p in (*model.unet.parameters(), *model.text_encoder.parameters()))


def test_in_fp16_a_vae_that_overflows_stays_float32(tiny_pipelines: Path) -> None:
    model = build(tiny_pipelines / "sdxl", lora=Lora(), precision="fp16")
    assert model.vae.config.force_upcast and model.vae.dtype == torch.float32
    assert model.unet.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradient_checkpointing_changes_no_gradient(tiny_pipelines: Path, kind: str, how: str) -> None:
    plain, frugal = (build(tiny_pipelines / kind, lora=HOW[how], gradient_checkpointing=each) for each in (False, True))
    assert frugal.unet.is_gradient_checkpointing and all(each.is_gradient_checkpointing for each in frugal.encoders)
    part = batch(plain, "a cat", LONG)
    for wanted, found in zip(*(gradients(each, part).items() for each in (plain, frugal)), strict=True):
        assert wanted[0] == found[0]
        torch.testing.assert_close(found[1], wanted[1])


def test_channels_last_changes_no_more_than_rounding(tiny_pipelines: Path) -> None:
    model = build(tiny_pipelines / "sdxl")
    part = batch(model, "a cat", LONG)
    assert not model.unet.conv_in.weight.is_contiguous()
    found = gradients(model, part)
    model.unet.to(memory_format=torch.contiguous_format)
    model.vae.to(memory_format=torch.contiguous_format)
    plain = gradients(model, part)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_training_goes_on_exactly_in_its_order_of_memory(tiny_pipelines: Path, tmp_path: Path,
                                                           optimizer: Literal["adamw", "adamw8bit"]) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="an optional library")

    def begin(folder: Path) -> tuple[Diffusion, Any, Checkpoint]:
        config = Train(lr=1e-3, optimizer=optimizer)
        model = build(tiny_pipelines / "sd1", train_text_encoder=False, optimizer=optimizer)
        adam = open_optimizer(model, config)
        return model, adam, Checkpoint(folder, open_accelerator("no", "cpu"), model, adam, EMA(model, 0.9))

    def step(model: Diffusion, optimizer: Any, *captions: str) -> None:
        model(batch(model, *captions)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, adam, checkpoint = begin(tmp_path)
    assert model.unet.conv_in.weight.is_contiguous() == (optimizer == "adamw8bit")
    step(model, adam, "a cat")
    checkpoint.save(Progress(step=1))
    step(model, adam, "a dog")
    again, adam, checkpoint = begin(tmp_path)
    assert checkpoint.load().step == 1
    step(again, adam, "a dog")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.full
def test_a_compiled_unet_gives_the_same_and_keeps_its_names(tmp_path: Path) -> None:
    small = unet((8, 8), 24, layers_per_block=1)  # of any larger one, the compiler's minutes are many
    stirred(sd(text_config(24, 1), small, vae((8, 8)))).save_pretrained(tmp_path)
    plain, compiled = (build(tmp_path, compile=each) for each in (False, True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    part = batch(plain, "a cat", LONG)
    wanted, found = gradients(plain, part), gradients(compiled, part)
    assert list(wanted) == list(found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


def inpainting(pipe: Any) -> None:
    pipe.unet = UNet2DConditionModel(in_channels=9, block_out_channels=(8, 8), norm_num_groups=8,
                                     down_block_types=("DownBlock2D", CROSS_DOWN),
                                     up_block_types=(CROSS_UP, "UpBlock2D"), cross_attention_dim=8)


def normalised_latents(pipe: Any) -> None:
    pipe.vae = AutoencoderKL(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)


def predicting_the_sample(pipe: Any) -> None:
    pipe.scheduler.register_to_config(prediction_type="sample")


def another_noise(pipe: Any) -> None:
    pipe.scheduler = EDMEulerScheduler()


@pytest.mark.parametrize(("kind", "changes", "change", "message"), [
    ("sd1", {}, inpainting, r"train\.model: .*sd1 is a StableDiffusionPipeline, whose UNet does not draw from text "
     "alone"),
    ("sdxl", {}, normalised_latents, r"train\.model: the VAE of .*sdxl has latents of its own mean"),
    ("sd1", {}, predicting_the_sample, r"train\.model: .*sd1 predicts 'sample'; known are epsilon and v_prediction"),
    ("sdxl", {}, another_noise, r"train\.model: .*sdxl has a EDMEulerScheduler, whose noise is not that"),
    ("sd1", {"resolution": 60}, None, r"train\.resolution: 60 is not a multiple of 32, .*: try 64"),
    ("sdxl", {"resolution": 8}, None, r"train\.resolution: 8 is not a multiple of 16, .*: try 16"),
    ("sdxl", {"resolution": 64, "buckets": Buckets(step=24)}, None,
     r"train\.buckets\.step: 24 is not a multiple of 16, .*: try 32"),
    ("sd1", {"prediction_type": "v_prediction"}, None, r"train\.prediction_type: v_prediction is asked of .*sd1, which "
     "predicts epsilon"),
    ("sd2", {"prediction_type": "epsilon"}, None, "predicts v_prediction"),
    ("sd1", {"zero_terminal_snr": True}, None, r"train\.zero_terminal_snr: .*sd1 predicts epsilon, which says nothing"),
    ("sd1", {"lora": Lora(unet=["to_q", "to_kk"])}, None, r"train\.lora\.unet: UNet2DConditionModel has no layers "
     "to_kk: name"),
    ("sd1", {"lora": Lora(unet=[])}, None, r"train\.lora\.unet: UNet2DConditionModel has no layers of no name"),
    ("sdxl", {"lora": Lora(text_encoder=["k"])}, None, r"train\.lora\.text_encoder: CLIPTextModel has no layers k: "),
    ("sd1", {"lora": Lora(text_encoder=["layer_norm1"])}, None, r"train\.lora\.text_encoder: CLIPTextModel takes no "
     "adapters at layer_norm1: name linear"),
])
def test_what_cannot_be_trained_is_one_clear_line(tiny_pipelines: Path, kind: str, changes: dict[str, Any],
                                                  change: Callable[[Any], None] | None, message: str) -> None:
    config = Train(model=str(tiny_pipelines / kind), **{"resolution": SIDE, **changes})
    pipe = load_pipeline(config, "train", "cpu")
    if change:
        change(pipe)
    with pytest.raises(UserError, match=message) as error:
        Diffusion(pipe, config)
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_predicts_may_be_named(tiny_pipelines: Path) -> None:
    model = build(tiny_pipelines / "sd2", prediction_type="v_prediction", zero_terminal_snr=True)
    assert model.levels.prediction_type == "v_prediction" and model.levels.alphas_cumprod[-1] == 0
