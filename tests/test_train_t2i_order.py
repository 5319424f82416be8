"""The order of samples: each of them once, whatever is left out, and the same from any place on."""

import gc
import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recap import progress
from recap.errors import UserError
from recap.sample import Sample
from train_t2i.order import MANY, MAX_LANES, Cursor, Entry, Lane, epochs, num_lanes

SIZES = [(8, 8), (8, 16), (16, 8)]
Shards = dict[str, list[int | str]]
"""Shard → its samples: for each its size's place in SIZES, or the reason why it can't be used."""
SAMPLES = st.lists(st.integers(0, 2) | st.sampled_from(["bad", "worse"]), max_size=9)
SHARDS = st.lists(SAMPLES, min_size=1, max_size=5).map(lambda some: {
    f"{place:05d}": each for place, each in enumerate(some)}).filter(
        lambda shards: any(isinstance(each, int) for samples in shards.values() for each in samples))
START = Cursor()
NUMBERED: Shards = {f"{place:05d}": [0] * (place + 2) for place in range(6)}


def lane(shards: Shards, number: int = 0, lanes: int = 1, seed: int = 0, block_size: int = 4, run: int = 1,
         cursor: Cursor = START) -> Lane:
    def read(shard: str) -> Iterator[Entry | str]:
        for place, found in enumerate(shards[shard]):
            yield found if isinstance(found, str) else Entry(Sample(shard, str(place), {}), (1, 1), SIZES[found])

    return Lane(list(shards), number, lanes, seed, block_size, run, read, cursor)


def names(entries: list[Entry]) -> list[tuple[int, str]]:
    return [(entry.epoch, entry.sample.uid) for entry in entries]


def first(some: Lane, count: int) -> list[Entry]:
    return list(itertools.islice(some, count))


# --- lanes -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(1, 2000))
def test_lanes_divide_a_batch_and_are_not_more_than_shards(num_shards: int, batch_size: int) -> None:
    found = num_lanes(num_shards, batch_size)
    assert batch_size % found == 0 and 1 <= found <= min(num_shards, MAX_LANES)
    assert num_lanes(64, 512) == num_lanes(100_000, 512) == 64 and num_lanes(5, 512) == 4 and num_lanes(9, 7) == 7


@given(st.integers(1, 6), st.integers(0, 3))
def test_every_epoch_deals_every_shard_to_one_lane(lanes: int, seed: int) -> None:
    dealt: Counter[tuple[int, str]] = Counter()
    for number in range(lanes):
        given = itertools.takewhile(lambda entry: entry.epoch < 4, lane(NUMBERED, number, lanes, seed, block_size=1))
        dealt.update((entry.epoch, entry.sample.uid) for entry in given)
    everything = [f"{shard}/{place}" for shard, samples in NUMBERED.items() for place in range(len(samples))]
    assert dealt == Counter((epoch, uid) for epoch in range(4) for uid in everything)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    count = sum(map(len, NUMBERED.values()))
    orders = [[uid for _, uid in names(first(lane(NUMBERED, seed=seed), 2 * count))] for seed in (0, 1)]
    found = [order[start:start + count] for order in orders for start in (0, count)]
    assert len(set(map(tuple, found))) == 4
    assert names(first(lane(NUMBERED), count)) == names(first(lane(NUMBERED), count))
    shards = [list(dict.fromkeys(uid.partition("/")[0] for uid in order)) for order in found]
    assert len(set(map(tuple, shards))) == 4


@given(SHARDS, st.integers(1, 3), st.integers(1, 12), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2))
def test_a_block_holds_what_is_read_next_each_sample_once(shards: Shards, lanes: int, block_size: int, run: int,
                                                          num_blocks: int, number: int) -> None:
    number %= lanes
    read = names(first(lane(shards, number, lanes, block_size=1), num_blocks * block_size))
    found = names(first(lane(shards, number, lanes, block_size=block_size, run=run), num_blocks * block_size))
    for start in range(0, len(read), block_size):
        assert sorted(found[start:start + block_size]) == sorted(read[start:start + block_size])


def test_samples_of_a_block_are_shuffled() -> None:
    shards: Shards = {"00000": [0] * 100}
    for run in (1, 5):
        found = [int(uid.partition("/")[2]) for _, uid in names(first(lane(shards, block_size=50, run=run), 100))]
        assert sorted(found[:50]) == list(range(50))
        assert [place - 50 for place in found[50:]] != found[:50]
        assert sum(abs(one - other) == 1 for one, other in itertools.pairwise(found)) < 20


def test_one_sample_alone_comes_again_and_again_from_a_block_of_any_size() -> None:
    assert sorted(names(first(lane({"00000": [0]}, block_size=1000), 1000))) == [(n, "00000/0") for n in range(1000)]


# --- going on --------------------------------------------------------------------------------------------------------


@given(SHARDS, st.integers(1, 12), st.integers(1, 3), st.integers(0, 40), st.data())
def test_a_lane_goes_on_from_its_cursor_as_if_never_stopped(shards: Shards, block_size: int, run: int, count: int,
                                                            data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, count))
    whole = first(lane(shards, block_size=block_size, run=run), count)
    before = lane(shards, block_size=block_size, run=run)
    found = first(before, stop)
    found += first(lane(shards, block_size=block_size, run=run, cursor=before.cursor), count - stop)
    assert names(found) == names(whole)
    assert [entry.rejects for entry in found] == [entry.rejects for entry in whole]


@given(SHARDS, st.integers(1, 12))
def test_cursors_grow(shards: Shards, block_size: int) -> None:
    some = lane(shards, block_size=block_size)
    found = [some.cursor for _ in itertools.islice(some, 30)]
    assert found == sorted(set(found))


def test_epochs_count_what_all_lanes_have_behind_them() -> None:
    some = [lane(NUMBERED, number, 3, block_size=1) for number in range(3)]
    behind = 0
    for entries in itertools.islice(zip(*some, strict=True), 60):
        assert epochs({each.number: each.cursor for each in some}, 6) == behind
        behind = min(entry.epoch for entry in entries)
    assert behind >= 4
    assert epochs({}, 6) == 0


# --- what can't be used ----------------------------------------------------------------------------------------------


@given(SHARDS, st.integers(1, 3), st.integers(1, 12))
def test_what_is_left_out_counts_once_however_often_it_is_read(shards: Shards, lanes: int, block_size: int) -> None:
    rejects: Counter[str] = Counter()
    for number in range(lanes):
        some = lane(shards, number, lanes, block_size=block_size)
        for entry in itertools.takewhile(lambda _, some=some: some.cursor.turn * lanes < 5 * len(shards), some):
            rejects += entry.rejects
    assert rejects == Counter(each for samples in shards.values() for each in samples if isinstance(each, str))


def test_a_shard_with_nothing_to_use_is_passed_over() -> None:
    shards: Shards = {"00000": [0, 0], "00001": ["bad"] * 3, "00002": []}
    assert sorted(names(first(lane(shards), 8))) == [(n, f"00000/{i}") for n in range(4) for i in range(2)]


@pytest.mark.parametrize(("shards", "says"), [
    ({"00000": ["bad", "worse", "worse"], "00001": ["worse"]}, r"in 2 shards can be used \(worse 3, bad 1\): relabel"),
    ({"00000": [], "00001": [], "00002": []}, r"in 3 shards can be used \(they are empty\)")])
@pytest.mark.parametrize("lanes", [1, 2])
def test_where_nothing_can_be_used_one_line_says_why(shards: Shards, says: str, lanes: int) -> None:
    with pytest.raises(UserError, match=says):
        first(lane(shards, 1 % lanes, lanes), 1)


def test_a_shard_with_nothing_to_use_is_read_once() -> None:
    reads: list[str] = []
    some = lane({"00000": [0], "00001": ["bad"], "00002": ["bad"]}, block_size=1)
    read = some.read
    some.read = lambda shard: reads.append(shard) or read(shard)  # type: ignore[func-returns-value]
    first(some, 10)
    assert Counter(reads)["00000"] >= 10 and Counter(reads)["00001"] == Counter(reads)["00002"] == 1


def test_long_before_all_is_read_a_warning_says_why_nothing_comes(capsys: pytest.CaptureFixture[str]) -> None:
    progress.warn.cache_clear()
    says = "warning: train.shards: of the first 1,000 samples none can be used (bad 999, worse 1); reading on"
    some = lane({"00000": ["worse", *["bad"] * 3 * MANY, 0]})
    first(some, 5)
    assert capsys.readouterr().err.splitlines() == [says]
    first(lane({"00000": [0, *["bad"] * MANY]}), 5)  # one was used
    first(lane({"00000": [*["bad"] * (MANY - 1), 0, *["bad"] * MANY]}), 5)
    silent = lane({"00000": ["worse"] * MANY + [0]})
    silent.speaks = False
    first(silent, 5)
    assert not capsys.readouterr().err


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_samples_come_in_runs_of_one_size_where_a_block_has_so_many() -> None:
    shards: Shards = {f"{place:05d}": [0, 0, 1, 0, 2] * 24 for place in range(4)}
    found = [entry.size for entry in first(lane(shards, block_size=96, run=8), 10 * 96)]
    runs = [found[start:start + 8] for start in range(0, len(found), 8)]
    assert sum(len(set(run)) == 1 for run in runs) >= 0.75 * len(runs)
    assert len({tuple(run) for run in runs[:9]}) > 1  # not all of one size first
    mixed = [entry.size for entry in first(lane(shards, block_size=96), 10 * 96)]
    assert sum(len(set(mixed[start:start + 8])) == 1 for start in range(0, len(mixed), 8)) < 0.1 * len(runs)


# --- memory ----------------------------------------------------------------------------------------------------------


def num_held() -> int:
    return sum(isinstance(each, Entry) for each in gc.get_objects())


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 5))
def test_no_more_than_a_block_is_held_at_any_time(block_size: int, run: int) -> None:
    shards: Shards = {f"{place:05d}": [0, 1, 2] * 30 for place in range(3)}
    before = num_held()
    for count, _ in enumerate(lane(shards, block_size=block_size, run=run)):
        if count % 17 == 0:
            assert num_held() - before <= block_size + 2  # and what is read and given just now
        if count > 200:
            break
