"""The whole pipeline through the installed command: it flows, resumes, and is read by stock clients."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import recap

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"
QUICK = ["finetune.steps=6", "finetune.checkpoint_every=2", "train.steps=6", "train.checkpoint_every=2",
         "generate.num_prompts=6", "generate.num_inference_steps=2", "generate.batch_size=3", "stitch.num_images=8",
         "relabel.batch_size=8", 'arms=["base", "alt", "mix"]']


def settings(models: Path, shards: Path, runs: Path) -> list[str]:
    """Overrides that point configs/tiny.toml at the tests' checkpoints and shards."""
    return [*QUICK, f"runs={runs}", f"data.shards={shards}/train/*.tar", f"generate.prompts={shards}/prompts.txt",
            f"evaluate.reference={shards}/eval/*.tar", f"stitch.detr.model={models}/detr",
            f"captioner.model={models}/blip2", f"train.model={models}/stable-diffusion",
            f"evaluate.features.model=local-dir:{models}/features",
            f"evaluate.clip_score.model=local-dir:{models}/clip"]


@pytest.fixture(scope="module")
def arguments(world_models: Path, world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["run", "-c", str(CONFIG), *settings(world_models, world_shards, tmp_path_factory.mktemp("runs"))]


@pytest.fixture(scope="module")
def finished(arguments: list[str]) -> Path:
    """The folder of a finished run."""
    done = recap(*arguments)
    assert done.returncode == 0, done.stderr
    assert "FID" in done.stdout and "mix" in done.stdout and "index.html" in done.stdout
    return Path(next(a for a in arguments if a.startswith("runs=")).removeprefix("runs=")) / "tiny"


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def test_every_stage_leaves_its_folder_and_the_report(finished: Path) -> None:
    stages = {str(done.parent.relative_to(finished)) for done in finished.rglob("done.json")}
    assert stages == {"stitch", "captioner", "relabel", "reference", "report", "seed-0/train/alt", "seed-0/train/mix",
                      *(f"seed-0/{stage}/{arm}" for stage in ("generate", "eval") for arm in ("base", "alt", "mix"))}
    report = json.loads((finished / "report" / "report.json").read_text())
    assert [(run["seed"], run["arm"]) for run in report["runs"]] == [(0, "base"), (0, "alt"), (0, "mix")]
    assert report["counts"]["relabel"]["images_in"] == report["counts"]["relabel"]["images_out"] == 48


def test_relabelling_keeps_every_member_and_adds_the_captions(finished: Path, world_shards: Path) -> None:
    for shard in sorted((world_shards / "train").glob("*.tar")):
        before, after = members(shard), members(finished / "relabel" / shard.name)
        assert {name: after[name] for name in before} == before
        keys = {name.split(".")[0] for name in before}
        assert set(after) - set(before) == {f"{key}.{extension}" for key in keys for extension in (
            "short.txt", "long.txt", "rich.txt", "mix.txt", "recap.json")}
        for key in keys:
            assert after[f"{key}.mix.txt"] in (after[f"{key}.short.txt"], after[f"{key}.long.txt"])
            record = json.loads(after[f"{key}.recap.json"])
            assert record["schema"] == 1 and set(record["captions"]) == {"short", "long", "rich"}


def test_a_second_run_does_nothing_at_once(finished: Path, arguments: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    started = time.monotonic()
    done = recap(*arguments)
    assert done.returncode == 0 and time.monotonic() - started < 10
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused_until_redo(finished: Path, arguments: list[str], tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    changed = [*arguments, f"runs={tmp_path}", "report.num_prompts=3"]
    done = recap(*changed)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("recap:")
    assert "report.num_prompts: 8 → 3" in done.stderr and "--redo" in done.stderr
    assert recap(*changed, "--redo").returncode == 0


def test_one_stage_alone_says_what_must_come_before(arguments: list[str], tmp_path: Path) -> None:
    done = recap("relabel", *arguments[1:], f"runs={tmp_path}")
    assert done.returncode == 2
    assert "recap finetune" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_dry_run_writes_nothing_and_lists_the_stages(arguments: list[str], tmp_path: Path) -> None:
    done = recap(*arguments, f"runs={tmp_path}", "--dry-run")
    assert done.returncode == 0 and done.stdout.count("to do") == 13
    assert list(tmp_path.iterdir()) == []


def test_stock_webdataset_reads_the_relabelled_shards(finished: Path) -> None:
    import webdataset
    shards = sorted(str(path) for path in (finished / "relabel").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert len(samples) == 48
    assert all(isinstance(sample["short.txt"], str) and sample["png"].size == (64, 64) for sample in samples)
    assert samples[0]["recap.json"]["schema"] == 1


def test_stock_datasets_reads_the_relabelled_shards(finished: Path, tmp_path: Path) -> None:
    import datasets
    found = datasets.load_dataset("webdataset", data_files=str(finished / "relabel" / "*.tar"), split="train",
                                  cache_dir=str(tmp_path))
    assert len(found) == 48
    assert {"png", "txt", "short.txt", "long.txt", "rich.txt", "recap.json"} <= set(found.column_names)


def test_stock_diffusers_draws_with_a_trained_arm(finished: Path) -> None:
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(finished / "seed-0" / "train" / "mix" / "pipeline")
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)


def test_stock_peft_opens_the_adapter(finished: Path, world_models: Path) -> None:
    from peft import PeftModel
    from transformers import Blip2ForConditionalGeneration
    base = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2")
    model = PeftModel.from_pretrained(base, str(finished / "captioner" / "adapter"))
    assert any("lora" in name for name, _ in model.named_parameters())


def test_arms_differ_in_nothing_but_captions(finished: Path) -> None:
    prompts = [(finished / "seed-0" / "generate" / arm / "prompts.jsonl").read_text() for arm in ("base", "alt", "mix")]
    assert prompts[0] == prompts[1] == prompts[2]


RESULTS = ("relabel/*.tar", "relabel/*_stats.json", "captioner/adapter/*", "seed-0/train/*/pipeline/**/*.safetensors",
           "seed-0/generate/*/*.png", "seed-0/eval/*/*.json", "reference/reference.npz")
VOLATILE = ("done.json",)  # holds how long the stage took


def results(run: Path) -> dict[str, bytes]:
    paths = {path for pattern in RESULTS for path in run.glob(pattern) if path.name not in VOLATILE}
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


@pytest.mark.full
def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(finished: Path, arguments: list[str],
                                                              tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    command = [str(Path(sys.executable).with_name("recap")), *arguments, f"runs={tmp_path}"]
    waiting = sorted(str(done.parent.relative_to(finished)) for done in finished.rglob("done.json"))
    draw = random.Random(0)
    killed = []
    for _ in range(4 * len(waiting)):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stage = _wait_for_a_stage(process, run, waiting)
        if stage is None:
            break
        time.sleep(draw.uniform(0, 1.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if not (run / stage / "done.json").exists():
            killed.append(stage)
            waiting.remove(stage)
        else:
            shutil.rmtree(run / stage)  # it was quicker than the kill: once more
    assert {"stitch", "captioner", "relabel", "seed-0/train/mix", "seed-0/generate/mix"} <= set(killed)
    assert recap(*arguments, f"runs={tmp_path}").returncode == 0
    assert results(run) == results(finished)


def _wait_for_a_stage(process: "subprocess.Popen[bytes]", run: Path, waiting: list[str]) -> str | None:
    """The first of the waiting stages that begins; None when the process ends before."""
    while process.poll() is None:
        for stage in waiting:
            if (run / stage / "config.json").exists() and not (run / stage / "done.json").exists():
                return stage
        time.sleep(0.02)
    return None
