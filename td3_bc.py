# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]>=1.1", "gymnasium-robotics>=1.4",
#     "mujoco>=3.3,<3.11", "farama-notifications>=0.0.4", "tyro>=1.0", "numpy>=2.0",
#     "h5py>=3.11", "tqdm>=4.66", "tensorboard>=2.17", "matplotlib>=3.9"]
# ///
"""TD3+BC (arXiv 2106.06860), offline and then online, in one file.

    python td3_bc.py                                                       # small Hopper dataset
    python td3_bc.py --dataset data/mine.hdf5 --help                       # with its defaults
    python smac_offline_to_online.py --init-from runs/NAME/offline.pt      # on with SAC, TD3, ...

Most runs need only --dataset, --preset (small, small-adroit: for two CPU cores), --seed and
--online-bc. A default that names no source in brackets is the authors' (sfujim/TD3_BC).

TD3 (arXiv 1802.09477) whose policy also imitates the batch's actions. With the smoothed target
action a' = clip(pi'(s') + clip(0.2 xi, -0.5, 0.5), -1, 1) and xi ~ N(0, 1):

    L_Q  = sum_i E (Q_i(s, a) - r - gamma min_j Q'_j(s', a'))^2
    L_pi = E [-lambda Q_1(s, pi(s)) + (pi(s) - a)^2],  lambda = alpha / E |Q_1(s, pi(s))|

1. offline: both on batches of the dataset. Policy and targets move at every second update.
2. online:  the same, with half of the batch from what the policy collects with noise. The paper
            has no such phase: --online-bc says whether the policy goes on imitating.

Other than in the authors' code (sfujim/TD3_BC), layers start orthogonal and the offline phase is
as long as SMAC's. docs/td3_bc.md has the rest, and why.
The file has this order: flags, networks, update, the two phases in main(), and last what has
nothing to do with TD3+BC.
"""

import copy
import csv
import difflib
import importlib.util
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro
from farama_notifications import notifications
from torch import Tensor, nn
from tqdm import tqdm

from muon import Muon


@dataclass
class Args:
    dataset: str = "hopper-embedded"  # file of data/prepare.py, or its name in data/; names the env
    preset: str = "auto"  # small, small-adroit, ... (a wrong one lists all); auto: the family's
    init_from: str | None = None  # offline.pt of this script: straight to phase 2
    resume: str | None = None  # run folder: go on exactly where its last.pt stands
    seed: int = 0  # of networks, batches, exploration and episodes
    # 1. offline
    offline_steps: int = 250_000  # updates (as SMAC; authors: 1_000_000); 0: TD3 from scratch
    offline_batch_size: int = 256
    num_critics: int = 2
    critic_hidden: tuple[int, ...] = (256, 256)
    critic_activation: Literal["tanh", "relu"] = "relu"
    policy_hidden: tuple[int, ...] = (256, 256)
    normalize_observations: bool = True  # by the dataset's mean and deviation
    critic_lr: float = 3e-4
    policy_lr: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005  # rate of the target networks
    alpha: float = 2.5  # weight of Q against imitation
    policy_delay: int = 2  # critic updates to one of the policy and of all targets
    target_noise: float = 0.2  # deviation
    target_noise_clip: float = 0.5
    # 2. online. SMAC's protocol (arXiv 2602.17632, 4.2 and Table 7)
    online_bc: Literal["keep", "anneal", "drop"] = "keep"  # imitation: as offline (FQL); to 0; none
    online_steps: int = 200_000  # environment steps, warm start included; 0: stop before phase 2
    warmup_steps: int = 5_000  # first steps: the pretrained policy collects, nothing learns
    online_batch_size: int = 1024
    offline_fraction: float = 0.5  # share of each batch that comes from the dataset
    exploration_noise: float = 0.1  # deviation (TD3)
    # run
    runs_dir: str = "runs"  # where run folders are made
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1  # of the CPU; matrices this small gain little from more
    compile: bool = False  # torch.compile the updates (a minute; needs a C++ compiler)
    cuda_graphs: bool = True  # on a GPU: each update is recorded once and replayed
    log_every: int = 500
    eval_every: int = 10_000
    eval_episodes: int = 20
    final_episodes: int = 50  # of the last evaluation, from starts never seen before
    checkpoint_every: int = 10_000
    keep_every: int = 0  # also keep the networks every so many steps, as offline-5000.pt, ...
    track: bool = False  # Weights & Biases


# fmt: off
# Other defaults. adroit, kitchen: steps as SMAC's, whose paper names nothing else for TD3+BC.
# small, small-adroit: ours, for two CPU cores (docs/td3_bc.md). from-scratch: TD3's own
# (sfujim/TD3).
PRESETS = {
    "paper": dict(),
    "adroit": dict(offline_steps=200_000),
    "kitchen": dict(offline_steps=400_000),
    "small": dict(
        offline_steps=30_000, offline_batch_size=128, critic_hidden=(128, 128),
        policy_hidden=(128, 128), critic_lr=1e-3, tau=0.02,
        online_steps=20_000, warmup_steps=2_000, online_batch_size=128,
        eval_every=2_500, eval_episodes=10,
    ),
    "small-adroit": dict(
        offline_steps=15_000, offline_batch_size=128, critic_hidden=(256, 256),
        policy_hidden=(256, 256), critic_lr=1e-3, tau=0.02,
        online_steps=5_000, warmup_steps=1_000, online_batch_size=256, eval_every=1_000,
    ),
    "from-scratch": dict(
        online_bc="drop", online_steps=1_000_000, warmup_steps=25_000, online_batch_size=256,
        offline_fraction=0.0, eval_every=5_000, eval_episodes=10,
    ),
}
# fmt: on
ALGORITHM = "td3_bc"  # in run folders and checkpoints
PHASES = dict(offline="1/2 offline updates", online="2/2 online steps")
NETWORK_ARGS = ("num_critics", "critic_hidden", "critic_activation", "policy_hidden")


# ============================================ networks ============================================
def linear(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weight, zero bias (WSRL)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: list[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Hidden layers only: each is followed by the activation."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [linear(inputs, outputs), activation()]
    return nn.Sequential(*layers)


class Normalizer(nn.Module):
    """(s - mean) / std; the identity until fitted. Buffers, so that every checkpoint has them."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def fit(self, s: Tensor) -> None:
        self.mean.copy_(s.mean(0))
        self.std.copy_(s.std(0) + 1e-3)

    def forward(self, s: Tensor) -> Tensor:
        return (s - self.mean) / self.std


class Critics(nn.Module):
    """Q_1 ... Q_N in stacked weights (N, out, in): one batched product a layer."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.normalize = Normalizer(obs_dim)
        self.tanh = args.critic_activation == "tanh"
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        sizes = [obs_dim + act_dim, *args.critic_hidden, 1]
        for inputs, outputs in zip(sizes, sizes[1:]):
            members = [linear(inputs, outputs).weight.data for _ in range(args.num_critics)]
            self.weights.append(torch.stack(members))
            self.biases.append(torch.zeros(args.num_critics, 1, outputs))

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        """(B, o), (B, a) -> (N, B)."""
        h = torch.cat([self.normalize(s), a], -1).expand(len(self.weights[0]), -1, -1)
        for W, b in zip(self.weights[:-1], self.biases[:-1]):
            h = torch.baddbmm(b, h, W.mT)
            h = torch.tanh(h) if self.tanh else torch.relu(h)
        return (h * self.weights[-1]).sum(-1) + self.biases[-1].squeeze(-1)

    def first(self, s: Tensor, a: Tensor) -> Tensor:
        """Q_1 alone, (B,)."""
        h = torch.cat([self.normalize(s), a], -1)
        for W, b in zip(self.weights[:-1], self.biases[:-1]):
            h = torch.addmm(b[0], h, W[0].mT)
            h = torch.tanh(h) if self.tanh else torch.relu(h)
        return (h * self.weights[-1][0]).sum(-1) + self.biases[-1][0, 0]


class Policy(nn.Module):
    """a = tanh(mu(s))."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.normalize = Normalizer(obs_dim)
        self.trunk = mlp([obs_dim, *args.policy_hidden])
        self.head = linear(args.policy_hidden[-1], act_dim, gain=0.01)

    def mode(self, s: Tensor) -> Tensor:
        return torch.tanh(self.head(self.trunk(self.normalize(s))))


# ============================================= update =============================================
class Agent(nn.Module):
    """All that is trained, and the update, which returns metrics as tensors, so that nothing waits
    for a GPU."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.policy = Policy(obs_dim, act_dim, args)
        self.critic = Critics(obs_dim, act_dim, args)
        self.policy_target = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizers = dict(
            critic=adam(self.critic.parameters(), args.critic_lr),
            policy=adam(self.policy.parameters(), args.policy_lr),
        )

    def update(self, batch: "Batch", bc_weight: Tensor, policy_turn: bool) -> dict[str, Tensor]:
        """The critics; at `policy_turn`, every second update, then the policy and all targets."""
        args, s, a = self.args, batch.s, batch.a
        with torch.no_grad():  # target policy smoothing, clipped double Q-learning (TD3)
            a_next = self.policy_target.mode(batch.s_next)
            noise = args.target_noise * torch.randn_like(a_next)
            noise = noise.clamp(-args.target_noise_clip, args.target_noise_clip)
            q_next = self.critic_target(batch.s_next, (a_next + noise).clamp(-1, 1)).min(0).values
            target = batch.r + args.gamma * (1 - batch.terminal) * q_next
        q = self.critic(s, a)
        td_loss = (q - target).square().mean(1).sum()
        descend(td_loss, self.optimizers["critic"])
        metrics = dict(td_loss=td_loss, q=q.mean(), q_std=q.std(0, correction=0).mean())
        if not policy_turn:
            return detached(metrics)

        a_pi = self.policy.mode(s)
        q_pi = self.critic.first(s, a_pi)  # easy to overlook: Q_1, not the minimum
        # without imitation lambda stays: TD3's own gradients, mean |Q| times as large, would meet
        # the second moments that Adam has from the offline phase
        lmbda = args.alpha / q_pi.abs().mean().detach()
        bc_loss = (a_pi - a).square().mean()  # over batch and dimensions (the authors' code)
        policy_loss = -lmbda * q_pi.mean() + bc_weight * bc_loss
        descend(policy_loss, self.optimizers["policy"])
        follow(self.critic_target, self.critic, args.tau)
        follow(self.policy_target, self.policy, args.tau)
        metrics |= dict(policy_loss=policy_loss, q_policy=q_pi.mean(), bc_loss=bc_loss)
        return detached(metrics)

    @torch.no_grad()
    def act(self, s: Tensor) -> Tensor:
        """Actions for collecting."""
        a = self.policy.mode(s)
        return (a + self.args.exploration_noise * torch.randn_like(a)).clamp(-1, 1)


def adam(params, lr: float) -> Muon:
    """Adam: Muon without matrices, as torch.compile takes no torch.optim.Adam into one graph."""
    return Muon([], params, lr)


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in metrics.items()}


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, retain_graph: bool = False) -> None:
    """One step on the loss, for the optimiser's own parameters and no others."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(params, torch.autograd.grad(loss, params, retain_graph=retain_graph)):
        p.grad = gradient
    optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Polyak average: target += rate (source - target), of parameters, not of buffers."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


# ============================================== main ==============================================
def main() -> None:
    args, task = parse_args()
    device = set_up(args)
    env, eval_envs = TaskEnv(task), [TaskEnv(task) for _ in range(args.eval_episodes)]
    env.reset(episode_seed(args.seed, TRAINING, 0))
    obs_dim, act_dim = len(env.obs), env.action_space.shape[0]
    replay = Replay(args.online_steps, obs_dim, act_dim, device)
    with device:
        agent = Agent(obs_dim, act_dim, args)

    from_scratch = args.offline_steps == 0 and not args.init_from
    if from_scratch:
        dataset = replay
    else:
        data = load_dataset(args.dataset, obs_dim, act_dim)
        dataset = dataset_replay(data, task, device)
        if args.normalize_observations:  # online and in evaluations these numbers stay
            s = torch.as_tensor(data["observations"], device=device)
            for network in agent.children():
                network.normalize.fit(s)
    networks = dict(agent=agent, **agent.optimizers)
    if args.init_from and not args.resume:
        load_parts(networks, read_checkpoint(args.init_from), args.init_from)
    agent.update = accelerated(agent.update, args)
    run = Run(args, task, networks, dict(replay=replay, env=env))
    bc_weight = torch.ones((), device=device)  # a tensor: torch.compile

    # ---- phase 1: the dataset
    for step in run.steps("offline", 0 if args.init_from else args.offline_steps):
        if step == 0:
            run.evaluate(0, agent.policy, eval_envs)
        batch = dataset.unpack(dataset.sample(args.offline_batch_size))
        metrics = agent.update(batch, bc_weight, policy_turn=run.due(args.policy_delay))
        if run.due(args.log_every):
            run.log(metrics)
        if run.due(args.eval_every):
            run.evaluate(step + 1, agent.policy, eval_envs)
        if step + 1 == args.offline_steps:
            run.save("offline.pt", networks)

    # ---- phase 2: the same update on dataset and collected transitions
    from_dataset = round(args.offline_fraction * args.online_batch_size)
    set_lr(agent.optimizers["critic"], args.critic_lr)  # the flags' rates, not a checkpoint's
    set_lr(agent.optimizers["policy"], args.policy_lr)
    for step in run.steps("online", args.online_steps):
        if step == 0:
            run.evaluate(0, agent.policy, eval_envs)
        learning = step >= args.warmup_steps

        obs = env.obs
        if from_scratch and not learning:
            action = 2 * torch.rand(act_dim) - 1
        else:
            action = agent.act(torch.as_tensor(obs, device=device)[None])[0]
        action = action.cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # easy to overlook: a time-out is no terminal, and s' is this episode's last state
        replay.add(obs, action, task.train_reward(reward), next_obs, terminated)
        if terminated or truncated:
            run.log_episode(env)
            env.reset(episode_seed(args.seed, TRAINING, replay.n))

        if learning:
            if args.online_bc == "anneal":
                progress = (step - args.warmup_steps) / (args.online_steps - args.warmup_steps)
                bc_weight.fill_(1 - progress)
            elif args.online_bc == "drop":
                bc_weight.fill_(0)
            collected = replay.sample(args.online_batch_size - from_dataset)
            batch = dataset.unpack(torch.cat([collected, dataset.sample(from_dataset)]))
            metrics = agent.update(batch, bc_weight, policy_turn=run.due(args.policy_delay))
            if run.due(args.log_every):
                run.log(metrics)
        if run.due(args.eval_every):
            run.evaluate(step + 1, agent.policy, eval_envs)

    run.finish(agent.policy)


# ============================== shared: the same in all four scripts ==============================
RESUME_MAY_CHANGE = ("resume", "online_steps", "device", "threads", "compile", "cuda_graphs")
RESUME_MAY_CHANGE += ("track", "log_every", "eval_every", "eval_episodes", "final_episodes")
RESUME_MAY_CHANGE += ("checkpoint_every", "keep_every")
THIS_RUN_ALONE = ("online_steps", "device", "threads", "compile", "cuda_graphs", "runs_dir")
THIS_RUN_ALONE += ("track",)  # --init-from does not take them over


def parse_args() -> tuple[Args, "Task"]:
    """The command line, over the flags of the checkpoint to go on from, over the preset, over the
    defaults; and the task that the dataset describes."""
    # a first pass finds what the defaults of all others depend on
    given, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)
    if given.resume:
        return parse_resume(given.resume)
    default, kept = Args(), {}
    if given.init_from:
        saved = read_checkpoint(given.init_from)
        if ALGORITHM not in ("smac", saved["algorithm"]):
            where = f"{given.init_from} is a checkpoint of {saved['algorithm']}"
            sys.exit(f"error: {where}: smac_offline_to_online.py takes those of all scripts.")
        default = Args(dataset=saved["args"]["dataset"], preset=saved["args"]["preset"])
        given, _ = tyro.cli(Args, default=default, add_help=False, return_unknown_args=True)
        # of this script's file all flags but those of that run alone, of another's the networks'
        names = NETWORK_ARGS if saved["algorithm"] != ALGORITHM else saved["args"]
        kept = {name: saved["args"][name] for name in names if name in saved["args"]}
        for name in THIS_RUN_ALONE:
            kept.pop(name, None)
    task = read_task(find_dataset(given.dataset))
    preset = given.preset
    if preset == "auto":
        preset = task.family if task.family in PRESETS else "paper"
        if Path(given.dataset).stem == "hopper-embedded":
            preset = "small"
        if given.offline_steps == 0 and not given.init_from:
            preset = "from-scratch"
    elif preset not in PRESETS:
        sys.exit(f"error: there is no preset {preset}, but auto, {', '.join(PRESETS)}.")
    default = replace(default, **(PRESETS.get(preset, {}) | kept))
    args = tyro.cli(Args, default=default, description=__doc__)
    start = f"{Path(args.dataset).stem} on {args.device}, preset {preset}"
    if kept:
        start = f"{start} and flags of {args.init_from}"
    told = ("dataset", "device", "preset", "init_from", "seed")
    print_flags(f"{start}, seed {args.seed}", default, args, told)
    return args, task


def parse_resume(folder: str) -> tuple[Args, "Task"]:
    if not Path(folder).expanduser().is_dir():
        sys.exit(f"error: --resume takes a run's folder, and {folder} is none.")
    saved = read_checkpoint(f"{folder}/last.pt")
    if saved["algorithm"] != ALGORITHM:
        sys.exit(f"error: {folder} is a run of {saved['algorithm']}: resume it with that script.")
    default = replace(Args(**saved["args"]), resume=folder)
    args = tyro.cli(Args, default=default, description=__doc__)
    print_flags("resumed", default, args)
    phase, done = list(saved["done"].items())[-1]
    for name, was in saved["args"].items():
        may_change = name in RESUME_MAY_CHANGE or name == f"{phase}_steps"
        if getattr(args, name) != was and not may_change:
            sys.exit(f"error: --resume cannot change {name}, which was {was}: start a new run.")
    if getattr(args, f"{phase}_steps") < done:
        sys.exit(f"error: the run has done {done}: --{phase}-steps has to be that or more.")
    return args, Task(**saved["task"])


def print_flags(start: str, default: Args, args: Args, told: tuple[str, ...] = ()) -> None:
    """One paragraph: `start`, and the flags that differ from the defaults, but those in `told`."""
    before, words = asdict(default), [start]
    for name, value in asdict(args).items():
        if value != before[name] and name not in told:
            words.append(f"{name} {value}")
    width = shutil.get_terminal_size().columns
    print(textwrap.fill(", ".join(words), width, break_on_hyphens=False))


def set_up(args: Args) -> torch.device:
    if min(args.eval_episodes, args.final_episodes) < 1:
        sys.exit("error: --eval-episodes and --final-episodes have to be 1 or more.")
    if min(args.seed, args.offline_steps, args.online_steps) < 0 or args.threads < 1:
        sys.exit("error: --seed and numbers of steps have to be 0 or more, --threads 1 or more.")
    if not 0 <= args.offline_fraction <= 1:
        sys.exit("error: --offline-fraction is a share of each batch, from 0 to 1.")
    if min(args.offline_batch_size, args.online_batch_size) < 2:
        sys.exit("error: a batch has 2 rows or more.")
    if not (args.critic_hidden and args.policy_hidden):
        sys.exit("error: --critic-hidden and --policy-hidden need sizes, such as 256 256.")
    if 0 < args.online_steps <= args.warmup_steps:
        print("no update online: --online-steps is not above --warmup-steps")
    if 0 < args.online_steps < args.eval_every:
        print("no evaluation online but the first: --eval-every is above --online-steps")
    if args.track and importlib.util.find_spec("wandb") is None:
        sys.exit("error: --track needs Weights & Biases: pip install wandb.")
    sys.path.append(os.getcwd())  # where one's own my_module:MyEnv-v0 may lie
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # moments of idle units: numbers so small slow a CPU down
    # "medium" has oneDNN multiply, still in float32, and not MKL, which on AMD leaves half of
    # AVX-512 unused (docs/speed.md). Only with AMX units would it be bfloat16.
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if args.device == "cpu" and avx512 and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
    try:
        device = torch.zeros((), device=args.device).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).split(". ")[0].splitlines()[0]  # some go on for a page
        sys.exit(f"error: --device {args.device} cannot be used here ({why}): try --device cpu.")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are recorded
    return device


def accelerated(update, args: Args):
    """The update, compiled and recorded as the flags say."""
    return recorded(compiled(update) if args.compile else update, args)


def recorded(update, args: Args):
    on_gpu = torch.device(args.device).type == "cuda"
    return Recorded(update) if on_gpu and args.cuda_graphs else update


def compiled(update):
    """The update as one graph, with the optimisers in it and the same random numbers as without."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        sys.exit("error: --compile needs a C++ compiler: install g++, or leave the flag out.")
    log = logging.getLogger("torch._dynamo.variables.ctx_manager")
    log.setLevel(logging.ERROR)  # "Profiler record function ... will be ignored"
    torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside a graph
    torch._inductor.config.fallback_random = True
    return torch.compile(update, dynamic=False)


class Recorded:
    """An update whose kernels a GPU starts all at once, as a CUDA graph: to launch them one by one
    takes longer than to run them (docs/speed.md).

    update(*inputs, **flags): inputs are tensors or tuples of tensors. Each combination of flags and
    shapes has a graph of its own. Its first three calls run as usual, as torch wants it before a
    recording; the fourth call's tensors become the graph's own, which each later call overwrites,
    as it does what was returned."""

    def __init__(self, update):
        self.update = update
        self.calls, self.graphs, self.inputs, self.outputs = {}, {}, {}, {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs, **flags):
        new = leaves(inputs)
        key = (*flags.values(), *(x.shape for x in new))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.update(*inputs, **flags)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if key not in self.graphs:
            self.graphs[key], self.inputs[key] = torch.cuda.CUDAGraph(), new
            with torch.cuda.graph(self.graphs[key]):  # this runs nothing yet
                self.outputs[key] = self.update(*inputs, **flags)
        torch._foreach_copy_(self.inputs[key], new)
        self.graphs[key].replay()
        return self.outputs[key]


def leaves(inputs) -> list[Tensor]:
    """The tensors in tuples of tensors."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return sum(map(leaves, inputs), [])


# ---- data: the files that data/prepare.py writes (docs/data.md)
class Task(NamedTuple):
    """An environment and its rewards: the attributes of a dataset's file."""

    env_id: str
    env_kwargs: dict
    max_episode_steps: int
    family: str  # locomotion, adroit, kitchen, other: which preset
    goals: int  # > 0: the reward is the number of goals reached so far; all of them end the episode
    reward_scale: float  # training's reward is scale * r + bias (WSRL); evaluation's is raw
    reward_bias: float
    return_0: float  # raw return whose normalized return is 0, and 100 (D4RL)
    return_100: float
    mean_normalized_return: float  # of the dataset's episodes

    def train_reward(self, r):
        return self.reward_scale * r + self.reward_bias


def find_dataset(name: str) -> Path:
    folder = Path(__file__).resolve().parent / "data"
    for path in (Path(name).expanduser(), folder / f"{name}.hdf5"):
        if path.is_file():
            return path
    names = [path.stem for path in folder.glob("*.hdf5")]
    near = ", ".join(difflib.get_close_matches(name, names, cutoff=0.4) or names)
    how = f"python data/prepare.py {name} makes it, if it is a known name; README has the rest"
    sys.exit(f"error: no dataset {name}: data/ has {near}. {how}.")


def read_task(path: Path) -> Task:
    try:
        with h5py.File(path) as f:
            values = dict(f.attrs)
    except OSError as error:
        sys.exit(f"error: {path} is not a whole HDF5 file ({error}): make it anew.")
    if values.get("format") != "smac-dataset-1":
        sys.exit(f"error: {path} is not a prepared file: python data/prepare.py {path} makes one.")
    for name, value in values.items():
        if isinstance(value, np.generic):
            values[name] = value.item()
    values["env_kwargs"] = json.loads(values["env_kwargs"])
    return Task(*(values[name] for name in Task._fields))


def load_dataset(name: str, obs_dim: int, act_dim: int) -> dict[str, np.ndarray]:
    """Transitions in time order, n rows: observations, next_observations (n, o), actions (n, a),
    raw rewards, terminals (no bootstrapping), returns (the whole episode's), last (of an episode).
    An episode that was cut off ends in a row that holds only its last state; it is dropped here.
    After a terminal s' is not known and never used: s stands in its place."""
    path = find_dataset(name)
    with h5py.File(path) as f:
        columns = ("observations", "actions", "rewards", "terminals", "ends", "returns")
        data = {column: f[column][:] for column in columns}
    s, a = data["observations"], data["actions"]
    if len(s) == 0:
        sys.exit(f"error: {path} only describes an environment: use --offline-steps 0.")
    if (s.shape[1], a.shape[1]) != (obs_dim, act_dim):
        sys.exit(f"error: {path} does not fit its environment: prepare it again.")
    only_state = data["ends"] & ~data["terminals"]  # an episode ends with one, or in a terminal
    data["next_observations"] = np.concatenate([s[1:], s[-1:]])
    data["next_observations"][data["ends"]] = s[data["ends"]]
    data["last"] = data["terminals"] | np.append(only_state[1:], True)  # for cal_ql.py
    return {name: column[~only_state] for name, column in data.items()}


class Batch(NamedTuple):
    s: Tensor  # (B, o)
    a: Tensor  # (B, a)
    r: Tensor  # (B,)
    s_next: Tensor  # (B, o)
    terminal: Tensor  # (B,)
    return_to_go: Tensor  # (B,), 0 but in cal_ql.py


class Replay:
    """Transitions in one tensor, so that a batch is one gather."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.sizes = (obs_dim, act_dim, 1, obs_dim, 1, 1)
        self.rows = torch.zeros(capacity, sum(self.sizes), device=device)
        self.n = 0

    def add(self, *transition) -> None:
        """s, a, r, s', terminal: of one transition or of many."""
        columns = [np.reshape(x, (-1, size)) for x, size in zip(transition, self.sizes)]
        rows = torch.as_tensor(np.concatenate(columns, 1, dtype=np.float32))
        self.rows[self.n : self.n + len(rows), : rows.shape[1]] = rows  # return_to_go stays 0
        self.n += len(rows)

    def sample(self, n: int) -> Tensor:
        return self.rows.index_select(0, torch.randint(self.n, (n,), device=self.rows.device))

    def unpack(self, rows: Tensor) -> Batch:
        s, a, r, s_next, terminal, return_to_go = rows.split(self.sizes, 1)
        return Batch(s, a, r.squeeze(1), s_next, terminal.squeeze(1), return_to_go.squeeze(1))

    def state_dict(self) -> dict:
        return dict(rows=self.rows[: self.n].clone(), sizes=self.sizes)

    def load_state_dict(self, state: dict) -> None:
        self.n = len(state["rows"])
        self.rows[: self.n] = state["rows"]


def dataset_replay(data: dict[str, np.ndarray], task: Task, device: torch.device) -> Replay:
    s, a, s_next = data["observations"], data["actions"], data["next_observations"]
    replay = Replay(len(s), s.shape[1], a.shape[1], device)
    replay.add(s, a, task.train_reward(data["rewards"]), s_next, data["terminals"])
    return replay


# ---- environment
class TaskEnv(gym.Wrapper):
    """The task's environment with the dataset's observations, actions and rewards. Its state is the
    seed and the actions of the episode: loading replays them."""

    def __init__(self, task: Task, **kwargs):
        kwargs = task.env_kwargs | kwargs
        if task.goals:  # Gymnasium-Robotics' notice is of dense rewards only
            notifications.pop("gymnasium_robotics", None)
        try:
            env = gym.make(task.env_id, max_episode_steps=task.max_episode_steps, **kwargs)
        except Exception as error:  # whatever an environment raises
            why = " ".join(str(error).split())
            sys.exit(f"error: the dataset's environment, {task.env_id}, cannot be made: {why}")
        super().__init__(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))
        self.task = task

    def reset(self, seed: int):
        self.seed, self.actions, self.rewards = seed, [], []
        obs, info = self.env.reset(seed=seed)
        self.obs = self.observe(obs)
        return self.obs, info

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.task.goals:  # the reward is the number of goals reached, not the environment's
            # adroit: success, 0 or 1; kitchen: how many tasks are completed
            reward = info.get("success", len(info.get("episode_task_completions", ())))
            terminated = reward == self.task.goals
        self.obs = self.observe(obs)
        self.actions.append(action.tolist())
        self.rewards.append(float(reward))
        return self.obs, float(reward), bool(terminated), truncated, info

    def observe(self, obs) -> np.ndarray:
        if self.task.family == "kitchen":  # the positions, which D4RL's data have as well
            obs = np.concatenate([obs["observation"][:9], obs["observation"][18:39]])
        elif isinstance(obs, dict):
            obs = gym.spaces.flatten(self.env.observation_space, obs)
        return np.asarray(obs, np.float32)

    def normalized_return(self) -> float:
        """The episode's, in percent: 100 is an expert's (D4RL), or all goals reached."""
        result = self.rewards[-1] if self.task.goals else sum(self.rewards)
        return 100 * (result - self.task.return_0) / (self.task.return_100 - self.task.return_0)

    def state_dict(self) -> dict:
        return dict(seed=self.seed, actions=self.actions)

    def load_state_dict(self, state: dict) -> None:
        self.reset(state["seed"])
        for action in state["actions"]:
            self.step(np.asarray(action, np.float32))


TRAINING, EVALUATION, FINAL = range(3)  # independent streams of episode seeds


def episode_seed(seed: int, stream: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1)[0])


@torch.no_grad()
def rollout(policy: nn.Module, envs: list[TaskEnv], seeds: list[int]) -> None:
    """An episode of the deterministic policy in each environment, all of them side by side."""
    device, running = next(policy.parameters()).device, envs
    for env, seed in zip(envs, seeds):
        env.reset(seed)
    while running:
        obs = torch.as_tensor(np.stack([env.obs for env in running]), device=device)
        still_running = []
        for env, action in zip(running, policy.mode(obs).cpu().numpy()):
            _, _, terminated, truncated, _ = env.step(action)
            if not (terminated or truncated):
                still_running.append(env)
        running = still_running


# ---- run folder
def read_checkpoint(path: str) -> dict:
    if Path(path).expanduser().is_dir():
        sys.exit(f"error: {path} is a folder: name a checkpoint in it, offline.pt or last.pt.")
    try:
        saved = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
        assert saved["format"] == "smac-checkpoint-2"  # docs/checkpoint.md
    except (FileNotFoundError, NotADirectoryError):
        sys.exit(f"error: there is no {path}.")
    except Exception:  # torch lets through whatever unpickling raises
        sys.exit(f"error: {path} is damaged, or no checkpoint of these scripts' present version.")
    return saved


def load_parts(parts: dict, saved: dict, path: str) -> None:
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, RuntimeError, ValueError):
        why = "do not fit this script or --dataset; sizes come from the file: leave their flags out"
        sys.exit(f"error: the networks in {path} {why}.")


class Run:
    """A run's folder: config.json, this script, two tables, TensorBoard, checkpoints, curve.png.

    `steps` walks through a phase. last.pt holds all of `state`, the random generator and the length
    of the tables: a run killed at any moment and resumed ends like one that was not, on a CPU bit
    for bit."""

    def __init__(self, args: Args, task: Task, networks: dict, rest: dict, label=ALGORITHM):
        self.args, self.task, self.networks, self.state = args, task, networks, networks | rest
        self.label = label  # in the folder's name
        self.config = dict(asdict(args), resume=None)
        self.device = torch.device(args.device)
        self.done: dict[str, int] = {}  # steps of each phase so far
        self.start = time.time()
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        if args.resume:
            self.path = Path(args.resume).expanduser()
            self.load(self.path / "last.pt")
        else:
            self.make_folder()
        if args.track:
            import wandb

            about = dict(project="smac", name=self.path.name, config=self.config)
            wandb.init(**about, sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter  # takes a second: not for --help

        self.tensorboard = SummaryWriter(self.path)
        table = [f"|{name}|{value}|" for name, value in self.config.items()]
        self.tensorboard.add_text("flags", "\n".join(["|flag|value|", "|-|-|", *table]))
        print(self.path, flush=True)

    def make_folder(self) -> None:
        name = f"{Path(self.args.dataset).stem}__{self.label}__{self.args.seed}"
        name += time.strftime("__%Y%m%d-%H%M%S")
        self.path = Path(self.args.runs_dir).expanduser() / name
        while True:
            try:
                self.path.mkdir(parents=True)
                break
            except FileExistsError:  # another run of the same second
                self.path = self.path.with_name(self.path.name + "b")
            except OSError as error:
                sys.exit(f"error: no run folder can be made in --runs-dir: {error}.")
        folder = shlex.quote(str(Path(__file__).resolve().parent))
        commit = os.popen(f"git -C {folder} describe --always --dirty=+ 2>{os.devnull}").read()
        # the commit has a + where files differ from it
        about = dict(algorithm=ALGORITHM, command=sys.argv, commit=commit.strip())
        if self.args.init_from:
            about["init_algorithm"] = read_checkpoint(self.args.init_from)["algorithm"]
        about.update(self.config, torch=torch.__version__, task=self.task._asdict())
        (self.path / "config.json").write_text(json.dumps(about, indent=1))
        (self.path / "metrics.csv").write_text("step,phase,name,value\n")
        (self.path / "evaluations.csv").write_text("step,phase,episode,return,length,normalized\n")
        shutil.copy(__file__, self.path)
        shutil.copy(Path(__file__).with_name("muon.py"), self.path)

    def on_signal(self, number: int, frame) -> None:
        if self.signal:  # a second time: at once
            sys.exit(128 + number)
        self.signal = number
        tqdm.write("ending after this step, with a checkpoint; once more ends at once")

    def steps(self, phase: str, n: int):
        """The phase's remaining steps, with checkpoints on the way and at its end. Ctrl-C and
        SIGTERM end the run after a step, with a checkpoint."""
        self.phase, first = phase, self.done.get(phase, 0)
        bar = dict(desc=PHASES[phase], total=n, initial=first, disable=first >= n)
        for step in tqdm(range(first, n), **bar):
            self.step = step  # for due() and log()
            self.done[phase] = self.step + 1  # what is saved or logged during a step counts it
            yield step
            if self.due(self.args.keep_every):
                self.save(f"{phase}-{step + 1}.pt", self.networks)
            if self.due(self.args.checkpoint_every) or step + 1 == n or self.signal:
                self.save("last.pt", self.state)
            if self.signal:
                print(f"\nto go on: python {sys.argv[0]} --resume {shlex.quote(str(self.path))}")
                sys.exit(128 + self.signal)

    def due(self, every: int) -> bool:
        return every > 0 and (self.step + 1) % every == 0

    def log(self, metrics: dict) -> None:
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                self.exit_not_finite(name)
        metrics["seconds"] = time.time() - self.start
        with open(self.path / "metrics.csv", "a") as f:
            for name, value in metrics.items():
                f.write(f"{self.step + 1},{self.phase},{name},{value:.9g}\n")
                self.tensorboard.add_scalar(f"{self.phase}/{name}", value, self.step + 1)

    def exit_not_finite(self, name: str) -> None:
        where = f"{name} is not finite at {self.phase} step {self.step + 1} of {self.path}"
        sys.exit(f"error: {where}: start a new run with lower rates, the flags that end in -lr.")

    def log_episode(self, env: TaskEnv) -> None:
        """An episode that was collected, with exploration."""
        self.log(dict(collected=env.normalized_return(), collected_length=len(env.actions)))

    def evaluate(self, step: int, policy: nn.Module, envs: list, stream=EVALUATION) -> None:
        """One episode in each environment, always from the same starts. It draws nothing from
        training's random numbers."""
        rollout(policy, envs, [episode_seed(self.args.seed, stream, i) for i in range(len(envs))])
        results = [env.normalized_return() for env in envs]
        with open(self.path / "evaluations.csv", "a") as f:
            for i, env in enumerate(envs):
                row = f"{sum(env.rewards):.9g},{len(env.actions)},{results[i]:.6g}"
                f.write(f"{step},{self.phase},{i},{row}\n")
        mean = float(np.mean(results))
        self.tensorboard.add_scalar(f"{self.phase}/normalized_return", mean, step)
        bracket = f"(episodes {min(results):.1f} to {max(results):.1f})"
        tqdm.write(f"{self.phase:>8} {step:>9,}  normalized return {mean:6.1f}  {bracket}")

    def save(self, name: str, parts: dict) -> None:
        """Under a temporary name first: a run killed here keeps the checkpoint before."""
        saved = {part: thing.state_dict() for part, thing in parts.items()}
        for parameter, value in saved["agent"].items():
            if not value.isfinite().all():
                self.exit_not_finite(parameter)
        saved.update(format="smac-checkpoint-2", algorithm=ALGORITHM, args=self.config)
        saved.update(task=self.task._asdict(), done=self.done, seconds=time.time() - self.start)
        saved["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            saved["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        for table in ("metrics.csv", "evaluations.csv"):
            saved[table] = (self.path / table).stat().st_size
        torch.save(saved, self.path / "tmp.pt")
        os.replace(self.path / "tmp.pt", self.path / name)

    def load(self, path: Path) -> None:
        saved = read_checkpoint(path)
        load_parts(self.state, saved, path)
        for table in ("metrics.csv", "evaluations.csv"):  # drop what was written afterwards
            os.truncate(self.path / table, saved[table])
        self.done, self.start = saved["done"], time.time() - saved["seconds"]
        torch.set_rng_state(saved["rng"])
        if self.device.type == "cuda" and "cuda_rng" in saved:
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)

    def finish(self, policy: nn.Module) -> None:
        """The last evaluation, curve.png, and the run in a few lines. Early: the first fifth of the
        online steps after the warm start."""
        from matplotlib.figure import Figure

        self.phase = "final"
        fresh_envs = [TaskEnv(self.task) for _ in range(self.args.final_episodes)]
        handover = self.done.get("offline", 0)
        self.evaluate(self.done.get("online", handover), policy, fresh_envs, FINAL)
        curves = dict(offline={}, online={}, final={})  # {phase: {step: results}}
        with open(self.path / "evaluations.csv", newline="") as f:
            for row in csv.DictReader(f):
                results = curves[row["phase"]].setdefault(int(row["step"]), [])
                results.append(float(row["normalized"]))
        ends, returns = [], []  # of the collected episodes
        with open(self.path / "metrics.csv", newline="") as f:
            for row in csv.DictReader(f):
                if row["name"] == "collected":
                    ends.append(int(row["step"]))
                    returns.append(float(row["value"]))
        ends, returns = np.array(ends), np.array(returns)

        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        lines = {"dataset, mean episode": self.task.mean_normalized_return}
        axes.axhline(self.task.mean_normalized_return, color="gray", ls=":", label="dataset, mean")
        for phase, first in dict(offline=0, online=handover).items():
            steps = np.array(list(curves[phase]))
            means = np.array([np.mean(results) for results in curves[phase].values()])
            if len(means) > 0:
                axes.plot(first + steps, means, ".-", label=phase)
        if curves["online"]:  # `steps` and `means` are this phase's now
            axes.axvline(handover, color="black", ls="--", lw=0.8, label="hand-over")
            axes.plot(handover + ends, returns, ".", color="gray", zorder=1, label="collected")
            warm = self.args.warmup_steps
            end_of_early = warm + 0.2 * (self.args.online_steps - warm)
            lines["at the hand-over"] = means[0]
            lines["worst early"] = means[steps <= end_of_early].min()
            early = (warm < ends) & (ends <= end_of_early)
            if early.any():
                lines["collected early"] = returns[early].mean()
            lines["last"] = means[-1]
            lines["best"] = means.max()
            lines["mean gap to the best"] = means.max() - means.mean()
        lines["final, new episodes"] = np.mean(list(curves["final"].values())[-1])
        axes.set(xlabel="offline updates, then environment steps", ylabel="normalized return")
        axes.set_title(self.path.name)
        axes.legend()
        axes.figure.savefig(self.path / "curve.png", dpi=150)

        print("normalized return (docs/smac.md says what the lines are):")
        for name, value in lines.items():
            print(f"  {name:<24}{value:8.1f}")
        minutes = (time.time() - self.start) / 60
        print(f"{minutes:.1f} minutes; curve.png, tables and checkpoints are in {self.path}")
        if (self.path / "offline.pt").exists():
            smac = Path(sys.argv[0]).with_name("smac_offline_to_online.py")
            print(f"to hand over: python {smac} --init-from {self.path}/offline.pt")
        print(f"to look: tensorboard --logdir {self.path.parent}")


if __name__ == "__main__":
    main()
