"""Captions by a chat model behind an OpenAI-compatible server: many requests under way, none faster than allowed.

Each answer is kept the moment it is there. A request that was refused is sent again; one that was lost, perhaps paid
for, is sent again and counted. Where nothing more can be had, those under way are waited for, and the run stops with
one clear line, to go on from there.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from recap import progress
from recap.config.stitch import Llm
from recap.errors import UserError
from recap.llm import Scene
from recap.llm.answers import Answer, Body, key_of
from recap.llm.chat import ChatWriter
from recap.llm.meter import Meter
from recap.openai_api import CONNECT_TIMEOUT, client_options, request_headers, without_key
from recap.sample import visible

WHERE = "stitch.llm.server"
FIRST_WAIT, MAX_WAIT = 0.5, 60.0
"""Seconds before a request is sent again: doubled from time to time, and drawn between a half and the whole of it."""
MAX_RETRY_AFTER = 300.0
"""Seconds of a pause that a server asks for."""
BURST = 0.25
"""Seconds of requests that may be made up for, after a pause of our own, without a server calling it too fast."""
MAX_FAILURES = 20
"""In a row, of requests that were given up; or of tries, as long as none was ever answered."""
MAX_ANSWER_BYTES = 1 << 22
PERHAPS_PAID = (408, 502, 504, 520, 522, 524)
"""Statuses of a server that may have done the work; after any other that is an error, it has not."""
FORBIDDEN = (401,)
HOPELESS = (401, 403, 404)
"""Statuses that no request to this server will get past; redirections are, too. Where others were answered, 403 and 404
may be meant for one request alone, as of a filter that reads it.
"""
CHECKS = "check the address, the model's name and the key in OPENAI_API_KEY"


class ServerWriter(ChatWriter):
    """Captions by what a server answers."""

    def __init__(self, config: Llm, styles: Iterable[str], answers: Path) -> None:
        self.server = str(config.server)
        self.client_options = client_options(self.server, WHERE)
        super().__init__(config, styles, answers, {"model": config.model})

    def prepare(self, scenes: Iterable[Scene], total: int) -> dict[str, Any]:
        """Ask for all that has not been answered yet.

        Raises:
            UserError: the server can't be reached, refuses, or answers no more; or the budget is spent. All that was
                answered is kept.
        """
        with progress.bar("write", total) as bar:
            asking = Asking(self, bar)
            if lost := self.answers.unanswered():
                progress.warn(f"{WHERE}: {lost} requests were sent before and have no answer, by a run that stopped "
                              "or `recap batch export`: they may be paid for twice; import a batch's answers first")
            try:
                asyncio.run(asking.all(scenes))
            except ExceptionGroup as group:  # of one request or of several; one says it
                raise _first(group) from None
        if asking.halt:
            raise UserError(asking.halt)
        return asking.meter.result()


class Refused(Exception):
    """A request that was not served, and so not paid."""

    def __init__(self, why: str, again: bool = True, is_busy: bool = False, wait: float = 0.0) -> None:
        super().__init__(why)
        self.again, self.is_busy, self.wait = again, is_busy, wait


class Lost(Exception):
    """A request without an answer that can be read, which may have been paid for."""


class Asking:
    """The requests of one command."""

    def __init__(self, writer: ServerWriter, bar: Any) -> None:
        self.writer, self.config, self.answers, self.bar = writer, writer.config, writer.answers, bar
        prices = self.config.prompt_price / 1e6, self.config.completion_price / 1e6
        self.meter = Meter(self.config, self.answers.spent(*prices))
        self.halted = asyncio.Event()
        self.pace = Pace(self.config.requests_per_minute, self.halted)
        self.settled = asyncio.Condition()
        self.locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.halt = ""
        """Why the run is to stop."""
        self.failures, self.ever_answered, self.has_warned = 0, False, False

    async def all(self, scenes: Iterable[Scene]) -> None:
        """Ask of all scenes, so many at a time; none is begun when the run is to stop."""
        window = asyncio.Semaphore(self.config.concurrency)
        async with self._open() as self.client, asyncio.TaskGroup() as group:
            for scene in scenes:
                await window.acquire()
                if self.halt:
                    break
                group.create_task(self.converse(scene)).add_done_callback(lambda _: window.release())

    def _open(self) -> Any:
        """A client of the server."""
        import openai
        try:
            http = openai.DefaultAsyncHttpxClient(follow_redirects=False)  # a redirect would take the key elsewhere
            return openai.AsyncOpenAI(**self.writer.client_options, http_client=http, max_retries=0,
                                      timeout=openai.Timeout(self.config.timeout, connect=CONNECT_TIMEOUT))
        except (ImportError, ValueError, OSError) as error:  # of a proxy that it doesn't know, of certificates
            raise UserError(_said(f"{WHERE}: it can't be asked ({error}): check the proxy and certificates that "
                                  "the environment names")) from error

    async def converse(self, scene: Scene) -> None:
        """One image's dialogue to its end, or until the run is to stop."""
        dialogue = self.writer.dialogue(scene)
        body = next(dialogue)
        while True:
            key = key_of(body)
            async with self.locks.setdefault(key, asyncio.Lock()):  # images may have the same facts
                answer = self.answers.get(key) or await self.ask(key, body)
            if answer is None and self.halt:
                return
            self.meter.count(body, answer, self.answers.sent(key))
            try:
                body = dialogue.send(answer)
            except StopIteration:
                break
        self.bar.set_postfix_str(self.meter.line(), refresh=False)
        self.bar.update(1)

    async def ask(self, key: str, body: Body) -> Answer | None:
        """The answer to a request, sent as often as it takes; None where it gets none, or the run is to stop."""
        why = ""
        for attempt in range(self.config.max_retries + 1):
            cost = self.meter.most(body)
            if not await self.reserve(cost):
                return None
            try:
                await self.pace.turn()
                return None if self.halt else await self.send(key, body)
            except Refused as error:
                why = str(error)
                self.answers.refused(key)
                self.pace.pause(error.wait)
                self.fail(why, counts=not self.ever_answered and not error.is_busy)
                if not error.again:
                    break
            except Lost as error:
                why = str(error)
                self.meter.spent += cost
                self.fail(why, counts=not self.ever_answered)
            finally:
                await self.release(cost)
            if attempt < self.config.max_retries and not self.halt:
                await nap(random.uniform(0.5, 1) * min(FIRST_WAIT * 2**attempt, MAX_WAIT), self.halted)
        else:
            if not self.ever_answered:
                self.stop(f"{why}, {self.config.max_retries + 1} times")
        self.fail(why, counts=self.ever_answered)
        if not self.halt:
            self.warn_of(why)
        return None

    def fail(self, why: str, counts: bool) -> None:
        """After too many failures in a row, the run stops."""
        self.failures += counts
        if self.failures >= MAX_FAILURES:
            self.stop(f"{why}, {self.failures} times in a row")

    def stop(self, why: str) -> None:
        """Send nothing more, as the server is of no use."""
        self.end(f"{WHERE}: {self.writer.server} {why}: {CHECKS}, and run the same command again: what was answered is "
                 "kept")

    def end(self, message: str) -> None:
        """Send nothing more, and wake whoever waits to."""
        self.halt = self.halt or message
        self.halted.set()

    def warn_of(self, why: str) -> None:
        """Say why a request gets no answer, of the first one; the stage's result counts them."""
        if not self.has_warned:
            progress.warn(f"{WHERE}: a request was given up, and there may be more: the server {why}")
        self.has_warned = True

    async def reserve(self, cost: float) -> bool:
        """Keep so much of the budget free; where it is tight, wait for what those under way really cost."""
        async with self.settled:
            while not self.halt and not self.meter.allows(cost) and self.meter.reserved:
                await self.settled.wait()
            if not self.halt and not self.meter.allows(cost):
                self.end(f"stitch.llm.budget: {self.meter.spent:.4g} of {self.config.budget:.4g} are spent, and the "
                         f"next request may cost {cost:.2g}: run the same command with a larger one: what was answered "
                         "is kept")
            if not self.halt:
                self.meter.reserved.append(cost)
            return not self.halt

    async def release(self, cost: float) -> None:
        """What a request reserved is free again, as what it cost is counted."""
        async with self.settled:
            self.meter.reserved.remove(cost)
            self.settled.notify_all()

    async def send(self, key: str, body: Body) -> Answer:
        """Send a request once, and keep its answer."""
        import openai
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        self.answers.sending(key, self.meter.most_tokens(body))
        has_arrived = False
        try:
            async with (asyncio.timeout(self.config.timeout),
                        self.client.chat.completions.with_streaming_response.create(
                            model=body["model"], messages=body["messages"], extra_body=rest,
                            extra_headers=request_headers()) as response):
                has_arrived = True
                answer = read_answer(await _bounded(response))
        except openai.APIStatusError as error:
            if error.status_code in (FORBIDDEN if self.ever_answered else HOPELESS) or error.status_code < 400:
                self.stop(_said(f"answered {error.status_code}: {error.message}"))
            raise _meaning(error) from None
        except (TimeoutError, openai.APITimeoutError) as error:
            if _is_connecting(error):
                raise Refused("can't be reached") from None
            raise Lost(f"did not answer within {self.config.timeout:g} s") from None
        except openai.APIConnectionError as error:
            if _is_connecting(error):
                raise Refused(_said(f"can't be reached: {error.__cause__}")) from None
            raise Lost("broke off") from None
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if not has_arrived:  # what can't be put into a request
                raise Refused(_said(f"can't be asked: {error}"), again=False) from None
            raise Lost(_said(f"gave no chat completion: {error}")) from None
        except Exception as error:  # the HTTP library's own, while the answer is read; it has changed its name before
            if not type(error).__module__.startswith("http"):
                raise
            raise Lost("broke off") from None
        self.answers.put(key, answer)
        self.meter.spent += self.meter.price(body, answer)
        self.meter.count(body, answer, self.answers.sent(key))
        self.failures, self.ever_answered = 0, True
        return answer


class Pace:
    """Turns at a steady rate. What a pause of the server, or of ours, has cost is made up for no longer than BURST."""

    def __init__(self, per_minute: float | None, halted: asyncio.Event,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """No one waits any longer when `halted` is set."""
        self.interval = 60 / per_minute if per_minute else 0.0
        self.halted, self.clock = halted, clock
        self.next = self.resume = clock()
        self.queue = asyncio.Lock()

    async def turn(self) -> None:
        """Wait for one. Only the first of the queue knows when: a pause puts off one turn, and the others follow it."""
        async with self.queue:
            while (wait := max(self.next, self.resume) - self.clock()) > 0 and not self.halted.is_set():
                await nap(wait, self.halted)
            self.next = max(self.next, self.resume, self.clock() - BURST) + self.interval

    def pause(self, seconds: float) -> None:
        """No turns for a while."""
        if seconds:
            self.resume = max(self.resume, self.clock() + seconds)


async def nap(seconds: float, halted: asyncio.Event) -> None:
    """Sleep, unless nothing is worth waiting for any more."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(halted.wait(), seconds)


def read_answer(content: Any) -> Answer:
    """Of a chat completion as OpenAI's API has it; any of the errors that `send` knows where it is none."""
    choice, usage = content["choices"][0], content.get("usage") or {}
    text = choice["message"].get("content") or ""  # one who refuses may leave it out, and is paid
    if not isinstance(text, str):
        raise TypeError("its text is none")
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    tokens = [count if isinstance(count, int) and 0 <= count < 2**40 else None for count in counts]
    text = without_key(text).encode("utf-8", "replace").decode()  # a lone surrogate can't be kept
    return Answer(text, visible(str(choice.get("finish_reason") or "stop"))[:40], *tokens)


async def _bounded(response: Any) -> Any:
    """The JSON of an answer of bounded size."""
    data = b""
    async for part in response.iter_bytes():
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError(f"over {MAX_ANSWER_BYTES:,} bytes")
    return json.loads(data)


def _meaning(error: Any) -> Exception:
    """What a status means for the request, and for others."""
    status = error.status_code
    why = _said(f"answered {status}: {error.message}")
    if status in PERHAPS_PAID:
        return Lost(why)
    if status in (409, 429) or status >= 500:
        return Refused(why, is_busy=status == 429, wait=_retry_after(error.response.headers))
    return Refused(why, again=False)


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to be left alone for."""
    try:
        return min(max(float(headers.get("retry-after") or 0), 0.0), MAX_RETRY_AFTER)
    except ValueError:  # a date, or nonsense
        return 0.0


def _is_connecting(error: BaseException) -> bool:
    """Whether no connection was made, so that no request can have arrived."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "LocalProtocolError",
                                              "UnsupportedProtocol")


def _first(error: Exception) -> Exception:
    """What one of several that failed together failed of."""
    return _first(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error


def _said(text: str) -> str:
    return visible(without_key(text))[:300]
