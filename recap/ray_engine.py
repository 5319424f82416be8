"""Workers on a Ray cluster, which may join and leave while it runs. Shards and outputs are where all of them reach."""

import logging
import os
import queue
import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

from recap.engines import AHEAD, Done, Event, Failed, Images, Job, Joined, Lost, Worker
from recap.errors import UserError
from recap.shard_work import Stats

try:
    import ray
except ImportError:
    raise UserError("relabel.engine=ray needs Ray: pip install 'recap-t2i[ray]'") from None

LOOK_EVERY = 10.0
"""Seconds between looks for GPUs that have joined the cluster."""
REPORTS_EVERY = 1.0
"""Seconds between questions to a worker for how far it has got."""


class RayWorker:
    """An actor that does shards, of which it may be given the next while it is at work on one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reports: dict[str, tuple[int, dict[str, int]]] = {}
        self.shards: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.results: dict[str, Future[Stats]] = {}

    @ray.method(concurrency_group="shards")
    def begin(self, job: Job, device: str) -> str:
        """Be ready for shards; the worker's name. An error here is told to who asks, unlike one in `__init__`."""
        worker = job.open(device, self._report).__enter__()
        threading.Thread(target=self._work, args=[worker], daemon=True).start()
        return f"{socket.gethostname()}:{os.getpid()}"

    @ray.method(concurrency_group="shards")
    def relabel(self, shard: str) -> Stats:
        with self.lock:
            result = self.results[shard] = Future()
        self.shards.put(shard)
        return result.result()

    def _work(self, worker: Worker) -> None:
        try:
            for shard, stats in worker.relabel(iter(self.shards.get, None)):
                self.results[shard].set_result(stats)
        except Exception as error:  # noqa: BLE001  (it is raised where the results are waited for)
            with self.lock:
                for result in self.results.values():
                    if not result.done():
                        result.set_exception(error)

    def _report(self, shard: str, done: int, quarantined: dict[str, int]) -> None:
        with self.lock:
            self.reports[shard] = done, quarantined

    @ray.method(concurrency_group="reports")
    def take_reports(self) -> list[tuple[str, int, dict[str, int]]]:
        """How far it has got, of the shards of which there is something new."""
        with self.lock:
            found, self.reports = self.reports, {}
        return [(shard, *report) for shard, report in found.items()]


class RayPool:
    """Actors, each with a GPU of its own; as many as are asked for, or as the cluster has GPUs."""

    def __init__(self, job: Job, workers: int | None, device: str) -> None:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self.needs_gpu, self.workers = device.startswith("cuda"), workers
        kind: Any = ray.remote(num_cpus=1, num_gpus=int(self.needs_gpu), max_restarts=0,  # type: ignore[call-overload]
                               concurrency_groups={"shards": AHEAD, "reports": 1})(RayWorker)
        self.make = kind.remote
        self.begin_with = job, "cuda:0" if self.needs_gpu else device
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
        self.tasks[self.actors[worker].relabel.remote(shard)] = worker, shard

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
        gpus = int(ray.cluster_resources().get("GPU", 0)) if self.needs_gpu else 1
        for _ in range(len(self.actors) + len(self.starting), self.workers or max(gpus, 1)):
            actor = self.make()
            self.starting[actor.begin.remote(*self.begin_with)] = actor

    def _joined(self, ref: Any) -> list[Event]:
        actor = self.starting.pop(ref)
        try:
            worker = ray.get(ref)
        except ray.exceptions.RayError as error:
            return [_ended(error, "a worker")]
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
            return [Done(worker, shard, result)]
        return [Images(worker, *report) for report in result]

    def _lost(self, worker: str, error: Exception) -> list[Event]:
        if worker not in self.actors:  # each of its tasks tells of it
            return []
        ended = _ended(error, worker)
        if isinstance(ended, Lost):
            del self.actors[worker]
            self.looked = 0.0
        return [ended]

    def close(self) -> None:
        for actor in [*self.actors.values(), *self.starting.values()]:
            ray.kill(actor)


def _ended(error: Exception, worker: str) -> Event:
    """A worker that is gone is lost; what one of them says goes for all."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        return Failed(cause if isinstance(cause, UserError | OSError) else RuntimeError(str(error)))
    return Lost(worker, "is gone")
