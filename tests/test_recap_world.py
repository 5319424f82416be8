"""The drawn world: shards as the web's, alt-text with fixed shares, checkpoints that the real libraries open."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image, ImageChops

from recap.chunks import split
from recap.clip_bpe import clip_tokenizer
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import read_shard
from recap.storage import temporary
from recap.world.draw import draw
from recap.world.facts import compare, read
from recap.world.init import init_untrained
from recap.world.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NUM_SHAPES,
    PATTERNS,
    PLACES,
    Background,
    Scene,
    Shape,
    draw_scene,
    render,
)
from recap.world.words import ALT_SHARES, alt_text, describe, reference_rich

SMALL = {"num_train": 3, "num_tuning": 1, "num_validation": 0, "num_evaluation": 2, "num_reference": 1}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def samples(*shards: Path) -> list[Sample]:
    return [sample for shard in shards for sample in read_shard(str(shard), [])]


# --- shards --------------------------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    draw(tmp_path / "a", 70, 2, 0, 5, 3, 1, seed=3, shard_size=64)
    subprocess.run([sys.executable, "-c", "import sys; from pathlib import Path; from recap.world.draw import draw; "
                    "draw(Path(sys.argv[1]), 70, 2, 0, 5, 3, 1, seed=3, shard_size=64)", str(tmp_path / "b")],
                   check=True, capture_output=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert [name for name in files(tmp_path / "a") if not name.startswith("prompts/")] == [
        "base/00000.tar", "base/00000_stats.json", "done.json", "evaluation/00000.tar", "evaluation/00000_stats.json",
        "reference/00000.tar", "reference/00000_stats.json", "train/00000.tar", "train/00000_stats.json",
        "train/00001.tar", "train/00001_stats.json", "tuning/00000.tar", "tuning/00000_stats.json"]


def test_another_seed_gives_another_world_and_no_split_shares_a_picture(tmp_path: Path) -> None:
    draw(tmp_path / "a", 9, 9, 9, 9, 9, seed=0)
    draw(tmp_path / "b", 9, 9, 9, 9, 9, seed=1)
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert not {name for name in a if name.endswith((".tar", ".jsonl")) and a[name] == b[name]}
    pictures = [sample.image_bytes for shard in tmp_path.glob("a/*/*.tar") for sample in samples(shard)]
    assert len(set(pictures)) == len(pictures) == 45


def test_a_larger_drawing_begins_as_a_smaller_one(tmp_path: Path) -> None:
    draw(tmp_path / "a", **SMALL)
    draw(tmp_path / "b", **SMALL | {"num_train": 9})
    assert samples(tmp_path / "a/train/00000.tar") == samples(tmp_path / "b/train/00000.tar")[:3]


def test_what_is_there_stays_and_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    draw(tmp_path, **SMALL)
    assert "there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(UserError, match="made with size 32, not 64: delete it"):
        draw(tmp_path, **SMALL, size=64)


def test_a_killed_drawing_is_drawn_again(tmp_path: Path) -> None:
    draw(tmp_path / "whole", **SMALL, shard_size=2)
    draw(tmp_path / "killed", **SMALL, shard_size=2)
    (tmp_path / "killed/done.json").unlink()
    (tmp_path / "killed/train/00001.tar").unlink()
    temporary(str(tmp_path / "killed/train/00001.tar")).write_bytes(b"half a tar")
    assert (tmp_path / "killed/begun.json").write_bytes((tmp_path / "whole/done.json").read_bytes())
    with pytest.raises(UserError, match="made with num_train 3, not 2"):  # shards of the two would be mixed
        draw(tmp_path / "killed", **SMALL | {"num_train": 2}, shard_size=2)
    draw(tmp_path / "killed", **SMALL, shard_size=2)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("settings", [{"num_train": -1}, {"size": 16}, {"size": 256}, {"shard_size": 0}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(UserError):
        draw(tmp_path, **settings)


def test_shards_are_as_img2dataset_writes_them(world_shards: Path) -> None:
    found = samples(world_shards / "train/00000.tar")
    assert [sample.key for sample in found] == [f"00000{index:04d}" for index in range(48)]
    for sample in found:
        assert list(sample.members) == ["png", "txt", "json", "exact.txt", "clean.txt"]
        assert sample.check("required").size == (32, 32)
        assert sample.metadata["status"] == "success"
        assert sample.metadata["key"] == sample.key
        assert sample.metadata["caption"] == sample.caption("alt")
        assert sample.caption("exact")
    assert len({re.sub(r"\w+", "", sample.caption("clean") or "") for sample in found}) > 8  # not in one wording
    stats = json.loads((world_shards / "train/00000_stats.json").read_text())
    assert stats["count"] == stats["successes"] == 48


def test_references_are_in_held_out_shards_only(world_shards: Path) -> None:
    references = {"reference-short.txt", "reference-long.txt", "reference-rich.txt"}
    for name in ("train", "tuning"):
        assert all(not references & sample.members.keys() for sample in samples(world_shards / name / "00000.tar"))
    assert all(references <= sample.members.keys() for sample in samples(world_shards / "evaluation/00000.tar"))


def test_webdataset_and_datasets_read_the_shards(world_shards: Path, tmp_path: Path) -> None:
    import datasets
    shard = world_shards / "train/00000.tar"
    ours = samples(shard)
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in ours]
    assert [sample["exact.txt"] for sample in theirs] == [sample.members["exact.txt"] for sample in ours]
    rows = datasets.load_dataset("webdataset", data_files=str(shard), split="train", cache_dir=str(tmp_path))
    assert [row["txt"] for row in rows] == [sample.caption("alt") for sample in ours]
    assert rows[0]["png"].size == (32, 32)


# --- scenes --------------------------------------------------------------------------------------------------------


def test_scenes_have_one_to_six_shapes_in_their_shares_and_some_overlap() -> None:
    scenes = [draw_scene(Random(f"scene/{index}")) for index in range(2000)]
    counts = Counter(len(scene.shapes) for scene in scenes)
    assert {count: pytest.approx(n / 2000, abs=0.04) for count, n in counts.items()} == NUM_SHAPES
    assert {scene.background.pattern for scene in scenes} == set(PATTERNS)
    assert all(len({shape.place for shape in scene.shapes}) == len(scene.shapes) for scene in scenes)
    assert sum(_overlap(scene) for scene in scenes) > 200


def _overlap(scene: Scene) -> bool:
    boxes = [thing["box"] for thing in scene.metadata(64)["objects"]]
    return any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
               for index, a in enumerate(boxes) for b in boxes[index + 1:])


@pytest.mark.parametrize("side", [32, 48, 64, 128])
def test_boxes_hold_the_objects_colours(side: int) -> None:
    for index in range(40):
        scene = draw_scene(Random(index), num_shapes=1)
        thing = scene.metadata(side)["objects"][0]
        left, top, right, bottom = thing["box"]
        pixels = np.asarray(render(scene, side)).astype(int)
        inside = np.abs(pixels[top:bottom, left:right] - COLOURS[thing["colour"]]).max(axis=-1) < 3
        assert inside.mean() > 0.1, (index, thing)
        empty = render(Scene(scene.background, ()), side)
        assert ImageChops.difference(render(scene, side), empty).getbbox() == (left, top, right, bottom)


def test_every_kind_is_drawn_in_its_place_and_differs_from_every_background() -> None:
    for kind in KINDS:
        for colour in COLOURS:
            for background in (Background(name, pattern) for name in BACKGROUNDS for pattern in PATTERNS):
                scene = Scene(background, (Shape(kind, colour, "small", "top left", *PLACES["top left"]),))
                empty = np.asarray(render(Scene(background, ()), 32)).astype(int)
                drawn = np.abs(np.asarray(render(scene, 32)).astype(int) - empty).max(axis=-1) > 30
                assert 8 < drawn.sum() < 80
                assert not drawn[16:].any()
                assert not drawn[:, 16:].any()


def test_what_six_shapes_leave_to_be_false() -> None:
    """Six shapes of all kinds and all colours: what is false of them is a colour of another."""
    background = Background("grey", "plain")
    shapes = tuple(Shape(kind, colour, "small", place, *PLACES[place])
                   for kind, colour, place in zip(KINDS, COLOURS, PLACES, strict=True))
    found = {alt_text(Scene(background, shapes), Random(index)) for index in range(400)}
    assert all(compare(read(text), Scene(background, shapes).metadata(32)).wrong
               for kind, text in found if kind == "false")


# --- words ---------------------------------------------------------------------------------------------------------


def test_alt_text_keeps_its_shares_and_says_what_its_kind_promises() -> None:
    kinds: Counter[str] = Counter()
    for index in range(3000):
        rng = Random(index)
        scene = draw_scene(rng)
        kind, text = alt_text(scene, rng)
        kinds[kind] += 1
        words = set(text.lower().replace("-", " ").split())
        shown = {s.kind for s in scene.shapes} | {s.colour for s in scene.shapes} | {scene.background.colour}
        world = {*KINDS, *COLOURS, *BACKGROUNDS}
        match kind:
            case "nothing":
                assert not words & world, text
            case "one fact":
                assert words & shown, text
            case "false":
                assert words & world, text
                assert not any(shape.name in text.lower().replace("-", " ") for shape in scene.shapes)
                assert scene.background.name not in text.lower().replace("-", " ")
            case "whole":
                assert all(shape.name in text for shape in scene.shapes)
    assert {kind: pytest.approx(count / 3000, abs=0.03) for kind, count in kinds.items()} == ALT_SHARES


def test_alt_text_has_the_form_of_the_webs(shared_data: Path) -> None:
    """Figures and separators as often as real alt-text has them; shorter, and more often a file's name, as in no
    filtered collection: recap/world/README.md gives the shares.
    """
    rows = pq.read_table(shared_data / "alttext" / "web_alttext_10000.parquet").column("TEXT").to_pylist()
    lots = [Random(seed) for seed in range(3000)]
    web, ours = [text for text in rows if text], [alt_text(draw_scene(rng), rng)[1] for rng in lots]

    def share(pattern: str, texts: list[str]) -> float:
        return sum(re.search(pattern, text, re.I) is not None for text in texts) / len(texts)

    for pattern in (r"\d", r" [|–:-] "):
        assert share(pattern, ours) == pytest.approx(share(pattern, web), abs=0.1)
    file_name = r"\.(?:jpe?g|png|gif|webp)\b|^(?:img|dsc)[_\d]|https?:"
    assert share(file_name, web) < share(file_name, ours) < 0.2


def test_exact_descriptions_name_everything() -> None:
    for index in range(500):
        rng = Random(index)
        scene = draw_scene(rng)
        text = describe(scene, rng)
        assert text.endswith(".")
        assert scene.background.name in text
        for shape in scene.shapes:
            assert shape.full_name in text.lower()
            assert shape.place in text


def test_half_of_the_rich_references_are_longer_than_clip_reads_at_once() -> None:
    lots = [Random(seed) for seed in range(400)]
    lengths = [split(reference_rich(draw_scene(rng), rng), clip_tokenizer()).num_tokens for rng in lots]
    assert sum(length > 75 for length in lengths) >= 200


def test_cut_prompts_are_the_first_tokens_of_the_whole_ones(tmp_path: Path) -> None:
    draw(tmp_path, 0, 0, 0, num_evaluation=100, num_reference=0)
    sets = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in (tmp_path / "prompts/evaluation").glob("*.jsonl")}
    assert {name: len(rows) for name, rows in sets.items() if name not in ("rich-cut", "rich-whole")} == {
        "reference-short": 30, "reference-long": 30, "rich": 30, "alt-like": 10}
    long = [row for row in sets["rich"] if split(row["prompt"], clip_tokenizer()).num_tokens > 75]
    assert sets["rich-whole"] == long
    assert [row["asks"] for row in sets["rich-cut"]] == [row["prompt"] for row in long]
    assert len(long) >= 10
    for row in sets["rich-cut"]:
        whole = [token for window in split(row["asks"], clip_tokenizer()).ids for token in window]
        cut = split(row["prompt"], clip_tokenizer()).ids
        assert len(cut) == 1
        assert cut[0][:74] == whole[:74]  # the last may be the first half of a word


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_are_small_and_safetensors_only(world_models: Path) -> None:
    found = files(world_models)
    weights = {name: len(found[name]) for name in found if name.endswith(".safetensors")}
    assert weights
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]


def test_checkpoints_come_out_equal_and_are_not_written_twice(world_models: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    init_untrained(tmp_path)
    assert files(tmp_path) == files(world_models)
    capsys.readouterr()
    init_untrained(world_models)
    assert "there already" in capsys.readouterr().err
    with pytest.raises(UserError, match="made with seed 0, not 1"):
        init_untrained(world_models, seed=1)
    with pytest.raises(UserError, match="multiple of 16"):
        init_untrained(tmp_path / "odd", size=50)


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
    assert ids[:17] == [model.config.image_token_index] * 16 + [2]
    assert model.config.text_config.max_position_embeddings >= 640
    for text in ("Ünïcödé 漢字 🎉 a\nb", "  two  spaces ", "don't, 3.5 % \x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_untrained_blip2_says_something_that_depends_on_the_image(world_models: Path) -> None:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor
    processor = Blip2Processor.from_pretrained(world_models / "blip2")
    model = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2").eval()
    images = [render(draw_scene(Random(index)), 32) for index in range(6)]
    inputs = processor(images=images, text=["A rich description:"] * 6, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    captions = processor.batch_decode(ids, skip_special_tokens=True)
    assert all(caption.strip() for caption in captions)
    assert len(set(captions)) > 1


def test_stock_diffusers_draws_with_the_pipeline(world_models: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(world_models / "stable-diffusion-0", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    assert pipe("a red circle", num_inference_steps=2, generator=generator).images[0].size == (32, 32)
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
    assert detr(**processor(images=[image], return_tensors="pt")).logits.shape == (1, 10, 85)
    assert detr.config.id2label[0] == "small red circle"

    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{world_models / 'clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{world_models / 'clip'}")(["a red circle"])
    assert clip.encode_image(preprocess(image)[None]).shape == clip.encode_text(tokens).shape == (1, 48)
    assert tokens[0, :5].tolist() == [49406, 320, 736, 7117, 49407]

    network = timm.create_model(f"local-dir:{world_models / 'features'}", pretrained=True, num_classes=0).eval()
    features = network(torch.rand(3, 3, 32, 32))
    assert features.shape == (3, 64)
    assert features.std(0).mean() > 0.01


def test_the_command_line_draws(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from recap.world.cli import app
    options = [part for name, number in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(number))]
    result = CliRunner().invoke(app, ["draw", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert len(samples(tmp_path / "train/00000.tar")) == 3
