"""Learning curves, regret and transfer tables from run folders.

    python experiments/report.py runs                              # all finished runs below runs/
    python experiments/report.py runs/ablations --by all           # a row for each set of flags
    python experiments/report.py runs/size --by dataset            # datasets of one environment

Runs of one dataset, offline and online algorithm (and values of --by) are seeds of one another.
Writes report.md with its figures, groups.csv (means and intervals), runs.csv (every run) and, of
several offline algorithms, transfer.csv. A run that starts from another's checkpoint (--init-from)
shows that one's offline phase, if it is among the runs.
"""

import csv
import gzip
import json
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

NAMES = {"smac": "SMAC", "cal_ql": "Cal-QL", "iql": "IQL", "td3_bc": "TD3+BC"}
NAMES |= {"sac": "SAC", "td3": "TD3", "td3+bc": "TD3+BC", "awr": "AWR"}
# Normalised regret of the paper's Table 1: mean over six environments, 0 the best pair, 1 the worst
PAPER = {
    "IQL": {"AWR": 0.508, "SAC": 0.471, "TD3": 0.653, "TD3+BC": 0.494},
    "SMAC": {"AWR": 0.380, "SAC": 0.031, "TD3": 0.090, "TD3+BC": 0.226},
    "TD3+BC": {"AWR": 0.654, "SAC": 0.962, "TD3": 0.545, "TD3+BC": 0.562},
    "Cal-QL": {"AWR": 0.482, "SAC": 0.448, "TD3": 0.442, "TD3+BC": 0.614},
}
# What two runs may differ in and still be seeds of one another. Some are of earlier versions
NOT_SETTINGS = set("seed resume resumed runs_dir device threads torch_threads compile".split())
NOT_SETTINGS |= set("init_from save_replay track capture_video checkpoint_every keep_every".split())
NOT_SETTINGS |= set("log_every algorithm command commit git_commit torch".split())
MEASURES = ("hand-over", "worst early", "last", "best", "gap", "final", "regret")
DEFINITIONS = """Normalized returns, 100 is an expert: mean over seeds [95 % bootstrap interval].
*Hand-over*: before the first online step. *Worst early*: the lowest evaluation up to a fifth of the
online steps after the warm start. *Last*, *best*: of the online ones. *Gap*: between the run's own
best and its mean online evaluation. *Final*: new episodes. *Regret*: the sum over the online
evaluations of R* - R_t, R* being the best evaluation of any run on the dataset. *Normalised*:
regret between the best (0) and the worst (1) row of the dataset."""


@dataclass
class Args:
    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, or folders above them
    out: Path = Path("runs/report")  # folder for the report
    by: tuple[str, ...] = ()  # flags that make different groups; all: those that differ in a group


@dataclass(eq=False)
class Run:
    path: Path
    config: dict
    curves: dict[str, dict[int, float]]  # phase: step: mean over the episodes
    task: str  # the dataset's name
    parent: "Run | None" = None  # the run whose checkpoint it started from, if that is here
    variant: str = ""  # what --by tells apart

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
            return "unknown"
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
    """As people write it. Without calibration Cal-QL is CQL."""
    name = config["algorithm"].removeprefix("d3rlpy-")
    label = NAMES.get(name, name)
    if name == "cal_ql" and not config.get("calibrate", True):
        label = "CQL"
    return f"d3rlpy's {label}" if config["algorithm"] != name else label


# ---- reading
def read_run(path: Path, by: tuple[str, ...]) -> Run | None:
    """The run in a folder; None while its last evaluation is not written, or if a file was cut."""
    results = {}  # phase: step: one of each episode, then their mean
    try:
        config = json.loads((path / "config.json").read_text())
        with open(path / "evaluations.csv", newline="") as f:
            for row in csv.DictReader(f):
                value = row["normalized"] if "normalized" in row else row["score"]  # older runs
                curve = results.setdefault(row["phase"], {})
                curve.setdefault(int(row["step"]), []).append(float(value))
        task = config["task"]
        if isinstance(task, dict):  # a name in older runs
            task = task["env_id"] if "dataset" in by else Path(config["dataset"]).stem
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} cannot be read ({type(error).__name__}: {error})", file=sys.stderr)
        return None
    if "final" not in results:
        return None
    for curve in results.values():
        curve.update({step: float(np.mean(values)) for step, values in curve.items()})
    return Run(path, config, results, task)


def read_runs(dirs: tuple[Path, ...], by: tuple[str, ...] = ()) -> list[Run]:
    """All finished runs, each with the one it started from."""
    runs = {}
    for folder in dirs:
        if not folder.is_dir():
            sys.exit(f"error: there is no folder {folder}.")
        for config in sorted(folder.rglob("config.json")):
            if (config.parent / "evaluations.csv").exists():
                runs[config.parent] = read_run(config.parent, by)
    finished = [run for run in runs.values() if run]
    if len(finished) < len(runs):
        print(f"{len(runs) - len(finished)} unfinished of {len(runs)} left out", file=sys.stderr)
    if not finished:
        sys.exit("error: no finished run there: name folders with run folders in or below them.")
    for run in finished:
        if run.config.get("init_from"):
            run.parent = find_parent(Path(run.config["init_from"]).parent, finished)
    return sorted(finished, key=lambda run: (run.key, run.config["seed"], run.path.name))


def find_parent(folder: Path, runs: list[Run]) -> Run | None:
    """The run of that folder. Runs of the same second share its name: the folder above decides."""
    same = [run for run in runs if run.path.name == folder.name]
    same.sort(key=lambda run: run.path.resolve().parts[-2:] != folder.parts[-2:])
    return same[0] if same else None


def groups_of(runs: list[Run]) -> dict[tuple, list[Run]]:
    groups = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    return groups


def setting(run: Run, flag: str) -> str:
    """A flag's value; where pretraining was a run with another one, both."""
    values = [str(one.config.get(flag)) for one in (run.parent, run) if one]
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
        if len({run.config.get("commit", run.config.get("git_commit")) for run in group}) > 1:
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
    return {
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
        names = dict(zip(("task", "offline", "online", "variant"), key))
        rows = [measure(run, best[run.task]) for run in group]
        for run, row in zip(group, rows):
            each.append(names | dict(seed=run.config["seed"], run=run.path.name) | row)
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
    pairs = {}
    for group in groups:
        if "normalised" in group:
            pairs.setdefault((group["offline"], group["online"]), []).append(group["normalised"])
    rows = []
    for (offline, online), values in sorted(pairs.items()):
        paper = PAPER.get(offline, {}).get(online, "")
        row = dict(offline=offline, online=online, datasets=len(values), paper=paper)
        rows.append(row | {"normalised regret": float(np.mean(values))})
    return rows


# ---- figures
def band(axes, curves: list[dict[int, float]], shift: int, color) -> None:
    """Mean and interval over the curves, at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return
    mean, low, high = bootstrap(np.array([[curve[t] for t in steps] for curve in curves]))
    x = np.array(steps) + shift
    axes.plot(x, mean, ".-", color=color, markersize=4)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def both_phases(axes, offline, online, color) -> None:
    """Pretraining ends at 0, where the online phase begins."""
    offline = [curve for curve in offline if curve]
    online = [curve for curve in online if curve]
    if offline:
        band(axes, offline, -max(max(curve) for curve in offline), color)
    if online:
        band(axes, online, 0, color)


def panels(n: int, ylabel: str, title: str):
    columns = 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    size = (max(8, 4 * columns), 3.2 * rows + 1.5)
    shape = dict(sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained")
    figure, grid = plt.subplots(rows, columns, **shape)
    for axes in grid.flat[:n]:
        axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(xlabel="offline updates | environment steps", ylabel=ylabel)
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid.flat[n:]:
        axes.axis("off")
    figure.suptitle(f"{title}\ndashed: the hand-over; gray: the warm start")
    return figure, list(grid.flat)


def save(figure, path: Path, colors: dict) -> None:
    handles = []
    for label, color in colors.items():
        handles.append(plt.Line2D([], [], color=color, marker=".", label=label))
    columns = max(1, int(14 * figure.get_figwidth() / (max(map(len, colors)) + 6)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves_figure(runs: list[Run], path: Path) -> None:
    """A panel an online algorithm; where several methods have variants, a panel a pair."""
    split = len({run.offline for run in runs}) > 1 and len({run.variant for run in runs}) > 1
    by_panel, names = {}, set()
    for run in runs:
        title = "pretraining only" if run.online == "none" else f"online {run.online}"
        name = ", ".join(filter(None, (run.offline, run.variant)))
        if split:
            title, name = f"{run.offline}, {title}", run.variant
        by_panel.setdefault(title, {}).setdefault(name, []).append(run)
        names.add(name)
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    colors = dict(zip(sorted(names), palette * len(names)))
    seeds = sorted({len(group) for lines in by_panel.values() for group in lines.values()})
    title = f"{runs[0].task}: mean and 95 % interval over {' or '.join(map(str, seeds))} seeds"
    figure, grid = panels(len(by_panel), "normalized return", title)
    for axes, (title, lines) in zip(grid, sorted(by_panel.items())):
        axes.set_title(title)
        for name, group in sorted(lines.items()):
            curves = [[run.curve("offline"), run.curve("online")] for run in group]
            both_phases(axes, *zip(*curves), colors[name])
        if group[0].online != "none":
            axes.axvspan(0, group[0].config["warmup_steps"], color="gray", alpha=0.15, linewidth=0)
    save(figure, path, colors)


def read_cosines(run: Run, phase: str) -> dict[str, dict[int, float]]:
    """name: step: cosine, of metrics.csv or metrics.csv.gz."""
    folder = run.parent.path if run.parent and phase == "offline" else run.path
    plain, packed = folder / "metrics.csv", folder / "metrics.csv.gz"
    cosines: dict[str, dict[int, float]] = {}
    if not plain.exists() and not packed.exists():
        return cosines
    with open(plain) if plain.exists() else gzip.open(packed, "rt") as f:
        for row in csv.DictReader(f):
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
            found.setdefault(run.key, []).append((offline, online))
    if not found:
        return False
    title = f"{runs[0].task}: cosine of Q's action gradient and the score"
    figure, grid = panels(len(found), "cosine", title)
    colors = {"data": "tab:green", "policy": "tab:blue", "uniform": "tab:orange"}
    colors["collected"] = "tab:red"  # the policy's actions at collected states
    for axes, (key, group) in zip(grid, found.items()):
        title = f"{key[1]} to {key[2]} {key[3]} ({len(group)} seeds)"
        axes.set_title(textwrap.fill(title, 45), fontsize=10)
        axes.axhline(0, color="gray", linewidth=0.6)
        for name, color in colors.items():
            curves = [[phase.get(name) for phase in cosines] for cosines in group]
            both_phases(axes, *zip(*curves), color)
    save(figure, path, {f"cosine_{name}": color for name, color in colors.items()})
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


def task_section(task: str, runs: list[Run], groups: list[dict], out: Path) -> list[str]:
    curves_figure(runs, out / f"curve_{task}.png")
    text = [f"## {task}", f"![learning curves](curve_{task}.png)"]
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
    text.append(markdown_table(head, rows))
    if identity_figure(runs, out / f"identity_{task}.png"):
        text.append(f"![identity check](identity_{task}.png)")
    return text


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


def write_report(runs: list[Run], out: Path, by: tuple[str, ...]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name_variants(runs, by)
    parents = {run.parent for run in runs}  # shown with the runs that start from them
    runs = [run for run in runs if run not in parents or run.curve("online")]
    runs.sort(key=lambda run: (run.key, run.config["seed"]))
    each, groups = summarize(runs)
    warnings = doubts(runs)
    print("\n".join(warnings), file=sys.stderr)
    text = [f"# {len(runs)} runs", DEFINITIONS, *warnings]
    for task in dict.fromkeys(run.task for run in runs):
        here = [run for run in runs if run.task == task]
        text += task_section(task, here, [g for g in groups if g["task"] == task], out)
    pairs = transfer_table(groups)
    if len({pair["offline"] for pair in pairs}) > 1 and not any(run.variant for run in runs):
        text += transfer_section(pairs)
        write_csv(out / "transfer.csv", pairs)
    write_csv(out / "runs.csv", each)
    write_csv(out / "groups.csv", groups)
    (out / "report.md").write_text("\n\n".join(text) + "\n")
    print(f"{len(runs)} runs in {len(groups)} groups: {out / 'report.md'}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    plt.switch_backend("Agg")
    write_report(read_runs(args.dirs, args.by), args.out, args.by)


if __name__ == "__main__":
    main()
