"""What the tests share: tiny flags, a tiny dataset, runs of the script in this process or in one of their own."""

import contextlib
import csv
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch

import smac_offline_to_online as smac

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "smac_offline_to_online.py"

# Every phase has several checkpoints and evaluations, and steps after the last of them.
TINY = shlex.split("""
    --device cpu --score-steps 50 --score-batch-size 16 --score-hidden 16 --score-blocks 1 --score-condition-hidden 16
    --offline-steps 50 --offline-batch-size 16 --num-critics 3 --critic-hidden 16 16 --policy-hidden 16 16
    --online-steps 80 --warmup-steps 30 --online-batch-size 16 --eval-every 25 --eval-episodes 2 --final-episodes 2
    --log-every 5 --checkpoint-every 20
""")


def parse(*given) -> "smac.SimpleNamespace":
    """The script's flags as it would see them with `given` on its command line."""
    with mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, given)]):
        return smac.parse_flags()


def hopper_file(path: Path, episodes: int = 15, seed: int = 0, **changes) -> Path:
    """D4RL-layout file of random actions in the real environment; `changes` replace its columns (None: left out)."""
    env, rng = smac.TaskEnv(smac.TASKS["hopper-embedded"]), np.random.default_rng(seed)
    rows = []
    for episode in range(episodes):
        (obs, _), done = env.reset(seed=seed + episode), False
        while not done:
            action = rng.uniform(-1, 1, 3).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, terminated, truncated))
            obs, done = next_obs, terminated or truncated
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    return write_hdf5(path, dict(zip(names, map(np.array, zip(*rows)))) | changes)


def write_hdf5(path: Path, columns: dict) -> Path:
    with h5py.File(path, "w") as f:
        for name, values in columns.items():
            if values is not None:
                f[name] = values
    return path


def run_here(*given) -> Path:
    """main() in this process, without another start's seconds of imports. Returns the run folder."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    try:
        with mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, given)]), contextlib.redirect_stdout(out):
            smac.main()
    finally:
        plt.close("all")
        for number, handler in before.items():
            signal.signal(number, handler)
    return Path(re.search("^run folder: (.*)$", out.getvalue(), re.MULTILINE)[1])


def start(*command) -> subprocess.Popen:
    """`python command...` in the repository: the script in a process of its own, or ("-c", code, flags...)."""
    environment = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def only_run(runs: Path) -> Path:
    (folder,) = runs.iterdir()
    return folder


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def same(a, b) -> bool:
    """Whether two trees of dicts, lists, tensors and numbers are equal to the last bit (a NaN equals no NaN)."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
