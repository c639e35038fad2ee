"""
The files of bags that are chunks of messages: MCAP and ROS 1, whole or as a crash left them.

Of each only the topics, their types and the bytes of their messages are read; what defines the
types of topics that nobody asks for may be missing or wrong.
"""

from __future__ import annotations

import bz2
from collections import Counter
from collections.abc import Collection, Iterator
import contextlib
import heapq
import mmap
from operator import itemgetter
from pathlib import Path
import re
import struct
from struct import unpack_from
import sys
from typing import NamedTuple
import zlib

from lz4.frame import LZ4FrameDecompressor

from .storage import Channel, RecordingError, ros2_type

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

RUN = 1 << 20  #: bytes of messages outside of chunks that are read at once
DECOMPRESSORS = {
    'bz2': bz2.BZ2Decompressor, 'lz4': LZ4FrameDecompressor, 'zstd': zstd.ZstdDecompressor,
}


class _Record(NamedTuple):
    """A piece of an MCAP file, of a ROS 1 bag, or of one of their chunks."""

    op: int
    head: dict[bytes, bytes]  # a ROS 1 bag's fields
    body: memoryview
    at: int  # where it begins
    end: int  # where it says that it ends
    whole: bool  # whether all of it is there


class _Chunk(NamedTuple):
    """A chunk of messages, or a run of messages outside of chunks."""

    first: int  # time of recording of the first message, ns
    last: int
    at: int
    end: int
    channels: frozenset[int]


class _Chunked:
    """
    A file of chunks of messages, with an index of them at its end unless that is lost.

    Mcap and Ros1 say how its records are laid out.
    """

    MAGIC: bytes
    CHUNK: int
    MESSAGE: int
    REPAIR: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []  #: what to tell the user
        self.damage: set[int] = set()  #: where chunks are that cannot be read
        self.closed = True  #: whether its recorder closed it
        data = self._data()
        self._forget()
        try:
            # no bag has more messages than bytes: such an index is damaged itself
            indexed = self._read_index(data) and self.counts.total() <= len(data)
        except (struct.error, LookupError):
            indexed = False
        if not indexed:
            self._forget()
            self._scan(data)
            self.closed = self._has_end(data)
            if not self.closed:
                self.notes.append(
                    f'{path} was not closed, as by a recorder that is killed, or its end is lost: '
                    f'what is there is read; a whole file is made by: {self.REPAIR}'
                )

    def span(self) -> tuple[int, int] | None:
        """Return when the first and the last message were recorded, ns; None without one."""
        first = min((chunk.first for chunk in self._chunks), default=None)
        return None if first is None else (first, max(chunk.last for chunk in self._chunks))

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """Yield (time of recording ns, channel, bytes) of some channels in the order of time."""
        data = self._data()

        def of(chunk: _Chunk) -> Iterator[tuple[int, int, memoryview]]:
            yield chunk.first, -1, data[:0]  # so that it is unpacked only when its turn has come
            found = []
            for record in self._records(data[chunk.at:chunk.end], 0):
                for part in self._inside(record, chunk.at):
                    message = self._message_of(part)
                    if message and message[1] in wanted:
                        found.append(message)
            yield from sorted(found, key=itemgetter(0))

        chunks = [of(chunk) for chunk in self._chunks if not chunk.channels.isdisjoint(wanted)]
        for recorded, channel, message in heapq.merge(*chunks, key=itemgetter(0)):
            if channel >= 0:
                yield recorded, channel, bytes(message)

    def _forget(self) -> None:
        self.channels: dict[int, Channel] = {}
        self.counts: Counter[int] = Counter()  #: messages of each channel
        self._chunks: list[_Chunk] = []

    def _data(self) -> memoryview:
        with self.path.open('rb') as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _scan(self, data: memoryview) -> None:
        """Do without the index: go through all that is there, as far as it can be followed."""
        run: _Chunk | None = None
        for record in self._records(data, len(self.MAGIC)):
            times, channels = [], []
            for part in self._inside(record, 0):
                if message := self._message_of(part):
                    times.append(message[0])
                    channels.append(message[1])
                elif part.whole:
                    with contextlib.suppress(LookupError, struct.error):
                        self._define(part)
            if not times:
                continue
            self.counts.update(channels)
            at, end = record.at, min(record.end, len(data))
            if run is not None and record.op != self.CHUNK and run.end == at < run.at + RUN:
                at, times = run.at, [run.first, run.last, *times]
                channels += self._chunks.pop().channels
            here = _Chunk(min(times), max(times), at, end, frozenset(channels))
            self._chunks.append(here)
            run = here if record.op != self.CHUNK else None

    def _message_of(self, record: _Record) -> tuple[int, int, memoryview] | None:
        """Return (time of recording ns, channel, bytes), or None where it is no whole message."""
        if record.op != self.MESSAGE or not record.whole:
            return None
        with contextlib.suppress(LookupError, struct.error):
            return self._message(record)
        return None

    def _inside(self, record: _Record, base: int) -> Iterator[_Record]:
        """Yield a chunk's records, as many as can be read; any other record as it is."""
        if record.op != self.CHUNK:
            yield record
            return
        try:
            content = self._unpacked(record)
        except RecordingError:
            raise
        except (ValueError, OSError, RuntimeError, EOFError, LookupError, struct.error,
                zstd.ZstdError):
            self.damage.add(base + record.at)
            return
        yield from self._records(content, 0)

    def _decompress(self, compression: str, packed: memoryview) -> memoryview:
        """Return what can be unpacked: of a piece that is cut, what was before the cut."""
        if compression in ('', 'none'):
            return packed
        if not (compression.isascii() and compression.isalnum()):
            raise ValueError('this names no compression')
        if compression not in DECOMPRESSORS:
            raise RecordingError(
                f"{self.path} is compressed by '{compression}', which is not known; compress it "
                'by zstd or lz4'
            )
        content = bytearray()
        while packed:
            decompressor = DECOMPRESSORS[compression]()
            content += decompressor.decompress(packed)
            packed = decompressor.unused_data
        return memoryview(content)


class Mcap(_Chunked):
    """A file of MCAP: https://mcap.dev/spec."""

    MAGIC = b'\x89MCAP0\r\n'
    FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, CHUNK_INDEX, STATISTICS, DATA_END = (
        2, 3, 4, 5, 6, 8, 11, 15,
    )
    REPAIR = 'mcap recover'
    END = 37  # bytes of the footer and what follows it

    def _forget(self) -> None:
        super()._forget()
        self._schemas: dict[int, str] = {}

    def _has_end(self, data: memoryview) -> bool:
        return data[-len(self.MAGIC):] == self.MAGIC and data[-self.END] == self.FOOTER

    def _read_index(self, data: memoryview) -> bool:
        if len(data) < self.END or not self._has_end(data):
            return False
        summary = unpack_from('<Q', data, len(data) - self.END + 9)[0]
        chunks = None
        for record in self._records(data, summary or len(data)):
            if record.op == self.CHUNK_INDEX:
                first, last, at, size, several = unpack_from('<QQQQI', record.body)
                ids = (unpack_from('<H', record.body, 36 + k)[0] for k in range(0, several, 10))
                self._chunks.append(_Chunk(first, last, at, at + size, frozenset(ids)))
            elif record.op == self.STATISTICS:
                messages, _, _, _, _, chunks = unpack_from('<QHIIII', record.body)
                for at in range(46, 46 + unpack_from('<I', record.body, 42)[0], 10):
                    channel, count = unpack_from('<HQ', record.body, at)
                    self.counts[channel] = count
            else:
                self._define(record)
        return (
            chunks == len(self._chunks) and self.counts.keys() <= self.channels.keys()
            and all(chunk.end <= len(data) for chunk in self._chunks)
            and self.counts.total() == messages and (chunks > 0 or messages == 0)
        )

    def _records(self, data: memoryview, at: int) -> Iterator[_Record]:
        while at + 9 <= len(data):
            op, size = unpack_from('<BQ', data, at)
            if op in (0, self.FOOTER):  # 0: room that was never written
                return
            end = at + 9 + size
            yield _Record(op, {}, data[at + 9:end], at, end, end <= len(data))
            at = end

    def _define(self, record: _Record) -> None:
        body = record.body
        if record.op == self.SCHEMA:
            self._schemas[unpack_from('<H', body)[0]] = _text(body, 2)[0]
        elif record.op == self.CHANNEL:
            channel, schema = unpack_from('<HH', body)
            topic, at = _text(body, 4)
            kind = ros2_type(self._schemas.get(schema, ''))
            self.channels[channel] = Channel(topic, kind, _text(body, at)[0])

    def _message(self, record: _Record) -> tuple[int, int, memoryview]:
        channel, _, recorded = unpack_from('<HIQ', record.body)
        return recorded, channel, record.body[22:]

    def _unpacked(self, record: _Record) -> memoryview:
        body = record.body
        size, check = unpack_from('<QI', body, 16)
        compression, at = _text(body, 28)
        packed = unpack_from('<Q', body, at)[0]
        content = self._decompress(compression, body[at + 8:at + 8 + packed])
        if record.whole and (len(content) != size or check and zlib.crc32(content) != check):
            raise ValueError('its checksum is another')
        return content


class Ros1(_Chunked):
    """A bag of ROS 1: https://wiki.ros.org/Bags/Format/2.0."""

    MAGIC = b'#ROSBAG V2.0\n'
    MESSAGE, BAG, CHUNK, CHUNK_INFO, CONNECTION = 2, 3, 5, 6, 7
    REPAIR = 'rosbag reindex'

    def _has_end(self, data: memoryview) -> bool:
        return False  # with an index only

    def _read_index(self, data: memoryview) -> bool:
        bag = next(self._records(data, len(self.MAGIC)), None)
        if bag is None or bag.op != self.BAG:
            return False
        if bag.head.get(b'encryptor'):
            raise RecordingError(f'{self.path} is encrypted; decrypt it with: rosbag decrypt')
        index, connections, chunks = (
            int.from_bytes(bag.head[name], 'little')
            for name in (b'index_pos', b'conn_count', b'chunk_count')
        )
        for record in self._records(data, index or len(data)):
            if record.op == self.CHUNK_INFO and record.whole:
                several = range(0, len(record.body), 8)
                counts = dict(unpack_from('<II', record.body, k) for k in several)
                at = unpack_from('<Q', record.head[b'chunk_pos'])[0]
                chunk = next(self._records(data, at), None)
                if chunk is None or chunk.op != self.CHUNK or not chunk.whole:
                    return False
                first, last = (_time(record.head[name]) for name in (b'start_time', b'end_time'))
                self._chunks.append(_Chunk(first, last, at, chunk.end, frozenset(counts)))
                self.counts.update(counts)
            elif record.whole:
                self._define(record)
        return connections == len(self.channels) and 0 < chunks == len(self._chunks)

    def _records(self, data: memoryview, at: int) -> Iterator[_Record]:
        while at + 8 <= len(data):
            size = unpack_from('<I', data, at)[0]
            head, body = _fields(data[at + 4:at + 4 + size]), at + 8 + size
            if not head.get(b'op') or body > len(data):
                return
            end = body + unpack_from('<I', data, body - 4)[0]
            yield _Record(head[b'op'][0], head, data[body:end], at, end, end <= len(data))
            at = end

    def _define(self, record: _Record) -> None:
        if record.op == self.CONNECTION:
            topic = re.sub('/+', '/', record.head[b'topic'].decode(errors='replace'))
            kind = _fields(record.body)[b'type'].decode(errors='replace')
            connection = unpack_from('<I', record.head[b'conn'])[0]
            self.channels[connection] = Channel(topic, ros2_type(kind), 'ros1')

    def _message(self, record: _Record) -> tuple[int, int, memoryview]:
        return (
            _time(record.head[b'time']), unpack_from('<I', record.head[b'conn'])[0], record.body,
        )

    def _unpacked(self, record: _Record) -> memoryview:
        content = self._decompress(record.head[b'compression'].decode(), record.body)
        if record.whole and len(content) != unpack_from('<I', record.head[b'size'])[0]:
            raise ValueError('its size is another')
        return content


def _text(body: memoryview, at: int) -> tuple[str, int]:
    """Return the text that stands there in a record of MCAP, and where it ends."""
    end = at + 4 + unpack_from('<I', body, at)[0]
    return bytes(body[at + 4:end]).decode(errors='replace'), end


def _fields(data: memoryview) -> dict[bytes, bytes]:
    """Return a ROS 1 record's fields; none where it is no record."""
    fields, at, data = {}, 0, bytes(data)
    while at + 4 <= len(data):
        end = at + 4 + unpack_from('<I', data, at)[0]
        name, _, value = data[at + 4:end].partition(b'=')
        fields[name] = value
        at = end
    return fields


def _time(field: bytes) -> int:
    seconds, nanoseconds = unpack_from('<II', field)
    return seconds * 10**9 + nanoseconds
