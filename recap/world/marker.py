"""The marks of a folder of the world: `begun.json`, then `done.json`, with the settings that it is made with."""

import json
from pathlib import Path
from typing import Any

from recap.errors import UserError
from recap.storage import write_json

DONE, BEGUN = "done.json", "begun.json"


def is_done(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` was finished with these settings. `UserError` if it was finished, or begun, with others."""
    done, begun = (_read(out / name) for name in (DONE, BEGUN))
    for found in (done, begun):
        if found is not None and found != settings:
            changed = [f"{key} {found.get(key)}, not {settings[key]}" for key in settings
                       if found.get(key) != settings[key]]
            raise UserError(f"{out} was made with {', '.join(changed) or 'another version'}: delete it or give another "
                            "folder")
    return done is not None


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Say what `out` is being made with, so that what a killed command leaves is not mixed with other things."""
    write_json(str(out / BEGUN), settings)


def finish(out: Path, settings: dict[str, Any]) -> None:
    """Mark `out` as finished; to be called last."""
    write_json(str(out / DONE), settings)
    (out / BEGUN).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete {path.parent} or give another folder") from None
    return found if isinstance(found, dict) else {}
