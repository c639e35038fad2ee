"""What is said of the files of bags, and the one kind that is a database: SQLite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
import shutil
import sqlite3
from typing import NamedTuple
from urllib.parse import quote


class RecordingError(ValueError):
    """A recording that cannot be used; its text is one sentence for the user."""


class Channel(NamedTuple):
    """What a number in a file stands for."""

    topic: str
    kind: str  #: the messages' type as ROS 2 names it, ``sensor_msgs/msg/Image``
    encoding: str  #: cdr, ros1, or what else a program has written


def ros2_type(name: str) -> str:
    """Return a type's name as ROS 2 writes it, whichever way a program wrote it."""
    name = name.replace('::', '/').replace('/dds_/', '/').rstrip('_')
    return name.replace('/', '/msg/') if name.count('/') == 1 else name


class Sqlite:
    """
    A database of rosbag2.

    What its recorder left beside it, messages that are not in the database yet, is read too: from
    a copy, for reading them in their place would change the user's files.
    """

    MAGIC = b'SQLite format 3\0'

    def __init__(self, path: Path, scratch: Callable[[], Path]) -> None:
        self.path = path
        self.notes: list[str] = []
        self.damage: set[int] = set()
        self.closed = True
        self._database = path
        beside = [path.with_name(path.name + end) for end in ('-wal', '-journal')]
        if beside := [file for file in beside if file.is_file() and file.stat().st_size]:
            folder = scratch()
            for file in (path, *beside):
                shutil.copyfile(file, folder / file.name)
            self._database = folder / path.name
            names = ' and '.join(file.name for file in beside)
            self.notes.append(f'{path} was not closed; what is in {names} is read too')
        try:
            with closing(self._connection()) as connection:
                self._read_topics(connection)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._damaged(error) from None

    def span(self) -> tuple[int, int] | None:
        """Return when the first and the last message were recorded, ns; None without one."""
        return self._span

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """Yield (time of recording ns, channel, bytes) of some channels in the order of time."""
        marks = ', '.join('?' * len(wanted))
        query = (
            'SELECT CAST(timestamp AS INTEGER), topic_id, data FROM messages '
            f'WHERE topic_id IN ({marks}) ORDER BY timestamp, id'
        )
        try:
            with closing(self._connection()) as connection:
                yield from connection.execute(query, tuple(wanted))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._damaged(error) from None

    def _connection(self) -> sqlite3.Connection:
        # Immutable: without a lock or a file beside it, for which the folder may be read-only
        mode = 'ro&immutable=1' if self._database == self.path else 'rw'
        address = f'file:{quote(str(self._database.absolute()))}?mode={mode}'
        connection = sqlite3.connect(address, uri=True, check_same_thread=False)
        connection.text_factory = lambda text: text.decode(errors='replace')
        return connection

    def _read_topics(self, connection: sqlite3.Connection) -> None:
        tables = {name for name, in connection.execute('SELECT name FROM sqlite_master')}
        if not {'topics', 'messages'} <= tables:
            with self.path.open('rb') as file:
                in_wal = file.read(20)[18:] == b'\2\2'
            raise RecordingError(
                f'{self.path} holds no messages: they are in the file {self.path.name}-wal that '
                'belongs beside it; copy that one too'
                if in_wal and self._database == self.path
                else f'{self.path} is a database, but no recording of rosbag2'
            )
        query = 'SELECT id, name, type, serialization_format FROM topics'
        self.channels = {
            channel: Channel(str(topic), ros2_type(str(kind)), str(encoding))
            for channel, topic, kind, encoding in connection.execute(query)
        }
        query = 'SELECT topic_id, count(*) FROM messages GROUP BY topic_id'
        self.counts = Counter(dict(connection.execute(query)))
        query = 'SELECT min(timestamp), max(timestamp) FROM messages'
        first, last = next(connection.execute(query))
        self._span = None if first is None else (first, last)

    def _damaged(self, error: Exception) -> RecordingError:
        why = str(error).splitlines()[0]
        return RecordingError(
            f'{self.path} is damaged or truncated ({why}); copy it again, or save what is left '
            f'with: sqlite3 {self.path.name} .recover'
        )
