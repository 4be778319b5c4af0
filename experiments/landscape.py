"""The return as a function of the policy's parameters: along a line, on a plane, along a training.

    python experiments/landscape.py line RUN                       # RUN/offline.pt to RUN/last.pt
    python experiments/landscape.py line A/offline.pt B/last.pt --episodes 50 --beyond 0.2
    python experiments/landscape.py plane A/offline.pt SAC/last.pt TD3/last.pt --points 17
    python experiments/landscape.py path RUN RUN2                  # of runs with --keep-every N

A point is a policy whose parameters (trunk, mean head, normaliser; not the critics) lie between
those of checkpoints: A + t (B - A), or A + x (B - A) + y (C - A). It is the policy that the script
evaluates: SMAC's is the averaged one. Each point's deterministic policy has the same episode
starts. Checkpoints of the four scripts mix, where their policies have one shape.

OUT/points.csv has a row for every episode as soon as it is there: the same command again rolls out
what is missing.
"""

import contextlib
import csv
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Union

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import smac_offline_to_online as smac

TOGETHER = 5  # episodes side by side: part of the result, a batch's size changes the last bits


@dataclass
class Shared:
    out: Path | None = None  # folder for points.csv, verdict.txt and picture; default: landscapes/
    episodes: int = 20  # rollouts a point
    seed: int = 0  # of the rollouts' starts, which no evaluation during training had
    jobs: int = os.cpu_count() or 1  # processes
    tolerance: float = 5.0  # points of normalized return that count as level, in the verdict


@dataclass
class Line(Shared):
    """Along the straight line between two checkpoints."""

    a: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # checkpoint, or run: its offline.pt
    b: Annotated[Path | None, tyro.conf.Positional] = None  # or run: its last.pt; default: A's
    points: int = 21  # from A to B
    beyond: float = 0.0  # go on past both ends by this part of the line


@dataclass
class Plane(Shared):
    """On the plane through three checkpoints."""

    a: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # the corner; of a run its offline.pt
    b: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # at x = 1; of a run its last.pt
    c: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # at y = 1; of a run its last.pt
    points: int = 17  # a side; 0 and 1 are always among them
    low: float = -0.3  # smallest x and y
    high: float = 1.3  # largest x and y


@dataclass
class Trajectory(Shared):
    """Along trainings: their periodic checkpoints on their two principal components."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = tyro.MISSING  # run folders


# ---- policies as vectors
class Point(NamedTuple):
    name: str  # for the picture
    task: dict
    hidden: tuple[int, ...]  # the policy's
    vector: np.ndarray  # in double precision: A + (B - A) is B again


def read_policy(saved: dict) -> smac.Policy:
    """The policy that a script evaluates, of a checkpoint of any of the four. Where it has a
    deviation, that is left out: it plays no part in the deterministic action."""
    agent = saved["agent"]
    prefix = "policy_average." if "policy_average.head.bias" in agent else "policy."
    state = {}
    for name, value in agent.items():
        if name.startswith(prefix) and not name.endswith("log_std"):
            state[name.removeprefix(prefix)] = value
    act_dim = len(state["head.bias"])
    if saved["algorithm"] in ("smac", "cal_ql"):  # theirs is in the head, below the mean
        act_dim //= 2
    for name in ("head.weight", "head.bias"):
        mean = state[name][:act_dim]
        state[name] = torch.cat([mean, torch.zeros_like(mean)])
    args = smac.Args(policy_hidden=tuple(saved["args"]["policy_hidden"]))
    policy = smac.Policy(len(state["normalize.mean"]), act_dim, args)
    policy.load_state_dict(state)
    return policy


def build(vector: np.ndarray, hidden: tuple[int, ...], obs_dim: int, act_dim: int) -> smac.Policy:
    policy = smac.Policy(obs_dim, act_dim, smac.Args(policy_hidden=hidden))
    start = 0
    for part in policy.state_dict().values():  # they are views of the policy's own tensors
        end = start + part.numel()
        part.copy_(torch.as_tensor(vector[start:end]).view_as(part))
        start = end
    return policy


def choose(path: Path, name: str) -> Path:
    """A checkpoint as it is; of a run folder the one of that name."""
    if not path.is_dir():
        return path
    if not (path / name).exists():
        sys.exit(f"error: {path} has no {name}: name a checkpoint (.pt), or another run.")
    return path / name


def read_points(paths: list[Path]) -> list[Point]:
    points = []
    for path in paths:
        saved = smac.read_checkpoint(path)
        args, parts = saved["args"], read_policy(saved).state_dict().values()
        vector = np.concatenate([part.double().numpy().ravel() for part in parts])
        algorithm, steps = saved["algorithm"], saved["done"].get("online", 0)
        name = f"{algorithm} ({path.name})"
        if steps > 0:
            online = args.get("online_algorithm", algorithm)  # the baselines have their own
            name = f"{algorithm} + {online} {steps:,} ({path.name})"
        hidden = tuple(args["policy_hidden"])
        points.append(Point(name, saved["task"], hidden, vector))
    for path, point in zip(paths, points):
        if point.task["env_id"] != points[0].task["env_id"]:
            ids = f"{points[0].task['env_id']} and {point.task['env_id']}"
            sys.exit(f"error: {paths[0]} and {path} are of {ids}: name checkpoints of one task.")
        if point.hidden != points[0].hidden or len(point.vector) != len(points[0].vector):
            shapes = f"{points[0].hidden} and {point.hidden}"
            sys.exit(f"error: {paths[0]} and {path} differ in shape, {shapes}: take alike ones.")
    return points


# ---- rollouts
@functools.cache
def environments(task: str, n: int) -> list[smac.TaskEnv]:
    return [smac.TaskEnv(smac.Task(**json.loads(task))) for _ in range(n)]


def start_worker() -> None:
    """Ctrl-C is the parent's to handle: what is being rolled out comes to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    smac.set_up(smac.Args(device="cpu"))


def roll_out(key: tuple, vector: np.ndarray, point: Point, seed: int, episodes: range) -> list:
    """Rows of points.csv: (*key, episode, return, length, normalized)."""
    envs = environments(json.dumps(point.task), len(episodes))
    seeds = [smac.episode_seed(seed, smac.FINAL, episode) for episode in episodes]
    obs, _ = envs[0].reset(seeds[0])
    policy = build(vector, point.hidden, len(obs), envs[0].action_space.shape[0])
    smac.rollout(policy, envs, seeds)
    rows = []
    for episode, env in zip(episodes, envs):
        rows.append((*key, episode, sum(env.rewards), len(env.actions), env.normalized_return()))
    return rows


def read_rows(path: Path) -> dict[tuple, float]:
    """(*key, episode): normalized return, of the whole lines; one that was cut off is cut away."""
    text = path.read_text()
    text = text[: text.rfind("\n") + 1]
    os.truncate(path, len(text.encode()))
    done = {}
    for *key, episode, _, _, normalized in csv.reader(text.splitlines()[1:]):
        done[*key, int(episode)] = float(normalized)
    return done


def digest(*vectors: np.ndarray) -> str:
    return hashlib.sha1(b"".join(vector.tobytes() for vector in vectors)).hexdigest()[:12]


def returns_of(args: Shared, axes: tuple, point: Point, vectors: dict, about: list) -> np.ndarray:
    """(points, episodes): normalized returns of the policies {key: vector}, from points.csv where
    they are there, rolled out where not. `about` has to be the same for those to count."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([*about, args.seed, point.task])
    table, about_file = args.out / "points.csv", args.out / "about.json"
    if not about_file.exists():
        table.write_text(",".join([*axes, "episode", "return", "length", "normalized\n"]))
        about_file.write_text(text)
    if about_file.read_text() != text:
        sys.exit(f"error: {args.out} holds another landscape: name another folder with --out.")
    done = read_rows(table)
    work = []
    for key, vector in vectors.items():
        for start in range(0, args.episodes, TOGETHER):
            episodes = range(start, min(start + TOGETHER, args.episodes))
            if any((*key, episode) not in done for episode in episodes):
                work.append((key, vector, point, args.seed, episodes))
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads as they are
    with open(table, "a", buffering=1) as f, contextlib.ExitStack() as stack:
        if args.jobs > 1:
            pool = stack.enter_context(ProcessPoolExecutor(args.jobs, context, start_worker))
            stack.callback(pool.shutdown, cancel_futures=True)  # Ctrl-C: no new ones
            futures = [pool.submit(roll_out, *part) for part in work]
            results = (future.result() for future in as_completed(futures))
        else:
            results = (roll_out(*part) for part in work)
        try:
            for rows in tqdm(results, "rollouts", total=len(work), disable=not work):
                csv.writer(f, lineterminator="\n").writerows(rows)
                for row in rows:
                    done[row[: len(axes) + 1]] = row[-1]
        except KeyboardInterrupt:
            sys.exit(f"stopped; {table} is kept: the same command goes on.")
    return np.array([[done[*key, i] for i in range(args.episodes)] for key in vectors])


# ---- verdicts: pure functions of mean returns (points, ...) in the line's order
def valley(t: np.ndarray, returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far they fall below the chord between the two ends at most, and where."""
    t = t.reshape(-1, *[1] * (returns.ndim - 1))
    gap = returns[0] + (returns[-1] - returns[0]) * t - returns
    return gap.max(0), t.ravel()[gap.argmax(0)]


def setback(returns: np.ndarray, rising: bool) -> np.ndarray:
    """The largest way back against the direction from the first end to the last: 0 if monotone."""
    returns = returns if rising else -returns
    return (np.maximum.accumulate(returns) - returns).max(0)


def resampled(returns: np.ndarray) -> np.ndarray:
    """(points, 2000): means over episodes drawn with replacement, the same ones at every point."""
    n = returns.shape[1]
    return returns[:, np.random.default_rng(0).integers(n, size=(2000, n))].mean(-1)


def interval(draws: np.ndarray) -> np.ndarray:
    return np.percentile(draws, (2.5, 97.5), axis=-1)


def judge(t: np.ndarray, returns: np.ndarray, tolerance: float) -> dict:
    """The verdict on returns (points, episodes) at t in 0..1, with 95 % bootstrap intervals over
    episodes. Depth and setback are maxima over noisy points, so they lean upwards: few episodes
    make a flat line look rough."""
    mean, draws = returns.mean(1), resampled(returns)
    rising = bool(mean[-1] >= mean[0])
    depth, where = valley(t, mean)
    low, high = interval(setback(draws, rising))
    monotone = "undecided"
    if high <= tolerance:
        monotone = "monotone"
    elif low > tolerance:
        monotone = "not monotone"
    return dict(
        depth=float(depth),
        depth_interval=interval(valley(t, draws)[0]).tolist(),
        where=float(where),
        setback=float(setback(mean, rising)),
        setback_interval=[float(low), float(high)],
        monotone=monotone,
    )


def sentence(name: str, v: dict, tolerance: float) -> str:
    (a, b), (c, d) = v["depth_interval"], v["setback_interval"]
    depth = f"deepest valley {v['depth']:.1f} points below the chord [{a:.1f}, {b:.1f}]"
    back = f"largest way back {v['setback']:.1f} points [{c:.1f}, {d:.1f}]"
    verdict = f"{v['monotone']} ({back}, {tolerance:g} count as level)"
    return f"{name}: {depth} at t = {v['where']:.2f}; {verdict}"


# ---- the three pictures
def finish(args: Shared, figure, name: str, lines: list[str]) -> None:
    figure.savefig(args.out / f"{name}.png", dpi=150)
    plt.close(figure)
    (args.out / "verdict.txt").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, f"{args.out / name}.png"]))


def line(args: Line) -> None:
    if args.b is None and not args.a.is_dir():
        sys.exit(f"error: {args.a} is one checkpoint: name a second one, or a run folder.")
    paths = [choose(args.a, "offline.pt"), choose(args.b or args.a, "last.pt")]
    args.out = args.out or default_folder("line", paths)
    a, b = read_points(paths)
    more = round(args.beyond * (args.points - 1))
    t = np.round(np.arange(-more, args.points + more) / (args.points - 1), 6)
    vectors = {(f"{x:g}",): a.vector + x * (b.vector - a.vector) for x in t}
    returns = returns_of(args, ("t",), a, vectors, [digest(a.vector, b.vector)])
    inside = (t >= 0) & (t <= 1)
    verdict = judge(t[inside], returns[inside], args.tolerance)

    mean, (low, high) = returns.mean(1), interval(resampled(returns))
    ends = mean[inside][[0, -1]]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(t, mean, ".-", label="mean")
    axes.fill_between(t, low, high, alpha=0.2, linewidth=0, label="95 % interval over episodes")
    axes.plot([0, 1], ends, "o--", color="black", linewidth=0.8, label="chord")
    if verdict["depth"] > 0:
        x = verdict["where"]
        chord = ends[0] + x * (ends[1] - ends[0])
        label = f"deepest valley: {verdict['depth']:.1f} at t = {x:.2f}"
        axes.vlines(x, chord - verdict["depth"], chord, color="tab:red", label=label)
    for x, value in zip((0, 1), ends):
        axes.annotate(f"{value:.1f}", (x, value), textcoords="offset points", xytext=(8, 8))
    dataset = a.task["mean_normalized_return"]
    axes.axhline(dataset, color="gray", linestyle=":", label=f"dataset, mean: {dataset:.1f}")
    title = f"{a.task['env_id']}: policies on the line between two checkpoints, {args.episodes}"
    axes.set(xlabel=f"t: 0 is {a.name}, 1 is {b.name}", ylabel="normalized return")
    axes.set_title(f"{title} episodes a point")
    axes.grid(alpha=0.3)
    axes.legend()
    head = f"{a.task['env_id']}: {a.name} returns {ends[0]:.1f}, {b.name} {ends[1]:.1f}"
    finish(args, figure, "line", [head, sentence("line", verdict, args.tolerance)])


def plane(args: Plane) -> None:
    paths = [choose(args.a, "offline.pt"), choose(args.b, "last.pt"), choose(args.c, "last.pt")]
    args.out = args.out or default_folder("plane", paths)
    a, b, c = read_points(paths)
    grid = np.unique(np.round([*np.linspace(args.low, args.high, args.points), 0, 1], 6))
    right, up = b.vector - a.vector, c.vector - a.vector
    vectors = {}
    for y in grid:
        for x in grid:
            vectors[f"{x:g}", f"{y:g}"] = a.vector + x * right + y * up
    about = [digest(a.vector, b.vector, c.vector)]
    returns = returns_of(args, ("x", "y"), a, vectors, about).reshape(len(grid), len(grid), -1)
    mean, inside = returns.mean(-1), (grid >= 0) & (grid <= 1)
    zero, one = list(grid).index(0), list(grid).index(1)
    lines = [f"{a.task['env_id']}, {args.episodes} episodes a point"]
    for name, side in ((b.name, returns[zero, inside]), (c.name, returns[inside, zero])):
        verdict = judge(grid[inside], side, args.tolerance)
        lines.append(sentence(f"{a.name} to {name}", verdict, args.tolerance))
    y, x = np.unravel_index(mean.argmax(), mean.shape)
    lines.append(f"best of the plane: {mean.max():.1f} at x = {grid[x]:.2f}, y = {grid[y]:.2f}")

    figure, axes = plt.subplots(figsize=(8.5, 6), layout="constrained")
    levels = MaxNLocator(20).tick_values(mean.min(), mean.max())
    filled = axes.contourf(grid, grid, mean, levels)
    figure.colorbar(filled, label="normalized return")
    axes.plot(*np.meshgrid(grid, grid), ".", color="white", markersize=1.5, alpha=0.6)
    corners = [(0, 0, a, mean[zero, zero], "o"), (1, 0, b, mean[zero, one], "^")]
    corners.append((0, 1, c, mean[one, zero], "s"))
    style = dict(color="red", markeredgecolor="white", markersize=10, linestyle="")
    for x, y, point, value, marker in corners:
        axes.plot(x, y, marker, label=f"{point.name}: {value:.1f}", **style)
    title = f"{a.task['env_id']}: policies on the plane through three checkpoints, {args.episodes}"
    axes.set(xlabel=f"x: towards {b.name}", ylabel=f"y: towards {c.name}")
    axes.set_title(f"{title} episodes a point", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3)
    finish(args, figure, "plane", lines)


def checkpoints(run: Path) -> list[Path]:
    """A training's network checkpoints in the order of their steps: offline-5000.pt, ..."""
    found = []
    for path in run.glob("*.pt"):
        kept = re.fullmatch(r"(offline|online)-(\d+)", path.stem)
        if kept:
            found.append((kept[1], int(kept[2]), path))
    if len(found) < 4:
        sys.exit(f"error: {run} has {len(found)} checkpoints kept: train with --keep-every N.")
    return [path for *_, path in sorted(found)]


def embed(vectors: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(n, 2) coordinates, the first two principal components, and the axes' names."""
    left, sizes, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    share = 100 * sizes**2 / (sizes**2).sum()
    names = [f"component {i + 1} ({share[i]:.0f} % of the variance)" for i in (0, 1)]
    return left[:, :2] * sizes[:2], names


def path(args: Trajectory) -> None:
    paths = [path for run in args.runs for path in checkpoints(run)]
    args.out = args.out or default_folder("path", list(args.runs))
    points = read_points(paths)
    vectors = {}
    for path, point in zip(paths, points):  # by its weights too: training may go on
        vectors[f"{path.parent.name}/{path.name}", digest(point.vector)] = point.vector
    axis_names = ("checkpoint", "weights")
    mean = returns_of(args, axis_names, points[0], vectors, ["path"]).mean(1)
    xy, labels = embed(np.array([point.vector for point in points]))

    figure, axes = plt.subplots(figsize=(8.5, 6), layout="constrained")
    lines = [f"{points[0].task['env_id']}, {args.episodes} episodes a checkpoint"]
    for marker, run in zip("os^Dv<>P" * len(args.runs), args.runs):
        of_run = [i for i, path in enumerate(paths) if path.parent == run]
        axes.plot(*xy[of_run].T, "-", color="gray", linewidth=0.8, zorder=1)
        color = dict(c=mean[of_run], vmin=mean.min(), vmax=mean.max(), zorder=2)
        shown = axes.scatter(*xy[of_run].T, marker=marker, **color)
        axes.plot([], [], marker, color="gray", label=points[of_run[-1]].name.split(" (")[0])
        offline = [i for i in of_run if paths[i].stem.startswith("offline")]
        for i in {of_run[0], of_run[-1], *offline[-1:]}:  # the last offline one is the hand-over
            label = f"{paths[i].stem}: {mean[i]:.0f}"
            axes.annotate(label, xy[i], textcoords="offset points", xytext=(6, 6), fontsize=8)
        way = np.array([points[i].vector for i in of_run])
        length = np.linalg.norm(np.diff(way, axis=0), axis=1).sum()
        far = np.linalg.norm(way[-1] - way[0])
        moved = f"{length:.1f} long, {far:.1f} from end to end, in the space of the parameters"
        first, last, lowest = mean[of_run[0]], mean[of_run[-1]], mean[of_run].min()
        lines.append(f"{run}: {first:.1f} to {last:.1f}, lowest {lowest:.1f}; {moved}")
    figure.colorbar(shown, label="normalized return")
    title = f"{points[0].task['env_id']}: {len(paths)} policies along training"
    axes.set(xlabel=labels[0], ylabel=labels[1], title=f"{title}, {args.episodes} episodes each")
    axes.margins(0.12)
    axes.legend()
    finish(args, figure, "path", lines)


def default_folder(kind: str, paths: list[Path]) -> Path:
    names = [kind]
    for path in paths:
        of_run = path.resolve().parent.name
        names.append(f"{of_run}-{path.stem}" if path.suffix == ".pt" else path.resolve().name)
    return Path("landscapes") / "__".join(names)[:200]


def main() -> None:
    kinds = {Line: line, Plane: plane, Trajectory: path}
    names = [Annotated[kind, tyro.conf.subcommand(run.__name__)] for kind, run in kinds.items()]
    args = tyro.cli(Union[*names], description=__doc__)
    if args.episodes < 2:
        sys.exit("error: --episodes: 2 at least, for an interval.")
    plt.switch_backend("Agg")
    smac.set_up(smac.Args(device="cpu"))
    kinds[type(args)](args)


if __name__ == "__main__":
    main()
