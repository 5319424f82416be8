"""Validation while training: pictures of the averaged weights, their figures, the page; the same in two processes."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eval.clip_score import ClipScorer
from eval.config import Features
from eval.features import features, open_network
from recap.errors import UserError
from recap.processes import open_accelerator
from recap.rundir import StageDir
from train_t2i import validation
from train_t2i.config import Train
from train_t2i.ema import trainable
from train_t2i.model import Diffusion
from train_t2i.sample import draw, image_seed, load_pipeline
from train_t2i.sheet import Look, curves, side, write_sheet
from train_t2i.validation import Validator, read_prompts

Averages = dict[str, torch.Tensor]
LONG = "A red ring in the top left and a blue bar below it, drawn flat on a grey ground. " * 8
"""Of more than one window."""
PROMPTS = ["a red ring", LONG, "a blue bar", "<img src=x onerror=alert(1)>"]
SEED = 3


@pytest.fixture
def config(world_models: Path, tmp_path: Path) -> Train:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return make_config(world_models, prompts=str(tmp_path / "prompts.txt"))


def make_config(models: Path, **table: Any) -> Train:
    return Train(model=str(models / "stable-diffusion-0"), resolution=32, steps=7, validation={
        "every": 3, "seed": SEED, "num_inference_steps": 2, "batch_size": 2} | table)


def changed(config: Train, **table: Any) -> Train:
    return config.model_copy(update={"validation": config.validation.model_copy(update=table)})


def measured(config: Train, models: Path, real: Path) -> Train:
    """The same with both figures."""
    return changed(config, clip_score=f"local-dir:{models / 'clip'}", features=f"local-dir:{models / 'features'}",
                   reference=str(real))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of different sizes, one in a folder below."""
    folder, numbers = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for place, name in enumerate(("a", "b", "c", "more/d")):
        pixels = numbers.integers(0, 256, (30 + place, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def weights(config: Train) -> Averages:
    """What averages are before the first step."""
    return {name: tensor.detach().clone()
            for name, tensor in trainable(Diffusion(load_pipeline(config, "train", "cpu"), config))}


def validator(out: Path, config: Train) -> Validator:
    return Validator(StageDir(out, {}), open_accelerator("no", "cpu"), config)


def picture(out: Path, step: int, index: int) -> np.ndarray:
    return np.asarray(Image.open(out / "validation" / f"{step:07d}" / f"{index:05d}.png")).astype(int)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_it_is_due_before_the_first_step_and_every_so_many(config: Train, tmp_path: Path) -> None:
    looks = validator(tmp_path, config)
    assert [step for step in range(8) if looks.is_due(step)] == [0, 3, 6]


def test_each_prompt_of_any_length_is_drawn_with_its_own_seed(config: Train, tmp_path: Path) -> None:
    assert validator(tmp_path, config).look(0, weights(config)) == {}
    pipe = load_pipeline(config, "train", "cpu")
    for index, prompt in enumerate(PROMPTS):
        alone = draw(pipe, [prompt], [image_seed(SEED, index)], num_inference_steps=2, guidance_scale=7.5, height=32,
                     width=32)[0]
        assert abs(picture(tmp_path, 0, index) - np.asarray(alone).astype(int)).max() <= 1
    assert len(list((tmp_path / "validation/0000000").glob("*.png"))) == len(PROMPTS)


def test_pictures_are_of_the_averages_at_their_step(config: Train, tmp_path: Path) -> None:
    looks, averages = validator(tmp_path, config), weights(config)
    looks.look(0, averages)
    looks.look(3, {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in averages.items()})
    looks.look(6, averages)
    assert abs(picture(tmp_path, 0, 0) - picture(tmp_path, 3, 0)).mean() > 1
    assert (picture(tmp_path, 0, 0) == picture(tmp_path, 6, 0)).all()


def test_pictures_are_drawn_in_the_training_s_precision(config: Train, tiny_pipelines: Path, tmp_path: Path) -> None:
    of_xl = config.model_copy(update={"model": str(tiny_pipelines / "sdxl")})
    for precision in ("no", "bf16"):
        settings = of_xl.model_copy(update={"precision": precision})
        validator(tmp_path / precision, settings).look(0, weights(settings))
    for index in range(len(PROMPTS)):
        assert 0.1 < abs(picture(tmp_path / "no", 0, index) - picture(tmp_path / "bf16", 0, index)).mean() < 5


def test_the_training_does_not_feel_it(config: Train, world_models: Path, real: Path, tmp_path: Path) -> None:
    """LoRA's first weights and KID's subsets are drawn from torch's global generator."""
    settings = Train.model_validate(measured(config, world_models, real).model_dump() | {"lora": {"rank": 2}})
    looks, averages = validator(tmp_path, settings), weights(settings)
    before, state = {name: tensor.clone() for name, tensor in averages.items()}, torch.get_rng_state()
    looks.look(0, averages)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(averages[name], before[name]) for name in before)


def test_a_step_that_was_drawn_is_kept(config: Train, world_models: Path, real: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    settings = measured(config, world_models, real)
    averages = weights(settings)
    found = validator(tmp_path, settings).look(3, averages)
    monkeypatch.setattr(validation, "averaged_pipeline", None)  # which would be needed to draw
    again = validator(tmp_path, settings)
    assert again.look(3, averages) == found and found.keys() == {"kid", "clip_score"}
    with pytest.raises(TypeError):
        again.look(6, averages)


def test_what_a_kill_leaves_of_a_step_is_drawn_anew(config: Train, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    averages, publish = weights(config), validation.checkpoint.publish

    def killed(temporary: Path, folder: Path) -> None:
        (temporary / "00001.png").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(validation.checkpoint, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        validator(tmp_path, config).look(0, averages)
    assert not (tmp_path / "validation/0000000").exists()
    monkeypatch.setattr(validation.checkpoint, "publish", publish)
    validator(tmp_path, config).look(0, averages)
    assert picture(tmp_path, 0, 1).shape == (32, 32, 3)


def test_pictures_that_do_not_fit_at_once_are_drawn_fewer_at_a_time(config: Train, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    averages = weights(config)
    validator(tmp_path / "fits", config).look(0, averages)

    def small(most: int) -> Callable[..., Any]:
        def drawn(pipe: Any, prompts: list[str], *arguments: Any, **options: Any) -> Any:
            if len(prompts) > most:
                raise torch.OutOfMemoryError
            return draw(pipe, prompts, *arguments, **options)
        return drawn

    monkeypatch.setattr(validation, "draw", small(1))
    validator(tmp_path / "small", config).look(0, averages)
    for index in range(len(PROMPTS)):
        assert abs(picture(tmp_path / "fits", 0, index) - picture(tmp_path / "small", 0, index)).max() <= 1
    monkeypatch.setattr(validation, "draw", small(0))
    with pytest.raises(UserError, match=r"out of memory with one picture at a time"):
        validator(tmp_path / "none", config).look(0, averages)


# --- prompts ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip), min_size=1),
       st.integers(1, 5))
def test_json_lines_give_back_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str], most: int) -> None:
    path = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": 1}, ensure_ascii=False) + "\n" for text in texts))
    assert read_prompts(path, most) == [" ".join(text.split()) for text in texts][:most]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa  ring\r\n\n \nein blaues Quadrat\u2028unten".encode())
    assert read_prompts(tmp_path / "p.txt", 9) == ["a ring", "ein blaues Quadrat unten"]
    assert read_prompts(tmp_path / "p.txt", 1) == ["a ring"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("p.txt", None, r"cannot read .*p\.txt \(No such file"), ("p.txt", b" \n\n", r"no prompt in .*p\.txt"),
    ("p.jsonl", b"", "no prompt in"), ("p.txt", b"a\xff", "not UTF-8 at byte 1"),
    *(("p.jsonl", b'{"prompt": "a"}\n' + line, r"line 2 of .*p\.jsonl")
      for line in (b"{", b"[]", b'{"text": "a"}', b'{"prompt": 1}', b'{"prompt": " "}', b'{"prompt": "\\ud800"}',
                   b"[" * 100_000)),
])
def test_prompts_that_are_none_are_one_line(name: str, content: bytes | None, message: str, config: Train,
                                            tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^train.validation.prompts: .*{message}"):
        validator(tmp_path / "out", changed(config, prompts=str(tmp_path / name)))


def test_pictures_of_other_prompts_are_not_gone_on_with(config: Train, tmp_path: Path) -> None:
    validator(tmp_path, config)
    validator(tmp_path, config)
    (tmp_path / "prompts.txt").write_text("a ring")
    with pytest.raises(UserError, match="of other prompts"):
        validator(tmp_path, config)


# --- figures ---------------------------------------------------------------------------------------------------------


def kid(one: np.ndarray, other: np.ndarray) -> float:
    """The unbiased estimate, equation 4 of arXiv 1801.01401, of equally many features."""
    def kernel(x: np.ndarray, y: np.ndarray) -> Any:
        return (x @ y.T / x.shape[1] + 1) ** 3
    num, between = len(one), kernel(one, other).mean()
    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (num * (num - 1)) for x in (one, other))
    return float(within - 2 * between)


def test_the_figures_are_those_that_evaluation_finds(config: Train, world_models: Path, real: Path,
                                                     tmp_path: Path) -> None:
    looks, averages = validator(tmp_path, measured(config, world_models, real)), weights(config)
    network = open_network(Features(model=f"local-dir:{world_models / 'features'}"), "x", "cpu")
    scorer = ClipScorer(f"local-dir:{world_models / 'clip'}", "cpu")
    references = features((Image.open(path).convert("RGB") for path in sorted(real.rglob("*.png"))), network, 8)
    for step in (0, 3):  # the second time with the features of the first
        averages = {name: tensor + 0.02 * step * torch.randn(tensor.shape) for name, tensor in averages.items()}
        found = looks.look(step, averages)
        drawn = [Image.open(tmp_path / f"validation/{step:07d}/{index:05d}.png") for index in range(len(PROMPTS))]
        assert found["clip_score"] == pytest.approx(scorer.score(drawn, PROMPTS)[0].mean())
        assert found["kid"] == pytest.approx(kid(features(drawn, network, 8), references), rel=1e-4)


def test_of_many_real_images_some_are_taken_evenly(config: Train, world_models: Path, real: Path,
                                                   tmp_path: Path) -> None:
    settings = changed(measured(config, world_models, real), num_references=2)
    assert [path.name for path in validator(tmp_path, settings).figures.kid.files] == ["a.png", "c.png"]


@pytest.mark.parametrize(("table", "message"), [
    ({"clip_score": "local-dir:none"}, r"^train\.validation\.clip_score: no folder at none"),
    ({"features": "local-dir:none"}, r"^train\.validation\.features: no folder at none"),
    ({"features": "{models}/clip"}, r"^train\.validation\.features: .*no model\.safetensors in"),
    ({"reference": "none"}, r"^train\.validation\.reference: 0 images"),
    ({"num_prompts": 1}, "two pictures at least")])
def test_what_is_missing_is_said_before_any_step(table: dict[str, Any], message: str, config: Train,
                                                 world_models: Path, real: Path, tmp_path: Path) -> None:
    table = {key: value.format(models=world_models) if isinstance(value, str) else value
             for key, value in table.items()}
    with pytest.raises(UserError, match=message):
        validator(tmp_path, changed(measured(config, world_models, real), **table))


def test_a_broken_real_image_is_one_line(config: Train, world_models: Path, real: Path, tmp_path: Path) -> None:
    shutil.copytree(real, tmp_path / "real")
    (tmp_path / "real/b.png").write_bytes(b"no image")
    looks = validator(tmp_path, measured(config, world_models, tmp_path / "real"))
    with pytest.raises(UserError, match=r"reference: .*b\.png is not a whole image"):
        looks.look(0, weights(config))


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, attribute: str) -> list[str]:
        return [found[attribute] or "" for name, found in self.elements if name == tag and attribute in found]


@pytest.fixture
def sheet(config: Train, tmp_path: Path) -> Path:
    """A page of three steps, the figures of one of which are no numbers."""
    folder = tmp_path / "sheet"
    for step in (0, 3, 12):
        (folder / f"{step:07d}").mkdir(parents=True)
        figures = {"kid": 0.5 / (1 + step), "clip_score": float("nan") if step == 3 else 20 + step}
        (folder / f"{step:07d}/figures.json").write_text(json.dumps(figures))
        for index in range(len(PROMPTS)):
            Image.new("RGB", (32, 32), (20 * step, 50 * index, 90)).save(folder / f"{step:07d}/{index:05d}.png")
    shutil.copytree(folder / "0000012", folder / ".0000015.tmp")  # half written
    (folder / "0000018").mkdir()  # half deleted
    write_sheet(folder, "mix", config, PROMPTS)
    return folder


def test_the_page_has_a_row_a_prompt_and_a_column_a_step(sheet: Path) -> None:
    pictures = Page(sheet / "index.html").values("img", "src")
    assert pictures == [f"{step:07d}/{index:05d}.png" for index in range(len(PROMPTS)) for step in (0, 3, 12)]
    assert all((sheet / source).is_file() for source in pictures)


def test_prompts_on_the_page_are_text(sheet: Path) -> None:
    page = Page(sheet / "index.html")
    assert all(prompt.strip() in page.text for prompt in PROMPTS)
    assert not page.values("img", "onerror")


def test_the_page_needs_nothing_but_its_pictures(sheet: Path) -> None:
    text = (sheet / "index.html").read_text()
    assert "//" not in text and "<script" not in text and "<link" not in text
    assert set(Page(sheet / "index.html").values("img", "loading")) == {"lazy"}


def test_curves_leave_out_what_is_no_number(sheet: Path) -> None:
    drawn = [len(points.split()) for points in Page(sheet / "index.html").values("polyline", "points")]
    assert drawn == [3, 2]


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1e9, 1e9)), min_size=1, unique_by=lambda point: point[0]))
def test_curves_stay_in_their_drawing(points: list[tuple[int, float]]) -> None:
    curve, = curves([Look(step, f"{step:07d}", {"kid": value}) for step, value in sorted(points)])
    assert all(0 <= x <= 400 and 0 <= y <= 110 for x, y in curve.places)
    assert [x for x, _ in curve.places] == sorted(x for x, _ in curve.places)


@given(st.integers(8, 2048))
def test_pictures_are_of_a_size_that_can_be_seen(resolution: int) -> None:
    assert 64 < side(resolution) <= 224 and (resolution > 128 or side(resolution) % resolution == 0)


@pytest.mark.full
def test_in_a_browser_the_page_opens_at_the_newest_and_fits_its_window(sheet: Path, config: Train,
                                                                       tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    for step in range(20, 40):
        shutil.copytree(sheet / "0000012", sheet / f"{step:07d}")
    write_sheet(sheet, "mix", config, PROMPTS)
    (sheet / "measure.html").write_text("""<!doctype html><title>…</title><body><script>
        const widths = [320, 390, 768, 1280], found = [];
        for (const width of widths) {
            const frame = document.createElement("iframe");
            frame.style.width = width + "px"; frame.style.height = "900px"; frame.style.border = 0;
            frame.onload = () => {
                const inner = frame.contentDocument, root = inner.documentElement;
                const box = query => inner.querySelector(query).getBoundingClientRect();
                found.push([width, root.scrollWidth - root.clientWidth, box("li:last-child img").right,
                            box("li:first-child img").right, box(".prompt").left, box(".prompt").right,
                            inner.querySelector("li:last-child img").naturalWidth]);
                if (found.length === widths.length) document.title = JSON.stringify(found);
            };
            frame.src = "index.html"; document.body.append(frame);
        }</script>""")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(
        http.server.SimpleHTTPRequestHandler, directory=str(sheet)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = subprocess.run([
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
        f"http://127.0.0.1:{server.server_port}/measure.html",
    ], capture_output=True, text=True, timeout=120, check=True).stdout
    server.shutdown()
    measured = json.loads(found.partition("<title>")[2].partition("</title>")[0])
    assert sorted(row[0] for row in measured) == [320, 390, 768, 1280]
    for width, overflow, newest, oldest, left, right, natural in measured:
        assert overflow <= 0 and natural == 32
        assert oldest < 0 < newest <= width and 0 <= left < right <= width


# --- processes -------------------------------------------------------------------------------------------------------

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["train_t2i.validation", "eval.clip_score", "open_clip", "eval.features"])


def look(out: Path, config: Train, rank: int, count: int, port: int) -> None:
    """What a process does: three looks, the last at a step that it has looked at."""
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    looks, averages = validator(out, config), weights(config)
    found = [looks.look(step, averages) for step in (0, 3, 3)]
    (out / f"{rank}.json").write_text(json.dumps(found))


def look_in(count: int, out: Path, config: Train) -> list[list[dict[str, float]]]:
    """What each of so many processes finds."""
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [FORKS.Process(target=look, args=(out, config, rank, count, port)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
        assert process.exitcode == 0
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.full
@pytest.mark.parametrize(("prompts", "batch_size"), [(PROMPTS[:3], 1), (["a red ring", "a blue bar"], 2)],
                         ids=["one draws more", "one draws none"])
def test_two_processes_find_what_one_finds(prompts: list[str], batch_size: int, config: Train, world_models: Path,
                                           real: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    # Of fewer real images than pictures, subsets are drawn from the pictures too, whose order matters then.
    settings = changed(measured(config, world_models, real), batch_size=batch_size, num_references=2)
    (alone,), (first, second) = (look_in(count, tmp_path / str(count), settings) for count in (1, 2))
    assert first == second and first[0] == first[1] == first[2]
    assert first[0] == pytest.approx(alone[0], rel=1e-5) and first[0].keys() == {"kid", "clip_score"}
    pictures = sorted((tmp_path / "1/validation").rglob("*.png"))
    assert len(pictures) == 2 * len(prompts)
    for path in pictures:
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()
