"""Whether a relabelled set is whole: every image of its input is there with its bytes, or in a quarantine file."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recap import progress
from recap.caption_tables import read_table
from recap.errors import UserError
from recap.outputs import Format, written
from recap.sample import IMAGE_EXTENSIONS, Sample, caption_extension
from recap.shard_work import ahead
from recap.shards import Reject, read_shard, shard_name
from recap.storage import is_local, names, read_bytes

MAX_KEPT, MAX_SHOWN = 1000, 20
"""Findings that are kept, and of these, that are printed."""
THREADS = 4
SET = ""
"""In the place of a shard's name: what is found of the set."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        place = "/".join(filter(None, (self.shard, self.key)))
        return f"{ascii(place)[1:-1][:60]}: {ascii(self.what)[1:-1]}" if place else self.what


@dataclass(frozen=True, slots=True)
class Written:
    """A sample as it was written: no more of it than is compared."""

    hashes: dict[str, str]
    """Member → sha256; of a table, the image's under ``."""
    texts: dict[str, bytes]
    """Member → caption, of styles and the mix."""
    record: Any
    """What `recap.json` holds; None where the format has none, or it is damaged."""


@dataclass
class Verified:
    """What is known of a set."""

    num_shards: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """`images`, `captions`, `quarantined`."""
    findings: list[Finding] = field(default_factory=list)
    """The first of them."""
    num_findings: int = 0
    faulty: set[str] = field(default_factory=set)
    """Shards of which there is a finding."""
    settings: Counter[str] = field(default_factory=Counter)
    """Of the captioning, as a hash → shards."""

    def note(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.num_findings += 1
            self.faulty.add(finding.shard)
            if len(self.findings) < MAX_KEPT:
                self.findings.append(finding)


def verify(shards: list[str], out: str, kind: Format, styles: list[str]) -> Verified:
    """Read the input and what relabelling made of it, and compare them.

    Args:
        shards: that were relabelled.
        out: folder or URL.
        kind: the format of what was written.
        styles: of the captions.
    """
    found = Verified()
    found.note(_of_the_set(shards, out, kind))
    with progress.bar("verify", None) as bar:
        for one in ahead(lambda shard: _Shard(shard, out, kind, styles).check(), shards, THREADS):
            found.num_shards += 1
            found.counts += one.counts
            found.settings += one.settings
            found.note(one.findings)
            bar.update(one.counts["images"])
    if len(found.settings) > 1:
        kinds = ", ".join(f"{count} shards of {settings}" for settings, count in found.settings.most_common())
        found.note([Finding(SET, "", f"made with different settings: {kinds}")])
    return found


def _of_the_set(shards: list[str], out: str, kind: Format) -> Iterator[Finding]:
    """Shards that nobody asked for, and what is half written."""
    expected = {written(kind, out, shard_name(shard)).rsplit("/", 1)[1] for shard in shards}
    ending = {"shards": ".tar", "parquet": ".parquet"}.get(kind)
    for name in sorted(names(out)):
        if name.startswith(".") and name.endswith(".tmp"):
            yield Finding(SET, "", f"{name} is half written: a killed process has left it, or one is at work")
        elif ending and name.endswith(ending) and name not in expected:
            yield Finding(SET, "", f"{name} is of no shard of the input")


class _Shard:
    """One shard of the input, with what was made of it."""

    def __init__(self, shard: str, out: str, kind: Format, styles: list[str]) -> None:
        self.shard, self.out, self.kind, self.styles = shard, out, kind, styles
        self.name = shard_name(shard)
        self.found = Verified(num_shards=1)

    def check(self) -> Verified:
        try:
            stats = json.loads(read_bytes(f"{self.out}/{self.name}_stats.json"))
            quarantine = Counter((each.key, each.reason) for each in self._quarantine())
            present = dict(self._read())
        except FileNotFoundError as error:
            self._note("", f"is not relabelled: there is no {str(error.filename or error).rsplit('/', 1)[-1]}")
            return self.found
        except (ValueError, TypeError, KeyError, UserError) as error:
            self._note("", f"is damaged: {error}")
            return self.found
        self.found.counts.update(images=len(present), quarantined=quarantine.total())
        self.found.settings[str(stats.get("settings"))] += 1
        self._compare(present, quarantine)
        self._check_stats(stats, len(present), quarantine)
        return self.found

    def _note(self, key: str, what: str) -> None:
        self.found.note([Finding(self.name, key, what)])

    def _quarantine(self) -> list[Reject]:
        try:
            lines = read_bytes(f"{self.out}/{self.name}_quarantine.jsonl").splitlines()
        except FileNotFoundError:
            return []
        return [Reject(**json.loads(line)) for line in lines]

    # --- what was written ---

    def _read(self) -> Iterator[tuple[str, Written]]:
        readers: dict[str, Callable[[str], Iterator[tuple[str, Written]]]] = {
            "shards": self._read_shard, "parquet": self._read_table, "folder": self._read_folder}
        seen: set[str] = set()
        for key, found in readers[self.kind](written(self.kind, self.out, self.name)):
            if key in seen:
                self._note(key, "was written twice")
            seen.add(key)
            yield key, found

    def _read_shard(self, url: str) -> Iterator[tuple[str, Written]]:
        rejects: list[Reject] = []
        for sample in read_shard(url, rejects):
            texts = {name: content for name, content in sample.members.items() if name.endswith(".txt")}
            yield sample.key, Written(_hashes(sample), texts, _json(sample.members.get("recap.json", b"")))
        for reject in rejects:
            self._note(reject.key, f"was written damaged: {reject.reason} {reject.detail}")

    def _read_table(self, url: str) -> Iterator[tuple[str, Written]]:
        for key, row in read_table(url, [*self.styles, "mix"]).items():
            yield key, Written({"": row.sha256}, row.members, None)

    def _read_folder(self, url: str) -> Iterator[tuple[str, Written]]:
        for file in sorted(Path(url).glob("*.recap.json")):
            record = _json(file.read_bytes())
            name = file.name.removesuffix(".recap.json")
            images = [path for path in file.parent.glob(f"{name}.*") if path.suffix[1:] in IMAGE_EXTENSIONS]
            texts = {caption_extension(kind): text.encode() for kind, text in record["texts"].items()}
            hashes = {"": _hash(images[0].read_bytes())} if images else {}
            yield record.get("key", name), Written(hashes, texts, record)

    # --- against what it was made of ---

    def _compare(self, present: dict[str, Written], quarantine: Counter[tuple[str, str]]) -> None:
        rejects: list[Reject] = []
        quarantined = {key for key, _ in quarantine}
        left, order = dict(present), []
        for sample in read_shard(self.shard, rejects):
            found = left.pop(sample.key, None)
            if found is not None:
                order.append(sample.key)
                self._compare_sample(sample, found)
            elif sample.key not in quarantined:
                self._note(sample.key, "is lost: neither written nor in quarantine")
            quarantined.discard(sample.key)
        if self.kind != "folder":
            others = zip(order, (key for key in present if key not in left), strict=True)
            if wrong := next((there for here, there in others if here != there), None):
                self._note(wrong, "does not stand where it stood")
        for key in left:
            self._note(key, "was written, and is not in the input")
        missing = Counter((each.key, each.reason) for each in rejects) - quarantine
        for key, reason in missing:
            self._note(key, f"is malformed ({reason}), and not in quarantine")
        for key in quarantined - {each.key for each in rejects}:
            self._note(key, "is in quarantine, and not in the input")

    def _compare_sample(self, sample: Sample, found: Written) -> None:
        if self.kind == "shards":
            own = {caption_extension(kind) for kind in (*self.styles, "mix")} | {"recap.json"}
            kept = {name: found.hashes.get(name) for name in sample.members if name not in own}
            hashes = _hashes(sample)
            for name, digest in kept.items():
                if digest != hashes[name]:
                    self._note(sample.key, f"{name} {'is missing' if digest is None else 'has other bytes'}")
            if [name for name in found.hashes if name in kept] != [name for name in kept if name in found.hashes]:
                self._note(sample.key, "its members stand in another order")
        elif found.hashes.get("") != _hash(sample.image_bytes):
            self._note(sample.key, "the image has other bytes")
        self._check_captions(sample.key, found)

    def _check_captions(self, key: str, found: Written) -> None:
        for style in self.styles:
            text = found.texts.get(caption_extension(style))
            if text is None:
                self._note(key, f"has no {style} caption")
            elif text.decode(errors="replace").encode() != text:
                self._note(key, f"its {style} caption is not UTF-8")
            else:
                self.found.counts["captions"] += 1
        mix = found.texts.get("mix.txt")
        if self.kind == "shards" and mix is not None and list(found.texts.values()).count(mix) < 2:
            self._note(key, "its mix is none of its captions")
        if self.kind == "parquet":
            return
        captions = found.record.get("captions") if isinstance(found.record, dict) else None
        if not isinstance(captions, dict) or found.record.get("schema") != 1:
            self._note(key, "its recap.json is damaged")
        elif missing := [style for style in self.styles if style not in captions]:
            self._note(key, f"its recap.json says nothing of {', '.join(missing)}")

    def _check_stats(self, stats: dict[str, Any], num_written: int, quarantine: Counter[tuple[str, str]]) -> None:
        reasons = Counter(reason for (_, reason), count in quarantine.items() for _ in range(count))
        said = {"count": stats.get("count"), "successes": stats.get("successes"), **stats.get("status_dict", {})}
        true = {"count": num_written + reasons.total(), "successes": num_written, "success": num_written, **reasons}
        for name in sorted(said.keys() | true.keys()):
            if said.get(name) != true.get(name):
                self._note("", f"its stats say {name} {said.get(name)}, and it is {true.get(name)}")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hashes(sample: Sample) -> dict[str, str]:
    return {name: _hash(content) for name, content in sample.members.items()}


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def report(found: Verified) -> str:
    """What a terminal shows."""
    lines = [str(finding) for finding in found.findings[:MAX_SHOWN]]
    if found.num_findings > MAX_SHOWN:
        lines.append(f"… and {found.num_findings - MAX_SHOWN:,} more")
    counts = found.counts
    return "\n".join([*lines, f"{found.num_shards:,} shards: {counts['images']:,} images with {counts['captions']:,} "
                              f"captions, {counts['quarantined']:,} samples in quarantine"])


def run(shards: list[str], out: str, kind: Format, styles: list[str]) -> str:
    """As `verify`; what a terminal shows of a set that is whole.

    Raises:
        UserError: it is not; what was found is printed before.
    """
    if is_local(out) and not Path(out).is_dir():
        raise UserError(f"verify: nothing at {out}: run `recap relabel` first, or check name=… and relabel.output")
    found = verify(shards, out, kind, styles)
    if found.num_findings:
        print(report(found))
        raise UserError(f"verify: {found.num_findings:,} findings, in {len(found.faulty - {SET}):,} of "
                        f"{found.num_shards:,} shards: delete the stats of those shards, and run `recap relabel` again")
    return f"all is whole: {report(found)}"
