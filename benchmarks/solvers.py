"""This package's solver and its peers, Ceres and GTSAM, made alike: a problem in, a run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
import importlib.util
import sys
import time

from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions, compiled
from imatching_ros.bundle.solver.problem import Problem
from imatching_ros.bundle.solver.robust import Kernel
from imatching_ros.geometry import lie
import numpy as np
import torch

FOCAL, HUBER_PX = 500.0, 2.0
KERNEL = Kernel('huber', HUBER_PX)


@dataclass(frozen=True)
class Run:
    seconds: float
    iterations: int
    T_world_camera: torch.Tensor
    points: torch.Tensor


#: after so many iterations, or at convergence if the flag says so
Solver = Callable[[int, bool], Run]


def ours(posed: Problem, backend: str) -> Solver:
    if backend == 'gpu':
        rows = {
            name: value.cuda()
            for name, value in vars(posed).items()
            if isinstance(value, torch.Tensor)
        }
        posed = replace(posed, **rows)

    def run(iterations: int, converge: bool) -> Run:
        stop = (
            {'relative_decrease': 1e-10, 'gradient': 1.0}
            if converge
            else {'relative_decrease': 0.0}
        )
        eager = 'eager' if backend == 'gpu' else backend
        options = AdjustOptions(KERNEL, max_iterations=iterations, backend=eager, **stop)
        if backend == 'gpu':
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            solution = adjust(posed, options)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            begin = time.process_time()
            solution = adjust(posed, options)
            seconds = time.process_time() - begin
        return Run(
            seconds, solution.iterations, solution.T_world_camera.cpu(), solution.points.cpu()
        )

    return run


def ceres(posed: Problem) -> Solver:
    """
    Go through pycolmap.

    Compiled residuals, dense Schur complement, pose 0 and one translation component held.
    """
    import pycolmap

    def reconstruction():
        scene = pycolmap.Reconstruction()
        side = int(2 * FOCAL)
        scene.add_camera_with_trivial_rig(
            pycolmap.Camera(
                camera_id=1, model='PINHOLE', width=side, height=side, params=[FOCAL, FOCAL, 0, 0]
            )
        )
        poses = lie.inverse(posed.T_world_camera).numpy()
        rows = [(posed.pose == k).nonzero().squeeze(-1) for k in range(len(poses))]
        for k, pose in enumerate(poses):
            image = pycolmap.Image(
                name=str(k), keypoints=(posed.xy[rows[k]] * FOCAL).numpy(), camera_id=1,
                image_id=k + 1,
            )
            rigid = pycolmap.Rigid3d(pycolmap.Rotation3d(pose[3:]), pose[:3])
            scene.add_image_with_trivial_frame(image, rigid)
        index = torch.empty(len(posed.pose), dtype=torch.int64)
        for of_image in rows:
            index[of_image] = torch.arange(len(of_image))
        tracks: dict[int, pycolmap.Track] = {}
        for k, landmark, i in zip(
            posed.pose.tolist(), posed.landmark.tolist(), index.tolist(), strict=True
        ):
            tracks.setdefault(landmark, pycolmap.Track()).add_element(k + 1, i)
        ids = {
            landmark: scene.add_point3D(posed.points[landmark].numpy(), track)
            for landmark, track in tracks.items()
        }
        return scene, ids

    def run(iterations: int, converge: bool) -> Run:
        scene, ids = reconstruction()
        options = pycolmap.BundleAdjustmentOptions()
        options.refine_focal_length = options.refine_extra_params = options.print_summary = False
        options.ceres.loss_function_type = pycolmap.LossFunctionType.HUBER
        options.ceres.loss_function_scale = HUBER_PX
        options.ceres.auto_select_solver_type = False
        solver = options.ceres.solver_options
        solver.num_threads, solver.max_num_iterations = 1, iterations
        import pyceres

        dense = len(posed.T_world_camera) <= 20
        solver.linear_solver_type = getattr(
            pyceres.LinearSolverType, 'DENSE_SCHUR' if dense else 'SPARSE_SCHUR'
        )
        solver.function_tolerance = 1e-10 if converge else 0.0
        solver.gradient_tolerance = solver.parameter_tolerance = 0.0
        config = pycolmap.BundleAdjustmentConfig()
        for k in range(len(posed.T_world_camera)):
            config.add_image(k + 1)
        config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
        adjuster = pycolmap.create_default_ceres_bundle_adjuster(options, config, scene)
        begin = time.process_time()
        summary = adjuster.solve()
        seconds = time.process_time() - begin
        found = summary.ceres_summary
        steps = found.num_successful_steps + found.num_unsuccessful_steps
        rigid = [scene.image(k + 1).cam_from_world() for k in range(len(posed.T_world_camera))]
        T = torch.from_numpy(
            np.stack([np.concatenate((r.translation, r.rotation.quat)) for r in rigid])
        )
        points = posed.points.clone()
        for landmark, i in ids.items():
            points[landmark] = torch.from_numpy(scene.point3D(i).xyz)
        return Run(seconds, steps, lie.inverse(T), points)

    return run


def gtsam_(posed: Problem) -> Solver:
    """
    Levenberg-Marquardt, multifrontal Cholesky, Ceres' damping schedule.

    The fastest of its settings here.
    """
    import gtsam
    from gtsam.symbol_shorthand import L as point_key
    from gtsam.symbol_shorthand import X as pose_key

    graph, start = gtsam.NonlinearFactorGraph(), gtsam.Values()
    noise = gtsam.noiseModel.Robust.Create(
        gtsam.noiseModel.mEstimator.Huber.Create(HUBER_PX), gtsam.noiseModel.Unit.Create(2)
    )
    calibration = gtsam.Cal3_S2(FOCAL, FOCAL, 0.0, 0.0, 0.0)
    for k, landmark, xy in zip(
        posed.pose.tolist(), posed.landmark.tolist(), posed.xy.numpy(), strict=True
    ):
        graph.add(gtsam.GenericProjectionFactorCal3_S2(
            xy * FOCAL, noise, pose_key(k), point_key(landmark), calibration, False, False
        ))
    poses = [
        gtsam.Pose3(gtsam.Rot3(Rt[:, :3]), Rt[:, 3])
        for Rt in lie.matrix(posed.T_world_camera).numpy()
    ]
    for k, pose in enumerate(poses):
        start.insert(pose_key(k), pose)
    # It cannot hold one component; its damping takes care of the scale, which costs nothing.
    graph.add(
        gtsam.PriorFactorPose3(pose_key(0), poses[0], gtsam.noiseModel.Isotropic.Sigma(6, 1e-4))
    )
    landmarks = posed.landmark.unique().tolist()
    for landmark in landmarks:
        start.insert(point_key(landmark), posed.points[landmark].numpy())

    def run(iterations: int, converge: bool) -> Run:
        params = gtsam.LevenbergMarquardtParams.CeresDefaults()
        params.setMaxIterations(iterations)
        params.setRelativeErrorTol(1e-10 if converge else 0.0)
        params.setAbsoluteErrorTol(0.0)
        params.setErrorTol(0.0)
        params.setLinearSolverType('MULTIFRONTAL_CHOLESKY')
        begin = time.process_time()
        optimizer = gtsam.LevenbergMarquardtOptimizer(graph, start, params)
        values = optimizer.optimize()
        seconds = time.process_time() - begin
        Rt = np.stack([values.atPose3(pose_key(k)).matrix()[:3] for k in range(len(poses))])
        points = posed.points.clone()
        for landmark in landmarks:
            points[landmark] = torch.from_numpy(values.atPoint3(point_key(landmark)))
        return Run(seconds, optimizer.iterations(), lie.from_matrix(torch.from_numpy(Rt)), points)

    return run


def solvers(names: list[str] | None = None) -> dict[str, Callable[[Problem], Solver]]:
    """Those that are at hand."""
    found: dict[str, Callable[[Problem], Solver]] = {'eager': lambda posed: ours(posed, 'eager')}
    if compiled():
        found['cpu'] = lambda posed: ours(posed, 'cpu')
    if torch.cuda.is_available():
        found['gpu'] = lambda posed: ours(posed, 'gpu')
    for name, package, solver in (('ceres', 'pycolmap', ceres), ('gtsam', 'gtsam', gtsam_)):
        if importlib.util.find_spec(package):
            found[name] = solver
        else:
            print(f'{name} is left out: pip install {package}', file=sys.stderr)
    return {name: solver for name, solver in found.items() if not names or name in names}
