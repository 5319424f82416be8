"""Images encoded once: what is kept is what training would encode; training reads as if nothing was; kills, ranks."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recap_here
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from safetensors.torch import load, load_file, save_file

from recap import engines
from recap import sample as samples_module
from recap.errors import UserError
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import ShardWriter, read_shard
from train_t2i import encoder, train
from train_t2i.config import Arm, Buckets, Train
from train_t2i.data import Batch, Parts, prepare
from train_t2i.encoder import Item, in_batches
from train_t2i.latents import Job, Latents, run
from train_t2i.model import Diffusion
from train_t2i.order import Entry
from train_t2i.sample import load_pipeline
from train_t2i.usable import usable

ARM = Arm(captions={"alt": 1, "short": 1})
WRITTEN = ("*.tar", "*_stats.json", "*_quarantine.jsonl")
SIZES = [(40, 40), (80, 40), (40, 96), (33, 47), (64, 20), (120, 120)]
"""Width and height."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_t2i.latents", "train_t2i.train"])


def image(number: int, size: tuple[int, int], kind: str = "JPEG") -> bytes:
    """Blobs of colour, each number's own, the two halves of which differ."""
    noise = Image.frombytes("RGB", (8, 8), random.Random(number).randbytes(8 * 8 * 3))
    buffer = io.BytesIO()
    noise.resize(size).filter(ImageFilter.GaussianBlur(2)).save(buffer, kind)
    return buffer.getvalue()


def captioned(shard: str, number: int, content: bytes, extension: str = "jpg") -> Sample:
    return Sample(shard, f"{number:04d}", {extension: content, "txt": f"alt {shard} {number}".encode(),
                                           "short.txt": f"short {shard} {number}".encode()})


def write(path: Path, samples: list[Sample]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards of 9 to 11 images, of proportions in an order that fits no batch; one of each is a PNG."""
    folder, found = tmp_path_factory.mktemp("shards"), []
    for place in range(3):
        samples = [captioned(f"{place:05d}", number, image(100 * place + number, SIZES[number * 7 % 5]))
                   for number in range(9 + place)]
        samples[4] = captioned(f"{place:05d}", 4, image(7, (50, 40), "PNG"), "png")
        found.append(write(folder / f"{place:05d}.tar", samples))
    return found


def config(models: Path, **changes: object) -> Train:
    return Train(**({"model": str(models / "stable-diffusion-0"), "resolution": 32, "batch_size": 6, "steps": 3,
                     "log_every": 1, "num_workers": 0, "shuffle_buffer": 12, "cache_latents": True} | changes))


BUCKETED = {"buckets": Buckets(step=8, max_aspect=3), "flip": True}


def encode(out: Path, shards: list[str], settings: Train) -> dict[str, Any]:
    stage = StageDir(out, {})
    stage.begin()
    return run(stage, shards, settings, "cpu")


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in WRITTEN for path in out.glob(pattern)}


def kept(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Uid → tensors, of what is kept."""
    return {sample.uid: load(sample.members["safetensors"]) for path in sorted(out.glob("*.tar"))
            for sample in read_shard(str(path), []) if "safetensors" in sample.members}


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To within a rounding to float16, or two."""
    return torch.allclose(one.float(), other.float(), rtol=2**-9, atol=2**-14)


@pytest.fixture(scope="module")
def whole(world_models: Path, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is kept of the shards, bucketed and flipped."""
    out = tmp_path_factory.mktemp("whole")
    encode(out, shards, config(world_models, **BUCKETED))
    return out


@pytest.fixture(scope="module")
def model(world_models: Path) -> Diffusion:
    settings = config(world_models, **BUCKETED)
    return Diffusion(load_pipeline(settings, "train", "cpu"), settings).eval()


def encoded(entry: Entry, settings: Train, model: Diffusion) -> torch.Tensor | None:
    """Moments of the image as training sees it; None where it can't be decoded."""
    batch, _ = prepare(entry, ARM, settings, 0, model.recipe)
    if not batch.weights.item():
        return None
    with torch.no_grad():
        return model.vae.encode(batch.images / 127.5 - 1).latent_dist.parameters[0]


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, BUCKETED])
def test_what_is_kept_is_what_the_vae_says_of_the_pixels_that_training_sees(
        changes: dict[str, object], world_models: Path, shards: list[str], tmp_path: Path, model: Diffusion) -> None:
    settings = config(world_models, caption_dropout=1.0, **changes)
    encode(tmp_path, shards, settings)
    found, mirrored = kept(tmp_path), Counter[bool]()
    entries = [entry for shard in shards for entry in usable(shard, ARM, settings) if isinstance(entry, Entry)]
    assert [entry.sample.uid for entry in entries] == list(found) and len(found) == 30
    for entry in entries:
        tensors = found[entry.sample.uid]
        assert tensors.keys() == ({"moments", "flipped"} if settings.flip else {"moments"})
        assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
        for epoch in range(4):
            wanted = encoded(replace(entry, epoch=epoch), settings, model)
            assert wanted is not None and any(is_close(each, wanted) for each in tensors.values())
            mirrored[not is_close(tensors["moments"], wanted)] += 1
    assert bool(mirrored[True]) == settings.flip
    assert len({tensors["moments"].shape for tensors in found.values()}) == (5 if changes else 1)


def test_samples_keep_their_order_and_say_of_which_image_they_are(whole: Path, shards: list[str]) -> None:
    for shard in shards:
        before = list(read_shard(shard, []))
        after = list(read_shard(str(whole / Path(shard).name), []))
        assert [sample.key for sample in after] == [sample.key for sample in before]
        assert all(list(sample.members) == ["safetensors", "json"] for sample in after)
        for one, other in zip(before, after, strict=True):
            assert other.metadata.keys() == {"sha256", "width", "height"}
            assert (other.metadata["width"], other.metadata["height"]) == one.image().size
        stats = json.loads((whole / f"{Path(shard).stem}_stats.json").read_text())
        assert stats == {"count": len(before), "successes": len(before), "status_dict": {"success": len(before)},
                         "bytes": (whole / Path(shard).name).stat().st_size}


def test_what_is_kept_depends_on_the_micro_batch_by_rounding_alone(whole: Path, world_models: Path, shards: list[str],
                                                                   tmp_path: Path) -> None:
    encode(tmp_path, shards, config(world_models, micro_batch_size=1, **BUCKETED))
    alone, together = kept(tmp_path), kept(whole)
    assert list(alone) == list(together)
    assert all(is_close(alone[uid][name], tensor) for uid in alone for name, tensor in together[uid].items())


def test_a_batch_that_does_not_fit_is_encoded_in_halves(whole: Path, world_models: Path, shards: list[str],
                                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_all, largest = encoder.moments, 2

    def small(vae: Any, images: torch.Tensor) -> torch.Tensor:
        if len(images) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_all(vae, images)

    monkeypatch.setattr(encoder, "moments", small)
    encode(tmp_path / "two", shards, config(world_models, **BUCKETED))
    together = kept(whole)
    assert all(is_close(tensors[name], together[uid][name]) for uid, tensors in kept(tmp_path / "two").items()
               for name in tensors)
    largest = 0
    with pytest.raises(UserError, match="out of memory with one image at a time"):
        encode(tmp_path / "none", shards, config(world_models, **BUCKETED))
    assert not list((tmp_path / "none").glob("*.t*"))  # nor half a shard


@given(st.lists(st.sampled_from([None, (1, 2), (2, 1), (2, 2)]), max_size=60), st.integers(1, 5), st.integers(1, 9))
def test_batches_hold_every_image_once_and_all_is_written_in_order(sizes: list[tuple[int, int] | None], size: int,
                                                                   most: int) -> None:
    items = [Item(str(place), {}, pixels=torch.zeros(3, *shape) if shape else None)
             for place, shape in enumerate(sizes)]
    encoded: list[int] = []
    ready: list[int] = []

    def reading() -> Iterator[Item]:
        for place, item in enumerate(items):
            assert place - len(ready) < most
            yield item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "MAX_WAITING", most)
        for batch, then in in_batches(reading(), size):
            assert len(batch) <= size and len({sizes[int(item.key)] for item in batch}) <= 1
            encoded += [int(item.key) for item in batch]
            ready += [int(item.key) for item in then]
            assert {place for place in ready if sizes[place]} <= set(encoded)
    assert ready == list(range(len(items)))
    assert sorted(encoded) == [place for place, shape in enumerate(sizes) if shape]


# --- images that can't be used ---------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_used_is_kept_as_its_reason_and_listed(world_models: Path, tmp_path: Path) -> None:
    good = image(0, (40, 40))
    shard = write(tmp_path / "in" / "00000.tar", [
        captioned("00000", 0, good), captioned("00000", 1, b"no image"), Sample("00000", "0002", {"txt": b"none"}),
        captioned("00000", 3, good[:len(good) // 2]), captioned("00000", 0, good), captioned("00000", 5, good)])
    result = encode(tmp_path / "out", [shard], config(world_models))
    assert (result["images"], result["rejected"]) == (2, {"undecodable_image": 2, "missing_image": 1,
                                                          "duplicate_key": 1})
    found = list(read_shard(str(tmp_path / "out" / "00000.tar"), []))
    assert [(sample.key, list(sample.members), sample.metadata.get("reason")) for sample in found] == [
        ("0000", ["safetensors", "json"], None), ("0001", ["json"], "undecodable_image"),
        ("0002", ["json"], "missing_image"), ("0003", ["json"], "undecodable_image"),
        ("0005", ["safetensors", "json"], None)]
    listed = [json.loads(line) for line in (tmp_path / "out" / "00000_quarantine.jsonl").read_text().splitlines()]
    assert sorted((each["key"], each["reason"]) for each in listed) == [
        ("0000", "duplicate_key"), ("0001", "undecodable_image"), ("0002", "missing_image"),
        ("0003", "undecodable_image")]
    read = usable(shard, Arm(captions={"alt": 1}), config(world_models), tmp_path / "out")
    assert sorted(each if isinstance(each, str) else each.sample.key for each in read) == [
        "0000", "0005", "duplicate_key", "missing_image", "undecodable_image", "undecodable_image"]


def test_an_image_that_crashes_its_decoder_is_listed(world_models: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, recap.sample\n"
        "decode = recap.sample.decode_image\n"
        "def decode_image(data, min_side):\n"
        "    if data == b'\\x89PNG':\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return decode(data, min_side)\n"
        "recap.sample.decode_image = decode_image\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("train_t2i.encoder.image_size", lambda data: (40, 40))
    shard = write(tmp_path / "in" / "00000.tar", [
        captioned("00000", 0, b"\x89PNG"), captioned("00000", 1, image(0, (40, 40)))])
    result = encode(tmp_path / "out", [shard], config(world_models))
    assert (result["images"], result["rejected"]) == (1, {"decoder_crashed": 1})


def test_what_the_web_sends_is_used_or_left_out_as_training_does(world_models: Path, tmp_path: Path, model: Diffusion,
                                                                 shared_data: Path) -> None:
    files = sorted((shared_data / "nasty_images").iterdir())
    odd = [image(0, size) for size in ((1, 3000), (3000, 1), (1, 1))]
    contents = [*(file.read_bytes() for file in files), *odd]
    shard = write(tmp_path / "in" / "00000.tar", [captioned("00000", *each) for each in enumerate(contents)])
    settings = config(world_models, caption_dropout=1.0, buckets=Buckets(step=8))
    result = encode(tmp_path / "out", [shard], settings)
    online = {entry.sample.uid: encoded(entry, settings, model) for entry in usable(shard, ARM, settings)
              if isinstance(entry, Entry)}
    wanted = {uid: moments for uid, moments in online.items() if moments is not None}
    found = kept(tmp_path / "out")
    assert list(found) == list(wanted) and len(found) == result["images"] > 30 < sum(result["rejected"].values())
    assert all(is_close(found[uid]["moments"], moments) for uid, moments in wanted.items())


def test_shards_none_of_whose_images_can_be_used_stop_in_one_line(world_models: Path, tmp_path: Path) -> None:
    shard = write(tmp_path / "in" / "00000.tar", [captioned("00000", number, b"no image") for number in range(3)])
    with pytest.raises(UserError, match=r"no image of .*00000.tar can be used .*undecodable_image.*3") as caught:
        encode(tmp_path / "out", [shard], config(world_models))
    assert "\n" not in str(caught.value)


def test_moments_that_are_not_finite_are_not_kept(world_models: Path, shards: list[str], tmp_path: Path) -> None:
    shutil.copytree(world_models / "stable-diffusion-0", tmp_path / "stable-diffusion-0")
    file = tmp_path / "stable-diffusion-0" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"quant_conv.bias": load_file(file)["quant_conv.bias"].float() + 1e6}, file,
              {"format": "pt"})
    with pytest.raises(UserError, match="latents_not_finite"):
        encode(tmp_path / "out", shards, config(tmp_path))


@pytest.mark.parametrize(("changes", "says"), [
    ({"resolution": 36}, "train.resolution: 36 is not a multiple of 8"),
    ({"prediction_type": "epsilon"}, "train.prediction_type"),
    ({"precision": "fp16"}, "fp16 needs a GPU")])
def test_what_training_would_refuse_is_refused_before_all_is_encoded(world_models: Path, shards: list[str],
                                                                     tmp_path: Path, changes: dict[str, object],
                                                                     says: str) -> None:
    with pytest.raises(UserError, match=says):
        encode(tmp_path, shards, config(world_models, **changes))
    assert not list(tmp_path.glob("*.tar"))


# --- training on it --------------------------------------------------------------------------------------------------


def batches(shards: list[str], settings: Train, model: Diffusion, latents: Path | None, num_steps: int) -> list[Batch]:
    parts = Parts(shards, ARM, settings, 0, model.recipe, latents)
    return [batch for part in islice(iter(parts), num_steps) for batch in part.batches]


def fail(*_: object, **__: object) -> None:
    raise AssertionError("an image was opened")


def test_training_reads_the_same_batches_and_opens_no_image(whole: Path, world_models: Path, shards: list[str],
                                                            model: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(world_models, caption_dropout=0.5, **BUCKETED)
    online = batches(shards, settings, model, None, 15)
    monkeypatch.setattr(Image, "open", fail)
    read = batches(shards, settings, model, whole, 15)
    assert [batch.uids for batch in read] == [batch.uids for batch in online]
    for one, other in zip(read, online, strict=True):
        for name in ("timesteps", "noise", "posterior_noise", "weights", "size_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert all(map(torch.equal, one.tokens, other.tokens))
        assert one.images.dtype == torch.float16 and is_close(one.images, encoder.moments(model.vae, other.images))
        with torch.no_grad():
            assert torch.allclose(model(one), model(other), rtol=1e-2)


def test_captions_are_dropped_when_they_are_read(whole: Path, world_models: Path, shards: list[str],
                                                 model: Diffusion) -> None:
    settings = config(world_models, caption_dropout=0.5, **BUCKETED)
    dropped: dict[str, list[bool]] = {}
    eos = model.recipe.tokenizers[0].eos_token_id
    for batch in batches(shards, settings, model, whole, 40):
        for uid, ids in zip(batch.uids, batch.tokens, strict=True):
            dropped.setdefault(uid, []).append(bool(ids[0, 0, 1] == eos))
    everything = [each for found in dropped.values() for each in found]
    assert 0.4 < sum(everything) / len(everything) < 0.6
    assert sum(len(set(found)) == 2 for found in dropped.values()) > 20  # of one image, now and then


def test_a_training_logs_the_loss_that_it_has_without(whole: Path, world_models: Path, shards: list[str],
                                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for latents in (None, whole):
        stage = StageDir(tmp_path / str(latents is None), {})
        stage.begin()
        if latents:
            monkeypatch.setattr(samples_module, "decode_image", fail)
        result = train.run(stage, shards, config(world_models, **BUCKETED), ARM, 0, "alt", "cpu", latents)
        assert result["steps"] == 3 and not result["rejected"]
        losses.append([json.loads(line)["loss"] for line in (stage.path / "log.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_relabelled_shards_may_lack_samples_and_have_more_members(whole: Path, world_models: Path, shards: list[str],
                                                                  tmp_path: Path) -> None:
    after = write(tmp_path / "00001.tar", [
        Sample(each.shard, each.key, each.members | {"long.txt": b"relabelled"})
        for place, each in enumerate(read_shard(shards[1], [])) if place % 3])
    found = [entry.sample for entry in usable(after, Arm(captions={"long": 1}), config(world_models, **BUCKETED), whole)
             if isinstance(entry, Entry)]
    assert [sample.key for sample in found] == [sample.key for sample in read_shard(after, [])] != []
    assert all(isinstance(sample, Latents) and sample.caption("long") == "relabelled" for sample in found)


def test_an_image_that_has_changed_since_is_left_out(whole: Path, world_models: Path, shards: list[str],
                                                     model: Diffusion, tmp_path: Path) -> None:
    before = list(read_shard(shards[0], []))
    before[3] = captioned("00000", 3, image(3, (41, 40)))
    now = [write(tmp_path / "00000.tar", before), *shards[1:]]
    parts = list(islice(iter(Parts(now, ARM, config(world_models, **BUCKETED), 0, model.recipe, whole)), 10))
    assert sum((part.rejects for part in parts), Counter()) == {"latents_of_another_image": 1}
    assert "00000/0003" not in {uid for part in parts for batch in part.batches for uid in batch.uids}
    before[3:5] = before[4:2:-1]
    write(tmp_path / "00000.tar", before)
    with pytest.raises(UserError, match="nothing is kept of 00000/0003: its shard has changed since"):
        list(usable(now[0], ARM, config(world_models, **BUCKETED), whole))


# --- going on, and several processes ---------------------------------------------------------------------------------


def many(folder: Path, num_shards: int = 6, num_images: int = 60) -> list[str]:
    return [write(folder / f"{place:05d}.tar", [
        captioned(f"{place:05d}", number, image(number, SIZES[(number + place) % len(SIZES)]) if number % 9 else b"")
        for number in range(num_images)]) for place in range(num_shards)]


def test_shards_that_are_done_are_left_as_they_are(whole: Path, world_models: Path, shards: list[str],
                                                   tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "00001_stats.json").unlink()
    (out / "00001.tar").write_bytes(b"half of an earlier try")
    before = {name: (out / name).stat().st_mtime_ns for name in written(out)}
    result = encode(out, shards, config(world_models, **BUCKETED))
    assert result["images"] == 30 and written(out) == written(whole)
    changed = {name for name in before if (out / name).stat().st_mtime_ns != before[name]}
    assert changed == {"00001.tar"}  # its stats are new


def _start(out: Path, shards: list[str], settings: Train, **environment: str) -> Any:
    process = FORKS.Process(target=_run, args=(out, shards, settings, environment))
    process.start()
    return process


def _run(out: Path, shards: list[str], settings: Train, environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    stage = StageDir(out, {})
    if environment.get("RANK", "0") == "0":
        stage.begin()
    run(stage, shards, settings, "cpu")


@pytest.mark.full
def test_a_run_that_is_killed_ends_with_the_same_bytes(world_models: Path, tmp_path: Path) -> None:
    shards, settings = many(tmp_path / "in"), config(world_models, **BUCKETED)
    encode(tmp_path / "whole", shards, settings)
    out, wait = tmp_path / "killed", random.Random(0)
    for num_kills in range(4):
        process = _start(out, shards, settings)
        while not any(file.stat().st_size for file in out.glob(f".{num_kills:05d}.tar.*.tmp")):
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(wait.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert num_kills <= len(list(out.glob("*_stats.json"))) < len(shards)
    assert list(out.glob(".*.tmp"))  # half a shard, under no final name
    process = _start(out, shards, settings)
    process.join()
    assert process.exitcode == 0 and not list(out.glob(".*.tmp"))
    assert written(out) == written(tmp_path / "whole") and len(written(out)) == 18


@pytest.mark.full
def test_ranks_and_workers_write_the_same_bytes_as_one_process(world_models: Path, tmp_path: Path) -> None:
    shards, settings = many(tmp_path / "in"), config(world_models, **BUCKETED)
    encode(tmp_path / "whole", shards, settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = tmp_path / "ranks"
    StageDir(out, {}).begin()
    ranks = [_start(out, shards, settings, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
             for rank in "01"]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    shares = [json.loads((out / name).read_text())["shards"] for name in ("progress.json", "progress-1.json")]
    assert sum(shares) == 6 and all(shares)
    assert written(out) == written(tmp_path / "whole")
    (tmp_path / "workers").mkdir()
    done = engines.work(Job(tmp_path / "workers", settings), shards, "local", 2, "cpu", Silent())
    assert sorted(shard for shard, _ in done) == shards
    assert written(tmp_path / "workers") == written(tmp_path / "whole")


class Silent(engines.Meter):
    def images(self, worker: str, shard: str, done: int, quarantined: dict[str, int]) -> None: ...

    def lost(self, worker: str) -> None: ...


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_stage_comes_before_training_and_is_shared_by_all_arms(world_models: Path, shards: list[str],
                                                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text(f"""
        runs = "{tmp_path / 'runs'}"
        device = "cpu"
        arms = ["base", "alt", "short"]
        [train]
        model = "{world_models / 'stable-diffusion-0'}"
        shards = "{Path(shards[0]).parent}/*.tar"
        resolution = 32
        batch_size = 4
        steps = 2
        num_workers = 0
        cache_latents = true
    """)
    arguments = ["-c", str(tmp_path / "mine.toml")]
    assert recap_here("train", *arguments) == 2
    assert "latents is not done: run `recap latents -c …` first" in capsys.readouterr().err
    assert recap_here("latents", *arguments) == 0
    assert recap_here("run", *arguments, "--dry-run") == 0
    planned = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert planned["latents"] == ["done", "before"] and planned["seed-0/train/short"] == ["to", "do"]
    monkeypatch.setattr(Image, "open", fail)
    assert recap_here("train", *arguments) == 0
    assert recap_here("latents", *arguments, "train.lr=1", 'arms=["short"]') == 0
    assert "latents: done before" in capsys.readouterr().err
    result = json.loads((tmp_path / "runs" / "mine" / "latents" / "done.json").read_text())
    assert result["images"] == 30 and result["rejected"] == {} and result["bytes"] > 0 < result["seconds"]
    assert recap_here("latents", *arguments, "train.cache_latents=false") == 2
    assert "set train.cache_latents=true" in capsys.readouterr().err
