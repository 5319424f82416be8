"""What a training leaves: a folder, LoRA weights and a single file that stock diffusers opens, a card, an upload."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from pipelines import models
from safetensors.torch import load_file

from recap.errors import UserError
from train_t2i import export
from train_t2i.card import card
from train_t2i.config import Lora, Train
from train_t2i.ema import EMA
from train_t2i.model import Diffusion
from train_t2i.sample import load_pipeline

ABOUT = {"captions": {"short": 1.0, "long": 3.0}, "steps": 1200, "images": 9600, "seed": 3}
STOCK: dict[str, Any] = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline,
                         "sdxl": StableDiffusionXLPipeline}
ADAPTED = Lora(rank=2, alpha=6, dropout=0.5, unet=["to_q", "to_v", "conv1"], text_encoder=["q_proj", "out_proj", "fc1"])


def averages(config: Train) -> dict[str, torch.Tensor]:
    """Of a training that has moved all that it trains."""
    model = Diffusion(load_pipeline(config, "train", "cpu"), config)
    torch.manual_seed(2)
    return {name: value + 0.1 * torch.randn(value.shape) for name, value in EMA(model, 0.9).whole().items()}


def exported(folder: Path, config: Train) -> dict[str, torch.Tensor]:
    found = averages(config)
    pipe = export.averaged_pipeline(config, found)
    assert not any(each.training for module in models(pipe).values() for each in module.modules())
    export.write(folder, pipe, config, ABOUT)
    return found


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": value for part, module in models(pipe).items()
            for name, value in module.state_dict().items()}


def base_of(config: Train, kind: str) -> Any:
    return STOCK[kind].from_pretrained(config.model).to(dtype=torch.float32)


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe("a red circle", num_inference_steps=2, height=32, width=32, output_type="np",
                                 generator=torch.Generator().manual_seed(3)).images)


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STOCK)
def test_the_folder_holds_the_averages_and_the_frozen_weights_of_the_base(tiny_pipelines: Path, kind: str,
                                                                          tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / kind), resolution=32, precision="bf16")
    found = exported(tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline"]
    stock = STOCK[kind].from_pretrained(tmp_path / "pipeline").to(dtype=torch.float32)
    after, before = weights(stock), weights(base_of(config, kind))
    assert after.keys() == before.keys() and found.keys() < after.keys()
    assert all(torch.equal(after[name], found.get(name, before[name])) for name in after)
    assert any(name.startswith("vae.") for name in after.keys() - found.keys())
    assert stock.scheduler.config == base_of(config, kind).scheduler.config
    assert stock.tokenizer("a cat!").input_ids == load_pipeline(config, "train", "cpu").tokenizer("a cat!").input_ids
    assert picture(stock).std() > 0


def test_what_a_gpu_holds_in_another_order_is_written_in_the_stock_one(tiny_pipelines: Path, tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / "sd1"), resolution=32)
    found = {name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
             for name, value in averages(config).items()}
    export.write(tmp_path, export.averaged_pipeline(config, found), config, ABOUT)
    after = load_file(next((tmp_path / "pipeline" / "unet").glob("*.safetensors")))
    assert all(torch.equal(value, found[f"unet.{name}"]) for name, value in after.items())
    assert all(value.is_contiguous() for value in after.values())


def test_a_second_result_takes_the_place_of_the_first(tiny_pipelines: Path, tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / "sd1"), resolution=32, train_text_encoder=False)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "stale.bin").write_bytes(b"of before")
    (tmp_path / ".pipeline.tmp").mkdir()
    (tmp_path / ".pipeline.tmp" / "half.safetensors").write_bytes(b"what a kill left")
    exported(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert not list(tmp_path.rglob("stale.bin")) and not list(tmp_path.rglob("half.safetensors"))


def test_the_sampler_begins_with_noise_alone_where_the_training_did(tiny_pipelines: Path, tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / "sd2"), resolution=32, zero_terminal_snr=True)
    exported(tmp_path, config)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline").to(dtype=torch.float32)
    assert stock.scheduler.config.rescale_betas_zero_snr
    stock.scheduler.set_timesteps(5)
    assert stock.scheduler.timesteps[0] == 999 and stock.scheduler.alphas_cumprod[-1] == 0
    assert picture(stock).isfinite().all()


def test_a_single_file_is_written_where_it_is_asked_for(tiny_pipelines: Path, tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / "sd1"), resolution=32, single_file=True, lora=ADAPTED)
    exported(tmp_path, config)
    folder = tmp_path / "pipeline"
    stock = StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.float32)
    for file in folder.glob("*/*.safetensors"):
        file.unlink()  # what is read is the single file
    back = StableDiffusionPipeline.from_single_file(str(tmp_path / "pipeline.safetensors"), config=str(folder),
                                                    local_files_only=True).to(dtype=torch.float32)
    assert weights(back).keys() == weights(stock).keys()
    for name, value in weights(back).items():
        assert torch.equal(value, weights(stock)[name].half().float())


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [{}, {"train_text_encoder": False}, {"train_unet": False}],
                         ids=["all", "unet", "text"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_lora_on_its_base_is_the_merged_pipeline(tiny_pipelines: Path, kind: str, what: dict[str, bool],
                                                 tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / kind), resolution=32, precision="bf16", lora=ADAPTED, **what)
    found = exported(tmp_path, config)
    merged = STOCK[kind].from_pretrained(tmp_path / "pipeline").to(dtype=torch.float32)
    adapted, base = base_of(config, kind), base_of(config, kind)
    adapted.load_lora_weights(str(tmp_path / "lora"), use_safetensors=True)
    torch.testing.assert_close(picture(adapted), picture(merged), rtol=0, atol=1e-3)
    assert (picture(base) - picture(merged)).abs().max() > 1e-2
    parts = {name.split(".")[0] for name in found}
    adapted.fuse_lora(components=[*parts])
    adapted.unload_lora_weights()
    ours, theirs, before = weights(merged), weights(adapted), weights(base)
    assert ours.keys() == theirs.keys() == before.keys()  # nothing of an adapter is left
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)
    moved = {name for name, value in ours.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == parts
    assert moved == {f"{name.split('.lora_A')[0]}.weight" for name in found if ".lora_A" in name}


def test_lora_is_scaled_by_alpha_over_rank(tiny_pipelines: Path, tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / "sdxl"), resolution=32, lora=ADAPTED)
    found = exported(tmp_path, config)
    stock = StableDiffusionXLPipeline.from_pretrained(config.model).to(dtype=torch.float32)
    stock.load_lora_weights(str(tmp_path / "lora"), use_safetensors=True)
    layers = {f"{part}.{name}": layer for part, module in models(stock).items()
              for name, layer in module.named_modules() if hasattr(layer, "scaling")}
    assert {name.split(".")[0] for name in layers} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(list(layer.scaling.values()) == [3.0] for layer in layers.values())
    assert {f"{name}.lora_A.default.weight" for name in layers} == {name for name in found if ".lora_A" in name}


@pytest.mark.parametrize(("kind", "parts"), [
    ("sd1", {"unet", "text_encoder.text_model"}),
    ("sdxl", {"unet", "text_encoder.text_model", "text_encoder_2.text_model"})])
def test_lora_weights_have_the_names_that_other_programs_know(tiny_pipelines: Path, kind: str, parts: set[str],
                                                                   tmp_path: Path) -> None:
    exported(tmp_path, Train(model=str(tiny_pipelines / kind), resolution=32, lora=ADAPTED))
    names = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors").keys()
    assert {re.split(r"\.(?:encoder|down_blocks|mid_block|up_blocks)\.", name)[0] for name in names} == parts
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_the_same_averages_give_the_same_lora_file(tiny_pipelines: Path, tmp_path: Path) -> None:
    config = Train(model=str(tiny_pipelines / "sdxl"), resolution=32, lora=ADAPTED)
    found = averages(config)
    for name in ("one", "other"):
        torch.manual_seed(len(name))
        export.write(tmp_path / name, export.averaged_pipeline(config, found), config, ABOUT)
    one, other = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- the card --------------------------------------------------------------------------------------------------------

HOSTILE = "a|b` <script>x</script>\n# x [y](javascript:1)"


def front_matter(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_card_says_what_was_trained_on_what() -> None:
    config = Train(model="CompVis/stable-diffusion-v1-4", batch_size=8, lora=Lora(rank=4))
    text = card(config, ABOUT)
    assert front_matter(text) == {
        "base_model": "CompVis/stable-diffusion-v1-4", "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "stable-diffusion", "diffusers", "recap", "lora"]}
    assert "| captions, by weight | short (1), long (3) |" in text
    assert "| images seen | 9,600 (1,200 steps of 8) |" in text
    assert "| trained | UNet and text encoder, LoRA of rank 4 |" in text
    assert "lora" not in front_matter(card(Train(), ABOUT))["tags"]
    pinned = card(Train(model="some/model", revision="abc", lora=Lora()), ABOUT)
    assert "DiffusionPipeline.from_pretrained('some/model', revision='abc')\n" in pinned


def test_the_hub_is_told_of_a_base_on_the_hub_and_of_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert front_matter(card(Train(model="hf-hub:runs/model"), ABOUT))["base_model"] == "runs/model"
    (tmp_path / "runs" / "model").mkdir(parents=True)
    for folder in ("runs/model", str(tmp_path / "runs" / "model")):
        assert "base_model" not in front_matter(card(Train(model=folder), ABOUT))


def test_the_card_shows_hostile_names_as_text(tmp_path: Path) -> None:
    markdown = pytest.importorskip("markdown_it")
    folder = tmp_path / HOSTILE.replace("/", "∕")
    folder.mkdir()
    for lora in (None, Lora()):
        text = card(Train(model=str(folder), lora=lora), {**ABOUT, "captions": {HOSTILE: 1, "---\nlicense: mit": 2}})
        assert "license" not in front_matter(text)
        shown = markdown.MarkdownIt("gfm-like", {"linkify": False}).render(text.split("---\n", 2)[2])
        assert "<script" not in shown and "<a " not in shown and shown.count("<h1>") == 1
        assert shown.count("<pre>") == 2 and shown.count("<tr>") == 1 + 11


@pytest.mark.parametrize(("kind", "changes"), [
    ("sd1", {}), ("sdxl", {"lora": ADAPTED}), ("sd2", {"lora": ADAPTED, "zero_terminal_snr": True})])
def test_the_code_on_the_card_runs_and_draws_what_was_trained(tiny_pipelines: Path, kind: str, changes: dict[str, Any],
                                                              tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Train(model=str(tiny_pipelines / kind), resolution=32, **changes)
    exported(tmp_path, config)
    folder = tmp_path / ("lora" if config.lora else "pipeline")
    parts = (folder / "README.md").read_text().split("```")
    first, second = (parts[place].removeprefix("python\n") for place in (1, 3))
    monkeypatch.setattr(STOCK[kind], "__call__", lambda pipe, *_, **__: type("Drawn", (), {"images": [pipe]}))
    found: dict[str, Any] = {}
    exec(first.replace("FOLDER_OR_ID", str(folder)), found)  # noqa: S102
    exec(second, found)  # noqa: S102
    monkeypatch.undo()
    found["pipe"].to(dtype=torch.float32)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "pipeline").to(dtype=torch.float32)
    torch.testing.assert_close(picture(found["pipe"]), picture(merged), rtol=0, atol=1e-3)


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What of the hub's interface an upload of small files asks for."""

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.status = status
        self.files: dict[str, bytes] = {}


class _Hub(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        answer = json.dumps(self._answer(self.path.split("?")[0], body)).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _answer(self, path: str, body: bytes) -> Any:
        assert path.startswith(("/api/repos/create", "/api/models/me/mine/", "/api/validate-yaml"))
        if path.endswith("/repos/create"):
            return {"url": f"http://127.0.0.1/me/{json.loads(body)['name']}"}
        if "/preupload/" in path:
            return {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                              for each in json.loads(body)["files"]]}
        for line in body.splitlines() if "/commit/" in path else []:
            if (item := json.loads(line))["key"] == "file":
                self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        return {"commitUrl": "http://127.0.0.1/me/mine/commit/1", "commitOid": "1", "warnings": [], "errors": []}

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, status: int = 200) -> Iterator[Hub]:
    server = Hub(status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_the_result_is_uploaded_whole(tiny_pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, Any] = {"model": str(tiny_pipelines / "sd1"), "resolution": 32}
    for config in (Train(**base, single_file=True, push_to_hub="me/mine"),
                   Train(**base, lora=ADAPTED, push_to_hub="mine")):
        exported(tmp_path, config)
        with hub(monkeypatch) as server:
            export.push(tmp_path, config)
        folder = tmp_path / ("lora" if config.lora else "pipeline")
        wanted = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        assert "README.md" in wanted
        if config.single_file:
            wanted["mine.safetensors"] = tmp_path / "pipeline.safetensors"
        assert server.files == {name: path.read_bytes() for name, path in wanted.items()}


@pytest.mark.parametrize("status", [401, 500, None])
def test_a_hub_that_does_not_take_the_result_is_one_clear_line(status: int | None, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(monkeypatch, status or 200):
        if status is None:  # nothing listens there
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(UserError, match=r"train\.push_to_hub: me/mine does not take the result \(.*run the same "
                                            "command again") as error:
            export.push(tmp_path, Train(push_to_hub="me/mine"))
    assert "\n" not in str(error.value)
