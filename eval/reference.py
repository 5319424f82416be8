"""Real images → what distances need of them, computed once and kept: `features.npz` and so on, one for each network."""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import NETWORKS
from eval.fid import Statistics, statistics
from eval.manifold import NEAREST, Radii, radii_of
from eval.mmd import cubic, gaussian, mean_within, unit
from recap.errors import UserError
from recap.storage import write_bytes

SCHEMA = 2
AGAIN = "run `recap reference` again, or name another file"


@dataclass(frozen=True)
class Reference:
    """Real images, as one network sees them."""

    features: np.ndarray
    """(M, D) float32."""
    statistics: Statistics
    within: float | None
    """Mean kernel among them: CMMD's or KID's; None for the network of neither."""
    radii: Radii | None
    """Of precision and its like; None where there are too few images for them, or another network."""
    about: dict[str, Any]
    """`network`, `resize`, `data` (a hash of what the images were), `excluded`."""

    @property
    def num(self) -> int:
        return len(self.features)


def of_features(features: np.ndarray, about: dict[str, Any], table: str = "features") -> Reference:
    """What distances by the network of `table` need of features (M, D); `ValueError` where M < 2."""
    values = np.asarray(features, dtype=np.float64)
    within = {"features": lambda: mean_within(values, cubic), "cmmd": lambda: mean_within(unit(values), gaussian)}
    radii = radii_of(values) if table == "features" and len(values) > max(NEAREST.values()) else None
    return Reference(np.asarray(features, dtype=np.float32), statistics(values),
                     within[table]() if table in within else None, radii, about)


def save(path: Path, found: Reference) -> None:
    """Write it as .npz, whole or not at all."""
    buffer = io.BytesIO()
    radii = found.radii.squared if found.radii else {}
    members: dict[str, Any] = {f"radii_{k}": values for k, values in radii.items()}
    if found.within is not None:
        members["within"] = np.float64(found.within)
    np.savez(buffer, features=found.features, mu=found.statistics.mu, sigma=found.statistics.sigma,
             about=np.str_(json.dumps({"schema": SCHEMA, **found.about})), **members)
    write_bytes(str(path), buffer.getvalue())


def load(path: Path) -> Reference:
    """Read what `save` wrote. `UserError` for anything else; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as content:
            members = dict(content)
        about = json.loads(str(members["about"]))
        radii = {int(name.removeprefix("radii_")): values for name, values in members.items() if "radii_" in name}
        mu, sigma = members["mu"], members["sigma"]
        found = Reference(members["features"], Statistics(mu, sigma, len(members["features"])),
                          float(members["within"]) if "within" in members else None,
                          Radii(radii) if radii else None, about)
    except FileNotFoundError:
        raise UserError(f"no reference statistics at {path}: {AGAIN}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
            RecursionError) as error:  # what numpy raises on other content
        raise UserError(f"{path} does not hold reference statistics ({type(error).__name__}): {AGAIN}") from None
    shapes_fit = (mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and found.features.shape[1:] == mu.shape
                  and (not radii or set(radii) == set(NEAREST.values()))
                  and all(values.shape == (found.num,) for values in radii.values())
                  and all(np.isfinite(values).all() for name, values in members.items() if name != "about"))
    if not shapes_fit or found.num < 2 or not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise UserError(f"{path} holds statistics of another form than schema {SCHEMA}: {AGAIN}")
    return found


def kept(path: str) -> Path | None:
    """Where in a folder lies what `recap reference` wrote; None if it wrote nothing there."""
    return next((folder for folder in (Path(path), Path(path) / "reference")
                 if any((folder / f"{table}.npz").is_file() for table in NETWORKS)), None)
