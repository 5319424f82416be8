"""Training in real processes: killed and run again, asked to end, shared by two of them, started by accelerate.

The processes are forked from a server that has the imports behind it, and each runs the command line; the tests marked
`full` start the installed command and accelerate.
"""

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
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from recap.processes import open_accelerator
from recap.shards import ShardWriter, read_shard
from train_t2i.batch import Batch
from train_t2i.model import Diffusion

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["train_t2i.train", "recap.cli", "recap.pipeline"])
TIMEOUT = 120.0
Spoil = Callable[[], None]
"""Done in a process before the command, to make it another one."""
EXPERIMENT = """
device = "cpu"
arms = ["alt"]
evaluate.features.model = "unused"
evaluate.clip_score.model = "unused"
evaluate.reference = "unused"
generate.prompts = "unused"

[arm.alt]
captions = { alt = 1, exact = 1 }

[train]
model = "MODEL"
shards = "SHARDS/*.tar"
resolution = 32
steps = 8
batch_size = 4
micro_batch_size = 2
shuffle_buffer = 8
lr = 1e-4
checkpoint_every = 2
log_every = 1
num_workers = 1
"""


@dataclass(frozen=True)
class Work:
    """A `recap train` to run."""

    arguments: list[str]
    out: Path
    """The stage's folder."""

    def weights(self) -> dict[str, torch.Tensor]:
        return {str(file.relative_to(self.out)) + name: tensor for file in self.out.glob("pipeline/*/*.safetensors")
                for name, tensor in load_file(file).items()}

    def losses(self) -> dict[int, float]:
        """What is logged again after a kill takes the place of what was there."""
        return {event["step"]: event["loss"] for event in self.events("step")}

    def events(self, kind: str) -> list[dict[str, Any]]:
        try:
            found = [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]
        except (FileNotFoundError, ValueError):  # or a line that is just being written
            return []
        return [event for event in found if event["event"] == kind]

    def result(self) -> dict[str, Any]:
        found = json.loads((self.out / "done.json").read_text())
        return {key: value for key, value in found.items()
                if key not in ("seconds", "training_seconds", "images_per_second")}


@pytest.fixture(scope="module")
def work_of(world_shards: Path, world_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Work]:
    """`work_of(*overrides)`: to train on three shards of drawn images, of which one is empty."""
    folder = tmp_path_factory.mktemp("experiment")
    samples = list(read_shard(str(world_shards / "train" / "00000.tar"), []))
    for name, some in (("00000", samples[:9]), ("00001", []), ("00002", samples[9:40])):
        with ShardWriter(str(folder / "shards" / f"{name}.tar")) as writer:
            for place, sample in enumerate(some):
                if place % 6 == 1:  # some that cannot be used
                    sample.members.pop("exact.txt")
                writer.write(sample)
    text = EXPERIMENT.replace("MODEL", str(world_models / "stable-diffusion-0"))
    (folder / "e.toml").write_text(text.replace("SHARDS", str(folder / "shards")))
    made: list[Work] = []

    def work(*overrides: str) -> Work:
        runs = folder / f"runs-{len(made)}"
        made.append(Work(["train", "-c", str(folder / "e.toml"), f"runs={runs}", *overrides],
                         runs / "e" / "seed-0" / "train" / "alt"))
        return made[-1]

    return work


@pytest.fixture(scope="module")
def whole(work_of: Callable[..., Work]) -> Work:
    """A run that nothing stopped."""
    work = work_of()
    assert run(work) == ([0], "")
    assert 0 < work.result()["rejected"]["no_exact_caption"] <= 6
    return work


def start(work: Work, num_processes: int = 1, spoil: Spoil | None = None) -> list[ForkServerProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work.out.parent.mkdir(parents=True, exist_ok=True)
    (work.out.parent / "stderr.txt").unlink(missing_ok=True)  # the workers of one that was killed may complain in it
    processes = []
    for rank in range(num_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if num_processes > 1 else {}
        process = FORKS.Process(target=_main, args=(
            work.arguments, {name: str(value) for name, value in place.items()}, work.out.parent / "stderr.txt",
            spoil))
        process.start()
        processes.append(process)
    return processes


def run(work: Work, num_processes: int = 1, spoil: Spoil | None = None) -> tuple[list[int], str]:
    """Exit statuses by rank, and what was said but for bars."""
    return end(work, start(work, num_processes, spoil))


def end(work: Work, processes: list[ForkServerProcess]) -> tuple[list[int], str]:
    until = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
        if process.is_alive():
            for each in processes:
                each.kill()
            pytest.fail(f"still at work after {TIMEOUT} s: {(work.out.parent / 'stderr.txt').read_text()}")
    said = (work.out.parent / "stderr.txt").read_text()
    (work.out.parent / "stderr.txt").unlink()
    assert "Traceback" not in said, said[said.index("Traceback"):]
    return [process.exitcode or 0 for process in processes], "\n".join(
        line for line in said.splitlines() if line.startswith(("recap:", "warning:")))


def _main(arguments: list[str], environment: dict[str, str], log: Path, spoil: Spoil | None) -> None:
    """What a process does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    if spoil:
        spoil()
    from recap.cli import main
    main(arguments)


def shard_on_the_cpu() -> None:
    """Have FSDP where accelerate takes DDP by itself: it shards on GPUs only, torch on CPUs as well."""
    from train_t2i import train

    def open_sharded(*arguments: Any) -> Any:
        accelerator = open_accelerator(*arguments)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
        if accelerator.mixed_precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        return accelerator

    train.open_accelerator = open_sharded


def give_little_memory(first: int) -> None:
    """Have the second process run out of memory with more than one image, from its `first` forward on."""
    forward, calls = Diffusion.forward, count(1)

    def limited(model: Diffusion, batch: Batch) -> torch.Tensor:
        if next(calls) >= first and len(batch) > 1 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, batch)

    setattr(Diffusion, "forward", limited)  # noqa: B010  (mypy)


def give_no_number() -> None:
    """Have the second process's losses be none."""
    forward = Diffusion.forward

    def spoilt(model: Diffusion, batch: Batch) -> torch.Tensor:
        return forward(model, batch) * (torch.nan if os.environ["RANK"] == "1" else 1)

    setattr(Diffusion, "forward", spoilt)  # noqa: B010  (mypy)


def wait_for_step(work: Work, step: int, processes: list[ForkServerProcess] | None = None) -> None:
    until = time.monotonic() + TIMEOUT
    while not any(event["step"] >= step for event in work.events("step")):
        time.sleep(0.002)
        assert time.monotonic() < until and all(each.is_alive() for each in processes or []), f"no step {step}"


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_run_killed_again_and_again_ends_with_the_same_bits(work_of: Callable[..., Work], whole: Work) -> None:
    work, draw = work_of(), random.Random(0)
    for step in (1, 4, 7):
        process, = start(work)
        wait_for_step(work, step, [process])
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert run(work) == ([0], "")
    assert work.losses() == whole.losses() and len(whole.losses()) == 8
    assert is_equal(work.weights(), whole.weights())
    assert work.result() == whole.result()


def test_sigterm_saves_and_ends_and_the_same_command_goes_on(work_of: Callable[..., Work], whole: Work) -> None:
    work = work_of("train.checkpoint_every=1000")
    process, = start(work)
    wait_for_step(work, 3, [process])
    process.terminate()
    statuses, said = end(work, [process])
    assert (statuses, said) == ([143], "recap: stopped; run the same command again to go on")
    saved = json.loads((work.out / "checkpoint" / "state.json").read_text())["step"]
    assert saved == max(work.losses()) < 8
    assert run(work) == ([0], "")
    assert len(work.events("step")) == 8  # none was done twice
    assert work.losses() == whole.losses() and is_equal(work.weights(), whole.weights())


# --- several processes -----------------------------------------------------------------------------------------------


def is_close(one: Work, other: Work) -> bool:
    """To 1e-5: the losses, relative; and the weights. Adam makes a whole step of a gradient that is rounding alone."""
    assert one.losses() == pytest.approx(other.losses(), rel=1e-5)
    mine, others = one.weights(), other.weights()
    return all(torch.allclose(mine[name], others[name], rtol=1e-5, atol=1e-5) for name in others)


def test_two_processes_match_one_and_a_kill_of_both_changes_nothing(work_of: Callable[..., Work], whole: Work) -> None:
    work, killed = work_of(), work_of()
    assert run(work, 2) == ([0, 0], "")
    assert is_close(work, whole)
    assert work.result() == whole.result()
    for step in (3, 6):  # the second goes on from what was saved after the first
        processes = start(killed, 2)
        wait_for_step(killed, step, processes)
        for process in processes:
            process.kill()
            process.join()
    assert run(killed, 2) == ([0, 0], "")
    assert killed.losses() == work.losses() and is_equal(killed.weights(), work.weights())


@pytest.mark.full
def test_two_processes_go_on_from_ones_checkpoint_and_one_from_twos(work_of: Callable[..., Work], whole: Work) -> None:
    for first, then in ((1, 2), (2, 1)):
        work = work_of()
        processes = start(work, first)
        wait_for_step(work, 4, processes)
        for process in processes:
            process.kill()
            process.join()
        assert set(run(work, then)[0]) == {0}
        assert is_close(work, whole)
        assert work.result() == whole.result()


def test_sigterm_to_one_process_ends_both(work_of: Callable[..., Work], whole: Work) -> None:
    work = work_of("train.steps=400", "train.checkpoint_every=1000")
    processes = start(work, 2)
    wait_for_step(work, 3, processes)
    processes[1].terminate()
    statuses, _ = end(work, processes)
    assert statuses == [143, 143]
    assert json.loads((work.out / "checkpoint" / "state.json").read_text())["step"] == max(work.losses())


def test_two_processes_that_hold_half_of_the_weights_each_match_one_that_holds_all(work_of: Callable[..., Work],
                                                                                 whole: Work) -> None:
    work = work_of()
    processes = start(work, 2, shard_on_the_cpu)
    wait_for_step(work, 4, processes)
    for process in processes:
        process.kill()
        process.join()
    assert run(work, 2, shard_on_the_cpu) == ([0, 0], "")
    assert is_close(work, whole)
    assert work.result() == whole.result()


@pytest.mark.full
def test_in_bf16_processes_that_hold_pieces_of_the_weights_come_to_about_the_same(work_of: Callable[..., Work]) -> None:
    one, two = work_of("train.precision=bf16"), work_of("train.precision=bf16")
    assert run(one) == ([0], "") and run(two, 2, shard_on_the_cpu) == ([0, 0], "")
    assert list(two.losses().values()) == pytest.approx(list(one.losses().values()), abs=1e-2)


@pytest.mark.parametrize("first", [1, pytest.param(4, marks=pytest.mark.full)])
def test_where_one_process_runs_out_of_memory_no_other_waits_for_ever(work_of: Callable[..., Work], whole: Work,
                                                                      first: int) -> None:
    work = work_of()
    assert run(work, 2, partial(give_little_memory, first)) == ([0, 0], "")
    assert is_close(work, whole)


def test_the_images_of_a_step_that_is_not_finite_are_those_of_all_processes(work_of: Callable[..., Work]) -> None:
    work = work_of("train.max_skipped=0")
    assert run(work, 2, give_no_number)[0] == [2, 2]
    event, = work.events("not finite")
    assert len(event["keys"]) == 4


@pytest.mark.full
def test_one_process_goes_on_where_two_held_half_of_the_weights_each(work_of: Callable[..., Work], whole: Work) -> None:
    for first, then in (((2, shard_on_the_cpu), (1, None)), ((1, None), (2, shard_on_the_cpu))):
        work = work_of()
        processes = start(work, *first)
        wait_for_step(work, 4, processes)
        for process in processes:
            process.kill()
            process.join()
        assert set(run(work, *then)[0]) == {0}
        assert is_close(work, whole)


@pytest.mark.full
def test_accelerate_launch_saves_resumes_and_ends_with_an_empty_shard(work_of: Callable[..., Work],
                                                                      whole: Work) -> None:
    work = work_of("train.num_workers=2")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "train_t2i",
               *work.arguments[1:]]
    # `--cpu` starts one process only, without a word.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        wait_for_step(work, 4)
        process.terminate()
        process.wait(TIMEOUT)
    assert not (work.out / "done.json").exists() and (work.out / "checkpoint").exists()
    subprocess.run(command, check=True, timeout=TIMEOUT, env=environment, capture_output=True)
    assert is_close(work, whole)
    assert work.result() == whole.result()
