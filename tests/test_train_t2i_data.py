"""The stream of training samples: fixed by seed and position, complete, and honest about what it cannot use."""

import io
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recap.errors import UserError
from recap.outputs import open_output
from recap.sample import Sample
from recap.shards import ShardWriter
from train_t2i.config import DEFAULT_ARMS, Arm, Train
from train_t2i.data import Stream, to_pixels

CONFIG = Train(resolution=8, caption_dropout=0.0, shuffle_buffer=7)


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two shards of 10 and 5 images whose captions name them."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, count in (("00000", 10), ("00001", 5)):
        with ShardWriter(str(folder / f"{shard}.tar")) as writer:
            for i in range(count):
                name = f"{shard}/{i}"
                writer.write(Sample(shard, str(i), {
                    "png": png(10 * i), "txt": f"alt {name}".encode(), "short.txt": f"short {name}".encode(),
                    "long.txt": f"long {name}".encode()}))
    return sorted(map(str, folder.glob("*.tar")))


def taken(stream: Stream, counts: list[int]) -> list[tuple[str, str, int]]:
    batches = [stream.take(count) for count in counts]
    return [item for batch in batches for item in zip(batch.uids, batch.captions, batch.seeds, strict=True)]


def test_an_epoch_gives_every_image_once_and_the_next_in_another_order(shards: list[str]) -> None:
    stream = Stream(shards, DEFAULT_ARMS["alt"], CONFIG, seed=0)
    first, second = taken(stream, [15]), taken(stream, [15])
    assert sorted(uid for uid, *_ in first) == sorted(uid for uid, *_ in second) == sorted(
        [f"00000/{i}" for i in range(10)] + [f"00001/{i}" for i in range(5)])
    assert [uid for uid, *_ in first] != [uid for uid, *_ in second]
    assert all(caption == f"alt {uid}" for uid, caption, _ in first)


@given(st.integers(0, 3), st.lists(st.integers(1, 7), min_size=1, max_size=12), st.data())
def test_a_stream_goes_on_from_any_position_as_if_never_stopped(shards: list[str], seed: int, counts: list[int],
                                                                data: st.DataObject) -> None:
    whole = taken(Stream(shards, DEFAULT_ARMS["mix"], CONFIG, seed), counts)
    stop = data.draw(st.integers(0, len(counts)))
    before = Stream(shards, DEFAULT_ARMS["mix"], CONFIG, seed)
    first = taken(before, counts[:stop])
    after = Stream(shards, DEFAULT_ARMS["mix"], CONFIG, seed, epoch=before.epoch, offset=before.offset)
    assert first + taken(after, counts[stop:]) == whole


@given(st.integers(1, 4), st.integers(4, 12))
def test_ranks_share_a_batch_without_gap_or_overlap(shards: list[str], ranks: int, size: int) -> None:
    whole = Stream(shards, DEFAULT_ARMS["alt"], CONFIG, 0).take(size).uids
    parts = [Stream(shards, DEFAULT_ARMS["alt"], CONFIG, 0).take(size, rank, ranks).uids for rank in range(ranks)]
    assert list(chain(*parts)) == whole


def test_arms_read_the_same_images_in_the_same_order_with_the_same_noise(shards: list[str]) -> None:
    alt, mix = (taken(Stream(shards, DEFAULT_ARMS[arm], CONFIG, 0), [30]) for arm in ("alt", "mix"))
    assert [(uid, seed) for uid, _, seed in alt] == [(uid, seed) for uid, _, seed in mix]


def test_mix_draws_short_and_long_anew_in_every_epoch(shards: list[str]) -> None:
    kinds: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for uid, caption, _ in taken(Stream(shards, DEFAULT_ARMS["mix"], CONFIG, 0), [15] * 40):
        kinds.setdefault(uid, set()).add(caption.split()[0])
        counts[caption.split()[0]] += 1
    assert all(found == {"short", "long"} for found in kinds.values())
    assert 0.4 < counts["short"] / 600 < 0.6


def test_captions_are_dropped_at_the_rate_asked_for(shards: list[str]) -> None:
    config = CONFIG.model_copy(update={"caption_dropout": 0.3})
    captions = [caption for _, caption, _ in taken(Stream(shards, DEFAULT_ARMS["alt"], config, 0), [15] * 60)]
    assert 0.25 < captions.count("") / len(captions) < 0.35


def test_shuffled_gives_every_image_the_caption_of_another_one(shards: list[str]) -> None:
    found = taken(Stream(shards, DEFAULT_ARMS["shuffled"], CONFIG, 0), [15])
    names = [caption.split()[1] for _, caption, _ in found]
    assert all(uid != name for (uid, *_), name in zip(found, names, strict=True))
    assert sorted(names) == sorted(uid for uid, *_ in found)


def test_images_without_the_arms_captions_are_left_out(shards: list[str], tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "00002.tar")) as writer:
        writer.write(Sample("00002", "bare", {"png": png(0), "txt": b"alt"}))
        texts = {"txt": b"alt", "short.txt": b"short", "long.txt": b"long"}
        writer.write(Sample("00002", "broken", {"png": b"no image", **texts}))
    stream = Stream([*shards, str(tmp_path / "00002.tar")], DEFAULT_ARMS["mix"], CONFIG, 0)
    assert len(stream.take(16).uids) == 15
    assert stream.rejected == {"00002/bare": "no_short_caption", "00002/broken": "undecodable_image"}


def write_captions(folder: Path, shard: str, levels: dict[int, int]) -> None:
    """A table as relabelling writes it: number of the image → its level of grey, which the shard's is 10 times it."""
    with open_output("parquet", str(folder), shard, ["short"], "mix") as output:
        for i, level in levels.items():
            output.write(Sample(shard, str(i), {"png": png(level), "txt": b"not written",
                                                "short.txt": f"table {shard}/{i}".encode()}))


def test_captions_of_tables_are_joined_to_the_shards_they_are_of(shards: list[str], tmp_path: Path) -> None:
    write_captions(tmp_path, "00000", {i: 99 if i == 3 else 10 * i for i in range(10) if i != 7})
    write_captions(tmp_path, "00001", {i: 10 * i for i in range(5)})
    config = CONFIG.model_copy(update={"captions": str(tmp_path)})
    used = sorted([f"00000/{i}" for i in range(10) if i not in (3, 7)] + [f"00001/{i}" for i in range(5)])
    for arm, kind in (("short", "table"), ("long", "long"), ("alt", "alt")):  # the shard's own stay
        stream = Stream(shards, DEFAULT_ARMS[arm], config, 0)
        found = taken(stream, [13])
        assert sorted(uid for uid, *_ in found) == used
        assert all(caption == f"{kind} {uid}" for uid, caption, _ in found)
        stream.take(1)  # the end of an epoch is where a shard's last faults are known
        assert stream.rejected == {"00000/3": "captions_of_another_image", "00000/7": "not_relabelled"}
    found = taken(Stream(shards, DEFAULT_ARMS["shuffled"], config, 0), [13])
    assert all(uid != caption.split()[1] for uid, caption, _ in found)


def test_a_shard_whose_captions_are_not_there_stops_with_one_clear_line(shards: list[str], tmp_path: Path) -> None:
    write_captions(tmp_path, "00000", {0: 0})
    with pytest.raises(UserError, match=r"no captions at .*00001\.parquet: name the folder"):
        Stream(shards, DEFAULT_ARMS["short"], CONFIG.model_copy(update={"captions": str(tmp_path)}), 0).take(15)


def test_captions_of_other_shards_stop_with_one_clear_line(shards: list[str], tmp_path: Path) -> None:
    write_captions(tmp_path, "00000", dict.fromkeys(range(10), 7))
    write_captions(tmp_path, "00001", {})
    with pytest.raises(UserError, match="captions_of_another_image 10, not_relabelled 5"):
        Stream(shards, DEFAULT_ARMS["short"], CONFIG.model_copy(update={"captions": str(tmp_path)}), 0).take(1)


def test_shards_that_hold_nothing_usable_stop_with_one_clear_line(shards: list[str]) -> None:
    with pytest.raises(UserError, match="no_rich_caption 15"):
        Stream(shards, Arm(captions={"rich": 1}), CONFIG, 0).take(1)


def test_the_middle_square_is_resized_to_minus_one_to_one() -> None:
    pixels = to_pixels(Image.new("RGB", (30, 10), (255, 0, 128)), 8)
    assert pixels.shape == (3, 8, 8)
    assert [round(pixels[c, 0, 0].item(), 2) for c in range(3)] == [1.0, -1.0, 0.0]
