"""Runs a grid of scripts, datasets, flags and seeds on this machine, one core a run.

    python experiments/sweep.py experiments/sweeps/smoke.toml              # tiny: is all installed?
    python experiments/sweep.py experiments/sweeps/ablations.toml --jobs 4
    python experiments/sweep.py experiments/sweeps/paper-table-1.toml --gpus 0 1 --jobs 6 --dry-run
    python experiments/sweep.py experiments/sweeps/default.toml --grid seed=0,1 compile=false

A table of the file is a group of runs. A list is a flag with several values, and every combination
is a run (several words for one flag are a list in the list: `critic-hidden = [[256, 256]]`). What
stands above the tables holds for all; --grid replaces it everywhere. `script` is
smac_offline_to_online.py unless given. `init-from = "{pretrain}/offline.pt"` starts from each run
of the table `pretrain`, with its seed and dataset.

A run has the folder <runs_dir>/<table>/<flags that vary>/, with its output in log.txt. The same
command again goes on: finished runs are skipped, cut ones resumed. Ctrl-C (or SIGTERM) lets every
run save itself. <runs_dir>/status.csv has the state.
"""

import csv
import fcntl
import itertools
import json
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
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
INHERITED = ("seed", "dataset")  # by a run from the one whose checkpoint it starts from


@dataclass
class Args:
    file: Annotated[Path, tyro.conf.Positional]  # TOML file
    grid: tuple[str, ...] = ()  # flag=value,value ...: in place of the file's values in all tables
    runs_dir: Path | None = None  # default: the file's runs_dir
    jobs: int = os.cpu_count() or 1  # runs at a time
    gpus: tuple[str, ...] = ()  # share these out among the runs, by CUDA_VISIBLE_DEVICES
    dry_run: bool = False  # print the commands only


@dataclass(eq=False)
class Job:
    table: str
    folder: Path  # holds log.txt and the run folder that the script makes
    script: str
    flags: dict
    parent: "Job | None"  # the job whose checkpoint it starts from
    checkpoint: str  # which one
    status: str = "waiting"  # then running; finished, failed, stopped, or blocked by its parent
    process: subprocess.Popen | None = None
    gpu: str | None = None
    started: float = 0.0
    seconds: float = 0.0
    elsewhere: bool = False  # another process runs it

    @property
    def name(self) -> str:
        return f"{self.table}/{self.folder.name}"


# ---- from the file to jobs
def read_grid(words: tuple[str, ...]) -> dict[str, list]:
    """--grid's flag=value,value; a value with a space in it is one of several words."""
    grid = {}
    for word in words:
        flag, _, values = word.partition("=")
        if not values:
            sys.exit(f"error: --grid {word}: write flag=value or flag=value,value.")
        several = grid.setdefault(flag.replace("_", "-"), [])
        for value in values.split(","):
            if value in ("true", "false"):
                several.append(value == "true")
            else:
                several.append(value.split() if " " in value else value)
    return grid


def expand(args: Args) -> list[Job]:
    """Every combination of every table. A job comes after the one that it starts from."""
    try:
        content = tomllib.loads(args.file.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {args.file} cannot be read as a TOML file ({error}).")
    runs_dir = args.runs_dir or Path(content.pop("runs_dir", "runs/sweep"))
    shared = {flag: value for flag, value in content.items() if not isinstance(value, dict)}
    grid = read_grid(args.grid)
    jobs: dict[str, list[Job]] = {}
    for table, own in content.items():
        if table in shared:
            continue
        settings = {"script": "smac_offline_to_online.py"} | shared | own | grid
        parents, checkpoint = [None], ""
        placeholder = re.fullmatch(r"\{(.+)\}/(.+)", str(own.get("init-from", "")))
        if placeholder:
            before, checkpoint = placeholder.groups()
            if before not in jobs:
                sys.exit(f"error: [{table}] starts from [{before}]: move that table above it.")
            for flag in INHERITED:
                if flag in own:
                    sys.exit(f"error: [{table}] takes {flag} from [{before}]: leave it out there.")
                settings.pop(flag, None)
            settings.pop("init-from")
            parents = jobs[before]
        jobs[table] = []
        for parent in parents:
            for flags in combinations(settings):
                vary = [flag for flag in flags if is_varied(settings[flag])]
                folder = runs_dir / table / folder_name(flags, vary, parent)
                script = flags.pop("script")
                for flag in INHERITED:
                    if parent and flag in parent.flags:
                        flags[flag] = parent.flags[flag]
                jobs[table].append(Job(table, folder, script, flags, parent, checkpoint))
    every = [job for group in jobs.values() for job in group]
    check(every)
    return every


def is_varied(value) -> bool:
    return isinstance(value, list) and len(value) > 1


def combinations(settings: dict) -> list[dict]:
    axes = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [dict(zip(settings, values)) for values in itertools.product(*axes)]


def folder_name(flags: dict, vary: list[str], parent: Job | None) -> str:
    """The values that vary within the table: script and dataset by their stem alone."""
    parts = [parent.folder.name] if parent else []
    for flag in vary:
        value = flags[flag]
        if flag in ("script", "dataset"):
            parts.append(Path(value).stem.removesuffix("_offline_to_online"))
        else:
            value = "-".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"{flag}={value}")
    return re.sub(r"[^\w.+=-]+", "-", "__".join(parts)) or "run"


def check(jobs: list[Job]) -> None:
    if not jobs:
        sys.exit("error: the file has no table: a table such as [default] is a group of runs.")
    folders = [job.folder for job in jobs]
    for job in jobs:
        if folders.count(job.folder) > 1:
            why = "a value is given twice, or [[256, 256]] is written [256, 256]"
            sys.exit(f"error: two runs would share {job.folder}: {why}.")
        if not (ROOT / job.script).is_file():
            sys.exit(f"error: [{job.table}] script {job.script}: no such file in {ROOT}.")
        flags = job.folder / "flags.json"
        if flags.exists() and json.loads(flags.read_text()) != [job.script, job.flags]:
            sys.exit(f"error: {job.folder} has runs with other flags: name another --runs-dir.")


# ---- a job and its folder
def finished(job: Job) -> Path | None:
    """The run folder with the picture that a script draws at its very end."""
    for picture in sorted(job.folder.glob("*/curve.png")):
        return picture.parent
    return None


def final_return(job: Job) -> str:
    """Mean normalized return of the last evaluation."""
    run = finished(job)
    if run is None:
        return ""
    with open(run / "evaluations.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["phase"] == "final"]
    return f"{sum(float(row['normalized']) for row in rows) / len(rows):.1f}"


def words(flags: dict) -> list[str]:
    """The command line of these flags: true is --flag, false --no-flag, a list several words."""
    line = []
    for flag, value in flags.items():
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return line


def command(job: Job) -> list[str]:
    """What starts the job, or goes on with it: a resumed run brings its own flags."""
    start = [sys.executable, str(ROOT / job.script)]
    cut = sorted(job.folder.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if cut:
        return [*start, "--resume", str(cut[-1].parent)]
    flags = job.flags | {"runs-dir": str(job.folder)}
    if job.parent:
        run = finished(job.parent) or job.parent.folder / "RUN"
        flags["init-from"] = str(run / job.checkpoint)
    return [*start, *words(flags)]


def start(job: Job) -> bool:
    """False while a run of the job is alive, e.g. of a sweep that was killed: it holds the lock on
    its log, which it inherited with its output."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "log.txt", "a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        (job.folder / "flags.json").write_text(json.dumps([job.script, job.flags]))
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        if job.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = job.gpu
        line = command(job)
        print(f"$ {shlex.join(line)}", file=log, flush=True)
        pipes = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        # a session of its own: Ctrl-C in the terminal reaches it once, through us
        job.process = subprocess.Popen(line, env=environment, start_new_session=True, **pipes)
    job.status, job.started = "running", time.monotonic()
    return True


# ---- all jobs
def sweep(jobs: list[Job], args: Args, table: Path) -> None:
    """Runs what is missing. One that fails costs those that start from it, and no others."""
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: signals.append(1))
    passed_on = 0
    while any(job.status == "running" or (job.status == "waiting" and not signals) for job in jobs):
        running = [job for job in jobs if job.status == "running"]
        if len(signals) > passed_on:
            print("stopping: the runs save themselves (once more: at once)", flush=True)
            passed_on = len(signals)
            for job in running:
                job.process.send_signal(signal.SIGINT)
        for job in running:
            if job.process.poll() is not None:
                end(job, bool(signals))
                write_table(table, jobs)
        for job in jobs:
            if job.status == "waiting" and not signals:
                advance(job, jobs, args)
        time.sleep(0.2)


def advance(job: Job, jobs: list[Job], args: Args) -> None:
    """Starts a waiting job where its parent is done and there is room."""
    running = [other for other in jobs if other.status == "running"]
    if job.parent and job.parent.status in ("failed", "blocked"):
        job.status = "blocked"
    elif job.parent and job.parent.status != "finished":
        return
    elif finished(job):
        job.status = "finished"
    elif len(running) < args.jobs:
        used = [other.gpu for other in running]
        job.gpu = min(args.gpus, key=used.count, default=None)
        if start(job):
            print(f"start     {job.name}", flush=True)
        elif not job.elsewhere:
            job.elsewhere = True
            print(f"waiting   {job.name}: another process runs it", flush=True)


def end(job: Job, stopping: bool) -> None:
    code, job.seconds = job.process.returncode, time.monotonic() - job.started
    why = f"exit code {code}, see {job.folder / 'log.txt'}"
    if code == 0 and finished(job):
        job.status, why = "finished", f"normalized return {final_return(job)}"
    else:
        job.status = "stopped" if stopping else "failed"
    print(f"{job.status:<9} {job.name}  {job.seconds:.0f} s, {why}", flush=True)


def write_table(path: Path, jobs: list[Job]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["status", "seconds", "normalized", "run"])
        for job in jobs:
            writer.writerow([job.status, round(job.seconds), final_return(job), job.name])
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    jobs = expand(args)
    if args.dry_run:
        for job in jobs:
            print(f"# finished: {job.name}" if finished(job) else shlex.join(command(job)))
        return
    table = jobs[0].folder.parent.parent / "status.csv"
    print(f"{len(jobs)} runs, {sum(finished(job) is not None for job in jobs)} finished before")
    sweep(jobs, args, table)
    write_table(table, jobs)
    states = [job.status for job in jobs]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    print(f"{', '.join(counts)}; {table}")
    if set(states) != {"finished"}:
        print(f"to go on: python {shlex.join(sys.argv)}")
        sys.exit(130 if "stopped" in states or "waiting" in states else 1)


if __name__ == "__main__":
    main()
