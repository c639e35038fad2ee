"""``imatching export``: a recording for COLMAP or as a map, the network as ONNX."""

from __future__ import annotations

import argparse

from rich.progress import track as progress

from . import Nothing
from .common import console, open_given, say, warn, warn_of
from .. import kernels
from ..bundle.bundle import Bundle
from ..export import colmap
from ..export.onnx import ENCODE, MATCH, write_onnx
from ..files import write_map
from ..matching import weights
from ..matching.tracker import Tracker
from ..pipeline import SolvedMap, track_and_solve


def run(options: argparse.Namespace) -> None:
    """Write a recording for COLMAP or as trajectory and point cloud; the network as ONNX."""
    if options.onnx is None and options.colmap is None and options.map is None:
        raise ValueError('say what to write: --colmap DIR, --map DIR, --onnx DIR, or several')
    if options.bag is None and (options.colmap or options.map):
        raise ValueError('--colmap and --map are of a recording: imatching export BAG ...')
    if options.onnx:
        _export_network(options)
    if options.colmap or options.map:
        _export_recording(options)


def _export_network(options: argparse.Namespace) -> None:
    size = options.size
    if size is None:
        if options.bag is None:
            raise ValueError(
                'the graphs are for images of one size: --size WxH, or a BAG to take it from'
            )
        camera = open_given(options.bag, options).camera
        size = camera.width, camera.height
    matcher, info = weights.load(options.weights or weights.default_path())
    with console.status('Exporting, about ten seconds'):
        write_onnx(options.onnx, matcher, info, size)
    say(
        f'ONNX: {ENCODE} and {MATCH} of version {info.version} for images of '
        f'{size[0]}x{size[1]}, in {options.onnx}'
    )


def _export_recording(options: argparse.Namespace) -> None:
    recording = open_given(options.bag, options)
    matcher, info = weights.load(options.weights or weights.default_path())
    if options.colmap:
        colmap.begin(options.colmap, recording.camera)
    kernels.show()
    tracker, bundle = Tracker(matcher, info.version, recording.camera), Bundle(recording.camera)
    solved = SolvedMap()
    frames = track_and_solve(recording, tracker, bundle)
    for frame in progress(frames, 'Matching and solving', len(recording), console=console):
        solved.add(frame)
        if not options.colmap:
            continue
        if not frame.camera.goes_on_from(recording.camera):
            raise ValueError(
                f'the camera of {options.bag} changes within the recording, and a COLMAP model '
                'of it has one: export the parts, or give --camera'
            )
        if frame.is_keyframe:
            colmap.write_picture(options.colmap, frame.stamp, frame.image)
    warn_of(recording)
    if options.map and bundle.trajectory:
        write_map(options.map, bundle.trajectory, solved.landmarks)
        poses, landmarks = len(bundle.trajectory), len(solved.landmarks)
        say(f'map: {poses} poses, {landmarks} landmarks in {options.map}')
    if options.colmap:
        written = colmap.write_colmap(
            options.colmap, recording.camera, solved.keyframes, bundle.trajectory,
            solved.landmarks, bundle.options.prune_px,
        )
        say(
            f'COLMAP: {written.images} images, {written.posed} posed; '
            f'{written.pairs} pairs, {written.verified} verified; '
            f'{written.points} points in {written.observations} observations, '
            f'{written.error_px:.2f} px RMS; in {options.colmap}'
        )
    if not bundle.trajectory:
        last = frame.estimate
        raise Nothing(
            f'none of the {len(recording)} images of {recording.bag} got a pose '
            f'({last.reason or last.status}), so there is no map; '
            'the camera must move sideways past things that have texture'
        )
    if bundle.maps > 1:
        warn(f'{bundle.maps} maps were begun; each has a scale of its own')
