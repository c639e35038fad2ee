"""Bags as people have them: split, left by a crash, beside other data, damaged."""

import bz2
import shutil
import sqlite3
import struct
import subprocess
import sys
import zlib

from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st
from imatching_ros.data.chunked import zstd
from imatching_ros.data.recording import open_recording, RecordingError
from imatching_ros.data.sieve import LOST
import lz4.frame
import numpy as np
import pytest
from rosbags import rosbag1, rosbag2
from test_recording import (
    DT,
    FORMATS,
    good,
    noise,
    Pen,
    ROS1,
    ROS2,
    sentence,
    SIZE,
    START,
    writing,
)

IMAGE, INFO = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CameraInfo'
PLUGINS = {'mcap': rosbag2.StoragePlugin.MCAP, 'sqlite3': rosbag2.StoragePlugin.SQLITE3}
SUFFIXES = {'mcap': '.mcap', 'sqlite3': '.db3', 'rosbag1': '.bag'}


def take(pen, k, info=True):
    """Write the k-th image, and its camera_info."""
    stamp = START + k * DT
    if info:
        pen.info('/cam/camera_info', stamp)
    pen.image('/cam/image', stamp, 'mono8', noise(k, *SIZE).tobytes(), SIZE[1])


def numbers(path, **topics):
    """Return which images a recording gives; each must be the one that was written."""
    recording = open_recording(path, **topics)
    found = []
    for stamp, image in recording:
        found.append((stamp - START) // DT)
        assert np.array_equal(image, noise(found[-1], *SIZE))
    assert recording.camera.fx == 30.0
    return found


def notes(path):
    recording = open_recording(path)
    assert list(recording)
    return ' '.join(recording.notes())


def bag_file(path):
    """Return the file of a bag."""
    return path if path.is_file() else next(f for f in path.iterdir() if f.suffix != '.yaml')


# Split ---------------------------------------------------------------------------------------


def split(folder, kind, names):
    """Write parts of two images each; only the first one has a camera_info."""
    (folder / 'parts').mkdir()
    for n, name in enumerate(names):
        with writing(folder, kind) as pen:
            for k in (2 * n, 2 * n + 1):
                take(pen, k, info=n == 0)
        bag_file(pen.path).rename(folder / 'parts' / (name + SUFFIXES[kind]))
        if pen.path.is_dir():
            shutil.rmtree(pen.path)
    return folder / 'parts'


@pytest.mark.parametrize('kind', FORMATS)
def test_a_folder_of_parts_is_one_recording_in_the_order_of_their_numbers(tmp_path, kind):
    parts = split(tmp_path, kind, [f'drive_{n}' for n in range(12)])
    assert numbers(parts) == list(range(24)) and len(open_recording(parts)) == 24
    assert numbers(parts.rename(tmp_path / 'bag').parent) == list(range(24))
    text = sentence(tmp_path / 'bag' / f'drive_3{SUFFIXES[kind]}')
    assert f'give the folder that holds them all, {tmp_path / "bag"}' in text


def test_parts_of_ros1_have_each_a_date_of_their_own(tmp_path):
    names = [f'run_2024-05-06-07-08-0{n}_{n}' for n in range(3)]
    assert numbers(split(tmp_path, 'rosbag1', names)) == list(range(6))


@pytest.mark.parametrize(
    'names',
    [
        ('left', 'right'),
        ('drive_1', 'walk_2'),
        ('run_2024-05-06-07-08-01', 'run_2024-05-06-07-08-02'),
        ('a_2024_05_06-07_08_01_0', 'a_2024_05_06-07_08_02_0'),
        ('cam_1', 'cam_0'),  # the later one has the lower number
    ],
)
def test_bags_that_are_not_parts_of_one_recording_are_listed(tmp_path, names):
    parts = split(tmp_path, 'mcap', names)
    text = sentence(parts)
    assert 'several bags that are not parts of one recording' in text
    assert ', '.join(sorted(f'{name}.mcap' for name in names)) in text


def test_two_cameras_recorded_at_once_are_not_parts(tmp_path):
    parts = split(tmp_path, 'mcap', ['cam_0', 'cam_1'])
    shutil.copy(parts / 'cam_0.mcap', parts / 'cam_1.mcap')
    assert 'several bags' in sentence(parts)


def test_an_empty_last_part_is_left_out_and_said(tmp_path):
    parts = split(tmp_path, 'mcap', ['drive_0', 'drive_1'])
    (parts / 'drive_2.mcap').touch()
    assert numbers(parts) == [0, 1, 2, 3]
    assert f'a part is left out: {parts / "drive_2.mcap"} is empty' in notes(parts)


@pytest.mark.parametrize('kind', ['mcap', 'sqlite3'])
def test_metadata_that_is_wrong_does_not_hide_what_is_there(tmp_path, kind):
    bag = good(tmp_path, kind)
    metadata, file = bag / 'metadata.yaml', bag_file(bag)
    text = metadata.read_text()
    for wrong, to_be_mended in (
        (text.replace('message_count: 5', 'message_count: 2'), False),
        (text.replace('message_count: 5', 'message_count: 0'), False),
        (text.replace('version: 9', 'version: 99'), False),
        (text.replace(file.name, 'renamed' + file.suffix), True),
        (text[:10], True),
        ('\t- no yaml', True),
        ('', True),
    ):
        metadata.write_text(wrong)
        recording = open_recording(bag)
        assert len(recording) == len(list(recording)) == 5
        said = ' '.join(recording.notes())
        assert ('ros2 bag reindex' in said) == to_be_mended, wrong
    metadata.write_text(text)
    file.unlink()
    assert f'but not the files of the recording, {file.name}; copy them too' in sentence(bag)


def test_metadata_that_lists_only_the_first_part(tmp_path):
    parts = split(tmp_path, 'mcap', ['drive_0', 'drive_1', 'drive_2'])
    (parts / 'metadata.yaml').write_text(
        'rosbag2_bagfile_information:\n  relative_file_paths: [drive_0.mcap]\n'
    )
    assert numbers(parts) == list(range(6)) and 'ros2 bag reindex' in notes(parts)


# Left by a crash -----------------------------------------------------------------------------


def expected(whole, at, count=60):
    """Return how many images lie before the cut."""
    return sum(whole.find(noise(k, *SIZE).tobytes()) + SIZE[0] * SIZE[1] <= at
               for k in range(count))


@pytest.mark.parametrize('share', [0.0, 0.02, 0.5, 0.9, 0.97])
@pytest.mark.parametrize('kind', FORMATS)
def test_a_file_that_is_cut_short_is_read_up_to_there(tmp_path, kind, share):
    path = good(tmp_path, kind, count=60)
    file = bag_file(path)
    whole = file.read_bytes()
    file.write_bytes(whole[:int(share * len(whole))])
    for start in (path, file):
        if share < 0.1 or kind == 'sqlite3':
            text = sentence(start)
            assert ('is empty' if share == 0 else 'damaged or truncated') in text
            assert share < 0.1 or f'sqlite3 {file.name} .recover' in text
            continue
        images = list(open_recording(start))
        assert len(images) == expected(whole, int(share * len(whole))) > 20
        for k, (_, image) in enumerate(images):
            assert np.array_equal(image, noise(k, *SIZE))
        repair = {'mcap': 'mcap recover', 'rosbag1': 'rosbag reindex'}[kind]
        assert 'was not closed' in notes(start) and repair in notes(start)


@pytest.mark.parametrize('compression', [None, rosbag1.Writer.CompressionFormat.BZ2,
                                         rosbag1.Writer.CompressionFormat.LZ4])
@pytest.mark.parametrize('name', ['drive.bag', 'drive.bag.active'])
def test_a_ros1_bag_without_an_index(tmp_path, compression, name):
    writer = rosbag1.Writer(tmp_path / 'whole.bag')
    if compression:
        writer.set_compression(compression)
    with writer:
        pen = Pen(writer, ROS1)
        for k in range(6):
            take(pen, k)
    whole = (tmp_path / 'whole.bag').read_bytes()
    assert numbers(tmp_path / 'whole.bag') == list(range(6))
    at = whole.index(b'index_pos=') + 10
    (index,) = struct.unpack_from('<Q', whole, at)
    (tmp_path / name).write_bytes(whole[:at] + bytes(8) + whole[at + 8:index])
    assert numbers(tmp_path / name) == list(range(6))
    assert 'rosbag reindex' in notes(tmp_path / name)


def test_a_ros1_bag_whose_last_chunk_was_never_closed(tmp_path):
    with writing(tmp_path, 'rosbag1') as pen:
        for k in range(6):
            take(pen, k)
    whole = pen.path.read_bytes()
    at = whole.index(b'index_pos=') + 10
    chunk = whole.index(b'compression=none')
    size = whole.index(b'size=', chunk - 40) + 5
    (length,) = struct.unpack_from('<I', whole, size)
    head_end = whole.index(struct.pack('<I', length), size + 4)  # of the data
    killed = bytearray(whole[:head_end + 4 + length])
    killed[at:at + 8] = bytes(8)
    killed[size:size + 4] = killed[head_end:head_end + 4] = bytes(4)
    pen.path.write_bytes(killed)
    assert numbers(pen.path) == list(range(6))
    pen.path.write_bytes(killed[:-100])
    assert numbers(pen.path) == list(range(5))


def test_a_bag_of_ros1_that_cannot_be_read_names_the_way(tmp_path):
    (tmp_path / 'old.bag').write_bytes(b'#ROSBAG V1.2\n')
    assert 'rosbag fix' in sentence(tmp_path / 'old.bag')
    bag = good(tmp_path, 'rosbag1')
    whole = bag.read_bytes()
    head = b''.join(
        struct.pack('<I', len(field)) + field
        for field in (b'op=\x03', b'index_pos=' + bytes(8), b'conn_count=' + bytes(4),
                      b'chunk_count=' + bytes(4), b'encryptor=rosbag/AesCbcEncryptor')
    )
    bag.write_bytes(whole[:13] + struct.pack('<I', len(head)) + head + bytes(4))
    assert 'rosbag decrypt' in sentence(bag)


def killed_writer(source, target, checkpoint):
    """Copy a database into one that is left as by a writer that is killed."""
    code = f"""
import os, sqlite3
source = sqlite3.connect({str(source)!r})
target = sqlite3.connect({str(target)!r}, isolation_level=None)
target.execute('pragma journal_mode=wal')
target.execute('pragma wal_autocheckpoint={checkpoint}')
for line in source.iterdump():
    if line not in ('BEGIN TRANSACTION;', 'COMMIT;'):
        target.execute(line)
os._exit(9)
"""
    subprocess.run([sys.executable, '-c', code], check=False)


@pytest.mark.parametrize('checkpoint', [0, 20])
@pytest.mark.parametrize('metadata', [False, True])
def test_what_sqlite_keeps_beside_the_database_is_read(tmp_path, checkpoint, metadata):
    with writing(tmp_path, 'sqlite3') as pen:
        for k in range(60):
            take(pen, k)
    killed = tmp_path / 'killed'
    killed.mkdir()
    killed_writer(bag_file(pen.path), killed / 'drive_0.db3', checkpoint)
    if metadata:
        text = (pen.path / 'metadata.yaml').read_text()
        (killed / 'metadata.yaml').write_text(text.replace('drive.db3', 'drive_0.db3'))
    before = {file.name: file.read_bytes() for file in killed.iterdir()}
    assert (killed / 'drive_0.db3-wal').stat().st_size > 0
    assert numbers(killed) == list(range(60))
    assert 'what is in drive_0.db3-wal is read too' in notes(killed)
    assert {file.name: file.read_bytes() for file in killed.iterdir()} == before
    (killed / 'drive_0.db3-wal').unlink()
    if not checkpoint:
        assert 'are in the file drive_0.db3-wal that belongs beside it' in sentence(killed)


def test_a_database_in_a_folder_that_cannot_be_written(tmp_path):
    bag = good(tmp_path, 'sqlite3')
    with sqlite3.connect(bag_file(bag)) as connection:
        connection.execute('pragma journal_mode=wal')
    connection.close()
    before = sorted(bag.iterdir())
    assert len(list(open_recording(bag))) == 5 and sorted(bag.iterdir()) == before
    with sqlite3.connect(tmp_path / 'other.db3') as connection:
        connection.execute('create table notes (text)')
    connection.close()
    assert 'no recording of rosbag2' in sentence(tmp_path / 'other.db3')


@pytest.mark.parametrize('kind', FORMATS)
def test_names_may_hold_any_character(tmp_path, kind):
    folder = tmp_path / 'Küche [2] 100%?#'
    folder.mkdir()
    bag = good(tmp_path, kind)
    assert len(list(open_recording(bag.rename(folder / bag.name)))) == 5


@pytest.mark.parametrize('suffix', SUFFIXES.values())
def test_files_that_are_no_bag_say_what_they_are(tmp_path, suffix):
    file = tmp_path / f'drive{suffix}'
    for content, words in (
        (b'', 'is empty'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', 'git lfs pull'),
        (bytes(5000), 'does not begin as a bag does'),
        (b'<html>not found</html>', 'does not begin as a bag does'),
    ):
        file.write_bytes(content)
        for path in (file, tmp_path):
            with pytest.raises(RecordingError, match=words):
                open_recording(path)


# Compressed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'mode'),
    [('mcap', 'STORAGE'), ('mcap', 'FILE'), ('mcap', 'MESSAGE'), ('sqlite3', 'FILE'),
     ('sqlite3', 'MESSAGE')],
)
def test_compressed_bags(tmp_path, kind, mode):
    writer = rosbag2.Writer(tmp_path / 'drive', version=9, storage_plugin=PLUGINS[kind])
    writer.set_compression(rosbag2.CompressionMode[mode], rosbag2.CompressionFormat.ZSTD)
    with writer:
        pen = Pen(writer, ROS2)
        for k in range(9):
            take(pen, k)
    assert numbers(tmp_path / 'drive') == list(range(9))
    (tmp_path / 'drive' / 'metadata.yaml').unlink()
    assert numbers(tmp_path / 'drive') == list(range(9))
    file = bag_file(tmp_path / 'drive')
    if mode != 'FILE':
        return
    assert file.suffix == '.zstd'
    whole = zstd.decompress(file.read_bytes())
    (tmp_path / 'drive' / f'{file.stem}').write_bytes(whole)  # the recorder was still at it
    file.write_bytes(file.read_bytes()[:50])
    assert numbers(tmp_path / 'drive') == list(range(9))


# MCAP by hand --------------------------------------------------------------------------------


def record(op, content):
    return struct.pack('<BQ', op, len(content)) + content


def text(string):
    return struct.pack('<I', len(string)) + (string if isinstance(string, bytes) else
                                             string.encode())


def schema(number, name, encoding='ros2msg', data=b''):
    return record(3, struct.pack('<H', number) + text(name) + text(encoding) + text(data))


def channel(number, schema_number, topic, encoding='cdr'):
    start = struct.pack('<HH', number, schema_number)
    return record(4, start + text(topic) + text(encoding) + struct.pack('<I', 0))


def message(number, stamp, data):
    return record(5, struct.pack('<HIQQ', number, 0, stamp, stamp) + data)


def chunk(content, compression='', check=True):
    pack = {'': bytes, 'lz4': lz4.frame.compress, 'zstd': zstd.compress}[compression]
    head = struct.pack('<QQQI', 0, 0, len(content), zlib.crc32(content) if check else 0)
    packed = pack(content)
    return record(6, head + text(compression) + struct.pack('<Q', len(packed)) + packed)


class Sink:
    """Stands in for a writer: keeps the messages, of channels 1 (camera_info) and 2 (images)."""

    def __init__(self):
        self.messages = []

    def add_connection(self, topic, kind, **_):
        return 2 if kind == IMAGE else 1

    def write(self, number, stamp, data):
        self.messages.append(message(number, stamp, data))


def taken(count, store=ROS2):
    """Return messages of camera_info and image by turns, as bytes of records."""
    sink = Sink()
    pen = Pen(sink, store)
    for k in range(count):
        take(pen, k)
    return sink.messages


MAGIC = b'\x89MCAP0\r\n'
HEAD = MAGIC + record(1, text('ros2') + text('by hand'))
KNOWN = schema(1, INFO) + schema(2, IMAGE) + channel(1, 1, '/cam/camera_info') + channel(
    2, 2, '/cam/image'
)
END = record(15, bytes(4)) + record(2, bytes(20)) + MAGIC  # without a summary


def mcap(folder, *pieces):
    (folder / 'drive.mcap').write_bytes(b''.join(pieces))
    return folder / 'drive.mcap'


@pytest.mark.parametrize('compression', ['', 'lz4', 'zstd'])
def test_an_mcap_without_a_summary(tmp_path, compression):
    messages = taken(6)
    chunks = [chunk(KNOWN + b''.join(messages[:4]), compression),
              chunk(b''.join(messages[4:10]), compression),
              chunk(b''.join(messages[10:]), compression)]
    assert numbers(mcap(tmp_path, HEAD, *chunks, END)) == list(range(6))
    assert notes(tmp_path / 'drive.mcap') == ''  # its writer wanted it so
    for rest in (b'', record(15, bytes(4)), b'\x06\x00', bytes(4096)):  # as crashes leave it
        assert numbers(mcap(tmp_path, HEAD, *chunks, rest)) == list(range(6))
        assert 'mcap recover' in notes(tmp_path / 'drive.mcap')
    cut = numbers(mcap(tmp_path, HEAD, *chunks[:2], chunks[2][:-40]))
    assert cut in (list(range(5)), list(range(6))[:5])
    assert numbers(mcap(tmp_path, HEAD, chunks[0], chunks[1][:30])) == [0, 1]


def test_an_mcap_without_chunks(tmp_path):
    messages = taken(6)
    assert numbers(mcap(tmp_path, HEAD, KNOWN, *messages, END)) == list(range(6))
    cut = mcap(tmp_path, HEAD, KNOWN, *messages[:-1], messages[-1][:-9])
    assert numbers(cut) == [0, 1, 2, 3, 4]


def test_messages_come_in_the_order_of_their_recording(tmp_path):
    messages = taken(6)
    images, infos = chunk(b''.join(messages[1::2])), chunk(b''.join(messages[::2]))
    assert numbers(mcap(tmp_path, HEAD, KNOWN, images, infos, END)) == list(range(6))
    late = [chunk(b''.join(messages[k:k + 2])) for k in (8, 2, 0, 10, 6, 4)]
    assert numbers(mcap(tmp_path, HEAD, KNOWN, *late, END)) == list(range(6))


def test_a_chunk_that_is_damaged_costs_its_images(tmp_path):
    with writing(tmp_path) as pen:
        for k in range(5):
            take(pen, k)
            for _ in range(3):  # a chunk for each
                pen.image('/other', START + k * DT, 'mono8', bytes(400_000), 800, (500, 800))
    file = bag_file(pen.path)
    data, at, end = bytearray(file.read_bytes()), 0, 8
    while not (data[at] == 6 and noise(2, *SIZE).tobytes() in data[at:end]):
        at, end = end, end + 9 + struct.unpack_from('<Q', data, end + 1)[0]
    data[at + 33:at + 37] = b'\1\2\3\4'  # its checksum
    file.write_bytes(data)
    recording = open_recording(pen.path, image_topic='/cam/image')
    assert [(stamp - START) // DT for stamp, _ in recording] == [0, 1, 3, 4]
    assert len(recording) == 5 and recording.left_out == {LOST: 1}
    assert f'{file} is damaged: 1 of its chunks cannot be read' in ' '.join(recording.notes())


def test_an_index_that_claims_more_messages_than_bytes_is_not_believed(tmp_path):
    bag = tmp_path / 'drive.bag'
    good(tmp_path, 'rosbag1')
    whole = bag.read_bytes()
    stamps = [stamp for stamp, _ in open_recording(bag)]
    bag.write_bytes(whole[:-4] + b'\xff' * 4)  # the last number of the index is a count
    recording = open_recording(bag)
    assert len(recording) == len(stamps) and [stamp for stamp, _ in recording] == stamps


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
@pytest.mark.parametrize('kind', FORMATS)
def test_damaged_bytes_give_images_or_a_sentence(tmp_path, kind, data):
    if not (tmp_path / 'spoilt').is_dir():
        (tmp_path / 'spoilt').mkdir()
        good(tmp_path, kind)
    bag = tmp_path / ('drive.bag' if kind == 'rosbag1' else 'drive')
    spoilt = bytearray(bag_file(bag).read_bytes())
    at = data.draw(st.integers(0, len(spoilt) - 1))
    spoil = data.draw(st.sampled_from((b'', bytes(40), b'\xff' * 9, b'\x01\x02\x03')))
    spoilt[at:at + data.draw(st.integers(0, 200))] = spoil
    file = tmp_path / 'spoilt' / bag_file(bag).name
    file.write_bytes(spoilt)
    try:
        recording = open_recording(file)
        count = len(list(recording))
        assert 0 < count == len(recording) - recording.left_out.total() <= 5
    except RecordingError as error:
        assert '\n' not in str(error) and str(file) in str(error)


# What is none of our business ----------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'encoding', 'data', 'message_encoding'),
    [
        ('my_msgs/msg/State', 'ros2msg', b'sensor_msgs/Imu imu\nmy_msgs/Measure', 'cdr'),
        ('my_msgs/msg/State', 'ros2msg', b'my_msgs/msg/State', 'cdr'),
        ('example_interfaces/action/Fibonacci_FeedbackMessage', '', b'', 'cdr'),
        ('fleet.State', 'jsonschema', b'{"type": "object"}', 'json'),
        ('fleet.State', 'protobuf', b'\n\x10\xff\xfe', 'protobuf'),
        ('State', 'flatbuffer', b'\xff\x00', 'flatbuffer'),
        ('\xff', 'none', b'', ''),
    ],
)
def test_an_odd_topic_beside_the_images(tmp_path, name, encoding, data, message_encoding):
    odd = schema(7, name, encoding, data) + channel(7, 7, '/odd', message_encoding)
    schemaless = channel(8, 0, '/notes', 'json')
    messages = [m + message(7, START, b'\0\1\0\0') + message(8, START, b'{}') for m in taken(4)]
    path = mcap(tmp_path, HEAD, odd, schemaless, KNOWN, chunk(b''.join(messages)), END)
    assert numbers(path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    'definition',
    ['Header header\nfloat64 x\nTwist command\n', 'Definition of my_msgs/State\n', '',
     '# readings\nsensor_msgs/Imu imu\nmy_msgs/Measure'],
    ids=['rosjava', 'shapeshifter', 'none', 'cut'],
)
@pytest.mark.parametrize('kind', FORMATS)
def test_an_odd_definition_beside_the_images(tmp_path, kind, definition):
    digest = {'md5sum': '0' * 32} if kind == 'rosbag1' else {'rihs01': 'RIHS01_' + '0' * 64}
    with writing(tmp_path, kind) as pen:
        odd = pen.writer.add_connection(
            '/odd', 'my_msgs/msg/State', msgdef=definition, **digest
        )
        for k in range(4):
            take(pen, k)
            pen.writer.write(odd, START + k * DT, bytes(24))
    assert numbers(pen.path) == [0, 1, 2, 3]


@pytest.mark.parametrize('pattern', ['sensor_msgs/{}', 'sensor_msgs::msg::{}',
                                     'sensor_msgs::msg::dds_::{}_'])
def test_types_by_other_names_are_the_same(tmp_path, pattern):
    known = KNOWN.replace(schema(1, INFO), schema(1, pattern.format('CameraInfo'))).replace(
        schema(2, IMAGE), schema(2, pattern.format('Image'))
    )
    assert numbers(mcap(tmp_path, HEAD, known, chunk(b''.join(taken(3))), END)) == [0, 1, 2]


def test_ros1_in_an_mcap(tmp_path):
    known = b''.join((
        schema(1, 'sensor_msgs/CameraInfo', 'ros1msg'), schema(2, 'sensor_msgs/Image', 'ros1msg'),
        channel(1, 1, '/cam/camera_info', 'ros1'), channel(2, 2, '/cam/image', 'ros1'),
    ))
    head = MAGIC + record(1, text('ros1') + text('by hand'))
    path = mcap(tmp_path, head, known, chunk(b''.join(taken(3, ROS1))), END)
    assert numbers(path) == [0, 1, 2]


def test_images_that_are_no_messages_of_ros_are_named(tmp_path):
    odd = schema(7, 'foxglove.CompressedImage', 'protobuf', b'\n\x10') + channel(
        7, 7, '/CAM_FRONT', 'protobuf'
    )
    head = MAGIC + record(1, text('') + text('by hand'))
    said = sentence(mcap(tmp_path, head, odd, message(7, START, b'\n\2\10\1'), END))
    assert 'images only as protobuf messages (foxglove.CompressedImage on /CAM_FRONT)' in said
    assert 'convert them to sensor_msgs/msg/Image' in said
    json = channel(2, 2, '/cam/image', 'json') + schema(2, IMAGE, 'jsonschema')
    said = sentence(mcap(tmp_path, head, json, message(2, START, b'{}'), END))
    assert 'only as json messages' in said


def test_a_message_that_is_cut_short_is_left_out(tmp_path):
    messages = taken(4)
    messages[5] = message(2, START + 2 * DT, b'\0\1\0\0\1')
    messages[4] = message(1, START + 2 * DT, b'')
    path = mcap(tmp_path, HEAD, KNOWN, chunk(b''.join(messages)), END)
    assert numbers(path) == [0, 1, 3]
    assert '1 of 4 images was left out: 1 that cannot be read (its message is cut' in notes(path)


def test_compressed_by_what_is_not_known(tmp_path):
    content = KNOWN + b''.join(taken(1))
    head = struct.pack('<QQQI', 0, 0, len(content), 0)
    packed = bz2.compress(content)
    path = mcap(
        tmp_path, HEAD, record(6, head + text('br') + struct.pack('<Q', len(packed)) + packed)
    )
    assert "is compressed by 'br', which is not known" in sentence(path)
