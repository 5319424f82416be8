"""The measures that arms are compared by: how each is called and written."""

from dataclasses import dataclass
from typing import Any

NONE = "–"


@dataclass(frozen=True)
class Measure:
    """One column of figures."""

    key: str
    """Its name in metrics.json."""
    label: str
    lower_is_better: bool = False
    is_share: bool = False
    """In 0…1, written in percent; a difference of two is in points."""
    about: str = ""

    @property
    def name(self) -> str:
        """Its label within a sentence: `object accuracy`, `FID`."""
        return self.label if self.label[1:2].isupper() else f"{self.label[:1].lower()}{self.label[1:]}"

    @property
    def arrow(self) -> str:
        return "↓" if self.lower_is_better else "↑"

    def text(self, value: float | None) -> str:
        """`23.10`, `63.2 %`."""
        if value is None:
            return NONE
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.2f}"

    def change(self, value: float) -> str:
        """A difference: `+0.51`, `−3.4`."""
        return signed(100 * value, 1) if self.is_share else signed(value)

    def figures(self, found: dict[str, Any]) -> str:
        """`+0.51, 95 % interval +0.20 to +0.82` of a comparison."""
        interval = f"95 % interval {self.interval(found)}" if found["ci"] else self.interval(found)
        return f"{self.change(found['difference'])}{self.unit}, {interval}"

    def interval(self, found: dict[str, Any]) -> str:
        """`+0.20 to +0.82` of a comparison, or why there is none."""
        if not found["ci"]:
            return str(found.get("note") or NONE)
        low, high = found["ci"]
        return f"{self.change(low)} to {self.change(high)}"

    @property
    def unit(self) -> str:
        return " points" if self.is_share else ""


FID = Measure("fid", "FID", lower_is_better=True, about="Distance to real images.")
CLIP_SCORE = Measure("clip_score", "CLIP score", about="Match of picture and prompt.")


def measures_of(metrics: dict[str, Any]) -> list[Measure]:
    """The measures in a metrics.json: those of its judge, CLIP score, FID."""
    judge = metrics.get("judge")
    judged = judge.get("metrics") if isinstance(judge, dict) else None
    own = [Measure(str(key), str(key).replace("_", " ").capitalize(), is_share=True,
                   about=_sentence(str(text))) for key, text in judged.items()] if isinstance(judged, dict) else []
    return [*own, CLIP_SCORE, FID]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def headline_measures(measures: list[Measure]) -> list[Measure]:
    """The judge's first where there is one, CLIP score and FID. The first of them leads."""
    return [*measures[:-2][:1], *measures[-2:]]


def signed(value: float, digits: int = 2) -> str:
    """`+0.51`, `−0.20`, with a true minus sign; a zero has none."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]
