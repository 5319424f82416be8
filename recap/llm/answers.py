"""What chat models have answered, by request, in an SQLite file: nothing that was paid for is ever asked again.

A request is marked before it is sent and its answer is kept the moment it is there, so a command that is killed loses
at most the answers under way, and the next one knows which of them may have been paid for.
"""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recap.errors import UserError

SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY,
    sent INTEGER NOT NULL,      -- times that it was sent and not refused
    most_prompt INTEGER NOT NULL,      -- tokens that it can take
    most_completion INTEGER NOT NULL,
    text TEXT,                  -- the answer; NULL where there is none
    finish_reason TEXT,
    prompt_tokens INTEGER,      -- NULL where the server doesn't say
    completion_tokens INTEGER
) STRICT"""
WAIT = 60.0
"""Seconds for another command that writes to the file."""

Body = dict[str, Any]
"""Of a request, as OpenAI's chat completions take it. It holds no key and no address."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and what that took."""

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Answers:
    """The answers in a file, by `key_of` their requests. To be used from one thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Every statement is its own transaction. In WAL mode none waits for the disk: a killed process loses nothing,
        # and a machine that loses its power the last answers.
        try:
            self.file = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
        except sqlite3.Error as error:
            raise self._useless(error) from error
        self._do("PRAGMA journal_mode = WAL")
        self._do("PRAGMA synchronous = NORMAL")
        self._do(SCHEMA)

    def get(self, key: str) -> Answer | None:
        """The answer to a request; None where there is none."""
        row = self._do("SELECT text, finish_reason, prompt_tokens, completion_tokens FROM requests "
                       "WHERE key = ? AND text IS NOT NULL", [key]).fetchone()
        return Answer(*row) if row else None

    def sending(self, key: str, most: tuple[int, int]) -> None:
        """Called before a request is sent; with the tokens that it can take, its own and its answer's."""
        self._do("INSERT INTO requests (key, sent, most_prompt, most_completion) VALUES (?, 1, ?, ?) "
                 "ON CONFLICT DO UPDATE SET sent = sent + 1", [key, *most])

    def refused(self, key: str) -> None:
        """Called where the server would not serve it: that is not paid. Of what was answered it can't be true."""
        self._do("UPDATE requests SET sent = sent - 1 WHERE key = ? AND sent > 0 AND text IS NULL", [key])

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer. A first one stays."""
        self._do(
            "INSERT INTO requests VALUES (?, 1, 0, 0, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET text = excluded.text, "
            "finish_reason = excluded.finish_reason, prompt_tokens = excluded.prompt_tokens, "
            "completion_tokens = excluded.completion_tokens WHERE text IS NULL",
            [key, answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens])

    def sent(self, key: str) -> int:
        """How often a request was sent and not refused. More than once: all but one may have been paid for nothing."""
        row = self._do("SELECT sent FROM requests WHERE key = ?", [key]).fetchone()
        return int(row[0]) if row else 0

    def known(self, key: str) -> bool:
        """Whether a request was ever sent, or exported."""
        return self._do("SELECT 1 FROM requests WHERE key = ?", [key]).fetchone() is not None

    def unanswered(self) -> int:
        """How many requests were sent, and have no answer."""
        return int(self._do("SELECT COUNT(*) FROM requests WHERE text IS NULL AND sent > 0").fetchone()[0])

    def spent(self, prompt_price: float, completion_price: float) -> float:
        """What all requests of the file cost, for prices of a token; the most, where that is not known."""
        cost = self._do(
            "WITH priced AS (SELECT *, most_prompt * ?1 + most_completion * ?2 AS most FROM requests) "
            "SELECT TOTAL(CASE WHEN text IS NULL THEN sent * most ELSE "
            "COALESCE(prompt_tokens * ?1 + completion_tokens * ?2, most) + MAX(sent - 1, 0) * most END) FROM priced",
            [prompt_price, completion_price]).fetchone()[0]
        return float(cost)

    def close(self) -> None:
        self.file.close()

    def _do(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Raises UserError where the file is full, damaged or none of ours: asking without it would be paying twice."""
        try:
            return self.file.execute(statement, values)
        except sqlite3.Error as error:
            raise self._useless(error) from error

    def _useless(self, error: sqlite3.Error) -> UserError:
        return UserError(f"{self.path} can't be used ({error}): make room, or move it away to begin anew and pay anew, "
                         "and run the same command again")


def key_of(body: Body) -> str:
    """SHA-256 of a request's canonical JSON: 64 hex digits."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
