"""Images to score that are read one after another, and never held together: tars in the form of WebDataset, tables, and
datasets of Hugging Face.

A `Place` is a position in a source from which reading can begin, so that an interrupted command need not read what came
before. A tar is read member by member: regular members only, bounded in size, and their names open no files.
"""

import csv
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from reward_models import files, hub, images, limits, pairs, pictures, tables
from reward_models.prompt import Prompt
from reward_models.tools.picture_files import COLUMNS, PICTURES, Item

TABLES = (*tables.LINES, *tables.SEPARATORS, ".parquet")
BLOCK = tarfile.BLOCKSIZE


class Place(NamedTuple):
    """Where an image begins: the number of the file, the byte in it (in Parquet the row, in a list the index), and the
    number of its row there, all from 0."""

    file: int = 0
    at: int = 0
    row: int = 0


class Sample(NamedTuple):
    """An image that is not read yet. `after` is the place behind it; `prompt()` reads its prompt, `item()` all of it.
    ValueError, which names the place, for an invalid row."""

    after: Place
    prompt: Callable[[], Prompt | None]
    item: Callable[[], Item]


@dataclass(frozen=True)
class Stream:
    """The images of `parts`, files or lists of items, in order. `samples(part, place)` are those of one from a place
    on; `identity` is the name and size of each part; `others` is the number of other files in the folder."""

    parts: Sequence[Any]
    of_part: Callable[[Any, Place], Iterator[Sample]]
    identity: Sequence[Sequence[Any]]
    others: int = 0

    def samples(self, place: Place) -> Iterator[Sample]:
        """The images from a place on."""
        for number in range(place.file, len(self.parts)):
            begin = place if number == place.file else Place(number)
            yield from self.of_part(self.parts[number], begin)


def of_items(items: Sequence[Item]) -> Stream:
    """The stream of images that are held in a list."""

    def samples(items: Sequence[Item], place: Place) -> Iterator[Sample]:
        for index in range(place.at, len(items)):
            item = items[index]
            yield Sample(Place(0, index + 1, index + 1), partial(_prompt_of, item), partial(_same, item))

    return Stream([items], samples, [[item.name, item.prompt and item.prompt.text] for item in items])


def _prompt_of(item: Item) -> Prompt | None:
    return item.prompt


def _same(item: Item) -> Item:
    return item


def tars_of(source: Path) -> list[Path]:
    """The tars that a source consists of: itself, or those of a folder, by name; none for any other source."""
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.suffix.lower() == ".tar")
    return [source] if source.suffix.lower() == ".tar" else []


def only(source: str | Path) -> bool:
    """Whether a source is read as a stream without being asked to: tars, and the split of a dataset (`hf:...`)."""
    return str(source).startswith("hf:") or bool(tars_of(Path(source)))


def of_source(source: str | Path, prompt: str | None = None) -> Stream:
    """The stream of files (`of_files`) or of `hf:NAME[/CONFIG]:SPLIT` (`of_dataset`). ValueError for any other."""
    return of_dataset(str(source), prompt) if str(source).startswith("hf:") else of_files(Path(source), prompt)


def of_files(source: Path, prompt: str | None = None) -> Stream:
    """The stream of a tar, a folder of tars, a table, or a folder of tables in Parquet. `prompt` is used for all images
    that have none. ValueError, in one line, for any other source; rows are checked when they are read."""
    parts, of_part = tars_of(source), _of_tar
    if not parts:
        parts, of_part = [source], _of_table
        if source.is_dir():
            parts = sorted(path for path in source.iterdir() if path.suffix.lower() == ".parquet")
            if not parts:
                raise ValueError(f"{source}: no .tar or .parquet in it; --stream reads these, and tables")
        elif source.suffix.lower() not in TABLES:
            raise ValueError(f"{source}: a tar, a folder of tars or a table ({', '.join(TABLES)}) is needed")
    try:
        sizes = [os.stat(path).st_size for path in parts]
        others = len(os.listdir(source)) - len(parts) if source.is_dir() else 0
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from None

    def samples(path: Path, place: Place) -> Iterator[Sample]:
        try:
            yield from of_part(path, place, prompt)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None

    return Stream(parts, samples, [[path.name, size] for path, size in zip(parts, sizes, strict=True)], others)


def of_dataset(source: str, prompt: str | None = None) -> Stream:
    """The stream of a dataset's split, file by file, fetched as it is read. A row has `image` with the picture's bytes,
    as the type `Image` of `datasets` stores them; files that it names are opened for a folder on this disk alone.
    ValueError, in one line, for a dataset that cannot be loaded."""
    named = hub.NAMED.fullmatch(source)
    if named is None or named["column"]:
        raise ValueError(f"{source}: a dataset is named hf:NAME:SPLIT or hf:NAME/CONFIG:SPLIT")
    folder = Path(files.home(named["name"])).absolute()
    here = folder.is_dir()
    try:
        shards = hub.shards(str(folder) if here else named["name"], named["split"])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None

    def samples(shard: Any, place: Place) -> Iterator[Sample]:
        file = f"{source}, file {place.file + 1}"
        try:
            for number, cells in hub.rows_of(shard, place.at):
                where = f"{file}, row {number + 1}"
                item = _row(folder / "rows", where, cells, prompt) if here else _fetched(source, where, cells, prompt)
                yield Sample(Place(place.file, number + 1, number + 1), partial(_prompt_of, item), partial(_same, item))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(source) else f"{file}: {text}") from None

    return Stream(shards, samples, [[source, number] for number in range(len(shards))])


def _fetched(source: str, where: str, cells: tables.Row, prompt: str | None) -> Item:
    """A row from elsewhere, whose names open no files here."""
    words = pictures.prompt_of(images.unopened(cells), prompt, where, COLUMNS)
    cell = cells.get("image")
    if isinstance(cell, bytes) or (isinstance(cell, dict) and "bytes" in cell):
        stored = pictures.of_cell(cell, "image", Path(source), where)
        return Item(stored.name, stored.path, words, stored.data)
    return Item(f"image of {where.rpartition(', ')[2]}", Path(source), words, b"", "no bytes of a picture in `image`")


# ---------------------------------------------------------------------------------------------------------------- tars


class _Bounded:
    """A file of which no more than `limits.HEADER` bytes are read at once: `tarfile` reads names of any length."""

    def __init__(self, file: BinaryIO):
        self.tell, self.seek, self.file = file.tell, file.seek, file

    def read(self, count: int) -> bytes:
        if count > limits.HEADER:
            raise ValueError(f"byte {self.tell()}: a header of {count} bytes, more than {limits.HEADER}")
        return self.file.read(count)


def _of_tar(path: Path, place: Place, prompt: str | None) -> Iterator[Sample]:
    """The samples of a tar: consecutive members whose names are equal up to the first dot of the file name."""
    with files.opened(path) as file:
        file.seek(place.at)
        members: list[tarfile.TarInfo] = []
        row = place.row
        try:
            for member in _members(file):
                if members and (member is None or _key(member) != _key(members[0])):
                    after = Place(place.file, file.tell() if member is None else member.offset, row + 1)
                    where = f"{path}, row {row + 1}"
                    item = partial(_sample, file, path, where, tuple(members), prompt)
                    yield Sample(after, partial(_caption, file, where, _by_ending(members), prompt), item)
                    members, row = [], row + 1
                if member is not None:
                    members.append(member)
                    if len(members) > limits.MEMBERS:
                        raise ValueError(f"row {row + 1}: more than {limits.MEMBERS} members in a sample")
        except tarfile.TarError as error:
            raise ValueError(f"{path}: no tar that can be read: {error}") from None
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo | None]:
    """The members of a tar but folders and hidden files, then None, where the file is at the end mark."""
    archive = tarfile.TarFile(fileobj=_Bounded(file), encoding="utf-8", errors="surrogateescape")
    while (member := archive.next()) is not None:
        archive.members.clear()  # it keeps them all
        if not member.isdir() and _stem(member):
            yield member
    file.seek(archive.offset)
    if file.read(BLOCK).count(0) < BLOCK:
        raise ValueError(f"byte {archive.offset}: neither a member nor the end; the tar is damaged or cut off")
    file.seek(archive.offset)
    yield None


def _stem(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2].partition(".")[0]


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, _ = member.name.rpartition("/")
    return folder + slash + _stem(member)


def _by_ending(members: Sequence[tarfile.TarInfo]) -> dict[str, tarfile.TarInfo]:
    """The members of a sample by what follows the first dot of the name, in small letters."""
    return {member.name.rpartition("/")[2].partition(".")[2].lower(): member for member in members}


def _sample(file: BinaryIO, path: Path, where: str, members: Sequence[tarfile.TarInfo], prompt: str | None) -> Item:
    by_ending = _by_ending(members)
    shown = [member for ending, member in by_ending.items() if f".{ending}" in PICTURES]
    name = (shown[0] if shown else members[0]).name
    name = f"{path.name}/{name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')}"
    words = _caption(file, where, by_ending, prompt)
    if len(shown) != 1 or len(by_ending) < len(members):
        reason = f"one picture is needed in a sample, and no name twice; it has {len(shown)} of {len(members)} members"
        return Item(name, path, words, b"", reason)
    if not _is_regular(shown[0]):
        return Item(name, path, words, b"", "cannot be read: not a regular member of the tar")
    if shown[0].size > limits.PICTURE:
        return Item(name, path, words, b"", f"{shown[0].size} bytes, more than the {limits.PICTURE} allowed")
    return Item(name, path, words, _content(file, shown[0], where))


def _is_regular(member: tarfile.TarInfo) -> bool:
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)


def _content(file: BinaryIO, member: tarfile.TarInfo, where: str) -> bytes:
    """The bytes of a member; the position of the file stays."""
    before = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(before)
    if len(data) < member.size:
        raise ValueError(f"{where}: the tar is cut off")
    return data


def _caption(file: BinaryIO, where: str, members: dict[str, tarfile.TarInfo], prompt: str | None) -> Prompt | None:
    """The prompt of a sample: `prompt` of its `json`, else the text of its `txt`. Other keys are ground truth; pictures
    that it names are not opened."""
    row = {}
    if "json" in members:
        try:
            row = tables.row_in(files.decoded(_text(file, members["json"], where)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if "txt" in members and "prompt" not in row:
        row["prompt"] = files.decoded(_text(file, members["txt"], where)).strip()
    row = images.unopened({key: value for key, value in row.items() if value is not None})
    return pictures.prompt_of(row, prompt, where, COLUMNS)


def _text(file: BinaryIO, member: tarfile.TarInfo, where: str) -> bytes:
    if not _is_regular(member) or member.size > limits.CAPTION:
        raise ValueError(f"{where}: {member.name!r} must be a regular member of at most {limits.CAPTION} bytes")
    return _content(file, member, where)


# -------------------------------------------------------------------------------------------------------------- tables


def _of_table(path: Path, place: Place, prompt: str | None) -> Iterator[Sample]:
    ending = path.suffix.lower()
    read = _parquet if ending == ".parquet" else _separated if ending in tables.SEPARATORS else _lines
    where = f"{path}, row {place.row + 1}"
    try:
        for number, cells, at in read(path, place.at, place.row):
            where = f"{path}, row {number + 1}"
            item = _row(path, where, {name: cell for name, cell in cells.items() if cell is not None}, prompt)
            yield Sample(Place(place.file, at, number + 1), partial(_prompt_of, item), partial(_same, item))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _row(path: Path, where: str, cells: tables.Row, prompt: str | None) -> Item:
    if pairs.layout_of(cells) or "image_a" in cells:
        raise ValueError(f"{where}: pairs; they are read without --stream")
    single = "file_name" if "file_name" in cells and "image" not in cells else "image"
    stored = pictures.in_row(cells, single, path, where)
    return Item(stored.name, stored.path, pictures.prompt_of(cells, prompt, where, COLUMNS, path.parent), stored.data)


Rows = Iterator[tuple[int, tables.Row, int]]  # the number of a row, its cells, and the place behind it


def _lines(path: Path, at: int, row: int) -> Rows:
    with files.opened(path) as file:
        file.seek(at)
        for number, line in enumerate(_text_lines(file), row):
            if line.strip():
                try:
                    yield number, tables.row_in(line.rstrip("\r\n")), file.tell()
                except ValueError as error:
                    raise ValueError(f"line {number + 1}: {error}") from None


def _text_lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a text with their ends, bounded in length."""
    while line := file.readline(limits.JSON + 1):
        if len(line) > limits.JSON:
            raise ValueError(f"byte {file.tell() - len(line)}: a line longer than {limits.JSON} bytes")
        try:
            yield files.decoded(line)
        except ValueError:
            raise ValueError(f"byte {file.tell() - len(line)}: a line that is not UTF-8; save it as UTF-8") from None


def _separated(path: Path, at: int, row: int) -> Rows:
    mark = tables.SEPARATORS[path.suffix.lower()]
    with files.opened(path) as file:
        names = tables.headings([tables.plain(name) for name in next(_cells(file, mark, 0), [])])
        file.seek(at or file.tell())
        for number, cells in enumerate(_cells(file, mark, row + 1), row):
            yield number, tables.under(names, cells, number, mark), file.tell()


def _cells(file: BinaryIO, mark: str, row: int) -> Iterator[list[str]]:
    return tables.parts_of(csv.reader(_text_lines(file), delimiter=mark, strict=True), row)


def _parquet(path: Path, at: int, row: int) -> Rows:
    for number, cells in tables.rows_of_parquet(tables.parquet(path), at):
        yield number, cells, number + 1
