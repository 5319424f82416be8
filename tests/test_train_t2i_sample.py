"""Drawing: a picture depends on prompt and seed alone, and is the stock pipeline's own where that can draw it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file

from recap.config import Model
from recap.errors import UserError
from train_t2i import export
from train_t2i.config import Lora, Train
from train_t2i.sample import draw, image_seed, load_pipeline, main, num_windows, plan, prompt_embeds

LONG = "A red circle lies to the left of a small blue ring, under a grey sky. " * 9
KINDS = ["sd1", "sd2", "sdxl"]
FEW: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def pipes(tiny_pipelines: Path) -> dict[str, Any]:
    return {kind: load_pipeline(Model(model=str(tiny_pipelines / kind)), "train", "cpu") for kind in KINDS}


@pytest.fixture(params=KINDS)
def pipe(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Any:
    return pipes[request.param]


def stock(pipe: Any, folder: Path, *arguments: Any, seed: int, **options: Any) -> bytes:
    """Drawn by a pipeline that this project has not opened."""
    kind = StableDiffusionXLPipeline if isinstance(pipe, StableDiffusionXLPipeline) else StableDiffusionPipeline
    theirs: Any = kind.from_pretrained(folder).to(dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    found = theirs(*arguments, generator=torch.Generator().manual_seed(seed), **options, **FEW).images[0]
    return bytes(found.tobytes())


def difference(one: Image.Image, other: Image.Image) -> int:
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


@pytest.mark.parametrize("prompt", ["a cat", ""])
def test_a_stock_pipeline_draws_the_same_from_a_plain_prompt(pipe: Any, tiny_pipelines: Path, prompt: str) -> None:
    [ours] = draw(pipe, [prompt], [7], **FEW)
    assert ours.tobytes() == stock(pipe, Path(pipe.name_or_path), prompt, seed=7)


def test_a_stock_pipeline_draws_the_same_from_the_embeddings_of_a_long_prompt(pipe: Any) -> None:
    assert num_windows(pipe, LONG) == 3
    [ours] = draw(pipe, [LONG], [7], **FEW)
    assert ours.tobytes() == stock(pipe, Path(pipe.name_or_path), seed=7, **prompt_embeds(pipe, [LONG]))
    [other] = draw(pipe, [LONG.replace("grey sky. ", "grey sky. ", 8)[:-2] + " of stars."], [7], **FEW)
    assert difference(ours, other) > 0  # the last words count


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipe: Any) -> None:
    prompts = ["a cat", "a dog", "a cow"]
    together = draw(pipe, prompts, [image_seed(0, place) for place in range(3)], **FEW)
    for place, prompt in enumerate(prompts):
        [alone] = draw(pipe, [prompt], [image_seed(0, place)], **FEW)
        assert difference(alone, together[place]) <= 1  # of 255: sums of another batch size may round otherwise
    assert difference(*draw(pipe, ["a cat"] * 2, [1, 2], **FEW)) > 30


def test_guidance_of_one_is_none(pipe: Any) -> None:
    options = {**FEW, "guidance_scale": 1.0}
    [ours] = draw(pipe, ["a cat"], [7], **options)
    [other] = pipe("a cat", generator=[torch.Generator().manual_seed(7)], **options).images
    assert ours.tobytes() == other.tobytes()


def test_prompts_are_batched_by_windows_and_all_are_drawn(pipe: Any) -> None:
    prompts = ["a cat", LONG, "a dog", "a cow", LONG + "!"]
    assert plan(pipe, prompts, 2) == [[0, 2], [3], [1, 4]]
    with pytest.raises(ValueError, match=r"group them with plan\(\)"):
        prompt_embeds(pipe, ["a cat", LONG])


def test_no_two_images_of_any_run_are_drawn_from_the_same_noise() -> None:
    noises = {tuple(torch.randn(4, generator=torch.Generator().manual_seed(image_seed(seed, index))).tolist())
              for seed in range(10) for index in range(200)}
    assert len(noises) == 2000


# --- what can't be opened --------------------------------------------------------------------------------------------


def test_what_is_no_such_pipeline_is_one_clear_line(tiny_pipelines: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_pipelines / "sdxl" / "model_index.json").read_text())
    for name, changes in (("painter", {"_class_name": "FluxPipeline"}), ("mute", {"text_encoder": [None, None]}),
                          ("weightless", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({**index, **changes}))
    del index["text_encoder_2"], index["tokenizer_2"]
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "empty").mkdir()
    for name, message in (("painter", "is a FluxPipeline: name Stable Diffusion 1.x, 2.x or XL"),
                          ("mute", "has no text_encoder: name a folder with all parts"),
                          ("half", "has no text_encoder_2 and no tokenizer_2: name"), ("weightless", "cannot load"),
                          ("empty", "is no diffusers folder"), ("none", "no folder at")):
        with pytest.raises(UserError, match=rf"train\.model: .*{message}") as error:
            load_pipeline(Model(model=str(tmp_path / name)), "train", "cpu")
        assert "\n" not in str(error.value)


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "train_t2i.sample", *arguments], cwd=cwd, capture_output=True,
                          text=True, timeout=300)


def test_the_command_draws_prompts_of_any_length(tiny_pipelines: Path, pipes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n" + "赤い丸 " * 30 + "\n", encoding="utf-8")
    ran = command(str(tiny_pipelines / "sd1"), LONG, "prompts.txt", "--out", "new/pictures", "--num", "2", "--seed",
                  "5", "--steps", "2", "--size", "64", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert lines[0] == "00000-0.png  3 windows  A red circle lies to the left of a small blue ring,"
    assert lines[2] == "00001-0.png  1 window   a cat"
    assert lines[-1] == "6 pictures in new/pictures"
    assert all(len(line) + sum(letter in "赤い丸" for letter in line) <= 80 for line in lines)
    found = {path.name: Image.open(path) for path in (tmp_path / "new" / "pictures").iterdir()}
    assert sorted(found) == [f"{prompt:05d}-{place}.png" for prompt in range(3) for place in range(2)]
    [ours] = draw(pipes["sd1"], [LONG], [6], num_inference_steps=2, guidance_scale=7.5, height=64, width=64)
    assert found["00000-1.png"].tobytes() == ours.tobytes()


def test_what_the_command_cannot_do_is_one_line_and_status_2(tmp_path: Path) -> None:
    ran = command(str(tmp_path / "none"), "a cat", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"recap: sample.model: no folder at {tmp_path}/none: check the path, or give a hub id\n"


def test_the_command_takes_lora_weights(tiny_pipelines: Path, tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / "sdxl"), resolution=32, lora=Lora(rank=2, alpha=6))
    pipe = export.averaged_pipeline(config, export_averages(config))
    export.write(tmp_path, pipe, config, {"captions": {"short": 1}, "steps": 1, "images": 1, "seed": 0})
    options: dict[str, Any] = {"steps": 2, "size": 32, "device": "cpu", "num": 1, "seed": 0, "guidance": 5.0,
                               "revision": "main"}
    main(config.model, ["a cat"], tmp_path / "with", lora=tmp_path / "lora", **options)
    main(str(tmp_path / "pipeline"), ["a cat"], tmp_path / "merged", lora=None, **options)
    main(config.model, ["a cat"], tmp_path / "base", lora=None, **options)
    adapted, merged, base = (Image.open(tmp_path / name / "00000-0.png") for name in ("with", "merged", "base"))
    assert difference(adapted, merged) <= 1 and difference(base, merged) > 5


def export_averages(config: Train) -> dict[str, torch.Tensor]:
    from train_t2i.ema import EMA
    from train_t2i.model import Diffusion
    generator = torch.Generator().manual_seed(0)
    shadow = EMA(Diffusion(load_pipeline(config, "train", "cpu"), config), 0.9).whole()
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in shadow.items()}


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompts": ["none.txt"]}, r"no prompts in none\.txt \(.*No such file.*\): give a text file"),
    ({"prompts": ["empty.txt"]}, r"no prompts in empty\.txt, which is empty"),
    ({"prompts": ["latin.txt"]}, r"no prompts in latin\.txt \(.*utf-8.*\): give a text file"),
    ({"size": 30}, r"--size 30 is not a multiple of 8, which a pipeline asks for: try 32"),
    ({"device": "abacus"}, r"no device abacus here: try --device cpu"),
    ({"device": "cuda:77"}, r"no device cuda:77 here: try --device cpu"),
    ({"lora": Path("none")}, r"no LoRA weights at none: name a folder"),
    ({"lora": Path("other")}, r"the LoRA weights at other are not of this model \(.*\): name its own"),
    ({"lora": Path("foreign")}, r"the LoRA weights at foreign are not of this model \(nothing in them .*\): name its"),
    ({"out": Path("empty.txt") / "pictures"}, r"cannot write to empty\.txt/pictures \(.*\): name another folder"),
])
def test_what_is_asked_wrongly_is_one_clear_line(tiny_pipelines: Path, tmp_path: Path, changes: dict[str, Any],
                                                 message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("foreign").mkdir()
    save_file({"transformer.to_q.lora_A.weight": torch.ones(2, 2), "transformer.to_q.lora_B.weight": torch.ones(2, 2)},
              "foreign/pytorch_lora_weights.safetensors")
    if changes.get("lora") == Path("other"):
        config = Train(model=str(tiny_pipelines / "sdxl"), resolution=32, lora=Lora(rank=2))
        export.write(tmp_path, export.averaged_pipeline(config, export_averages(config)), config,
                     {"captions": {"short": 1}, "steps": 1, "images": 1, "seed": 0})
        Path("lora").rename("other")
    options: dict[str, Any] = {"prompts": ["a cat"], "out": Path("out"), "steps": 1, "size": 32, "device": "cpu",
                               "num": 1, "seed": 0, "guidance": 5.0, "revision": "main", "lora": None}
    with pytest.raises(UserError, match=message) as error:
        main(str(tiny_pipelines / "sd1"), **{**options, **changes})
    assert "\n" not in str(error.value)
