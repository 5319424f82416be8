"""An experiment with some values of its own: what `compare` and `sweep` run several of."""

from pathlib import Path
from typing import Any

from recap import pipeline
from recap.config import validate
from recap.pipeline import Experiment


def variant(exp: Experiment, name: str, runs: Path, values: dict[str, Any], where: str) -> Experiment:
    """The experiment with other values, whose run is `runs/name`.

    Args:
        values: tables in tables, as in the experiment's file.
        where: for messages.

    Raises:
        UserError: the values make no valid experiment.
    """
    content = exp.model_dump(exclude_unset=True, exclude={"ablate", "compare", "sweep"})
    if stitches(exp):  # the experiment's own captions, for every variant
        shards = str(Path(exp.runs) / exp.name / "stitch" / "*.tar")
        content["finetune"] = content.get("finetune", {}) | {"shards": shards}
    return validate(_merged(content, values) | {"name": name, "runs": str(runs)}, Experiment, where)


def stitches(exp: Experiment) -> bool:
    """Whether its captioner learns from what it stitches itself."""
    return exp.finetune.shards is None and exp.finetune.dataset is None


def stitch(exp: Experiment, redo: bool) -> None:
    """Stitch what variants learn from, where the experiment names no other captions."""
    if stitches(exp):
        pipeline.run(exp, "stitch", redo)


def _merged(content: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The second's values before the first's, in every table."""
    both = {key: _merged(content[key], value) for key, value in values.items()
            if isinstance(value, dict) and isinstance(content.get(key), dict)}
    return content | values | both
