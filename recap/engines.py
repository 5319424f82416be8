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
import zlib
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recap import progress
from recap.errors import UserError
from recap.memory import keep_freed_memory
from recap.shard_work import Stats

AHEAD = 3
"""Shards that a worker has at a time: the one that is published, the one it works on, and the next, which it begins to
read; towards the end only one, so that none waits behind another while a worker has nothing to do."""
MAX_LOSSES = 3
"""Workers that may be lost with the same shard before it is taken for the reason."""
PATIENCE = 3600.0
"""Seconds that the first rank waits for a sign of the others."""
SIGN_EVERY = 5.0
"""Seconds between the signs that a rank gives while it does images."""
MAX_VALUE = 2**20
"""Bytes of one value in the ranks' store, whose server refuses more than 8 MiB."""
TIME_TO_END = 10.0
"""Seconds that workers have to end, and ranks to hear that all is done."""
Report = Callable[[str, int, dict[str, int]], None]
"""Told a shard, how many of its images are done by now, and how many of them are quarantined, by reason."""
Result = tuple[str, Stats]


class Worker(Protocol):
    """Does shards, one after the other."""

    @abstractmethod
    def process(self, shards: Iterable[str]) -> Iterator[Result]:
        """Shards with their stats, as they are done."""


class Job(Protocol):
    """What there is to do. It travels to other processes."""

    @property
    def out(self) -> str | Path:
        """Folder or URL, where what is done goes to."""

    @abstractmethod
    def open(self, device: str, report: Report) -> AbstractContextManager[Worker]: ...


class Meter(Protocol):
    """Shows how far the workers have got."""

    @abstractmethod
    def images(self, worker: str, shard: str, done: int, quarantined: dict[str, int]) -> None: ...

    @abstractmethod
    def lost(self, worker: str) -> None:
        """There will be no more of this worker."""


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
        yield from _here(job, shards, devices[0], functools.partial(meter.images, devices[0]))


def _devices(device: str, workers: int | None) -> list[str]:
    """The device of each worker; several share one where there are more workers than GPUs."""
    import torch
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{place % num_gpus}" if num_gpus else device for place in range(workers or num_gpus or 1)]


def _here(job: Job, shards: Iterable[str], device: str, report: Report) -> Iterator[Result]:
    with _open(job, device, report) as worker:
        yield from worker.process(shards)


@contextmanager
def _open(job: Job, device: str, report: Report) -> Iterator[Worker]:
    """A worker, with its GPU as this thread's own: else CUDA's streams and events would be those of the first one."""
    if device.startswith("cuda:"):
        import torch
        torch.cuda.set_device(device)
    elif device == "cpu":
        keep_freed_memory()
    with job.open(device, report) as worker:
        yield worker


# --- torchrun and Slurm --------------------------------------------------------------------------------------------


def _rank(job: Job, shards: list[str], device: str, meter: Meter) -> Iterator[Result]:
    """The shards that this rank is the first to claim. The first rank stays until all are done."""
    import torch
    dist: Any = torch.distributed
    store, rank, num_ranks = _rendezvous()
    # A command may have several such works, one after the other; each has an output of its own.
    store = dist.PrefixStore(f"recap/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{job.out}", store)
    if rank == 0:  # the others may have begun later, when some of them were done
        _put(store, "shards", shards)
    shards = _get(store, "shards")
    own = _own(device)
    report = _signing(functools.partial(meter.images, own), store)
    for result in _here(job, _claims(store, shards), own, report):
        yield result
        store.add("done", 1)
    store.add("ended", 1)
    if rank == 0:
        _wait_for_others(store, len(shards))
        _let_go(store, num_ranks)


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """The ranks' store, this rank and how many there are. One store, as its address can be had but once."""
    import torch
    dist: Any = torch.distributed
    return next(iter(dist.rendezvous("env://")))


def _own(device: str) -> str:
    """The GPU of this rank. A launcher may show each rank no more than its own, which then is the first."""
    import torch
    if device != "cuda":
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(1, torch.cuda.device_count())}"


def _put(store: Any, name: str, content: Any) -> None:
    data = zlib.compress(json.dumps(content).encode())
    parts = [data[start:start + MAX_VALUE] for start in range(0, len(data), MAX_VALUE)]
    for place, part in enumerate(parts):
        store.set(f"{name}/{place}", part)
    store.set(name, str(len(parts)))


def _get(store: Any, name: str) -> Any:
    """What `_put` has put, or will put."""
    num_parts = int(store.get(name))
    return json.loads(zlib.decompress(b"".join(store.get(f"{name}/{place}") for place in range(num_parts))))


def _signing(report: Report, store: Any) -> Report:
    """The same report; it also tells the first rank that this one is at work."""
    signed = 0.0

    def tell(shard: str, done: int, quarantined: dict[str, int]) -> None:
        nonlocal signed
        report(shard, done, quarantined)
        if time.monotonic() > signed + SIGN_EVERY:
            signed = time.monotonic()
            store.add("signs", 1)

    return tell


def _claims(store: Any, shards: list[str]) -> Iterator[str]:
    while (place := store.add("claimed", 1) - 1) < len(shards):
        yield shards[place]


def _wait_for_others(store: Any, num_shards: int) -> None:
    signs, since = (0, 0), time.monotonic()
    while (num_done := store.add("done", 0)) < num_shards:
        if (now := (num_done, store.add("signs", 0))) != signs:
            signs, since = now, time.monotonic()
        elif time.monotonic() > since + PATIENCE:
            raise UserError(f"{num_shards - num_done} shards of other ranks are not done, and nothing was "
                            "heard of these ranks for an hour: see whether they have ended, and run the same command "
                            "again")
        time.sleep(0.2)


def _let_go(store: Any, num_ranks: int) -> None:
    """Stay, with the store, until the others have heard that there is no more to do; not for those that are lost."""
    end = time.monotonic() + TIME_TO_END
    while store.add("ended", 0) < num_ranks and time.monotonic() < end:
        time.sleep(0.1)


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
    """What would end a run in one process, and ends this one: in words, as not every error can travel."""

    kind: str
    """`UserError` or `OSError`; else empty."""
    message: str
    errno: int | None = None

    @classmethod
    def of(cls, error: BaseException, worker: str) -> "Failed":
        """What the user or the machine can mend is its message; a bug comes with its traceback."""
        match error:
            case UserError():
                return cls("UserError", str(error))
            case OSError(errno=int(errno)):
                return cls("OSError", str(error).removeprefix(f"[Errno {errno}] "), errno)
            case OSError():
                return cls("OSError", f"{type(error).__name__}: {error}")
        return cls("", f"{worker}:\n{''.join(traceback.format_exception(error))}")

    def error(self) -> Exception:
        match self.kind:
            case "UserError":
                return UserError(self.message)
            case "OSError":
                return OSError(self.message) if self.errno is None else OSError(self.errno, self.message)
        return RuntimeError(self.message)


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
    plan = _Plan(shards)
    try:
        while plan.left:
            for event in pool.events():
                match event:
                    case Joined(worker):
                        plan.given[worker] = []
                    case Images(worker, shard, done, quarantined) if plan.is_at_work(worker, shard):  # else it is late
                        plan.latest[worker] = shard
                        meter.images(worker, shard, done, quarantined)
                    case Done(worker, shard, stats) if plan.is_new(worker, shard):
                        yield shard, stats
                    case Failed():
                        raise event.error()
                    case Lost(worker, why):
                        meter.lost(worker)
                        plan.lose(worker, why)
            for worker, shard in plan.next_ones(pool.size()):
                pool.give(worker, shard)
    finally:
        pool.close()


class _Plan:
    """Which shards wait, and who has which."""

    def __init__(self, shards: list[str]) -> None:
        self.waiting, self.left = deque(shards), set(shards)
        self.given: dict[str, list[str]] = {}
        """Worker → the shards that it has."""
        self.latest: dict[str, str] = {}
        """Worker → the shard of which it has told last."""
        self.losses: Counter[str] = Counter()
        """Shard → the workers that were lost with it; of idle ones, those in a row."""

    def is_at_work(self, worker: str, shard: str) -> bool:
        return shard in self.left and shard in self.given.get(worker, [])

    def is_new(self, worker: str, shard: str) -> bool:
        """Note that a shard is done, by a worker that may be lost meanwhile; whether it was not done before."""
        own = self.given.get(worker, [])
        if shard in own:
            own.remove(shard)
        elif shard in self.waiting:  # it had been taken back
            self.waiting.remove(shard)
        if shard not in self.left:
            return False
        self.left.remove(shard)
        self.losses.pop(shard, None)
        self.losses.pop("", None)
        return True

    def lose(self, worker: str, why: str) -> None:
        """Take back what a worker had, of which one may be the reason why it was lost; UserError where it is."""
        back = [shard for shard in self.given.pop(worker, []) if shard in self.left]
        latest = self.latest.pop(worker, "")
        shard = latest if latest in back else next(iter(back), "")
        self.waiting.extendleft(reversed(back))
        self.losses[shard] += 1
        doing = f"at work on {shard}" if shard else "without a shard"
        if self.losses[shard] >= MAX_LOSSES and (shard or not any(self.given.values())):  # else there are some at work
            raise UserError(f"{self.losses[shard]} workers ended {doing}, the last one {why}: see whether the "
                            f"memory suffices{', or leave the shard out' if shard else ''}")
        progress.say(f"warning: {worker} {why} {doing}; {'the shard is done again' if shard else 'another is started'}")

    def next_ones(self, num_workers: int) -> Iterator[tuple[str, str]]:
        """Worker and shard, of the shards that are to be given now."""
        for worker, own in self.given.items():
            while self.waiting and len(own) < (AHEAD if len(self.waiting) > num_workers else 1):
                own.append(self.waiting.popleft())
                yield worker, own[-1]


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
        """What they are at work on is lost; who does not heed that is killed."""
        for process, connection, _ in self.workers.values():
            process.terminate()
            connection.close()
        end = time.monotonic() + TIME_TO_END
        for process, *_ in self.workers.values():
            process.join(max(0.0, end - time.monotonic()))
        for process, *_ in self.workers.values():
            process.kill()
            process.join()


def _serve(job: Job, device: str, name: str, connection: Any) -> None:
    """A worker's process: does the shards that it is sent, until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for all its processes: the parent ends us
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a parent that was killed can't
    try:
        with _open(job, device, lambda *report: connection.send(Images(name, *report))) as worker:
            connection.send(Joined(name))
            for shard, stats in worker.process(iter(connection.recv, None)):
                connection.send(Done(name, shard, stats))
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the parent shows it)
        connection.send(Failed.of(error, name))
