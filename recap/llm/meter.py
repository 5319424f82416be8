"""What a run's requests take: tokens, money, what may have been paid twice; and whether the budget allows more."""

import json
from typing import Any, NamedTuple

from recap.config.stitch import Llm
from recap.llm.answers import Answer, Body, key_of


class Took(NamedTuple):
    """What requests took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    """Answers that don't say how long they are."""
    lost: int = 0
    """Times that one was sent, not refused, and not answered."""
    cost: float = 0.0


class Meter:
    """Counts every request of a run once, also those that an earlier try had answered, or lost."""

    def __init__(self, config: Llm) -> None:
        self.config = config
        self.counted: dict[str, Took] = {}
        """By the request's key."""
        self.total = Took()
        self.reserved: list[float] = []
        """The most that each request under way can cost."""

    def allows(self, cost: float) -> bool:
        """Whether the budget holds, with what those under way have reserved."""
        return self.config.budget is None or self.total.cost + sum(self.reserved) + cost <= self.config.budget

    def most(self, body: Body) -> float:
        """The most that a request can cost. No token is shorter than a byte."""
        limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or self.config.max_tokens)
        return self._money(len(json.dumps(body, ensure_ascii=False).encode()), limit)

    def most_of_another(self, body: Body, sent: int) -> float:
        """The most that is added when a request is sent once more, with losses that have not been counted yet."""
        counted = self.counted.get(key_of(body), Took())
        return self.most(body) * (sent - counted.lost + 1)

    def count(self, body: Body, answer: Answer | None, sent: int) -> None:
        """Count a request with all the times that it was sent, instead of what was counted of it before."""
        key = key_of(body)
        before, now = self.counted.get(key, Took()), self._took(body, answer, sent)
        self.counted[key] = now
        self.total = Took._make(total - old + new for total, old, new in zip(self.total, before, now, strict=True))

    def _took(self, body: Body, answer: Answer | None, sent: int) -> Took:
        """One without an answer has been lost each time."""
        if answer is None:
            return Took(lost=sent, cost=sent * self.most(body))
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        known = prompt is not None and completion is not None
        cost = self._money(prompt or 0, completion or 0) if known else self.most(body)
        lost = max(sent - 1, 0)
        return Took(prompt or 0, completion or 0, not known, lost, cost + lost * self.most(body))

    def result(self) -> dict[str, Any]:
        """For `done.json`. Cost is an upper bound where answers were lost, or don't say how long they are."""
        took = self.total
        return {"requests": len(self.counted), "prompt_tokens": took.prompt_tokens,
                "completion_tokens": took.completion_tokens, "unmetered_answers": took.unmetered,
                "possible_double_payments": took.lost, "cost": round(took.cost, 6)}

    def line(self) -> str:
        """Of a bar: what counts to whoever waits."""
        spent, lost = self.total.cost, self.total.lost
        return ", ".join(filter(None, [f"{spent:.2f} spent" if spent else "", f"{lost} lost" if lost else ""]))

    def _money(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.config.prompt_price + completion_tokens * self.config.completion_price) / 1e6
