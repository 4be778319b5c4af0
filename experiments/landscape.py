"""The score as a function of the policy's parameters: along a line, on a plane, along a training.

    python experiments/landscape.py line RUN                                   # RUN/offline.pt to RUN/last.pt
    python experiments/landscape.py line A/offline.pt B/best.pt --episodes 50 --beyond 0.2
    python experiments/landscape.py plane A/offline.pt SAC/last.pt TD3BC/last.pt --points 17
    python experiments/landscape.py path RUN RUN2 --pca                        # runs with --keep-every N; else t-SNE

A point is a policy whose parameters (trunk, mean head, normaliser; not the critics) lie between those of checkpoints
(SMAC's is the averaged policy, the one that its own evaluations show):
A + t (B - A), or A + x (B - A) + y (C - A). Its score is the deterministic policy's over `episodes` starts, the same
ones at every point. Checkpoints of smac, td3_bc, iql and cal_ql mix, where their policies have one shape.

OUT/points.csv has a row for every episode as soon as it is there: the same command again rolls out what is missing.
"""

import contextlib
import csv
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from smac_offline_to_online import FINAL, TASKS, BadInput, Policy, TaskEnv, episode_seed, evaluate, read_checkpoint

TOGETHER = 5  # episodes rolled out side by side: part of the result, for a batch's size changes the last bits


@dataclass
class Shared:
    out: Path | None = None  # folder for points.csv, verdict.txt and the picture (default: landscapes/<what it shows>)
    episodes: int = 20  # rollouts a point
    seed: int = 0  # of the rollouts' starts, which are not those of any evaluation during training
    jobs: int = 0  # processes (0: one a core)
    tolerance: float = 5.0  # points of score that count as level, in the verdict
    dataset_score: float | None = None  # the dataset's mean score, for a line in the picture


@dataclass
class Line(Shared):
    """Along the straight line between two checkpoints."""

    a: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # checkpoint, or run folder: its offline.pt
    b: Annotated[Path | None, tyro.conf.Positional] = None  # checkpoint, or run folder: its last.pt (default: A's)
    points: int = 21  # from A to B
    beyond: float = 0.0  # go on past both ends by this part of the line


@dataclass
class Plane(Shared):
    """On the plane through three checkpoints."""

    a: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # the corner; checkpoint, or run folder: its offline.pt
    b: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # at x = 1; checkpoint, or run folder: its last.pt
    c: Annotated[Path, tyro.conf.Positional] = tyro.MISSING  # at y = 1; checkpoint, or run folder: its last.pt
    points: int = 17  # a side; 0 and 1 are always among them
    low: float = -0.3  # smallest x and y
    high: float = 1.3  # largest x and y


@dataclass
class Trajectory(Shared):
    """Along trainings: their periodic checkpoints in two dimensions."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = tyro.MISSING  # a training, and others from its checkpoint
    pca: bool = False  # principal components instead of t-SNE, which needs scikit-learn


# ---- policies as vectors
@dataclass
class Point:
    name: str  # for the picture
    task: str
    sizes: tuple[int, ...]  # observation, hidden layers, action
    vector: np.ndarray  # in double precision: A + (B - A) is B again
    args: dict  # the flags of its run
    handed_over: float | None  # score at the hand-over, in training, if it was known then


def choose(path: Path, name: str) -> Path:
    """A checkpoint as it is; of a run folder the one of that name."""
    if not path.is_dir():
        return path
    if not (path / name).exists():
        raise BadInput(f"{path} has no {name}: name a checkpoint (.pt) of it, or of the run it started from.")
    print(f"{path}: {name} is taken")
    return path / name


def mean_policy(state: dict, act_dim: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """What decides the deterministic action, sorted by name: of the head only the mean's rows, which come first."""
    keys = sorted(k for k in state if re.fullmatch(re.escape(prefix) + r"(mean|std|trunk\.\d+\.\w+|head\.\w+)", k))
    policy = {k.removeprefix(prefix): state[k] for k in keys}
    return {k: v[:act_dim] if k.startswith("head") else v for k, v in policy.items()}


def describe(args: dict, position: dict, path: Path) -> str:
    source = re.fullmatch(r".+__(\w+)__\d+__\d{8}-\d+", Path(args.get("init_from") or "").parent.name)
    algorithm = args.get("online_algorithm", args["algorithm"])  # the baselines' scripts have one, their own
    online = f" + {algorithm} {position['online']:,}" if position.get("online") else ""
    return f"{source[1] if source else args['algorithm']}{online} ({path.name})"


@functools.cache
def read_point(path: Path) -> Point:
    saved = read_checkpoint(path)
    args, position, agent = saved["args"], saved["position"], saved["agent"]
    if args["task"] not in TASKS:
        raise BadInput(f"{path} is of the task {args['task']}, which this version does not have.")
    (act_dim,) = environments(args["task"], 1)[0].action_space.shape
    # SMAC evaluates and hands over its policy's running average; the other scripts have none
    policy = mean_policy(agent, act_dim, "policy_average." if "policy_average.mean" in agent else "policy.")
    if not {"mean", "std", "head.weight", "head.bias", "trunk.0.weight"} <= policy.keys():
        raise BadInput(f"{path} holds no policy of docs/checkpoint.md.")
    hidden = [len(v) for k, v in policy.items() if re.fullmatch(r"trunk\.\d+\.bias", k)]
    vector = np.concatenate([v.double().numpy().ravel() for v in policy.values()])
    scores = [x for phase, step, x in saved["evaluations"] if phase == "offline" or (phase, step) == ("online", 0)]
    name, sizes = describe(args, position, path), (len(policy["mean"]), *hidden, len(policy["head.bias"]))
    return Point(name, args["task"], sizes, vector, args, scores[-1] if scores else None)


def read_points(paths: list[Path]) -> list[Point]:
    points = [read_point(path) for path in paths]
    for path, point in zip(paths, points):
        if point.task != points[0].task:
            raise BadInput(f"{paths[0]} is of {points[0].task} and {path} of {point.task}: one task is needed.")
        if point.sizes != points[0].sizes:
            sizes = " and ".join("-".join(map(str, p.sizes)) for p in (points[0], point))
            raise BadInput(f"The policies of {paths[0]} and {path} differ in shape ({sizes}): nothing is between them.")
    return points


def build(vector: np.ndarray, sizes: tuple[int, ...]) -> Policy:
    """The policy of a vector. Its standard deviation stays at its start, where it plays no part."""
    policy = Policy(sizes[0], sizes[-1], sizes[1:-1])
    parts, start = mean_policy(policy.state_dict(), sizes[-1]), 0
    for part in parts.values():  # they are views of the policy's own tensors
        part.copy_(torch.as_tensor(vector[start : start + part.numel()]).view_as(part))
        start += part.numel()
    return policy


# ---- rollouts
@functools.cache
def environments(task: str, n: int) -> list[TaskEnv]:
    return [TaskEnv(TASKS[task]) for _ in range(n)]


def start_worker() -> None:
    """Ctrl-C is the parent's to handle: what is being rolled out comes to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def roll_out(key: tuple, paths: tuple[Path, ...], weights: tuple, seed: int, episodes: range) -> list[tuple]:
    """Rows of points.csv, (*key, episode, return, length, score), of the policy A + x (B - A) + y (C - A) ..."""
    first, *others = (read_point(path) for path in paths)  # cached: a worker reads each checkpoint once
    vector = first.vector + sum(w * (other.vector - first.vector) for w, other in zip(weights, others))
    envs = environments(first.task, len(episodes))
    results = evaluate(build(vector, first.sizes), envs, [episode_seed(seed, FINAL, i) for i in episodes])
    return [(*key, i, r, n, float(envs[0].task.score(r, last))) for i, (r, n, last) in zip(episodes, results)]


def read_rows(path: Path, header: str) -> dict[tuple, float]:
    """(*key, episode): score, of the whole lines in points.csv; a line that was cut off is cut away."""
    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1]
    if text:
        os.truncate(path, len(text.encode()))
    else:
        path.write_text(header)
    rows = (row[:-3] + row[-1:] for row in csv.reader(text.splitlines()[1:]))
    return {(*key, int(episode)): float(score) for *key, episode, score in rows}


def digest(*vectors: np.ndarray) -> str:
    return hashlib.sha1(b"".join(v.tobytes() for v in vectors)).hexdigest()[:12]


def scores_of(args: Shared, axes: tuple[str, ...], about: dict, points: dict[tuple, tuple]) -> np.ndarray:
    """(points, episodes): scores from points.csv where they are there, rolled out where not. `points` has the paths and
    weights of each key; `about` is what has to be the same for the rows in points.csv to count."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about | dict(axes=axes, seed=args.seed))
    if (args.out / "about.json").exists() and (args.out / "about.json").read_text() != text:
        raise BadInput(f"{args.out} holds another landscape: name another folder with --out.")
    if not (args.out / "about.json").exists():
        (args.out / "about.tmp").write_text(text)
        os.replace(args.out / "about.tmp", args.out / "about.json")
    done = read_rows(args.out / "points.csv", ",".join([*axes, "episode", "return", "length", "score\n"]))
    parts = [range(i, min(i + TOGETHER, args.episodes)) for i in range(0, args.episodes, TOGETHER)]
    todo = [(k, p) for k in points for p in parts if any((*k, i) not in done for i in p)]
    work = [(k, *points[k], args.seed, p) for k, p in todo]
    bar = tqdm(total=len(points) * len(parts), initial=len(points) * len(parts) - len(todo), desc="rollouts")
    jobs = min(args.jobs or os.cpu_count() or 1, len(work))
    with bar, open(args.out / "points.csv", "a", buffering=1) as f, contextlib.ExitStack() as stack:
        finished = (roll_out(*w) for w in work)
        if jobs > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state
            pool = stack.enter_context(ProcessPoolExecutor(jobs, context, start_worker))
            stack.callback(pool.shutdown, cancel_futures=True)  # Ctrl-C: no new ones
            finished = (future.result() for future in as_completed([pool.submit(roll_out, *w) for w in work]))
        try:
            for rows in finished:
                csv.writer(f, lineterminator="\n").writerows(rows)
                done |= {row[: len(axes) + 1]: row[-1] for row in rows}
                bar.update()
        except KeyboardInterrupt:
            raise BadInput(f"Stopped; {args.out / 'points.csv'} is kept: the same command goes on.", 130) from None
    return np.array([[done[*k, i] for i in range(args.episodes)] for k in points])


# ---- verdicts: pure functions of mean scores (points, ...) in the line's order
def valley(t: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the score falls below the chord between its two ends at most, and where."""
    t = t.reshape(-1, *[1] * (scores.ndim - 1))
    gap = scores[0] + (scores[-1] - scores[0]) * t - scores
    return gap.max(0), t.ravel()[gap.argmax(0)]


def setback(scores: np.ndarray, rising: bool) -> np.ndarray:
    """The largest way back against the direction from the first end to the last: 0 for a monotone curve."""
    scores = scores if rising else -scores
    return (np.maximum.accumulate(scores) - scores).max(0)


def resampled(scores: np.ndarray) -> np.ndarray:
    """(points, 2000): mean scores over episodes drawn with replacement, the same ones at every point."""
    n = scores.shape[1]
    return scores[:, np.random.default_rng(0).integers(n, size=(2000, n))].mean(-1)


def interval(draws: np.ndarray) -> np.ndarray:
    return np.percentile(draws, (2.5, 97.5), axis=-1)


def judge(t: np.ndarray, scores: np.ndarray, tolerance: float) -> dict:
    """The verdict on scores (points, episodes) at t in 0..1, with 95 % bootstrap intervals over episodes. Depth and
    setback are maxima over noisy points, so they lean upwards: few episodes make a flat line look rough."""
    mean, draws = scores.mean(1), resampled(scores)
    rising = bool(mean[-1] >= mean[0])
    depth, where = valley(t, mean)
    back, low_high = setback(mean, rising), interval(setback(draws, rising))
    words = "monotone" if low_high[1] <= tolerance else "not monotone" if low_high[0] > tolerance else "undecided"
    numbers = dict(depth=float(depth), depth_interval=interval(valley(t, draws)[0]).tolist(), where=float(where))
    return numbers | dict(setback=float(back), setback_interval=low_high.tolist(), monotone=words)


def sentence(name: str, v: dict, tolerance: float) -> str:
    (a, b), (c, d) = v["depth_interval"], v["setback_interval"]
    depth = f"deepest valley {v['depth']:.1f} points below the chord [{a:.1f}, {b:.1f}] at t = {v['where']:.2f}"
    back = f"largest way back {v['setback']:.1f} points [{c:.1f}, {d:.1f}]"
    return f"{name}: {depth}; {v['monotone']} ({back}, {tolerance:g} count as level)"


# ---- the three pictures
def finish(args: Shared, figure, name: str, lines: list[str]) -> None:
    figure.savefig(args.out / f"{name}.png", dpi=150)
    plt.close(figure)
    (args.out / "verdict.txt").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, f"{args.out / name}.png"]))


def line(args: Line) -> None:
    paths = [choose(args.a, "offline.pt"), choose(args.b or args.a, "last.pt")]
    if args.b is None and not args.a.is_dir():
        raise BadInput(f"{args.a} is one checkpoint: name a second one, or a run folder.")
    if args.points < 2 or args.beyond < 0:
        raise BadInput("--points: a line has two at least; --beyond: 0 or more.")
    args.out = args.out or default_folder("line", paths)
    a, b = read_points(paths)
    more = round(args.beyond * (args.points - 1))
    t = np.round(np.arange(-more, args.points + more) / (args.points - 1), 6)
    points = {(f"{x:g}",): (tuple(paths), (x,)) for x in t}
    scores = scores_of(args, ("t",), dict(task=a.task, ends=digest(a.vector, b.vector)), points)
    inside = (t >= 0) & (t <= 1)
    verdict = judge(t[inside], scores[inside], args.tolerance)

    mean, (low, high) = scores.mean(1), interval(resampled(scores))
    ends = mean[inside][[0, -1]]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(t, mean, ".-", label="mean score")
    axes.fill_between(t, low, high, alpha=0.2, linewidth=0, label="95 % interval over episodes")
    axes.plot([0, 1], ends, "--", color="black", linewidth=0.8, label="chord")
    if verdict["depth"] > 0:
        x, chord = verdict["where"], ends[0] + verdict["where"] * (ends[1] - ends[0])
        label = f"deepest valley: {verdict['depth']:.1f} at t = {x:.2f}"
        axes.vlines(x, chord - verdict["depth"], chord, color="tab:red", label=label)
    axes.plot([0, 1], ends, "o", color="black")
    for x, score in zip((0, 1), ends):
        axes.annotate(f"{score:.1f}", (x, score), textcoords="offset points", xytext=(8, 8))
    for score, name, color in (
        (a.handed_over, "hand-over, in training", "tab:green"),
        (args.dataset_score, "dataset", "gray"),
    ):
        if score is not None:
            axes.axhline(score, color=color, linestyle=":", label=f"{name}: {score:.1f}")
    title = f"{a.task}: policies on the line between two checkpoints, {args.episodes} episodes a point"
    axes.set(xlabel=f"t: 0 is {a.name}, 1 is {b.name}", ylabel="D4RL score", title=title)
    axes.grid(alpha=0.3), axes.legend()
    head = f"{a.task}: {a.name} scores {ends[0]:.1f}, {b.name} {ends[1]:.1f}, {args.episodes} episodes a point"
    finish(args, figure, "line", [head, sentence("line", verdict, args.tolerance)])


def plane(args: Plane) -> None:
    names = ("offline.pt", "last.pt", "last.pt")
    paths = [choose(path, name) for path, name in zip((args.a, args.b, args.c), names)]
    args.out = args.out or default_folder("plane", paths)
    a, b, c = read_points(paths)
    grid = np.unique(np.round([*np.linspace(args.low, args.high, args.points), 0, 1], 6))
    points = {(f"{x:g}", f"{y:g}"): (tuple(paths), (x, y)) for y in grid for x in grid}
    about = dict(task=a.task, ends=digest(a.vector, b.vector, c.vector))
    scores = scores_of(args, ("x", "y"), about, points).reshape(len(grid), len(grid), -1)
    inside, zero, mean = (grid >= 0) & (grid <= 1), list(grid).index(0), scores.mean(-1)
    lines = [f"{a.task}, {args.episodes} episodes a point"]
    for name, side in ((b.name, scores[zero, inside]), (c.name, scores[inside, zero])):
        verdict = judge(grid[inside], side, args.tolerance)
        lines.append(sentence(f"{a.name} to {name}", verdict, args.tolerance))
    y, x = np.unravel_index(mean.argmax(), mean.shape)
    lines.append(f"best of the plane: {mean.max():.1f} at x = {grid[x]:.2f}, y = {grid[y]:.2f}")

    figure, axes = plt.subplots(figsize=(8.5, 6), layout="constrained")
    filled = axes.contourf(grid, grid, mean, MaxNLocator(20).tick_values(mean.min(), mean.max()))
    figure.colorbar(filled, label="D4RL score")
    axes.plot(*np.meshgrid(grid, grid), ".", color="white", markersize=1.5, alpha=0.6)
    one = list(grid).index(1)
    for x, y, point, score, marker in (
        (0, 0, a, mean[zero, zero], "o"),
        (1, 0, b, mean[zero, one], "^"),
        (0, 1, c, mean[one, zero], "s"),
    ):
        label = f"{point.name}: {score:.1f}"
        axes.plot(x, y, marker, color="red", markeredgecolor="white", markersize=10, linestyle="", label=label)
    title = f"{a.task}: policies on the plane through three checkpoints, {args.episodes} episodes a point"
    axes.set(xlabel=f"x: towards {b.name}", ylabel=f"y: towards {c.name}", title=title)
    notes = [f"hand-over {a.handed_over:.1f}"] if a.handed_over is not None else []
    notes += [f"dataset {args.dataset_score:.1f}"] if args.dataset_score is not None else []
    figure.legend(title=", ".join(notes) or None, loc="outside lower center", ncols=3)
    finish(args, figure, "plane", lines)


def checkpoints(run: Path) -> list[Path]:
    """A training's network checkpoints in the order of their steps, each set of weights once."""
    named = [(re.fullmatch(r"(offline|online)-(\d+)", p.stem), p) for p in run.glob("*.pt")]
    found = [(m[1], int(m[2]), p) for m, p in named if m]
    ends = [("offline", 10**12, run / "offline.pt"), ("online", 10**12, run / "last.pt")]
    paths = [path for *_, path in sorted(found + [end for end in ends if end[2].exists()])]
    same = {digest(read_point(path).vector): path for path in reversed(paths)}
    if len(same) < 4:
        raise BadInput(f"{run} holds {len(same)} different policies: train with --keep-every N to have more.")
    return [path for path in paths if path in same.values()]


def embed(vectors: np.ndarray, pca: bool) -> tuple[np.ndarray, tuple[str, str]]:
    """(n, 2) coordinates and the axes' names."""
    if pca:
        centered = vectors - vectors.mean(0)
        left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
        share = 100 * sizes**2 / (sizes**2).sum()
        return left[:, :2] * sizes[:2], tuple(f"component {i + 1} ({share[i]:.0f} % of the variance)" for i in (0, 1))
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(30.0, (len(vectors) - 1) / 3), init="pca", random_state=0)
    return tsne.fit_transform(vectors.astype(np.float32)), ("t-SNE 1", "t-SNE 2")


def path(args: Trajectory) -> None:
    if not args.pca and importlib.util.find_spec("sklearn") is None:
        raise BadInput("path needs scikit-learn for t-SNE (pip install scikit-learn); --pca works without.")
    runs = {run: checkpoints(run) for run in args.runs}
    paths = list(dict.fromkeys(p for found in runs.values() for p in found))
    args.out = args.out or default_folder("path", list(args.runs))
    points = dict(zip(paths, read_points(paths)))
    keys = {(f"{p.parent.name}/{p.name}", digest(points[p].vector)): ((p,), ()) for p in paths}  # training may go on
    task = points[paths[0]].task
    scores = scores_of(args, ("checkpoint", "weights"), dict(task=task), keys)
    mean, at = scores.mean(1), {p: i for i, p in enumerate(paths)}
    xy, labels = embed(np.array([points[p].vector for p in paths]), args.pca)

    figure, axes = plt.subplots(figsize=(8.5, 6), layout="constrained")
    lines = [f"{task}, {args.episodes} episodes a checkpoint"]
    for marker, (run, found) in zip("os^Dv<>P" * len(runs), runs.items()):
        i, way = [at[p] for p in found], np.array([points[p].vector for p in found])
        source = Path(points[found[0]].args.get("init_from") or "").resolve()
        start = [at[p] for p in paths if p.resolve() == source]
        axes.plot(*xy[start + i].T, "-", color="gray", linewidth=0.8, zorder=1)
        shown = axes.scatter(*xy[i].T, c=mean[i], marker=marker, vmin=mean.min(), vmax=mean.max(), zorder=2)
        axes.plot([], [], marker, color="gray", label=points[found[-1]].name.split(" (")[0])
        for p in {found[0], found[-1], *(p for p in found if p.name == "offline.pt")}:
            label = f"{'hand-over' if p.name == 'offline.pt' else p.stem}: {mean[at[p]]:.0f}"
            axes.annotate(label, xy[at[p]], textcoords="offset points", xytext=(6, 6), fontsize=8)
        length = np.linalg.norm(np.diff(way, axis=0), axis=1).sum()
        far = np.linalg.norm(way[-1] - way[0])
        moved = f"{length:.1f} long, {far:.1f} from end to end, in the space of the parameters"
        lines.append(f"{run}: score {mean[i[0]]:.1f} to {mean[i[-1]]:.1f}, lowest {mean[i].min():.1f}; {moved}")
    figure.colorbar(shown, label="D4RL score")
    title = f"{task}: {len(paths)} policies along training, {args.episodes} episodes each"
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.margins(0.12)
    axes.legend()
    finish(args, figure, "path", lines)


def default_folder(kind: str, paths: list[Path]) -> Path:
    names = [f"{p.resolve().parent.name}-{p.stem}" if p.suffix == ".pt" else p.resolve().name for p in paths]
    name = "__".join([kind, *names])
    short = name if len(name) <= 200 else f"{name[:190]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    return Path("landscapes") / short


def main() -> None:
    kinds = {Line: line, Plane: plane, Trajectory: path}
    names = [Annotated[kind, tyro.conf.subcommand(run.__name__)] for kind, run in kinds.items()]
    args = tyro.cli(Union[*names], description=__doc__)
    if args.episodes < 2 or args.jobs < 0:
        raise BadInput("--episodes must be at least 2, for an interval, and --jobs at least 0.")
    plt.switch_backend("Agg")
    torch.set_num_threads(1)
    kinds[type(args)](args)


if __name__ == "__main__":
    main()
