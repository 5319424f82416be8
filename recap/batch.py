"""`recap batch`: a chat model's requests as files for services that answer later and cheaper, and their answers.

The format is that of OpenAI's batches: JSON lines, each with a `custom_id`, which here is the request's key.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recap import pipeline
from recap.errors import UserError
from recap.llm import Scene
from recap.llm.answers import Answers, Body, key_of
from recap.llm.chat import ChatWriter
from recap.llm.meter import Meter
from recap.llm.server import read_answer
from recap.openai_api import without_key
from recap.pipeline import Experiment, Plan
from recap.sample import visible
from recap.stitch import scenes_of
from recap.storage import write_bytes

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000
"""Of a file, as OpenAI takes it."""
MAX_LINE_BYTES = 1 << 22


@dataclass
class Exported:
    """What there is to ask."""

    files: list[Path] = field(default_factory=list)
    num_requests: int = 0
    num_complete: int = 0
    """Images that need no request any more."""
    most: float = 0.0
    """What the requests can cost."""


@dataclass
class Imported:
    """What came back."""

    counts: Counter[str] = field(default_factory=Counter)
    """`kept`, `failed` (the service says that it did not answer), `unknown` (never exported here), `malformed`."""
    why: str = ""
    """The service's word on the first that failed."""


def export(exp: Experiment, out: Path) -> Exported:
    """Have the experts look, and write the requests that have no answer yet: `requests-000.jsonl` and so on.

    From then on they count as sent: what is exported again may be paid for twice.

    Raises:
        UserError: no chat model writes, or the folder holds requests already.
    """
    if exp.stitch.writer != "llm":
        raise UserError(f"batch: stitch.writer is {exp.stitch.writer!r}, which asks for nothing: set it to llm")
    if exp.stitch.llm.server is None:
        raise UserError("batch: stitch.llm.server is not set, so a model opened here would write: name the service's")
    if old := sorted(out.glob("requests-*.jsonl")):
        raise UserError(f"batch: {old[0]} is there already: import its answers, or name another folder")
    shards, looked = pipeline.look(exp)
    writer = ChatWriter(exp.stitch.llm, exp.styles, Plan(exp).answers, {"model": exp.stitch.llm.model})
    found = Exported()
    meter = Meter(writer.config)
    for number, bodies in enumerate(_files(_requests(writer, scenes_of(shards, looked), found))):
        found.files.append(out / f"requests-{number:03}.jsonl")
        content = "".join(map(_line, bodies)).encode("ascii")
        for body in bodies:  # before there is a file that could be sent
            found.most += meter.most(body)
            writer.answers.sending(key_of(body), meter.most_tokens(body))
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_bytes(str(found.files[-1]), content)
        except OSError as error:
            for body in bodies:
                writer.answers.refused(key_of(body))
            raise UserError(f"batch: {found.files[-1]} cannot be written ({error.strerror}): make room, or name "
                            "another folder") from error
    return found


def _requests(writer: ChatWriter, scenes: Iterable[Scene], found: Exported) -> Iterator[Body]:
    """Every request without an answer, each once."""
    exported = set[str]()
    for scene in scenes:
        body, answer = writer.replay(scene)[0][-1]
        key = key_of(body)
        if answer is not None:
            found.num_complete += 1
        elif key not in exported:
            exported.add(key)
            found.num_requests += 1
            yield body


def _line(body: Body) -> str:
    return json.dumps({"custom_id": key_of(body), "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"


def _files(bodies: Iterable[Body]) -> Iterator[list[Body]]:
    """The requests of one file after the other."""
    some: list[Body] = []
    num_bytes = 0
    for body in bodies:
        size = len(_line(body))
        if len(some) == MAX_REQUESTS or num_bytes + size > MAX_BYTES:
            yield some
            some, num_bytes = [], 0
        some.append(body)
        num_bytes += size
    if some:
        yield some


def read(exp: Experiment, files: Iterable[Path]) -> Imported:
    """Keep the answers of files that a service wrote.

    Raises:
        UserError: a file can't be read.
    """
    answers, found = Answers(Plan(exp).answers), Imported()
    for path in files:
        try:
            with path.open("rb") as file:
                while line := file.readline(MAX_LINE_BYTES):
                    if line.strip():
                        _keep(answers, line, found)
        except OSError as error:
            raise UserError(f"batch: {path} cannot be read ({error.strerror}): name the files that the service "
                            "wrote") from None
    return found


def _keep(answers: Answers, line: bytes, found: Imported) -> None:
    """Keep the answer of a line."""
    try:
        content = json.loads(line)
        key, response = str(content["custom_id"]), content.get("response") or {}
        if not answers.known(key):
            found.counts["unknown"] += 1
        elif error := content.get("error") or (response.get("status_code", 200) != 200 and response):
            answers.refused(key)
            found.counts["failed"] += 1
            found.why = found.why or visible(without_key(json.dumps(error, ensure_ascii=False)))[:300]
        else:
            answers.put(key, read_answer(response["body"]))
            found.counts["kept"] += 1
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        found.counts["malformed"] += 1
