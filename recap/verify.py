"""Whether a relabelled set is whole: every image of its input is there with its bytes, or in a quarantine file.

Input and output are both read, a few shards at a time; of what was written, the memory holds hashes. What is damaged is
a finding.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recap import progress
from recap.caption_tables import read_rows
from recap.config.relabel import Relabel
from recap.errors import BadSample, UserError
from recap.outputs import Format, file_name, written
from recap.sample import IMAGE_EXTENSIONS, Sample, caption_extension, decode_text
from recap.seal import SCHEMA, Seal
from recap.shard_work import ahead, quarantine_file
from recap.shards import Reject, read_shard, shard_name
from recap.storage import exists, is_local, names, open_seekable, read_bytes

MAX_KEPT, MAX_SHOWN = 1000, 20
"""Findings that are kept, and of these, that are printed."""
MAX_TEXT = 1000
"""Characters that are kept of a key, and of what is found."""
COLUMNS, PLACE = 80, 40
"""Of a terminal, and of these, for shard and key."""
THREADS = 4
SET = ""
"""In the place of a shard's name: what is found of the set."""
ENDINGS: dict[Format, str] = {"shards": ".tar", "parquet": ".parquet", "folder": ""}
IMAGE, ALT_TEXT = "the image", "the alt-text"
"""What a table or a folder keeps of a sample's members, beside captions."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        place = _shown("/".join(filter(None, (self.shard, self.key))), PLACE)
        return f"{place}: {_shown(self.what, COLUMNS - len(place) - 2)}" if place else _shown(self.what, COLUMNS)


@dataclass(frozen=True, slots=True)
class Written:
    """A sample as it was written: no more of it than is compared."""

    hashes: dict[str, bytes]
    """Member → sha256, in the order of the file; of a table or folder, of what it keeps."""
    num_captions: int
    faults: list[str]
    """What is wrong whatever the input says."""


@dataclass
class Verified:
    """What is known of a set, or of one of its shards."""

    num_shards: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """`images`, `captions`, `quarantined`."""
    findings: list[Finding] = field(default_factory=list)
    """The first of them: of the set, then of its shards, in file order."""
    num_findings: int = 0
    faulty: set[str] = field(default_factory=set)
    """Shards of which there is a finding."""
    settings: Counter[str] = field(default_factory=Counter)
    """Of the captioning, as a hash → shards."""

    def note(self, shard: str, key: str, what: str) -> None:
        self.num_findings += 1
        self.faulty.add(shard)
        if len(self.findings) < MAX_KEPT:
            self.findings.append(Finding(shard, key[:MAX_TEXT], what[:MAX_TEXT]))

    def add(self, other: "Verified") -> None:
        self.num_shards += other.num_shards
        self.counts += other.counts
        self.findings += other.findings[:MAX_KEPT - len(self.findings)]
        self.num_findings += other.num_findings
        self.faulty |= other.faulty
        self.settings += other.settings


class _Damaged(Exception):
    """What was made of a shard cannot be compared."""


def verify(shards: list[str], out: str, config: Relabel, styles: list[str]) -> Verified:
    """Read the input and what relabelling made of it, and compare them.

    Args:
        shards: that were relabelled.
        out: folder or URL.
        config: its format, and the styles that `KEY.mix.txt` is drawn from; without them, any caption will do for it,
            or none.
        styles: of the captions.

    Raises:
        UserError: a shard of the input is not there.
    """
    found = Verified()
    _check_set(found, shards, out, config.format)
    with progress.bar("verify", None) as bar:
        for one in ahead(lambda shard: _Shard(shard, out, config, styles).check(), shards, THREADS):
            found.add(one)
            bar.update(one.counts["images"])
    return found


def _check_set(found: Verified, shards: list[str], out: str, kind: Format) -> None:
    """Find shards that nobody asked for, and what is half written."""
    expected = set(map(shard_name, shards))
    endings = [ending for ending in (ENDINGS[kind], "_stats.json") if ending]
    for name in sorted(names(out)):
        if name.startswith(".") and name.endswith(".tmp"):
            found.note(SET, "", f"{name} is half written: a killed process has left it, or one is at work")
        elif any(name.endswith(ending) and name.removesuffix(ending) not in expected for ending in endings) \
                or (kind == "folder" and name not in expected and _is_of_samples(Path(out) / name)):
            found.note(SET, "", f"{name} is of no shard of the input")


def _is_of_samples(folder: Path) -> bool:
    """Whether a folder is one that relabelling writes for a shard."""
    return folder.is_dir() and next(folder.glob("*.recap.json"), None) is not None


class _Shard:
    """One shard of the input, with what was made of it."""

    def __init__(self, shard: str, out: str, config: Relabel, styles: list[str]) -> None:
        self.shard, self.out, self.styles = shard, out, styles
        self.kind, self.mix, self.folder_caption = config.format, list(config.mix), config.folder_caption
        self.name = shard_name(shard)
        self.seal = Seal([])
        self.own = {*map(caption_extension, (*styles, "mix")), "recap.json"}
        """Members that relabelling writes, in place of those that were there."""
        self.found = Verified(num_shards=1)

    def check(self) -> Verified:
        try:
            stats = self._stats()
            quarantine = self._quarantine(stats)
            present = dict(self._read())
        except _Damaged as error:
            self._note("", str(error))
        except (OSError, UserError) as error:
            self._note("", f"cannot be read: {error}")
        else:
            self.found.counts.update(images=len(present), quarantined=quarantine.total())
            self.found.settings[stats["settings"]] += 1
            self._compare(present, quarantine)
            self._check_stats(stats, len(present), quarantine)
        return self.found

    def _note(self, key: str, what: str) -> None:
        self.found.note(self.name, key, what)

    # --- what was written ---

    def _stats(self) -> dict[str, Any]:
        url = f"{self.out}/{self.name}_stats.json"
        if not exists(url):
            raise _Damaged(f"is not relabelled: there is no {self.name}_stats.json")
        stats = _json(read_bytes(url))
        if not (isinstance(stats, dict) and isinstance(stats.get("settings"), str)
                and isinstance(stats.get("status_dict"), dict)):
            raise _Damaged("its stats are damaged")
        seal = stats.get("seal")
        if not (isinstance(seal, dict) and isinstance(seal.get("styles"), list)
                and all(isinstance(style, str) for style in seal["styles"])):
            raise _Damaged("its stats are damaged")
        self.seal = Seal(seal["styles"])
        return stats

    def _quarantine(self, stats: dict[str, Any]) -> Counter[tuple[str, str]]:
        """(key, reason) → how often it is listed."""
        url = quarantine_file(self.shard, self.out)
        if not exists(url):
            if stats["status_dict"].keys() - {"success"}:
                raise _Damaged(f"there is no {self.name}_quarantine.jsonl")
            return Counter()
        listed: Counter[tuple[str, str]] = Counter()
        for line in read_bytes(url).splitlines():
            reject = _json(line)
            if not (isinstance(reject, dict) and isinstance(reject.get("key"), str)
                    and isinstance(reject.get("reason"), str)):
                raise _Damaged("its quarantine file is damaged")
            listed[reject["key"], reject["reason"]] += 1
        return listed

    def _read(self) -> Iterator[tuple[str, Written]]:
        """Key → what was written for it, in the order of the file."""
        url = written(self.kind, self.out, self.name)
        if not (Path(url).is_dir() if self.kind == "folder" else exists(url)):
            raise _Damaged(f"there is no {self.name}{ENDINGS[self.kind]}")
        readers: dict[Format, Callable[[str], Iterator[tuple[str, Written]]]] = {
            "shards": self._read_shard, "parquet": self._read_table, "folder": self._read_folder}
        seen: set[str] = set()
        for key, found in readers[self.kind](url):
            if key in seen:
                self._note(key, "was written twice")
            seen.add(key)
            yield key, found

    def _read_shard(self, url: str) -> Iterator[tuple[str, Written]]:
        rejects: list[Reject] = []
        for sample in read_shard(url, rejects):
            num_captions, faults = self._check_captions(sample.members)
            faults += self._check_record(sample)
            yield sample.key, Written(_hashes(sample), num_captions, faults)
        for reject in rejects:
            if reject.reason == "truncated_shard":
                raise _Damaged(f"{self.name}.tar is damaged: {reject.detail}")
            self._note(reject.key, f"was written damaged: {reject.reason} {reject.detail}")

    def _read_table(self, url: str) -> Iterator[tuple[str, Written]]:
        num_rows = 0
        try:
            for key, row in read_rows(url):
                num_rows += 1
                num_captions, faults = self._check_captions(row.members)
                faults += self._check_record(Sample(self.name, key, row.members))
                yield key, Written({IMAGE: _from_hex(row.sha256)}, num_captions, faults)
        except UserError as error:
            raise _Damaged(str(error).replace(url, f"{self.name}.parquet")) from None
        if (num_nameless := _num_rows(url) - num_rows) > 0:
            self._note("", f"{self.name}.parquet has {num_nameless:,} rows without a key or an image's hash")

    def _read_folder(self, url: str) -> Iterator[tuple[str, Written]]:
        endings: dict[str, set[str]] = defaultdict(set)
        for name in sorted(names(url)):
            stem, _, ending = name.partition(".")
            endings[stem].add(ending)
        for name, found in endings.items():
            images = [ending for ending in found if ending in IMAGE_EXTENSIONS]
            if found != {"txt", "recap.json", *images[:1]} or not images:
                self._note("", f"{self.name}/{name} has {', '.join(sorted(found))}, not an image, txt and recap.json")
                continue
            image, text, record = (read_bytes(f"{url}/{name}.{ending}") for ending in (images[0], "txt", "recap.json"))
            yield self._of_files(name, image, text, _json(record))

    def _of_files(self, name: str, image: bytes, text: bytes, record: Any) -> tuple[str, Written]:
        key, texts = (record.get("key", name), record.get("texts")) if isinstance(record, dict) else (name, None)
        if not (isinstance(key, str) and isinstance(texts, dict)
                and all(isinstance(content, str) for content in texts.values())):
            return name, Written({IMAGE: _hash(image)}, 0, ["its recap.json is damaged"])
        # A lone surrogate stays, and is then found to be no text.
        members = {caption_extension(kind): content.encode(errors="surrogatepass") for kind, content in texts.items()}
        num_captions, faults = self._check_captions(members)
        faults += self._check_record(Sample(self.name, key, members | {"recap.json": json.dumps(record).encode()}))
        if text != members.get(caption_extension(self.folder_caption)):
            faults.append(f"{name}.txt is not its {self.folder_caption} caption")
        if name not in (file_name(key, set()), file_name(key, {key.casefold()})):
            faults.append(f"its files are called {name}")
        hashes = {IMAGE: _hash(image)} | ({ALT_TEXT: _hash(members["txt"])} if "txt" in members else {})
        return key, Written(hashes, num_captions, faults)

    def _check_captions(self, members: dict[str, bytes]) -> tuple[int, list[str]]:
        """How many of the styles' captions there are, and what is wrong with them."""
        faults = []
        for style in self.styles:
            try:
                decode_text(members[caption_extension(style)], style)
            except KeyError:
                faults.append(f"has no {style} caption")
            except BadSample as error:
                faults.append(f"its {style} caption cannot be read: {error}")
        num_captions = len(self.styles) - len(faults)
        if self.kind != "shards" and set(self.mix) - set(self.styles):
            return num_captions, faults  # what it was drawn from may be in the input alone
        any_kind = (name for name in members if name.endswith(".txt") and name != "mix.txt")
        choice = {members[name] for name in map(caption_extension, self.mix) if name in members} if self.mix \
            else {members[name] for name in any_kind}
        if "mix.txt" not in members:
            faults += ["has no mix"] if self.mix and choice else []
        elif choice and members["mix.txt"] not in choice:
            faults.append("its mix is none of its captions")
        return num_captions, faults

    def _check_record(self, sample: Sample) -> list[str]:
        record = _json(sample.members.get("recap.json", b""))
        captions = record.get("captions") if isinstance(record, dict) and record.get("schema") == SCHEMA else None
        if not isinstance(captions, dict):
            return ["its recap.json is damaged"]
        self.seal.add(sample, record)
        missing = [style for style in self.styles if not isinstance(captions.get(style), dict)]
        return [f"its recap.json says nothing of {', '.join(missing)}"] if missing else []

    # --- against what it was made of ---

    def _compare(self, present: dict[str, Written], quarantine: Counter[tuple[str, str]]) -> None:
        rejects: list[Reject] = []
        places: dict[str, int] = {}
        for sample in read_shard(self.shard, rejects):
            places[sample.key] = len(places)
            if sample.key in present:
                self._compare_sample(sample, present[sample.key])
        if self.kind != "folder":
            here = [key for key in places if key in present]
            there = [key for key in present if key in places]
            if wrong := next((key for key, other in zip(there, here, strict=True) if key != other), None):
                self._note(wrong, "does not stand where it stood")
        self._account(places, present, Counter((each.key, each.reason) for each in rejects), quarantine)
        self.found.findings.sort(key=lambda finding: places.get(finding.key, len(places)))

    def _account(self, keys: Collection[str], present: Collection[str], malformed: Counter[tuple[str, str]],
                 quarantine: Counter[tuple[str, str]]) -> None:
        """Every sample of the input is written or in quarantine, once; and nothing else is."""
        for key, reason in malformed - quarantine:
            self._note(key, f"is malformed ({reason}), and not in quarantine")
        dropped: Counter[str] = Counter()
        for (key, _), count in (quarantine - malformed).items():
            dropped[key] += count
        for key in keys:
            match (key in present, dropped.pop(key, 0)):
                case (False, 0):
                    self._note(key, "is lost: neither written nor in quarantine")
                case (True, count) if count:
                    self._note(key, "was written, and is in quarantine")
                case (False, count) if count > 1:
                    self._note(key, f"is in quarantine {count} times")
        for key in dropped:
            self._note(key, "is in quarantine, and not in the input")
        for key in present:
            if key not in keys:
                self._note(key, "was written, and is not in the input")

    def _compare_sample(self, sample: Sample, found: Written) -> None:
        for name, digest in self._kept(sample).items():
            if found.hashes.get(name) != digest:
                self._note(sample.key, f"{name} {'has other bytes' if name in found.hashes else 'is missing'}")
        if self.kind == "shards":
            stood = [name for name in sample.members if name in found.hashes]
            if [name for name in found.hashes if name in sample.members] != stood:
                self._note(sample.key, "its members stand in another order")
            for name in sorted(found.hashes.keys() - sample.members.keys() - self.own):
                self._note(sample.key, f"{name} is not in the input")
        for fault in found.faults:
            self._note(sample.key, fault)
        self.found.counts["captions"] += found.num_captions

    def _kept(self, sample: Sample) -> dict[str, bytes]:
        """What relabelling has to keep of a sample, as its hashes."""
        if self.kind == "shards":
            return {name: digest for name, digest in _hashes(sample).items() if name not in self.own}
        try:
            kept = {IMAGE: _hash(sample.image_bytes)}
        except BadSample:
            return {IMAGE: b""}  # which no image has
        alt_text = sample.readable("alt") if self.kind == "folder" else None  # what is no text, a folder leaves out
        return kept if alt_text is None else kept | {ALT_TEXT: _hash(alt_text.encode())}

    def _check_stats(self, stats: dict[str, Any], num_written: int, quarantine: Counter[tuple[str, str]]) -> None:
        reasons: Counter[str] = Counter()
        for (_, reason), count in quarantine.items():
            reasons[reason] += count
        said = {"count": stats.get("count"), "successes": stats.get("successes"), **stats["status_dict"]}
        true = {"count": num_written + reasons.total(), "successes": num_written, "success": num_written, **reasons}
        wrong = [f"{name} {said.get(name, 0)}, not {true.get(name, 0)}" for name in sorted(said.keys() | true.keys())
                 if said.get(name, 0) != true.get(name, 0)]
        if wrong:
            self._note("", f"its stats say {'; '.join(wrong)}")
        elif not self.found.num_findings and stats["seal"] != self.seal.content():
            self._note("", "its captions, or what is said of them, were changed since")


def _num_rows(url: str) -> int:
    import pyarrow.parquet as pq
    with open_seekable(url) as file:
        return int(pq.read_metadata(file).num_rows)


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _hashes(sample: Sample) -> dict[str, bytes]:
    return {name: _hash(content) for name, content in sample.members.items()}


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _shown(text: str, columns: int) -> str:
    """For a terminal, in ASCII; where it is cut, an ellipsis says so."""
    line = ascii(text)[1:-1]
    return line if len(line) <= columns else f"{line[:columns - 1]}…"


def report(found: Verified) -> str:
    """What a terminal shows: the first findings, a line each, and a summary."""
    lines = [str(finding) for finding in found.findings[:MAX_SHOWN]]
    if found.num_findings > len(lines):
        lines.append(f"… and {found.num_findings - len(lines):,} more")
    whole = f"{found.num_shards:,} shards" if found.num_findings else f"all {found.num_shards:,} shards are whole"
    counts = found.counts
    lines.append(f"{whole}: {counts['images']:,} images, {counts['captions']:,} captions, "
                 f"{counts['quarantined']:,} quarantined")
    if len(found.settings) > 1:
        kinds = ", ".join(f"{count:,} shards of {settings[:8]}" for settings, count in found.settings.most_common(3))
        lines.append(f"made with {len(found.settings)} different settings: {kinds}")
    return "\n".join(lines)


def run(shards: list[str], out: str, config: Relabel, styles: list[str]) -> str:
    """As `verify`; what a terminal shows of a set that is whole.

    Raises:
        UserError: it is not; what was found is printed before.
    """
    if is_local(out) and not Path(out).is_dir():
        raise UserError(f"verify: nothing at {out}: run `recap relabel` first, or check name=… and relabel.output")
    found = verify(shards, out, config, styles)
    if not found.num_findings:
        return report(found)
    print(report(found))
    num_faulty = len(found.faulty - {SET})
    mend = ("delete those shards' stats, and the run's relabel/done.json, and run `recap relabel` again" if num_faulty
            else "delete what is left over, or relabel anew to another relabel.output")
    raise UserError(f"verify: {found.num_findings:,} findings in {num_faulty:,} of {found.num_shards:,} shards: {mend}")
