"""Searching settings of fine-tuning: every combination once, the same trials after a stop, failures recorded."""

import builtins
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from recap import training
from recap.config import load
from recap.config.finetune import Finetune
from recap.config.sweep import Dimension
from recap.errors import UserError
from recap.pipeline import Experiment
from recap.rundir import StageDir
from recap.shards import Reject, ShardWriter, read_shard
from recap.sweep import sweep
from recap.sweep.result import overrides, table
from recap.sweep.space import combinations
from recap.training import Training

EXPERIMENT = """
runs = "{runs}"
device = "cpu"

[styles]
long = {{ prompt = "A detailed caption:", max_new_tokens = 8 }}

[captioner]
family = "transformer"
dtype = "float32"

[captioner.transformer]
encoder = "none"
hidden_size = 16
num_layers = 1
num_heads = 2
vocab_size = 400
image_size = 32
patch_size = 16

[finetune]
shards = "{shard}"
steps = 4
batch_size = 4
checkpoint_every = 1
max_tokens = 24
validation = {{ share = 0.4, every = 4 }}

[sweep]
{sweep}
"""
GRID = 'sampler = "grid"\n[sweep.space]\nfinetune.lr = [1e-3, 1e-2]\ncaptioner.transformer.num_layers = [1, 2]'
TWO = 'sampler = "grid"\n[sweep.space]\nfinetune.lr = [1e-3, 1e-2]'
TPE = """sampler = "tpe"\ntrials = {trials}\nseed = {seed}\n[sweep.space]
finetune.lr = {{ low = 1e-4, high = 1e-1, log = true }}
finetune.batch_size = {{ low = 2, high = 6, step = 2 }}
finetune.lr_scheduler = ["constant", "cosine"]"""


@pytest.fixture(scope="module")
def shard(world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Drawn images with their exact description as `long`."""
    path = tmp_path_factory.mktemp("stitched") / "00000.tar"
    rejects: list[Reject] = []
    with ShardWriter(str(path)) as writer:
        for sample in list(read_shard(str(world_shards / "evaluation" / "00000.tar"), rejects))[:6]:
            sample.members["long.txt"] = sample.members["exact.txt"]
            writer.write(sample)
    return str(path)


class Sweeps:
    """Sweeps of one experiment file in a folder of the test's own."""

    def __init__(self, folder: Path, shard: str) -> None:
        self.folder, self.shard = folder, shard

    def file(self, text: str, name: str = "mine") -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(EXPERIMENT.format(runs=self.folder / "runs", shard=self.shard, sweep=text))
        return path

    def run(self, text: str, *overrides: str, name: str = "mine", redo: bool = False) -> dict[str, Any]:
        sweep(load(self.file(text, name), overrides, Experiment), redo)
        return self.result(name)

    def path(self, name: str = "mine") -> Path:
        return self.folder / "runs" / name / "sweep"

    def result(self, name: str = "mine") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path(name) / "result.json").read_text())
        return found


@pytest.fixture
def sweeps(tmp_path: Path, shard: str) -> Sweeps:
    return Sweeps(tmp_path, shard)


def tried(result: dict[str, Any]) -> list[tuple[dict[str, Any], float | None]]:
    return [(trial["values"], trial["metric"]) for trial in result["trials"]]


@pytest.fixture(scope="module")
def whole(shard: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a sweep over `TWO` that nothing stopped."""
    return Sweeps(tmp_path_factory.mktemp("whole"), shard).run(TWO)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Stop before a step, so many steps of all trials later."""
    step, count = Training.step, iter(range(after))

    def stopping(self: Training, parts: Any, bar: Any) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt
        step(self, parts, bar)

    monkeypatch.setattr(Training, "step", stopping)


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials whose steps are taken from now on."""
    step, taken = Training.step, []

    def counting(self: Training, parts: Any, bar: Any) -> None:
        taken.append(self.stage.path.parent.name)
        step(self, parts, bar)

    monkeypatch.setattr(Training, "step", counting)
    return taken


# --- grid ----------------------------------------------------------------------------------------------------------


def test_a_grid_tries_every_combination_once(sweeps: Sweeps, capsys: pytest.CaptureFixture[str]) -> None:
    result = sweeps.run(GRID)
    key = "captioner.transformer.num_layers"
    assert [trial["values"] for trial in result["trials"]] == [
        {"finetune.lr": lr, key: layers} for lr in (1e-3, 1e-2) for layers in (1, 2)]
    assert all(trial["state"] == "complete" and trial["seconds"] > 0 for trial in result["trials"])
    for trial in result["trials"]:  # each is a stage of fine-tuning like any other
        done = json.loads((Path(trial["folder"]) / "done.json").read_text())
        assert done["best"] == trial["metric"] and (Path(trial["folder"]) / "best").is_dir()
    best = min(result["trials"], key=lambda trial: trial["metric"])
    assert result["best"]["name"] == best["name"]
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.split("The best is")[0].splitlines())
    assert out.splitlines()[-1] == overrides(best["values"])


def test_a_sweep_that_is_done_trains_nothing_again(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweeps.run(TWO, "finetune.steps=1")
    taken = count_steps(monkeypatch)
    assert sweeps.run(TWO, "finetune.steps=1", "finetune.lr=0.5") == first  # no trial reads the file's own value
    assert taken == []


def test_ranges_with_steps_are_a_grid_too() -> None:
    space = {"a": Dimension(low=1, high=3), "b": Dimension(low=0.1, high=0.35, step=0.1), "c": Dimension(values=["x"])}
    assert combinations(space) == [{"a": a, "b": b, "c": "x"} for a in (1, 2, 3) for b in (0.1, 0.2, 0.3)]
    assert Dimension(low=1, high=3).is_integer and not Dimension(low=1.0, high=3).is_integer


# --- TPE -----------------------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[Path]:
    """Instead of training, a loss that depends on the values; stopped at so many-th trial. The folders trained in."""
    trained: list[Path] = []

    def run(stage: StageDir, shards: list[str], config: Finetune, *rest: Any) -> dict[str, Any]:
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        trained.append(stage.path)
        return {"best": abs(math.log(config.lr) + 5) + config.batch_size / 7, "training_seconds": 1.0}

    monkeypatch.setattr("recap.finetune.run", run)
    return trained


def test_a_seed_gives_the_same_trials_also_after_stops(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """More trials than Optuna draws at random at first, so that the last ones follow from the metrics before."""
    pretend(monkeypatch)
    text = TPE.format(trials=16, seed=3)
    whole = sweeps.run(text, name="whole")
    for stop_at in (0, 4, 8):
        trained = pretend(monkeypatch, stop_at)
        with pytest.raises(KeyboardInterrupt):
            sweeps.run(text)
        assert len(trained) == stop_at
    pretend(monkeypatch)
    sweeps.run(TPE.format(trials=14, seed=3))
    last = pretend(monkeypatch)
    stopped = sweeps.run(text)  # two trials more go on with the same search
    assert tried(stopped) == tried(whole) and len(tried(whole)) == 16 and len(last) == 2
    for values, _ in tried(whole):
        assert 1e-4 <= values["finetune.lr"] <= 1e-1 and values["finetune.batch_size"] in (2, 4, 6)
    other = sweeps.run(TPE.format(trials=1, seed=4), name="other")
    assert tried(other)[0][0] != tried(whole)[0][0]


def test_what_a_kill_leaves_of_a_study_in_the_making_is_in_nobodys_way(sweeps: Sweeps,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    sweeps.path().mkdir(parents=True)
    for name in (".study.tmp.db", ".study.tmp.db-journal"):
        (sweeps.path() / name).write_bytes(b"half")
    assert [trial["state"] for trial in sweeps.run(TWO)["trials"]] == ["complete", "complete"]


def test_tpe_tries_nothing_twice_and_ends_when_all_is_tried(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    result = sweeps.run("trials = 9\n[sweep.space]\nfinetune.lr = [1e-3, 1e-2]")
    assert sorted(trial["values"]["finetune.lr"] for trial in result["trials"]) == [1e-3, 1e-2]


# --- stops ---------------------------------------------------------------------------------------------------------


def test_a_trial_that_was_stopped_goes_on_from_its_checkpoint(sweeps: Sweeps, whole: dict[str, Any],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 4 + 3)  # in the second trial, with three of its four steps done
    with pytest.raises(KeyboardInterrupt):
        sweeps.run(TWO)
    monkeypatch.undo()
    assert [trial["state"] for trial in sweeps.result()["trials"]] == ["complete"]
    taken = count_steps(monkeypatch)
    assert tried(sweeps.run(TWO)) == tried(whole)
    assert taken == ["trial-001"]


def test_a_stop_between_a_trials_end_and_the_study_costs_nothing(sweeps: Sweeps, whole: dict[str, Any],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("recap.sweep.study.Study.tell", stop)
        sweeps.run(TWO)
    taken = count_steps(monkeypatch)
    assert tried(sweeps.run(TWO)) == tried(whole)
    assert taken == ["trial-001"] * 4


@pytest.mark.full
def test_a_killed_sweep_goes_on(sweeps: Sweeps) -> None:
    text = TPE.format(trials=3, seed=0)
    slow = ["finetune.steps=60", "finetune.validation.every=20"]
    whole = sweeps.run(text, *slow, name="whole")
    command = [str(Path(sys.executable).with_name("recap")), "sweep", "-c", str(sweeps.file(text)), *slow]
    killed = 0
    for number in (0, 1, 1, 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        captioner = sweeps.path() / f"trial-{number:03d}" / "captioner"
        before = step_of(captioner)
        while process.poll() is None and step_of(captioner) <= before + 3:
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    last = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    assert tried(sweeps.result()) == tried(whole)
    assert "Traceback" not in last.stderr and "[I " not in last.stderr  # Optuna keeps silent


def step_of(captioner: Path) -> int:
    try:
        return int(json.loads((captioner / "checkpoint" / "state.json").read_text())["step"])
    except (FileNotFoundError, ValueError):  # none yet, or just being replaced
        return 0


# --- trials that fail ----------------------------------------------------------------------------------------------


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    rate, step = training.learning_rate, Training.step

    def exploding(config: Any, done: int) -> float:
        return 1e38 if config.lr == 1e-3 else rate(config, done)

    def full(self: Training, parts: Any, bar: Any) -> None:
        if self.config.batch_size == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        step(self, parts, bar)

    monkeypatch.setattr(training, "learning_rate", exploding)
    monkeypatch.setattr(Training, "step", full)
    text = 'sampler = "grid"\n[sweep.space]\nfinetune.lr = [1e-3, 1e-2]\nfinetune.batch_size = [5, 4]'
    result = sweeps.run(text)
    assert [trial["state"] for trial in result["trials"]] == ["failed"] * 3 + ["complete"]
    memory, loss = "out of memory: CUDA out of memory. Tried to allocate 2 GiB", result["trials"][1]["reason"]
    assert [trial["reason"] for trial in result["trials"]] == [memory, loss, memory, None]
    assert "finite" in loss or "loss is" in loss
    assert result["best"]["name"] == "trial-003"
    taken = count_steps(monkeypatch)
    assert sweeps.run(text) == result and taken == []  # what failed is not tried again


def test_memory_that_the_machine_does_not_have_fails_the_trial_even_if_it_is_the_first(sweeps: Sweeps) -> None:
    result = sweeps.run('sampler = "grid"\n[sweep.space]\ncaptioner.transformer.max_length = [10_000_000_000_000, 99]')
    assert [trial["state"] for trial in result["trials"]] == ["failed", "complete"]
    assert result["trials"][0]["reason"].startswith("out of memory: ")


def test_what_is_wrong_for_every_trial_stops_the_first(sweeps: Sweeps, world_shards: Path) -> None:
    plain = world_shards / "evaluation" / "00000.tar"
    with pytest.raises(UserError, match=r"sweep: trial-000 \(lr=0.001 num_layers=1\): .*stitch them first"):
        sweeps.run(GRID, f"finetune.shards={plain}")
    assert not (sweeps.path() / "result.json").exists()


def test_settings_that_do_not_fit_the_model_fail_once_another_trial_has_worked(sweeps: Sweeps) -> None:
    text = 'sampler = "grid"\n[sweep.space]\ncaptioner.transformer.num_heads = {0}'
    result = sweeps.run(text.format("[2, 3]"))
    assert [trial["state"] for trial in result["trials"]] == ["complete", "failed"]
    assert "ValueError: " in result["trials"][1]["reason"]
    with pytest.raises(UserError, match=r"trial-000 \(num_heads=3\): ValueError"):
        sweeps.run(text.format("[3, 2]"), name="other")


def test_a_sweep_in_which_nothing_works_says_why(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "learning_rate", lambda config, done: 1e38)
    with pytest.raises(UserError, match=r"no trial worked; the first: (.*finite|.*loss is)"):
        sweeps.run('sampler = "grid"\n[sweep.space]\nfinetune.lr = [1e-3]')
    assert sweeps.result()["best"] is None


# --- one clear line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "changes", "expected"), [
    ("[sweep.space]\nfinetune.lrr = [1e-3]", (), "sweep.space: unknown key finetune.lrr: did you mean finetune.lr?"),
    ("[sweep.space]\nfinetune.lr = [1e-3, -1.0]", (), "sweep.space: finetune.lr: Input should be greater than 0"),
    ("[sweep.space]\nfinetune.batch_size = { low = 8, high = 64.0 }", (), "finetune.batch_size: .*valid integer"),
    ("[sweep.space]\nfinetune.lr = 1e-3", (), "space.finetune.lr: give a list of values, or a range"),
    ("[sweep.space]\nfinetune.lr = { low = 1e-3, hihg = 1.0 }", (),
     "unknown key sweep.space.finetune.lr.hihg: did you mean sweep.space.finetune.lr.high"),
    ("[sweep.space]\nfinetune.lr = { low = 1e-3 }", (), "low and high: give both"),
    ("[sweep.space]\nfinetune.lr = [1e-3, 1e-3]", (), "named twice"),
    ("[sweep.space]\nfinetune.lr = { low = 0, high = 1.0, log = true }", (), "log goes with low above 0"),
    ('sampler = "grid"\n[sweep.space]\nfinetune.lr = { low = 0.1, high = 1.0 }', (), "grid needs a list of values"),
    ('sampler = "grid"\ntrials = 3\n[sweep.space]\nfinetune.lr = [0.1]', (), "trials is of tpe"),
    *((f"[sweep.space]\n{key}", (), f"with another {key.split(' ')[0]}, trials could not") for key in (
        "finetune.test_share = [0.1]", "finetune.validation = [{ share = 0.1 }, { share = 0.4 }]",
        "finetune.validation.every = [2, 4]", "finetune.max_tokens = [8, 16]", "finetune.shards = ['a.tar', 'b.tar']")),
    ("[sweep.space]\ncaptioner.transformer.vocab_size = [300, 400]", (), "a loss is a mean over tokens"),
    ("[sweep.space]\ntrain.lr = [1e-3, 1e-4]", (), "train.lr changes nothing that this experiment's fine-tuning reads"),
    ("[sweep.space]\ncaptioner.cnn_lstm.hidden_size = [8, 9]", (), "captioner.cnn_lstm.hidden_size changes nothing"),
    ("[sweep.space]\nfinetune.lr = [1e-3]", ("finetune.validation.share=0",), "set finetune.validation.share"),
    ("[sweep.space]\nfinetune.lr = [1e-3]", ("finetune.shards=none/*.tar",), "nothing at none"),
    ("[sweep.space]\nfinetune.steps.many = [1]", (), "finetune.steps: Input should be a valid integer"),
    ("[sweep.space]\nfinetune.lr = [1e-3]\n'finetune.lr.x' = [1]", (), "lr is a key of the space itself"),
    ("space = {}", (), "sweep.space"),
])
def test_a_sweep_that_is_wrong_trains_nothing(text: str, changes: tuple[str, ...], expected: str, sweeps: Sweeps,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    taken = count_steps(monkeypatch)
    with pytest.raises(UserError, match=expected) as caught:
        sweeps.run(text, *changes)
    assert "\n" not in str(caught.value) and taken == []


def test_no_table_and_no_optuna_are_one_clear_line(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    exp = load(sweeps.file("[sweep.space]\nfinetune.lr = [1e-3]"), [], Experiment)
    with pytest.raises(UserError, match=r"no \[sweep\] table"):
        sweep(exp.model_copy(update={"sweep": None}))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("optuna"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'recap-t2i\[sweep\]'"):
        sweep(exp)


def test_a_changed_space_is_refused_or_begun_anew(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    one = 'sampler = "grid"\n[sweep.space]\nfinetune.lr = {0}'
    sweeps.run(one.format("[1e-3]"), "finetune.steps=1")
    with pytest.raises(UserError, match=r"sweep\.space\.finetune\.lr\.values: \[0\.001\] → .*name=…, or --redo"):
        sweeps.run(one.format("[1e-3, 1e-2]"), "finetune.steps=1")
    with pytest.raises(UserError, match=r"trial\.finetune\.steps: 1 → 2"):
        sweeps.run(one.format("[1e-3]"), "finetune.steps=2")
    assert len(sweeps.result()["trials"]) == 1
    result = sweeps.run(one.format("[1e-3, 1e-2]"), "finetune.steps=1", redo=True)
    assert len(result["trials"]) == 2


# --- what is compared, and what is shown ---------------------------------------------------------------------------


def test_the_metric_chooses_the_best_trial_and_its_weights(sweeps: Sweeps) -> None:
    result = sweeps.run('sampler = "grid"\nmetric = "cider_d"\n[sweep.space]\nfinetune.lr = [1e-3, 1e-2]')
    assert result["direction"] == "maximize"
    assert result["best"]["metric"] == max(trial["metric"] for trial in result["trials"])
    config = json.loads((Path(result["best"]["folder"]) / "config.json").read_text())
    assert config["reads"]["finetune"]["validation"]["select_by"] == "cider_d"
    assert result["best"]["overrides"].endswith("finetune.validation.select_by=cider_d")


def test_trials_learn_from_what_the_run_stitched(sweeps: Sweeps, world_shards: Path, world_models: Path) -> None:
    """Without captions of its own, the experiment stitches once, and all trials read that."""
    path = sweeps.file('sampler = "grid"\n[sweep.space]\nfinetune.lr = [1e-3, 1e-2]')
    path.write_text(path.read_text().replace(f'shards = "{sweeps.shard}"\n', ""))
    exp = load(path, [f"data.shards={world_shards}/train/*.tar", "stitch.num_images=6", "finetune.steps=1",
                      f"stitch.detr.model={world_models}/detr", "finetune.max_tokens=64"], Experiment)
    sweep(exp)
    assert sorted(child.name for child in sweeps.path().parent.iterdir() if child.name[0] != ".") == [
        "facts", "stitch", "sweep"]
    assert [trial["state"] for trial in sweeps.result()["trials"]] == ["complete", "complete"]


def test_overrides_come_back_as_the_values_they_were(sweeps: Sweeps) -> None:
    values = {"finetune.lr": 1.2345678901234567e-05, "finetune.batch_size": 16, "finetune.cache_features": True,
              "finetune.lr_scheduler": "cosine", "captioner.model": "my models/it's $HOME", "finetune.precision": "no",
              "finetune.lora.qformer": ["query", "key"], "captioner.revision": "12",
              "styles.long": {"prompt": "a = b", "max_new_tokens": 8}}
    exp = load(sweeps.file(GRID), shlex.split(overrides(values)), Experiment)
    assert (exp.finetune.lr, exp.finetune.batch_size, exp.finetune.cache_features) == (1.2345678901234567e-05, 16, True)
    assert (exp.captioner.model, exp.captioner.revision) == ("my models/it's $HOME", "12")
    assert exp.finetune.lora.qformer == ["query", "key"] and exp.styles["long"].prompt == "a = b"


def test_a_table_among_the_values_goes_into_the_files_own(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    text = 'sampler = "grid"\n[sweep.space]\nfinetune.augment = [{ flip = 0.5 }]'
    best = sweeps.run(text, "finetune.augment.crop=0.9")["best"]
    config = json.loads((Path(best["folder"]) / "config.json").read_text())["reads"]["finetune"]["augment"]
    assert (config["flip"], config["crop"], best["overrides"]) == (0.5, 0.9, "finetune.augment.flip=0.5")


def test_the_table_is_best_first_within_80_columns() -> None:
    def entry(number: int, state: str, metric: float | None, reason: str | None = None) -> dict[str, Any]:
        return {"number": number, "name": f"trial-{number:03d}", "state": state, "metric": metric, "seconds": 3.25,
                "reason": reason, "values": {"finetune.lr": 1e-5 * (number + 1), "captioner.model": "m" * 120}}
    trials = [entry(0, "failed", None, "finetune: the loss is nan at step 5, " + "with many a key, " * 9),
              entry(1, "complete", 2.5), entry(2, "complete", 1.5), entry(3, "running", None)]
    lines = table({"metric": "loss", "trials": trials}).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("trial-")] == [
        "trial-002", "trial-001", "trial-000", "trial-003"]
