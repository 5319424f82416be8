"""Experts that tag: CLIP over a list, Recognize Anything and Tag2Text through the package `ram`.

`tests/stand_in/ram` stands in for that package, which is written for an older transformers: the same interface on
small models. The adapters, the checkpoint files and the torch that reads them are the real ones.
"""

import io
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from recap.config.stitch import ClipTags, Ram, Stitch, Tag2text
from recap.errors import UserError
from recap.experts import Expert, View, open_expert
from recap.experts.clip_tags import ClipTagsExpert
from recap.experts.settings import OUR_TAGS, read_tags
from recap.facts import Facts
from recap.sample import decode_image
from recap.shards import read_shard

STAND_IN = Path(__file__).parent / "stand_in"
BLACK = np.zeros((40, 60, 3), np.uint8)


def look(expert: Expert, *images: Image.Image) -> list[Facts]:
    return expert.look(expert.preprocess([View(image) for image in images]))


def blotches(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A picture of a few large areas, so that small models tell one from another."""
    coarse = np.random.default_rng(seed).integers(256, size=(3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def turned(upright: Image.Image) -> Image.Image:
    """The same picture as a camera held sideways stores it, decoded as recap decodes."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    return decode_image(file.getvalue())


def pairs(facts: Facts) -> dict[str, float]:
    return {tag.label: tag.score for tag in facts.tags}


# --- CLIP over a list ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(world_models: Path) -> str:
    return str(world_models / "clip")


def clip_tags(**table: Any) -> ClipTagsExpert:
    return ClipTagsExpert(Stitch(clip_tags=ClipTags(**table)), "cpu")


@pytest.fixture(scope="module")
def shapes(clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tags") / "shapes.txt"
    path.write_text("# shapes\nred circle\nblue square  # the usual one\n\ngreen star\nred circle\nyellow ring\n")
    return path


def test_scores_are_what_open_clip_gives_for_the_whole_list(clip: str, shapes: Path) -> None:
    tags = ["red circle", "blue square", "green star", "yellow ring"]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    with torch.no_grad():
        pixels = preprocess(blotches(0))[None]
        tokens = open_clip.get_tokenizer(f"local-dir:{clip}")([f"there is a {tag} here" for tag in tags])
        image = torch.nn.functional.normalize(model.eval().encode_image(pixels), dim=-1)
        text = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
        expected = (model.logit_scale.exp() * image @ text.T).softmax(-1)[0].tolist()
    facts, = look(clip_tags(model=clip, tags=str(shapes), template="there is a {} here", threshold=0.0), blotches(0))
    assert pairs(facts) == pytest.approx(dict(zip(tags, expected, strict=True)), abs=2e-4)
    assert sum(pairs(facts).values()) == pytest.approx(1, abs=3e-4)


def test_the_surest_tags_come_first_and_no_more_than_asked_for(clip: str) -> None:
    every = clip_tags(model=clip, threshold=0.0, max_tags=1000)
    facts, = look(every, blotches(1))
    scores = [tag.score for tag in facts.tags]
    assert len(scores) == len(every.tags) and scores == sorted(scores, reverse=True)
    few, = look(clip_tags(model=clip, threshold=0.0, max_tags=3), blotches(1))
    assert few.tags == facts.tags[:3]
    high, = look(clip_tags(model=clip, threshold=scores[1], max_tags=10), blotches(1))
    assert 1 <= len(high.tags) <= 2 and all(tag.score >= scores[1] for tag in high.tags)
    assert look(clip_tags(model=clip, threshold=1.0), blotches(1)) == [Facts()]


def test_an_image_gets_the_same_tags_alone_as_in_a_batch(clip: str, shapes: Path) -> None:
    expert = clip_tags(model=clip, tags=str(shapes), threshold=0.0)
    images = [blotches(2), blotches(3, 30, 90), blotches(4, 200, 50)]
    together = look(expert, *images)
    assert [pairs(facts) for facts in together] == [
        pytest.approx(pairs(look(expert, image)[0]), abs=2e-4) for image in images]
    assert pairs(together[0]) != pairs(together[1])
    assert look(expert, turned(images[2])) == look(expert, images[2])


def test_our_list_is_of_many_short_lower_case_tags_each_once(clip: str) -> None:
    tags = read_tags(ClipTags())
    written = [line for line in OUR_TAGS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert tags == written and 600 <= len(tags) <= 800
    assert all(tag == tag.lower() and len(tag) < 30 for tag in tags)
    expert = clip_tags(model=clip)
    assert expert.tags == tags
    assert expert.provenance["num_tags"] == len(tags) and expert.provenance["revision"].startswith("sha256:")


def test_another_list_is_told_by_the_provenance(clip: str, shapes: Path, tmp_path: Path) -> None:
    marked = tmp_path / "windows.txt"
    marked.write_bytes(b"\xef\xbb\xbfred circle\r\nblue square\r\n")
    assert read_tags(ClipTags(tags=str(marked))) == ["red circle", "blue square"]
    assert clip_tags(model=clip, tags=str(shapes)).provenance["list"] != \
        clip_tags(model=clip, tags=str(marked)).provenance["list"]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "has 0 tags"), (b"# dog\n\n", "has 0 tags"), (b"dog\ndog\n", "has 1 tags"), (b"\xff\xfe\x00", "in UTF-8"),
    (b"\n".join(b"%d" % number for number in range(20_001)), "has 20001 tags"), (None, "cannot read")])
def test_a_list_that_cannot_be_used_is_said_to_be_so(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tags.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"stitch\.clip_tags\.tags: .*{message}"):
        read_tags(ClipTags(tags=str(path)))


def test_what_is_wrong_with_the_table_is_said(clip: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"write \{\} where the tag stands"):
        ClipTags(template="a photo")
    (tmp_path / "long.txt").write_text("dog\n" + "cat " * 100)
    with pytest.raises(UserError, match=r"the tag 'cat cat .* tokens, and the model reads 77: shorten"):
        clip_tags(model=clip, tags=str(tmp_path / "long.txt"))
    with pytest.raises(UserError, match=r"stitch\.clip_tags\.model: no folder"):
        clip_tags(model=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"stitch\.clip_tags\.model: no open_clip_model\.safetensors"):
        clip_tags(model=str(tmp_path))


def test_real_photos_are_tagged(clip: str, shared_data: Path) -> None:
    samples = list(read_shard(str(shared_data / "photos" / "archive-00000.tar"), rejects=[]))[:3]
    images = [sample.image() for sample in samples]
    for facts in look(clip_tags(model=clip, threshold=0.0), *images):
        assert len(facts.tags) == 10 and all(0 <= tag.score <= 1 for tag in facts.tags)


# --- the package `ram` ---------------------------------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in's `ram.models`, as installed."""
    monkeypatch.syspath_prepend(STAND_IN)
    with warnings.catch_warnings():  # the package turns them off
        import ram.models
    yield ram.models
    for name in [name for name in sys.modules if name.partition(".")[0] == "ram"]:
        del sys.modules[name]


def save(path: Path, kind: Any, seed: int = 0, **options: Any) -> Path:
    """A checkpoint as the authors' training writes it, of weights that put some tags over their thresholds."""
    torch.manual_seed(seed)
    model = kind(image_size=224, **options)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=1.5)
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "config": {"vit": "swin_b"}, "epoch": 3}, path)
    return path


@pytest.fixture
def ram_path(package: Any, tmp_path: Path) -> Path:
    return save(tmp_path / "ram.pth", package.RAM, vit="swin_l")


@pytest.fixture
def tag2text_path(package: Any, tmp_path: Path) -> Path:
    return save(tmp_path / "tag2text.pth", package.Tag2Text, vit="swin_b")


def open_ram(path: Path | str, **table: Any) -> Any:
    return open_expert("ram", Stitch(ram=Ram(checkpoint=str(path), image_size=224, **table)), "cpu")


def open_tag2text(path: Path) -> Any:
    return open_expert("tag2text", Stitch(tag2text=Tag2text(checkpoint=str(path), image_size=224)), "cpu")


def pixels(images: list[Image.Image]) -> torch.Tensor:
    import ram
    return torch.stack([ram.get_transform(image_size=224)(image) for image in images])


IMAGES = [blotches(seed) for seed in range(12)]


def test_ram_names_what_the_package_names_with_the_scores_of_its_head(package: Any, ram_path: Path) -> None:
    facts = look(open_ram(ram_path), *IMAGES)
    model = package.ram(pretrained=str(ram_path), image_size=224, vit="swin_l").eval()
    with torch.no_grad():
        said, _ = model.generate_tag(pixels(IMAGES))
        heads = model._attend(torch.relu(model.label_embed), model._image_embeds(pixels(IMAGES)))
        scores = torch.sigmoid(heads @ model.fc.weight[0] + model.fc.bias)
    assert [set(pairs(each)) for each in facts] == [set(filter(None, names.split(" | "))) for names in said]
    assert len({tuple(sorted(pairs(each))) for each in facts}) > 3  # images differ, some tags are over, some under
    for each, row in zip(facts, scores, strict=True):
        expected = dict(zip(package.RAM_TAGS, row.tolist(), strict=True))
        assert pairs(each) == pytest.approx({name: expected[name] for name in pairs(each)}, abs=1e-4)
        assert [tag.score for tag in each.tags] == sorted((tag.score for tag in each.tags), reverse=True)


def test_tag2text_also_says_a_sentence(package: Any, tag2text_path: Path) -> None:
    facts = look(open_tag2text(tag2text_path), *IMAGES)
    model = package.tag2text(pretrained=str(tag2text_path), image_size=224, vit="swin_b").eval()
    with torch.no_grad():
        captions, said = model.generate(pixels(IMAGES), tag_input=None, max_length=50, return_tag_predict=True)
    assert [[(each.text, each.source, each.reliable) for each in image.sentences] for image in facts] == [
        [(caption, "tag2text", True)] for caption in captions]
    assert [set(pairs(each)) for each in facts] == [set(filter(None, names.split(" | "))) for names in said]
    assert len(set(captions)) > 1


def test_a_name_that_stands_twice_in_the_list_is_one_tag_with_the_higher_score(
        package: Any, tag2text_path: Path) -> None:
    model = package.tag2text(pretrained=str(tag2text_path), image_size=224, vit="swin_b").eval()
    with torch.no_grad():
        heads = model._attend(model.label_embed.weight, model._image_embeds(pixels(IMAGES)))
        scores = torch.sigmoid((model.fc.W * heads).sum(-1) + model.fc.b)
    _, said = model.generate(pixels(IMAGES), return_tag_predict=True)
    assert any(names.split(" | ").count("race") == 2 for names in said)
    for facts, row in zip(look(open_tag2text(tag2text_path), *IMAGES), scores, strict=True):
        labels = [tag.label for tag in facts.tags]
        assert len(labels) == len(set(labels))
        if "race" in labels:
            assert pairs(facts)["race"] == pytest.approx(float(row[[1, 5]].max()), abs=1e-4)


def test_tags_of_an_image_do_not_depend_on_its_batch(ram_path: Path, tag2text_path: Path) -> None:
    images = [blotches(20), blotches(21, 30, 90), blotches(22, 200, 50)]
    for expert in (open_ram(ram_path), open_tag2text(tag2text_path)):
        for together, image in zip(look(expert, *images), images, strict=True):
            alone, = look(expert, image)
            assert pairs(together) == pytest.approx(pairs(alone), abs=2e-4)
            assert together.sentences == alone.sentences
        assert look(expert, turned(images[2])) == look(expert, images[2])


def test_an_image_without_a_tag_has_none(package: Any, ram_path: Path) -> None:
    expert = open_ram(ram_path)
    expert.model.class_threshold[:] = 1.0
    assert look(expert, Image.fromarray(BLACK)) == [Facts()]


def test_facts_say_which_file_and_package_they_were_made_with(ram_path: Path, tag2text_path: Path) -> None:
    provenance = open_ram(ram_path).provenance
    assert provenance == {"checkpoint": "ram.pth", "revision": provenance["revision"], "vit": "swin_l",
                          "image_size": 224, "ram": "0.0.1"}
    other = open_tag2text(tag2text_path).provenance
    assert other["vit"] == "swin_b" and other["revision"] != provenance["revision"]


def test_the_package_neither_prints_nor_turns_off_warnings(
        ram_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ram", "ram.models"):
        del sys.modules[name]
    filters = list(warnings.filters)
    open_ram(ram_path)
    assert capsys.readouterr().out == ""
    assert warnings.filters == filters


def test_older_names_of_weights_are_known(package: Any, ram_path: Path) -> None:
    checkpoint = torch.load(ram_path)
    checkpoint["model"] = {name.replace("tagging_head", "vision_multi"): weight
                           for name, weight in checkpoint["model"].items()}
    older = ram_path.with_name("older.pth")
    torch.save(checkpoint, older)
    assert look(open_ram(older), *IMAGES) == look(open_ram(ram_path), *IMAGES)


# --- what may be wrong with a checkpoint ---------------------------------------------------------------------------


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_code_in_a_checkpoint_never_runs(environment: dict[str, str], package: Any, ram_path: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    marker, zipped, bare = tmp_path / "ran", tmp_path / "zipped.pth", tmp_path / "bare.pth"
    torch.save(torch.load(ram_path, weights_only=True) | {"config": Attack(marker)}, zipped)
    bare.write_bytes(pickle.dumps({"model": Attack(marker)}))
    for path in (zipped, bare):
        for opener in (open_ram, open_tag2text):
            with pytest.raises(UserError, match="holds code, which is never run"):
                opener(path)
        with monkeypatch.context() as careless:  # and not where the package itself would let it
            careless.setattr(package, "ram", lambda path=path, **_: torch.load(path, weights_only=False))
            with pytest.raises(UserError, match=r"cannot open .*ram\.pth"):
                open_ram(ram_path)
    assert not marker.exists()
    assert len(look(open_ram(ram_path), *IMAGES)) == len(IMAGES)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == environment.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    torch.load(zipped, weights_only=False)
    assert marker.is_dir()  # so the attack was one


def test_a_checkpoint_that_is_not_there_is_one_line(package: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stitch\.ram\.checkpoint: no file at .*none\.pth: check the path$"):
        open_ram(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"^stitch\.tag2text\.checkpoint: no file at "):
        open_tag2text(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(package: Any, ram_path: Path, tag2text_path: Path,
                                                  tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks \d+ weights of a Tag2Text, fc\.W first"):
        open_tag2text(save(tmp_path / "small.pth", package.RAM, vit="swin_b"))
    with pytest.raises(UserError, match=r"cannot open .*size mismatch"):
        open_ram(ram_path, vit="swin_b")
    for content in ({"weights": {}}, {"model": torch.zeros(3)}, torch.zeros(2), {"model": {1: 2}}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=r"^stitch\.ram\.checkpoint: .*odd\.pth is damaged, not a checkpoint"):
            open_ram(tmp_path / "odd.pth")
    (tmp_path / "cut.pth").write_bytes(ram_path.read_bytes()[:-500])
    with pytest.raises(UserError, match="is damaged"):
        open_ram(tmp_path / "cut.pth")


def test_what_generate_tag_does_not_read_may_be_missing(package: Any, ram_path: Path) -> None:
    checkpoint = torch.load(ram_path)
    checkpoint["model"] = {name: weight for name, weight in checkpoint["model"].items()
                           if not name.startswith("text_decoder")}
    torch.save(checkpoint, ram_path.with_name("tagger.pth"))
    assert look(open_ram(ram_path.with_name("tagger.pth")), *IMAGES) == look(open_ram(ram_path), *IMAGES)


def test_without_the_package_its_installation_is_named(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ram", "ram.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"stitch\.ram needs the package ram .*pip install git\+https://github\.com/"):
        open_ram(ram_path)


def test_real_photos_are_tagged_by_ram(ram_path: Path, tag2text_path: Path, shared_data: Path) -> None:
    samples = list(read_shard(str(shared_data / "photos" / "archive-00000.tar"), rejects=[]))[:3]
    images = [sample.image() for sample in samples]
    for expert in (open_ram(ram_path), open_tag2text(tag2text_path)):
        for facts in look(expert, *images):
            assert all(0.3 < tag.score <= 1 for tag in facts.tags)
