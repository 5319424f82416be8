"""The stream of training samples: the same on any number of processes and from any step on; what it leaves out."""

import gc
import io
import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recap import progress
from recap.clip_bpe import clip_tokenizer
from recap.errors import UserError
from recap.outputs import open_output
from recap.sample import Sample, decode_image
from recap.shards import ShardWriter
from train_t2i.batch import Batch, Part, Recipe
from train_t2i.config import DEFAULT_ARMS, Arm, Buckets, Filters, Train
from train_t2i.data import MANY, Parts, steps
from train_t2i.images import to_pixels
from train_t2i.order import Cursor, Entry
from train_t2i.usable import usable

RECIPE = Recipe([clip_tokenizer()], 4, 8, 1000)
CONFIG = Train(resolution=8, caption_dropout=0.0, shuffle_buffer=7, batch_size=5, num_workers=0)
Row = tuple[Any, ...]
"""All that a batch has of a sample, its name first."""


def image(level: int, size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, kind)
    return buffer.getvalue()


UNDECODABLE = image(0)[:45]
"""It has a header, and so a size."""


def captioned(shard: str, place: int, content: bytes, **more: bytes) -> Sample:
    texts = {name: f"{kind} {shard}/{place}".encode() for name, kind in (
        ("txt", "alt"), ("short.txt", "short"), ("long.txt", "long"))}
    return Sample(shard, str(place), {"png": content, **texts, **more})


def write(folder: Path, samples: dict[str, list[Sample]]) -> list[str]:
    for shard, some in samples.items():
        with ShardWriter(str(folder / f"{shard}.tar")) as writer:
            for sample in some:
                writer.write(sample)
    return [str(folder / f"{shard}.tar") for shard in samples]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two shards of 10 and 5 images whose captions name them."""
    return write(tmp_path_factory.mktemp("shards"), {
        shard: [captioned(shard, place, image(10 * place)) for place in range(count)]
        for shard, count in (("00000", 10), ("00001", 5))})


FLAWS = {"no_long_caption": 4, "missing_image": 4, "undecodable_image": 6 + 4}
"""Of `flawed`."""


@pytest.fixture(scope="module")
def flawed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five shards: 1, 0, 30, 4 and 12 samples, of five proportions; 18 of the 47 can't be used, all of one shard among
    them, and one in four has a long caption.
    """
    def sample(shard: str, place: int) -> Sample:
        found = captioned(shard, place, image(place, [(9, 7), (8, 16), (30, 10), (8, 8), (7, 9)][place % 5]))
        if place % 4 == 1:
            found.members["long.txt"] += b" word" * 90
        if shard == "00003":
            del found.members["long.txt"]
        elif place % 9 == 4:
            del found.members["png"]
        elif place % 7 == 3:
            found.members["png"] = UNDECODABLE
        elif place % 5 == 2 and shard == "00002":
            found.members["png"] = b"no image"
        return found

    return write(tmp_path_factory.mktemp("flawed"), {
        shard: [sample(shard, place) for place in range(count)]
        for shard, count in (("00000", 1), ("00001", 0), ("00002", 30), ("00003", 4), ("00004", 12))})


# --- what is read of the steps ---------------------------------------------------------------------------------------


def rows(part: Part) -> list[Row]:
    """In the order of the batches."""
    return [(uid, tuple(batch.tokens[place].flatten().tolist()), *(
        getattr(batch, name)[place].numpy().tobytes() for name in (
            "images", "posterior_noise", "noise", "timesteps", "weights", "size_ids")))
        for batch in part.batches for place, uid in enumerate(batch.uids)]


def shared(shards: list[str], arm: Arm, config: Train, ranks: int = 1, workers: int = 1, seed: int = 0,
           cursors: dict[int, Cursor] | None = None) -> Iterator[list[Part]]:
    """Step after step, the parts of all ranks and workers; each of them reads for itself."""
    readers = [Parts(shards, arm, config, seed, RECIPE, None, rank, ranks, cursors).share(
        rank * workers + worker, ranks * workers) for rank in range(ranks) for worker in range(workers)]
    return zip(*readers, strict=True)  # type: ignore[arg-type]


def read(shards: list[str], arm: str, config: Train, num_steps: int, seed: int = 0) -> list[Part]:
    parts = Parts(shards, DEFAULT_ARMS[arm], config, seed, RECIPE)
    return list(itertools.islice(parts.share(0, 1), num_steps))


def batches(shards: list[str], arm: str, config: Train, num_steps: int, seed: int = 0) -> list[Batch]:
    return [batch for part in read(shards, arm, config, num_steps, seed) for batch in part.batches]


def captions(found: list[Batch]) -> list[tuple[str, str]]:
    """Uid and caption, which has one window."""
    return [(uid, RECIPE.tokenizers[0].decode(ids[0, 0], skip_special_tokens=True))
            for batch in found for uid, ids in zip(batch.uids, batch.tokens, strict=True)]


def told(caption: str) -> str:
    """As the tokenizer gives it back."""
    return str(RECIPE.tokenizers[0].decode(RECIPE.tokenizers[0](caption)["input_ids"], skip_special_tokens=True))


def named(uid: str, kind: str) -> str:
    return told(f"{kind} {uid}")


def rejected(parts: list[Part]) -> Counter[str]:
    return sum((part.rejects for part in parts), Counter())


# --- the same on any number of processes -----------------------------------------------------------------------------


SETTINGS = st.builds(lambda batch_size, buffer, buckets, crop, flip: CONFIG.model_copy(update={
    "batch_size": batch_size, "shuffle_buffer": buffer, "crop": crop, "flip": flip, "caption_dropout": 0.3,
    "buckets": Buckets(step=8, max_aspect=3) if buckets else None, "resolution": 16 if buckets else 8,
    "max_windows": 1}), st.integers(1, 9), st.integers(1, 40), st.booleans(), st.sampled_from(["center", "random"]),
    st.booleans())


@settings(max_examples=60)
@given(SETTINGS, st.sampled_from(["alt", "mix", "shuffled"]), st.integers(0, 2), st.integers(1, 4), st.integers(1, 3),
       st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_any_number_of_ranks_and_workers_reads_the_stream_of_one_and_goes_on_from_any_step(
        flawed: list[str], config: Train, arm: str, seed: int, ranks: int, workers: int, ranks_then: int,
        workers_then: int, stop: int) -> None:
    arm_, num_steps = DEFAULT_ARMS[arm], 9
    whole = [parts[0] for parts in itertools.islice(shared(flawed, arm_, config, seed=seed), num_steps)]
    found = list(itertools.islice(shared(flawed, arm_, config, ranks, workers, seed), stop))
    cursors = {lane: cursor for parts in found for part in parts for lane, cursor in part.cursors.items()}
    found += itertools.islice(shared(flawed, arm_, config, ranks_then, workers_then, seed, cursors), num_steps - stop)
    for one, parts in zip(whole, found, strict=True):
        everyone = [row for part in parts for row in rows(part)]
        if config.buckets:  # a part's samples are by size
            assert sorted(everyone) == sorted(rows(one))
        else:
            assert everyone == rows(one)
        assert [lane for part in parts for lane in part.cursors] == list(one.cursors)  # each is told of once
        assert {lane: cursor for part in parts for lane, cursor in part.cursors.items()} == one.cursors
        assert rejected(list(parts)) == one.rejects
        assert sum(part.num_cut for part in parts) == one.num_cut


def test_ranks_have_shares_as_even_as_can_be_and_some_workers_none(shards: list[str]) -> None:
    for parts in itertools.islice(shared(shards, DEFAULT_ARMS["alt"], CONFIG, 2, 4), 5):
        sizes = [sum(map(len, part.batches)) for part in parts]
        assert sum(sizes) == 5 and sorted(sizes) == [0, 0, 0, 1, 1, 1, 1, 1]
        assert (sum(sizes[:4]), sum(sizes[4:])) == (2, 3)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_worker_processes_read_what_one_process_reads_and_end_with_it(flawed: list[str], num_workers: int) -> None:
    config = CONFIG.model_copy(update={"num_workers": num_workers})
    whole = read(flawed, "mix", CONFIG, 9)
    for rank in range(2):
        parts = Parts(flawed, DEFAULT_ARMS["mix"], config, 0, RECIPE, None, rank, 2)
        with closing(steps(parts)) as reading:
            found = list(itertools.islice(reading, 4))
        assert not multiprocessing.active_children()
        cursors = {lane: cursor for part in found + whole[:4] for lane, cursor in part.cursors.items()}
        parts = Parts(flawed, DEFAULT_ARMS["mix"], config, 0, RECIPE, None, rank, 2, whole[3].cursors)
        assert cursors == whole[3].cursors
        with closing(steps(parts)) as reading:
            found += itertools.islice(reading, 5)
        for one, part in zip(whole, found, strict=True):
            assert sorted(rows(part)) == sorted(rows(one)[2:] if rank else rows(one)[:2])
    assert not multiprocessing.active_children()


def test_a_step_has_one_batch_for_each_size_the_longest_captions_first(tmp_path: Path) -> None:
    made = write(tmp_path, {"00000": [captioned("00000", place, image(place, [(8, 8), (32, 8)][place % 2]), **{
        "short.txt": b"a cat " * (1 + 60 * (place % 3))}) for place in range(24)]})
    config = CONFIG.model_copy(update={"batch_size": 12, "buckets": Buckets(step=8, max_aspect=4), "resolution": 16,
                                       "num_workers": 2})
    with closing(steps(Parts(made, DEFAULT_ARMS["short"], config, 0, RECIPE))) as reading:
        for part in itertools.islice(reading, 6):
            assert len(part.batches) == len({batch.images.shape for batch in part.batches})
            assert sum(map(len, part.batches)) == 12
            for batch in part.batches:
                places = [int(uid.partition("/")[2]) for uid in batch.uids]
                assert batch.num_windows == [[1, 2, 4][place % 3] for place in places]
                assert batch.num_windows == sorted(batch.num_windows, reverse=True)
                assert batch.images[:, 0, 0, 0].tolist() == places


# --- the same for all arms -------------------------------------------------------------------------------------------


def test_arms_read_the_same_images_in_the_same_order_with_the_same_noise(shards: list[str]) -> None:
    config = CONFIG.model_copy(update={"crop": "random", "flip": True, "caption_dropout": 0.14})
    found = {arm: [(row[0], *row[2:]) for part in read(shards, arm, config, 12) for row in rows(part)]
             for arm in ("alt", "short", "mix", "shuffled")}
    assert len(set(found["alt"])) == 60 and found["alt"] == found["short"] == found["mix"] == found["shuffled"]
    assert [(row[0], *row[2:]) for part in read(shards, "alt", config, 12, seed=1) for row in rows(part)] != (
        found["alt"])


def test_noise_and_timesteps_are_drawn_anew_in_every_epoch_as_they_should_be(shards: list[str]) -> None:
    found = Batch.cat(batches(shards, "alt", CONFIG.model_copy(update={"resolution": 64}), 60))
    assert len(set(found.timesteps.tolist())) > 200 and 400 < found.timesteps.float().mean() < 600
    assert found.timesteps.min() < 50 and found.timesteps.max() > 950
    for noise in (found.noise, found.posterior_noise):
        assert noise.shape == (300, 4, 8, 8) and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        assert len(set(map(tuple, noise[:, 0, 0].tolist()))) == 300
    assert abs((found.noise * found.posterior_noise).mean()) < 0.02
    shifted = Batch.cat(batches(shards, "alt", CONFIG.model_copy(update={"resolution": 64, "noise_offset": 0.5}), 60))
    offsets = shifted.noise - found.noise
    assert offsets.std(dim=(2, 3)).max() < 1e-6 and abs(offsets[:, :, 0, 0].std() - 0.5) < 0.05


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["alt", "short", "long"])
def test_an_arm_reads_its_own_captions(arm: str, shards: list[str]) -> None:
    found = captions(batches(shards, arm, CONFIG, 6))
    assert len(found) == 30 and all(caption == named(uid, arm) for uid, caption in found)


@pytest.mark.parametrize("weights", [{"short": 1.0, "long": 1.0}, {"alt": 1.0, "long": 3.0}])
def test_a_mix_draws_at_its_weights_and_anew_in_every_epoch(weights: dict[str, float], shards: list[str]) -> None:
    parts = Parts(shards, Arm(captions=weights), CONFIG.model_copy(update={"batch_size": 15}), 0, RECIPE).share(0, 1)
    kinds: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for uid, caption in captions([batch for part in itertools.islice(parts, 40) for batch in part.batches]):
        kinds.setdefault(uid, set()).add(caption.split()[0])
        counts[caption.split()[0]] += 1
    assert len(kinds) == 15 and all(found == set(weights) for found in kinds.values())
    assert abs(counts["long"] / 600 - weights["long"] / sum(weights.values())) < 0.07


def test_captions_are_dropped_at_the_rate_asked_for_anew_in_every_epoch(shards: list[str]) -> None:
    found = captions(batches(shards, "alt", CONFIG.model_copy(update={"caption_dropout": 0.3}), 180))
    assert 0.25 < sum(not caption for _, caption in found) / len(found) < 0.35
    dropped: dict[str, set[bool]] = {}
    for uid, caption in found:
        dropped.setdefault(uid, set()).add(not caption)
    assert all(len(each) == 2 for each in dropped.values())
    assert all(not caption for _, caption in captions(batches(
        shards, "alt", CONFIG.model_copy(update={"caption_dropout": 1.0}), 3)))


def test_shuffled_gives_every_image_the_captions_of_another_one_the_same_in_every_epoch_and_seed(
        shards: list[str]) -> None:
    arm = Arm(captions={"short": 1}, shuffled=True)
    given: dict[str, set[str]] = {}
    for seed in (0, 1):
        parts = itertools.islice(Parts(shards, arm, CONFIG, seed, RECIPE).share(0, 1), 12)
        for uid, caption in captions([batch for part in parts for batch in part.batches]):
            given.setdefault(uid, set()).add(caption)
    assert all(len(found) == 1 for found in given.values())
    assert all(named(uid, "short") not in found for uid, found in given.items())
    assert {caption for found in given.values() for caption in found} == {named(uid, "short") for uid in given}


def test_tokens_beyond_the_last_window_are_counted_whenever_they_are_cut(tmp_path: Path) -> None:
    made = write(tmp_path, {"00000": [captioned("00000", place, image(place), **{
        "short.txt": b"word " * (100 * place)}) for place in range(3)]})
    config = CONFIG.model_copy(update={"batch_size": 3, "max_windows": 1, "shuffle_buffer": 3})
    for part in read(made, "short", config, 3):
        assert part.num_cut == 25 + 125
        assert part.batches[0].num_windows == [1, 1, 1]


# --- captions of tables ----------------------------------------------------------------------------------------------


def write_captions(folder: Path, shard: str, levels: dict[int, int]) -> None:
    """A table as relabelling writes it: number of the image → its level of grey, which the shard's is 10 times it."""
    with open_output("parquet", str(folder), shard, ["short"], "mix") as output:
        for i, level in levels.items():
            output.write(Sample(shard, str(i), {"png": image(level), "txt": b"not written",
                                                "short.txt": f"table {shard}/{i}".encode()}))


def test_captions_of_tables_are_joined_to_the_shards_they_are_of(shards: list[str], tmp_path: Path) -> None:
    write_captions(tmp_path, "00000", {i: 99 if i == 3 else 10 * i for i in range(10) if i != 7})
    write_captions(tmp_path, "00001", {i: 10 * i for i in range(5)})
    config = CONFIG.model_copy(update={"captions": str(tmp_path), "batch_size": 13, "shuffle_buffer": 1})
    used = sorted([f"00000/{i}" for i in range(10) if i not in (3, 7)] + [f"00001/{i}" for i in range(5)])
    for arm, kind in (("short", "table"), ("long", "long"), ("alt", "alt")):  # the shard's own stay
        parts = read(shards, arm, config, 3)
        for part in parts[:1]:
            assert sorted(uid for uid, _ in captions(part.batches)) == used
            assert all(caption == named(uid, kind) for uid, caption in captions(part.batches))
        assert rejected(parts) == {"captions_of_another_image": 1, "not_relabelled": 1}
    arm_ = Arm(captions={"short": 1}, shuffled=True)
    part = next(Parts(shards, arm_, config, 0, RECIPE).share(0, 1))
    assert all(caption != named(uid, "table") and caption.startswith("table")
               for uid, caption in captions(part.batches))


def test_a_shard_whose_captions_are_not_there_stops_with_one_clear_line(shards: list[str], tmp_path: Path) -> None:
    write_captions(tmp_path, "00000", {0: 0})
    config = CONFIG.model_copy(update={"captions": str(tmp_path)})
    with pytest.raises(UserError, match=r"no captions at .*00001\.parquet: name the folder"):
        read(shards, "short", config, 5)
    for num_workers in (0, 2):
        config = config.model_copy(update={"num_workers": num_workers})
        with closing(steps(Parts(shards, DEFAULT_ARMS["short"], config, 0, RECIPE))) as reading, \
                pytest.raises(UserError) as caught:
            list(itertools.islice(reading, 5))
        assert len(str(caught.value).splitlines()) == 1
        assert not multiprocessing.active_children()


def test_captions_of_other_shards_stop_with_one_clear_line(shards: list[str], tmp_path: Path) -> None:
    write_captions(tmp_path, "00000", dict.fromkeys(range(10), 7))
    write_captions(tmp_path, "00001", {})
    with pytest.raises(UserError, match="captions_of_another_image 10, not_relabelled 5"):
        read(shards, "short", CONFIG.model_copy(update={"captions": str(tmp_path)}), 1)


# --- what is left out ------------------------------------------------------------------------------------------------


def test_what_can_not_be_used_is_left_out_and_counted_once(flawed: list[str]) -> None:
    config = CONFIG.model_copy(update={"batch_size": 5, "shuffle_buffer": 1})
    parts = read(flawed, "mix", config, 100)
    assert rejected(parts) == FLAWS
    assert rejected(parts[:30]) == FLAWS  # all in the first epoch


def test_members_that_are_no_sample_are_counted_as_well(shards: list[str], tmp_path: Path) -> None:
    whole = Path(shards[0]).read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[:len(whole) // 2])
    made = [str(tmp_path / "00000.tar"), *write(tmp_path, {"00001": [
        captioned("00001", place, image(0)) for place in (0, 1, 0, 2, 3)]})]
    assert rejected(read(made, "alt", CONFIG, 30)) == {"truncated_shard": 1, "duplicate_key": 1}


def test_an_image_that_has_gone_since_its_latents_were_kept_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"00000": [Sample("00000", str(place), {"json": b'{"sha256": "", "width": 8, "height": 8}'})
                               for place in range(2)]})
    (tmp_path / "now").mkdir()
    bare, whole = (captioned("00000", place, image(0)) for place in range(2))
    del bare.members["png"]
    shard, = write(tmp_path / "now", {"00000": [bare, whole]})
    found = list(usable(shard, DEFAULT_ARMS["alt"], CONFIG, tmp_path))
    assert found == ["missing_image", "latents_of_another_image"]


def test_a_place_whose_image_can_not_be_decoded_stays_empty(flawed: list[str]) -> None:
    config = CONFIG.model_copy(update={"batch_size": 5, "shuffle_buffer": 40})
    found = Batch.cat(batches(flawed, "mix", config, 60))
    empty = found.weights == 0
    assert 0.1 < empty.float().mean() < 0.3 and set(found.weights.tolist()) == {0, 1}
    assert not found.images[empty].any()
    places = [int(uid.partition("/")[2]) for uid in found.uids]
    assert empty.tolist() == [place % 7 == 3 for place in places]
    assert {caption for (_, caption), is_empty in zip(captions([found]), empty, strict=True) if is_empty} == {""}


def test_a_share_with_no_decodable_image_does_not_stop(tmp_path: Path) -> None:
    made = write(tmp_path, {shard: [captioned(shard, place, UNDECODABLE) for place in range(1, 2 * MANY)]
                            for shard in ("00000", "00001")})
    with ShardWriter(made[0]) as writer:
        for place in range(MANY):
            writer.write(captioned("00000", place, UNDECODABLE if place else image(0)))
    config = CONFIG.model_copy(update={"batch_size": 2, "shuffle_buffer": 1})
    for rank in range(2):
        reading = steps(Parts(made, DEFAULT_ARMS["alt"], config, 0, RECIPE, None, rank, 2))
        found = [batch.weights.item() for part in itertools.islice(reading, 3 * MANY) for batch in part.batches]
        assert len(found) == 3 * MANY and set(found) == {0, 1}


def test_where_no_image_at_all_can_be_decoded_one_line_says_so(tmp_path: Path) -> None:
    made = write(tmp_path, {shard: [captioned(shard, place, UNDECODABLE) for place in range(9)]
                            for shard in ("00000", "00001")})
    for shards in (made, made[:1]):
        with pytest.raises(UserError, match=r"none of the first 10\d images can be decoded: see what"):
            list(itertools.islice(steps(Parts(shards, DEFAULT_ARMS["alt"], CONFIG, 0, RECIPE)), MANY))


def test_shards_that_hold_nothing_usable_stop_with_one_clear_line(shards: list[str]) -> None:
    with pytest.raises(UserError, match=r"in 2 shards can be used \(no_rich_caption 15\)"):
        read(shards, "rich", CONFIG, 1)


def test_an_empty_shard_among_three_stops_nobody(shards: list[str], tmp_path: Path) -> None:
    made = [*shards, *write(tmp_path, {"00002": []})]
    config = CONFIG.model_copy(update={"batch_size": 6, "num_workers": 2})
    readers = [steps(Parts(made, DEFAULT_ARMS["alt"], config, 0, RECIPE, None, rank, 2)) for rank in range(2)]
    found = [[uid for part in itertools.islice(reading, 40) for batch in part.batches for uid in batch.uids]
             for reading in readers]
    for reading in readers:
        reading.close()
    counts = Counter([*found[0], *found[1]])
    assert len(found[0]) == len(found[1]) == 120 and len(counts) == 15 and min(counts.values()) > 6


# --- filters ---------------------------------------------------------------------------------------------------------


def reasons(shard: str, filters: dict[str, Any]) -> list[str]:
    config = CONFIG.model_copy(update={"filters": Filters.model_validate(filters)})
    return ["" if isinstance(found, Entry) else found for found in usable(shard, DEFAULT_ARMS["alt"], config)]


def test_images_that_are_too_small_or_too_long_are_left_out(tmp_path: Path) -> None:
    sizes = [(8, 8), (16, 8), (17, 8), (8, 17), (20, 20), (7, 7), (100, 9)]
    shard, = write(tmp_path, {"00000": [captioned("00000", place, image(0, size)) for place, size in enumerate(sizes)]})
    assert reasons(shard, {}) == [""] * 7
    assert reasons(shard, {"min_side": 9}) == ["below_min_side"] * 4 + ["", "below_min_side", ""]
    assert reasons(shard, {"max_aspect": 2}) == ["", "", "beyond_max_aspect", "beyond_max_aspect", "", "",
                                                 "beyond_max_aspect"]


def test_a_number_of_the_metadata_must_be_there_and_within_its_bounds(tmp_path: Path) -> None:
    values = ["0.1", "0.100001", "-1", "1e400", "null", "NaN", "true", '"0.05"', '"high"', "[0.05]", '""', '"nan"', "0",
              "1" + "0" * 400]
    contents = [f'{{"punsafe": {value}, "other": 1}}'.encode() for value in values]
    contents += [b"{}", b"[0.05]", b"{"]
    shard, = write(tmp_path, {"00000": [
        captioned("00000", place, image(0), json=content) for place, content in enumerate(contents)]})
    none, out, bad = "no_punsafe_in_metadata", "punsafe_out_of_bounds", "bad_metadata"
    assert reasons(shard, {"metadata": {"punsafe": {"max": 0.1}}}) == [
        "", out, "", out, none, none, none, "", none, none, none, none, "", none, none, bad, bad]
    assert reasons(shard, {"metadata": {"punsafe": {"min": 0, "max": 0.1}}})[:3] == ["", out, out]
    assert reasons(shard, {"metadata": {"punsafe": {}, "other": {"min": 2}}})[0] == "other_out_of_bounds"
    assert reasons(shard, {}) == [""] * len(contents)


def test_filters_that_let_nothing_pass_are_warned_of_soon_by_one_process(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = write(tmp_path, {f"{shard:05d}": [
        captioned(str(shard), place, image(0), json=b'{"punsafe": 1}' if place % 5 else b"{}") for place in range(600)]
        for shard in range(4)})
    config = CONFIG.model_copy(update={"num_workers": 2, "filters": Filters.model_validate(
        {"metadata": {"punsafe": {"max": 0.1}}})})
    progress.warn.cache_clear()
    says = r"\(punsafe_out_of_bounds 1,920, no_punsafe_in_metadata 480\).*filters"
    with closing(steps(Parts(made, DEFAULT_ARMS["alt"], config, 0, RECIPE))) as reading, \
            pytest.raises(UserError, match=says):
        next(reading)
    assert capfd.readouterr().err.splitlines() == [
        "warning: train.shards: of the first 1,000 samples none can be used (punsafe_out_of_bounds 800, "
        "no_punsafe_in_metadata 200); reading on"]


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_buckets_change_neither_which_samples_are_read_nor_how_often(flawed: list[str]) -> None:
    config = CONFIG.model_copy(update={"batch_size": 6, "shuffle_buffer": 60, "resolution": 16})
    bucketed = config.model_copy(update={"buckets": Buckets(step=8, max_aspect=3)})
    found = [[uid for batch in batches(flawed, "mix", each, 10) for uid in batch.uids] for each in (config, bucketed)]
    assert sorted(found[0]) == sorted(found[1]) and len(found[0]) == 60  # of a block's steps
    shapes = {tuple(batch.images.shape[2:]) for batch in batches(flawed, "mix", bucketed, 10)}
    assert shapes == {(16, 16), (8, 24), (24, 8)}
    for batch in batches(flawed, "mix", bucketed, 10):
        assert batch.noise.shape[2:] == (batch.images.shape[2] // 8, batch.images.shape[3] // 8)
        assert batch.size_ids[:, 4:].tolist() == [list(batch.images.shape[2:])] * len(batch)


def test_a_lanes_share_of_a_step_mostly_has_one_size(tmp_path: Path) -> None:
    sizes = [(16, 16), (32, 8), (8, 32)]
    made = write(tmp_path, {f"{shard:05d}": [
        captioned(f"{shard:05d}", place, image(0, random.Random(place).choice(sizes))) for place in range(60)]
        for shard in range(4)})
    config = CONFIG.model_copy(update={"batch_size": 16, "shuffle_buffer": 400, "resolution": 16,
                                       "buckets": Buckets(step=8, max_aspect=4)})
    num_sizes = [len({tuple(batch.images.shape) for batch in lane.batches})
                 for parts in itertools.islice(shared(made, DEFAULT_ARMS["alt"], config, 4), 50) for lane in parts]
    assert num_sizes.count(1) > 0.8 * len(num_sizes)
    without = config.model_copy(update={"shuffle_buffer": 16})
    num_sizes = [len(lane.batches) for parts in itertools.islice(shared(made, DEFAULT_ARMS["alt"], without, 4), 50)
                 for lane in parts]
    assert num_sizes.count(1) < 0.4 * len(num_sizes)


# --- crops -----------------------------------------------------------------------------------------------------------


def ramp(width: int, height: int) -> bytes:
    """Red is how far to the right a pixel is, green how far down."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Captions of every other image speak of a side."""
    return write(tmp_path_factory.mktemp("ramps"), {"00000": [captioned("00000", place, ramp(200, 32), **{
        "short.txt": b"a cat on the left" if place % 2 else b"a cat sleeps"})
        for place in range(10)]})


def corners(found: Batch) -> list[tuple[int, int, bool]]:
    """Left and top of the crop in the image, and whether it is mirrored."""
    first, last = found.images[:, 0, 0, 0].int(), found.images[:, 0, 0, -1].int()
    return list(zip(torch.minimum(first, last).tolist(), found.images[:, 1, 0, 0].tolist(), (first > last).tolist(),
                    strict=True))


def test_random_crops_vary_by_epoch_and_seed_and_are_where_the_size_ids_say(ramps: list[str]) -> None:
    config = CONFIG.model_copy(update={"resolution": 32, "crop": "random", "flip": True, "batch_size": 10,
                                       "shuffle_buffer": 10})
    found = [Batch.cat(batches(ramps, "short", config, 20, seed)) for seed in (0, 0, 1)]
    assert corners(found[0]) == corners(found[1])
    first, other = (dict(zip(each.uids[:10], corners(each), strict=False)) for each in (found[0], found[2]))
    assert sum(first[uid] != other[uid] for uid in first) > 7
    lefts = [left for left, _, _ in corners(found[0])]
    assert len(set(lefts)) > 80 and min(lefts) < 10 and max(lefts) > 158 and 75 < np.mean(lefts) < 93
    for (left, top, is_mirrored), ids in zip(corners(found[0]), found[0].size_ids.tolist(), strict=True):
        assert ids == [32, 200, top, 168 - left if is_mirrored else left, 32, 32]


def test_the_middle_is_cropped_where_nothing_else_is_asked_for(ramps: list[str]) -> None:
    found = Batch.cat(batches(ramps, "short", CONFIG.model_copy(update={"resolution": 32}), 4))
    assert set(corners(found)) == {(84, 0, False)}
    assert found.size_ids.tolist() == [[32, 200, 0, 84, 32, 32]] * 20


def test_a_large_jpeg_is_decoded_to_twice_the_size_that_it_is_trained_at(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    made = write(tmp_path, {"00000": [Sample("00000", "0", {"jpg": buffer.getvalue(), "txt": b"a disc"})]})
    found = batches(made, "alt", CONFIG.model_copy(update={"resolution": 32, "batch_size": 1}), 1)[0]
    halves = [to_pixels(decode_image(buffer.getvalue(), side), (32, 32)) for side in (32, 64, None)]
    assert [torch.equal(found.images[0], each) for each in halves] == [False, True, False]
    assert found.size_ids.tolist() == [[256, 256, 0, 0, 32, 32]]


def test_half_of_the_images_are_mirrored_but_none_whose_caption_names_a_side(ramps: list[str]) -> None:
    config = CONFIG.model_copy(update={"resolution": 32, "flip": True, "caption_dropout": 0.5, "batch_size": 10})
    found = Batch.cat(batches(ramps, "short", config, 60))
    kinds: dict[str, list[bool]] = {}
    for (_, caption), (_, _, is_mirrored) in zip(captions([found]), corners(found), strict=True):
        kinds.setdefault(caption, []).append(is_mirrored)
    assert set(kinds) == {"", "a cat sleeps", "a cat on the left"}
    assert not any(kinds["a cat on the left"]) and len(kinds["a cat on the left"]) > 100
    assert all(0.4 < np.mean(kinds[caption]) < 0.6 for caption in ("", "a cat sleeps"))


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_sigterm_ends_no_worker_while_the_training_is_at_work(shards: list[str]) -> None:
    config = CONFIG.model_copy(update={"num_workers": 2})
    with closing(steps(Parts(shards, DEFAULT_ARMS["alt"], config, 0, RECIPE))) as reading:
        found = [next(reading)]
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGTERM)
        found += itertools.islice(reading, 20)
        assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    assert [row for part in found for row in rows(part)] == [
        row for part in read(shards, "alt", CONFIG, 21) for row in rows(part)]


@pytest.mark.parametrize("num_steps", [pytest.param(3, marks=pytest.mark.full), 5])
def test_closing_ends_workers_that_wait_for_ever(tmp_path: Path, num_steps: int) -> None:
    """For what is to come after the next steps, or for the next one itself."""
    made = write(tmp_path, {shard: [captioned(shard, place, image(0)) for place in range(6)]
                            for shard in ("00000", "00001")})
    config = CONFIG.model_copy(update={"batch_size": 1, "shuffle_buffer": 1})
    seed = next(seed for seed in itertools.count() if all(
        uid.startswith("00000") for batch in batches(made, "alt", config, 6, seed) for uid in batch.uids))
    Path(made[1]).unlink()
    os.mkfifo(made[1])  # to read it is to wait for somebody who writes
    reading = steps(Parts(made, DEFAULT_ARMS["alt"], config.model_copy(update={"num_workers": 2}), seed, RECIPE))
    assert len(list(itertools.islice(reading, num_steps))) == num_steps
    workers = multiprocessing.active_children()
    time.sleep(1)  # they read ahead
    began = time.monotonic()
    reading.close()
    assert time.monotonic() - began < 20
    assert len(workers) == 2 and not multiprocessing.active_children()


@pytest.mark.full
def test_a_process_that_ends_without_closing_leaves_no_worker(shards: list[str]) -> None:
    code = ("import sys, test_train_t2i_data as t\n"
            "config = t.CONFIG.model_copy(update={'num_workers': 2})\n"
            "reading = t.steps(t.Parts(sys.argv[1:], t.DEFAULT_ARMS['alt'], config, 0, t.RECIPE))\n"
            "next(reading)\n"
            "print(*[worker.pid for worker in t.multiprocessing.active_children()])\n")
    done = subprocess.run([sys.executable, "-c", code, *shards], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in done.stdout.split())


def test_a_step_takes_few_open_files_however_many_captions_it_has(shards: list[str]) -> None:
    config = CONFIG.model_copy(update={"num_workers": 1, "batch_size": 300})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 120, hard))
    try:
        with closing(steps(Parts(shards, DEFAULT_ARMS["alt"], config, 0, RECIPE))) as reading:
            found = list(itertools.islice(reading, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [row for part in found for row in rows(part)] == [
        row for part in read(shards, "alt", config, 3) for row in rows(part)]


def test_no_more_samples_are_held_than_the_shuffle_buffer_has(flawed: list[str]) -> None:
    config = CONFIG.model_copy(update={"batch_size": 8, "shuffle_buffer": 64})
    before = sum(isinstance(each, Sample) for each in gc.get_objects())
    held = []
    for place, _ in enumerate(itertools.islice(Parts(flawed, DEFAULT_ARMS["mix"], config, 0, RECIPE).share(0, 1), 300)):
        if place % 23 == 0:
            held.append(sum(isinstance(each, Sample) for each in gc.get_objects()) - before)
    assert min(held) >= 60 and max(held) <= 64 + 4 * 3  # and a few that each of four lanes is at


# --- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("captions_too", [False, True])
def test_shards_and_captions_on_the_web_are_read_as_local_ones_are(shards: list[str], tmp_path: Path,
                                                                   captions_too: bool) -> None:
    write_captions(tmp_path, "00000", {i: 10 * i for i in range(10)})
    write_captions(tmp_path, "00001", {i: 10 * i for i in range(5)})
    for shard in shards:
        (tmp_path / Path(shard).name).write_bytes(Path(shard).read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        config = CONFIG.model_copy(update={"num_workers": 2, "captions": address if captions_too else str(tmp_path)})
        there = shards if captions_too else [f"{address}/{Path(shard).name}" for shard in shards]
        with closing(steps(Parts(there, DEFAULT_ARMS["short"], config, 0, RECIPE))) as reading:
            found = [row for part in itertools.islice(reading, 8) for row in rows(part)]
    finally:
        server.shutdown()
        server.server_close()
    local = CONFIG.model_copy(update={"captions": str(tmp_path)})
    assert found == [row for part in read(shards, "short", local, 8) for row in rows(part)]
