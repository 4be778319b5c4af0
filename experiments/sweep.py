"""Runs a grid of scripts, tasks, online algorithms and seeds, on this machine's cores and GPUs or on a Ray cluster.

    python experiments/sweep.py experiments/sweeps/smoke.toml                    # two tiny runs: is all installed?
    python experiments/sweep.py experiments/sweeps/ablations.toml --jobs 4       # at most four runs at a time
    python experiments/sweep.py experiments/sweeps/paper-table-1.toml --gpus 0 1 --jobs 6 --dry-run
    python experiments/sweep.py --grid script=smac_offline_to_online.py,iql.py seed=0,1,2 online-algorithm=sac,td3
    python experiments/sweep.py experiments/sweeps/transfer-embedded.toml --ray-address auto --gpus-per-run 0.25

A file's tables are groups of runs; a list is a flag with several values, and every combination is a run (a flag that
takes several words is a list in the list: `critic-hidden = [[256, 256]]`). What stands above the tables holds for all.
`script` is smac_offline_to_online.py unless given. `init-from = "{pretrain}/offline.pt"` makes a group that starts from
each run of the group `pretrain`: it takes over that run's task, seed and dataset.

Each run has the folder <runs_dir>/<group>/<settings>/, with its output in log.txt. The same command again goes on where
the last one stopped: finished runs are skipped, cut ones resumed from last.pt. <runs_dir>/status.csv has the state.
Ctrl-C (or SIGTERM) lets every run save itself first.
"""

import csv
import fcntl
import hashlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

ROOT = Path(__file__).resolve().parent.parent
INHERITED = ("task", "seed", "dataset")  # by a run from the one whose checkpoint it starts from


@dataclass
class Args:
    file: Annotated[Path | None, tyro.conf.Positional] = None  # TOML file; without one, --grid is all
    grid: tuple[str, ...] = ()  # flag=value,value ...: a grid, or with a file in place of its values in every group
    runs_dir: Path | None = None  # where the runs' folders are (default: the file's runs_dir, or runs/sweep)
    jobs: int = 0  # runs at a time (0: one a core, or one a GPU with --gpus)
    gpus: tuple[str, ...] = ()  # share these out among the runs, by CUDA_VISIBLE_DEVICES
    dry_run: bool = False  # print the commands only
    ray_address: str | None = None  # auto: the Ray cluster this machine is in; local: Ray on this machine; or host:port
    cpus_per_run: float = 1.0  # with Ray: what a run asks for
    gpus_per_run: float = 0.0  # with Ray: what a run asks for; 0.25 puts four runs on a GPU
    retries: int = 3  # with Ray: new attempts after a machine was lost


@dataclass(frozen=True, eq=False)
class Job:
    group: str
    folder: Path  # holds log.txt and the run folder that the script makes
    script: str
    flags: dict  # flag: value, in the order of the file
    parent: "Job | None" = None  # the job whose checkpoint it starts from
    checkpoint: str = ""  # which one

    @property
    def name(self) -> str:
        return f"{self.group}/{self.folder.name}"


def refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


# ---- from settings to jobs
def read_grid(words: tuple[str, ...]) -> dict[str, list]:
    """--grid's flag=value,value ...; a value with a space in it is one of several words."""
    grid = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not values:
            refuse(f"--grid {word}: flag=value or flag=value,value is needed.")
        flag = {"true": True, "false": False}
        grid[key.replace("_", "-")] = [v.split() if " " in v else flag.get(v, v) for v in values.split(",")]
    return grid


def read_groups(args: Args) -> tuple[Path, dict[str, dict]]:
    """runs_dir, and the flags of every group with the value, or the list of values, that each takes."""
    try:
        content = tomllib.loads(args.file.read_text()) if args.file else {"runs": {}}
    except (OSError, ValueError) as e:
        refuse(f"{args.file} cannot be read as a TOML file ({e}).")
    runs_dir, given, groups = content.pop("runs_dir", "runs/sweep"), read_grid(args.grid), {}
    shared = {k: v for k, v in content.items() if not isinstance(v, dict)}
    for group in (k for k in content if k not in shared):
        own = {k.replace("_", "-"): v for k, v in content[group].items()}
        groups[group] = {k.replace("_", "-"): v for k, v in shared.items()} | own | given
        if isinstance(own.get("init-from"), list):
            refuse(f"[{group}] init-from takes one value: make a group for each.")
        if str(own.get("init-from", "")).startswith("{"):
            if twice := [k for k in INHERITED if k in own]:
                refuse(f"[{group}] takes {', '.join(twice)} from the runs it starts from: leave it out there.")
            groups[group] = {k: v for k, v in groups[group].items() if k not in INHERITED}
    return args.runs_dir or Path(runs_dir), groups


def words(flags: dict) -> list[str]:
    """The command line of these flags: true is --flag, false --no-flag, a list several words."""
    out = []
    for flag, value in flags.items():
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            out += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return out


def folder_name(script: str, flags: dict, parent: Job | None) -> str:
    """All the settings, readable; where that is too long for a file system, cut and closed with a hash of the whole."""
    first = [k for k in ("task", "seed", "online-algorithm") if k in flags]
    parts = [Path(script).stem, *(str(flags[k]) for k in first), *([f"from={parent.folder.name}"] if parent else [])]
    others = sorted(flags.keys() - set(first))
    whole = "__".join(parts + [f"{k}={' '.join(words({k: flags[k]})[1:]) or flags[k]}" for k in others])
    name = re.sub(r"[^\w.+=-]+", "-", whole).removesuffix("-")
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha1(whole.encode()).hexdigest()[:8]}"


def expand(runs_dir: Path, groups: dict[str, dict]) -> list[Job]:
    """Every combination of every group. A job comes after the one that it starts from."""
    jobs: dict[str, list[Job]] = {}
    for group, settings in groups.items():
        parents, checkpoint, jobs[group] = [None], "", []
        if depends := re.fullmatch(r"\{(.+)\}/(.+)", str(settings.get("init-from", ""))):
            other, checkpoint = depends.groups()
            if other not in jobs or other == group:
                refuse(f"[{group}] starts from [{other}], and no such group stands above it.")
            parents, settings = jobs[other], {k: v for k, v in settings.items() if k != "init-from"}
        axes = {"script": "smac_offline_to_online.py"} | settings
        axes = {k: v if isinstance(v, list) else [v] for k, v in axes.items()}
        for parent, values in itertools.product(parents, itertools.product(*axes.values())):
            flags = dict(zip(axes, values))
            script = str(flags.pop("script"))
            if not (ROOT / script).is_file():
                refuse(f"[{group}] script {script}: no such file in {ROOT}.")
            flags = ({k: parent.flags[k] for k in INHERITED if k in parent.flags} if parent else {}) | flags
            folder = runs_dir / re.sub(r"[^\w.+=-]+", "-", group) / folder_name(script, flags, parent)
            jobs[group].append(Job(group, folder, script, flags, parent, checkpoint))
    every = [job for group in jobs.values() for job in group]
    names = [job.folder for job in every]
    if twice := next((n for n in names if names.count(n) > 1), None):
        refuse(f"Two runs would share {twice}: a value is given twice, or [[256, 256]] is written [256, 256].")
    if not every:
        refuse("No runs: name a TOML file, or a grid such as --grid seed=0,1,2.")
    return every


# ---- a job and its folder
def finished(job: Job) -> Path | None:
    """The run folder whose last evaluation, `final`, is written to its last line's end."""
    found = ((p, p.read_text()) for p in sorted(job.folder.glob("*/evaluations.csv")))
    return next((p.parent for p, text in found if ",final," in text and text.endswith("\n")), None)


def final_score(job: Job) -> str:
    if (run := finished(job)) is None:
        return ""
    scores = [float(r["score"]) for r in csv.DictReader((run / "evaluations.csv").open()) if r["phase"] == "final"]
    return f"{sum(scores) / len(scores):.1f}"


def command(job: Job) -> list[str]:
    """What starts the job, or goes on with it: a resumed run brings its own flags."""
    start = [sys.executable, str(ROOT / job.script)]
    if cut := sorted(job.folder.glob("*/last.pt"), key=lambda p: p.stat().st_mtime):
        return [*start, "--resume", str(cut[-1].parent)]
    source = {}
    if job.parent:
        source = {"init-from": str((finished(job.parent) or job.parent.folder / "RUN") / job.checkpoint)}
    return [*start, *words(job.flags | source | {"runs-dir": str(job.folder)})]


def spawn(job: Job, gpu: str | None = None) -> subprocess.Popen | None:
    """Starts the job. None while a run of it is alive, e.g. of a sweep that was killed: its log is locked so long, for
    the run inherits the lock with its output."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "log.txt", "a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        line = command(job)
        print(f"$ {shlex.join(line)}", file=log, flush=True)
        pipes = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        # a session of its own: Ctrl-C reaches it once, through us, and not a second time from the terminal
        return subprocess.Popen(line, env=environment, start_new_session=True, **pipes)


class Local:
    """This machine: at most `jobs` runs at a time, on the GPU that has the fewest."""

    def __init__(self, args: Args):
        self.jobs, self.gpus = args.jobs or len(args.gpus) or os.cpu_count() or 1, args.gpus
        self.running: dict[Job, tuple[subprocess.Popen, str | None]] = {}
        self.elsewhere: set[Job] = set()

    def start(self, job: Job) -> bool:
        used = [gpu for _, gpu in self.running.values()]
        gpu = min(self.gpus, key=used.count, default=None)
        if len(self.running) < self.jobs:
            if child := spawn(job, gpu):
                self.running[job] = child, gpu
            elif job not in self.elsewhere:
                self.elsewhere.add(job)
                print(f"waiting   {job.name}: another process runs it", flush=True)
        return job in self.running

    def ended(self) -> list[tuple[Job, int]]:
        time.sleep(0.2)
        codes = [(job, child.poll()) for job, (child, _) in self.running.items()]
        done = [(job, code) for job, code in codes if code is not None]
        self.running = {job: child for job, child in self.running.items() if job not in dict(done)}
        return done

    def interrupt(self) -> None:
        for child, _ in self.running.values():
            child.send_signal(signal.SIGINT)


def run_to_end(job: Job, cwd: str) -> int:
    """A job inside a Ray worker. Cancelled, it lets the run save itself; tried again, it waits for one left behind."""
    os.chdir(cwd)
    child = None
    try:
        while finished(job) is None and (child := spawn(job)) is None:
            time.sleep(5)
        while child and child.poll() is None:  # in short sleeps: Ray's cancel cannot break into a long wait
            time.sleep(0.2)
    except KeyboardInterrupt:
        if child:
            child.send_signal(signal.SIGINT)
            child.wait()
    return child.returncode if child else 0


class Ray:
    """A Ray cluster. All machines see runs_dir, the code and the datasets under the same paths."""

    def __init__(self, args: Args):
        try:
            import ray
        except ImportError:
            refuse("--ray-address needs Ray, which is not installed: pip install ray.")
        local = args.ray_address == "local"
        try:
            ray.init(None if local else args.ray_address, num_cpus=(args.jobs or None) if local else None)
        except Exception as e:  # whatever Ray raises when it finds no cluster
            refuse(f"--ray-address {args.ray_address}: no Ray there ({type(e).__name__}: {str(e).splitlines()[0]}).")
        self.ray, self.running = ray, {}
        options = dict(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=args.retries)
        self.task = ray.remote(**options)(run_to_end)

    def start(self, job: Job) -> bool:
        self.running[job] = self.task.remote(job, os.getcwd())
        return True

    def ended(self) -> list[tuple[Job, int]]:
        refs = {ref: job for job, ref in self.running.items()}
        done = []
        for ref in self.ray.wait(list(refs), num_returns=len(refs), timeout=0.5)[0] if refs else ():
            try:
                code = self.ray.get(ref)
            except Exception as e:  # cancelled before its start, or lost with its machine more often than retried
                print(f"{refs[ref].name}: {type(e).__name__}", file=sys.stderr)
                code = 1
            done.append((refs[ref], code))
            del self.running[refs[ref]]
        return done

    def interrupt(self) -> None:
        for ref in self.running.values():
            self.ray.cancel(ref)


# ---- all jobs
def table(jobs: list[Job], status: dict[Job, str], codes: dict, seconds: dict) -> list[dict]:
    rows = []
    for job in jobs:
        row = dict(status=status[job], exit_code=codes.get(job, ""), seconds=round(max(0, seconds.get(job, 0))))
        score = final_score(job) if status[job] == "finished" else ""
        rows.append(row | dict(score=score, run=job.name, log=str(job.folder / "log.txt")))
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".tmp"), "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path.with_suffix(".tmp"), path)
    except OSError as e:
        print(f"{path} cannot be written ({e}); the runs go on.", file=sys.stderr)


def sweep(jobs: list[Job], machine: Local | Ray, path: Path) -> list[dict]:
    """Runs what is missing. One that fails costs those that start from its checkpoint, and no others."""
    status = {job: "finished" if finished(job) else "waiting" for job in jobs}
    print(f"{len(jobs)} runs, {sum(s == 'finished' for s in status.values())} finished before", flush=True)
    codes, seconds, signals, passed_on = {}, {}, [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: signals.append(1))
    while True:
        if len(signals) > passed_on:
            again = " (once more: they stop at once)" if passed_on == 0 else ""
            print(f"stopping: the runs save themselves{again}", flush=True)
            machine.interrupt()
            passed_on = len(signals)
        for job in [job for job in jobs if status[job] == "waiting" and not signals]:
            before = status[job.parent] if job.parent else "finished"
            if before in ("failed", "blocked"):
                status[job] = "blocked"
            elif before == "finished" and finished(job):  # by another sweep, meanwhile
                status[job] = "finished"
            elif before == "finished":
                try:
                    if machine.start(job):
                        status[job], seconds[job] = "running", -time.monotonic()
                        print(f"start     {job.name}", flush=True)
                except OSError as e:  # a full disk, say
                    status[job] = "failed"
                    print(f"failed    {job.name}  {e}", flush=True)
        for job, code in machine.ended():
            codes[job], seconds[job] = code, seconds[job] + time.monotonic()
            done = code == 0 and finished(job)  # also one that was done before the signal reached it
            status[job] = "finished" if done else "stopped" if signals else "failed"
            why = f"score {final_score(job)}" if done else f"exit code {code}, see {job.folder / 'log.txt'}"
            print(f"{status[job]:<9} {job.name}  {seconds[job]:.0f} s, {why}", flush=True)
            write_csv(path, table(jobs, status, codes, seconds))
        if "running" not in status.values() and (signals or "waiting" not in status.values()):
            write_csv(path, rows := table(jobs, status, codes, seconds))
            return rows


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.jobs < 0:
        refuse("--jobs: 1 or more, or 0 for one a core.")
    runs_dir, groups = read_groups(args)
    jobs = expand(runs_dir, groups)
    if args.dry_run:
        for job in jobs:
            print(f"# finished: {job.name}" if finished(job) else shlex.join(command(job)))
        return
    rows = sweep(jobs, Ray(args) if args.ray_address else Local(args), runs_dir / "status.csv")
    print("\n".join(f"{r['status']:<9}{r['exit_code']:>5}{r['seconds']:>8} s{r['score']:>8}  {r['run']}" for r in rows))
    states = [r["status"] for r in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    print(f"{counts}; {runs_dir / 'status.csv'}")
    if set(states) != {"finished"}:
        print(f"To go on: python {shlex.join(sys.argv)}")
    sys.exit(130 if {"stopped", "waiting"} & set(states) else 0 if set(states) == {"finished"} else 1)


if __name__ == "__main__":
    main()
