"""What the tests share: tiny flags, tiny datasets, runs in this process or in one of their own."""

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
import numpy as np
import torch

import smac_offline_to_online as smac

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "smac_offline_to_online.py"

# SMAC_TEST_DEVICE=cuda: whole runs on a GPU, most of them without recorded updates, as many tests
# replace what an update calls
DEVICE = os.environ.get("SMAC_TEST_DEVICE", "cpu")
# Every phase has several checkpoints and evaluations, and steps after the last of them.
TINY = shlex.split(f"""
    --device {DEVICE} --no-cuda-graphs --score-steps 50 --score-batch-size 16 --score-hidden 16
    --score-blocks 1 --score-condition-hidden 16 --offline-steps 50 --offline-batch-size 16
    --num-critics 3 --critic-hidden 16 16 --policy-hidden 16 16 --online-steps 80 --warmup-steps 30
    --online-batch-size 16 --eval-every 25 --eval-episodes 2 --final-episodes 2
    --log-every 5 --checkpoint-every 20
""")
HOPPER = dict(
    format="smac-dataset-1",
    env_id="Hopper-v5",
    env_kwargs="{}",
    max_episode_steps=1000,
    family="locomotion",
    goals=0,
    reward_scale=1.0,
    reward_bias=0.0,
    return_0=-20.272305,
    return_100=3234.3,
    mean_normalized_return=1.0,
)


def parse(*flags) -> tuple["smac.Args", "smac.Task"]:
    """SMAC's flags and task as the script would see them with `flags` on its command line."""
    with mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, flags)]):
        return smac.parse_args()


def prepared_file(path: Path, columns: dict, **attributes) -> Path:
    """A file as data/prepare.py writes it, of Hopper-v5 where `attributes` do not say otherwise.
    What is None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        for name, values in columns.items():
            if values is not None:
                f[name] = values
        for name, value in (HOPPER | attributes).items():
            if value is not None:
                f.attrs[name] = value
    return path


def hopper_file(path: Path, episodes: int = 15, seed: int = 0, **changes) -> Path:
    """Episodes of random actions in the real environment, the last one broken off before its end.
    `changes` replace columns or attributes; max_episode_steps=10 makes time-outs."""
    attributes = HOPPER | {name: x for name, x in changes.items() if name in HOPPER}
    values = dict(attributes, env_kwargs={})
    env = smac.TaskEnv(smac.Task(*(values[name] for name in smac.Task._fields)))
    rng = np.random.default_rng(seed)
    rows = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        steps, terminated, truncated = [], False, False
        while not (terminated or truncated):
            action = rng.uniform(-1, 1, 3)
            next_obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
            truncated = truncated or (episode == episodes - 1 and len(steps) == 5)
            steps.append([obs, action, reward, terminated, terminated])
            obs = next_obs
        if not terminated:  # one row more, which shows the last state
            steps.append([obs, np.zeros(3), 0.0, False, True])
        rows += [(*step, sum(env.rewards)) for step in steps]
    names = ("observations", "actions", "rewards", "terminals", "ends", "returns")
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows))}
    for name in ("observations", "actions", "rewards", "returns"):
        columns[name] = columns[name].astype(np.float32)
    columns |= {name: x for name, x in changes.items() if name in columns}
    return prepared_file(path, columns, **attributes)


def run_here(main_module, *flags) -> Path:
    """main() of a script in this process, without another start's seconds of imports. Returns the
    run's folder, which it prints on a line of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    words, out = [main_module.__file__, *map(str, flags)], io.StringIO()
    try:
        with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out):
            main_module.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(out.getvalue())  # for capsys, and where a test fails
    return [Path(line) for line in out.getvalue().splitlines() if Path(line).is_dir()][-1]


def start(*command, cwd: Path = ROOT) -> subprocess.Popen:
    """`python command...`, with the repository's modules: a script, or ("-c", code, flags...)."""
    # no empty place: Python would take it for the current folder
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | dict(PYTHONPATH=places, PYTHONWARNINGS="ignore")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=cwd, env=environment, **pipes)


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
    """Whether two trees of dicts, lists, tensors and numbers are equal to the last bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


# ---- pages
TABLE_HEAD = r"command \(after `python (\S+)`\)"


def commands(page: Path) -> list[str]:
    """`python X.py ...` in indented blocks, fences and `code`, but where the paragraph before says
    that a command belongs to an older commit; and the rows of a table whose head names its
    commands' beginning."""
    before, found = "", []
    for paragraph in re.split(r"\n\s*\n", page.read_text().replace("\\\n", " ")):
        pattern = r"(?:^\s*(?:\$ )?|`|&& )python (\S+\.py\b[^`\n]*)"
        if not re.search(r"commit.*\bbelongs\b|\bbelongs\b.*commit", before, re.S):
            found += re.findall(pattern, re.sub(TABLE_HEAD, "", paragraph), re.M)
        head = re.search(TABLE_HEAD, paragraph)
        if head:
            found += [f"{head[1]} {flags}" for flags in table_commands(paragraph)]
        before = paragraph
    return found


def table_commands(table: str) -> list[str]:
    """What stands in `...` in the last column, but for flags of another program."""
    cells = [row.rstrip("|").split("|")[-1] for row in table.splitlines()[2:]]
    found = [command for cell in cells for command in re.findall("`([^`]+)`", cell)]
    return [command for command in found if not command.startswith("--offline")]
