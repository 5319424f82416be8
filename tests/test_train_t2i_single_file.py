"""The single file: read back by diffusers and open_clip it is the same model, and real models get the published names.

What is not tested: AUTOMATIC1111, ComfyUI and kohya's scripts themselves, which know the real models' sizes only.
"""

import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig
from pipelines import CROSS_DOWN, CROSS_UP, models, sd, sd1, sd2, sdxl, stirred, text_config, unet, vae, xl
from safetensors import safe_open
from safetensors.torch import load_file

from recap.clip_bpe import VOCAB_SIZE, clip_tokenizer
from recap.errors import UserError
from train_t2i.single_file import original_tensors, write_single_file

UNET = "model.diffusion_model"
MAKERS: dict[str, Callable[[], Any]] = {"1.x": sd1, "2.x": sd2, "XL": sdxl}


@pytest.fixture(scope="module", params=["world", *MAKERS])
def pipe(request: pytest.FixtureRequest) -> Any:
    if request.param == "world":
        folder = request.getfixturevalue("world_models") / "stable-diffusion-0"
        return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(dtype=torch.float32)
    return stirred(MAKERS[request.param]())


@pytest.fixture(scope="module")
def one() -> Any:
    return stirred(sd1())


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe("a red circle", num_inference_steps=2, height=32, width=32, output_type="np",
                                 generator=torch.Generator().manual_seed(3)).images)


# --- reading back --------------------------------------------------------------------------------------------------


def test_diffusers_reads_every_weight_back_and_draws_the_same_picture(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_single_file(pipe, file)
    pipe.save_pretrained(tmp_path / "folder")
    for weights in (tmp_path / "folder").glob("*/*.safetensors"):
        weights.unlink()  # what is read is the single file
    back = type(pipe).from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True,
                                       torch_dtype=torch.float32)
    assert models(back).keys() == models(pipe).keys()
    for name, part in models(pipe).items():
        read = models(back)[name].state_dict()
        assert read.keys() == part.state_dict().keys()
        assert all(torch.equal(read[key], value) for key, value in part.state_dict().items())
    assert torch.equal(draw(back), draw(pipe))
    assert draw(pipe).std() > 0


def test_open_clip_reads_the_second_text_encoder_and_embeds_the_same() -> None:
    pipe = stirred(sdxl())
    start = "conditioner.embedders.1.model."
    tensors = {name.removeprefix(start): value for name, value in original_tensors(pipe).items()
               if name.startswith(start)}
    model = open_clip.CLIP(24, {"layers": 1, "width": 8, "head_width": 4, "image_size": 8, "patch_size": 8},
                           {"layers": 3, "width": 32, "heads": 4, "vocab_size": VOCAB_SIZE, "context_length": 77})
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.startswith("visual.") for name in missing)
    ids = clip_tokenizer()(["a red circle", "two dogs"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), pipe.text_encoder_2(ids).text_embeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_written_in_the_dtype_that_is_asked_for(one: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    write_single_file(one, tmp_path / "model.safetensors", dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    ids = tensors.pop("cond_stage_model.transformer.text_model.embeddings.position_ids")
    assert {value.dtype for value in tensors.values()} == {dtype}
    assert torch.equal(ids, torch.arange(77)[None])
    assert torch.equal(tensors[f"{UNET}.out.2.weight"], one.unet.conv_out.weight.to(dtype))
    assert one.unet.dtype == torch.float32


# --- the published names -------------------------------------------------------------------------------------------


def counts(pipe: Any) -> Counter[str]:
    starts = (UNET, "first_stage_model", "cond_stage_model", "conditioner.embedders.0", "conditioner.embedders.1")
    return Counter(next(start for start in starts if name.startswith(start)) for name in original_tensors(pipe))


def test_stable_diffusion_1_5_has_the_names_of_the_published_file() -> None:
    with torch.device("meta"):
        pipe = sd(text_config(768, 12, heads=12), unet((320, 640, 1280, 1280), 768, norm_num_groups=32),
                  vae((128, 256, 512, 512), 32))
    assert counts(pipe) == {UNET: 686, "first_stage_model": 248, "cond_stage_model": 196 + 1}  # 1: position_ids
    shapes = {name: tuple(value.shape) for name, value in original_tensors(pipe).items()}
    assert shapes.items() >= {
        f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
        f"{UNET}.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{UNET}.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        f"{UNET}.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        f"{UNET}.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}.items()


def test_stable_diffusion_2_1_has_those_of_the_published_file_but_for_the_layer_that_nothing_reads() -> None:
    with torch.device("meta"):
        pipe = sd(text_config(1024, 23, "gelu", heads=16), unet(
            (320, 640, 1280, 1280), 1024, norm_num_groups=32, use_linear_projection=True,
            attention_head_dim=[5, 10, 20, 20]), vae((128, 256, 512, 512), 32), prediction_type="v_prediction")
    # 24 layers of 12 tensors, text_projection and logit_scale are 294 there.
    assert counts(pipe) == {UNET: 686, "first_stage_model": 248, "cond_stage_model": 294 - 12 - 2}
    shapes = {name: tuple(value.shape) for name, value in original_tensors(pipe).items()}
    assert shapes[f"{UNET}.middle_block.1.proj_in.weight"] == (1280, 1280)
    assert shapes["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"] == (3072, 1024)
    assert shapes["cond_stage_model.model.positional_embedding"] == (77, 1024)


def test_stable_diffusion_xl_has_all_names_of_the_published_file() -> None:
    with torch.device("meta"):
        pipe = xl(text_config(768, 12, heads=12), text_config(1280, 32, "gelu", 20, 1280), vae(
            (128, 256, 512, 512), 32), unet(
            (320, 640, 1280), 2048, norm_num_groups=32, use_linear_projection=True, attention_head_dim=[5, 10, 20],
            addition_embed_type="text_time", addition_time_embed_dim=256, transformer_layers_per_block=[1, 2, 10],
            projection_class_embeddings_input_dim=2816, down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
            up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D")))
    assert counts(pipe) == {UNET: 1680, "first_stage_model": 248, "conditioner.embedders.0": 197,
                            "conditioner.embedders.1": 390}
    names = original_tensors(pipe).keys()
    assert names >= {f"{UNET}.label_emb.0.0.weight", f"{UNET}.output_blocks.2.2.conv.weight",
                     f"{UNET}.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
                     "conditioner.embedders.1.model.text_projection", "conditioner.embedders.1.model.logit_scale"}


# --- what the file says of itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "wanted"), [
    (sd1, ("stable-diffusion-v1", "epsilon")), (sd2, ("stable-diffusion-v2-768-v", "v")),
    (sdxl, ("stable-diffusion-xl-v1-base", "epsilon"))])
def test_the_header_says_what_it_is(make: Callable[[], Any], wanted: tuple[str, str], tmp_path: Path) -> None:
    write_single_file(make(), tmp_path / "rich captions.safetensors")
    with safe_open(tmp_path / "rich captions.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["modelspec.architecture"], said["modelspec.prediction_type"]) == wanted
    assert (said["format"], said["modelspec.sai_model_spec"], said["modelspec.title"], said["modelspec.resolution"]) \
        == ("pt", "1.0.0", "rich captions", "32x32")


@pytest.mark.parametrize(("scheduler", "wanted"), [
    ({}, set()), ({"rescale_betas_zero_snr": True}, set()), ({"prediction_type": "v_prediction"}, {"v_pred"}),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"})])
def test_an_xl_model_that_predicts_v_is_marked_as_such(scheduler: dict[str, Any], wanted: set[str],
                                                       tmp_path: Path) -> None:
    write_single_file(sdxl(**scheduler), tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    marks = {name for name in tensors if "." not in name}
    assert marks == wanted
    assert all(tensors[name].shape == (0,) for name in marks)


# --- what cannot be written ----------------------------------------------------------------------------------------


def without_text(pipe: Any) -> Any:
    pipe.text_encoder = None
    return pipe


def with_adapter(pipe: Any) -> Any:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return pipe


def diverged(pipe: Any) -> Any:
    pipe.unet.conv_out.weight.data[0, 0, 0, 0] = 1e6
    return pipe


@pytest.mark.parametrize(("change", "message"), [
    (lambda pipe: StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
     "StableDiffusionImg2ImgPipeline: only Stable Diffusion 1.x, 2.x and XL"),
    (without_text, "without text_encoder"),
    (with_adapter, r"unet: the original layout has no name for .*: give .* adapters fused"),
    (diverged, r"model\.diffusion_model\.out\.2\.weight has values that are not finite in torch\.float16: write")])
def test_what_the_layout_cannot_hold_is_one_clear_line(change: Callable[[Any], Any], message: str,
                                                       tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        write_single_file(change(sd1()), tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_a_prediction_type_that_no_reader_knows_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="scheduler: prediction_type 'sample'"):
        original_tensors(sd(text_config(24, 1), unet((16, 16), 24), vae((16,)), prediction_type="sample"))


def test_a_full_disk_is_named_and_the_old_file_stays(one: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"no space left at .*: free some, and run the same command again"):
            write_single_file(one, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
