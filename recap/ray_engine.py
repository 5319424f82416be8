"""Workers on a Ray cluster, which may join and leave while it runs. Shards and outputs are where all of them reach."""

import logging
import os
import queue
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from recap import progress
from recap.engines import AHEAD, Done, Event, Failed, Images, Job, Joined, Lost, Worker
from recap.errors import UserError
from recap.shard_work import Stats
from recap.storage import is_local

try:
    import ray
except ImportError:
    raise UserError("engine=ray needs Ray: pip install 'recap-t2i[ray]'") from None

LOOK_EVERY = 10.0
"""Seconds between looks for GPUs that have joined the cluster."""
TIME_TO_ANSWER = 30.0
"""Seconds that the cluster's head has for a connection."""
REPORTS_EVERY = 1.0
"""Seconds between questions to a worker for how far it has got."""


class RayWorker:
    """An actor that does shards, of which it may be given the next while it is at work on one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reports: dict[str, tuple[int, dict[str, int]]] = {}
        self.shards: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.results: dict[str, Future[Stats | Failed]] = {}
        """Shard → what becomes of it, while it is waited for."""
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    @ray.method(concurrency_group="shards")
    def begin(self, job: Job, device: str, folder: str) -> str | Failed:
        """Be ready for shards, in the folder that relative paths are meant in; the worker's name."""
        try:
            _go_to(folder, str(job.out))
            worker = job.open(device, self._report).__enter__()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the pool raises it)
            return Failed.of(error, self.name)
        threading.Thread(target=self._work, args=[worker], daemon=True).start()
        return self.name

    @ray.method(concurrency_group="shards")
    def process(self, shard: str) -> Stats | Failed:
        with self.lock:
            result = self.results[shard] = Future()
        self.shards.put(shard)
        try:
            return result.result()
        finally:
            with self.lock:
                del self.results[shard]

    def _work(self, worker: Worker) -> None:
        try:
            for shard, stats in worker.process(iter(self.shards.get, None)):
                self.results[shard].set_result(stats)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the pool raises it)
            failed = Failed.of(error, self.name)
            with self.lock:
                for result in self.results.values():
                    if not result.done():
                        result.set_result(failed)

    def _report(self, shard: str, done: int, quarantined: dict[str, int]) -> None:
        with self.lock:
            self.reports[shard] = done, quarantined

    @ray.method(concurrency_group="reports")
    def take_reports(self) -> list[tuple[str, int, dict[str, int]]]:
        """How far it has got, of the shards of which there is something new."""
        with self.lock:
            found, self.reports = self.reports, {}
        return [(shard, *report) for shard, report in found.items()]


def _go_to(folder: str, out: str) -> None:
    """Ray starts actors where its own command was run on their machine."""
    if Path(folder).is_dir():
        os.chdir(folder)
    elif is_local(out) and not Path(out).is_absolute():
        raise UserError(f"engine=ray: {socket.gethostname()} has no {folder}, which {out} is in: share that "
                        "folder with all machines of the cluster, or let runs and relabel.output be absolute paths "
                        "that they share")


class RayPool:
    """Actors, each with a GPU of its own; as many as are asked for, or as the cluster has GPUs."""

    def __init__(self, job: Job, workers: int | None, device: str) -> None:
        _connect()
        self.needs_gpu, self.workers = device.startswith("cuda"), workers
        if (idle := _num("GPU")) and not self.needs_gpu:
            progress.warn(f"device={device} leaves the cluster's {idle} GPUs idle; device=cuda takes them")
        kind: Any = ray.remote(num_cpus=1, num_gpus=int(self.needs_gpu), max_restarts=0,  # type: ignore[call-overload]
                               concurrency_groups={"shards": AHEAD, "reports": 1})(RayWorker)
        self.make = kind.remote
        self.begin_with = job, "cuda:0" if self.needs_gpu else device, str(Path.cwd())
        self.actors: dict[str, Any] = {}
        """Worker → actor."""
        self.starting: dict[Any, Any] = {}
        """A name that is waited for → actor."""
        self.tasks: dict[Any, tuple[str, str | None]] = {}
        """What is waited for → worker, and the shard; None for its reports."""
        self.asked: dict[str, float] = {}
        """Worker → when it was last asked for its reports."""
        self.looked = 0.0

    def size(self) -> int:
        return len(self.actors) + len(self.starting)

    def give(self, worker: str, shard: str) -> None:
        self.tasks[self.actors[worker].process.remote(shard)] = worker, shard

    def events(self) -> list[Event]:
        self._start_missing()
        self._ask_for_reports()
        done, _ = ray.wait([*self.starting, *self.tasks], timeout=1)
        found: list[Event] = []
        for ref in done:
            found += self._joined(ref) if ref in self.starting else self._event(ref)
        return found

    def _start_missing(self) -> None:
        """As many actors as there are to be: lost ones are replaced, and GPUs that have joined get one."""
        if time.monotonic() < self.looked + LOOK_EVERY and self.actors | self.starting:
            return
        self.looked = time.monotonic()
        gpus = _num("GPU") if self.needs_gpu else 1
        if self.starting and not gpus:  # since the last look
            progress.warn("the cluster has no GPU, which device=cuda needs; goes on when one joins")
        for _ in range(len(self.actors) + len(self.starting), self.workers or max(gpus, 1)):
            actor = self.make()
            self.starting[actor.begin.remote(*self.begin_with)] = actor

    def _joined(self, ref: Any) -> list[Event]:
        actor = self.starting.pop(ref)
        try:
            worker = ray.get(ref)
        except ray.exceptions.RayError as error:
            return [_ended(error, "a worker")]
        if isinstance(worker, Failed):
            return [worker]
        self.actors[worker], self.asked[worker] = actor, 0.0
        return [Joined(worker)]

    def _ask_for_reports(self) -> None:
        for worker, actor in self.actors.items():
            if time.monotonic() > self.asked[worker] + REPORTS_EVERY:
                self.asked[worker] = time.monotonic()
                self.tasks[actor.take_reports.remote()] = worker, None

    def _event(self, ref: Any) -> list[Event]:
        worker, shard = self.tasks.pop(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayError as error:
            return self._lost(worker, error)
        if shard is not None:
            return [result if isinstance(result, Failed) else Done(worker, shard, result)]
        return [Images(worker, *report) for report in result]

    def _lost(self, worker: str, error: Exception) -> list[Event]:
        if worker not in self.actors:  # each of its tasks tells of it
            return []
        ended = _ended(error, worker)
        if isinstance(ended, Lost):
            del self.actors[worker], self.asked[worker]
            self.looked = 0.0
        return [ended]

    def close(self) -> None:
        for actor in [*self.actors.values(), *self.starting.values()]:
            ray.kill(actor)


def _ended(error: Exception, worker: str) -> Event:
    """A worker that is gone is lost; what Ray could not do for one of them goes for all."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return Failed("", str(error))
    return Lost(worker, "is gone")


def _connect() -> None:
    """To the cluster of RAY_ADDRESS or of this machine; where there is none, one is started here."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for more than six minutes
            socket.create_connection((host.strip("[]"), int(port)), TIME_TO_ANSWER).close()
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"engine=ray: no cluster at RAY_ADDRESS={address} ({reason}): start it with "
                        "`ray start --head`, or unset RAY_ADDRESS for one on this machine alone") from None


def _num(resource: str) -> int:
    """How many of a resource the cluster has by now."""
    return int(ray.cluster_resources().get(resource, 0))
