"""The mark of a finished folder of the world: `done.json` with the settings that it was made with."""

import json
from pathlib import Path
from typing import Any

from recap.errors import UserError
from recap.shards import write_json


def is_done(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` was finished with these settings. `UserError` if it was finished with others."""
    try:
        found = json.loads((out / "done.json").read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'done.json'} cannot be read ({error}): delete {out} or give another folder") from None
    if found == settings:
        return True
    differing = [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]
    other = ", ".join(differing) or "version"
    raise UserError(f"{out} was made with another {other}: delete it or give another folder")


def finish(out: Path, settings: dict[str, Any]) -> None:
    """Mark `out` as finished; to be called last."""
    write_json(str(out / "done.json"), settings)
