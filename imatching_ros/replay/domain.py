"""A ROS domain of one's own on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import os
from pathlib import Path
import random
import socket

from rclpy.utilities import get_rmw_implementation_identifier

#: Environment variable and value that keep ROS on this machine
LOCALHOST = (
    ('ROS_LOCALHOST_ONLY', '1') if os.environ.get('ROS_DISTRO') == 'humble'
    else ('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
)

#: Fast DDS: UDP on this machine alone. Its shared memory loses what is in it, however reliable the
#: topic, where a process is held up for a second within a lock there, and a process that is killed
#: leaves ports that hold up the next one. And a long lease: a process that is held up for more
#: than 20 s is else taken for gone, and what it missed is not sent again.
PATIENT = """<?xml version="1.0" encoding="UTF-8"?>
<profiles xmlns="http://www.eprosima.com">
  <transport_descriptors><transport_descriptor>
    <transport_id>udp</transport_id><type>UDPv4</type>
    <interfaceWhiteList><address>127.0.0.1</address></interfaceWhiteList>
    <maxInitialPeersRange>16</maxInitialPeersRange>
  </transport_descriptor></transport_descriptors>
  <participant profile_name="patient" is_default_profile="true"><rtps>
    <builtin>
      <discovery_config>
        <leaseDuration><sec>3600</sec></leaseDuration>
        <leaseAnnouncement><sec>3</sec></leaseAnnouncement>
      </discovery_config>
      <initialPeersList><locator>
        <udpv4><address>127.0.0.1</address></udpv4>
      </locator></initialPeersList>
    </builtin>
    <userTransports><transport_id>udp</transport_id></userTransports>
    <useBuiltinTransports>false</useBuiltinTransports>
  </rtps></participant>
</profiles>
"""


@contextlib.contextmanager
def on_this_machine(profile: Path) -> Iterator[None]:
    """
    Have ROS, begun in this context or by a process that is started in it, stay on this machine.

    There nobody loses what it did not read for long; for that Fast DDS reads ``profile``, which is
    written.
    """
    settings = dict([LOCALHOST])
    if 'fastrtps' in get_rmw_implementation_identifier():
        profile.write_text(PATIENT)
        older = os.environ.get('ROS_DISTRO') in ('humble', 'jazzy')
        settings = {
            f'FAST{"RTPS" if older else "DDS"}_DEFAULT_PROFILES_FILE': str(profile),
            # else it takes transports of its own choice
            LOCALHOST[0]: '0' if LOCALHOST[0] == 'ROS_LOCALHOST_ONLY' else 'SYSTEM_DEFAULT',
        }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def free_domain(among: Sequence[int] = range(1, 100)) -> Iterator[int]:
    """
    Give a ROS domain in which nobody on this machine speaks, and which nobody else is given.

    Its first DDS ports are free; its third, which DDS leaves alone, is held until the context
    ends, or the process, however that ends. RuntimeError where none is free.
    """
    # whatever seed a caller has set
    for domain in random.SystemRandom().sample(among, len(among)):
        first = 7400 + 250 * domain
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
            try:
                held.bind(('', first + 2))
                for port in (first, first + 10, first + 11):
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                        udp.bind(('', port))
            except OSError:
                continue
            yield domain
            return
    raise RuntimeError(
        'no ROS domain is free on this machine; end some of the ROS programs that run'
    )
