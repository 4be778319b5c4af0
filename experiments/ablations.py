"""The ablations of docs/smac.md: every variant and seed as a run of its own, then one table.

    python experiments/ablations.py --jobs 2                    # runs what is missing, prints the table
    python experiments/ablations.py --only default wrong-sign --seeds 0 1 2

A finished run is kept and found again by its folder, runs_dir/<variant>/. The table goes to <runs_dir>/ablations.csv.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

VARIANTS = {
    "default": [],
    "no score term": ["--kappa", "0"],
    "learned alpha, as printed": ["--alpha-mode", "learned", "--score-sign", "plus", "--kappa", "40"],
    "learned alpha, kappa 1": ["--alpha-mode", "learned", "--score-sign", "plus"],
    "wrong sign": ["--score-sign", "plus"],
    "alpha x 1/4": ["--alpha-scale", "0.00375"],
    "alpha x 4": ["--alpha-scale", "0.06"],
    "kappa 0.1": ["--kappa", "0.1"],
    "kappa 10": ["--kappa", "10"],
    "kappa 40": ["--kappa", "40"],
    "Muon, Jordan's scale": ["--muon-scale", "spectral"],
    "Adam": ["--optimizer", "adam"],
    "score without w": ["--no-score-return"],
    "2 critics": ["--num-critics", "2"],
    "8 critics": ["--num-critics", "8"],
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every variant."""
    only: tuple[str, ...] = tuple(VARIANTS)
    """Variants, by their names in this file."""
    runs_dir: Path = Path("runs/ablations")
    """Where the run folders are."""
    flags: tuple[str, ...] = ()
    """Flags for every run, e.g. --flags=--offline-steps=20000 --flags=--online-steps=6000."""
    jobs: int = 2
    """Runs at a time, each on one thread."""


def finished(folder: Path, seed: int) -> Path | None:
    """The finished run of this seed below `folder`: one whose last evaluation, `final`, is written."""
    for path in sorted(folder.glob(f"*__{seed}__*/evaluations.csv")):
        if ",final," in path.read_text():
            return path
    return None


def run(args: Args, variant: str, seed: int) -> None:
    folder = args.runs_dir / variant.replace(" ", "-").replace("/", "")
    if finished(folder, seed):
        return
    script = Path(__file__).resolve().parent.parent / "smac_offline_to_online.py"
    command = [
        sys.executable,
        str(script),
        "--seed",
        str(seed),
        "--runs-dir",
        str(folder),
        *VARIANTS[variant],
        *args.flags,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{seed}.log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{variant}, seed {seed}: {'done' if code == 0 else f'exit code {code}, see {log.name}'}", flush=True)


def row(args: Args, variant: str) -> dict:
    """Means over the seeds: score at transfer, the worst of the first quarter online, the last; each at transfer."""
    folder = args.runs_dir / variant.replace(" ", "-").replace("/", "")
    transfer, early, last = [], [], []
    for path in filter(None, (finished(folder, seed) for seed in args.seeds)):
        scores: dict[int, list[float]] = {}
        for r in csv.DictReader(path.open()):
            if r["phase"] == "online":
                scores.setdefault(int(r["step"]), []).append(float(r["score"]))
        curve = [float(np.mean(v)) for v in scores.values()]
        transfer.append(curve[0])
        early.append(min(curve[: max(2, len(curve) // 4)]))
        last.append(curve[-1])
    if not transfer:
        return dict(variant=variant, seeds=0)
    mean = {k: round(float(np.mean(v)), 1) for k, v in dict(transfer=transfer, early=early, last=last).items()}
    each = " / ".join(f"{x:.0f}" for x in transfer)
    return dict(variant=variant, seeds=len(transfer)) | mean | dict(transfer_of_each_seed=each)


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(args, *job), [(v, seed) for v in args.only for seed in args.seeds]))
    rows = [row(args, variant) for variant in args.only]
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    with open(args.runs_dir / "ablations.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, max(rows, key=len))
        writer.writeheader()
        writer.writerows(rows)
    for r in rows:
        print("| " + " | ".join(str(v) for v in r.values()) + " |")


if __name__ == "__main__":
    main()
