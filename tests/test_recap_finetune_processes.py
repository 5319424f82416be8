"""Tuning in real processes: killed with SIGKILL and run again, and shared by two of them.

The processes are forked from a server that has the imports behind it, and each runs the command line; the tests marked
`full` start the installed command and torchrun.
"""

import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recap
from PIL import Image
from safetensors.torch import load_file

from recap.caption_sets import read_dataset
from recap.config.finetune import Dataset
from recap.errors import BadSample
from recap.pairs import usable
from recap.sample import MAX_TEXT_BYTES
from recap.shards import Reject, ShardWriter, read_shard

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload([
    "recap.finetune", "recap.cli", "recap.pipeline", "eval.captions", "matplotlib.figure",
    "matplotlib.backends.backend_svg", "transformers.models.opt.modeling_opt", *(
        f"recap.captioners.{family}" for family in ("blip2", "blip", "clipcap", "transformer", "cnn_lstm"))])
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMEOUT = 240.0
FAMILIES: dict[str, list[str]] = {
    "blip2": ['captioner.model="{models}/blip2"'],
    "blip": ['captioner.model="{models}/blip"'],
    "clipcap": ['captioner.clipcap.clip="{models}/clip-1"', 'captioner.clipcap.gpt2="{models}/gpt2"'],
    "transformer": ["captioner.transformer={{encoder='none', patch_size=8, num_heads=2, hidden_size=32, num_layers=1, "
                    "vocab_size=400, image_size=32, dropout={dropout}}}"],
    "vlm": [],
    "cnn_lstm": ["captioner.cnn_lstm={{encoder='{models}/cnn', hidden_size=32, num_layers=1, vocab_size=400, "
                 "image_size=32, dropout={dropout}}}"]}
EXPERIMENT = """
device = "cpu"
captioner.dtype = "float32"
train.model = "unused"
evaluate.features.model = "unused"
evaluate.clip_score.model = "unused"

[styles.short]
prompt = "A short caption:"
max_new_tokens = 6

[styles.long]
prompt = "A detailed caption:"
max_new_tokens = 12

[finetune]
steps = 8
batch_size = 5
micro_batch_size = 2
lr = 1e-3
max_tokens = 24
checkpoint_every = 2
validation = {share = 0.34, every = 3}
"""


# --- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """When a process kills itself: before a function is called for the `call`-th time."""

    function: str
    """`module:name` or `module:Class.name`."""
    call: int
    is_deadly: bool = True
    """If not, that image is one that can't be read."""


@dataclass(frozen=True)
class Work:
    """A `recap finetune` to run."""

    arguments: list[str]
    out: Path
    """The stage's folder."""

    def weights(self, name: str = "last") -> dict[str, torch.Tensor]:
        return {key: value for file in sorted((self.out / name).glob("*.safetensors"))
                for key, value in load_file(file).items()}

    def bytes(self) -> dict[str, bytes]:
        """All weights that are kept, as they are on the disk."""
        return {str(file.relative_to(self.out)): file.read_bytes() for file in sorted(self.out.glob("*/*.safetensors"))}

    def result(self) -> dict[str, Any]:
        """What `done.json` says, but for times."""
        found = json.loads((self.out / "done.json").read_text())
        return {key: value for key, value in found.items() if key not in (
            "seconds", "training_seconds", "images_per_second")}

    def losses(self) -> dict[int, float]:
        """The training's curve; what is logged again after a kill takes the place of what was there."""
        events = [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]
        return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


Start = Callable[..., Work]


@pytest.fixture(scope="module")
def work_of(world_shards: Path, world_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`work_of(family, *overrides)`: to tune on six drawn images, whose exact description is `long`, and its first
    words `short`.
    """
    folder = tmp_path_factory.mktemp("experiment")
    rejects: list[Reject] = []
    with ShardWriter(str(folder / "stitched" / "00000.tar")) as writer:
        for sample in list(read_shard(str(world_shards / "evaluation" / "00000.tar"), rejects))[:6]:
            exact = sample.members["exact.txt"]
            sample.members |= {"long.txt": exact, "short.txt": b" ".join(exact.split()[:5])}
            writer.write(sample)
    (folder / "e.toml").write_text(EXPERIMENT)
    shards = [f"data.shards={world_shards}/train/*.tar", f"evaluate.reference={world_shards}/evaluation/*.tar",
              f"generate.prompts={world_shards}/prompts/evaluation/*.jsonl",
              f"finetune.shards={folder}/stitched/*.tar"]
    numbers = itertools.count()

    def start(family: str, *overrides: str, dropout: float = 0.1) -> Work:
        runs = folder / f"runs-{next(numbers)}"
        model = [each.format(models=world_models, dropout=dropout) for each in FAMILIES[family]]
        return Work(["finetune", "-c", str(folder / "e.toml"), *shards, f"captioner.family={family}", *model,
                     f"finetune.lora={{rank = 4, dropout = {dropout}}}", f"runs={runs}", *overrides],
                    runs / "e" / "captioner")

    return start


def run(work: Work, num_processes: int = 1, fault: Fault | None = None, faulty: int = 0) -> tuple[list[int], str]:
    """Run the command in processes of its own. When one ends badly the others are ended, as torchrun does.

    Args:
        fault: of the process of rank `faulty`.

    Returns:
        Exit statuses by rank, negative for signals, and what was written to standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work.out.parent.mkdir(parents=True, exist_ok=True)
    log = work.out.parent / "stderr.txt"
    log.unlink(missing_ok=True)
    processes = []
    for rank in range(num_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if num_processes > 1 else {}
        environment = {name: str(value) for name, value in place.items()}
        process = FORKS.Process(target=_main, args=(
            work.arguments, environment, log, fault if rank == faulty else None))
        process.start()
        processes.append(process)
    _wait(processes)
    return [process.exitcode or 0 for process in processes], log.read_text()


def _wait(processes: list[ForkServerProcess]) -> None:
    end = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes):
        is_late = time.monotonic() > end
        if is_late or any(process.exitcode for process in processes):
            time.sleep(0.5)  # for one that is just speaking
            for process in processes:
                process.kill()
        time.sleep(0.02)
        assert not is_late, f"still at work after {TIMEOUT} s"
    for process in processes:
        process.join()


def _main(arguments: list[str], environment: dict[str, str], log: Path, fault: Fault | None) -> None:
    """What a process does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    if fault is not None:
        _arrange(fault)
    from recap.cli import main
    main(arguments)


def _arrange(fault: Fault) -> None:
    module, _, path = fault.function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), itertools.count(1)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == fault.call:
            if not fault.is_deadly:
                raise BadSample("missing_image")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, faulty)


# --- killed --------------------------------------------------------------------------------------------------------

Moment = tuple[Fault, list[str], list[str]]
"""When; and what is there afterwards and what is not, which shows that the moment is the one that is meant."""

# Of 8 steps, with a checkpoint at 2, 4, … and a validation at 3, 6 and 8.
MOMENTS: dict[str, Moment] = {
    "as images are checked": (Fault("recap.pairs:decode_image", 3), [], ["quarantine.jsonl"]),
    "in a step": (Fault("recap.training:Training._backward", 6), ["checkpoint", "best"], ["last"]),
    "as a checkpoint's weights are written": (
        Fault("recap.checkpoint:save_file", 2), [".checkpoint.tmp", "checkpoint"], [".checkpoint.tmp/state.json"]),
    "as a checkpoint reaches the disk": (
        Fault("recap.checkpoint:_sync", 3), [".checkpoint.tmp/state.json", "checkpoint"], []),
    "between a checkpoint's two renames": (
        Fault("pathlib:Path.rename", 4), [".checkpoint.tmp", ".checkpoint.old"], ["checkpoint"]),
    "in a validation": (
        Fault("recap.validation:Validator._figures", 3), ["checkpoint", "best"], ["sheets/000006.html"]),
    "between the old best weights and the new": (
        Fault("pathlib:Path.rename", 5), [".best.tmp", "checkpoint"], ["best"]),
    "between a validation and its checkpoint": (
        Fault("recap.training:Training.save", 3), ["best", "sheets/000006.html"], ["last"]),
    "after the last step": (Fault("recap.training:Training.finish", 1), ["checkpoint", "best"], ["last"]),
    "before the stage is done": (Fault("recap.rundir:StageDir.finish", 1), ["checkpoint", "last"], ["done.json"]),
}
CACHING: dict[str, Moment] = {
    "as features are computed": (Fault("recap.pairs:open_image", 4), ["features.tmp"], ["features.npy"]),
    "in a step": (Fault("recap.training:Training._backward", 6), ["features.npy", "checkpoint"], []),
    "after features are deleted": (Fault("recap.rundir:StageDir.finish", 1), ["last"], ["features.npy", "done.json"]),
}


def check_kill(work: Work, whole: Work, moment: Moment) -> None:
    fault, there, not_there = moment
    assert run(work, fault=fault)[0] == [-signal.SIGKILL]
    assert [name for name in there if not (work.out / name).exists()] == []
    assert [name for name in not_there if (work.out / name).exists()] == []
    check_done(run(work))
    assert work.bytes() == whole.bytes() and len(work.bytes()) == 2
    assert work.result() == whole.result() and work.losses() == whole.losses()


def check_done(found: tuple[list[int], str]) -> None:
    statuses, said = found
    assert set(statuses) == {0}, said


@pytest.fixture(scope="module")
def whole(work_of: Start) -> Start:
    """Runs that nothing interrupts, each once."""
    found: dict[tuple[Any, ...], Work] = {}

    def run_once(family: str, *overrides: str, num_processes: int = 1, dropout: float = 0.1) -> Work:
        key = (family, overrides, num_processes, dropout)
        if key not in found:
            work = work_of(family, *overrides, dropout=dropout)
            check_done(run(work, num_processes))
            found[key] = work
        return found[key]

    return run_once


@pytest.mark.parametrize("moment", ["in a step", "between a checkpoint's two renames"])
def test_a_killed_run_ends_with_the_same_bytes(moment: str, work_of: Start, whole: Start) -> None:
    check_kill(work_of("blip2"), whole("blip2"), MOMENTS[moment])


@pytest.mark.full
@pytest.mark.parametrize("family", ["blip2", "blip"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(moment: str, family: str, work_of: Start,
                                                             whole: Start) -> None:
    check_kill(work_of(family), whole(family), MOMENTS[moment])


@pytest.mark.full
@pytest.mark.parametrize("moment", CACHING)
def test_a_run_killed_with_kept_features_ends_with_the_same_bytes(moment: str, work_of: Start, whole: Start) -> None:
    kept = "finetune.cache_features=true"
    check_kill(work_of("blip2", kept), whole("blip2", kept), CACHING[moment])


def test_a_run_killed_after_it_stopped_early_takes_no_further_step(work_of: Start, whole: Start) -> None:
    early = ["finetune.lr=10", "finetune.steps=30", "finetune.checkpoint_every=1",
             "finetune.validation={share=0.34, every=1, patience=1}"]
    assert whole("blip2", *early).result()["steps"] < 30
    check_kill(work_of("blip2", *early), whole("blip2", *early), MOMENTS["before the stage is done"])


@pytest.mark.full
def test_the_installed_command_killed_again_and_again_ends_with_the_same_bytes(work_of: Start, whole: Start) -> None:
    more = ["finetune.steps=40", "finetune.validation={share=0.34, every=5}"]
    work, draw, at = work_of("blip2", *more), random.Random(0), []
    for writing in (False, True, False, True):
        process = subprocess.Popen([str(Path(sys.executable).with_name("recap")), *work.arguments],
                                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        before = step_of(work)
        while process.poll() is None and step_of(work) == before:
            time.sleep(0.002)
        if writing:
            while process.poll() is None and not (work.out / ".checkpoint.tmp").exists():
                pass
        else:
            time.sleep(draw.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        at.append(step_of(work))
    assert sorted(set(at)) == at and at[0] > 0 and at[-1] < 40
    assert recap(*work.arguments).returncode == 0
    assert work.bytes() == whole("blip2", *more).bytes()


def step_of(work: Work) -> int:
    """Of the last checkpoint."""
    for name in ("checkpoint", ".checkpoint.old"):
        with contextlib.suppress(FileNotFoundError):
            return int(json.loads((work.out / name / "state.json").read_text())["step"])
    return 0


def test_a_run_that_goes_on_uses_an_image_that_lost_one_of_its_captions(tmp_path: Path) -> None:
    """It is in the quarantine file for that caption, and is used for the other, the second time too."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": ["A square.", "x" * (MAX_TEXT_BYTES + 1)]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    for _ in range(2):
        images, rejects = read_dataset(Dataset(format="imagefolder", captions=str(tmp_path)))
        assert [image.uid for image in usable(images, rejects, tmp_path / "quarantine.jsonl", 0)] == ["a.png"]
    assert "oversized_caption" in (tmp_path / "quarantine.jsonl").read_text()


# --- shared by two processes ---------------------------------------------------------------------------------------

SHARES = {
    "an odd batch at once": ["finetune.batch_size=3", "finetune.micro_batch_size=8"],
    "one pair each": ["finetune.batch_size=2"],
    "kept features": ["finetune.cache_features=true"],
    "batches made ahead": ["finetune.num_workers=1"],
}


def check_same(shared: Work, alone: Work) -> None:
    """The same but for rounding: sums over processes add in another order."""
    assert shared.result()["steps"] == alone.result()["steps"]
    for name in ("best", "last"):
        torch.testing.assert_close(shared.weights(name), alone.weights(name), rtol=0, atol=1e-5)
    assert shared.losses() == pytest.approx(alone.losses(), rel=1e-5)
    found, known = (work.result()["validations"] for work in (shared, alone))
    assert [each["step"] for each in found] == [each["step"] for each in known] == [3, 6, 8]
    assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in known], rel=1e-5)


def test_two_processes_train_as_one(whole: Start) -> None:
    """With an odd batch, in micro-batches, validated."""
    check_same(whole("blip2", num_processes=2, dropout=0), whole("blip2", dropout=0))


@pytest.mark.full
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_train_as_one_however_they_share(share: str, whole: Start) -> None:
    check_same(whole("blip2", *SHARES[share], num_processes=2, dropout=0), whole("blip2", *SHARES[share], dropout=0))


@pytest.mark.full
@pytest.mark.parametrize("family", ["blip", "clipcap", "transformer", "cnn_lstm"])
def test_two_processes_train_any_family_as_one(family: str, whole: Start) -> None:
    # Some gradients are zero but for rounding (of an attention's key biases), and Adam takes whole steps by them.
    slow = "finetune.lr=1e-4"
    check_same(whole(family, slow, num_processes=2, dropout=0), whole(family, slow, dropout=0))


@pytest.mark.full
def test_two_processes_train_a_vision_model_whose_last_layer_no_one_reads_as_one(work_of: Start,
                                                                                 tmp_path: Path) -> None:
    """LLaVA takes the features of the layer before, so its last one gets no gradient."""
    from test_recap_captioners_vlm import write
    config = write("llava", tmp_path / "llava") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vision_feature_layer": -2}))
    arguments = [f'captioner.model="{tmp_path}/llava"', "finetune.lora.vision_model=['q_proj']", "finetune.lr=1e-4"]
    shared, alone = (work_of("vlm", *arguments, dropout=0) for _ in range(2))
    check_done(run(shared, 2))
    check_done(run(alone))
    check_same(shared, alone)


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["in a step", "in a validation"])
def test_two_processes_killed_and_run_again_end_with_the_same_bytes(moment: str, rank: int, work_of: Start,
                                                                    whole: Start) -> None:
    work = work_of("blip2")
    statuses, _ = run(work, 2, MOMENTS[moment][0], rank)
    assert statuses[rank] == -signal.SIGKILL and (work.out / "checkpoint").exists()
    check_done(run(work, 2))
    assert work.bytes() == whole("blip2", num_processes=2).bytes()


def test_a_loss_that_is_not_finite_ends_both_processes_with_one_line(work_of: Start) -> None:
    work = work_of("blip2", "finetune.lr=1e30", "finetune.max_grad_norm=1e30")
    statuses, said = run(work, 2)
    assert statuses[0] == 2 and len(lines(said)) == 1 and "recap: finetune: the loss is" in said
    events = [json.loads(line) for line in (work.out / "log.jsonl").read_text().splitlines()]
    assert [len(event["keys"]) for event in events if event["event"] == "not finite"] == [5]


def test_fewer_pairs_than_processes_are_one_line(work_of: Start) -> None:
    statuses, said = run(work_of("blip2", "finetune.batch_size=1"), 2)
    assert statuses[0] == 2
    assert lines(said) == ["recap: finetune.batch_size=1 is less than the 2 processes that share a batch: raise it"]


def test_what_the_first_process_finds_as_the_others_wait_is_one_line(work_of: Start, world_shards: Path) -> None:
    statuses, said = run(work_of("blip2", f"finetune.shards={world_shards}/evaluation/*.tar"), 2)
    assert statuses[0] == 2 and len(lines(said)) == 1 and "stitch them first" in said


@pytest.mark.full
def test_what_the_second_process_alone_finds_is_said(work_of: Start) -> None:
    """As an image that only its machine can't read any more."""
    statuses, said = run(work_of("blip2"), 2, Fault("recap.pairs:decode_image", 5, is_deadly=False), 1)
    assert statuses[1] == 2 and said.count("recap: ") == 1 and "can't now (missing_image)" in said


def lines(said: str) -> list[str]:
    """What is neither bar, heading nor warning."""
    return [line for line in said.replace("\r", "\n").splitlines() if line.strip() and " img" not in line
            and not line.startswith(("[1/1]", "warning: "))]


# --- torchrun ------------------------------------------------------------------------------------------------------


def torchrun(work: Work) -> "subprocess.Popen[str]":
    command = [sys.executable, *TORCHRUN, str(Path(sys.executable).with_name("recap")), *work.arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.full
def test_torchrun_killed_and_run_again_ends_with_the_same_bytes(work_of: Start, whole: Start) -> None:
    work = work_of("blip2")
    process = torchrun(work)
    while process.poll() is None and step_of(work) < 4:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for each in [process.pid, *map(int, workers)]:  # torchrun's own death would leave its workers at work
        os.kill(each, signal.SIGKILL)
    process.communicate()
    assert len(workers) == 2
    assert not (work.out / "done.json").exists()
    process = torchrun(work)
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    assert work.bytes() == whole("blip2", num_processes=2).bytes()


@pytest.mark.full
def test_torchrun_ends_with_one_line_of_ours(work_of: Start) -> None:
    process = torchrun(work_of("blip2", "finetune.lr=1e30", "finetune.max_grad_norm=1e30"))
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0 and said.count("recap: finetune: the ") == 1 and "[rank" not in said


def test_other_stages_refuse_several_processes(work_of: Start) -> None:
    work = work_of("blip2")
    statuses, said = run(Work(["reference", *work.arguments[1:]], work.out), 2)
    assert 2 in statuses and "in several processes" in said
