"""Bags of any kind: which files one recording has, its topics, and their messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path, PurePath
import re
import shutil
import tempfile
from typing import Any, NamedTuple
import weakref

from rosbags.typesys import get_typestore, Stores
from ruamel.yaml import YAML, YAMLError

from .chunked import Mcap, Ros1, zstd
from .stamps import RESTART_NS
from .storage import Channel, RecordingError, Sqlite

ZSTD = b'\x28\xb5\x2f\xfd'  #: what is compressed by it begins so, a file or a message
LFS = b'version https://git-lfs'
BAG_FILES = ('.bag', '.mcap', '.db3')
#: A file's name: what the recorder was told, the part's number, and the kind of file
_NAME = re.compile(r'(.+?)(?:_(\d+))?(\.bag|\.mcap|\.db3)(\.active|\.zstd)?')
_DATE = re.compile(r'\d{4}([-_]\d\d){5}')  # ROS 1 gives each part another one

#: ROS 2's types of messages; those of ROS 1 are brought to them.
STORE = get_typestore(Stores.ROS2_HUMBLE)


class Message(NamedTuple):
    """One message of a bag."""

    recorded: int  #: time of recording, ns
    stamp: int  #: of its header, ns
    topic: str
    content: Any  #: as `rosbags` has it, with ROS 2's names; None where it cannot be read


class Bag:
    """
    The messages of one recording, in one file or in several.

    ``path`` is a file, or a folder that holds them. Raises RecordingError, one sentence, where
    there is no bag or none that can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, files, self._notes = _find(path)
        self._scratch: Path | None = None
        self._storages, refusals = [], []
        for file in files:
            try:
                self._storages.append(_open_storage(file, self._make_scratch))
            except RecordingError as error:
                refusals.append(error)
        if not self._storages:
            raise refusals[0]
        self._notes += [f'a part is left out: {error}' for error in refusals]
        spans = [span for storage in self._storages if (span := storage.span())]
        for before, after in zip(spans, spans[1:], strict=False):
            if after[0] <= before[0] or after[0] < before[1] - RESTART_NS:
                raise _several(self.path, files)
        #: how many messages there are of each topic, type and encoding
        self.channels: Counter[Channel] = Counter()
        for storage in self._storages:
            for number, channel in storage.channels.items():
                self.channels[channel] += storage.counts[number]

    @property
    def folder(self) -> Path:
        """The folder of the ground truth: beside the files, or beside the folder ``bag/``."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return folder.resolve().parent if folder.resolve().name == 'bag' else folder

    @property
    def closed(self) -> bool:
        """Whether every file has its end."""
        return all(storage.closed for storage in self._storages)

    def notes(self) -> list[str]:
        """Return what the user should know of the files, one sentence each."""
        damaged = [
            f'{storage.path} is damaged: {len(storage.damage)} of its chunks cannot be read'
            for storage in self._storages if storage.damage
        ]
        return [*self._notes, *(n for storage in self._storages for n in storage.notes), *damaged]

    def messages(self, wanted: Collection[Channel]) -> Iterator[Message]:
        """Yield the messages of some channels, file by file in the order of their recording."""
        for storage in self._storages:
            channels = {n: channel for n, channel in storage.channels.items() if channel in wanted}
            for recorded, number, data in storage.messages(channels) if channels else ():
                content, stamp = _content(channels[number], data), 0
                if content is not None:
                    stamp = content.header.stamp.sec * 10**9 + content.header.stamp.nanosec
                yield Message(recorded, stamp, channels[number].topic, content)

    def _make_scratch(self) -> Path:
        """Return a new folder, which goes when the bag does."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix='imatching-'))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self._scratch))


def is_part(file: Path) -> bool:
    """Return whether a file is named as one part of a split recording."""
    return _part(file) is not None


def _part(file: Path) -> tuple[str, int] | None:
    """Return the recording that a file is named after, and the part's number."""
    found = _NAME.fullmatch(_DATE.sub('*', file.name))
    return (found[1] + found[3], int(found[2])) if found and found[2] else None


def _find(path: Path) -> tuple[Path, list[Path], list[str]]:
    """Return the bag that ``path`` means, its files in order, and what to say of them."""
    if not path.exists():
        raise RecordingError(f'recording {path} does not exist')
    if path.is_file():
        with path.open('rb') as file:
            known = _NAME.fullmatch(path.name) or file.read(8) in (b'\x89MCAP0\r\n', b'#ROSBAG ')
        if not known:
            raise RecordingError(
                f'{path} is not a recording; give a folder or a {", ".join(BAG_FILES)} file'
            )
        return path, [path], []
    for folder in filter(Path.is_dir, (path, path / 'bag')):
        files = [file for file in folder.iterdir() if _NAME.fullmatch(file.name)]
        # Of a file that a crash has left half compressed, the original is there too
        files = [f for f in files if f.suffix != '.zstd' or f.with_suffix('') not in files]
        listed, notes = None, []
        if (folder / 'metadata.yaml').is_file():
            listed, notes = _listed(folder / 'metadata.yaml')
            if not files:
                raise RecordingError(
                    f'{folder} holds metadata.yaml, but not the files of the recording, '
                    f'{", ".join(listed) or "which it does not name"}; copy them too'
                )
        if not files:
            continue
        parts = sorted((part[1], file) for file in files if (part := _part(file)))
        names = {part[0] for file in files if (part := _part(file))}
        numbers = {number for number, _ in parts}
        there = [folder / name for name in listed or () if folder / name in files]
        if len(names) == 1 and len(parts) == len(numbers) == len(files):
            files = [file for _, file in parts]
        elif there:
            files = there
        elif len(files) > 1:
            raise _several(folder, files)
        if listed and set(listed) != {file.name for file in files}:
            notes.append(
                f'{folder / "metadata.yaml"} names other files than those that are there, which '
                'are read; it is mended by: ros2 bag reindex'
            )
        return folder if listed is not None or len(files) > 1 else files[0], files, notes
    raise RecordingError(
        f'folder {path} holds no recording: no metadata.yaml, no {", ".join(BAG_FILES)} file, '
        'no bag/'
    )


def _listed(metadata: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files that a metadata.yaml lists, and what to say of it."""
    try:
        about = YAML(typ='safe').load(metadata.read_text(errors='replace'))
        names = about['rosbag2_bagfile_information']['relative_file_paths']
        return [PurePath(name).name for name in names], []
    except (YAMLError, LookupError, TypeError, OSError):
        return [], [f'{metadata} cannot be used; it is mended by: ros2 bag reindex']


def _several(folder: Path, files: Sequence[Path]) -> RecordingError:
    names = ', '.join(sorted(file.name for file in files))
    return RecordingError(
        f'{folder} holds several bags that are not parts of one recording; give one of them: '
        f'{names}'
    )


def _open_storage(path: Path, scratch: Callable[[], Path]) -> Mcap | Ros1 | Sqlite:
    """
    Return what reads a bag's file, whatever its name.

    ``scratch`` makes a folder for what must be unpacked or copied. Raises RecordingError, one
    sentence, where nothing can be read.
    """
    try:
        with path.open('rb') as file:
            start = file.read(64)
        if not start:
            raise RecordingError(f'{path} is empty; copy it again, or leave it out')
        if start.startswith(LFS):
            raise RecordingError(
                f'{path} only points to a large file; fetch that one with: git lfs pull'
            )
        if start.startswith(ZSTD):
            return _open_storage(_decompressed(path, scratch()), scratch)
        if start.startswith(Sqlite.MAGIC):
            return Sqlite(path, scratch)
        for kind in (Mcap, Ros1):
            if start.startswith(kind.MAGIC):
                return kind(path)
        if start.startswith(b'#ROSBAG V'):
            raise RecordingError(f'{path} is of an old version; convert it with: rosbag fix')
    except PermissionError:
        raise RecordingError(f'{path} may not be read: permission denied') from None
    except OSError as error:
        raise RecordingError(f'{path} cannot be read: {error.strerror or error}') from None
    raise RecordingError(
        f'{path} is damaged or truncated: it does not begin as a bag does; copy it again'
    )


def _decompressed(path: Path, folder: Path) -> Path:
    """Return the file that is compressed in another, as far as that goes."""
    file = folder / path.name.removesuffix('.zstd')
    with path.open('rb') as packed, file.open('wb') as unpacked:
        try:
            with zstd.open(packed, 'rb') as content:
                shutil.copyfileobj(content, unpacked)
        except (EOFError, zstd.ZstdError):
            pass  # what is there is a bag that was not closed
    return file


@cache
def _ros1() -> Any:
    return get_typestore(Stores.ROS1_NOETIC)


def _content(channel: Channel, data: bytes) -> Any:
    """Return a message as ROS 2 has it, or None where its bytes are none."""
    try:
        if channel.encoding == 'ros1':
            return _as_ros2(_ros1().deserialize_ros1(data, channel.kind))
        if data.startswith(ZSTD):  # rosbag2 may compress each message
            data = zstd.decompress(data)
        return STORE.deserialize_cdr(data, channel.kind)
    except Exception:  # a broken message fails in as many ways as the types have parts
        return None


def _as_ros2(message: Any) -> Any:
    """Return ROS 1's message in ROS 2's form: K D R P in small letters, no header.seq."""
    if not hasattr(message, '__msgtype__'):
        return message
    ros2 = STORE.types[message.__msgtype__]
    names = [field.name for field in fields(ros2) if field.init]
    values = (getattr(message, name if hasattr(message, name) else name.upper()) for name in names)
    return ros2(*map(_as_ros2, values))
