"""Captions before and after, in the terminal and on a page: what is shown, and what hostile captions cannot do."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter
from recap.show import COLUMNS, find, plain, render, show, view, width, wrap

HOSTILE = {
    "html": "<img src=x onerror=alert(1)><script>document.title='owned'</script></dd></style>",
    "terminal": "\x1b[31mred\x1b[0m \x07bell \x9b31m \u202egnp.exe \u2066x\u2069 {{ 7 * 7 }}",
    "arabic": "كلب بني يقفز فوق حاجز خشبي في حديقة خضراء",
    "emoji": "👨‍👩‍👧‍👦 a day out 🏖️ 犬が柵を飛び越える。",
    "long": "fence " * 833,
    "word": "a" * 5000,
}


def entry(**values: Any) -> dict[str, Any]:
    return {"captioner": "blip2", "revision": "abc", "adapter": None, "prompt": "A short caption:",
            "decoding": {"num_beams": 3}, "num_clip_tokens": 4, "num_clip_windows": 1, "scores": {},
            "flags": []} | values


def picture(kind: str = "JPEG", size: tuple[int, int] = (900, 300)) -> bytes:
    Image.new("RGB", size, "green").save(out := io.BytesIO(), kind)
    return out.getvalue()


def sample(key: str, alt: str, short: str = "A green wall.", **recorded: Any) -> Sample:
    members = {"jpg": picture(), "txt": alt.encode(), "short.txt": short.encode(), "mix.txt": short.encode(),
               "recap.json": json.dumps({"schema": 1, "captions": {"short": entry(**recorded)}}).encode()}
    return Sample("00000", key, members)


def write(path: Path, samples: list[Sample]) -> str:
    with ShardWriter(str(path)) as writer:
        for each in samples:
            writer.write(each)
    return str(path)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A relabelled shard in which alt-text, captions and record hold the same hostile text."""
    return write(tmp_path_factory.mktemp("hostile") / "00000.tar", [
        sample(key, text, f"Caption: {text}", prompt=text, decoding={text: text}, captioner=text,
               flags=[text[:30], "ok"], scores={text[:30]: 3.0}) for key, text in HOSTILE.items()])


# --- which samples -------------------------------------------------------------------------------------------------


def test_a_draw_is_the_same_with_a_seed_and_larger_ones_begin_with_it(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"{name}.tar", [sample(f"{name}{key}", "") for key in range(20)]) for name in "ab"]
    keys = [row.sample.key for row in find(shards, 5, [], False, 0).rows]
    more = find(shards, 9, [], False, 0)
    assert [row.sample.key for row in more.rows][:5] == keys and more.choice == "9 of 40 samples, drawn with seed 0"
    assert keys != [row.sample.key for row in find(shards, 5, [], False, 1).rows]
    assert {key[0] for key in keys} == {"a", "b"}


def test_samples_are_shown_by_key_and_by_flag(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", [sample(str(key), "", flags=["not_ended"] if key in (3, 7) else [])
                                       for key in range(9)])
    assert [row.sample.key for row in find([shard], 5, ["8", "2"], False, 0).rows] == ["2", "8"]
    flagged = find([shard], 5, [], True, 0)
    assert {row.sample.key for row in flagged.rows} == {"3", "7"}
    assert flagged.choice == "2 of 2 flagged samples, drawn with seed 0"
    assert "not_ended 2" in flagged.notes[0]
    with pytest.raises(UserError, match=r"no sample x\\x1by in 0.tar"):
        find([shard], 5, ["8", "x\x1by"], False, 0)
    with pytest.raises(UserError, match="1 to 500"):
        find([shard], 0, [], False, 0)
    with pytest.raises(UserError, match="nothing at"):
        show([str(tmp_path / "none.tar")])


def test_a_shard_that_is_not_relabelled_or_is_damaged_says_so(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    write(shard, [Sample("0", "k", {"jpg": b"no image", "txt": b"IMG_1.jpg"}),
                  Sample("0", "l", {"jpg": picture(), "txt": b"\xff\xfe", "people.txt": b"A wall."}),
                  Sample("0", "m", {"jpg": picture(), "txt": b"cut"})])
    whole = shard.read_bytes()
    shard.write_bytes(whole[:whole.index(b"m.jpg") + 1000])
    text = show([str(shard)])
    assert "Not relabelled" in text and "truncated_shard 1" in text
    assert "no picture: undecodable_image" in text and "(cannot be read: binary_alt_text)" in text
    assert "A wall." in text and "came with the shard" in text and "after" not in text
    write(tmp_path / "1.tar", [sample("k", "x"), Sample("1", "l", {"jpg": picture(), "txt": b"y"})])
    assert "Only 1 of 2 samples are relabelled." in show([str(tmp_path / "1.tar")])


def test_captions_only_and_remote_shards_are_shown(tmp_path: Path) -> None:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    record = json.dumps({"schema": 1, "captions": {"short": entry(flags=["not_ended"])}})
    pq.write_table(pa.table({"key": ["k"], "sha256": [""], "short": ["A wall."], "mix": ["A wall."],
                             "recap": [record]}), tmp_path / "0.parquet")
    text = show([str(tmp_path / "0.parquet")], page=None)
    assert "0/k · no picture: these are captions only" in text and "(alt-text is not in it)" in text
    assert "short   A wall." in text and "flags: not_ended" in text and "mix     the same as short" in text
    assert "Alt-text is not in this file." in render(find([str(tmp_path / "0.parquet")], 5, [], False, 0))
    with fsspec.open("memory://show/0.tar", "wb") as file:
        file.write(Path(write(tmp_path / "0.tar", [sample("k", "IMG")])).read_bytes())
    assert "0/k · 900 × 300 pixels" in show(["memory://show/*.tar"])


# --- in the terminal -------------------------------------------------------------------------------------------------


def test_a_caption_is_shown_with_all_that_is_said_of_it(tmp_path: Path) -> None:
    long = " ".join(f"A wall {number}." for number in range(60))
    shard = write(tmp_path / "0.tar", [sample("k", "IMG_1.jpg", long, scores={"clip_score": 31.256},
                                              flags=["not_ended", "repetition"])])
    lines = show([shard]).splitlines()
    assert lines[0] == "0.tar: 1 of 1 samples, drawn with seed 0"
    assert "0/k · 900 × 300 pixels" in lines and "  before  IMG_1.jpg" in lines
    assert "  short   A wall 0. A wall 1. A wall 2. A wall 3. A wall 4. A wall 5. A wall 6." in lines
    assert any(re.fullmatch(r" {10}\d{3} tokens in \d windows · clip_score 31\.26", line) for line in lines)
    assert "          flags: not_ended, repetition" in lines
    text = " ".join(" ".join(lines).split())
    rest = re.findall(r"and ([\d,]+) more characters", text)
    assert len(long) - int(rest[0]) == pytest.approx(480, abs=20) and "A wall 59." not in text


def test_no_line_is_too_wide_and_nothing_commands_the_terminal(hostile: str) -> None:
    text = show([hostile], num=6)
    for line in text.split("\n"):
        assert width(line) <= COLUMNS and all(c.isprintable() or c in "\u200c\u200d\u200e\u200f" for c in line)
    assert r"\x1b[31mred\x1b[0m \x07bell \x9b31m \u202egnp.exe" in " ".join(text.split())
    assert HOSTILE["arabic"] in " ".join(text.split()) and "👨‍👩‍👧‍👦" in text
    assert "<img src=x onerror=alert(1)>" in text


def test_colours_are_the_only_commands(hostile: str) -> None:
    text = show([hostile], num=6, colour=True)
    assert re.sub(r"\x1b\[(?:0|1|2|33)m", "", text) == show([hostile], num=6)


@given(st.text(max_size=200), st.integers(2, 80))
def test_wrapped_lines_fit_and_hold_all(text: str, columns: int) -> None:
    lines = wrap(plain(text), columns)
    assert all(width(line) <= columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(plain(text).split())


def test_wide_characters_take_two_columns() -> None:
    wcwidth = pytest.importorskip("wcwidth")
    for text in ("plain", "犬が柵を飛び越える。", "cafe\u0301", "ｆｕｌｌ", "한국어", HOSTILE["arabic"]):
        assert width(text) == wcwidth.wcswidth(text)
    assert plain("x" * 30_000).endswith("x… and 10,000 more characters") and len(plain("x" * 30_000)) < 20_100


# --- as a page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_and_runs_nothing(hostile: str, tmp_path: Path) -> None:
    said = show([hostile], num=6, page=tmp_path / "page.html")
    assert said == f"{tmp_path / 'page.html'}: 6 of 6 samples, drawn with seed 0"
    page = Page((tmp_path / "page.html").read_text())
    assert not {"script", "iframe", "object", "link"} & {tag for tag, _ in page.elements}
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 6 and all((each["src"] or "").startswith("data:image/jpeg;base64,") for each in pictures)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    addresses = [value for _, attributes in page.elements for name, value in attributes.items()
                 if name in ("src", "href", "srcset") and not (value or "").startswith("data:")]
    assert not addresses
    text = " ".join("".join(page.text).split())
    for key in ("html", "arabic", "emoji"):
        assert f"Caption: {HOSTILE[key]}" in text
    assert "\x1b" not in text and "\u202e" not in text and r"\x1b[31mred" in text and "{{ 7 * 7 }}" in text
    assert len([attributes for tag, attributes in page.elements if attributes.get("dir") == "auto"]) >= 12
    assert text.count("aaaaa" * 100) >= 2  # all of the long word, after a click


def test_a_page_that_cannot_be_written_is_one_clear_line(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for page in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match=rf"cannot write {page} \([^()]+\): ") as caught:
            show([hostile], page=page)
        assert "\n" not in str(caught.value)


def test_pictures_are_small_and_the_small_keep_their_pixels() -> None:
    one = sample("k", "x")
    one.members["jpg"] = picture(size=(3000, 1500))
    found = view_of(one)
    assert (found.picture.width, found.picture.height) == (3000, 1500) and len(found.picture.src) < 20_000
    del one.members["jpg"]
    one.members["png"] = picture("PNG", (32, 16))
    assert view_of(one).picture.src.startswith("data:image/png")


def view_of(one: Sample) -> Any:
    from recap.caption_statistics import captions_of
    from recap.show import Row
    return view(Row(one, captions_of(one)))


@pytest.mark.full
def test_in_a_browser_nothing_runs_and_nothing_overflows(hostile: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    show([hostile], num=6, page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in page
    # In the copy that is measured scripts are allowed: what would run then has nothing but escaping against it.
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (tmp_path / "open.html").write_text(bare.replace("<details>", "<details open>"))
    (tmp_path / "measure.html").write_text("""<!doctype html><title>…</title><body><script>
        const widths = [320, 390, 768, 1280], found = [];
        for (const width of widths) {
            const frame = document.createElement("iframe");
            frame.style.width = width + "px"; frame.style.height = "900px"; frame.style.border = 0;
            frame.onload = () => {
                const inner = frame.contentDocument, root = inner.documentElement;
                found.push([width, root.scrollWidth - root.clientWidth, inner.title, inner.scripts.length,
                            [...inner.images].filter(image => !image.naturalWidth).length]);
                if (found.length === widths.length) document.title = JSON.stringify(found);
            };
            frame.src = "open.html"; document.body.append(frame);
        }</script>""")
    found = subprocess.run([
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
        "--dump-dom", f"file://{tmp_path}/measure.html",
    ], capture_output=True, text=True, timeout=120, check=True).stdout
    measured = json.loads("".join(Page(found[:found.index("</title>")]).text))
    assert sorted(width for width, *_ in measured) == [320, 390, 768, 1280]
    for at, overflow, title, num_scripts, num_broken in measured:
        assert overflow <= 0, f"{overflow} px too wide at {at} px"
        assert title == "00000.tar · captions before and after" and num_scripts == 0 and num_broken == 0
