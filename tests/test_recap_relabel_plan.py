"""What relabelling would take: measured on a little of the set, by the real path, and nothing is left of it."""

import re
import tarfile
from pathlib import Path

import pytest

from recap.config import load
from recap.errors import UserError
from recap.pipeline import Experiment
from recap.relabel_plan import Probe, _size, _table, plan
from recap.sample import Sample
from recap.shards import ShardWriter, read_shard


def experiment(tmp_path: Path, models: Path, *shards: str) -> Experiment:
    file = tmp_path / "mine.toml"
    file.write_text(f"""
        runs = "{tmp_path / 'runs'}"
        device = "cpu"
        data.shards = {list(shards)!r}
        styles.short = {{ prompt = "A short caption:", max_new_tokens = 4 }}
        captioner = {{ model = "{models / 'blip2'}", dtype = "float32", tuned = "none" }}
        relabel.batch_size = 4
    """)
    return load(file, [], Experiment)


@pytest.fixture
def shards(world_shards: Path, tmp_path: Path) -> list[str]:
    """Five shards: of drawings, of which one is no image; one is cut, one has no sample."""
    samples = list(read_shard(str(world_shards / "train" / "00000.tar"), []))
    paths = [tmp_path / "in" / f"{place:05d}.tar" for place in range(5)]
    for path in paths:
        with ShardWriter(str(path)) as writer:
            for place, sample in enumerate(samples[:40]):
                writer.write(Sample("", sample.key, sample.members | ({"png": b"none"} if place == 3 else {})))
    paths[2].write_bytes(paths[2].read_bytes()[:60_000])
    with tarfile.open(paths[4], "w"):
        pass
    return list(map(str, paths))


def test_a_plan_is_measured_and_leaves_nothing_behind(shards: list[str], tmp_path: Path, world_models: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    lines = plan(experiment(tmp_path, world_models, *shards), 2.5, 8).splitlines()
    assert float(re.fullmatch(r"measured    ([\d.,]+) images/s, on \d+ images of 3 shards", lines[0])[1]) > 0  # type: ignore[index]
    assert "undecodable_image" in lines[2] and "truncated" not in lines[2]  # a copy of what is whole is probed
    assert re.match(r"this set +1[2-6]\d ", lines[6]) and len(lines) == 12
    assert max(map(len, lines)) <= 80
    assert not list((tmp_path / "tmp").iterdir()) and not (tmp_path / "runs").exists()


def test_shards_without_an_image_are_one_clear_line(tmp_path: Path, world_models: Path) -> None:
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for place in range(40):
            writer.write(Sample("", str(place), {"png": b"none", "txt": b"x"}))
    with pytest.raises(UserError, match="no image could be used"):
        plan(experiment(tmp_path, world_models, str(tmp_path / "00000.tar")), None, 1)


@pytest.mark.parametrize("price", [None, 3.0])
def test_all_follows_from_the_rate(price: float | None) -> None:
    probe = Probe("a device", 100, 3, 50.0, {"no_image": 20}, 1e5, 1e3, 200.0, 360_000, is_estimated=True)
    lines = list(_table(probe, price, 4))
    rows = {line.split("  ")[0]: line.split()[-(6 + 2 * (price is not None)):] for line in lines[6:10]}
    assert lines[2] == "quarantined 20.0% (no_image 20)" and max(map(len, lines)) <= 80
    cost = ["6.00"] if price else []
    assert lines[6].split() == ["~this", "set", "360,000", "2.0", "0.02", *cost, "29.1", "GB", "57.6", "MB"]
    billion = [] if price is None else ["16,666.67"]
    assert lines[9].split()[2:] == ["1,000,000,000", "5,555.6", "57.87", *billion, "80.8", "TB", "160", "GB"]
    assert len(rows) == 4


def test_sizes() -> None:
    assert [_size(number) for number in (0, 12.34, 999.6, 1e6, 2.5e15)] == ["0 B", "12.3 B", "1 kB", "1 MB", "2.5 PB"]
