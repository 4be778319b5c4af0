"""Learning curves, regret and transfer tables from run folders.

    python experiments/report.py runs --out runs/report                          # every finished run below runs/
    python experiments/report.py runs/ablations --by all --out runs/report       # one row for each set of flags
    python experiments/report.py runs/size --by dataset --out runs/report        # the flags to tell runs apart by
    python experiments/report.py runs/table-1 --collect docs/results/table-1     # keep what a report needs, compactly
    python experiments/report.py docs/results/table-1 --out docs/results/table-1/report

Runs with the same task, offline and online algorithm (and values of --by) are seeds of one another. Writes report.md
with its figures, groups.csv (means and intervals), runs.csv (every run) and, of several offline algorithms,
transfer.csv. From what --collect keeps, the same tables come out to the last byte. With rliable: aggregates.csv.

A run that starts from another's checkpoint (--init-from) shows that one's offline phase, if it is among the runs.
"""

import csv
import gzip
import json
import re
import shutil
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

# Normalised regret of the paper's Table 1: mean over its six environments, 0 is the best pair and 1 the worst.
PAPER = {
    "iql": dict(zip(("awr", "sac", "td3", "td3+bc"), (0.508, 0.471, 0.653, 0.494))),
    "smac": dict(zip(("awr", "sac", "td3", "td3+bc"), (0.380, 0.031, 0.090, 0.226))),
    "td3_bc": dict(zip(("awr", "sac", "td3", "td3+bc"), (0.654, 0.962, 0.545, 0.562))),
    "cal_ql": dict(zip(("awr", "sac", "td3", "td3+bc"), (0.482, 0.448, 0.442, 0.614))),
}
# What two runs may differ in and still be seeds of one another.
NOT_SETTINGS = set(
    "seed resume runs_dir device torch_threads compile init_from save_replay track capture_video".split()
)
NOT_SETTINGS |= set("checkpoint_every keep_every log_every algorithm command git_commit torch resumed".split())
MEASURES = ("transfer", "early", "last", "best", "final", "regret")
DEFINITIONS = """Mean over seeds [95 % bootstrap interval of it]. Scores are means over an evaluation's episodes.
*At transfer*: before the first online step. *Early change*: the lowest evaluation after that, up to a fifth of the
online steps after the warm start, minus that at transfer. *Last*, *best*: of the online ones. *Final*: new episodes.
*Regret*: the sum over the online evaluations of R* - R_t, R* being the best evaluation of any run in the environment.
*Normalised*: regret between the best (0) and the worst (1) row of the environment."""


@dataclass
class Args:
    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, or folders with run folders below them
    out: Path | None = None  # folder for the report
    by: tuple[str, ...] = ()  # flags that make different groups; `all`: every one that differs between runs of a group
    collect: Path | None = None  # copy what a report needs of the finished runs to this folder


@dataclass(eq=False)
class Run:
    path: Path
    config: dict
    scores: dict[str, dict[int, float]]  # phase: step: mean over the episodes
    parent: "Run | None" = None  # the run whose checkpoint it started from, if that is here
    variant: str = ""  # what --by tells apart

    @property
    def offline(self) -> str:
        """The algorithm of the offline phase."""
        if not (source := self.config.get("init_from")):
            return self.config["algorithm"] if self.config.get("offline_steps") else "none"
        name = re.fullmatch(r".+__(\w+)__\d+__\d{8}-\d+", Path(source).parent.name)
        return self.parent.config["algorithm"] if self.parent else name[1] if name else "unknown"

    @property
    def online(self) -> str:
        """The algorithm of the online phase; the baselines' scripts have one, their own."""
        return self.config.get("online_algorithm", self.config["algorithm"]) if self.config["online_steps"] else "none"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.config["task"], self.offline, self.online, self.variant

    def curve(self, phase: str) -> dict[int, float]:
        return (self.parent if self.parent and phase == "offline" else self).scores.get(phase, {})


def refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


# ---- reading
def short(value):
    """An absolute path without the machine's part of it: its last three names, a script's own. All else as it is."""
    if isinstance(value, list):
        return [short(v) for v in value]
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if not isinstance(value, str) or not (absolute := re.fullmatch(r"(--[\w-]+=)?(/.+)", value)):
        return value
    names = Path(absolute[2]).parts[-1 if absolute[2].endswith(".py") else -3 :]
    return (absolute[1] or "") + "/".join(names)


def read_run(path: Path) -> Run | None:
    """The run in a folder; None while its last evaluation is not written, or where a file was cut off."""
    scores: dict[str, dict[int, list[float]]] = {}
    try:
        config = {k: short(v) for k, v in json.loads((path / "config.json").read_text()).items()}
        with open(path / "evaluations.csv") as f:
            for row in csv.DictReader(f):
                scores.setdefault(row["phase"], {}).setdefault(int(row["step"]), []).append(float(row["score"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        print(f"{path} cannot be read ({type(e).__name__}: {e})", file=sys.stderr)
        return None
    means = {phase: {t: float(np.mean(x)) for t, x in curve.items()} for phase, curve in scores.items()}
    return Run(path, config, means) if "final" in means else None


def find(folder: Path) -> list[Path]:
    found = [p.parent for p in sorted(folder.rglob("config.json")) if (p.parent / "evaluations.csv").exists()]
    return found or refuse(f"{folder}: no run folder there (one holds config.json and evaluations.csv).")


def read_runs(dirs: tuple[Path, ...]) -> list[Run]:
    """All finished runs, each with the one that it started from, in an order that does not depend on the machine."""
    paths = list(dict.fromkeys(path for folder in dirs for path in find(folder)))
    runs = [run for path in paths if (run := read_run(path))]
    if len(runs) < len(paths):
        print(f"{len(paths) - len(runs)} unfinished of {len(paths)} runs left out", file=sys.stderr)
    for run in (run for run in runs if run.config.get("init_from")):
        folder = Path(run.config["init_from"]).parent
        same = [r for r in runs if r.path.name == folder.name]
        # a name ends in a second, and runs that start in the same one share it: then the folder above decides
        run.parent = next(
            (r for r in same if r.path.resolve().parts[-2:] == folder.parts[-2:]), same[0] if same else None
        )
    return sorted(runs, key=lambda r: (r.key, r.config["seed"], r.path.name, json.dumps(r.config, sort_keys=True)))


def setting(run: Run, flag: str) -> str:
    """A flag's value; where pretraining was a run with another one, both."""
    values = [r.config.get(flag) for r in (run.parent, run) if r]
    return " then ".join(dict.fromkeys(map(str, values)))


def name_variants(runs: list[Run], by: tuple[str, ...]) -> None:
    """Sets what tells runs apart besides task and algorithms: given flags, or those that differ. Of the latter the ones
    are named whose value is not the usual one."""
    for key in {run.key for run in runs}:
        group = [run for run in runs if run.key == key]
        known = {flag for run in group for flag in run.config}
        if unknown := [flag for flag in by if flag != "all" and flag.replace("-", "_") not in known]:
            refuse(f"--by {' '.join(unknown)}: no flag of these runs.")
        flags = [f.replace("-", "_") for f in by] if by != ("all",) else sorted(known - NOT_SETTINGS)
        counts = {f: Counter(setting(run, f) for run in group).most_common() for f in flags}
        if by == ("all",):
            flags = [f for f in flags if len(counts[f]) > 1]
        # of two values that are equally common neither is the usual one
        usual = {f: c[0][0] for f, c in counts.items() if by == ("all",) and (len(c) < 2 or c[0][1] > c[1][1])}
        for run in group:
            named = [f"{f}={setting(run, f)}" for f in flags if setting(run, f) != usual.get(f)]
            run.variant = ", ".join(named) or ("default" if flags else "")


def doubts(runs: list[Run]) -> list[str]:
    """Where runs that count as seeds of one another differ in more than the seed, or are the same seed twice."""
    out = []
    for key in dict.fromkeys(run.key for run in runs):
        group = [run for run in runs if run.key == key]
        flags = {flag for run in group for flag in run.config} - NOT_SETTINGS | {"git_commit"}
        differ = [flag for flag in sorted(flags) if len({setting(run, flag) for run in group}) > 1]
        seeds = Counter(run.config["seed"] for run in group)
        twice = [f"seed {seed} {n} times" for seed, n in seeds.items() if n > 1]
        if differ or twice:
            where = ", ".join(filter(None, (key[0], f"{key[1]} to {key[2]}", key[3])))
            out.append(f"**{where}: not only seeds differ, but {', '.join([*differ, *twice])}; see --by.**")
    return out


# ---- numbers
def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis (seeds) and its 95 % interval, NaN for a single one. The draws are always the same."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5), axis=0)
    nothing = np.full_like(low, np.nan)
    return values.mean(0), *((low, high) if len(values) > 1 else (nothing, nothing))


def measure(run: Run, best: float) -> dict[str, float]:
    """The numbers of one run (DEFINITIONS); `best` is R*."""
    online, final = run.curve("online"), float(np.mean(list(run.scores["final"].values())))
    if not online:  # a pretraining: it transfers what its last evaluation saw
        return dict(transfer=list(run.curve("offline").values())[-1], final=final) if run.curve("offline") else {}
    warm, steps, scores = run.config["warmup_steps"], run.config["online_steps"], list(online.values())
    row = dict(transfer=scores[0], last=scores[-1], best=max(scores), final=final)
    if early := [score for t, score in online.items() if 0 < t <= warm + 0.2 * (steps - warm)]:
        row["early"] = min(early) - scores[0]
    return row | dict(regret=sum(best - score for score in scores))


def summarize(runs: list[Run]) -> tuple[list[dict], list[dict]]:
    """A row a run, and a row a group with means, intervals and the normalised regret."""
    stars = {}
    for run in runs:
        seen = [x for phase in ("offline", "online") for x in run.curve(phase).values()]
        stars[run.key[0]] = max([stars.get(run.key[0], -np.inf), *seen])
    names = ("task", "offline", "online", "variant")
    each = [
        dict(zip(names, run.key)) | dict(seed=run.config["seed"], run=run.path.name) | measure(run, stars[run.key[0]])
        for run in runs
    ]
    groups = []
    for key in dict.fromkeys(run.key for run in runs):
        rows = [row for row in each if tuple(row[k] for k in names) == key]
        group = dict(zip(names, key)) | dict(
            seeds=len(rows), transfers=" / ".join(f"{r['transfer']:.0f}" for r in rows if "transfer" in r)
        )
        for name in MEASURES:
            if values := [row[name] for row in rows if name in row]:
                group |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, bootstrap(np.array(values)))))
        groups.append(group)
    for task in stars:
        regrets = [g["regret"] for g in groups if g["task"] == task and "regret" in g]
        for g in groups:
            if g["task"] == task and "regret" in g and min(regrets) < max(regrets):
                g["normalised"] = (g["regret"] - min(regrets)) / (max(regrets) - min(regrets))
    return each, groups


def transfer_table(groups: list[dict]) -> list[dict]:
    """Mean over the environments of the normalised regret, for each pair of algorithms, and the paper's."""
    pairs = dict.fromkeys((g["offline"], g["online"]) for g in groups if "normalised" in g)
    rows = []
    for offline, online in sorted(pairs):
        values = [
            g["normalised"] for g in groups if (g["offline"], g["online"]) == (offline, online) and "normalised" in g
        ]
        row = dict(offline=offline, online=online, environments=len(values), normalised_regret=float(np.mean(values)))
        paper = PAPER.get(offline, {}).get(online)
        rows.append(row | dict(paper=f"{paper:.3f}" if paper else ""))
    return rows


def aggregates(groups: list[dict], each: list[dict]) -> list[dict]:
    """rliable's interquartile mean and optimality gap of the last scores, of pairs with as many seeds in every task."""
    try:
        from rliable import library, metrics
    except ModuleNotFoundError:
        return []
    except Exception as e:  # it imports much, and one of those may not fit the others
        print(f"rliable is here but cannot be imported ({e}): no aggregates.csv", file=sys.stderr)
        return []
    tasks, scores = sorted({g["task"] for g in groups}), {}
    for offline, online in sorted({(g["offline"], g["online"]) for g in groups}):
        rows = [r for r in each if (r["offline"], r["online"]) == (offline, online) and "last" in r]
        columns = [[r["last"] / 100 for r in rows if r["task"] == task] for task in tasks]
        if len({len(column) for column in columns}) == 1 and len(columns[0]) > 1:
            scores[f"{offline} to {online}"] = np.array(columns).T
    if not scores:
        return []
    both = lambda x: np.array([metrics.aggregate_iqm(x), metrics.aggregate_optimality_gap(x)])  # noqa: E731
    points, intervals = library.get_interval_estimates(scores, both, reps=2000, random_state=np.random.RandomState(0))
    names = ("iqm", "optimality_gap", "iqm_low", "optimality_gap_low", "iqm_high", "optimality_gap_high")
    return [dict(pair=k) | dict(zip(names, map(float, [*points[k], *intervals[k].ravel()]))) for k in scores]


# ---- figures
def band(axes, curves: list[dict[int, float]], shift: int, color, label=None, **style) -> None:
    """Mean and interval over the curves, at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if steps:
        mean, low, high = bootstrap(np.array([[curve[t] for t in steps] for curve in curves]))
        x = np.array(steps) + shift
        axes.plot(x, mean, ".-", color=color, label=label, markersize=4, **style)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def panels(n: int, ylabel: str, title: str):
    columns = 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    size = (max(8, 4 * columns), 3.2 * rows + 1.5)
    figure, grid = plt.subplots(
        rows, columns, sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    for axes in grid.flat[:n]:
        axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(xlabel="offline updates | environment steps", ylabel=ylabel)
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid.flat[n:]:
        axes.axis("off")
    figure.suptitle(f"{title}\ndashed: the hand-over")
    return figure, grid.flat


def save(figure, path: Path, handles: list) -> None:
    columns = max(1, int(14 * figure.get_figwidth() / max(len(h.get_label()) + 6 for h in handles)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves_figure(runs: list[Run], path: Path) -> None:
    """The learning curves of one task, a panel for each online algorithm; where each of several methods has variants,
    a panel for each pair."""
    split = len({run.key[1] for run in runs}) > 1 and len({run.key[3] for run in runs}) > 1
    panel = {run: (run.key[2], run.key[1] if split else "") for run in runs}
    line = {run: run.key[3] if split else ", ".join(filter(None, (run.key[1], run.key[3]))) for run in runs}
    names = sorted(set(line.values()))
    colors = dict(zip(names, plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors * len(names)))
    title = f"{runs[0].key[0]}: mean and 95 % interval over seeds"
    figure, grid = panels(len(set(panel.values())), "D4RL score", title)
    for axes, (online, offline) in zip(grid, sorted(set(panel.values()))):
        what = "pretraining only" if online == "none" else f"online {online}"
        axes.set_title(f"{offline}, {what}" if split else what)
        here = [run for run in runs if panel[run] == (online, offline)]
        if online != "none":
            axes.axvspan(0, max(run.config["warmup_steps"] for run in here), color="gray", alpha=0.15, linewidth=0)
        for name, color in colors.items():
            group = [run for run in here if line[run] == name]
            if before := [run.curve("offline") for run in group if run.curve("offline")]:
                band(axes, before, -max(max(curve) for curve in before), color)
            if group:
                band(axes, [run.curve("online") for run in group], 0, color)
    seeds = Counter((line[run], panel[run]) for run in runs)
    handles = []
    for name, color in colors.items():
        n = sorted({count for key, count in seeds.items() if key[0] == name})
        label = f"{name} ({' or '.join(map(str, n))} seeds)"
        handles.append(plt.Line2D([], [], color=color, marker=".", label=label))
    if any(online != "none" for online, _ in panel.values()):
        handles.append(plt.Rectangle((0, 0), 1, 1, color="gray", alpha=0.15, label="warm start"))
    save(figure, path, handles)


def read_cosines(run: Run, phase: str) -> dict[str, dict[int, float]]:
    """name: step: cosine, of metrics.csv or metrics.csv.gz."""
    source = run.parent if run.parent and phase == "offline" else run
    plain, packed = source.path / "metrics.csv", source.path / "metrics.csv.gz"
    out: dict[str, dict[int, float]] = {}
    if plain.exists() or packed.exists():
        with open(plain) if plain.exists() else gzip.open(packed, "rt") as f:
            for row in csv.DictReader(f):
                if row["phase"] == phase and row["name"].startswith("cosine_"):
                    out.setdefault(row["name"][7:], {})[int(row["step"])] = float(row["value"])
    return out


def identity_figure(runs: list[Run], path: Path) -> bool:
    """Cosine between Q's action gradient and the score, a panel for each group; false where no run logs it. Only
    SMAC's pretraining fits a score model: what a run from another's checkpoint logs is a random network's."""
    found: dict[tuple, list] = {}
    for run in (run for run in runs if run.offline == "smac"):
        cosines = {phase: read_cosines(run, phase) for phase in ("offline", "online")}
        if any(cosines.values()):
            found.setdefault(run.key[1:], []).append(cosines)
    if not found:
        return False
    title = f"{runs[0].key[0]}: cosine of Q's action gradient and the score"
    figure, grid = panels(len(found), "cosine", title)
    colors = dict(data="tab:green", policy="tab:blue", uniform="tab:orange")
    for axes, (key, group) in zip(grid, found.items()):
        name = ", ".join(filter(None, (f"{key[0]} to {key[1]}", key[2]))) + f" ({len(group)} seeds)"
        axes.set_title(textwrap.fill(name, 45), fontsize=10)
        axes.axhline(0, color="gray", linewidth=0.6)
        for name, color in colors.items():
            for phase in ("offline", "online"):
                if curves := [cosines[phase][name] for cosines in group if name in cosines[phase]]:
                    shift = -max(max(curve) for curve in curves) if phase == "offline" else 0
                    band(axes, curves, shift, color)
    save(figure, path, [plt.Line2D([], [], color=c, marker=".", label=f"{k} actions") for k, c in colors.items()])
    return True


# ---- writing
def write_csv(path: Path, rows: list[dict]) -> None:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.4f}" if v == v else "" for k, v in row.items() if isinstance(v, float)}
            writer.writerow(row | numbers)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def cell(group: dict, name: str) -> str:
    if name not in group:
        return "–"
    low, high = group[f"{name}_low"], group[f"{name}_high"]
    return f"{group[name]:.1f}" + (f" [{low:.1f}, {high:.1f}]" if low == low else "")


def write_report(runs: list[Run], out: Path, by: tuple[str, ...]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name_variants(runs, by)
    parents = {run.parent for run in runs}
    runs = sorted((r for r in runs if r not in parents or r.curve("online")), key=lambda r: (r.key, r.config["seed"]))
    each, groups = summarize(runs)
    text = [f"# {len(runs)} runs", DEFINITIONS, *(warnings := doubts(runs))]
    print("\n".join(warnings).replace("**", ""), end="\n" * bool(warnings), file=sys.stderr)
    names = ["offline", "online", *(["variant"] if any(run.variant for run in runs) else [])]
    head = [*names, "seeds", "at transfer", "early change", "last", "best", "final", "regret", "normalised"]
    for task in dict.fromkeys(run.key[0] for run in runs):
        here, rows = [run for run in runs if run.key[0] == task], [g for g in groups if g["task"] == task]
        curves_figure(here, out / f"curve_{task}.png")
        text += [f"## {task}", f"![learning curves](curve_{task}.png)"]
        if len({tuple(run.curve("online")) for run in here if run.curve("online")}) > 1:
            text.append("**The runs were evaluated at different online steps: their regrets cannot be compared.**")
        lines = []
        for g in rows:
            normalised = f"{g['normalised']:.3f}" if "normalised" in g else "–"
            numbers = [cell(g, name) for name in MEASURES]
            lines.append([*(g[name] for name in names), str(g["seeds"]), *numbers, normalised, g["transfers"]])
        text.append(markdown_table([*head, "each seed at transfer"], lines))
        if identity_figure(here, out / f"identity_{task}.png"):
            text.append(f"![identity check](identity_{task}.png)")
    pairs = transfer_table(groups)
    if len({pair["offline"] for pair in pairs}) > 1 and not any(run.variant for run in runs):
        head, first = (sorted({p[k] for p in pairs}) for k in ("online", "offline"))
        n, values = max(p["environments"] for p in pairs), {}
        for p in pairs:
            fewer = f", {p['environments']} only" if p["environments"] < n else ""
            values[p["offline"], p["online"]] = f"{p['normalised_regret']:.3f} ({p['paper'] or '–'}{fewer})"
        text += [
            f"## Normalised regret, mean over {n} environment{'s' * (n > 1)} (in brackets the paper's, over its six)"
        ]
        rows = [[a, *(values.get((a, b), "–") for b in head)] for a in first]
        text.append(markdown_table(["offline \\ online", *head], rows))
        write_csv(out / "transfer.csv", pairs)
    if not any(run.variant for run in runs) and (rows := aggregates(groups, each)):
        write_csv(out / "aggregates.csv", rows)
    write_csv(out / "runs.csv", each)
    write_csv(out / "groups.csv", groups)
    (out / "report.md").write_text("\n\n".join(text) + "\n")
    print(f"{len(runs)} runs in {len(groups)} groups: {out / 'report.md'}")


def collect(dirs: tuple[Path, ...], target: Path) -> None:
    """The files that a report needs, of finished runs, with the machine's part of absolute paths left out."""
    if any(target.resolve().is_relative_to(folder.resolve()) for folder in dirs):
        refuse(f"--collect {target} lies in a folder that it is collected from: its runs would count twice.")
    copied = 0
    for folder in dirs:
        for path in (p for p in find(folder) if read_run(p)):
            below = path.relative_to(folder) if path != folder else Path(path.resolve().name)
            new = target / (folder.resolve().name if len(dirs) > 1 else "") / below
            new.mkdir(parents=True, exist_ok=True)
            config = {k: short(v) for k, v in json.loads((path / "config.json").read_text()).items()}
            (new / "config.json").write_text(json.dumps(config, indent=1))
            for name in ("evaluations.csv", "metrics.csv", "metrics.csv.gz"):
                if name == "metrics.csv" and (path / name).exists() and (path / name).stat().st_size > 100_000:
                    packed = gzip.compress((path / name).read_bytes(), mtime=0)  # without the time: the same bytes
                    (new / f"{name}.gz").write_bytes(packed)
                elif (path / name).exists():
                    shutil.copyfile(path / name, new / name)
            copied += 1
    print(f"{copied} finished runs: {target}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    plt.switch_backend("Agg")
    if not args.out and not args.collect:
        refuse("nothing to do: name a folder with --out or --collect.")
    if args.collect:
        collect(args.dirs, args.collect)
    if args.out:
        runs = read_runs(args.dirs)
        write_report(runs or refuse("no finished run there."), args.out, args.by)


if __name__ == "__main__":
    main()
