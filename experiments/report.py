"""Learning curves, regret and transfer tables from run folders, or from tables packed from them.

    python experiments/report.py runs                              # all finished runs below runs/
    python experiments/report.py runs/ablations --by all           # a row for each set of flags
    python experiments/report.py runs/size --by dataset            # datasets of one environment
    python experiments/report.py runs/ablations --collect --name ablations     # packs the folders
    python experiments/report.py docs/results                      # a report of what is packed

Runs of one dataset, offline and online algorithm (and values of --by) are seeds of one another.
Writes report.md with its figures, groups.csv (means and intervals), each.csv (every run) and, of
several offline and online algorithms, transfer.csv. A run that starts from another's checkpoint
(--init-from) shows that one's offline phase, if it is among the runs.

--collect writes <name>.csv.gz (every evaluation episode), and into runs.csv (a line a run) and
metrics.csv.gz (cosine_*, online_kappa, collected) the rows of this experiment in place of those of
the same name. What a folder's files say stands there as it is. `flags` in runs.csv are those that a
command names or that differ between seeds of one another; `seconds` the run's own clock, in older
runs updates, evaluations and environment together. Packed experiments are reported one by one:
collect runs together with those that they start from.
"""

import csv
import gzip
import io
import json
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

NAMES = {"smac": "SMAC", "cal_ql": "Cal-QL", "cql": "CQL", "iql": "IQL", "td3_bc": "TD3+BC"}
NAMES |= {"sac": "SAC", "td3": "TD3", "td3+bc": "TD3+BC", "awr": "AWR"}
# Normalised regret of the paper's Table 1: mean over six environments, 0 the best pair, 1 the worst
PAPER = {
    "IQL": {"AWR": 0.508, "SAC": 0.471, "TD3": 0.653, "TD3+BC": 0.494},
    "SMAC": {"AWR": 0.380, "SAC": 0.031, "TD3": 0.090, "TD3+BC": 0.226},
    "TD3+BC": {"AWR": 0.654, "SAC": 0.962, "TD3": 0.545, "TD3+BC": 0.562},
    "Cal-QL": {"AWR": 0.482, "SAC": 0.448, "TD3": 0.442, "TD3+BC": 0.614},
}
EITHER = (
    "Cal-QL/CQL"  # calibrated on some datasets, as the presets are: one row, the paper's Cal-QL
)
PAPER[EITHER] = PAPER["CQL"] = PAPER["Cal-QL"]
COSINE = "cosine at collected states"
# What two runs may differ in and still be seeds of one another. Some are of earlier versions
NOT_SETTINGS = set("seed resume resumed runs_dir device threads torch_threads compile".split())
NOT_SETTINGS |= set("init_from save_replay track capture_video checkpoint_every keep_every".split())
NOT_SETTINGS |= set("log_every eval_every final_episodes algorithm init_algorithm".split())
NOT_SETTINGS |= set("command commit git_commit torch".split())
# Packed whatever they are: without them a run's curves cannot be read
ALWAYS = "dataset env_id calibrate online_algorithm offline_steps online_steps warmup_steps".split()
MEASURES = ("hand-over", "worst early", "collected early", "last", "best", "gap", "final", "regret")
DEFINITIONS = """Normalized returns, 100 is an expert: mean over seeds [95 % bootstrap interval].
*Hand-over*: before the first online step. *Worst early*: the lowest evaluation up to a fifth of the
online steps after the warm start. *Collected early*: mean of the episodes that the policy itself
collected in that fifth, with exploration; SMAC's evaluations are of the policy's average. *Last*,
*best*: of the online ones. *Gap*: between the run's own best and its mean online evaluation.
*Final*: new episodes. *Regret*: the sum over the online evaluations of R* - R_t, R* being the best
evaluation of any run on the dataset. *Normalised*: regret between the best (0) and the worst (1)
row of the dataset."""


@dataclass
class Args:
    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders or tables, or above them
    out: Path | None = None  # default: runs/report; of tables report/ in their folder
    by: tuple[str, ...] = ()  # flags that make different groups; all: those that differ in a group
    name: str = ""  # the experiment's; with one --by is all if not given
    # Packed experiments that get figures: those that pages show
    figures: tuple[str, ...] = ("table-1", "baselines", "handover", "weights")
    identity_of: tuple[str, ...] = ("table-1",)  # those of them that get that of all cosines
    collect: bool = False  # packs run folders into tables in --out, default docs/results
    machine: str = ""  # of --collect: what the runs ran on


@dataclass(eq=False)
class Run:
    path: Path  # its folder; of packed runs their name
    name: str  # in the tables; one for each run of an experiment
    config: dict
    task: str  # the dataset's name
    episodes: list[dict]  # a row each: phase, step, episode, return, length, score, all as text
    metrics: list[dict]  # a row each: phase, step, name, value; cosines, online_kappa, collected
    experiment: str = ""
    seconds: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict)  # phase: step: mean
    parent: "Run | None" = None  # the run whose checkpoint it started from, if that is here
    variant: str = ""  # what --by tells apart

    def __post_init__(self):
        values = {}
        for row in self.episodes:
            curve = values.setdefault(row["phase"], {})
            curve.setdefault(int(row["step"]), []).append(float(row["score"]))
        for phase, curve in values.items():
            means = {step: float(np.mean(scores)) for step, scores in curve.items()}
            self.curves[phase] = means

    @property
    def offline(self) -> str:
        """Name of the method that pretrained."""
        source = self.config.get("init_from")
        if not source:
            return method_name(self.config) if self.config["offline_steps"] else "none"
        if self.parent:
            return method_name(self.parent.config)
        folder = re.fullmatch(r".+__(\w+)__\d+__\d{8}-\d+b*", Path(source).parent.name)
        if not folder:
            name = self.config.get("init_algorithm", "unknown")
            return "Cal-QL or CQL" if name == "cal_ql" else NAMES.get(name, name)
        return "Cal-QL or CQL" if folder[1] == "cal_ql" else NAMES[folder[1]]

    @property
    def online(self) -> str:
        """Name of the online algorithm; the baselines' scripts have one, their own."""
        if not self.config["online_steps"]:
            return "none"
        name = self.config.get("online_algorithm", "its own")
        return NAMES.get(name, name)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.task, self.offline, self.online, self.variant

    def curve(self, phase: str) -> dict[int, float]:
        run = self.parent if self.parent and phase == "offline" else self
        return run.curves.get(phase, {})


def method_name(config: dict) -> str:
    """As people write it. Without calibration Cal-QL is CQL, as d3rlpy's is here."""
    name = config["algorithm"].removeprefix("d3rlpy-")
    label = NAMES.get(name, name)
    peer = config["algorithm"] != name
    if name == "cal_ql" and (peer or not config.get("calibrate", True)):
        label = "CQL"
    return f"d3rlpy's {label}" if peer else label


# ---- reading
def read_table(path: Path) -> list[dict]:
    """Rows of a table, packed or not."""
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as f:
        return list(csv.DictReader(f))


def read_run(path: Path, by: tuple[str, ...], experiment: str) -> Run | None:
    """The run in a folder; None if a file was cut."""
    try:
        config = json.loads((path / "config.json").read_text())
        task = config["task"]
        if isinstance(task, dict):  # a name in older runs
            config["env_id"] = task["env_id"]
            task = task["env_id"] if "dataset" in by else Path(config["dataset"]).stem
        if config.get("dataset"):
            config["dataset"] = Path(config["dataset"]).name  # without a machine's folders
        config["commit"] = config.get("commit", config.get("git_commit"))
        episodes = read_table(path / "evaluations.csv")
        for row in episodes:
            if "normalized" in row:  # `score` in older runs
                row["score"] = row.pop("normalized")
        metrics = []
        for file in path.glob("metrics.csv*"):
            metrics += read_table(file)
        kept = re.compile(r"cosine_\w+|online_kappa|collected")
        packed = [row for row in metrics if kept.fullmatch(row["name"])]
        seconds = seconds_of(metrics)
        return Run(path, path.name, config, task, episodes, packed, experiment, seconds)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} cannot be read ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def seconds_of(metrics: list[dict]) -> str:
    """The last of a run's clock; older runs have three, of what they do."""
    last = {}
    for row in metrics:
        if row["name"].startswith("seconds"):
            last[row["name"]] = float(row["value"])
    if not last:
        return ""
    return f"{last.get('seconds', sum(last.values())):.0f}"


def read_packed(folder: Path, by: tuple[str, ...]) -> list[Run]:
    """The runs of packed tables, with what runs.csv says in place of a config.json."""
    metrics = {}
    for row in read_table(folder / "metrics.csv.gz"):
        metrics.setdefault((row["experiment"], row["run"]), []).append(row)
    lines = read_table(folder / "runs.csv")
    episodes = {}
    for experiment in dict.fromkeys(line["experiment"] for line in lines):
        for row in read_table(folder / f"{experiment}.csv.gz"):
            episodes.setdefault((experiment, row["run"]), []).append(row)
    runs = []
    for line in lines:
        key = line["experiment"], line["run"]
        config = read_flags(line["flags"]) | dict(seed=int(line["seed"]), commit=line["commit"])
        config["algorithm"], config["init_algorithm"] = line["script"], line["offline"]
        if line["parent"]:
            config["init_from"] = f"{line['parent']}/offline.pt"
        task = line["task"]
        if "dataset" in by:
            task = config.get("env_id", task)
        table = episodes[key], metrics.get(key, [])
        runs.append(Run(Path(line["run"]), line["run"], config, task, *table, key[0]))
    return runs


def read_flags(text: str) -> dict:
    """Of `name=value; name=value`, as flags_of writes it."""
    flags = {}
    for part in text.split("; "):
        name, value = part.split("=", 1)
        try:
            flags[name] = json.loads(value)
        except ValueError:
            flags[name] = value  # text stands there without quotes
    return flags


def name_runs(runs: list[Run], root: Path, taken: set[str]) -> None:
    """A run's name in the tables: its folder's, below the uppermost one, which says what is special
    about it. Folders named by a sweep's flags say what `flags` says."""
    for run in runs:
        parts = run.path.relative_to(root).parts
        if len(parts) > 1 and "=" not in parts[0]:
            run.name = f"{parts[0]}/{run.name}"
        while run.name in taken:
            run.name += "b"
        taken.add(run.name)


def is_packed(folder: Path) -> bool:
    return (folder / "runs.csv").exists() and (folder / "metrics.csv.gz").exists()


def read_all(dirs: tuple[Path, ...], by: tuple[str, ...] = (), name: str = "") -> list[Run]:
    """All runs that can be read, each with the one it started from."""
    runs, n, taken = [], 0, set()
    for folder in dirs:
        if not folder.is_dir():
            sys.exit(f"error: there is no folder {folder}.")
        if is_packed(folder):
            found = read_packed(folder, by)
        else:
            places = [config.parent for config in sorted(folder.rglob("config.json"))]
            places = [place for place in places if (place / "evaluations.csv").exists()]
            found = [read_run(place, by, name) for place in places]
            name_runs(list(filter(None, found)), folder, taken)
        n += len(found)
        runs += filter(None, found)
    finished = [run for run in runs if "final" in run.curves]
    if len(finished) < n:
        print(f"{n - len(finished)} unfinished of {n}", file=sys.stderr)
    for run in runs:
        if run.config.get("init_from"):
            run.parent = find_parent(run, runs)
    return sorted(runs, key=lambda run: (run.key, run.config["seed"], run.name))


def read_runs(dirs: tuple[Path, ...], by: tuple[str, ...] = (), name: str = "") -> list[Run]:
    """All finished runs."""
    runs = [run for run in read_all(dirs, by, name) if "final" in run.curves]
    if not runs:
        sys.exit("error: no finished run there: name folders with run folders in or below them.")
    return runs


def find_parent(run: Run, runs: list[Run]) -> Run | None:
    """The run of its experiment whose checkpoint it started from. Runs of the same second share
    their name: then the folder above decides."""
    folder = Path(run.config["init_from"]).parent
    same = [other for other in runs if other.experiment == run.experiment]
    same = [other for other in same if other.path.name == folder.name]
    same.sort(key=lambda other: other.path.resolve().parts[-2:] != folder.parts[-2:])
    return same[0] if same else None


# ---- packing
def packed_flags(runs: list[Run]) -> dict[Run, list[str]]:
    """Names of the flags that runs.csv has for each run. Those that differ within some group are
    there for all runs of its task, so that a run's can be held against its parent's."""
    groups, names = groups_of(runs), {}
    differ = {run.task: set() for run in runs}
    for group in groups.values():
        differ[group[0].task] |= set(differing(group))
    for group in groups.values():
        given = set(ALWAYS)
        for run in group:
            for word in run.config.get("command", []):
                if word.startswith("--"):
                    name = word.split("=")[0].removeprefix("--").replace("-", "_")
                    given |= {name, name.removeprefix("no_")}
        given |= differ[group[0].task]
        names |= dict.fromkeys(group, sorted(given - NOT_SETTINGS - {"task"}))
    return names


def flags_of(run: Run, names: list[str]) -> str:
    parts = []
    for name in names:
        if run.config.get(name) is not None:
            value = run.config[name]
            parts.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return "; ".join(parts)


def write_table(path: Path, rows: list[dict]) -> None:
    """With nothing in the packed file that differs between two writings, as its time would."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def replace_rows(path: Path, experiment: str, rows: list[dict]) -> None:
    """The rows of an experiment in a table of several."""
    kept = read_table(path) if path.exists() else []
    rows = rows + [row for row in kept if row["experiment"] != experiment]
    write_table(path, sorted(rows, key=lambda row: (row["experiment"], row["run"])))


def collect(args: Args) -> None:
    """Packs run folders."""
    out = args.out or Path("docs/results")
    if not re.fullmatch(r"[\w+.-]+", args.name):
        sys.exit("error: --collect needs a --name of letters, digits, dots and dashes.")
    if any(is_packed(folder) for folder in args.dirs):
        sys.exit("error: --collect packs run folders, and these are tables.")
    runs = read_all(args.dirs, (), args.name)
    if not runs:
        sys.exit("error: no run there: name folders with run folders in or below them.")
    flags = packed_flags(runs)
    lines, episodes, metrics = [], [], []
    for run in sorted(runs, key=lambda run: run.name):
        parent = Path(run.config.get("init_from") or "").parent.name  # of a run elsewhere
        if run.parent:
            parent = run.parent.name
        about = dict(experiment=args.name, run=run.name, script=run.config["algorithm"])
        about |= dict(offline=run.offline, online=run.online, task=run.task)
        about |= dict(seed=run.config["seed"], commit=run.config["commit"])
        about |= dict(parent=parent, flags=flags_of(run, flags[run]))
        lines.append(about | dict(seconds=run.seconds, machine=args.machine))
        algorithm = " to ".join(name for name in (run.offline, run.online) if name != "none")
        about = dict(run=run.name, algorithm=algorithm, task=run.task, seed=run.config["seed"])
        for row in run.episodes:
            values = {name: row[name] for name in "phase step episode return length score".split()}
            episodes.append(about | values)
        about = dict(experiment=args.name, run=run.name)
        for row in run.metrics:
            metrics.append(about | {name: row[name] for name in ("phase", "step", "name", "value")})
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / f"{args.name}.csv.gz", episodes)
    replace_rows(out / "runs.csv", args.name, lines)
    replace_rows(out / "metrics.csv.gz", args.name, metrics)
    print(f"{len(runs)} runs, {len(episodes)} episodes: {out / args.name}.csv.gz")


def groups_of(runs: list[Run]) -> dict[tuple, list[Run]]:
    groups = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    return groups


def setting(run: Run, flag: str) -> str:
    """A flag's value; where pretraining was a run with another one, both, but of online flags."""
    both = (run,) if flag.startswith("online") else (run.parent, run)
    values = [str(one.config.get(flag)) for one in both if one]
    return " then ".join(dict.fromkeys(values))


def differing(group: list[Run]) -> list[str]:
    flags = {flag for run in group for flag in run.config} - NOT_SETTINGS
    return [flag for flag in sorted(flags) if len({setting(run, flag) for run in group}) > 1]


def name_variants(runs: list[Run], by: tuple[str, ...]) -> None:
    """What tells runs apart besides dataset and algorithms: the given flags. With `all` those that
    differ, where their value is not the usual one, which more than half of the runs have."""
    for group in groups_of(runs).values():
        flags = differing(group) if by == ("all",) else [flag.replace("-", "_") for flag in by]
        usual = {}
        for flag in flags:
            value, count = Counter(setting(run, flag) for run in group).most_common(1)[0]
            if by == ("all",) and count > len(group) / 2:
                usual[flag] = value
            if not any(flag in run.config for run in group):
                sys.exit(f"error: --by {flag}: these runs have no such flag.")
        for run in group:
            named = [flag for flag in flags if setting(run, flag) != usual.get(flag)]
            parts = [f"{flag}={setting(run, flag)}" for flag in named]
            run.variant = ", ".join(parts) or ("default" if flags else "")


def doubts(runs: list[Run]) -> list[str]:
    """Where seeds of one another differ in more than the seed, or are the same seed twice."""
    sentences = []
    for key, group in groups_of(runs).items():
        what = differing(group)
        if len({run.config["commit"] for run in group}) > 1:
            what.append("commit")
        for seed, n in Counter(run.config["seed"] for run in group).items():
            if n > 1:
                what.append(f"seed {seed} {n} times")
        if what:
            where = f"{key[0]}, {key[1]} to {key[2]} {key[3]}".strip()
            sentences.append(f"**{where}: seeds differ in {', '.join(what)} as well; see --by.**")
    return sentences


# ---- numbers
def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis (seeds) and its 95 % interval, NaN for one. Same draws each time."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5), axis=0)
    if len(values) == 1:
        low = high = np.full_like(low, np.nan)
    return values.mean(0), low, high


def measure(run: Run, best_of_task: float) -> dict[str, float]:
    """The numbers of one run (DEFINITIONS), as the scripts' last lines have them."""
    final = float(np.mean(list(run.curves["final"].values())))
    online = run.curve("online")
    if not online:  # a pretraining hands over what its last evaluation saw
        offline = list(run.curve("offline").values())
        return {"hand-over": offline[-1], "final": final} if offline else {"final": final}
    warm = run.config["warmup_steps"]
    end_of_early = warm + 0.2 * (run.config["online_steps"] - warm)
    values = list(online.values())
    collected = []
    for row in run.metrics:
        if row["name"] == "collected" and warm < int(row["step"]) <= end_of_early:
            collected.append(float(row["value"]))
    measures = {"collected early": float(np.mean(collected))} if collected else {}
    return measures | {
        "hand-over": values[0],
        "worst early": min(value for step, value in online.items() if step <= end_of_early),
        "last": values[-1],
        "best": max(values),
        "gap": max(values) - float(np.mean(values)),
        "final": final,
        "regret": sum(best_of_task - value for value in values),
    }


def summarize(runs: list[Run]) -> tuple[list[dict], list[dict]]:
    """A row a run, and a row a group with means, intervals and the normalised regret."""
    best = {}
    for run in runs:
        seen = [*run.curve("offline").values(), *run.curve("online").values()]
        best[run.task] = max([best.get(run.task, -np.inf), *seen])
    each, groups = [], []
    for key, group in groups_of(runs).items():
        names = dict(experiment=group[0].experiment)
        names |= dict(zip(("task", "offline", "online", "variant"), key))
        rows = [measure(run, best[run.task]) for run in group]
        for run, row in zip(group, rows):
            each.append(names | dict(seed=run.config["seed"], run=run.name) | row)
        summary = names | dict(seeds=len(rows))
        for name in MEASURES:
            values = [row[name] for row in rows if name in row]
            if values:
                mean, low, high = map(float, bootstrap(np.array(values)))
                summary |= {name: mean, f"{name} low": low, f"{name} high": high}
            if name == "hand-over":
                summary["each hand-over"] = " / ".join(f"{value:.0f}" for value in values)
        groups.append(summary)
    for task in best:
        with_regret = [group for group in groups if group["task"] == task and "regret" in group]
        regrets = [group["regret"] for group in with_regret]
        if len(set(regrets)) > 1:
            for group in with_regret:
                above = group["regret"] - min(regrets)
                group["normalised"] = above / (max(regrets) - min(regrets))
    return each, groups


def transfer_table(groups: list[dict]) -> list[dict]:
    """Mean over the datasets of the normalised regret, for each pair of algorithms."""
    tasks = {}
    for group in groups:
        tasks.setdefault(group["offline"], set()).add(group["task"])
    joint = not tasks.get("CQL", set()) & tasks.get("Cal-QL", set())
    pairs = {}
    for group in groups:
        if "normalised" in group:
            offline = group["offline"]
            if joint and offline in ("CQL", "Cal-QL"):
                offline = EITHER
            pairs.setdefault((offline, group["online"]), []).append(group["normalised"])
    rows = []
    for (offline, online), values in sorted(pairs.items()):
        paper = PAPER.get(offline, {}).get(online, "")
        row = dict(experiment=groups[0]["experiment"], offline=offline, online=online)
        row |= dict(datasets=len(values), paper=paper)
        rows.append(row | {"normalised regret": float(np.mean(values))})
    return rows


# ---- figures
def band(axes, curves: list[dict[int, float]], shift: int, color) -> None:
    """Mean and interval over the curves, at the steps that all of them have."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return
    mean, low, high = bootstrap(np.array([[curve[t] for t in steps] for curve in curves]))
    x = np.array(steps) + shift
    axes.plot(x, mean, ".-", color=color, markersize=4)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def both_phases(axes, group: list[Run], offline, online, color) -> None:
    """Pretraining ends at 0, where the online phase begins."""
    source = group[0].parent or group[0]
    band(axes, offline, -source.config["offline_steps"], color)
    band(axes, online, 0, color)


def panels(n: int, ylabel: str, title: str, sharex: bool = True):
    columns = {4: 2, 8: 4, 16: 4}.get(n, min(n, 3))
    rows = -(-n // columns)
    size = (max(8, 4 * columns), 3.2 * rows + 1.5)
    if columns == 4:
        size = (13, 2.6 * rows + 1.5)
    shape = dict(sharex=sharex, sharey=True, squeeze=False, figsize=size, layout="constrained")
    figure, grid = plt.subplots(rows, columns, **shape)
    for axes in grid.flat[:n]:
        axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(xlabel="offline updates | environment steps", ylabel=ylabel)
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid.flat[n:]:
        axes.axis("off")
    figure.suptitle(f"{title}\ndashed: the hand-over; gray: the warm start, without updates")
    return figure, list(grid.flat)


def shade_warm_start(axes, run: Run) -> None:
    if run.curve("online"):
        axes.axvspan(0, run.config["warmup_steps"], color="gray", alpha=0.15, linewidth=0)


def save(figure, path: Path, colors: dict, title: str) -> None:
    handles = []
    for label, color in colors.items():
        handles.append(plt.Line2D([], [], color=color, marker=".", label=label))
    columns = max(1, int(14 * figure.get_figwidth() / (max(map(len, colors)) + 6)))
    place = dict(loc="outside lower center", ncols=min(columns, len(handles)))
    figure.legend(handles=handles, title=title, **place)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves_figure(runs: list[Run], path: Path) -> None:
    """A panel an online algorithm; where several methods have variants, a panel a pair."""
    split = len({run.variant for run in runs}) > 1
    by_panel, names = {}, set()
    for run in runs:
        title, name = online_title(run), run.offline
        if split:
            title, name = f"{run.offline}, {title}", run.variant
        by_panel.setdefault(title, {}).setdefault(name, []).append(run)
        names.add(name)
    colors = colors_of(names)
    figure, grid = panels(len(by_panel), "normalized return", seeds_title(by_panel))
    for axes, (title, lines) in zip(grid, sorted(by_panel.items())):
        axes.set_title(title)
        for name, group in sorted(lines.items()):
            curves = [[run.curve("offline"), run.curve("online")] for run in group]
            both_phases(axes, group, *zip(*curves), colors[name])
        shade_warm_start(axes, group[0])
    save(figure, path, colors, "variant" if split else "pretrained with")


def handover_figure(runs: list[Run], path: Path) -> None:
    """Of one offline method: a row an online algorithm, a line a variant. What is evaluated is
    SMAC's slow average; what is collected and the cosine are the policy's own."""
    by_row, names = {}, set()
    for run in runs:
        name = run.variant or "default"
        by_row.setdefault(online_title(run), {}).setdefault(name, []).append(run)
        names.add(name)
    colors = colors_of(names)
    columns = {
        "pretraining": lambda group: [run.curve("offline") for run in group],
        "evaluated": lambda group: [run.curve("online") for run in group],
        "collected": lambda group: [collected_curve(group)],
        COSINE: lambda group: [read_cosines(run, "online").get("collected") for run in group],
    }
    columns = {title: read for title, read in columns.items() if any(read(runs))}
    size = (max(7, 3.5 * len(columns)), 2.8 * len(by_row) + 1.6)
    shape = dict(sharex="col", squeeze=False, figsize=size, layout="constrained")
    figure, grid = plt.subplots(len(by_row), len(columns), **shape)
    for row, (online, lines) in zip(grid, sorted(by_row.items())):
        row[0].set_ylabel("normalized return")
        for axes, (title, read) in zip(row, columns.items()):
            for name, group in sorted(lines.items()):
                band(axes, read(group), 0, colors[name])
            axes.grid(alpha=0.3)
            axes.tick_params(labelbottom=True)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if title == "pretraining":
                axes.set(title=title, xlabel="updates")
            else:
                axes.set(title=f"{online}, {title}", xlabel="environment steps")
                shade_warm_start(axes, group[0])
            if title == COSINE:
                axes.set_title(title)
                axes.axhline(0, color="gray", linewidth=0.6)
            elif axes is not row[0]:
                axes.sharey(row[0])
    figure.suptitle(f"{seeds_title(by_row)}\ngray: the warm start, without updates")
    save(figure, path, colors, f"{runs[0].offline}, variant")


def collected_curve(group: list[Run]) -> dict[int, float]:
    """Mean over all episodes that ended between two evaluations, at the step of the second."""
    ends, returns = [], []
    for run in group:
        for row in run.metrics:
            if row["phase"] == "online" and row["name"] == "collected":
                ends.append(int(row["step"]))
                returns.append(float(row["value"]))
    ends, returns = np.array(ends), np.array(returns)
    steps = sorted({step for run in group for step in run.curve("online")})
    curve = {}
    for before, step in zip(steps, steps[1:]):
        between = (before < ends) & (ends <= step)
        if between.any():
            curve[step] = float(returns[between].mean())
    return curve


def online_title(run: Run) -> str:
    titles = {"none": "pretraining only", "its own": "its own online phase"}
    return titles.get(run.online, f"online {run.online}")


def colors_of(names: set[str]) -> dict:
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return dict(zip(sorted(names), palette * len(names)))


def seeds_title(by_panel: dict[str, dict[str, list[Run]]]) -> str:
    groups = [group for lines in by_panel.values() for group in lines.values()]
    counts = sorted({len(group) for group in groups})
    if counts == [1]:
        return f"{groups[0][0].task}: one seed"
    seeds = " or ".join(map(str, counts))
    return f"{groups[0][0].task}: mean and 95 % interval over {seeds} seeds"


def read_cosines(run: Run, phase: str) -> dict[str, dict[int, float]]:
    """name: step: cosine."""
    source = run.parent if run.parent and phase == "offline" else run
    cosines: dict[str, dict[int, float]] = {}
    for row in source.metrics:
        # not `collected`, which is a return
        if row["phase"] == phase and row["name"].startswith("cosine_"):
            curve = cosines.setdefault(row["name"].removeprefix("cosine_"), {})
            curve[int(row["step"])] = float(row["value"])
    return cosines


def identity_figure(runs: list[Run], path: Path) -> bool:
    """A panel a group; false where no run has fitted a score model, as only SMAC does."""
    found = {}
    for run in runs:
        offline, online = read_cosines(run, "offline"), read_cosines(run, "online")
        if run.offline == "SMAC" and (offline or online):
            found.setdefault(run.key, []).append((run, offline, online))
    if not found:
        return False
    title = "Does Q's gradient in the action follow the score? Their cosine, 1 if they are parallel"
    figure, grid = panels(len(found), "cosine", title, sharex=False)
    kinds = {
        "data": ("the dataset's actions", "tab:green"),
        "policy": ("the policy's actions", "tab:blue"),
    }
    kinds["uniform"] = "random actions", "tab:orange"
    kinds["collected"] = "the policy's at collected states", "tab:red"
    shown = {}
    for axes, (key, group) in zip(grid, found.items()):
        pair = f"{key[1]} to {key[2]} {key[3]}".strip()
        seeds = "1 seed" if len(group) == 1 else f"{len(group)} seeds"
        title = textwrap.fill(f"{pair}, {seeds}", 40)
        axes.set_title(f"{key[0]}\n{title}", fontsize=9)
        axes.axhline(0, color="gray", linewidth=0.6)
        shade_warm_start(axes, group[0][0])
        for name, (label, color) in kinds.items():
            offline = [cosines.get(name) for _, cosines, _ in group]
            online = [cosines.get(name) for _, _, cosines in group]
            both_phases(axes, [run for run, _, _ in group], offline, online, color)
            if any(offline + online):
                shown[label] = color
    save(figure, path, shown, "taken at")
    return True


# ---- writing
def write_csv(path: Path, rows: list[dict]) -> None:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = dict(row)
            for name, value in row.items():
                if isinstance(value, float):
                    cells[name] = "" if np.isnan(value) else f"{value:.4f}"
            writer.writerow(cells)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def cell(group: dict, name: str) -> str:
    if name not in group:
        return "–"
    low, high = group[f"{name} low"], group[f"{name} high"]
    interval = "" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]"
    return f"{group[name]:.1f}{interval}"


def figure_name(kind: str, *words: str) -> str:
    return f"{'_'.join(filter(None, (kind, *words)))}.png"


def task_section(task: str, runs: list[Run], groups: list[dict], out: Path, draw: bool) -> list:
    text = [f"## {task}"]
    if draw:
        figure = figure_name("curve", runs[0].experiment, task)
        several = len({run.offline for run in runs}) > 1
        (curves_figure if several else handover_figure)(runs, out / figure)
        text.append(f"![learning curves]({figure})")
    if len({tuple(run.curve("online")) for run in runs if run.curve("online")}) > 1:
        text.append("**Evaluated at different online steps: regrets cannot be compared.**")
    names = ["offline", "online"]
    if any(run.variant for run in runs):
        names.append("variant")
    rows = []
    for group in groups:
        normalised = f"{group['normalised']:.3f}" if "normalised" in group else "–"
        numbers = [str(group["seeds"]), *(cell(group, name) for name in MEASURES)]
        row = [group[name] for name in names]
        rows.append([*row, *numbers, normalised, group["each hand-over"]])
    head = [*names, "seeds", *MEASURES, "normalised regret", "each seed at the hand-over"]
    return [*text, markdown_table(head, rows)]


def transfer_section(pairs: list[dict]) -> list[str]:
    online = sorted({pair["online"] for pair in pairs})
    datasets = max(pair["datasets"] for pair in pairs)
    rows = {}
    for pair in pairs:
        row = rows.setdefault(pair["offline"], dict.fromkeys(online, "–"))
        paper = f"{pair['paper']:.3f}" if pair["paper"] else "–"
        fewer = f", {pair['datasets']} only" if pair["datasets"] < datasets else ""
        row[pair["online"]] = f"{pair['normalised regret']:.3f} ({paper}{fewer})"
    lines = [[offline, *row.values()] for offline, row in rows.items()]
    title = f"## Normalised regret, mean of {datasets} (in brackets the paper's, of its six tasks)"
    return [title, markdown_table(["offline \\ online", *online], lines)]


def experiment_section(runs: list[Run], args: Args, out: Path) -> tuple[list, ...]:
    """Text, and rows of each.csv, groups.csv and transfer.csv."""
    name = runs[0].experiment
    name_variants(runs, args.by or (("all",) if name else ()))
    parents = {run.parent for run in runs}  # shown with the runs that start from them
    runs = [run for run in runs if run not in parents or run.curve("online")]
    runs.sort(key=lambda run: (run.key, run.config["seed"]))
    each, groups = summarize(runs)
    warnings = doubts(runs)
    print("\n".join(warnings), file=sys.stderr)
    text = [f"# {name}", *warnings] if name else warnings
    draw = not is_packed(args.dirs[0]) or name in args.figures
    for task in dict.fromkeys(run.task for run in runs):
        here = [run for run in runs if run.task == task]
        text += task_section(task, here, [g for g in groups if g["task"] == task], out, draw)
    if draw and (not is_packed(args.dirs[0]) or name in args.identity_of):
        figure = figure_name("identity", name)
        if identity_figure(runs, out / figure):
            text.append(f"![identity check]({figure})")
    pairs = transfer_table(groups)
    several = [len({pair[name] for pair in pairs}) > 1 for name in ("offline", "online")]
    if not all(several) or any(run.variant for run in runs):
        return text, each, groups, []
    return text + transfer_section(pairs), each, groups, pairs


def write_report(runs: list[Run], args: Args) -> None:
    packed = any(is_packed(folder) for folder in args.dirs)
    out = args.out or (args.dirs[0] / "report" if packed else Path("runs/report"))
    out.mkdir(parents=True, exist_ok=True)
    text, each, groups, pairs = [], [], [], []
    for experiment in sorted({run.experiment for run in runs}):
        here = [run for run in runs if run.experiment == experiment]
        for rows, more in zip((text, each, groups, pairs), experiment_section(here, args, out)):
            rows += more
    for name, rows in {"each": each, "groups": groups, "transfer": pairs}.items():
        if rows:
            write_csv(out / f"{name}.csv", rows)
    text = [f"# {len(each)} runs", DEFINITIONS, *text]
    (out / "report.md").write_text("\n\n".join(text) + "\n")
    print(f"{len(each)} runs in {len(groups)} groups: {out / 'report.md'}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    plt.switch_backend("Agg")
    if args.collect:
        collect(args)
    else:
        write_report(read_runs(args.dirs, args.by, args.name), args)


if __name__ == "__main__":
    main()
