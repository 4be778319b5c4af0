# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]>=1.1", "gymnasium-robotics>=1.4", "mujoco>=3.3,<3.11",
#     "tyro>=1.0", "numpy>=2.0", "h5py>=3.11", "minari>=0.5.3", "tqdm>=4.66", "tensorboard>=2.17", "matplotlib>=3.9"]
# ///
"""SMAC, Score-Matched Actor-Critic (arXiv 2602.17632): pretrain on a fixed dataset, go on online without a drop.

    python smac_offline_to_online.py                                     # embedded Hopper data, CPU
    python smac_offline_to_online.py --task walker2d-medium-replay-v2 --online-algorithm td3
    python smac_offline_to_online.py --resume runs/hopper-embedded__smac__0__20260101-120000
    python smac_offline_to_online.py --task door-binary-v0 --help        # the flags with that task's defaults

Three phases, in the order of this file: (1) a diffusion model of the dataset's actions, conditioned on the return w of
their trajectory, whose noise estimate at w = 1 gives a score; (2) an actor-critic whose action gradient follows that
score in units of its noise, grad_a Q(s, a) = alpha sigma_1 grad_a log p_1(a | s, w=1); (3) plain SAC, TD3, TD3+BC or
AWR from there, without the score. Deviations from the paper, with the measurements behind them, are in docs/smac.md;
the largest is alpha (--alpha-mode).
"""

import argparse
import contextlib
import copy
import difflib
import importlib.util
import io
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field, fields, make_dataclass, replace
from http.client import HTTPException
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


# ==== shared: flags of a run
@dataclass
class RunFlags:
    task: str = "hopper-embedded"  # hopper-medium-replay-v2, door-binary-v0, ...; a wrong name lists all. Sets defaults
    seed: int = 0  # of networks, batches, exploration, training and evaluation episodes
    resume: Path | None = None  # run folder to go on with, exactly where its last.pt stands; its flags are the defaults
    dataset: str | None = None  # D4RL-layout HDF5, or minari:ID; else the task's own, from $D4RL_DATASET_DIR or ~/.d4rl
    init_from: Path | None = None  # an offline.pt: its networks go straight to the online phase
    runs_dir: Path = Path("runs")  # where run folders are made
    device: str = "auto"  # auto: cuda where there is one; else cpu, cuda:1, ...
    torch_threads: int = 1  # CPU threads. Matrices this small gain little from more: better start one run a core
    compile: bool = False  # compile the update steps (takes a minute; not tried on a GPU); needs a C++ compiler
    checkpoint_every: int = 10_000  # steps between checkpoints; one more at a phase's end, on Ctrl-C and on SIGTERM
    keep_every: int | None = None  # also keep the networks every so many steps, as offline-5000.pt (for landscapes)
    log_every: int = 500  # steps between rows of metrics.csv and TensorBoard
    eval_every: int = 10_000  # steps between evaluations, offline and online
    eval_episodes: int = 20  # episodes an evaluation, deterministic policy, the same starts each time (WSRL: 20)
    final_episodes: int = 50  # episodes of the last evaluation, from starts that no earlier one used
    save_replay: Path | None = None  # write all that the online phase collected to this file, in D4RL's layout
    stop_at_score: float | None = None  # end the run at the first online evaluation with this mean score
    track: bool = False  # also log to Weights & Biases (pip install wandb; WANDB_MODE=offline works)
    capture_video: bool = False  # film an episode of the final policy (needs moviepy; no screen: MUJOCO_GL=egl)


# ==== flags: a default without a source is from the paper's locomotion column (Tables 6, 7); ROWS has the other columns
@dataclass
class ScoreFlags:
    score_steps: int = 1_000_000  # training steps of the diffusion model
    score_batch_size: int = 512  # transitions
    score_lr: float = 3e-4  # Adam, cosine decay to 0 (IDQL, CleanDiffuser; the paper names none)
    score_hidden: int = 512  # width of the residual trunk; its blocks are four times as wide inside
    score_blocks: int = 3  # residual blocks
    score_condition_hidden: tuple[int, ...] = (512, 512, 512)  # of the network that embeds (s, w) in 64 numbers
    score_return: bool = True  # condition on w, the trajectory's min-max normalised return, and query at w = 1


@dataclass
class OfflineFlags:
    offline_steps: int = 250_000  # score-matched updates; 0: no dataset, the online algorithm from scratch
    offline_batch_size: int = 64  # transitions
    num_critics: int = 10  # ensemble; targets take the minimum of two members, the policy that of all
    critic_hidden: tuple[int, ...] = (512, 512, 512)  # hidden layers
    critic_activation: Literal["tanh", "relu"] = "tanh"  # of the hidden layers
    policy_hidden: tuple[int, ...] = (512, 512, 512)  # hidden layers, relu
    normalize_observations: bool = False  # by the dataset's mean and deviation, in policy and critics (WSRL does not)
    critic_lr: float = 3e-4  # of Muon and Adam alike
    policy_lr: float = 1e-4  # of Muon and Adam alike
    temperature_lr: float = 1e-4  # Adam on the log temperature (WSRL; the paper names none)
    target_entropy_scale: float = -10.0  # target entropy per action dimension
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the target critics
    policy_average: float = 0.001  # rate of the averaged policy, handed over and evaluated; 1: none (ours)
    kappa: float = 40.0  # weight of the score-matching loss
    alpha_mode: Literal["scaled", "fixed", "learned"] = "scaled"  # alpha_scale E|Q|; alpha_scale; the paper's alpha(s)
    alpha_scale: float = 0.015  # see alpha_mode (ours, measured in docs/smac.md)
    score_sign: Literal["minus", "plus"] = "minus"  # Q's gradient follows -eps, along the score; plus: as printed
    optimizer: Literal["muon", "adam"] = "muon"  # muon: hidden matrices of critics and policy on Muon, the rest on Adam
    muon_scale: Literal["rms", "spectral"] = "rms"  # a step as large as Adam's (Moonlight), or Jordan's (paper silent)


@dataclass
class OnlineFlags:
    online_algorithm: Literal["sac", "td3", "td3+bc", "awr", "none"] = "sac"  # algorithm of the online phase
    online_steps: int = 200_000  # environment steps, warm start included (paper, 4.2)
    warmup_steps: int = 5_000  # first online steps: the pretrained policy collects, nothing is updated (paper, 4.2)
    online_batch_size: int = 1024  # transitions, from dataset and replay
    offline_fraction: float = 0.5  # share of each online batch that comes from the dataset (paper, 4.2)
    online_lr_scale: float = 1.0  # critic's and policy's rates online, in units of those offline (ours; the paper: 1)
    utd: int = 1  # critic updates a step, each on 1/utd of the batch (WSRL 4); one policy update on all of it
    backup_entropy: bool = False  # sac: the entropy bonus in the TD target (the paper's L_AC has none)
    awr_temperature: float = 0.4  # awr: weight exp(awr_temperature (Q - V)), at most 100
    bc_weight: float = 5.0  # td3+bc: -Q / mean |Q| + bc_weight (pi(s) - a)^2, a mean over dimensions
    exploration_noise: float = 0.1  # td3, td3+bc: deviation of the noise on collected actions (TD3)


GROUPS = dict(run=RunFlags, score=ScoreFlags, offline=OfflineFlags, online=OnlineFlags)
# Rows of other defaults. adroit, kitchen: paper, Tables 6 and 7. hopper-embedded: ours, the method at a size for two
# CPU cores (docs/smac.md). from-scratch, with --offline-steps 0: SAC's own (softlearning).
ROWS = {
    "adroit": dict(score_steps=3_000_000, score_batch_size=1024, score_blocks=5, score_condition_hidden=(256,) * 3)
    | dict(critic_hidden=(512,) * 4, policy_hidden=(256,) * 3, offline_steps=200_000)
    | dict(awr_temperature=20.0, bc_weight=0.2),
    "kitchen": dict(score_steps=3_000_000, score_batch_size=1024, score_blocks=5, score_condition_hidden=(256,) * 3)
    | dict(critic_hidden=(512,) * 4, kappa=50.0, offline_steps=400_000, awr_temperature=5.0, bc_weight=2.0),
    "hopper-embedded": dict(score_steps=10_000, score_batch_size=128, score_lr=1e-3, score_hidden=128, score_blocks=2)
    | dict(score_condition_hidden=(128, 128), offline_steps=30_000, num_critics=4, critic_hidden=(128, 128))
    | dict(policy_hidden=(128, 128), normalize_observations=True, critic_lr=1e-3, policy_lr=3e-4, tau=0.02)
    | dict(kappa=1.0, temperature_lr=3e-4, target_entropy_scale=-1.0, policy_average=2e-4)
    | dict(online_steps=17_500, warmup_steps=2_000, online_batch_size=256, online_lr_scale=0.3)
    | dict(eval_every=2_500, eval_episodes=10),
    "from-scratch": dict(num_critics=2, critic_hidden=(256, 256), critic_activation="relu", policy_hidden=(256, 256))
    | dict(policy_lr=3e-4, temperature_lr=3e-4, target_entropy_scale=-1.0, backup_entropy=True, optimizer="adam")
    | dict(critic_lr=3e-4, tau=0.005, normalize_observations=False, policy_average=1.0, offline_fraction=0.0)
    | dict(online_steps=1_000_000, warmup_steps=5_000, online_batch_size=256, online_lr_scale=1.0)
    | dict(eval_every=5_000, eval_episodes=10),
}
ALGORITHM = "smac"  # in the run folder's name and in checkpoints
# What a checkpoint fixes for whoever goes on from it: the networks' shapes, and the discount that its values are for.
NETWORK_FLAGS = ("num_critics", "critic_hidden", "critic_activation", "policy_hidden", "gamma")
NETWORK_FLAGS += ("score_hidden", "score_blocks", "score_condition_hidden")


# ==== shared: from the command line to flags
def parse_flags() -> SimpleNamespace:
    """The flags given, over the run to resume or the task's row, over the defaults; as one flat namespace."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, kind in dict(task=str, offline_steps=int, init_from=Path, resume=Path).items():
        first.add_argument(f"--{name.replace('_', '-')}", f"--{name}", type=kind)
    given, _ = first.parse_known_args()
    source = given.init_from if given.resume is None else given.resume / "last.pt"
    start = {} if source is None else read_checkpoint(source)["args"]
    name = given.task or start.get("task", RunFlags.task)
    if given.resume is not None and (name != start["task"] or given.init_from is not None):
        raise BadInput("--resume goes on with the run's own task and checkpoint: leave out --task and --init-from.")
    if given.resume is not None:
        row = start | {"resume": given.resume}
    elif name not in TASKS:
        near = ", ".join(difflib.get_close_matches(name, TASKS, 3, 0.3)) or "none"
        raise BadInput(f"--task {name}: no such task. Near: {near}. All: {', '.join(TASKS)}.")
    else:
        row = ROWS.get(TASKS[name].domain, {}) | ROWS.get(name, {}) | {"task": name}
        if given.init_from is not None:  # it brings what its networks need, and from the same script all of pretraining
            same = start["algorithm"] == ALGORITHM
            own = [f.name for k, group in GROUPS.items() if k not in ("run", "online") for f in fields(group)]
            more = ["optimizer", "muon_scale", *(["dataset"] if name == start["task"] else [])]
            row |= {k: start[k] for k in (*NETWORK_FLAGS, *more, *(own if same else ())) if k in start}
        elif given.offline_steps == 0:
            row |= ROWS.get("from-scratch", {})
    groups = [group() for group in GROUPS.values()]
    for group, f in [(g, f) for g in groups for f in fields(g) if row.get(f.name) is not None]:
        setattr(group, f.name, Path(row[f.name]) if "Path" in str(f.type) else row[f.name])
    kind = make_dataclass("Flags", [(k, Annotated[v, tyro.conf.OmitArgPrefixes]) for k, v in GROUPS.items()])
    flags = tyro.cli(kind, default=kind(*groups), description=(__doc__ or "").split("\n\n")[0])
    args = SimpleNamespace(**{k: v for group in vars(flags).values() for k, v in vars(group).items()})
    shares = ("gamma", "tau", "policy_average", "offline_fraction", "expectile")
    from_zero = ("seed", "score_steps", "offline_steps", "online_steps", "warmup_steps", "kappa", "bc_weight", *shares)
    for k, v in vars(args).items():  # whole numbers (a layer's width, a batch, ...) are 1 or more, unless said above
        numbers = v if isinstance(v, tuple) else (v,) if type(v) in (int, float) else ()
        low = 0 if k in from_zero or k.endswith("_lr") else -math.inf if type(v) is float else 1
        high = 1 if k in shares else math.inf
        if v == () or not all(math.isfinite(x) and low <= x <= high for x in numbers):
            needed = "finite" if low < 0 else f"at least {low}" if high > 1 else f"between {low} and {high}"
            raise BadInput(f"--{k.replace('_', '-')} {v}: a number {needed} is needed.")
    for k in [k for k in NETWORK_FLAGS if k in start and start[k] != getattr(args, k)]:
        raise BadInput(f"--{k.replace('_', '-')}: {source} was trained with {start[k]}, and cannot go on with another.")
    for flag, path in dict(runs_dir=args.runs_dir, save_replay=args.save_replay and args.save_replay.parent).items():
        if path and any(p.exists() and not p.is_dir() for p in (path, *path.parents)):
            raise BadInput(f"--{flag.replace('_', '-')}: {path} is no folder and cannot become one.")
    if args.save_replay is not None and args.save_replay.is_dir():
        raise BadInput(f"--save-replay {args.save_replay} is a folder: name a file in it.")
    for flag, package in dict(track="wandb", capture_video="moviepy").items():
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            raise BadInput(f"--{flag.replace('_', '-')} needs {package}: pip install {package}.")
    return args


class BadInput(SystemExit):
    """Ends the script with one sentence for the user. Code 2: wrong input, before any training; else it is saved."""

    def __init__(self, sentence: str, code: int = 2):
        sentence = " ".join(sentence.split())  # h5py's and torch's messages have several lines
        super().__init__(sentence)
        self.code = code
        print(f"error: {sentence}" if code == 2 else sentence, file=sys.stderr)


# ==== shared: tasks
@dataclass(frozen=True)
class Task:
    env_id: str
    domain: str  # locomotion, adroit, kitchen: which rewards, what a success is
    max_steps: int
    file: str  # in the dataset folder
    url: str | None = None  # D4RL's folder, where it is one of theirs
    zero: float = 0.0  # raw returns with the scores 0 and 100 (D4RL's infos.py)
    hundred: float = 1.0
    scale: float = 1.0  # training reward, offline and online: scale * r + bias (WSRL's values); never evaluation's
    bias: float = 0.0
    env_kwargs: dict = field(default_factory=dict)

    def score(self, total, last):
        """D4RL score of episodes from raw returns and last rewards: 100 is an expert, a success, four subtasks."""
        if self.domain == "locomotion":
            return 100 * (np.asarray(total) - self.zero) / (self.hundred - self.zero)
        return 25.0 * np.asarray(last) if self.domain == "kitchen" else 100.0 * (np.asarray(last) == 0)


D4RL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
ANT = dict(include_cfrc_ext_in_observation=False, contact_cost_weight=0.0)  # D4RL's contact forces are all zero
RETURNS = dict(Hopper=(-20.272305, 3234.3), Walker2d=(1.629008, 4592.3), HalfCheetah=(-280.178953, 12135.0))
RETURNS |= dict(Ant=(-325.6, 3879.7))
KITCHEN = dict(complete="mini_kitchen_microwave_kettle_light_slider", partial="kitchen_microwave_kettle_light_slider")
KITCHEN |= dict(mixed="kitchen_microwave_kettle_bottomburner_light")
TASKS = {}
for name, low_high in RETURNS.items():
    for kind in ("random", "medium", "medium-replay", "medium-expert", "expert"):
        file, kwargs = f"{name.lower()}_{kind.replace('-', '_')}-v2.hdf5", ANT if name == "Ant" else {}
        task = Task(f"{name}-v5", "locomotion", 1000, file, D4RL + "gym_mujoco_v2/", *low_high, env_kwargs=kwargs)
        TASKS[f"{name.lower()}-{kind}-v2"] = task
TASKS["hopper-embedded"] = replace(TASKS["hopper-medium-replay-v2"], file="hopper-medium-replay.hdf5", url=None)
for name, steps in dict(pen=100, door=200, relocate=200).items():
    env_id, file = f"AdroitHand{name.title()}Sparse-v1", f"offpolicy_hand_data/{name}"
    TASKS[f"{name}-binary-v0"] = Task(env_id, "adroit", steps, file, scale=10.0, bias=5.0)
for name, file in KITCHEN.items():
    others = ["bottom burner", "light switch"] if name == "mixed" else ["light switch", "slide cabinet"]
    kwargs, url = dict(tasks_to_complete=["microwave", "kettle", *others]), D4RL + "kitchen/"
    task = Task("FrankaKitchen-v1", "kitchen", 280, file + "-v0.hdf5", url, bias=-4.0, env_kwargs=kwargs)
    TASKS[f"kitchen-{name}-v0"] = task


# ==== shared: data
def download(url: str, path: Path) -> None:
    """Fetch an HDF5 file under a temporary name, check that it is whole, then give it its name."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")  # runs of a sweep may fetch the same file at once
    socket.setdefaulttimeout(30)  # or a dead connection would hang for ever
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part))
        h5py.File(part).close()  # refuses what a broken connection leaves
        os.replace(part, path)
    except (OSError, HTTPException) as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise BadInput(f"Cannot download {url} ({e}): fetch it on another machine and put it at {path}.") from e


def read_dataset(task: Task, dataset: str | None) -> dict[str, np.ndarray]:
    """The dataset in D4RL's layout: a row a step, episodes one after another in time order. Rewards are raw; kitchen's
    are the number of subtasks solved so far and binary Adroit's success - 1, as `TaskEnv` pays them."""
    cache = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")
    if (dataset or "").startswith("minari:") or dataset is None and task.domain == "adroit":
        episodes = list(minari_episodes(task, dataset[7:]) if dataset else adroit_episodes(cache / task.file))
        return {k: np.concatenate([e[k] for e in episodes]) for k in episodes[0]} if episodes else {"observations": []}
    path = Path(dataset) if dataset else cache / task.file if task.url else Path(__file__).parent / "data" / task.file
    if dataset is None and task.url and not path.exists():
        download(task.url + task.file, path)
    required, optional = ("observations", "actions", "rewards", "terminals"), ("timeouts", "next_observations")
    try:
        with h5py.File(path) as f:
            raw = {k: np.asarray(f[k]) for k in required + optional if getattr(f.get(k), "shape", None)}
    except FileNotFoundError as e:
        raise BadInput(f"{path}: no such file. --dataset takes a D4RL-layout HDF5 file or minari:ID.") from e
    except (OSError, RuntimeError) as e:
        fetched = task.url and not dataset
        again = "delete it, and the next run fetches it again" if fetched else "restore it or name another"
        raise BadInput(f"{path}: not a whole HDF5 file ({e}): {again}.") from e
    if missing := [k for k in required if k not in raw]:
        raise BadInput(f"{path}: {', '.join(missing)} missing; D4RL's layout has {', '.join(required)}.")
    return raw


def minari_episodes(task: Task, name: str):
    """A Minari dataset, downloaded by minari if it is not on disk. Its N + 1 observations give true next states."""
    import minari

    try:
        episodes = list(minari.load_dataset(name, download=True).iterate_episodes())
    except Exception as e:  # minari lets through whatever its storage, its hub or the network raise
        raise BadInput(f"minari:{name} cannot be loaded ({type(e).__name__}: {e}); see `minari list remote`.") from e
    for e in episodes:
        obs = e.observations["observation"] if isinstance(e.observations, dict) else e.observations
        rewards = np.cumsum(e.rewards) if task.domain == "kitchen" else e.rewards  # Minari's pays each subtask once
        if task.domain == "adroit":
            if "success" not in (e.infos or {}):
                raise BadInput(f"minari:{name} does not record success in its infos, which a binary task needs.")
            rewards = np.asarray(e.infos["success"], np.float32)[-len(e.rewards) :] - 1
        row = dict(observations=obs[:-1], actions=e.actions, rewards=rewards, next_observations=obs[1:])
        yield row | dict(terminals=e.terminations, timeouts=e.truncations)


def adroit_episodes(stem: Path):
    """AWAC's two files for a binary Adroit task: demonstrations, then rollouts of a cloned policy; rewards -1 and 0."""
    for path in (stem.with_name(f"{stem.name}2_sparse.npy"), stem.with_name(f"{stem.name}_bc_sparse4.npy")):
        if not path.is_file():
            where = f"offpolicy_hand_data (Google Drive 1yUdJnGgYit94X_AvV6JJP5Y3Lx2JF30Y) into {stem.parent.parent}"
            raise BadInput(f"{path}: no such file. Unpack {where}, or name an HDF5 file of the task with --dataset.")
        try:
            episodes = np.load(path, allow_pickle=True)
        except Exception as e:  # whatever unpickling raises
            raise BadInput(f"{path}: not a whole .npy file ({type(e).__name__}: {e}); unpack it again.") from e
        for e in episodes:
            obs = np.asarray([o["state_observation"] if isinstance(o, dict) else o for o in e["observations"]])
            n = min(len(obs), len(e["actions"]), len(e["rewards"]))  # some episodes hold one reward too many
            row = dict(observations=obs[:n], actions=e["actions"][:n], rewards=np.reshape(e["rewards"][:n], n))
            yield row | dict(terminals=np.zeros(n), timeouts=np.arange(n) == n - 1)


def check_dataset(raw: dict[str, np.ndarray], obs_dim: int, act_dim: int, name: str) -> None:
    """Finds what would otherwise fail, or silently spoil the result, after minutes of training."""
    if (n := len(raw["observations"])) < 2:
        raise BadInput(f"{name}: the dataset is empty ({n} rows).")
    for k, v in raw.items():
        dim = {"observations": obs_dim, "next_observations": obs_dim, "actions": act_dim}.get(k, 1)
        if v.dtype.kind not in "fiub" or v.shape[:1] != (n,) or v.size != n * dim:
            shape = f"({n}, {dim}), as in the environment" if dim > 1 else f"({n},), a number a row"
            raise BadInput(f"{name}: {k} is {v.dtype} of shape {v.shape}; it has to be numeric of shape {shape}.")
        if not np.isfinite(v).all():
            row = int(np.argwhere(~np.isfinite(v))[0][0])
            raise BadInput(f"{name}: {k} holds NaN or infinity, first in row {row}; remove that episode.")
    if (largest := float(np.abs(raw["actions"]).max())) > 1.001:
        raise BadInput(f"{name}: actions reach {largest:.4g}, the environment's bounds are -1 and 1; rescale them.")


def to_transitions(raw: dict[str, np.ndarray], task: Task) -> dict[str, np.ndarray]:
    """Rows (s, a, r, s', terminal) and w from episodes. No row pairs a state with another episode's.

    An episode ends at a terminal, a time-out, where the stored next state is not the following row's, and at the end.
    Only a terminal stops bootstrapping. A row whose next state is unknown (the last before a cut, where the file has no
    next_observations) is dropped; its reward still counts in w, the episode's raw return (kitchen: solved subtasks),
    min-max normalised. Returns float32 observations, next_observations (n, o), actions (n, a), rewards, terminals, cuts
    (the last kept row of an episode without a terminal), w (n,), and an entry an episode: returns, terminated (of those
    kept), scores (of all).
    """
    n = len(raw["rewards"])
    obs, rewards = raw["observations"].astype(np.float32, copy=False), raw["rewards"].astype(np.float64).reshape(n)
    terminal = raw["terminals"].reshape(n) > 0
    end = terminal.copy()
    if task.domain == "adroit":
        terminal = rewards == 0  # Cal-QL: done on every successful step
        if not np.isin(rewards, (-1, 0)).all() or not terminal.any():
            raise BadInput("A binary Adroit dataset has the reward -1 and, on success, 0; this one has not.")
    if task.domain == "kitchen":
        terminal = rewards >= 4  # the environment here ends when all four are solved, and only then
    stored = "next_observations" in raw
    next_obs = raw["next_observations"].astype(np.float32, copy=False) if stored else np.r_[obs[1:], obs[-1:]]
    follows = np.r_[np.abs(next_obs[:-1] - obs[1:]).max(1) < 1e-6, not stored]  # whether it is the following row's
    end[:-1] |= ~follows[:-1]
    if "timeouts" in raw:
        end |= raw["timeouts"].reshape(n) > 0
    else:  # as D4RL does: count steps against the environment's limit
        first = np.maximum.accumulate(np.where(np.r_[True, end[:-1]], np.arange(n), 0))
        end |= (np.arange(n) - first) % task.max_steps == task.max_steps - 1
    end[-1] = True
    episode, starts = np.r_[0, np.cumsum(end)[:-1]], np.flatnonzero(np.r_[True, end[:-1]])

    keep = np.ones(n, bool)
    if task.domain == "kitchen":  # nothing follows the fourth subtask
        keep = np.arange(n) <= np.minimum.reduceat(np.where(terminal, np.arange(n), n), starts)[episode]
    if task.domain == "adroit":  # Cal-QL: only episodes with a success, each cut after its last one
        keep = np.arange(n) <= np.maximum.reduceat(np.where(terminal, np.arange(n), -1), starts)[episode]
    total = np.maximum if task.domain == "kitchen" else np.add
    returns = total.reduceat(np.where(keep, rewards, 0), starts)
    scores = task.score(returns, np.maximum.reduceat(rewards, starts))
    terminated, some = np.logical_or.reduceat(terminal & keep, starts), np.logical_or.reduceat(keep, starts)
    low, high = returns[some].min(), returns[some].max()
    w = ((returns - low) / (high - low) if high > low else np.ones_like(returns))[episode]

    unknown = end & follows  # it is the next episode's first state, not this one's last
    next_obs = np.where(unknown[:, None], obs, next_obs)  # of a terminal it is never used
    keep &= ~unknown | terminal
    if not keep.any():
        raise BadInput("No row has a next state: each is an episode of its own. Check the dataset's order and flags.")
    actions = raw["actions"].clip(-1 + 1e-5, 1 - 1e-5)  # atanh stays finite
    columns = dict(observations=obs, actions=actions, rewards=rewards, next_observations=next_obs, w=w)
    data = {k: v[keep].astype(np.float32, copy=False) for k, v in (columns | dict(terminals=terminal)).items()}
    last = np.r_[np.diff(episode[keep]) > 0, True]
    data["cuts"] = (last & (data["terminals"] == 0)).astype(np.float32)
    return data | dict(returns=returns[some], terminated=terminated[some], scores=scores)


def summarize(data: dict[str, np.ndarray], rows: int, task: Task) -> str:
    r, quantiles = data["rewards"], np.quantile(data["returns"], (0, 0.25, 0.5, 0.75, 1))
    return f"""dataset: {len(r):,} transitions from {rows:,} rows, {len(data["returns"]):,} episodes
  ends:    {int(data["terminals"].sum()):,} terminals, {int((~data["terminated"]).sum()):,} episodes cut by time or file
  returns: mean {data["returns"].mean():.1f}, quantiles {" / ".join(f"{q:.0f}" for q in quantiles)}
  rewards: {r.min():.3g} to {r.max():.3g}, in training {task.scale:g} r {task.bias:+g}
  actions: {100 * (np.abs(data["actions"]) > 0.999).mean():.1f} % on the bounds"""


COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "cuts")


class Replay:
    """Rows of COLUMNS, with training's rewards, in one tensor: a batch is one gather. Full: oldest go first. The last
    `extra` columns are the script's own."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device, extra: int = 0):
        self.sizes = (obs_dim, act_dim, 1, obs_dim, 1, 1) + (1,) * extra
        self.rows, self.added = torch.zeros(capacity, sum(self.sizes), device=device), 0

    def add(self, *columns) -> None:
        columns = [np.reshape(x, (-1, size)) for x, size in zip(columns, self.sizes)]
        rows = torch.as_tensor(np.concatenate(columns, 1, dtype=np.float32), device=self.rows.device)
        self.rows[(torch.arange(len(rows), device=rows.device) + self.added) % len(self.rows)] = rows
        self.added += len(rows)

    def sample(self, n: int) -> Tensor:
        return self.rows.index_select(0, torch.randint(min(self.added, len(self.rows)), (n,), device=self.rows.device))

    def state_dict(self) -> dict:
        return dict(rows=self.rows[: self.added].clone(), added=self.added)

    def load_state_dict(self, state: dict) -> None:
        self.rows[: len(state["rows"])], self.added = state["rows"].to(self.rows.device), state["added"]

    def write(self, path: Path, task: Task, **attributes) -> None:
        """D4RL-layout HDF5 with raw rewards. No next_observations: they are the next row's observations."""
        rows = self.rows[: self.added].cpu().split(self.sizes, 1)
        s, a, r, _, terminal, cut, *_ = (x.squeeze(1).numpy() for x in rows)
        columns = dict(observations=s, actions=a, rewards=(r - task.bias) / task.scale)
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path.with_name(path.name + ".part"), "w") as f:
            for k, v in (columns | dict(terminals=terminal > 0, timeouts=cut > 0)).items():
                f.create_dataset(k, data=v, compression="gzip", compression_opts=9, shuffle=True)
            f.attrs.update(attributes)
        os.replace(path.with_name(path.name + ".part"), path)


# ==== shared: environment
def observation(task: Task, obs) -> np.ndarray:
    """The networks' observation from an environment's or a dataset's. Kitchen: joint and object positions, the 30
    numbers that D4RL's 60 (they append the constant goal) and FrankaKitchen-v1's 59 (they mix in velocities) have in
    common. Ant: D4RL's 111 without the 84 contact forces."""
    obs = obs["observation"] if isinstance(obs, dict) else np.asarray(obs)
    kind = (task.env_id, obs.shape[-1] if obs.ndim else 0)
    if kind == ("FrankaKitchen-v1", 59):
        return np.concatenate([obs[..., :9], obs[..., 18:39]], -1)
    return obs[..., : {("FrankaKitchen-v1", 60): 30, ("Ant-v5", 111): 27}.get(kind)]


class TaskEnv(gym.Wrapper):
    """The task's environment with the dataset's observations, raw rewards and ends of episodes. adroit: reward success
    - 1, and a success ends the episode (Cal-QL). kitchen: reward is the number of subtasks solved so far, as in D4RL's
    files (the environment itself pays each once), and the fourth ends the episode. Its state is the episode's seed and
    actions: loading it replays them, and the environment stands exactly where it stood."""

    def __init__(self, task: Task, **kwargs):
        module = "" if task.domain == "locomotion" else "gymnasium_robotics:"  # gym.make imports it, and it registers
        super().__init__(gym.make(module + task.env_id, max_episode_steps=task.max_steps, **task.env_kwargs, **kwargs))
        self.task, self.seed, self.actions = task, 0, []

    def reset(self, *, seed: int, options=None):
        self.seed, self.actions, self.total = seed, [], 0.0
        obs, info = self.env.reset(seed=seed, options=options)
        self.obs = observation(self.task, obs).astype(np.float32)
        return self.obs, info

    def step(self, action):
        self.actions.append(action.tolist())
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.obs = observation(self.task, obs).astype(np.float32)
        if self.task.domain == "adroit":
            reward, terminated = float(info["success"]) - 1, terminated or info["success"]
        if self.task.domain == "kitchen":
            reward = len(info["episode_task_completions"])
            terminated = reward >= 4
        self.reward = float(reward)
        self.total += self.reward
        return self.obs, self.reward, bool(terminated), bool(truncated), info

    def state_dict(self) -> dict:
        return dict(seed=self.seed, actions=self.actions)

    def load_state_dict(self, state: dict) -> None:
        self.reset(seed=state["seed"])
        for action in state["actions"]:
            self.step(np.asarray(action, np.float32))


TRAINING, EVALUATION, FINAL = range(3)  # independent streams of episode seeds


def episode_seed(seed: int, stream: int, episode: int) -> int:
    return int(np.random.SeedSequence([seed, stream, episode]).generate_state(1)[0])


def collect(env: TaskEnv, action: np.ndarray, replay: Replay, run: "Run", *extra) -> bool:
    """One environment step into the replay. At an episode's end, which is returned, the next one begins."""
    obs, task = env.obs, env.task
    next_obs, reward, terminated, truncated, _ = env.step(action)
    # easy to overlook: a time-out is no terminal, and s' is this episode's last state, not the next one's first
    replay.add(obs, action, task.scale * reward + task.bias, next_obs, terminated, truncated and not terminated, *extra)
    if terminated or truncated:
        run.episode(env.total, len(env.actions))
        env.reset(seed=episode_seed(run.args.seed, TRAINING, replay.added))
    return terminated or truncated


# ==== shared: evaluation
@torch.no_grad()
def evaluate(policy: nn.Module, envs: list[TaskEnv], seeds: list[int]) -> list[tuple[float, int, float]]:
    """(raw return, length, last reward) of one episode an environment, with the deterministic policy and one policy
    call for all that still run. Draws nothing from the training's random numbers."""
    device, running = next(policy.parameters()).device, envs
    for env, seed in zip(envs, seeds):
        env.reset(seed=seed)
    while running:
        obs = torch.as_tensor(np.stack([env.obs for env in running]), device=device)
        actions = policy.mode(obs).cpu().numpy()
        running = [env for env, action in zip(running, actions) if not any(env.step(action)[2:4])]
    return [(env.total, len(env.actions), env.reward) for env in envs]


# ==== shared: run folder
FORMAT = "smac-checkpoint-1"  # docs/checkpoint.md


def read_checkpoint(path: Path) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, not {FORMAT}")
        return state
    except Exception as e:  # torch lets through whatever unpickling raises
        raise BadInput(f"{path}: not a checkpoint of these scripts ({type(e).__name__}: {e}).") from e


def git_commit() -> str:
    """The script's commit, with a + where files differ from it; empty outside a repository."""
    describe = "describe --always --abbrev=40 --dirty=+ --exclude=*".split()
    git = ["git", "-C", str(Path(__file__).resolve().parent), *describe]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


class Run:
    """A run's folder: config.json, the script, metrics.csv, evaluations.csv, episodes.csv, TensorBoard, checkpoints.
    `steps` walks a phase and goes on inside it after a resume. A checkpoint holds `networks`' state_dicts; last.pt
    those of everything in `state` as well."""

    def __init__(self, args: SimpleNamespace, algorithm: str, inputs: SimpleNamespace, networks: dict, state: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.args, self.networks, self.state, self.device = args, networks, networks | state, inputs.device
        self.task, self.eval_envs, self.data = inputs.task, inputs.eval_envs, inputs.data
        self.config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.config["algorithm"] = algorithm
        self.position, self.evaluations, self.seconds = {}, [], {}  # steps done a phase; (phase, step, score); clocks
        self.signal, self.ended = None, False  # asked to stop by a signal; asked to leave the phase
        about = dict(command=sys.argv, git_commit=git_commit(), torch=torch.__version__)
        if args.resume is not None:
            self.path = args.resume
            self.resume()
            with contextlib.suppress(OSError, ValueError):  # how it began, and how it went on
                before = json.loads((self.path / "config.json").read_text())
                before["resumed"] = [*before.get("resumed", []), about]
                (self.path / "config.tmp").write_text(json.dumps(before | self.config, indent=1))
                os.replace(self.path / "config.tmp", self.path / "config.json")
        else:
            name = args.runs_dir / f"{args.task}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
            self.path = next(p for i in range(10**6) if not (p := name.with_name(f"{name.name}{i or ''}")).exists())
            try:
                self.path.mkdir(parents=True)
            except OSError as e:
                raise BadInput(f"The run folder cannot be made ({e}): name another with --runs-dir.") from e
            (self.path / "config.json").write_text(json.dumps(self.config | about, indent=1))
            (self.path / "metrics.csv").write_text("step,phase,name,value\n")
            (self.path / "evaluations.csv").write_text("step,phase,episode,return,length,score\n")
            (self.path / "episodes.csv").write_text("step,return,length\n")
            shutil.copy(__file__, self.path)
        if args.track:
            import wandb

            wandb.init(project="smac", name=self.path.name, dir=self.path, config=self.config, sync_tensorboard=True)
        self.tensorboard = SummaryWriter(self.path, purge_step=self.total)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        print(textwrap.fill(", ".join(f"{k} {v}" for k, v in self.config.items()), 110, initial_indent="flags: "))
        print(f"run folder: {self.path}", flush=True)

    def resume(self) -> None:
        saved = read_checkpoint(self.path / "last.pt")
        if saved["args"]["algorithm"] != self.config["algorithm"]:
            raise BadInput(f"{self.path} is a run of {saved['args']['algorithm']}: resume it with its own script.")
        for phase, done in saved["position"].items():
            steps, over = self.config[f"{phase}_steps"], phase != list(saved["position"])[-1]
            if steps < done or over and steps > done:
                raise BadInput(f"--{phase}-steps {steps}: the run has done {done}{' and left that phase' * over}.")
        try:
            for name, thing in self.state.items():
                thing.load_state_dict(saved[name])
            for name, size in saved["sizes"].items():  # drop what was written after the checkpoint
                os.truncate(self.path / name, size)
        except (KeyError, RuntimeError, ValueError) as e:
            raise BadInput(f"{self.path}/last.pt does not fit: resume with the run's own flags ({e}).") from e
        except OSError as e:
            raise BadInput(f"{self.path} lacks a file of the run ({e}): put it back, or start anew.") from e
        self.position, self.evaluations, self.seconds = saved["position"], saved["evaluations"], saved["seconds"]
        torch.set_rng_state(saved["rng"])
        if self.device.type == "cuda" and "cuda_rng" in saved:  # not in a run that began on a CPU
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)

    def on_signal(self, number: int, frame) -> None:
        if self.signal is not None:  # a second time: at once
            sys.exit(128 + number)
        self.signal = number

    @property
    def total(self) -> int:
        return sum(self.position.values())

    def steps(self, phase: str, n: int):
        """Yields the phase's remaining steps. After each: a checkpoint where one is due, and a stop where asked for."""
        start, every = self.position.get(phase, 0), 0.5 if sys.stderr.isatty() else 60
        self.phase, self.bar = phase, tqdm(total=n, initial=start, desc=phase, mininterval=every, disable=start >= n)
        for self.step in range(start, n):
            self.position[phase] = self.step + 1  # what is saved and logged during a step counts it
            yield self.step
            self.bar.update()
            ended = self.ended or self.step + 1 == n
            if self.args.keep_every and phase != "score" and self.due(self.args.keep_every):
                self.save(f"{phase}-{self.step + 1}.pt", self.networks)
            if ended or self.signal is not None or self.due(self.args.checkpoint_every):
                self.save("last.pt", self.state)
            if self.signal is not None:
                again = shlex.join(["python", sys.argv[0], "--resume", str(self.path)])
                raise BadInput(f"Stopped after {phase} step {self.step + 1}. To go on: {again}", 128 + self.signal)
            if ended:
                break
        self.bar.close()

    def due(self, every: int) -> bool:
        return (self.step + 1) % every == 0

    @contextlib.contextmanager
    def clock(self, what: str):
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def writing(self, name: str):
        """A full disk costs a row or a checkpoint, never the run."""
        try:
            yield self.path / name
        except OSError as e:
            tqdm.write(f"{self.path / name} cannot be written ({e}): free some space; the run goes on.", sys.stderr)

    def check_finite(self, values: dict[str, bool]) -> None:
        if bad := [k for k, finite in values.items() if not finite]:
            where = f"{', '.join(bad)} not finite at {self.phase} step {self.step + 1}"
            raise BadInput(f"{where}: lower a learning rate; the last good state is {self.path}/last.pt", 1)

    def log(self, metrics: dict, *show: str) -> None:
        values = {k: float(v) for k, v in metrics.items()}
        self.check_finite({k: math.isfinite(v) for k, v in values.items()})
        values |= {f"seconds/{k}": v for k, v in self.seconds.items()}
        with self.writing("metrics.csv") as path, open(path, "a") as f:
            f.writelines(f"{self.step + 1},{self.phase},{k},{v:.9g}\n" for k, v in values.items())
        with contextlib.suppress(OSError):  # a full disk again, seen later by TensorBoard's thread
            for k, v in values.items():
                self.tensorboard.add_scalar(f"{self.phase}/{k}", v, self.total)
        self.bar.set_postfix({k: f"{values[k]:.3g}" for k in show}, refresh=False)

    def save(self, name: str, parts: dict) -> None:
        """Write a checkpoint under a temporary name, then rename it: until then the one before stays."""
        modules = {k: part for k, part in parts.items() if isinstance(part, nn.Module)}
        self.check_finite({k: all(p.isfinite().all() for p in m.parameters()) for k, m in modules.items()})
        state = dict(format=FORMAT, args=self.config, rng=torch.get_rng_state(), seconds=self.seconds)
        state |= dict(position=self.position, evaluations=self.evaluations)
        tables = [p for k in ("metrics", "evaluations", "episodes") if (p := self.path / f"{k}.csv").exists()]
        state["sizes"] = {p.name: p.stat().st_size for p in tables}  # not of other files that a user keeps there
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        torch.save(state | {k: v.state_dict() for k, v in parts.items()}, whole := io.BytesIO())
        with self.writing(name) as path:
            path.with_suffix(".tmp").write_bytes(whole.getbuffer())
            os.replace(path.with_suffix(".tmp"), path)

    def episode(self, total: float, length: int) -> None:
        """One that was collected: exploration, not evaluation."""
        with self.writing("episodes.csv") as path, open(path, "a") as f:
            f.write(f"{self.step + 1},{total:.9g},{length}\n")
        with contextlib.suppress(OSError):
            self.tensorboard.add_scalar(f"{self.phase}/collected_return", total, self.total)

    def evaluate(self, phase: str, step: int, policy: nn.Module, envs: list | None = None, stream=EVALUATION) -> float:
        """The mean score over one episode an environment. Every episode goes to evaluations.csv; the best online policy
        so far stays in best.pt."""
        envs = self.eval_envs if envs is None else envs
        with self.clock("evaluation"):
            results = evaluate(policy, envs, [episode_seed(self.args.seed, stream, i) for i in range(len(envs))])
        scores = [float(self.task.score(total, last)) for total, _, last in results]
        score, before = float(np.mean(scores)), [x for p, _, x in self.evaluations if p == phase]
        with self.writing("evaluations.csv") as path, open(path, "a") as f:
            rows = enumerate(zip(results, scores))
            f.writelines(f"{step},{phase},{i},{r:.9g},{n},{x:.6g}\n" for i, ((r, n, _), x) in rows)
        with contextlib.suppress(OSError):
            self.tensorboard.add_scalar(f"{phase}/score", score, self.total)
        self.evaluations.append((phase, step, score))
        tqdm.write(f"{phase:>8} {step:>9,}  score {score:6.1f}  ({min(scores):.1f} to {max(scores):.1f})")
        if phase == "online":
            stop = self.args.stop_at_score
            self.ended = step > 0 and stop is not None and score >= stop
            if score >= max(before, default=score):
                self.save("best.pt", self.networks)
        return score

    def finish(self, policy: nn.Module, replay: Replay) -> None:
        """The last evaluation, curve.png, the run in a few lines, and what --save-replay and --capture-video ask for.
        Early: the first fifth of the online steps after the warm start. Regret: the mean over the online evaluations of
        the run's best score minus theirs."""
        from matplotlib.figure import Figure

        self.evaluate("final", self.total, policy, [TaskEnv(self.task) for _ in range(self.args.final_episodes)], FINAL)
        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        lines, handover = {}, self.position.get("offline", 0)
        if self.data is not None:
            lines["dataset, mean episode"] = mean = float(self.data["scores"].mean())
            axes.axhline(mean, color="gray", linestyle=":", label="dataset, mean episode")
        for phase, start in dict(offline=0, online=handover).items():
            if curve := [(start + step, score) for p, step, score in self.evaluations if p == phase]:
                axes.plot(*zip(*curve), ".-", label=phase)
        if online := [(step, score) for phase, step, score in self.evaluations if phase == "online"]:
            if handover > 0:
                axes.axvline(handover, color="black", linewidth=0.8, linestyle="--", label="hand-over")
            scores, warm = [score for _, score in online], self.args.warmup_steps
            early = [score for step, score in online if step <= warm + 0.2 * (self.args.online_steps - warm)]
            lines |= {"at transfer": scores[0], "worst early online": min(early), "last": scores[-1]}
            lines |= {"best": max(scores), "regret (mean of best - score)": max(scores) - float(np.mean(scores))}
        lines[f"final, {self.args.final_episodes} new episodes"] = self.evaluations[-1][2]
        axes.set(xlabel="offline updates, then environment steps", ylabel="D4RL score", title=self.path.name)
        axes.grid(alpha=0.3)
        axes.legend()
        with self.writing("curve.png") as path:
            axes.figure.savefig(path, dpi=150)
        print("\n".join(f"  {name:<32}{x:8.1f}" for name, x in lines.items()))
        if self.args.save_replay is not None:
            about = dict(command=" ".join(sys.argv), git_commit=git_commit(), seed=self.args.seed)
            with self.writing(self.args.save_replay.absolute()) as path:
                replay.write(path, self.task, **about, env_id=self.task.env_id)
        if self.args.capture_video:
            camera = TaskEnv(self.task, render_mode="rgb_array")
            camera.env = gym.wrappers.RecordVideo(camera.env, f"{self.path}/video", lambda episode: True)
            evaluate(policy, [camera], [episode_seed(self.args.seed, FINAL, 0)])
            camera.close()


# ==== shared: set-up
def float32_products(device: torch.device) -> str:
    """The precision to ask of torch: "medium" has oneDNN multiply float32 matrices and not MKL, which on AMD leaves
    half of AVX-512 unused (docs/speed.md). The numbers stay float32: only AMX units would make them bfloat16, and with
    these, as on a GPU, the default stays."""
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not torch.cpu._is_amx_tile_supported()
    return "medium" if device.type == "cpu" and avx512 else "highest"


def set_up(args: SimpleNamespace, extra: int = 0) -> SimpleNamespace:
    """Task, device, environments, dataset. What can be wrong with the input shows here, before a run folder exists.
    `dataset` (a Replay) and `data` (to_transitions) are None where the online algorithm starts from scratch."""
    task = TASKS[args.task]
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        device = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"--device {args.device} cannot be used here: {e}") from e
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        print("--compile needs a C++ compiler (g++, or $CXX) and finds none: going on without.", file=sys.stderr)
        args.compile = False
    if args.capture_video:
        try:
            camera = TaskEnv(task, render_mode="rgb_array")
            camera.reset(seed=0), camera.render(), camera.close()
        except Exception as e:  # whatever the machine's graphics raise
            raise BadInput(f"--capture-video: nothing can be drawn here ({e}); try MUJOCO_GL=egl or osmesa.") from e
    torch.set_num_threads(args.torch_threads)
    torch.set_float32_matmul_precision(float32_products(device))
    torch.manual_seed(args.seed)
    env, *eval_envs = (TaskEnv(task) for _ in range(1 + args.eval_episodes))
    (obs_dim,), (act_dim,) = env.reset(seed=episode_seed(args.seed, TRAINING, 0))[0].shape, env.action_space.shape
    inputs = SimpleNamespace(task=task, device=device, env=env, eval_envs=eval_envs, data=None, dataset=None)
    inputs.replay = Replay(max(args.online_steps, 1), obs_dim, act_dim, device, extra)
    if args.offline_steps > 0 or args.init_from is not None:
        raw = read_dataset(task, args.dataset)
        raw |= {k: observation(task, v) for k, v in raw.items() if "observations" in k}
        check_dataset(raw, obs_dim, act_dim, args.dataset or args.task)
        inputs.data = data = to_transitions(raw, task)
        print(summarize(data, len(raw["rewards"]), task))
        del raw  # from here the dataset is in memory twice, as `data` and as the replay's rows, and no more
        inputs.dataset = Replay(len(data["w"]), obs_dim, act_dim, device, extra)
        columns = data | dict(rewards=task.scale * data["rewards"] + task.bias)
        for part in np.array_split(np.arange(len(data["w"])), 1 + len(data["w"]) // 100_000):
            inputs.dataset.add(*(columns[k][part] for k in COLUMNS), *np.zeros((extra, len(part))))
    return inputs


# ==== shared: networks
def dense(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """Linear layer, orthogonal weight, zero bias: WSRL's initialisation."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain), nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: list[int], activation=nn.ReLU) -> nn.Sequential:
    return nn.Sequential(*(m for i, o in zip(sizes, sizes[1:]) for m in (dense(i, o), activation())))


class Normalized(nn.Module):
    """A network that normalises states inside, by buffers that are in every checkpoint; the identity unless set."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def normalize(self, s: Tensor) -> Tensor:
        return (s - self.mean) / self.std


class Critics(Normalized):
    """N critics Q_i(s, a) in stacked weights (N, out, in): one batched product a layer, and Muon's shape."""

    def __init__(self, n: int, obs_dim: int, act_dim: int, hidden: tuple[int, ...], activation: str):
        super().__init__(obs_dim)
        sizes = [obs_dim + act_dim, *hidden, 1]
        layers = [torch.stack([dense(i, o).weight.data for _ in range(n)]) for i, o in zip(sizes, sizes[1:])]
        self.weights = nn.ParameterList(layers)
        self.biases = nn.ParameterList(torch.zeros(n, 1, o) for o in sizes[1:])
        self.tanh = activation == "tanh"

    def layers(self, s: Tensor, a: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
        """The hidden layers' outputs (N, B, h)."""
        h, hidden = torch.cat([self.normalize(s), a], -1).expand(len(weights[0]), -1, -1), []
        for W, b in zip(weights[:-1], biases[:-1]):
            h = torch.baddbmm(b, h, W.mT)
            hidden.append(h := torch.tanh(h) if self.tanh else torch.relu(h))
        return hidden

    def forward(self, s: Tensor, a: Tensor, members: Tensor | None = None) -> Tensor:
        """(B, o), (B, a) -> (N, B), or fewer rows where only some members are asked."""
        weights, biases = self.weights, self.biases
        if members is not None:
            weights, biases = ([p[members] for p in stack] for stack in (weights, biases))
        return (self.layers(s, a, weights, biases)[-1] * weights[-1]).sum(-1) + biases[-1].squeeze(-1)


# ==== shared: tanh-Gaussian policy
class Policy(Normalized):
    """a = tanh(mu(s) + exp(log_std(s)) xi); exp as SMAC's Table 7, clipped to [1e-5, 10] as WSRL."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
        super().__init__(obs_dim)
        self.trunk, self.head = mlp([obs_dim, *hidden]), dense(hidden[-1], 2 * act_dim, 0.01)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_std = self.head(self.trunk(self.normalize(s))).chunk(2, -1)
        return mu, log_std.clamp(math.log(1e-5), math.log(10.0))

    def mode(self, s: Tensor) -> Tensor:
        a = len(self.head.bias) // 2  # the mean's rows: to the last bit a head without deviations (adopt)
        return torch.tanh(F.linear(self.trunk(self.normalize(s)), self.head.weight[:a], self.head.bias[:a]))

    def sample(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (B, a) and their log-density (B,)."""
        mu, log_std = self(s)
        xi = torch.randn_like(mu)
        u = mu + log_std.exp() * xi
        return torch.tanh(u), self.log_density(xi, log_std, u)

    @staticmethod
    def log_density(xi: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), finite for large |u|
        return (-0.5 * xi.square() - log_std - 0.5 * math.log(2 * math.pi) - log_slope).sum(-1)


# ==== SMAC's networks
def log_prob(policy: Policy, s: Tensor, a: Tensor) -> Tensor:
    """Log-density (B,) of given actions."""
    mu, log_std = policy(s)
    u = torch.atanh(a.clamp(-1 + 1e-6, 1 - 1e-6))
    return policy.log_density((u - mu) / log_std.exp(), log_std, u)


def action_gradient(critic: Critics, s: Tensor, a: Tensor) -> Tensor:
    """grad_a Q_i(s, a) (N, B, a) by the chain rule, written out: its own gradient then takes one backward pass."""
    hidden = critic.layers(s, a, critic.weights, critic.biases)
    slopes = [1 - h * h if critic.tanh else (h > 0).to(h.dtype) for h in hidden]
    g = critic.weights[-1] * slopes[-1]
    for W, slope in zip(reversed(critic.weights[1:-1]), reversed(slopes[:-1])):
        g = (g @ W) * slope
    return g @ critic.weights[0][..., -a.size(1) :]


class ScoreModel(Normalized):
    """Noise model eps(s, a, w, k): IDQL's LayerNorm residual network with SiLU (arXiv 2304.10573), sizes of Table 6,
    cosine schedule (arXiv 2102.09672), dropout 0.1 while fitting (IDQL; the paper names none)."""

    K = 32  # noise levels (Table 6)

    def __init__(self, obs_dim: int, act_dim: int, args: SimpleNamespace):
        super().__init__(obs_dim)
        f = torch.cos((torch.arange(self.K + 1, dtype=torch.float64) / self.K + 0.008) / 1.008 * math.pi / 2).square()
        alpha_bar = (f[1:] / f[:-1]).clamp(min=0.001).cumprod(0).float()
        self.register_buffer("alpha_bar", alpha_bar)  # alpha_bar[0] belongs to k = 1: sigma_1 = 0.060
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))  # whether its noise estimate means anything
        angle = torch.arange(1, self.K + 1)[:, None] * torch.exp(-math.log(10_000) * torch.arange(32) / 31)
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], -1))  # (K, 64)
        self.time = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
        sizes, h = [obs_dim + 1, *args.score_condition_hidden], args.score_hidden
        self.condition = mlp(sizes, nn.SiLU).append(nn.Linear(sizes[-1], 64))
        self.inlet, self.outlet = nn.Linear(act_dim + 128, h), nn.Sequential(nn.SiLU(), nn.Linear(h, act_dim))
        block = [lambda: nn.Dropout(0.1), lambda: nn.LayerNorm(h), lambda: nn.Linear(h, 4 * h), nn.SiLU]
        block += [lambda: nn.Linear(4 * h, h)]
        self.blocks = nn.ModuleList(nn.Sequential(*(m() for m in block)) for _ in range(args.score_blocks))

    def forward(self, s: Tensor, a: Tensor, w: Tensor, k: Tensor) -> Tensor:
        """Noise estimate (B, a) for states s (B, o), noised actions a (B, a), returns w (B,), levels k (B,) in 1..K."""
        condition = self.condition(torch.cat([self.normalize(s), w[:, None]], -1))
        h = self.inlet(torch.cat([a, condition, self.time(self.positions[k - 1])], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.outlet(h)

    def score(self, s: Tensor, a: Tensor) -> Tensor:
        """-eps(s, a, w=1, k=1) = sigma_1 grad_a log p(a | s, w=1), (B, a): the score in units of its noise."""
        one = torch.ones(len(s), device=s.device)
        with torch.autocast(s.device.type, torch.bfloat16, enabled=bf16_is_fast(s.device)):
            return -self(s, a, one, one.long()).float()


class Agent(nn.Module):
    """All that is trained from the offline phase on: one state_dict is the core of a checkpoint."""

    def __init__(self, obs_dim: int, act_dim: int, args: SimpleNamespace):
        super().__init__()
        self.policy = Policy(obs_dim, act_dim, args.policy_hidden)
        self.critic = Critics(args.num_critics, obs_dim, act_dim, args.critic_hidden, args.critic_activation)
        self.policy_average = copy.deepcopy(self.policy).requires_grad_(False)  # is evaluated, offline and online
        self.policy_target = copy.deepcopy(self.policy).requires_grad_(False)  # for TD3's targets
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))  # initial temperature 1 (SAC)
        self.alpha_net = mlp([obs_dim, 256, 256]).append(dense(256, 1))  # alpha_psi(s) (Table 7); --alpha-mode learned
        self.register_buffer("q_scale", torch.zeros(()))  # running mean |TD target|, from 0; --alpha-mode scaled


def make_optimizers(agent: Agent, args: SimpleNamespace) -> dict[str, Muon]:
    """Muon on the matrices between two hidden layers, Adam on input layers, heads and biases (Jordan's advice)."""
    hidden = dict(critic=list(agent.critic.weights[1:-1]), policy=[layer.weight for layer in agent.policy.trunk[2::2]])
    optimizers = dict(temperature=Muon([], [agent.log_temperature]))
    for name in ("critic", "policy", "alpha_net"):
        matrices = hidden.get(name, []) if args.optimizer == "muon" else []
        others = [p for p in getattr(agent, name).parameters() if all(p is not m for m in matrices)]
        optimizers[name] = Muon(matrices, others, scale=args.muon_scale)
    return optimizers


def set_learning_rates(optimizers: dict[str, Muon], args: SimpleNamespace, scale: float = 1.0) -> None:
    """The flags' rates, after --init-from and --resume too: an optimiser's state brings its old ones along."""
    rates = dict(critic=scale * args.critic_lr, policy=scale * args.policy_lr)
    rates |= dict(temperature=args.temperature_lr, alpha_net=1e-4)
    for name, group in ((k, group) for k, v in optimizers.items() for group in v.param_groups):
        group["lr"].fill_(rates[name])  # alpha_net's: Table 7
        group["scale"] = args.muon_scale


# ==== losses
def diffusion_loss(model: ScoreModel, s: Tensor, a: Tensor, w: Tensor) -> Tensor:
    """E || eps - eps_omega(s, sqrt(abar_k) a + sqrt(1 - abar_k) eps, w, k) ||^2, k uniform (paper, Appendix J)."""
    k = torch.randint(1, model.K + 1, (len(a),), device=a.device)
    alpha_bar, eps = model.alpha_bar[k - 1, None], torch.randn_like(a)
    return (eps - model(s, alpha_bar.sqrt() * a + (1 - alpha_bar).sqrt() * eps, w, k)).square().sum(-1).mean()


def td_loss(q: Tensor, y: Tensor) -> Tensor:
    """L_AC = E (Q_i(s, a) - y)^2, a mean over members and batch; q (N, B), y (B,)."""
    return (q - y).square().mean()


def score_matching_loss(action_gradient: Tensor, score: Tensor, alpha: Tensor) -> Tensor:
    """L_SM = E || grad_a Q_i(s, a) - alpha score(s, a) ||^2, a sum over action dimensions, a mean over members and
    batch (paper, 6.2). action_gradient (N, B, a), score (B, a), alpha () or (B, 1)."""
    return (action_gradient - alpha * score).square().sum(-1).mean()


def sac_policy_loss(q: Tensor, log_prob: Tensor, temperature: Tensor) -> Tensor:
    """L_pi = E[temperature log pi(a|s) - min_i Q_i(s, a)], a ~ pi (paper, 6.2; minimum over all members as WSRL)."""
    return (temperature * log_prob - q.min(0).values).mean()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """-log temperature E[log pi + target entropy] (SAC, arXiv 1812.05905; in the logarithm, as most code has it)."""
    return -log_temperature * (log_prob.detach() + target_entropy).mean()


def td3_policy_loss(q: Tensor, a_pi: Tensor, a: Tensor, bc_weight: float) -> Tensor:
    """TD3: -E min_i Q_i. TD3+BC (bc_weight > 0): -Q / mean |Q| + bc_weight (pi(s) - a)^2, the scale without gradient,
    the square a mean over dimensions (arXiv 2106.06860; their alpha = 2.5 is bc_weight 0.4)."""
    q = q.min(0).values
    return -q.mean() / q.abs().mean().detach() + bc_weight * (a_pi - a).square().mean() if bc_weight > 0 else -q.mean()


def awr_policy_loss(log_prob: Tensor, q: Tensor, v: Tensor, awr_temperature: float) -> Tensor:
    """-E[min(exp(awr_temperature (Q - V)), 100) log pi(a|s)] on the batch's actions (WSRL's form)."""
    return -((awr_temperature * (q - v)).exp().clamp(max=100) * log_prob).mean()


# ==== shared: gradient steps
def descend(loss: Tensor, optimizer: Muon, retain_graph: bool = False) -> None:
    """One step of `optimizer` on the gradient of `loss` for its own parameters, and for no others."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=retain_graph)):
        p.grad = g
    optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def compiled(step, args: SimpleNamespace, device: torch.device):
    """The update step under --compile: one graph with the optimisers in it. On a GPU CUDA graphs are asked for; whether
    torch makes them of steps that change optimiser state is not measured."""
    if not args.compile:
        return step
    torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a graph
    torch._inductor.config.fallback_random = True  # the same random numbers as without
    return torch.compile(step, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


# ==== updates
class Updates:
    """The update steps. Each takes replay rows and returns metrics as tensors, so that nothing waits for a GPU."""

    def __init__(self, agent: Agent, model: ScoreModel, optimizers: dict, sizes: tuple, args: SimpleNamespace):
        self.agent, self.model, self.optimizers, self.sizes, self.args = agent, model, optimizers, sizes, args
        self.is_td3 = args.online_algorithm.startswith("td3")
        device = agent.log_temperature.device
        self.offline, self.online = compiled(self.offline, args, device), compiled(self.online, args, device)

    @torch.no_grad()
    def act(self, s: Tensor, td3: bool) -> Tensor:
        """Actions for collecting: the stochastic policy's, or TD3's mean with noise. Not the average's: then no data
        would show the policy its own mistakes (docs/smac.md)."""
        if not td3:
            return self.agent.policy.sample(s)[0]
        a = self.agent.policy.mode(s)
        return (a + self.args.exploration_noise * torch.randn_like(a)).clamp(-1, 1)

    @torch.no_grad()
    def td_target(self, r: Tensor, s_next: Tensor, terminal: Tensor, algorithm: str) -> Tensor:
        """y = r + gamma (1 - terminal) min_i Q'_i(s', a') over two random members (REDQ), (B,). `algorithm`: "smac"
        offline, else --online-algorithm."""
        agent, args = self.agent, self.args
        if algorithm.startswith("td3"):  # target policy smoothing (arXiv 1802.09477)
            a_next = agent.policy_target.mode(s_next)
            a_next = (a_next + (0.2 * torch.randn_like(a_next)).clamp(-0.5, 0.5)).clamp(-1, 1)
        else:
            a_next, log_pi = agent.policy.sample(s_next)
        pair = torch.rand(args.num_critics, device=r.device).argsort()[:2]
        q_next = agent.critic_target(s_next, a_next, pair).min(0).values
        if args.backup_entropy and algorithm == "sac":
            q_next = q_next - agent.log_temperature.exp() * log_pi
        return r.squeeze(1) + args.gamma * (1 - terminal.squeeze(1)) * q_next

    def sac_policy(self, s: Tensor) -> dict[str, Tensor]:
        a, log_pi = self.agent.policy.sample(s)
        temperature = self.agent.log_temperature.detach().exp()
        loss = sac_policy_loss(self.agent.critic(s, a), log_pi, temperature)
        descend(loss, self.optimizers["policy"])
        target_entropy = self.args.target_entropy_scale * a.size(1)
        descend(temperature_loss(self.agent.log_temperature, log_pi, target_entropy), self.optimizers["temperature"])
        self.follow_policy()
        return dict(policy_loss=loss.detach(), entropy=-log_pi.detach().mean(), temperature=temperature)

    def offline(self, rows: Tensor) -> dict[str, Tensor]:
        """Score-matched pretraining: L_SMAC = kappa L_SM + L_AC for the critics, then policy, temperature, targets."""
        agent, args = self.agent, self.args
        s, a, r, s_next, terminal, _ = rows.split(self.sizes, 1)
        y, q = self.td_target(r, s_next, terminal, "smac"), agent.critic(s, a)
        loss = td_loss(q, y)
        metrics = dict(td_loss=loss.detach(), q=q.detach().mean(), q_std=q.detach().std(0, correction=0).mean())
        if args.kappa > 0:
            with torch.no_grad():  # B(A): half of the actions from the policy, half uniform (paper, 6.2)
                half = len(s) // 2
                a_B = torch.cat([agent.policy.sample(s[:half])[0], 2 * torch.rand_like(a[half:]) - 1])
                score = self.model.score(s, a_B) * (1 if args.score_sign == "minus" else -1)
                agent.q_scale.lerp_(y.abs().mean(), 0.005)
            if args.alpha_mode == "learned":
                alpha = agent.alpha_net(self.model.normalize(s))
            else:
                alpha = args.alpha_scale * (agent.q_scale if args.alpha_mode == "scaled" else torch.ones_like(loss))
            sm_loss = score_matching_loss(action_gradient(agent.critic, s, a_B), score, alpha)
            if args.alpha_mode == "learned":
                descend(sm_loss, self.optimizers["alpha_net"], retain_graph=True)
            loss = loss + args.kappa * sm_loss
            metrics |= dict(sm_loss=sm_loss.detach(), alpha=alpha.detach().mean())
        descend(loss, self.optimizers["critic"])
        follow(agent.critic_target, agent.critic, args.tau)
        return metrics | self.sac_policy(s)

    def follow_policy(self) -> None:
        follow(self.agent.policy_target, self.agent.policy, self.args.tau)
        follow(self.agent.policy_average, self.agent.policy, self.args.policy_average)

    def online(self, rows: Tensor, delayed: bool) -> dict[str, Tensor]:
        """utd critic updates on equal parts of the batch, one policy update on all of it; TD3 moves its policy and its
        targets only when `delayed` is true, every second time."""
        agent, args = self.agent, self.args
        for part in rows.chunk(args.utd):
            s, a, r, s_next, terminal, _ = part.split(self.sizes, 1)
            y, q = self.td_target(r, s_next, terminal, args.online_algorithm), agent.critic(s, a)
            loss = td_loss(q, y)
            metrics = dict(td_loss=loss.detach(), q=q.detach().mean(), q_std=q.detach().std(0, correction=0).mean())
            descend(loss, self.optimizers["critic"])
            if not self.is_td3 or delayed:  # in this order torch.compile makes one graph of SAC, not two
                follow(agent.critic_target, agent.critic, args.tau)
        s, a, *_ = rows.split(self.sizes, 1)
        if args.online_algorithm == "sac":
            return metrics | self.sac_policy(s)
        if args.online_algorithm == "awr":
            with torch.no_grad():  # V(s) is the mean value of four policy actions
                q = agent.critic(s, a).min(0).values
                v = sum(agent.critic(s, agent.policy.sample(s)[0]).min(0).values for _ in range(4)) / 4
            loss = awr_policy_loss(log_prob(agent.policy, s, a), q, v, args.awr_temperature)
        elif delayed:
            a_pi = agent.policy.mode(s)
            bc_weight = args.bc_weight if args.online_algorithm == "td3+bc" else 0.0
            loss = td3_policy_loss(agent.critic(s, a_pi), a_pi, a, bc_weight)
        else:
            return metrics
        descend(loss, self.optimizers["policy"])
        self.follow_policy()
        return metrics | dict(policy_loss=loss.detach())

    @torch.no_grad()
    def identity(self, rows: Tensor) -> dict[str, Tensor]:
        """Cosine between grad_a Q, a mean over members, and the score on data, policy and uniform actions (App. F)."""
        s, a, *_ = rows.split(self.sizes, 1)
        actions = dict(data=a, policy=self.agent.policy.sample(s)[0], uniform=2 * torch.rand_like(a) - 1)
        q_gradient = {k: action_gradient(self.agent.critic, s, b).mean(0) for k, b in actions.items()}
        score = {k: self.model.score(s, b) for k, b in actions.items()}
        return {f"cosine_{k}": F.cosine_similarity(q_gradient[k], score[k]).mean() for k in actions}


# ==== main
def adopt(state: dict[str, Tensor], act_dim: int) -> dict[str, Tensor]:
    """The `agent` of another script's checkpoint as SMAC's: the policy's deterministic actions stay exactly as they
    were. TD3+BC's policy has no deviation and gets TD3's exploration noise, 0.1; IQL's is one free vector. Where there
    is no temperature SAC starts at its own, 1 (docs/checkpoint.md)."""
    policy = {k[7:]: v for k, v in state.items() if k.startswith("policy.")}
    if len(policy["head.bias"]) == act_dim:
        log_std = policy.pop("log_std", torch.full((act_dim,), math.log(0.1)))
        policy["head.weight"] = torch.cat([policy["head.weight"], torch.zeros_like(policy["head.weight"])])
        policy["head.bias"] = torch.cat([policy["head.bias"], log_std])
    copies = [{f"{name}.{k}": v for k, v in policy.items()} for name in ("policy", "policy_average", "policy_target")]
    return state | copies[0] | copies[1] | copies[2]


def main() -> None:
    args = parse_flags()
    if args.score_steps == 0 and args.kappa > 0 and args.offline_steps > 0 and args.init_from is None:
        raise BadInput("--score-steps 0 leaves no score to match: fit one, or set --kappa 0.")
    if args.online_batch_size % args.utd:
        raise BadInput("--online-batch-size must be a multiple of --utd.")
    inputs = set_up(args)
    dataset, replay, env, device = inputs.dataset or inputs.replay, inputs.replay, inputs.env, inputs.device
    obs_dim, act_dim = replay.sizes[:2]
    agent, model = Agent(obs_dim, act_dim, args).to(device), ScoreModel(obs_dim, act_dim, args).to(device)
    if not (from_scratch := inputs.dataset is None):
        s, a, w = (torch.as_tensor(inputs.data[k], device=device) for k in ("observations", "actions", "w"))
        w = w if args.score_return else torch.ones_like(w)
        normalized = [m for m in agent.children() if isinstance(m, Normalized) and args.normalize_observations]
        for module in [model, *normalized]:
            module.mean.copy_(s.mean(0)), module.std.copy_(s.std(0) + 1e-3)
    average = copy.deepcopy(model).eval().requires_grad_(False)  # of the weights: what the score is asked of
    fit, optimizers = Muon([], model.parameters()), make_optimizers(agent, args)  # fit: Adam, as there are no matrices
    updates = Updates(agent, average, optimizers, replay.sizes, args)
    networks = dict(agent=agent, score_model=average, **optimizers)
    if args.init_from is not None and args.resume is None:
        start = read_checkpoint(args.init_from)
        try:
            if start["args"]["algorithm"] == ALGORITHM:
                for name, part in networks.items():
                    part.load_state_dict(start[name])
            else:
                agent.load_state_dict(adopt(start["agent"], act_dim), strict=False)
        except (KeyError, RuntimeError, ValueError) as e:
            raise BadInput(f"{args.init_from} does not fit the task or the flags ({e}).") from e
    run = Run(args, ALGORITHM, inputs, networks, dict(model=model, fit=fit, replay=replay, env=env))
    set_learning_rates(optimizers, args)

    # ---- phase 1: the score of the dataset's actions
    for step in run.steps("score", 0 if from_scratch or args.init_from else args.score_steps):
        with run.clock("update"):
            fit.param_groups[0]["lr"].fill_(args.score_lr * 0.5 * (1 + math.cos(math.pi * step / args.score_steps)))
            i = torch.randint(len(a), (args.score_batch_size,), device=device)
            loss = diffusion_loss(model, s[i], a[i], w[i])
            descend(loss, fit)
            follow(average, model, max(1e-3, 1 / (step + 1)))  # IDQL's rate, faster at the start
            average.fitted.fill_(True)
        if run.due(args.log_every):
            run.log(dict(loss=loss.detach()), "loss")

    # ---- phase 2: score-matched pretraining
    for step in run.steps("offline", 0 if args.init_from else args.offline_steps):
        if step == 0:
            run.evaluate("offline", 0, agent.policy_average)
        with run.clock("update"):
            metrics = updates.offline(dataset.sample(args.offline_batch_size))
        if run.due(args.log_every):
            cosines = updates.identity(dataset.sample(256)) if average.fitted else {}
            run.log(metrics | cosines, "q", *list(cosines)[:1], "entropy")
        if run.due(args.eval_every):
            run.evaluate("offline", step + 1, agent.policy_average)
        if step + 1 == args.offline_steps:
            run.save("offline.pt", networks)

    # ---- phase 3: a plain online algorithm
    from_dataset = round(args.offline_fraction * args.online_batch_size)
    set_learning_rates(optimizers, args, args.online_lr_scale)
    for step in run.steps("online", 0 if args.online_algorithm == "none" else args.online_steps):
        if step == 0:  # what was evaluated is what collects the warm start and goes on
            agent.policy.load_state_dict(agent.policy_average.state_dict())
            agent.policy_target.load_state_dict(agent.policy_average.state_dict())
            run.evaluate("online", 0, agent.policy_average)
        with run.clock("environment"):
            learning = step >= args.warmup_steps
            if from_scratch and not learning:
                action = 2 * torch.rand(act_dim) - 1
            else:
                action = updates.act(torch.as_tensor(env.obs, device=device)[None], updates.is_td3 and learning)[0]
            collect(env, action.cpu().numpy(), replay, run)
        if learning:
            with run.clock("update"):
                rows = replay.sample(args.online_batch_size - from_dataset), dataset.sample(from_dataset)
                rows = torch.cat(rows)[torch.randperm(args.online_batch_size, device=device)]  # utd > 1 cuts it up
                metrics = updates.online(rows, run.due(2))
            if run.due(args.log_every):
                run.log(metrics | (updates.identity(rows[:256]) if average.fitted else {}), "q", "td_loss")
        if run.due(args.eval_every):
            run.evaluate("online", step + 1, agent.policy_average)

    run.finish(agent.policy_average, replay)


if __name__ == "__main__":
    main()
