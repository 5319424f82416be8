"""The drawn world: shards as the web's, alt-text with fixed shares, checkpoints that the real libraries open."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from recap.clip_bpe import clip_tokenizer
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import read_shard
from recap.world.draw import draw
from recap.world.init import init
from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, draw_scene, render
from recap.world.words import ALT_SHARES, alt_text, describe, prompts


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def samples(*shards: Path) -> list[Sample]:
    return [sample for shard in shards for sample in read_shard(str(shard), [])]


# --- shards --------------------------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    draw(tmp_path / "a", num_images=70, size=32, seed=3, num_eval=5)
    subprocess.run([sys.executable, "-c", "import sys; from pathlib import Path; from recap.world.draw import draw; "
                    "draw(Path(sys.argv[1]), 70, 32, 3, 5)", str(tmp_path / "b")], check=True, capture_output=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert list(files(tmp_path / "a")) == [
        "done.json", "eval/00000.tar", "eval/00000_stats.json", "prompts.txt",
        "train/00000.tar", "train/00000_stats.json", "train/00001.tar", "train/00001_stats.json"]


def test_another_seed_gives_another_world(tmp_path: Path) -> None:
    draw(tmp_path / "a", num_images=4, size=32, seed=0, num_eval=4)
    draw(tmp_path / "b", num_images=4, size=32, seed=1, num_eval=4)
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert not {name for name in a if name.endswith((".tar", ".txt")) and a[name] == b[name]}
    train, held_out = (samples(tmp_path / "a" / split / "00000.tar") for split in ("train", "eval"))
    assert not {s.image_bytes for s in train} & {s.image_bytes for s in held_out}


def test_a_larger_drawing_begins_as_a_smaller_one(tmp_path: Path) -> None:
    draw(tmp_path / "a", num_images=3, size=32, seed=0, num_eval=1)
    draw(tmp_path / "b", num_images=9, size=32, seed=0, num_eval=1)
    assert samples(tmp_path / "a/train/00000.tar") == samples(tmp_path / "b/train/00000.tar")[:3]


def test_what_is_there_stays_and_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, num_images=3, size=32, seed=0, num_eval=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    draw(tmp_path, num_images=3, size=32, seed=0, num_eval=1)
    assert "there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(UserError, match="another size"):
        draw(tmp_path, num_images=3, size=64, seed=0, num_eval=1)


def test_a_killed_drawing_is_drawn_again(tmp_path: Path) -> None:
    draw(tmp_path / "whole", num_images=70, size=32, seed=0, num_eval=2)
    draw(tmp_path / "killed", num_images=70, size=32, seed=0, num_eval=2)
    (tmp_path / "killed/done.json").unlink()
    (tmp_path / "killed/train/00001.tar").unlink()
    (tmp_path / "killed/train/.00001.tar.tmp").write_bytes(b"half a tar")
    draw(tmp_path / "killed", num_images=70, size=32, seed=0, num_eval=2)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("settings", [{"num_images": 0}, {"num_eval": 0}, {"size": 8}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(UserError):
        draw(tmp_path, **settings)


def test_shards_are_as_img2dataset_writes_them(world_shards: Path) -> None:
    found = samples(world_shards / "train/00000.tar")
    assert [sample.key for sample in found] == [f"00000{index:04d}" for index in range(48)]
    for sample in found:
        assert list(sample.members) == ["png", "txt", "json", "exact.txt"]
        assert sample.check("required").size == (64, 64)
        assert sample.metadata["status"] == "success"
        assert sample.metadata["key"] == sample.key
        assert sample.metadata["caption"] == sample.caption("alt")
        assert sample.caption("exact")
    stats = json.loads((world_shards / "train/00000_stats.json").read_text())
    assert stats["count"] == stats["successes"] == 48


def test_webdataset_and_datasets_read_the_shards(world_shards: Path, tmp_path: Path) -> None:
    import datasets
    shard = world_shards / "train/00000.tar"
    ours = samples(shard)
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in ours]
    assert [sample["exact.txt"] for sample in theirs] == [sample.members["exact.txt"] for sample in ours]
    rows = datasets.load_dataset("webdataset", data_files=str(shard), split="train", cache_dir=str(tmp_path))
    assert [row["txt"] for row in rows] == [sample.caption("alt") for sample in ours]
    assert rows[0]["png"].size == (64, 64)


def test_boxes_hold_the_objects_colours(world_shards: Path) -> None:
    for sample in samples(world_shards / "train/00000.tar"):
        pixels = np.asarray(sample.image()).astype(int)
        for thing in sample.metadata["scene"]["objects"]:
            left, top, right, bottom = thing["box"]
            inside = np.abs(pixels[top:bottom, left:right] - COLOURS[thing["colour"]]).max(axis=-1) < 3
            assert inside.mean() > 0.15, (sample.key, thing)


def test_every_kind_is_drawn_inside_the_image_and_differs_from_every_background() -> None:
    for kind in KINDS:
        for colour in COLOURS:
            for background, empty in BACKGROUNDS.items():
                scene = Scene(background, (Shape(kind, colour, "small", "top left", 0.25, 0.25),))
                pixels = np.asarray(render(scene, 32)).astype(int)
                drawn = np.abs(pixels - empty).max(axis=-1) > 30
                assert 8 < drawn.sum() < 80
                assert not drawn[16:].any()
                assert not drawn[:, 16:].any()


# --- words ---------------------------------------------------------------------------------------------------------


def test_alt_text_keeps_its_shares_and_says_what_its_kind_promises() -> None:
    kinds: Counter[str] = Counter()
    for index in range(3000):
        rng = Random(index)
        scene = draw_scene(rng)
        kind, text = alt_text(scene, rng)
        kinds[kind] += 1
        words = set(text.lower().replace("-", " ").split())
        shown = {s.kind for s in scene.shapes} | {s.colour for s in scene.shapes} | {scene.background}
        world = {*KINDS, *COLOURS, *BACKGROUNDS}
        match kind:
            case "nothing":
                assert not words & world, text
            case "one fact":
                assert words & shown, text
            case "false":
                assert words & world, text
                assert not words & shown or "background" in words, text
            case "whole":
                assert all(shape.name in text for shape in scene.shapes)
    assert {kind: pytest.approx(count / 3000, abs=0.03) for kind, count in kinds.items()} == ALT_SHARES


def test_exact_descriptions_are_whole_and_one_to_three_sentences() -> None:
    for index in range(500):
        rng = Random(index)
        scene = draw_scene(rng)
        text = describe(scene, rng)
        assert 1 <= text.count(".") <= 3
        assert text.endswith(".")
        assert scene.background in text
        for shape in scene.shapes:
            assert f"{shape.size} {shape.name}" in text.lower()
            assert shape.place in text or "very middle" in text


def test_prompts_are_short_and_dense_and_differ(world_shards: Path) -> None:
    lines = (world_shards / "prompts.txt").read_text().splitlines()
    lengths = [len(clip_tokenizer()(line, add_special_tokens=False, verbose=False)["input_ids"]) for line in lines]
    assert len(set(lines)) == len(lines) >= 24
    assert sum(length < 12 for length in lengths) >= 10
    assert sum(length > 75 for length in lengths) >= 10
    assert prompts(Random("0/prompts"), len(lines)) == lines


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_are_small_and_safetensors_only(world_models: Path) -> None:
    found = files(world_models)
    assert sum(map(len, found.values())) < 40e6
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]


def test_checkpoints_come_out_equal_and_are_not_written_twice(world_models: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    init(tmp_path, size=64, seed=0)
    assert files(tmp_path) == files(world_models)
    capsys.readouterr()
    init(world_models, size=64, seed=0)
    assert "there already" in capsys.readouterr().err
    with pytest.raises(UserError, match="another seed"):
        init(world_models, size=64, seed=1)
    with pytest.raises(UserError, match="multiple of 16"):
        init(tmp_path / "odd", size=50, seed=0)


def test_blip2_has_the_token_ids_of_the_hubs(world_models: Path) -> None:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor, GPT2Tokenizer
    processor = Blip2Processor.from_pretrained(world_models / "blip2")
    model, loading = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2", output_loading_info=True)
    assert not any(loading.values())
    tokenizer = processor.tokenizer
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)
    assert model.config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")
    newline = model.config.text_config.eos_token_id
    assert tokenizer("\n")["input_ids"] == [2, newline]
    assert newline == model.generation_config.eos_token_id != 2
    ids = processor(images=Image.new("RGB", (80, 50)), text="A red circle")["input_ids"][0]
    assert ids[:9] == [model.config.image_token_index] * 8 + [2]
    assert model.config.text_config.max_position_embeddings >= 640
    for text in ("Ünïcödé 漢字 🎉 a\nb", "  two  spaces ", "don't, 3.5 % \x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_untrained_blip2_says_something_that_depends_on_the_image(world_models: Path) -> None:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor
    processor = Blip2Processor.from_pretrained(world_models / "blip2")
    model = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2").eval()
    images = [render(draw_scene(Random(index)), 64) for index in range(6)]
    inputs = processor(images=images, text=["A rich description:"] * 6, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    captions = processor.batch_decode(ids, skip_special_tokens=True)
    assert all(caption.strip() for caption in captions)
    assert len(set(captions)) > 1


def test_stock_diffusers_draws_with_the_pipeline(world_models: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(world_models / "stable-diffusion", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    assert pipe("a red circle", num_inference_steps=2, generator=generator).images[0].size == (64, 64)
    assert pipe.vae_scale_factor == 4
    assert pipe.tokenizer("don't, Café 🎉")["input_ids"] == clip_tokenizer()("don't, Café 🎉")["input_ids"]
    assert not DDIMScheduler.from_config(pipe.scheduler.config).config.clip_sample


def test_detr_clip_and_features_open_in_their_libraries(world_models: Path) -> None:
    import open_clip
    import timm
    from transformers import AutoImageProcessor, DetrForObjectDetection
    image = Image.new("RGB", (90, 60), "red")
    processor = AutoImageProcessor.from_pretrained(world_models / "detr")
    detr = DetrForObjectDetection.from_pretrained(world_models / "detr").eval()
    assert detr(**processor(images=[image], return_tensors="pt")).logits.shape == (1, 12, 49)
    assert detr.config.id2label[0] == "red circle"

    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{world_models / 'clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{world_models / 'clip'}")(["a red circle"])
    assert clip.encode_image(preprocess(image)[None]).shape == clip.encode_text(tokens).shape == (1, 32)
    assert tokens[0, :5].tolist() == [49406, 320, 736, 7117, 49407]

    network = timm.create_model(f"local-dir:{world_models / 'features'}", pretrained=True, num_classes=0).eval()
    features = network(torch.rand(3, 3, 64, 64))
    assert features.shape == (3, 64)
    assert features.std(0).mean() > 0.01


def test_the_command_line_draws(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from recap.world.cli import app
    result = CliRunner().invoke(app, ["draw", str(tmp_path), "--num-images", "3", "--num-eval", "2", "--size", "32"])
    assert result.exit_code == 0, result.output
    assert len(samples(tmp_path / "train/00000.tar")) == 3
