"""Captions without their images: a parquet for each shard, keyed like it, for data sets too large to copy.

Columns, all of text: `key`; `sha256`, of the encoded image, so that a join can be checked; one for each caption style
and for the mix; and `recap`, which is `KEY.recap.json`. Captions that came with the shard are to be had there. What is
written is deterministic, so equal samples give equal bytes.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from recap.errors import BadSample, UserError
from recap.sample import MAX_JSON_BYTES, MAX_TEXT_BYTES, Sample, caption_extension
from recap.shards import shard_name
from recap.storage import discard, open_seekable, publish, temporary

ROWS, BYTES = 10_000, 64 * 2**20
"""Rows, and bytes of text, of a row group, which is what the memory holds."""
MAX_STYLES = 100
MAX_ROWS, MAX_READ_BYTES = 1_000_000, 2**30
"""Of a file that is read: its rows; and what one row group holds, or the columns that are wanted."""
OWN = ("key", "sha256", "recap")
STYLE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)\.txt")


def table_url(folder: str, shard: str) -> str:
    """Where the captions of a shard are."""
    return f"{folder.rstrip('/')}/{shard_name(shard)}.parquet"


def image_hash(sample: Sample) -> str:
    """The sha256 of the encoded image, in hex."""
    return hashlib.sha256(sample.image_bytes).hexdigest()


# --- writing -------------------------------------------------------------------------------------------------------


class TableWriter:
    """Write a table under a temporary name; leaving the `with` block without an error gives it its final one."""

    def __init__(self, url: str, styles: Iterable[str]) -> None:
        """Begin a table.

        Args:
            url: of the file.
            styles: that become columns, in every shard the same, so that all of them make one data set.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        self.url, self.styles = url, sorted(styles)
        self._rows: list[dict[str, str]] = []
        self._num_bytes = 0
        columns = ["key", "sha256", *self.styles, "recap"]
        self._temporary = temporary(url)
        self._file = pq.ParquetWriter(self._temporary, pa.schema([(name, pa.string()) for name in columns]),
                                      compression="zstd")

    def write(self, sample: Sample) -> None:
        row = {"key": sample.key, "sha256": image_hash(sample), **dict(_captions(sample, self.styles))}
        if (record := sample.members.get("recap.json")) is not None:
            row["recap"] = record.decode()
        self._rows.append(row)
        self._num_bytes += sum(map(len, row.values()))
        if len(self._rows) >= ROWS or self._num_bytes >= BYTES:
            self._end_group()

    def _end_group(self) -> None:
        import pyarrow as pa
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, self._file.schema))
        self._rows, self._num_bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._end_group()
            self._file.close()
            if kind is None:
                publish(self._temporary, self.url)
        finally:
            discard(self._temporary, self.url)


def _captions(sample: Sample, styles: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Style → caption. A mix of one that came with the shard and is no text is left there."""
    for style in styles:
        content = sample.members.get(caption_extension(style))
        if content is None or len(content) > MAX_TEXT_BYTES:
            continue
        try:
            yield style, content.decode()
        except UnicodeDecodeError:
            continue


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What a table has for a sample."""

    sha256: str
    members: dict[str, bytes]
    """`STYLE.txt` → caption, as a shard has it; and `recap.json`, where it was asked for."""


def read_table(url: str, styles: Iterable[str]) -> dict[str, Row]:
    """Key → row, with the captions of those of the styles that are there. Of rows with one key, the first.

    Raises:
        UserError: no such file, or not one that relabelling writes.
    """
    rows: dict[str, Row] = {}
    for key, row in read_rows(url, styles):
        rows.setdefault(key, row)
    return rows


def read_rows(url: str, styles: Iterable[str] | None = None) -> Iterator[tuple[str, Row]]:
    """The keys and rows of a table in its order, with all that they hold where no styles are named.

    Raises:
        UserError: as `read_table`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with open_seekable(url) as file:
            metadata = pq.read_metadata(file)
            columns = _columns(metadata, styles)
            # A text is then held once, however often a file of a few bytes repeats it.
            table = pq.ParquetFile(file, metadata=metadata, read_dictionary=columns)
            num_bytes = 0
            for number in range(metadata.num_row_groups):
                group = table.read_row_group(number, columns)
                group.validate(full=True)
                num_bytes += group.nbytes
                if num_bytes > MAX_READ_BYTES:
                    raise pa.ArrowInvalid(f"captions of over {MAX_READ_BYTES:,} bytes")
                yield from _rows(group, columns[2:])
    except FileNotFoundError:
        raise UserError(f"no captions at {url}: name the folder that `recap relabel` wrote with "
                        "relabel.format=parquet, from these very shards") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the disk or the network; what Arrow finds damaged is a plain OSError without a number
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{url} is no parquet of captions ({problem}): name the folder that `recap relabel` wrote with "
                        "relabel.format=parquet, or relabel that shard again") from None


def join(sample: Sample, rows: dict[str, Row]) -> Sample:
    """The sample with its captions; BadSample where there are none for it, or they are of another image."""
    row = rows.get(sample.key)
    if row is None:
        raise BadSample("not_relabelled")
    if row.sha256 != image_hash(sample):
        raise BadSample("captions_of_another_image", f"sha256 {row.sha256[:64]}")
    return Sample(sample.shard, sample.key, sample.members | row.members)


def _columns(metadata: Any, styles: Iterable[str] | None) -> list[str]:
    """The columns to read; ArrowInvalid, before any is, where they are not ours or more than the memory may hold."""
    import pyarrow as pa
    schema = metadata.schema
    if len(schema) > MAX_STYLES + len(OWN):
        raise pa.ArrowInvalid(f"{len(schema)} columns")
    found = {column.path.split(".")[0]: column for column in (schema.column(i) for i in range(len(schema)))}
    everything = {name for name in found if STYLE.fullmatch(f"{name}.txt")} - {"key", "sha256"}
    columns = ["key", "sha256", *sorted(everything if styles is None else set(styles) & found.keys() - set(OWN))]
    for name in columns:
        column = found.get(name)
        if column is None:
            raise pa.ArrowInvalid(f"no column {name}")
        if column.path != name or column.logical_type.type != "STRING" or column.max_repetition_level:
            raise pa.ArrowInvalid(f"column {name} is not of text")
    if metadata.num_rows > MAX_ROWS:
        raise pa.ArrowInvalid(f"{metadata.num_rows:,} rows, of {MAX_ROWS:,} at most")
    # A chunk's own size would say more, but Arrow ends the process where that part of a file is damaged.
    size = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
    if size > MAX_READ_BYTES:
        raise pa.ArrowInvalid(f"a row group of {size:,} bytes, of {MAX_READ_BYTES:,} at most")
    return columns


def _rows(table: Any, styles: list[str]) -> Iterator[tuple[str, Row]]:
    limits = [2 * MAX_JSON_BYTES if style == "recap" else MAX_TEXT_BYTES for style in ("key", "sha256", *styles)]
    keys, hashes, *captions = (list(_cells(column, limit)) for column, limit in zip(table.columns, limits, strict=True))
    for place, (key, sha256) in enumerate(zip(keys, hashes, strict=True)):
        if key is not None and sha256 is not None:
            members = {"recap.json" if style == "recap" else caption_extension(style): cells[place]
                       for style, cells in zip(styles, captions, strict=True) if cells[place] is not None}
            yield key.decode(errors="replace"), Row(sha256.decode(errors="replace"), members)


def _cells(column: Any, limit: int) -> Iterator[Any]:
    """The texts of a column as bytes, or None; of one that is too long, what is enough to be refused for it."""
    import pyarrow as pa
    import pyarrow.compute as pc
    for chunk in column.chunks:
        texts = pc.binary_slice(chunk.dictionary.cast(pa.binary()), 0, limit + 1).to_pylist()
        yield from (None if place is None else texts[place] for place in chunk.indices.to_pylist())
