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
    scale: float = 1
    """What a value is multiplied by where it is written."""

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
        return f"{100 * value:.1f} %" if self.is_share else f"{self.written(value):.2f}"

    def change(self, value: float) -> str:
        """A difference: `+0.51`, `−3.4`."""
        return signed(self.written(value), 1 if self.is_share else 2)

    def written(self, value: float) -> float:
        """The number that is written, and drawn in charts: a share's in percent."""
        return (100 if self.is_share else self.scale) * value

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
DISTANCES = [
    FID,
    Measure("fd_dinov2", "FD-DINOv2", lower_is_better=True, about="The same by DINOv2's features."),
    Measure("cmmd", "CMMD", lower_is_better=True, about="Distance to real images by CLIP, unbiased."),
    Measure("kid", "KID ×1000", lower_is_better=True, about="Distance to real images, unbiased.", scale=1000),
    Measure("precision", "Precision", is_share=True, about="Pictures that lie among real images."),
    Measure("recall", "Recall", is_share=True, about="Real images that pictures lie about."),
    Measure("density", "Density", about="How many real images each picture lies near."),
    Measure("coverage", "Coverage", is_share=True, about="Real images that have a picture near."),
]
"""To real images, in the order of a table."""


def measures_of(metrics: dict[str, Any]) -> list[Measure]:
    """The measures in a metrics.json: those of its judges, CLIP score, distances."""
    judges = metrics.get("judges")
    judged = [_judged(key, about) for judge in (judges if isinstance(judges, list) else [])
              if isinstance(judge, dict) and isinstance(judge.get("metrics"), dict)
              for key, about in judge["metrics"].items()]
    return [*judged, *(each for each in (CLIP_SCORE, *DISTANCES) if each.key in metrics)]


def _judged(key: str, about: Any) -> Measure:
    about = about if isinstance(about, dict) else {}
    return Measure(str(key), str(key).replace("_", " ").capitalize(), bool(about.get("lower_is_better", False)),
                   bool(about.get("is_share", True)), _sentence(str(about.get("about", ""))))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def headline_measures(measures: list[Measure]) -> list[Measure]:
    """The judges' first where there is one, CLIP score, and FID or the first distance. The first of them leads."""
    own = [each for each in measures if each not in (CLIP_SCORE, *DISTANCES)]
    return [*own[:1], *(each for each in measures if each == CLIP_SCORE),
            *[each for each in measures if each in DISTANCES][:1]]


def signed(value: float, digits: int = 2) -> str:
    """`+0.51`, `−0.20`, with a true minus sign; a zero has none."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]
