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
from typing import Any

import pytest
from conftest import recap, recap_here

from recap.config import validate
from recap.errors import UserError
from recap.pipeline import Experiment, Plan

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"
QUICK = ["finetune.steps=6", "finetune.checkpoint_every=2", "train.steps=6", "train.checkpoint_every=2",
         "finetune.batch_size=8", "train.batch_size=8",
         "generate.num_prompts=2", "generate.num_inference_steps=2", "generate.batch_size=3", "stitch.num_images=8",
         "relabel.batch_size=8", "styles.long.max_new_tokens=24", "styles.long.num_beams=1",
         'arms=["base", "alt", "mix"]']


def settings(models: Path, shards: Path, runs: Path) -> list[str]:
    """Overrides that point configs/tiny.toml at the tests' checkpoints and shards."""
    return [*QUICK, f"runs={runs}", f"data.shards={shards}/train/*.tar", f"stitch.shards={shards}/tuning/*.tar",
            f"generate.prompts={shards}/prompts/evaluation/*.jsonl",
            f"evaluate.reference={shards}/evaluation/*.tar", f"evaluate.judge.model={models}/reader",
            "stitch.detr.threshold=0.02", f"stitch.detr.model={models}/detr",
            f"captioner.model={models}/blip2", f"train.model={models}/stable-diffusion-0",
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
    assert "arms “mix” and “alt”" in done.stdout or "Pictures of the arm “mix”" in done.stdout  # the verdict
    return Path(next(a for a in arguments if a.startswith("runs=")).removeprefix("runs=")) / "tiny"


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def test_every_stage_leaves_its_folder_and_the_report(finished: Path) -> None:
    stages = {str(done.parent.relative_to(finished)) for done in finished.rglob("done.json")}
    measured = {stage for stage in stages if stage.startswith("measured/")}
    assert measured == {"measured/reference/features", *(
        f"measured/seed-0/eval/{arm}/{gauge}" for arm in ("base", "alt", "mix")
        for gauge in ("features", "clip_score", "judge"))}
    assert stages - measured == {"facts/detr", "stitch", "captioner", "relabel", "reference", "report",
                                 "seed-0/train/alt", "seed-0/train/mix", *(
                                     f"seed-0/{stage}/{arm}" for stage in ("generate", "eval")
                                     for arm in ("base", "alt", "mix"))}
    assert {path.name for path in (finished / "report").iterdir()} >= {"index.html", "report.json", "table.md",
                                                                       "metrics.csv", "comparisons.csv"}
    report = json.loads((finished / "report" / "report.json").read_text())
    assert [(run["seed"], run["arm"]) for run in report["runs"]] == [(0, "base"), (0, "alt"), (0, "mix")]
    assert report["counts"]["relabel"]["images_in"] == report["counts"]["relabel"]["images_out"] == 48


def test_relabelling_keeps_every_member_and_adds_the_captions(finished: Path, world_shards: Path) -> None:
    for shard in sorted((world_shards / "train").glob("*.tar")):
        before, after = members(shard), members(finished / "relabel" / shard.name)
        assert {name: after[name] for name in before} == before
        keys = {name.split(".")[0] for name in before}
        assert set(after) - set(before) == {f"{key}.{extension}" for key in keys for extension in (
            "short.txt", "long.txt", "mix.txt", "recap.json")}
        for key in keys:
            assert after[f"{key}.mix.txt"] in (after[f"{key}.short.txt"], after[f"{key}.long.txt"])
            record = json.loads(after[f"{key}.recap.json"])
            assert record["schema"] == 1 and set(record["captions"]) == {"short", "long"}


def test_a_second_run_does_nothing_at_once(finished: Path, arguments: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    started = time.monotonic()
    done = recap(*arguments)
    assert done.returncode == 0 and time.monotonic() - started < 10
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused_until_redo(finished: Path, arguments: list[str], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    changed = [*arguments, f"runs={tmp_path}", "report.num_prompts=3"]
    assert recap_here(*changed) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("recap:")
    assert "report.num_prompts: 8 → 3" in last and "--redo" in last
    assert recap_here(*changed, "--redo") == 0
    report = json.loads((tmp_path / "tiny" / "report" / "report.json").read_text())
    assert report["config"]["report"]["num_prompts"] == 3


def test_one_stage_alone_says_what_must_come_before(arguments: list[str], tmp_path: Path) -> None:
    done = recap("relabel", *arguments[1:], f"runs={tmp_path}")
    assert done.returncode == 2
    assert "recap finetune" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_what_was_made_with_other_settings_is_not_called_missing(finished: Path, arguments: list[str],
                                                                 tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    done = recap("relabel", *arguments[1:], f"runs={tmp_path}", "finetune.lr=1e-3")
    assert done.returncode == 2 and "other settings (finetune.lr: 0.002 → 0.001)" in done.stderr
    done = recap(*arguments, f"runs={tmp_path}", "styles.long.max_new_tokens=25", "--dry-run")
    lines = done.stdout.splitlines()
    assert [next(line for line in lines if stage in line).split()[-1] for stage in ("stitch", "captioner")] == [
        "before", "before"]  # decoding is no matter of tuning
    assert "needs --redo" in next(line for line in lines if "relabel" in line)


def test_a_dry_run_writes_nothing_and_lists_the_stages(arguments: list[str], tmp_path: Path) -> None:
    done = recap(*arguments, f"runs={tmp_path}", "--dry-run")
    assert done.returncode == 0 and done.stdout.count("to do") == 14
    assert list(tmp_path.iterdir()) == []


def test_stock_webdataset_reads_the_relabelled_shards(finished: Path) -> None:
    import webdataset
    shards = sorted(str(path) for path in (finished / "relabel").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert len(samples) == 48
    assert all(isinstance(sample["short.txt"], str) and sample["png"].size == (32, 32) for sample in samples)
    assert samples[0]["recap.json"]["schema"] == 1


def test_stock_datasets_reads_the_relabelled_shards(finished: Path, tmp_path: Path) -> None:
    import datasets
    found = datasets.load_dataset("webdataset", data_files=str(finished / "relabel" / "*.tar"), split="train",
                                  cache_dir=str(tmp_path))
    assert len(found) == 48
    assert {"png", "txt", "short.txt", "long.txt", "recap.json"} <= set(found.column_names)


def test_stock_diffusers_draws_with_a_trained_arm(finished: Path) -> None:
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(finished / "seed-0" / "train" / "mix" / "pipeline")
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (32, 32)


def test_stock_peft_opens_the_adapter(finished: Path, world_models: Path) -> None:
    from peft import PeftModel
    from transformers import Blip2ForConditionalGeneration
    base = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2")
    model = PeftModel.from_pretrained(base, str(finished / "captioner" / "last"))
    assert any("lora" in name for name, _ in model.named_parameters())


def test_arms_differ_in_nothing_but_captions(finished: Path) -> None:
    prompts = [(finished / "seed-0" / "generate" / arm / "prompts.jsonl").read_text() for arm in ("base", "alt", "mix")]
    assert prompts[0] == prompts[1] == prompts[2]


RESULTS = ("relabel/*.tar", "relabel/*_stats.json", "captioner/last/*", "seed-0/train/*/pipeline/**/*.safetensors",
           "seed-0/generate/*/*.png", "seed-0/eval/*/*.json", "seed-0/eval/*/*.npz", "reference/reference.npz")
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


# --- fingerprints: what a stage reads, and nothing else --------------------------------------------------------------


def plan(folder: Path, **tables: dict[str, Any]) -> Plan:
    """Of an experiment with shards for training and two prompt sets, none of whose checkpoints is local."""
    (folder / "prompts").mkdir(exist_ok=True)
    for name in ("prompts/seen.jsonl", "prompts/probe.jsonl", "00000.tar", "reference.tar"):
        if not (folder / name).exists():  # fingerprints cover times
            (folder / name).touch()
    content = {"name": "mine", "runs": str(folder / "runs"), "device": "cpu", "arms": ["alt", "mix"],
               "train": {"shards": str(folder / "00000.tar")}, "arm": tables.get("arm", {}),
               "generate": {"prompts": str(folder / "prompts" / "*.jsonl")} | tables.get("generate", {}),
               "evaluate": {"reference": str(folder / "reference.tar")} | tables.get("evaluate", {}),
               "report": tables.get("report", {})}
    return Plan(validate(content, Experiment, "mine.toml"))


def fingerprints(found: Plan) -> dict[str, str]:
    return {str(stage.path.relative_to(found.root)): stage.dir.fingerprint for stage in found.stages()}


def changed(before: dict[str, str], after: Plan) -> set[str]:
    now = fingerprints(after)
    return {stage for stage, fingerprint in before.items() if now[stage] != fingerprint}


def test_an_arms_guidance_is_of_its_pictures_and_not_of_its_training(tmp_path: Path) -> None:
    after = plan(tmp_path, arm={"mix": {"guidance_scale": 4}})
    assert changed(fingerprints(plan(tmp_path)), after) == {"seed-0/generate/mix", "seed-0/eval/mix", "report"}
    scales = {stage.path.name: stage.reads()["generate"]["guidance_scale"] for stage in after.stages()
              if stage.verb == "generate"}
    assert scales == {"alt": 7.5, "mix": 4}


def cached(folder: Path, **tables: dict[str, Any]) -> Plan:
    """Of an experiment that relabels, and encodes images once."""
    for part in ("unet", "vae"):
        (folder / "base" / part).mkdir(parents=True, exist_ok=True)
    for name in ("00000.tar", "reference.tar", "prompts.txt"):
        if not (folder / name).exists():
            (folder / name).write_text("a cat")
    train = {"model": str(folder / "base"), "cache_latents": True}
    content = {"name": "mine", "runs": str(folder / "runs"), "device": "cpu", "arms": ["base", "alt", "mix"],
               "data": {"shards": str(folder / "00000.tar")}, "captioner": {"tuned": "none"},
               "generate": {"prompts": str(folder / "prompts.txt")},
               "evaluate": {"reference": str(folder / "reference.tar")},
               **tables, "train": train | tables.get("train", {})}
    return Plan(validate(content, Experiment, "mine.toml"))


def test_latents_are_made_before_the_first_training_and_all_trainings_need_them(tmp_path: Path) -> None:
    stages = cached(tmp_path).stages()
    verbs = [stage.verb for stage in stages]
    latents = stages[verbs.index("latents")]
    assert verbs.index("latents") < verbs.index("train") and verbs.count("latents") == 1
    assert all((latents in stage.needs) == (stage.verb == "train") for stage in stages)
    assert not latents.needs  # of the captioner
    assert all(stage.reads()["latents"] == latents.dir.fingerprint for stage in stages if stage.verb == "train")
    for table in ({"train": {"cache_latents": False}}, {"arms": ["base"]}):
        assert "latents" not in [stage.verb for stage in cached(tmp_path, **table).stages()]


def test_latents_are_of_the_images_and_the_vae_and_of_nothing_else(tmp_path: Path) -> None:
    before = fingerprints(cached(tmp_path))
    trainings = {"seed-0/train/alt", "seed-0/train/mix"}
    of_the_arms = {f"seed-0/{verb}/{arm}" for verb in ("train", "generate", "eval") for arm in ("alt", "mix")}
    captions = {"relabel", *of_the_arms, "report"}
    assert changed(before, cached(tmp_path, captioner={"tuned": "none", "model": "another/captioner"})) == captions
    assert changed(before, cached(tmp_path, relabel={"seed": 7})) == captions
    assert changed(before, cached(tmp_path, train={"lr": 1})) == {*of_the_arms, "report"}
    assert not changed(before, cached(tmp_path, train={"num_workers": 7, "log_every": 3}))
    for change in ({"resolution": 64}, {"flip": True}, {"buckets": {}}, {"precision": "bf16"}):
        assert {"latents", *of_the_arms, "report"} == changed(before, cached(tmp_path, train=change))
    (tmp_path / "base" / "unet" / "weights").touch()
    assert changed(before, cached(tmp_path)) >= trainings and "latents" not in changed(before, cached(tmp_path))
    (tmp_path / "base" / "vae" / "weights").touch()
    assert "latents" in changed(before, cached(tmp_path))
    before = fingerprints(cached(tmp_path))
    (tmp_path / "00000.tar").write_text("another cat")
    assert {"relabel", "latents", *trainings} <= changed(before, cached(tmp_path))


def test_headline_sets_and_judge_are_of_the_evaluation(tmp_path: Path) -> None:
    judge = {"target": "json:JSONDecoder", "model": str(tmp_path / "judge")}
    (tmp_path / "judge").mkdir()
    evaluations = {"seed-0/eval/alt", "seed-0/eval/mix", "report"}
    before = fingerprints(plan(tmp_path))
    assert changed(before, plan(tmp_path, evaluate={"sets": ["seen"]})) == evaluations
    assert changed(before, plan(tmp_path, evaluate={"judge": judge})) == evaluations
    before = fingerprints(plan(tmp_path, evaluate={"judge": judge}))
    (tmp_path / "judge" / "weights").write_text("other")
    assert changed(before, plan(tmp_path, evaluate={"judge": judge})) == evaluations


def test_a_caption_that_was_edited_is_learned_anew(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    captions = tmp_path / "set" / "metadata.jsonl"
    tuning = {"captioner": {"model": str(tmp_path)}, "finetune": {"dataset": {
        "format": "imagefolder", "captions": str(tmp_path / "set"), "images": str(tmp_path / "set" / "images")}}}
    found = set()
    for text in ("a dog", "a good dog"):
        captions.write_text(json.dumps({"file_name": "1.png", "text": text}))
        found.add(Plan(validate({"name": "mine", **tuning}, Experiment, "mine.toml")).finetune(None).dir.fingerprint)
    assert len(found) == 2


def test_a_result_beside_is_of_the_report(tmp_path: Path) -> None:
    beside = {"beside": str(tmp_path / "other.json")}
    result = {"schema": 1, "runs": [{"arm": "alt", "metrics": {"fid": 1}}]}
    (tmp_path / "other.json").write_text(json.dumps(result))
    before = fingerprints(plan(tmp_path, report=beside))
    (tmp_path / "other.json").write_text(json.dumps(result | {"title": "Another"}))
    assert changed(before, plan(tmp_path, report=beside)) == {"report"}


@pytest.mark.parametrize(("tables", "says"), [
    ({"evaluate": {"sets": ["sene"]}}, "evaluate.sets: no prompt set 'sene' in generate.prompts: did you mean seen?"),
    ({"evaluate": {"judge": {"target": "no_such_module:Judge", "model": "."}}}, "evaluate.judge.target: no module"),
    ({"evaluate": {"judge": {"target": "json:JSONDecoder", "model": "no-such"}}}, "evaluate.judge.model: no folder at"),
    ({"generate": {"prompts": ["{folder}/prompts/seen.jsonl", "{folder}/seen.txt"]}}, "rename one of them"),
    ({"report": {"beside": "no-such.json"}}, "report.beside: no file at no-such.json"),
    ({"report": {"beside": "{folder}/beside.json"}}, "is not the result of a run"),
    ({"report": {"compare_sets": [["seen", "sene"]]}}, "report.compare_sets: no prompt set 'sene'"),
])
def test_what_later_stages_miss_is_said_before_the_first(tmp_path: Path, tables: dict[str, Any], says: str) -> None:
    (tmp_path / "seen.txt").write_text("a cat\n")
    (tmp_path / "beside.json").write_text("{}")
    tables = json.loads(json.dumps(tables).replace("{folder}", str(tmp_path)))
    with pytest.raises(UserError) as caught:
        fingerprints(plan(tmp_path, **tables))
    assert says in str(caught.value) and "\n" not in str(caught.value)
