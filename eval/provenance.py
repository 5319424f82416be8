"""What was run: settings, how long it took, and how many images went in and came out."""

import json
from typing import Any

KNOWN = {"images_in", "images_out", "quarantined", "seconds", "fingerprint"}
"""Numbers of a stage that are shown each in its own place."""


def settings(config: dict[str, Any]) -> str:
    """The experiment as `table.key = value` lines: TOML, and also what a command line overrides."""
    lines: list[str] = []
    for name, value in config.items():
        block = [f"{key} = {json.dumps(leaf, ensure_ascii=False)}" for key, leaf in _leaves(value, name)]
        lines += ["", *block] if isinstance(value, dict) and block else block
    return "\n".join(lines).strip()


def _leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for name, child in value.items() for leaf in _leaves(child, f"{key}.{name}")]
    return [] if value is None else [(key, value)]


def flows(counts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per stage: how many images came in, went out, and were quarantined for which reason; and its other numbers."""
    found = []
    for stage, result in counts.items():
        others = {name.replace("_", " "): value for name, value in result.items()
                  if name not in KNOWN and isinstance(value, int | float) and not isinstance(value, bool)}
        named = result.get("flags", {}) | (result["captions"] if stage == "relabel" and "captions" in result else {})
        others |= {name.replace("_", " ").replace("/", ": "): value for name, value in named.items()}
        quarantined = result.get("quarantined") or {}
        found.append({"stage": stage, "in": result.get("images_in"), "out": result.get("images_out"), "others": others,
                      "quarantined": sorted(quarantined.items(), key=lambda pair: -pair[1])})
    return found


def times(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by kind of stage, over seeds and arms: `seed-0/train/alt` counts as `train`, and all points of curves as
    `curves`.
    """
    totals: dict[str, float] = {}
    for stage, value in seconds.items():
        parts = stage.split("/")
        kind = "curves" if "sweep" in parts else parts[-2] if len(parts) > 1 else stage
        totals[kind] = totals.get(kind, 0.0) + value
    return totals


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
