"""Shards: reading streams whatever is there, writing is deterministic and atomic."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap import shards
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import Reject, ShardWriter, count_images, expand, read_shard
from recap.storage import write_bytes


def make_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read(path: Path) -> tuple[list[Sample], list[Reject]]:
    rejects: list[Reject] = []
    return list(read_shard(str(path), rejects)), rejects


def reasons(path: Path) -> list[tuple[str, str]]:
    return [(reject.key, reject.reason) for reject in read(path)[1]]


names = st.text("abcXYZ0123456789_-é", min_size=1, max_size=120)
extensions = st.sampled_from(["jpg", "txt", "json", "short.txt", "PNG"])
contents = st.dictionaries(extensions, st.binary(max_size=600), min_size=1)


@given(st.dictionaries(names, contents, max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory,
                                      samples: dict[str, dict[str, bytes]]) -> None:
    path = tmp_path_factory.mktemp("shards") / "00000.tar"
    wanted = [Sample("00000", key, members) for key, members in samples.items()]
    with ShardWriter(str(path)) as writer:
        for sample in wanted:
            writer.write(sample)
    found, rejects = read(path)
    assert found == wanted
    assert [list(sample.members) for sample in found] == [list(members) for members in samples.values()]
    assert not rejects


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with ShardWriter(str(tmp_path / name / "00000.tar")) as writer:
            writer.write(Sample("00000", "1", {"jpg": b"x" * 700, "txt": b"cat"}))
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()


def test_an_error_while_writing_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(str(tmp_path / "00000.tar")) as writer:
        writer.write(Sample("00000", "1", {"jpg": b"x"}))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(str(tmp_path / "deep" / "a.json"), b"old")
    write_bytes(str(tmp_path / "deep" / "a.json"), b"new")
    assert [(f.name, f.read_bytes()) for f in (tmp_path / "deep").iterdir()] == [("a.json", b"new")]


def test_the_key_ends_at_the_first_dot_of_the_name(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", [("a.b/1.short.txt", b"x"), ("a.b/1.jpg", b"y")])
    assert read(path)[0] == [Sample("0", "a.b/1", {"short.txt": b"x", "jpg": b"y"})]


@pytest.mark.parametrize(("members", "expected"), [
    ([("1.jpg", b""), ("2.jpg", b""), ("1.jpg", b"")], [("1", "duplicate_key")]),
    ([("1.jpg", b""), ("1.jpg", b"")], [("1", "duplicate_member")]),
    ([("../1.jpg", b"")], [("../1", "unsafe_key")]),
    ([("/etc/1.jpg", b"")], [("/etc/1", "unsafe_key")]),
    ([("caf\udce9.jpg", b"")], [("caf\udce9", "unsafe_key")]),
    ([("a\nb.jpg", b"")], [("a\nb", "unsafe_key")]),
    ([("README", b"")], [("README", "no_extension")]),
])
def test_a_malformed_sample_is_rejected_with_its_reason(tmp_path: Path, members: list[tuple[str, bytes]],
                                                        expected: list[tuple[str, str]]) -> None:
    path = make_tar(tmp_path / "0.tar", [*members, ("9.jpg", b"good")])
    assert reasons(path) == expected
    assert read(path)[0][-1].key == "9"  # and the rest is read


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert reasons(tmp_path / "0.tar") == [("1", "not_a_file")]


@given(st.integers(1, 10_239))
def test_a_shard_cut_anywhere_gives_what_was_before_the_cut(tmp_path_factory: pytest.TempPathFactory,
                                                            length: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = make_tar(folder / "whole.tar", [(f"{i}.jpg", bytes([i + 1]) * 900) for i in range(4)])
    (folder / "cut.tar").write_bytes(whole.read_bytes()[:length])
    samples, rejects = read(folder / "cut.tar")
    assert all(sample.members["jpg"] == bytes([int(sample.key) + 1]) * 900 for sample in samples)
    ended = 4 * (512 + 1024)  # 4 headers with their data; then the zeros that end a tar
    assert len(samples) + len(rejects) >= min(4, length // (512 + 1024))
    if length < ended:
        assert [reject.reason for reject in rejects] == ["truncated_shard"]
    if length >= ended + 512:
        assert len(samples) == 4 and not rejects


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with any size field, as a hostile shard may hold."""
    block = bytearray(512)
    block[:len(name)], block[100:108], block[124:136], block[156:157] = name, b"0000644\0", size, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GOOD = header(b"1.jpg", b"%011o\0" % 3) + b"abc".ljust(512, b"\0")
END = bytes(1024)


@pytest.mark.parametrize("rest", [
    header(b"2.jpg", b"\xff" + (-512).to_bytes(11, "big", signed=True)) + END,  # negative: the same header for ever
    header(b"2.jpg", b"\x80" + (2**70).to_bytes(11, "big")) + END,
    header(b"x", b"\x80" + (2**62).to_bytes(11, "big"), b"x") + END,
    header(b"x", b"%011o\0" % (2**21), b"x") + bytes(2**21) + END,
    header(b"x", b"%011o\0" % (2**21), b"L") + b"y" * 2**21 + END,
    (header(b"././@LongLink", b"%011o\0" % 3, b"L") + b"ab\0".ljust(512, b"\0")) * 3000 + END,
    b"\x01" * 512 + GOOD + END,  # a damaged header, where tarfile stops in silence
    END + GOOD + END,  # data after the end-of-archive mark
], ids=["negative", "huge", "huge-pax", "large-pax", "large-name", "long-chain", "damaged", "after-the-end"])
def test_a_hostile_shard_ends_and_says_that_something_is_missing(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(header(b"0.jpg", b"%011o\0" % 3) + b"abc".ljust(512, b"\0") + GOOD + rest)
    samples, rejects = read(tmp_path / "0.tar")
    assert samples[0].key == "0" and len(rejects) == 1
    assert rejects[0].reason in ("truncated_shard", "oversized_member")
    assert isinstance(count_images([str(tmp_path / "0.tar")]), int)


def test_a_cut_after_a_member_that_ends_in_zeros_is_seen(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", [("1.npy", b"x" + bytes(2000)), ("2.npy", b"x" + bytes(2000))])
    path.write_bytes(path.read_bytes()[:512 + 2048])
    samples, rejects = read(path)
    assert [sample.key for sample in samples] == [] and [each.reason for each in rejects] == ["truncated_shard"]
    path.write_bytes(path.read_bytes() + bytes(512))
    assert [sample.key for sample in read(path)[0]] == ["1"] and not read(path)[1]


def test_a_member_without_a_name_is_accounted_for(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", [("1.jpg", b"x"), ("", b"y"), ("2.jpg", b"z")])
    samples, rejects = read(path)
    assert [sample.key for sample in samples] == ["1", "2"]
    assert [(each.key, each.reason) for each in rejects] == [("", "no_extension")]


def test_a_sample_too_large_for_the_memory_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1000)
    path = make_tar(tmp_path / "0.tar", [(f"1.{place}", bytes(400)) for place in range(4)] + [("2.jpg", b"x")])
    assert [sample.key for sample in read(path)[0]] == ["2"]
    assert reasons(path) == [("1", "oversized_sample")]


def test_images_of_many_shards_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(make_tar(tmp_path / f"{place}.tar", [(f"{key}.jpg", bytes(900)) for key in range(50)]))
             for place in range(10)]
    assert count_images(paths) == 500 and count_images([]) == 0
    monkeypatch.setattr(shards, "MAX_COUNTED", 3)
    counted: list[str] = []
    count = shards._count_keys
    monkeypatch.setattr(shards, "_count_keys", lambda path: counted.append(path) or count(path))
    assert count_images(paths) == 500 and len(counted) == 3


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", [])
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + str(tmp_path / "0.tar").encode())
    assert expand(str(tmp_path / "list.txt")) == [str(tmp_path / "0.tar")]


def test_a_name_is_what_comes_before_a_query() -> None:
    assert shards.shard_name("https://x.org/a/00000.tar?X-Amz-Signature=" + "f" * 500) == "00000"
    assert shards.shard_name("/a/what?.tar") == "what?"


def test_what_macos_adds_to_a_tar_is_passed_over(tmp_path: Path) -> None:
    members = [(f"./{prefix}1.{extension}", b"x") for extension in ("jpg", "txt") for prefix in ("._", "")]
    assert read(make_tar(tmp_path / "0.tar", members))[0] == [Sample("0", "./1", {"jpg": b"x", "txt": b"x"})]


def test_a_folder_named_like_a_shard_is_none(tmp_path: Path) -> None:
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(UserError, match="nothing at"):
        expand(f"{tmp_path}/*.tar")


def test_bytes_that_are_no_tar_are_one_reject(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>404 not found</html>" * 50)
    assert reasons(tmp_path / "0.tar") == [("0", "truncated_shard")]
    (tmp_path / "1.tar").write_bytes(b"")
    assert reasons(tmp_path / "1.tar") == [("1", "truncated_shard")]


def test_patterns_expand_in_order_and_once(tmp_path: Path) -> None:
    for name in ("00000", "00001", "00002"):
        make_tar(tmp_path / f"{name}.tar", [])
    assert expand([f"{tmp_path}/0000{{1..2}}.tar", f"{tmp_path}/*.tar"]) == [
        f"{tmp_path}/{name}.tar" for name in ("00001", "00002", "00000")]


@pytest.mark.parametrize("pattern", ["no/such.tar", "no/*.tar", "no/{00000..00001}.tar", "no/{0", ""])
def test_a_pattern_that_names_nothing_is_an_error_in_one_line(pattern: str) -> None:
    with pytest.raises(UserError, match=r"data\.shards") as caught:
        expand(pattern or [])
    assert "\n" not in str(caught.value)


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_tar(tmp_path / folder / "00000.tar", [])
    with pytest.raises(UserError, match="share the name '00000'"):
        expand(f"{tmp_path}/*/00000.tar")


@pytest.mark.parametrize("name", [".tar", "..tar", "...tar"])
def test_a_shard_without_a_name_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    make_tar(tmp_path / name, [])
    with pytest.raises(UserError, match="has no name before its"):
        expand(f"{tmp_path}/{name}")


def test_remote_shards_are_read_and_written_through_fsspec() -> None:
    with ShardWriter("memory://bucket/00000.tar") as writer:
        writer.write(Sample("00000", "1", {"jpg": b"x"}))
    rejects: list[Reject] = []
    assert list(read_shard("memory://bucket/00000.tar", rejects)) == [Sample("00000", "1", {"jpg": b"x"})]
    assert expand("memory://bucket/*.tar") == ["memory:///bucket/00000.tar"]


def test_real_shards_are_read_whole(shared_data: Path) -> None:
    found = [read(path) for path in sorted((shared_data / "photos").glob("*.tar"))]
    assert sum(len(samples) for samples, _ in found) == 1824
    assert not any(rejects for _, rejects in found)
