"""Who does the work: this process, a process for each device, the ranks of torchrun or Slurm, or a Ray cluster.

A shard is a task. Whoever is lost while at work on one, the shard is done again by another.
"""

import ctypes
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from recap import progress
from recap.errors import UserError
from recap.shard_work import Stats

AHEAD = 2
"""Shards that a worker has at a time: the one it works on, and the next, which it begins to read; towards the end only
one, so that none waits behind another while a worker has nothing to do."""
MAX_LOSSES = 3
"""Workers that may be lost with the same shard before it is taken for the reason."""
PATIENCE = 3600.0
"""Seconds that the first rank waits for a shard of the others."""
Report = Callable[[str, int, dict[str, int]], None]
"""Told a shard, how many of its images are done by now, and how many of them are quarantined, by reason."""
Result = tuple[str, Stats]


class Worker(Protocol):
    """Does shards, one after the other."""

    @abstractmethod
    def relabel(self, shards: Iterable[str]) -> Iterator[Result]:
        """Shards with their stats, as they are done."""


class Job(Protocol):
    """What there is to do. It travels to other processes."""

    @abstractmethod
    def open(self, device: str, report: Report) -> AbstractContextManager[Worker]: ...


class Meter(Protocol):
    """Shows how far the workers have got."""

    @abstractmethod
    def images(self, worker: str, shard: str, done: int, quarantined: dict[str, int]) -> None: ...


def work(job: Job, shards: list[str], engine: str, workers: int | None, device: str, meter: Meter) -> Iterator[Result]:
    """Have the shards done; each with its stats, as it is done. Under torchrun, those that this rank does.

    Args:
        job: what to do.
        shards: to be done.
        engine: `local` or `ray`.
        workers: how many processes; by default one for each GPU, else one.
        device: `cuda` for all GPUs, or one device.
        meter: shown the progress.
    """
    if engine == "ray":
        from recap.ray_engine import RayPool
        yield from schedule(RayPool(job, workers, device), shards, meter)
    elif progress.num_processes() > 1:
        yield from _rank(job, shards, device, meter)
    elif len(devices := _devices(device, workers)) > 1:
        yield from schedule(LocalPool(job, devices), shards, meter)
    else:
        yield from _here(job, shards, devices[0], meter)


def _devices(device: str, workers: int | None) -> list[str]:
    """The device of each worker; several share one where there are more workers than GPUs."""
    import torch
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{place % num_gpus}" if num_gpus else device for place in range(workers or num_gpus or 1)]


def _here(job: Job, shards: Iterable[str], device: str, meter: Meter) -> Iterator[Result]:
    with job.open(device, functools.partial(meter.images, device)) as worker:
        yield from worker.relabel(shards)


# --- torchrun and Slurm --------------------------------------------------------------------------------------------


def _rank(job: Job, shards: list[str], device: str, meter: Meter) -> Iterator[Result]:
    """The shards that this rank is the first to claim. The first rank stays until all are done."""
    import torch
    dist: Any = torch.distributed
    store, rank, _ = next(iter(dist.rendezvous("env://")))
    store = dist.PrefixStore(f"recap/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if rank == 0:  # the others may have begun later, when some of them were done
        store.set("shards", json.dumps(shards))
    shards = json.loads(store.get("shards"))
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    for result in _here(job, _claims(store, shards), own, meter):
        yield result
        store.add("done", 1)
    if rank == 0:
        _wait_for_others(store, len(shards))


def _claims(store: Any, shards: list[str]) -> Iterator[str]:
    while (place := store.add("claimed", 1) - 1) < len(shards):
        yield shards[place]


def _wait_for_others(store: Any, num_shards: int) -> None:
    num_done, since = 0, time.monotonic()
    while (now_done := store.add("done", 0)) < num_shards:
        if now_done > num_done:
            num_done, since = now_done, time.monotonic()
        elif time.monotonic() > since + PATIENCE:
            raise UserError(f"relabel: {num_shards - now_done} shards of other ranks are not done, and none was for an "
                            "hour: see whether those ranks have ended, and run the same command again")
        time.sleep(0.2)


# --- workers in other processes ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is ready."""

    worker: str


@dataclass(frozen=True, slots=True)
class Images:
    """As `Report`."""

    worker: str
    shard: str
    done: int
    quarantined: dict[str, int]


@dataclass(frozen=True, slots=True)
class Done:
    worker: str
    shard: str
    stats: Stats


@dataclass(frozen=True, slots=True)
class Failed:
    """What would end a run in one process, and ends this one."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker ended without being asked to. There will be another."""

    worker: str
    why: str


Event = Joined | Images | Done | Failed | Lost


class Pool(Protocol):
    """Workers in other processes."""

    @abstractmethod
    def size(self) -> int:
        """How many workers there are, or will be soon."""

    @abstractmethod
    def give(self, worker: str, shard: str) -> None:
        """A shard more for a worker. One that has been lost meanwhile does not matter."""

    @abstractmethod
    def events(self) -> list[Event]:
        """What has happened; waits until something has, or a second."""

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


def schedule(pool: Pool, shards: list[str], meter: Meter) -> Iterator[Result]:
    """Give shards to a pool's workers, and those of a lost worker to the others."""
    waiting, num_left = deque(shards), len(shards)
    given: dict[str, list[str]] = {}
    losses: Counter[str] = Counter()
    try:
        while num_left:
            for event in pool.events():
                match event:
                    case Joined(worker):
                        given[worker] = []
                    case Images(worker, shard, done, quarantined) if shard in given.get(worker, []):  # else it is late
                        meter.images(worker, shard, done, quarantined)
                    case Done(worker, shard, stats):
                        given[worker].remove(shard)
                        num_left -= 1
                        yield shard, stats
                    case Failed(error):
                        raise error
                    case Lost(worker, why):
                        back = given.pop(worker, [])
                        _note_loss(losses, back[0] if back else "", worker, why)
                        waiting.extendleft(reversed(back))
            for worker, own in given.items():
                while waiting and len(own) < (AHEAD if len(waiting) > pool.size() else 1):
                    own.append(waiting.popleft())
                    pool.give(worker, own[-1])
    finally:
        pool.close()


def _note_loss(losses: Counter[str], shard: str, worker: str, why: str) -> None:
    losses[shard] += 1
    doing = f"at work on {shard}" if shard else "before it had begun"
    if losses[shard] == MAX_LOSSES:
        raise UserError(f"relabel: {MAX_LOSSES} workers ended {doing}, the last one {why}: see whether the memory "
                        "suffices, or leave the shard out")
    progress.say(f"warning: {worker} {why} {doing}; {'the shard is done again' if shard else 'another is started'}")


class LocalPool:
    """A process for each device of this machine."""

    def __init__(self, job: Job, devices: list[str]) -> None:
        self.job = job
        self.context = multiprocessing.get_context("spawn")  # a fork would share CUDA's state and torch's threads
        self.workers: dict[str, tuple[multiprocessing.process.BaseProcess, Any, str]] = {}
        self.num_started = 0
        for device in devices:
            self._start(device)

    def _start(self, device: str) -> None:
        name = f"{device} {self.num_started}"
        self.num_started += 1
        here, there = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(self.job, device, name, there), daemon=True)
        process.start()
        there.close()
        self.workers[name] = process, here, device

    def size(self) -> int:
        return len(self.workers)

    def give(self, worker: str, shard: str) -> None:
        with suppress(OSError):  # lost: `events` tells of it
            self.workers[worker][1].send(shard)

    def events(self) -> list[Event]:
        found: list[Event] = []
        by_connection: dict[Any, str] = {connection: worker for worker, (_, connection, _) in self.workers.items()}
        connection: Any
        for connection in multiprocessing.connection.wait(list(by_connection), timeout=1):
            try:
                found.append(connection.recv())
            except (EOFError, OSError):
                found.append(self._lost(by_connection[connection]))
        return found

    def _lost(self, worker: str) -> Lost:
        process, connection, device = self.workers.pop(worker)
        connection.close()
        process.join()
        self._start(device)
        status = process.exitcode or 0
        return Lost(worker, f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}")

    def close(self) -> None:
        for process, connection, _ in self.workers.values():
            process.terminate()
            connection.close()
        for process, *_ in self.workers.values():
            process.join()


def _serve(job: Job, device: str, name: str, connection: Any) -> None:
    """A worker's process: does the shards that it is sent, until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for all its processes: the parent ends us
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a parent that was killed can't
    try:
        with job.open(device, lambda *report: connection.send(Images(name, *report))) as worker:
            connection.send(Joined(name))
            for shard, stats in worker.relabel(iter(connection.recv, None)):
                connection.send(Done(name, shard, stats))
    except (UserError, OSError) as error:
        connection.send(Failed(error))
    except Exception:  # noqa: BLE001  (the parent shows it)
        connection.send(Failed(RuntimeError(f"{name}:\n{traceback.format_exc()}")))
