# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]>=1.1",
#     "gymnasium-robotics>=1.4",
#     "mujoco>=3.3,<3.11",
#     "tyro>=1.0",
#     "numpy>=2.0",
#     "h5py>=3.11",
#     "minari>=0.5.3",
#     "tqdm>=4.66",
#     "tensorboard>=2.17",
#     "matplotlib>=3.9",
# ]
# ///
"""SMAC, Score-Matched Actor-Critic (arXiv 2602.17632): pretrain on a fixed dataset, then go on online without a drop.

    python smac_offline_to_online.py                                    # Hopper on the embedded dataset, 15 min, 2 cores
    python smac_offline_to_online.py --task door-binary-v0 --online-algorithm td3
    python smac_offline_to_online.py --resume runs/hopper-embedded__smac__0__20260101-120000
    python smac_offline_to_online.py --task hopper-medium-replay-v2 --help      # that task's own defaults

Three phases, in this file's order: (1) a diffusion model of the dataset's actions, conditioned on the trajectory's return
w, whose noise estimate at w = 1 gives the score; (2) an actor-critic whose action gradient follows that score,
grad_a Q(s, a) = alpha grad_a log p(a|s, w=1); (3) plain SAC, TD3, TD3+BC or AWR from those networks, without the score.

Where the paper is silent or we deviate, the flag's text and docs/smac.md say so. The largest deviation is alpha: see
`--alpha-mode`. The checkpoint format that all scripts share is in docs/checkpoint.md.
"""

import argparse
import copy
import csv
import dataclasses
import difflib
import http.client
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from muon import Muon, bf16_is_fast

# ================================================================================================ flags
@dataclass
class RunFlags:
    task: str = "hopper-embedded"
    """Task, e.g. hopper-embedded, walker2d-medium-replay-v2, door-binary-v0; a wrong name prints all. Sets the defaults."""
    seed: int = 0
    """Seed of the networks, the batches, the exploration, the training episodes and the evaluation episodes."""
    resume: Path | None = None
    """Run folder to go on with, exactly where its last checkpoint (last.pt) stands. Its flags are the defaults here."""
    init_from: Path | None = None
    """An offline checkpoint of any of our scripts (offline.pt): its networks go straight to the online phase."""
    runs_dir: Path = Path("runs")
    """Where run folders are made."""
    device: str = "auto"
    """auto takes cuda where there is one; else cpu, cuda:1, ..."""
    torch_threads: int = 1
    """CPU threads of one run. Matrices this small gain little from more: start one run a core (docs/smac.md)."""
    compile: bool = False
    """Compile whole update steps (30-60 s at the start; CUDA graphs on a GPU). Needs a C++ compiler, else runs eager."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints. One is also written at the end of a phase and on Ctrl-C or SIGTERM."""
    log_every: int = 500
    """Steps between rows of metrics.csv and TensorBoard."""
    track: bool = False
    """Also log to Weights & Biases (pip install wandb; WANDB_MODE=offline works)."""
    wandb_project: str = "smac"
    """Project name for --track."""
    capture_video: bool = False
    """Record one episode of the final policy into the run folder (needs MUJOCO_GL=egl or osmesa without a screen)."""


@dataclass
class DataFlags:
    dataset: str | None = None
    """D4RL-layout HDF5 file, or minari:ID. Default: the task's own, downloaded to $D4RL_DATASET_DIR or ~/.d4rl/datasets."""
    save_replay: Path | None = None
    """Write everything that the online phase collected to this HDF5 file, in D4RL's layout."""


@dataclass
class ScoreFlags:
    score_steps: int = 1_000_000
    """Training steps of the diffusion model. Paper, Table 6."""
    score_batch_size: int = 512
    """Paper, Table 6."""
    score_lr: float = 3e-4
    """Adam, cosine decay to 0 over score_steps. IDQL's and CleanDiffuser's value; the paper names none."""
    score_hidden: int = 512
    """Width of the residual trunk (its blocks are four times as wide inside, as IDQL's). Paper, Table 6."""
    score_blocks: int = 3
    """Residual blocks. Paper, Table 6."""
    score_condition_hidden: tuple[int, ...] = (512, 512, 512)
    """Hidden layers of the network that embeds (s, w) in 64 numbers. Paper, Table 6."""
    score_dropout: float = 0.1
    """In the residual blocks, while fitting only. IDQL's value; the paper names none."""
    score_return: bool = True
    """Condition on w, the trajectory's min-max normalised return, and query at w = 1 (paper, 6.1)."""


@dataclass
class OfflineFlags:
    offline_steps: int = 250_000
    """Score-matched pretraining updates. Paper, Table 7. 0: no dataset, train the online algorithm from scratch."""
    offline_batch_size: int = 64
    """Paper, Table 7."""
    num_critics: int = 10
    """Critic ensemble. Paper, Table 7."""
    critic_hidden: tuple[int, ...] = (512, 512, 512)
    """Paper, Table 7."""
    critic_activation: Literal["tanh", "relu"] = "tanh"
    """Paper, Table 7."""
    policy_hidden: tuple[int, ...] = (512, 512, 512)
    """Paper, Table 7 (relu)."""
    critic_lr: float = 3e-4
    """Paper, Table 7."""
    policy_lr: float = 1e-4
    """Paper, Table 7."""
    temperature_lr: float = 1e-4
    """Adam on the log temperature. WSRL's value; the paper names none."""
    target_entropy_scale: float = -10.0
    """Target entropy per action dimension. Paper, Table 7."""
    gamma: float = 0.99
    """Discount. Paper, Table 7."""
    tau: float = 0.005
    """Polyak rate of the target critics. Paper, Table 7."""
    kappa: float = 40.0
    """Weight of the score-matching loss. Paper, Table 7."""
    alpha_mode: Literal["scaled", "fixed", "learned"] = "scaled"
    """alpha: alpha_scale times the mean |TD target| (ours); alpha_scale itself; or the paper's network alpha(s)."""
    alpha_scale: float = 0.015
    """See alpha_mode. Ours: docs/smac.md has the measurement."""
    alpha_lr: float = 1e-4
    """Of the network alpha(s), [256, 256] relu, linear output. Paper, Table 7."""
    score_sign: Literal["minus", "plus"] = "minus"
    """minus: Q's gradient follows -eps, which points along the score. plus: +eps, as the paper prints the loss."""
    optimizer: Literal["muon", "adam"] = "muon"
    """muon: hidden matrices of critic and policy on Muon, the rest on Adam. Paper, Section 6; scope and scale are ours."""
    muon_scale: Literal["rms", "spectral"] = "rms"
    """Size of a Muon step: as large as Adam's (Moonlight), or Jordan's. The paper does not say."""


@dataclass
class OnlineFlags:
    online_algorithm: Literal["sac", "td3", "td3+bc", "awr", "none"] = "sac"
    """What goes on training the pretrained networks."""
    online_steps: int = 200_000
    """Environment steps, the warm start included. Paper, Section 4.2."""
    warmup_steps: int = 5_000
    """First online steps: the pretrained policy collects, nothing is updated. Paper, Section 4.2 (after WSRL)."""
    online_batch_size: int = 1024
    """Paper, Table 7."""
    offline_fraction: float = 0.5
    """Share of each online batch that comes from the dataset. Paper, Section 4.2."""
    utd: int = 1
    """Critic updates per environment step, each on online_batch_size / utd rows; the policy has one on all of them."""
    backup_entropy: bool = False
    """Whether the TD target holds SAC's entropy bonus. The paper's L_AC has none."""
    awr_temperature: float = 0.4
    """awr: weight exp(temperature (Q - V)), at most 100. Paper, Table 7."""
    bc_weight: float = 5.0
    """td3+bc: -Q / mean |Q| + bc_weight (pi(s) - a)^2, a mean over dimensions. Paper, Table 7."""
    exploration_noise: float = 0.1
    """td3, td3+bc: standard deviation of the noise on collected actions. TD3's value."""
    stop_at_score: float | None = None
    """End the run at the first online evaluation with this mean score."""


@dataclass
class EvalFlags:
    eval_every: int = 10_000
    """Steps between evaluations, offline and online."""
    eval_episodes: int = 20
    """Episodes per evaluation, with the deterministic policy; the same starts each time. WSRL's number."""
    final_episodes: int = 50
    """Episodes of the last evaluation, from starts that no earlier evaluation used."""


@dataclass
class Flags:
    run: Annotated[RunFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=RunFlags)
    data: Annotated[DataFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=DataFlags)
    score: Annotated[ScoreFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=ScoreFlags)
    offline: Annotated[OfflineFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=OfflineFlags)
    online: Annotated[OnlineFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=OnlineFlags)
    evaluation: Annotated[EvalFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=EvalFlags)


# ================================================================================================ tasks
@dataclass(frozen=True)
class Task:
    env_id: str
    min_score: float  # returns at which the D4RL score is 0 and 100: D4RL's infos.py
    max_score: float
    domain: str  # locomotion, adroit or kitchen: what a success is, which rewards are stored
    max_steps: int
    file: str  # in the dataset folder; a D4RL URL's last part
    url: str | None = None
    reward_scale: float = 1.0  # of the training reward, offline and online: scale * r + bias. WSRL's values
    reward_bias: float = 0.0
    env_kwargs: dict = field(default_factory=dict)


D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
ANT = dict(include_cfrc_ext_in_observation=False, contact_cost_weight=0.0)  # D4RL's contact forces are all zero
REFERENCE = {  # env_id, return of a random and of an expert policy, keyword arguments
    "hopper": ("Hopper-v5", -20.272305, 3234.3, {}),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3, {}),
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0, {}),
    "ant": ("Ant-v5", -325.6, 3879.7, ANT),
}
KITCHEN_TASKS = {  # which of the kitchen's tasks count, and D4RL's file name for them
    "complete": ("mini_kitchen_microwave_kettle_light_slider-v0", ["microwave", "kettle", "light switch", "slide cabinet"]),
    "partial": ("kitchen_microwave_kettle_light_slider-v0", ["microwave", "kettle", "light switch", "slide cabinet"]),
    "mixed": ("kitchen_microwave_kettle_bottomburner_light-v0", ["microwave", "kettle", "bottom burner", "light switch"]),
}
TASKS = {"hopper-embedded": Task("Hopper-v5", *REFERENCE["hopper"][1:3], "locomotion", 1000, "hopper-medium-replay.hdf5")}
for name, (env_id, low, high, kwargs) in REFERENCE.items():
    for kind in ("random", "medium", "medium-replay", "medium-expert", "expert"):
        file = f"{name}_{kind.replace('-', '_')}-v2.hdf5"
        url = f"{D4RL_URL}gym_mujoco_v2/{file}"
        TASKS[f"{name}-{kind}-v2"] = Task(env_id, low, high, "locomotion", 1000, file, url, env_kwargs=kwargs)
for name, steps in (("pen", 100), ("door", 200), ("relocate", 200)):
    env_id = f"AdroitHand{name.title()}Sparse-v1"
    TASKS[f"{name}-binary-v0"] = Task(env_id, 0, 1, "adroit", steps, f"offpolicy_hand_data/{name}", None, 10.0, 5.0)
for name, (file, subtasks) in KITCHEN_TASKS.items():
    kwargs = dict(tasks_to_complete=subtasks)
    url = f"{D4RL_URL}kitchen/{file}.hdf5"
    TASKS[f"kitchen-{name}-v0"] = Task("FrankaKitchen-v1", 0, 4, "kitchen", 280, f"{file}.hdf5", url, 1.0, -4.0, kwargs)

# One row of defaults a domain. What a row leaves out stays as the flags above have it (the paper's locomotion column).
ROWS = {
    "locomotion": {},
    "adroit": dict(  # paper, Tables 6 and 7
        score_steps=3_000_000,
        score_batch_size=1024,
        score_blocks=5,
        score_condition_hidden=(256, 256, 256),
        critic_hidden=(512, 512, 512, 512),
        policy_hidden=(256, 256, 256),
        offline_steps=200_000,
        awr_temperature=20.0,
        bc_weight=0.2,
    ),
    "kitchen": dict(  # paper, Tables 6 and 7
        score_steps=3_000_000,
        score_batch_size=1024,
        score_blocks=5,
        score_condition_hidden=(256, 256, 256),
        critic_hidden=(512, 512, 512, 512),
        kappa=50.0,
        offline_steps=400_000,
        awr_temperature=5.0,
        bc_weight=2.0,
    ),
    "hopper-embedded": dict(  # ours: the same method at a size for two CPU cores, measured in docs/smac.md
        score_steps=12_000,
        score_batch_size=256,
        score_lr=1e-3,
        score_hidden=128,
        score_blocks=2,
        score_condition_hidden=(128, 128),
        offline_steps=30_000,
        offline_batch_size=128,
        num_critics=4,
        critic_hidden=(128, 128),
        policy_hidden=(128, 128),
        policy_lr=3e-4,
        temperature_lr=1e-3,
        tau=0.01,
        kappa=1.0,
        online_steps=25_000,
        warmup_steps=2_000,
        online_batch_size=256,
        eval_every=2_500,
        eval_episodes=10,
    ),
    "from-scratch": dict(  # --offline-steps 0: SAC's own defaults (Haarnoja et al. 2018; softlearning), TD3's where TD3 runs
        num_critics=2,
        critic_hidden=(256, 256),
        critic_activation="relu",
        policy_hidden=(256, 256),
        policy_lr=3e-4,
        temperature_lr=3e-4,
        target_entropy_scale=-1.0,
        backup_entropy=True,
        optimizer="adam",
        tau=0.005,
        online_steps=1_000_000,
        online_batch_size=256,
        offline_fraction=0.0,
        warmup_steps=5_000,
        eval_every=5_000,
        eval_episodes=10,
    ),
}


class BadInput(Exception):
    """One sentence for the user: what is wrong and what to do. Ends the run with exit code 2 before any training."""


def parse_flags(argv: list[str] | None = None) -> SimpleNamespace:
    """Flags over the run to resume, or over the task's row, over the defaults. One flat namespace comes back."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="hopper-embedded")
    first.add_argument("--offline-steps", "--offline_steps", type=int)
    first.add_argument("--init-from", "--init_from", type=Path)
    first.add_argument("--resume", type=Path)
    given, _ = first.parse_known_args(argv)
    if given.resume is not None:
        try:
            row = json.loads((given.resume / "config.json").read_text())
        except (OSError, ValueError) as e:
            raise BadInput(f"--resume {given.resume}: not a run folder of ours, its config.json cannot be read ({e}).")
    else:
        if given.task not in TASKS:
            near = difflib.get_close_matches(given.task, TASKS, 3) or sorted(TASKS)
            raise BadInput(f"--task {given.task}: no such task. Did you mean {', '.join(near)}? All: {', '.join(TASKS)}.")
        row = dict(ROWS[TASKS[given.task].domain], task=given.task, **{})
        row |= ROWS.get(given.task, {})
        row |= ROWS["from-scratch"] if given.offline_steps == 0 and given.init_from is None else {}
        if given.init_from is not None:
            row |= {k: v for k, v in read_checkpoint(given.init_from)["args"].items() if k in NETWORK_FLAGS}
    default = Flags()
    for group in vars(default).values():
        for f in dataclasses.fields(group):
            if f.name in row:
                value = row[f.name]
                value = tuple(value) if isinstance(value, list) else value
                is_path = isinstance(value, str) and f.name in ("resume", "init_from", "runs_dir", "save_replay")
                setattr(group, f.name, Path(value) if is_path else value)
    flags = tyro.cli(Flags, args=argv, default=default, description=__doc__.split("\n\n")[0])
    return SimpleNamespace(**{k: v for group in vars(flags).values() for k, v in vars(group).items()})


# Flags that fix the shape of the networks: a checkpoint that is started from brings its own.
NETWORK_FLAGS = ("num_critics", "critic_hidden", "critic_activation", "policy_hidden", "optimizer", "muon_scale")


# ================================================================================================ shared: data
def dataset_path(task: Task, dataset: str | None) -> Path:
    """Where the task's file is; downloaded when it is one of D4RL's and missing."""
    if dataset is not None:
        return Path(dataset)
    if task.url is None and task.domain == "locomotion":
        return Path(__file__).resolve().parent / "data" / task.file
    path = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets") / task.file
    if task.url is not None and not path.exists():
        download(task.url, path)
    return path


def download(url: str, path: Path) -> None:
    """Fetch an HDF5 file under a temporary name, check that it is whole, then give it its name."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as answer, open(part, "wb") as f:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := answer.read(1 << 18):
                    f.write(chunk)
                    bar.update(len(chunk))
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes arrived")
        h5py.File(part).close()
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as e:
        part.unlink(missing_ok=True)
        raise BadInput(f"Cannot download {url} ({e}): fetch it on another machine and put it at {path}.") from e


def read_dataset(task: Task, dataset: str | None) -> dict[str, np.ndarray]:
    """The dataset in D4RL's layout: observations, actions, rewards, terminals and, where stored, timeouts and
    next_observations, one row a step, episodes one after another in time order. Rewards are raw, except that kitchen's
    are the number of subtasks solved so far and binary Adroit's are success - 1, as their environments here pay them."""
    if dataset is not None and dataset.startswith("minari:"):
        return read_minari(task, dataset.removeprefix("minari:"))
    path = dataset_path(task, dataset)
    if task.domain == "adroit" and dataset is None:
        return read_adroit_npy(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file. --dataset takes a D4RL-layout HDF5 file or minari:ID.")
    try:
        with h5py.File(path) as f:
            known = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
            raw = {k: f[k][()] for k in known if k in f}
    except (OSError, RuntimeError) as e:
        raise BadInput(f"{path}: not a readable HDF5 file ({e}). If a copy broke off, delete it and start again.") from e
    missing = [k for k in ("observations", "actions", "rewards", "terminals") if k not in raw]
    if missing:
        raise BadInput(f"{path}: the keys {', '.join(missing)} are missing; D4RL's layout needs them at the top level.")
    return raw


def read_minari(task: Task, name: str) -> dict[str, np.ndarray]:
    """A Minari dataset, downloaded by minari when it is not on disk. Its N + 1 observations give true next states."""
    import minari

    try:
        episodes = list(minari.load_dataset(name, download=True).iterate_episodes())
    except Exception as e:  # minari raises whatever its storage, its hub or the network raise
        raise BadInput(f"minari:{name} cannot be loaded ({type(e).__name__}: {e}); `minari list remote` names all.") from e
    if not episodes:
        raise BadInput(f"minari:{name} has no episodes.")
    columns = {k: [] for k in ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")}
    for e in episodes:
        obs = e.observations["observation"] if isinstance(e.observations, dict) else e.observations
        rewards = np.cumsum(e.rewards) if task.domain == "kitchen" else np.asarray(e.rewards)  # Minari's are impulses
        if task.domain == "adroit":
            rewards = np.asarray(e.infos["success"], np.float32)[-len(rewards) :] - 1
        steps = (obs[:-1], obs[1:], e.actions, rewards, e.terminations, e.truncations)
        for column, value in zip(columns.values(), steps):
            column.append(np.asarray(value))
    return {k: np.concatenate(v) for k, v in columns.items()}


def read_adroit_npy(stem: Path) -> dict[str, np.ndarray]:
    """AWAC's two files for a binary Adroit task: demonstrations, then rollouts of a cloned policy (-1/0 rewards)."""
    columns = {k: [] for k in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for path in (stem.with_name(f"{stem.name}2_sparse.npy"), stem.with_name(f"{stem.name}_bc_sparse4.npy")):
        if not path.is_file():
            raise BadInput(
                f"{path}: no such file. Fetch offpolicy_hand_data (Google Drive 1yUdJnGgYit94X_AvV6JJP5Y3Lx2JF30Y) and "
                f"unpack it into {path.parent.parent}, or pass an HDF5 file of the task with --dataset."
            )
        for t in np.load(path, allow_pickle=True):
            obs = t["observations"]
            obs = [o["state_observation"] for o in obs] if isinstance(obs[0], dict) else obs
            n = min(len(obs), len(t["actions"]), len(t["rewards"]))  # some episodes have one reward too many
            columns["observations"].append(np.asarray(obs[:n], np.float32))
            columns["actions"].append(np.asarray(t["actions"][:n], np.float32))
            columns["rewards"].append(np.asarray(t["rewards"][:n], np.float32).reshape(-1))
            columns["terminals"].append(np.zeros(n, bool))
            columns["timeouts"].append(np.arange(n) == n - 1)
    return {k: np.concatenate(v) for k, v in columns.items()}


def check_dataset(raw: dict[str, np.ndarray], obs_dim: int, act_dim: int, name: str) -> None:
    """Everything that would otherwise fail, or silently spoil the result, after minutes of training."""
    n = len(raw["observations"])
    if n < 2:
        raise BadInput(f"{name}: the dataset is empty ({n} rows).")
    for k, v in raw.items():
        if len(v) != n:
            raise BadInput(f"{name}: {k} has {len(v)} rows, observations have {n}; every key needs one row a step.")
        if v.dtype.kind not in "fiub":
            raise BadInput(f"{name}: {k} has type {v.dtype}; numbers are needed.")
        if not np.isfinite(v).all():
            row = int(np.argwhere(~np.isfinite(v))[0][0])
            raise BadInput(f"{name}: {k} holds NaN or infinity, first in row {row}; remove those episodes.")
    for k, dim in (("observations", obs_dim), ("next_observations", obs_dim), ("actions", act_dim)):
        if k in raw and raw[k].shape != (n, dim):
            raise BadInput(f"{name}: {k} has shape {raw[k].shape}, the task's environment needs ({n}, {dim}).")
    largest = float(np.abs(raw["actions"]).max())
    if largest > 1 + 1e-3:
        raise BadInput(f"{name}: actions reach {largest:.3g}, the environment's bounds are -1 and 1; rescale them.")


def to_transitions(raw: dict[str, np.ndarray], task: Task) -> dict[str, np.ndarray]:
    """Rows (s, a, r, s', terminal) and w from episodes. No row pairs a state with another episode's.

    An episode ends at a terminal, at a time-out, where the stored next state is not the following row's state, and at the
    end of the file. Only a terminal stops bootstrapping. A row whose true next state is unknown (the last one of an episode
    that was cut, in files without next_observations) is dropped, but its reward counts in w.
    Returns float32 arrays: observations, next_observations (n, o), actions (n, a), rewards, terminals, w (n,), and
    returns, lengths (one entry an episode). w is the episode's raw return, min-max normalised (kitchen: subtasks solved).
    """
    n = len(raw["rewards"])
    obs, rewards = raw["observations"].astype(np.float32), raw["rewards"].astype(np.float64).reshape(n)
    terminal = raw["terminals"].reshape(n).astype(bool)
    stored_next = raw["next_observations"].astype(np.float32) if "next_observations" in raw else None
    end = terminal.copy()
    if "timeouts" in raw:
        end |= raw["timeouts"].reshape(n).astype(bool)
    if stored_next is not None:
        end[:-1] |= np.abs(stored_next[:-1] - obs[1:]).max(1) > 1e-6
    end[-1] = True
    if "timeouts" not in raw:  # as D4RL does: count steps against the environment's limit
        age = np.arange(n) - np.repeat(np.r_[0, np.flatnonzero(end)[:-1] + 1], np.diff(np.r_[-1, np.flatnonzero(end)]))
        end |= age % task.max_steps == task.max_steps - 1
    if task.domain == "kitchen":  # its environment here ends when all four are solved, and only then
        terminal = rewards >= 4
        end |= terminal
    ends = np.flatnonzero(end)
    starts = np.r_[0, ends[:-1] + 1]

    keep = np.ones(n, bool)
    if task.domain == "adroit":  # Cal-QL's filter: episodes with a success, cut at the last one, done where successful
        terminal = rewards == 0
        for s, e in zip(starts, ends):
            successes = np.flatnonzero(terminal[s : e + 1])
            keep[s + successes[-1] + 1 if len(successes) else s : e + 1] = False
        if not keep.any():
            raise BadInput("No episode of this dataset succeeds (reward 0 in a -1/0 file): a binary task needs some.")
    if task.domain == "kitchen":  # rows after the fourth subtask: the environment here has ended by then
        solved = np.maximum.reduceat(rewards, starts)
        keep &= (np.arange(n) == np.repeat(starts, ends - starts + 1)) | (np.r_[0, rewards[:-1]] < 4)
    length = np.add.reduceat(keep, starts)
    returns = np.add.reduceat(np.where(keep, rewards, 0), starts) if task.domain != "kitchen" else solved
    spread = returns[length > 0].max() - returns[length > 0].min()
    w = (returns - returns[length > 0].min()) / spread if spread > 0 else np.ones_like(returns)
    w = np.repeat(w, ends - starts + 1)
    ended = np.logical_or.reduceat(terminal & keep, starts)

    if stored_next is None:
        next_obs = np.r_[obs[1:], obs[-1:]]
        next_obs[terminal] = obs[terminal]  # never used: a terminal's value is not bootstrapped
        keep &= ~(end & ~terminal)
    else:
        next_obs = stored_next
        foreign = np.r_[end[:-1] & (np.abs(stored_next[:-1] - obs[1:]).max(1) <= 1e-6), False]
        keep &= ~(foreign & ~terminal)  # a time-out whose stored next state is the next episode's first
        next_obs = np.where((foreign & terminal)[:, None], obs, next_obs)
    actions = raw["actions"].astype(np.float32).clip(-1 + 1e-5, 1 - 1e-5)  # atanh stays finite
    columns = dict(observations=obs, actions=actions, rewards=rewards, next_observations=next_obs, terminals=terminal, w=w)
    columns = {k: v[keep].astype(np.float32) for k, v in columns.items()}
    return columns | dict(returns=returns[length > 0], lengths=length[length > 0], ended=ended[length > 0])


def summarize(data: dict[str, np.ndarray], raw: dict[str, np.ndarray], task: Task) -> str:
    quantiles = "/".join(f"{q:.0f}" for q in np.quantile(data["returns"], (0, 0.25, 0.5, 0.75, 1)))
    on_bounds = (np.abs(data["actions"]) > 0.999).mean()
    r = data["rewards"]
    return (
        f"dataset: {len(r):,} transitions of {len(raw['rewards']):,} rows, {len(data['returns']):,} episodes\n"
        f"  ends: {int(data['terminals'].sum()):,} terminals, {int((~data['ended']).sum()):,} episodes cut by time or file\n"
        f"  returns: mean {data['returns'].mean():.1f}, quantiles 0/25/50/75/100 % {quantiles}\n"
        f"  rewards: {r.min():.3g} to {r.max():.3g}; in training {task.reward_scale:g} r {task.reward_bias:+g}\n"
        f"  actions: {100 * on_bounds:.1f} % on the bounds"
    )


def to_rows(s, a, r, s_next, terminal) -> np.ndarray:
    """The columns of a replay row: s, a, training reward, s', terminal."""
    return np.concatenate([s, a, np.reshape(r, (-1, 1)), s_next, np.reshape(terminal, (-1, 1))], 1, dtype=np.float32)


class Replay:
    """Transitions in one preallocated tensor, a row each: one gather a batch. Full: the oldest row is overwritten."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.sizes = (obs_dim, act_dim, 1, obs_dim, 1)
        self.rows = torch.zeros(capacity, sum(self.sizes), device=device)
        self.added = 0

    def add(self, rows: np.ndarray) -> None:
        where = (torch.arange(len(rows)) + self.added) % len(self.rows)
        self.rows[where] = torch.as_tensor(rows, device=self.rows.device)
        self.added += len(rows)

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def sample(self, n: int) -> Tensor:
        return self.rows.index_select(0, torch.randint(len(self), (n,), device=self.rows.device))


# ================================================================================================ shared: environment
def observation(task: Task, obs) -> np.ndarray:
    """The observation that the networks see, from an environment's or a dataset's, (..., o) -> (..., o').

    Kitchen: joint and object positions, the 30 numbers that D4RL's 60 (which append the constant goal) and
    FrankaKitchen-v1's 59 (which mix in velocities) have in common. D4RL's Ant: without its 84 contact forces, all zero.
    """
    obs = obs["observation"] if isinstance(obs, dict) else np.asarray(obs)
    if task.domain == "kitchen" and obs.shape[-1] == 60:
        return obs[..., :30]
    if task.domain == "kitchen" and obs.shape[-1] == 59:
        return np.concatenate([obs[..., :9], obs[..., 18:39]], -1)
    if task.env_id == "Ant-v5" and obs.shape[-1] == 111:
        return obs[..., :27]
    return obs


class TaskEnv(gym.Wrapper):
    """A Gymnasium environment with the dataset's observations, rewards and episode ends.

    locomotion: as it is. adroit: reward success - 1, and the first success ends the episode (Cal-QL's convention). kitchen:
    reward is the number of subtasks solved so far, as in D4RL's files, and the fourth ends the episode.
    """

    def __init__(self, task: Task, **kwargs):
        import gymnasium_robotics  # registers AdroitHand* and FrankaKitchen

        gym.register_envs(gymnasium_robotics)
        super().__init__(gym.make(task.env_id, max_episode_steps=task.max_steps, **task.env_kwargs, **kwargs))
        self.task = task
        if abs(self.action_space.low).max() != 1 or abs(self.action_space.high).max() != 1:
            raise BadInput(f"{task.env_id}: action bounds other than -1 and 1 are not supported.")

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return observation(self.task, obs).astype(np.float32), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.task.domain == "adroit":
            reward = float(info["success"]) - 1
            terminated = terminated or bool(info["success"])
        if self.task.domain == "kitchen":
            reward = float(len(info["episode_task_completions"]))
            terminated = reward >= 4
        return observation(self.task, obs).astype(np.float32), float(reward), bool(terminated), bool(truncated), info


def episode_seed(seed: int, stream: int, episode: int) -> int:
    """The reset seed of an episode: independent streams for training (0), evaluation (1) and the final evaluation (2)."""
    return int(np.random.SeedSequence([seed, stream, episode]).generate_state(1)[0])


def score_of(task: Task, total, last):
    """The D4RL score of episodes from their raw return and last reward: 100 is an expert, a success, or 4 subtasks."""
    if task.domain == "adroit":
        return 100.0 * (np.asarray(last) == 0)
    if task.domain == "kitchen":
        return 25.0 * np.asarray(last)
    return 100 * (np.asarray(total) - task.min_score) / (task.max_score - task.min_score)


# ================================================================================================ shared: evaluation
@torch.no_grad()
def evaluate(policy: nn.Module, envs: list[gym.Env], seeds: list[int], device: torch.device) -> dict[str, np.ndarray]:
    """One episode an environment with the deterministic policy, one policy call for all that still run.
    Returns raw returns, lengths and last rewards, (len(envs),). Takes nothing from the training's random streams."""
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
    total, length, last = np.zeros(len(envs)), np.zeros(len(envs), int), np.zeros(len(envs))
    running = list(range(len(envs)))
    while running:
        actions = policy.mode(torch.as_tensor(obs[running], device=device)).cpu().numpy()
        for i, action in zip(list(running), actions):
            obs[i], last[i], terminated, truncated, _ = envs[i].step(action)
            total[i] += last[i]
            length[i] += 1
            if terminated or truncated:
                running.remove(i)
    return dict(total=total, length=length, last=last)


# ================================================================================================ networks
def orthogonal_(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weight, zero bias: WSRL's initialisation."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: list[int], activation=nn.ReLU) -> nn.Sequential:
    layers = [(orthogonal_(nn.Linear(i, o)), activation()) for i, o in zip(sizes[:-1], sizes[1:])]
    return nn.Sequential(*(module for layer in layers for module in layer))


class Policy(nn.Module):
    """Tanh-Gaussian: a = tanh(mu(s) + exp(log_std(s)) xi). Paper, Table 7: std transform exp; clip [1e-5, 10] as WSRL."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.trunk = mlp([obs_dim, *hidden])
        self.head = orthogonal_(nn.Linear(hidden[-1], 2 * act_dim), 0.01)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.head(self.trunk(s)).chunk(2, -1)
        return mean, log_std.clamp(math.log(1e-5), math.log(10.0))

    def mode(self, s: Tensor) -> Tensor:
        return torch.tanh(self(s)[0])

    def sample(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised action (B, a) and its log-density (B,)."""
        mean, log_std = self(s)
        xi = torch.randn_like(mean)
        u = mean + log_std.exp() * xi
        return torch.tanh(u), self._log_density(xi, log_std, u)

    def log_prob(self, s: Tensor, a: Tensor) -> Tensor:
        """Log-density of given actions, (B,)."""
        mean, log_std = self(s)
        u = torch.atanh(a.clamp(-1 + 1e-6, 1 - 1e-6))
        return self._log_density((u - mean) / log_std.exp(), log_std, u)

    @staticmethod
    def _log_density(xi: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
        gaussian = -0.5 * xi.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), stable for large |u|
        return (gaussian - log_slope).sum(-1)


class Critics(nn.Module):
    """N independent critics Q_i(s, a) in stacked weights (N, out, in): one batched product a layer, and Muon's shape."""

    def __init__(self, n: int, obs_dim: int, act_dim: int, hidden: tuple[int, ...], activation: str):
        super().__init__()
        sizes = [obs_dim + act_dim, *hidden]
        layers = [[orthogonal_(nn.Linear(i, o)) for _ in range(n)] for i, o in zip(sizes, [*hidden, 1])]
        self.weights = nn.ParameterList(torch.stack([m.weight.data for m in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.zeros(n, 1, o) for o in [*hidden, 1])
        self.activation = activation
        self.act_dim = act_dim

    def hidden_layers(self, s: Tensor, a: Tensor) -> list[Tensor]:
        h, out = torch.cat([s, a], -1).expand(len(self.weights[0]), -1, -1), []
        for W, b in zip(self.weights[:-1], self.biases[:-1]):
            h = torch.baddbmm(b, h, W.mT)
            h = torch.tanh(h) if self.activation == "tanh" else torch.relu(h)
            out.append(h)
        return out

    def head(self, h: Tensor) -> Tensor:
        return (h * self.weights[-1]).sum(-1) + self.biases[-1].squeeze(-1)

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        """(B, o), (B, a) -> (N, B)."""
        return self.head(self.hidden_layers(s, a)[-1])

    def action_gradient(self, s: Tensor, a: Tensor) -> Tensor:
        """grad_a Q_i(s, a), (N, B, a), by the chain rule written out: autograd then needs one backward pass, not two."""
        hidden = self.hidden_layers(s, a)
        g = self.weights[-1].expand_as(hidden[-1])
        for W, h in zip(reversed(self.weights[:-1]), reversed(hidden)):
            slope = 1 - h * h if self.activation == "tanh" else (h > 0).to(h.dtype)
            g = (g * slope) @ (W if W is not self.weights[0] else W[..., -self.act_dim :])
        return g


class ScoreModel(nn.Module):
    """Noise model eps(s, a, w, k): IDQL's LayerNorm residual network (Hansen-Estruch et al. 2023), sizes of Table 6.

    States are normalised inside, by the dataset's mean and standard deviation. SiLU everywhere, as IDQL.
    """

    STEPS = 32  # K. Paper, Table 6

    def __init__(self, obs_dim: int, act_dim: int, args: SimpleNamespace):
        super().__init__()
        hidden = args.score_hidden
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))
        t = torch.arange(self.STEPS + 1, dtype=torch.float64) / self.STEPS
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()  # cosine schedule (Nichol & Dhariwal 2021)
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.register_buffer("alpha_bar", torch.cumprod(1 - betas, 0).float())  # alpha_bar[0] is k = 1: sigma_1 = 0.060
        frequency = torch.exp(-math.log(10_000) * torch.arange(32) / 31)
        angle = torch.arange(1, self.STEPS + 1)[:, None] * frequency
        self.register_buffer("embedding", torch.cat([angle.sin(), angle.cos()], -1))  # (K, 64)
        self.time = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
        sizes = [obs_dim + 1, *args.score_condition_hidden]
        self.condition = nn.Sequential(mlp(sizes, nn.SiLU), nn.Linear(sizes[-1], 64))
        self.inlet = nn.Linear(act_dim + 64 + 64, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Dropout(args.score_dropout),
                nn.LayerNorm(hidden),
                nn.Linear(hidden, 4 * hidden),
                nn.SiLU(),
                nn.Linear(4 * hidden, hidden),
            )
            for _ in range(args.score_blocks)
        )
        self.outlet = nn.Sequential(nn.SiLU(), nn.Linear(hidden, act_dim))

    def forward(self, s: Tensor, a: Tensor, w: Tensor, k: Tensor) -> Tensor:
        """Noise estimate (B, a) for noised actions a (B, a), states (B, o), returns w (B,), noise levels k in 1..K (B,)."""
        condition = self.condition(torch.cat([(s - self.mean) / self.std, w[:, None]], -1).to(self.inlet.weight.dtype))
        time = self.time(self.embedding[k - 1])
        h = self.inlet(torch.cat([a.to(condition.dtype), condition, time], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.outlet(h).float()

    def score(self, s: Tensor, a: Tensor) -> Tensor:
        """-eps(s, a, w=1, k=1) = sigma_1 grad_a log p(a | s, w=1), (B, a): the score in units of the noise, of order 1."""
        ones = torch.ones(len(s), device=s.device)
        return -self(s, a, ones, ones.long())


class Agent(nn.Module):
    """Everything that is trained from the offline phase on: one state_dict is a checkpoint."""

    def __init__(self, obs_dim: int, act_dim: int, args: SimpleNamespace):
        super().__init__()
        self.policy = Policy(obs_dim, act_dim, args.policy_hidden)
        self.critic = Critics(args.num_critics, obs_dim, act_dim, args.critic_hidden, args.critic_activation)
        self.policy_target = copy.deepcopy(self.policy).requires_grad_(False)  # TD3's only
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.alpha_net = nn.Sequential(mlp([obs_dim, 256, 256]), orthogonal_(nn.Linear(256, 1)))  # paper, Table 7
        self.register_buffer("q_scale", torch.zeros(()))  # running mean |TD target|


def make_optimizers(agent: Agent, args: SimpleNamespace) -> dict[str, torch.optim.Optimizer]:
    """Muon on the matrices between two hidden layers, Adam on input layers, heads and biases (Jordan's advice)."""

    def optimizer(module: nn.Module, hidden: list[nn.Parameter], lr: float) -> Muon:
        hidden = hidden if args.optimizer == "muon" else []
        others = [p for p in module.parameters() if not any(p is h for h in hidden)]
        return Muon(hidden, others, lr, scale=args.muon_scale)

    policy_hidden = [layer.weight for layer in agent.policy.trunk[2::2]]
    return dict(
        critic=optimizer(agent.critic, list(agent.critic.weights[1:-1]), args.critic_lr),
        policy=optimizer(agent.policy, policy_hidden, args.policy_lr),
        temperature=Muon([], [agent.log_temperature], args.temperature_lr),
        alpha=Muon([], agent.alpha_net.parameters(), args.alpha_lr),
    )


# ================================================================================================ losses
def diffusion_loss(model: ScoreModel, s: Tensor, a: Tensor, w: Tensor) -> Tensor:
    """E || eps - eps_omega(s, sqrt(abar_k) a + sqrt(1 - abar_k) eps, w, k) ||^2, k uniform (paper, Appendix J)."""
    k = torch.randint(1, model.STEPS + 1, (len(a),), device=a.device)
    alpha_bar, eps = model.alpha_bar[k - 1, None], torch.randn_like(a)
    return (eps - model(s, alpha_bar.sqrt() * a + (1 - alpha_bar).sqrt() * eps, w, k)).square().sum(-1).mean()


def td_loss(q: Tensor, y: Tensor) -> Tensor:
    """L_AC: mean over the batch and the members of (Q_i(s, a) - y)^2; q (N, B), y (B,)."""
    return (q - y).square().mean()


def score_matching_loss(action_gradient: Tensor, score: Tensor, alpha: Tensor) -> Tensor:
    """L_SM = E || grad_a Q_i(s, a) - alpha score(s, a) ||^2, a sum over action dimensions, a mean over batch and members
    (paper, 6.2). action_gradient (N, B, a), score (B, a), alpha () or (B, 1)."""
    return (action_gradient - alpha * score).square().sum(-1).mean()


def policy_loss(q: Tensor, log_prob: Tensor, temperature: Tensor) -> Tensor:
    """L_pi = E[ temperature log pi(a|s) - min_i Q_i(s, a) ], a ~ pi (paper, 6.2; REDQ's ensemble, WSRL's minimum)."""
    return (temperature * log_prob - q.min(0).values).mean()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """-log temperature E[log pi + target entropy] (SAC, Haarnoja et al. 2018b; in the log, as most code has it)."""
    return -log_temperature * (log_prob.detach() + target_entropy).mean()


def td3_policy_loss(q: Tensor, a_pi: Tensor, a: Tensor, bc_weight: float) -> Tensor:
    """TD3: -E[min_i Q_i]. With bc_weight > 0 TD3+BC: -Q / mean |Q| + bc_weight (pi(s) - a)^2, the scale without gradient
    and the square a mean over dimensions (Fujimoto & Gu 2021; bc_weight 0.4 is their alpha 2.5)."""
    q = q.min(0).values
    if bc_weight == 0:
        return -q.mean()
    return -q.mean() / q.abs().mean().detach() + bc_weight * (a_pi - a).square().mean()


def awr_policy_loss(log_prob: Tensor, q: Tensor, v: Tensor, awr_temperature: float) -> Tensor:
    """-E[min(exp(awr_temperature (Q - V)), 100) log pi(a|s)] on data actions (WSRL's form: multiplied, clipped)."""
    return -((awr_temperature * (q - v)).exp().clamp(max=100) * log_prob).mean()


# ================================================================================================ updates
def descend(loss: Tensor, optimizer: torch.optim.Optimizer, keep: bool = False) -> None:
    """One step of `optimizer` on the gradient of `loss` for its own parameters, and no others'."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=keep)):
        p.grad = g
    optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


class Updates:
    """The update steps. Each takes a batch of replay rows and returns metrics as tensors: nothing waits for a GPU."""

    def __init__(self, agent: Agent, model: ScoreModel, optimizers: dict, sizes: tuple, args: SimpleNamespace):
        self.agent, self.model, self.optimizers, self.sizes, self.args = agent, model, optimizers, sizes, args
        self.target_entropy = args.target_entropy_scale * sizes[1]
        self.subset = min(2, args.num_critics)  # REDQ: the target is the minimum of two random members

    @torch.no_grad()
    def td_target(self, r: Tensor, s_next: Tensor, terminal: Tensor, td3: bool = False) -> Tensor:
        """y = r + gamma (1 - terminal) min_{i in a random pair} Q'_i(s', a'), (B,)."""
        agent, args = self.agent, self.args
        if td3:  # target policy smoothing, noise 0.2 clipped at 0.5 (Fujimoto et al. 2018)
            a_next = agent.policy_target.mode(s_next)
            a_next = (a_next + (0.2 * torch.randn_like(a_next)).clamp(-0.5, 0.5)).clamp(-1, 1)
        else:
            a_next, log_prob = agent.policy.sample(s_next)
        members = torch.rand(args.num_critics, device=r.device).argsort()[: self.subset]
        q_next = agent.critic_target(s_next, a_next)[members].min(0).values
        if args.backup_entropy and not td3:
            q_next = q_next - agent.log_temperature.exp() * log_prob
        return r + args.gamma * (1 - terminal) * q_next

    def update_policy_sac(self, s: Tensor) -> dict[str, Tensor]:
        agent = self.agent
        a, log_prob = agent.policy.sample(s)
        temperature = agent.log_temperature.detach().exp()
        loss = policy_loss(agent.critic(s, a), log_prob, temperature)
        descend(loss, self.optimizers["policy"])
        descend(temperature_loss(agent.log_temperature, log_prob, self.target_entropy), self.optimizers["temperature"])
        return dict(policy_loss=loss.detach(), entropy=-log_prob.detach().mean(), temperature=temperature)

    def offline(self, rows: Tensor) -> dict[str, Tensor]:
        """L_SMAC = kappa L_SM + L_AC for the critics, then the policy, the temperature and the targets."""
        agent, args = self.agent, self.args
        s, a, r, s_next, terminal = rows.split(self.sizes, 1)
        y = self.td_target(r.squeeze(1), s_next, terminal.squeeze(1))
        metrics = {}
        loss = td_loss(q := agent.critic(s, a), y)
        if args.kappa > 0:
            with torch.no_grad():  # B(A): half of the actions from the policy, half uniform (paper, 6.2)
                half = len(s) // 2
                a_B = torch.cat([agent.policy.sample(s[:half])[0], torch.empty_like(a[half:]).uniform_(-1, 1)])
                score = self.model.score(s, a_B) * (1 if args.score_sign == "minus" else -1)
                agent.q_scale.add_((y.abs().mean() - agent.q_scale) * 0.005)
            if args.alpha_mode == "learned":
                alpha = agent.alpha_net(s)
            else:
                alpha = args.alpha_scale * (agent.q_scale if args.alpha_mode == "scaled" else torch.ones_like(agent.q_scale))
            sm = score_matching_loss(agent.critic.action_gradient(s, a_B), score, alpha)
            if args.alpha_mode == "learned":  # alpha_psi descends on L_SM too, before the critics move
                descend(sm, self.optimizers["alpha"], keep=True)
            metrics = dict(sm_loss=sm.detach(), alpha=alpha.detach().mean())
            loss = loss + args.kappa * sm
        descend(loss, self.optimizers["critic"])
        metrics |= self.update_policy_sac(s)
        follow(agent.critic_target, agent.critic, args.tau)
        return metrics | dict(critic_loss=loss.detach(), q=q.detach().mean(), q_std=q.detach().std(0).mean())

    def online(self, rows: Tensor, update_policy: bool) -> dict[str, Tensor]:
        """utd critic updates on equal parts of the batch, then one policy update on all of it."""
        agent, args = self.agent, self.args
        td3 = args.online_algorithm.startswith("td3")
        for part in rows.chunk(args.utd):
            s, a, r, s_next, terminal = part.split(self.sizes, 1)
            y = self.td_target(r.squeeze(1), s_next, terminal.squeeze(1), td3)
            loss = td_loss(q := agent.critic(s, a), y)
            descend(loss, self.optimizers["critic"])
            if not td3 or update_policy:
                follow(agent.critic_target, agent.critic, args.tau)
        metrics = dict(critic_loss=loss.detach(), q=q.detach().mean(), q_std=q.detach().std(0).mean())
        s, a = rows[:, : self.sizes[0]], rows[:, self.sizes[0] : self.sizes[0] + self.sizes[1]]
        if args.online_algorithm == "sac":
            metrics |= self.update_policy_sac(s)
        elif args.online_algorithm == "awr":
            with torch.no_grad():  # V(s): the mean value of four policy actions
                v = torch.stack([agent.critic(s, agent.policy.sample(s)[0]).min(0).values for _ in range(4)]).mean(0)
                q = agent.critic(s, a).min(0).values
            loss = awr_policy_loss(agent.policy.log_prob(s, a), q, v, args.awr_temperature)
            descend(loss, self.optimizers["policy"])
            metrics |= dict(policy_loss=loss.detach(), advantage=(q - v).mean())
        elif update_policy:
            a_pi = agent.policy.mode(s)
            bc_weight = args.bc_weight if args.online_algorithm == "td3+bc" else 0.0
            loss = td3_policy_loss(agent.critic(s, a_pi), a_pi, a, bc_weight)
            descend(loss, self.optimizers["policy"])
            follow(agent.policy_target, agent.policy, args.tau)
            metrics |= dict(policy_loss=loss.detach())
        return metrics

    @torch.no_grad()
    def identity(self, rows: Tensor) -> dict[str, Tensor]:
        """Cosine between grad_a Q (mean over members) and the score on data, policy and uniform actions (Appendix F)."""
        s, a = rows[:, : self.sizes[0]], rows[:, self.sizes[0] : self.sizes[0] + self.sizes[1]]
        actions = dict(data=a, policy=self.agent.policy.sample(s)[0], uniform=torch.rand_like(a) * 2 - 1)
        gradient = {k: self.agent.critic.action_gradient(s, b).mean(0) for k, b in actions.items()}
        return {f"cosine_{k}": F.cosine_similarity(gradient[k], self.model.score(s, b)).mean() for k, b in actions.items()}


# ================================================================================================ shared: run folder
CHECKPOINT_FORMAT = "smac-checkpoint-1"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, raised between two steps."""


class RunFolder:
    """config.json, metrics.csv (step, phase, name, value), evaluations.csv (an episode a row), TensorBoard, checkpoints."""

    def __init__(self, args: SimpleNamespace, algorithm: str):
        self.args = args
        name = f"{args.task}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.path = args.resume or next(p for i in range(99) if not (p := args.runs_dir / (name + "-" * (i > 0) + str(i or ""))).exists())
        self.path.mkdir(parents=True, exist_ok=True)
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        if args.resume is None:
            config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | dict(resume=None)
            about = dict(git_commit=git_commit(), command=" ".join(sys.argv), python=sys.version, torch=torch.__version__)
            (self.path / "config.json").write_text(json.dumps(config | {"_about": about}, indent=1))
            shutil.copy(__file__, self.path)
            (self.path / "metrics.csv").write_text("step,phase,name,value\n")
            (self.path / "evaluations.csv").write_text("step,phase,episode,return,length,score\n")
        self.tensorboard = self.wandb = None

    def open_logs(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(self.path, purge_step=step)
        if self.args.track:
            import wandb

            self.wandb = wandb.init(project=self.args.wandb_project, name=self.path.name, dir=self.path, config=vars(self.args), id=self.path.name[:64].replace("+", "-"), resume="allow")

    def on_signal(self, number, frame) -> None:
        if self.signal is not None:  # the second time: at once
            sys.exit(128 + number)
        self.signal = number

    def log(self, phase: str, step: int, total: int, metrics: dict) -> None:
        """`step` counts within the phase, `total` over the phases: TensorBoard's axis."""
        lines = [f"{step},{phase},{k},{float(v):.9g}\n" for k, v in metrics.items()]
        self.append("metrics.csv", "".join(lines))
        for k, v in metrics.items():
            self.tensorboard.add_scalar(f"{phase}/{k}", float(v), total)
        if self.wandb:
            self.wandb.log({f"{phase}/{k}": float(v) for k, v in metrics.items()} | dict(total_step=total))

    def append(self, name: str, text: str) -> None:
        try:
            with open(self.path / name, "a") as f:
                f.write(text)
        except OSError as e:
            tqdm.write(f"warning: {self.path / name} cannot be written ({e}): free some space; training goes on.", sys.stderr)

    def save(self, name: str, state: dict) -> bool:
        """Atomic: a run that dies while it writes keeps the file that was there."""
        path, buffer = self.path / name, io.BytesIO()
        torch.save(dict(format=CHECKPOINT_FORMAT, args=vars(self.args)) | state, buffer)
        try:
            path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
            os.replace(path.with_suffix(".tmp"), path)
            return True
        except OSError as e:
            path.with_suffix(".tmp").unlink(missing_ok=True)
            tqdm.write(f"warning: {path} cannot be written ({e}): free some space; the one before is kept.", sys.stderr)
            return False


def read_checkpoint(path: Path) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=False)
        assert state["format"] == CHECKPOINT_FORMAT
        return state
    except Exception as e:
        raise BadInput(f"{path}: not a checkpoint of these scripts ({type(e).__name__}: {e}).") from e


def git_commit() -> str:
    """The script's commit, with + where the working tree differs from it; empty outside a repository."""
    run = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    try:
        dirty = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
        return run("rev-parse", "HEAD").stdout.strip() + "+" * bool(dirty)
    except OSError:
        return ""


def write_replay(path: Path, replay: Replay, cut: np.ndarray, task: Task, attributes: dict) -> None:
    """The online phase's transitions as a D4RL-layout HDF5 file; next observations are left out, all but those at an
    episode's cut follow from the next row."""
    s, a, r, _, terminal = (x.numpy() for x in replay.rows[: len(replay)].cpu().split(replay.sizes, 1))
    columns = dict(observations=s, actions=a, rewards=(r[:, 0] - task.reward_bias) / task.reward_scale)
    columns |= dict(terminals=terminal[:, 0] > 0, timeouts=np.asarray(cut[: len(replay)], bool))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path.with_name(path.name + ".tmp"), "w") as f:
        for k, v in columns.items():
            f.create_dataset(k, data=v, compression="gzip", compression_opts=9, shuffle=True, track_times=False)
        f.attrs.update(attributes)
    os.replace(path.with_name(path.name + ".tmp"), path)


# ================================================================================================ main
def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    task = TASKS[args.task]
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    from_scratch = args.offline_steps == 0 and args.init_from is None

    # ---- everything that can be wrong with the input is found here
    env = TaskEnv(task, render_mode=None)
    obs_dim, act_dim = env.reset(seed=0)[0].shape[0], env.action_space.shape[0]
    data = None
    if not from_scratch:
        raw = read_dataset(task, args.dataset)
        raw = {k: observation(task, v) if "observations" in k else v for k, v in raw.items()}
        check_dataset(raw, obs_dim, act_dim, args.dataset or args.task)
        data = to_transitions(raw, task)
        print(summarize(data, raw, task))
    agent = Agent(obs_dim, act_dim, args).to(device)
    model = ScoreModel(obs_dim, act_dim, args).to(device)
    optimizers = make_optimizers(agent, args)
    replay = Replay(max(args.online_steps, 1), obs_dim, act_dim, device)
    cut = np.zeros(max(args.online_steps, 1), bool)  # time-outs of the replay's rows
    updates = Updates(agent, model, optimizers, replay.sizes, args)
    at = SimpleNamespace(phase="score", step=0, episode=0, actions=[], best=-math.inf, evaluations=[], seconds={})
    run = RunFolder(args, "smac")
    eval_envs = [TaskEnv(task) for _ in range(args.eval_episodes)]
    run.open_logs(0)

    if data is not None:
        dataset = Replay(len(data["w"]), obs_dim, act_dim, device)
        dataset.add(to_rows(data["observations"], data["actions"], task.reward_scale * data["rewards"] + task.reward_bias, data["next_observations"], data["terminals"]))

    def report(phase, step):
        seeds = [episode_seed(args.seed, 1, i) for i in range(args.eval_episodes)]
        result = evaluate(agent.policy, eval_envs, seeds, device)
        score = score_of(task, result["total"], result["last"])
        rows = zip(result["total"], result["length"], score)
        run.append("evaluations.csv", "".join(f"{step},{phase},{i},{t:.6f},{n},{x:.4f}\n" for i, (t, n, x) in enumerate(rows)))
        at.evaluations.append((phase, step, float(score.mean())))
        tqdm.write(f"{phase} {step}: {score.mean():.1f} +- {score.std():.1f}  {time.time()-start:.0f}s")
        return float(score.mean())

    start = time.time()
    if not from_scratch:
        s, a, w = (torch.as_tensor(data[k], device=device) for k in ("observations", "actions", "w"))
        model.mean.copy_(s.mean(0)); model.std.copy_(s.std(0) + 1e-3)
        opt = torch.optim.Adam(model.parameters(), lr=args.score_lr, fused=True)
        ema = copy.deepcopy(model)
        bar = tqdm(range(args.score_steps), mininterval=5)
        for step in bar:
            for g in opt.param_groups: g["lr"] = args.score_lr * 0.5 * (1 + math.cos(math.pi * step / args.score_steps))
            i = torch.randint(len(a), (args.score_batch_size,))
            loss = diffusion_loss(model, s[i], a[i], w[i] if args.score_return else torch.ones_like(w[i]))
            opt.zero_grad(); loss.backward(); opt.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), max(1 / (step + 1), 0.001))
            if (step+1) % args.log_every == 0: run.log("score", step + 1, step + 1, dict(loss=loss.detach()))
        ema.eval().requires_grad_(False)
        updates.model = ema
        print("score", time.time() - start)
        report("offline", 0)
        for step in tqdm(range(args.offline_steps), mininterval=5):
            m = updates.offline(dataset.sample(args.offline_batch_size))
            if (step + 1) % args.log_every == 0: run.log("offline", step + 1, step + 1, m | updates.identity(dataset.sample(256)))
            if (step + 1) % args.eval_every == 0:
                report("offline", step + 1); print({k: round(float(v), 3) for k, v in (m | updates.identity(dataset.sample(256))).items()})
        torch.save(agent.state_dict(), run.path / "offline_dev.pt")
        agent.policy_target.load_state_dict(agent.policy.state_dict())

    obs, _ = env.reset(seed=episode_seed(args.seed, 0, 0))
    s0 = torch.empty(1, obs_dim)
    noise = np.random.default_rng(args.seed)
    for step in tqdm(range(args.online_steps), mininterval=5):
        if from_scratch and step < args.warmup_steps:
            action = (torch.rand(act_dim) * 2 - 1).numpy()
        else:
            with torch.no_grad():
                o = torch.as_tensor(obs, device=device)[None]
                if args.online_algorithm in ("td3", "td3+bc") and step >= args.warmup_steps:
                    action = agent.policy.mode(o)
                    action = (action + args.exploration_noise * torch.randn_like(action)).clamp(-1, 1)
                else:
                    action = agent.policy.sample(o)[0]
                action = action[0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(to_rows(obs[None], action[None], [task.reward_scale * reward + task.reward_bias], next_obs[None], [terminated]))
        cut[step] = truncated and not terminated
        obs = next_obs
        if terminated or truncated:
            at.episode += 1
            obs, _ = env.reset(seed=episode_seed(args.seed, 0, at.episode))
        if step + 1 > args.warmup_steps:
            n_off = int(args.offline_fraction * args.online_batch_size)
            rows = replay.sample(args.online_batch_size - n_off)
            if n_off: rows = torch.cat([dataset.sample(n_off), rows])[torch.randperm(args.online_batch_size)] if args.utd > 1 else torch.cat([dataset.sample(n_off), rows])
            m = updates.online(rows, step % 2 == 0)
            if (step + 1) % args.log_every == 0: run.log("online", step + 1, step + 1, m)
        if step == 0 or (step + 1) % args.eval_every == 0:
            x = report("online", step + 1)
            if args.stop_at_score is not None and x >= args.stop_at_score: break
    if args.save_replay is not None:
        write_replay(args.save_replay, replay, cut, task, dict(command=" ".join(sys.argv), git_commit=git_commit(), seed=args.seed, env_id=task.env_id))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
