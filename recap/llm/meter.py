"""What a run's requests take: tokens, money, what may have been paid twice; and whether the budget allows more."""

import json
from typing import Any

from recap.config.stitch import Llm
from recap.llm.answers import Answer, Body, key_of


class Meter:
    """Counts every request of a stage once, also those that an earlier try had answered; and all money of the run."""

    def __init__(self, config: Llm, spent: float = 0.0) -> None:
        """What was spent before is what `Answers.spent` says."""
        self.config = config
        self.spent = spent
        """By all requests that were ever sent, with the most that those without an answer may have cost."""
        self.counted: set[str] = set()
        self.tokens = {"prompt_tokens": 0, "completion_tokens": 0}
        self.unmetered = 0
        self.lost = 0
        self.cost = 0.0
        self.reserved: list[float] = []
        """The most that each request under way can cost."""

    def allows(self, cost: float) -> bool:
        """Whether the budget holds, with what those under way have reserved."""
        return self.config.budget is None or self.spent + sum(self.reserved) + cost <= self.config.budget

    def most(self, body: Body) -> float:
        """The most that a request can cost."""
        return self._money(*self.most_tokens(body))

    def most_tokens(self, body: Body) -> tuple[int, int]:
        """The most that a request can have, and its answer. No token is shorter than a byte."""
        limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or self.config.max_tokens)
        return len(json.dumps(body, ensure_ascii=False).encode()), limit

    def count(self, body: Body, answer: Answer | None, sent: int) -> None:
        """Count a request with all the times that it was sent; one without an answer has been lost each time."""
        if key_of(body) in self.counted:
            return
        self.counted.add(key_of(body))
        lost = sent - (answer is not None)
        self.lost += max(lost, 0)
        if answer is not None:
            self.unmetered += answer.prompt_tokens is None or answer.completion_tokens is None
            self.tokens["prompt_tokens"] += answer.prompt_tokens or 0
            self.tokens["completion_tokens"] += answer.completion_tokens or 0
            self.cost += self.price(body, answer)
        self.cost += max(lost, 0) * self.most(body)

    def price(self, body: Body, answer: Answer) -> float:
        """Of an answer; the most that it can be where the server doesn't say how long it is."""
        if answer.prompt_tokens is None or answer.completion_tokens is None:
            return self.most(body)
        return self._money(answer.prompt_tokens, answer.completion_tokens)

    def result(self) -> dict[str, Any]:
        """For `done.json`. Cost is an upper bound where answers were lost, or don't say how long they are."""
        return {"requests": len(self.counted), **self.tokens, "unmetered_answers": self.unmetered,
                "possible_double_payments": self.lost, "cost": round(self.cost, 6)}

    def line(self) -> str:
        """Of a bar: what counts to whoever waits."""
        parts = [f"{self.spent:.2f} spent" if self.spent else "", f"{self.lost} lost" if self.lost else ""]
        return ", ".join(filter(None, parts))

    def _money(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.config.prompt_price + completion_tokens * self.config.completion_price) / 1e6
