# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]>=1.1", "gymnasium-robotics>=1.4",
#     "mujoco>=3.3,<3.11", "farama-notifications>=0.0.4", "tyro>=1.0", "numpy>=2.0",
#     "h5py>=3.11", "tqdm>=4.66", "tensorboard>=2.17", "matplotlib>=3.9"]
# ///
"""SMAC, Score-Matched Actor-Critic (arXiv 2602.17632), in one file and its optimiser, muon.py.

    python smac_offline_to_online.py                                       # small Hopper dataset
    python smac_offline_to_online.py --dataset data/mine.hdf5 --help       # flags, for that dataset
    python smac_offline_to_online.py --init-from runs/NAME/offline.pt --online-algorithm td3

Most runs need only --dataset, --preset (small, small-adroit: for two CPU cores), --seed,
--online-algorithm and --online-kappa. A default that names no source in brackets is the paper's for
locomotion (Tables 6, 7). WSRL is arXiv 2412.07762, IDQL 2304.10573, REDQ 2101.05982.

Pretrain an actor-critic on a fixed dataset, so that online RL goes on from it without a drop:

1. score:   fit a diffusion model eps(s, a, w, k) of the dataset's actions; w in [0, 1] is the
            trajectory's return, min-max scaled, k the noise level. The score of good actions is
            score(s, a) = -eps(s, a, w=1, k=1) = sigma_1 grad_a log p_1(a | s, w=1).
2. offline: SAC whose critics also follow that score,
            E (Q(s, a) - y)^2 + kappa E || grad_b Q(s, b) - alpha score(s, b) ||^2;
            a is the dataset's action, b half the policy's, half uniform. alpha says how steeply Q
            falls away from the data; it is not SAC's temperature.
3. online:  the hand-over: SAC, TD3, TD3+BC or AWR takes the critics, the running average of the
            policy and the optimisers, and learns on. Q already falls away from the data: nothing
            to unlearn. By default the critics go on matching the score (ours), with a weight that
            is learned so that the cosine of grad_a Q and the score stays what it was at the
            hand-over. --online-kappa 0 is the paper's: the plain algorithm.

The file has this order: flags, networks, updates, the three phases in main(), and last what has
nothing to do with SMAC. docs/smac.md says where it departs from the paper, and why.
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
import torch.nn.functional as F
import tyro
from farama_notifications import notifications
from torch import Tensor, nn
from tqdm import tqdm

from muon import Muon, bf16_is_fast


@dataclass
class Args:
    dataset: str = "hopper-embedded"  # file of data/prepare.py, or its name in data/; names the env
    preset: str = "auto"  # small, small-adroit, ... (a wrong one lists all); auto: the family's
    init_from: str | None = None  # offline.pt of this script, or of a baseline's: only phase 3
    resume: str | None = None  # run folder: go on exactly where its last.pt stands
    seed: int = 0  # of networks, batches, exploration and episodes
    # 1. score
    score_steps: int = 1_000_000  # updates of the diffusion model
    score_batch_size: int = 512
    score_lr: float = 3e-4  # Adam, cosine decay to 0 (IDQL's code)
    score_hidden: int = 512  # width of the residual trunk
    score_blocks: int = 3  # residual blocks
    score_condition_hidden: tuple[int, ...] = (512, 512, 512)  # embeds state and return
    score_return: bool = True  # condition on the trajectory's return
    # 2. offline
    offline_steps: int = 250_000  # updates; 0: no dataset, the online algorithm from scratch
    offline_batch_size: int = 64
    num_critics: int = 10
    critic_hidden: tuple[int, ...] = (512, 512, 512)
    critic_activation: Literal["tanh", "relu"] = "tanh"
    policy_hidden: tuple[int, ...] = (512, 512, 512)
    normalize_observations: bool = False  # by the dataset's mean and deviation (WSRL: not)
    critic_lr: float = 3e-4  # of Muon and Adam alike
    policy_lr: float = 1e-4
    temperature_lr: float = 1e-4  # (WSRL)
    target_entropy_scale: float = -10.0  # times action dimensions; -10: sigma near 1e-5. SAC: -1
    gamma: float = 0.99
    tau: float = 0.005  # rate of the target networks
    policy_average_rate: float = 0.001  # of the averaged policy (ours); 1: the policy itself
    kappa: float = 40.0  # weight of score matching
    alpha_mode: Literal["scaled", "learned"] = "scaled"  # learned: a network alpha(s), the paper's
    alpha_scale: float = 0.015  # scaled: alpha is this times a running mean |TD target| (ours)
    offline_cooldown: float = 0.0  # last share of the updates: rates fall to the online ones (ours)
    optimizer: Literal["muon", "adam"] = "muon"  # of hidden matrices; the rest is on Adam
    muon_scale: Literal["rms", "spectral"] = "rms"  # as large as Adam's steps (ours); or Jordan's
    # 3. online
    online_algorithm: Literal["sac", "td3", "td3+bc", "awr"] = "sac"  # after the hand-over
    online_steps: int = 200_000  # environment steps, warm start included; 0: stop before phase 3
    warmup_steps: int = 5_000  # first steps: the pretrained policy collects, nothing learns
    online_batch_size: int = 1024
    offline_fraction: float = 0.5  # share of each batch that comes from the dataset
    online_lr_scale: float = 1.0  # critics' and policy's rates, relative to offline (ours)
    online_average_rate: float = 0.001  # the same online: a slower one hides falls (ours)
    online_kappa: float | Literal["auto"] = "auto"  # kappa online; 0: paper; auto: learned (ours)
    backup_entropy: bool = False  # sac: entropy in the TD target
    awr_temperature: float = 0.4  # awr: weight exp(awr_temperature * advantage)
    bc_weight: float = 5.0  # td3+bc: weight of imitation
    exploration_noise: float = 0.1  # td3, td3+bc: deviation (TD3)
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
# Other defaults. adroit, kitchen: the paper's Tables 6 and 7. small, small-adroit: ours, for two
# CPU cores (docs/smac.md). from-scratch: SAC's own (softlearning).
PRESETS = {
    # but for what is marked (ours). As printed: --alpha-mode learned --policy-average-rate 1
    # --online-average-rate 1 --muon-scale spectral --online-kappa 0
    "paper": dict(),
    "adroit": dict(
        score_steps=3_000_000, score_batch_size=1024, score_blocks=5,
        score_condition_hidden=(256, 256, 256), offline_steps=200_000,
        critic_hidden=(512, 512, 512, 512), policy_hidden=(256, 256, 256),
        awr_temperature=20.0, bc_weight=0.2,
    ),
    "kitchen": dict(
        score_steps=3_000_000, score_batch_size=1024, score_blocks=5,
        score_condition_hidden=(256, 256, 256), offline_steps=400_000, kappa=50.0,
        critic_hidden=(512, 512, 512, 512), awr_temperature=5.0, bc_weight=2.0,
    ),
    "small": dict(
        score_steps=10_000, score_batch_size=128, score_lr=1e-3, score_hidden=128, score_blocks=2,
        score_condition_hidden=(128, 128), offline_steps=30_000, num_critics=4, kappa=1.0,
        critic_hidden=(128, 128), policy_hidden=(128, 128), normalize_observations=True,
        critic_lr=1e-3, policy_lr=3e-4, temperature_lr=3e-4, tau=0.02, target_entropy_scale=-1.0,
        policy_average_rate=2e-4, offline_cooldown=1 / 3, online_steps=17_500, warmup_steps=2_000,
        online_batch_size=256, online_lr_scale=0.3, eval_every=2_500, eval_episodes=10,
    ),
    "small-adroit": dict(
        score_steps=12_000, score_batch_size=128, score_lr=1e-3, score_hidden=128, score_blocks=2,
        score_condition_hidden=(128, 128), offline_steps=15_000, num_critics=4, kappa=1.0,
        critic_hidden=(256, 256), policy_hidden=(256, 256), normalize_observations=True,
        critic_lr=1e-3, policy_lr=3e-4, temperature_lr=3e-4, tau=0.02, offline_cooldown=1 / 3,
        online_steps=5_000, warmup_steps=1_000, online_batch_size=256, online_lr_scale=0.1,
        awr_temperature=20.0, bc_weight=0.2, exploration_noise=0.03, eval_every=1_000,
    ),
    "from-scratch": dict(
        num_critics=2, critic_hidden=(256, 256), critic_activation="relu",
        policy_hidden=(256, 256), policy_lr=3e-4, temperature_lr=3e-4, target_entropy_scale=-1.0,
        online_average_rate=1.0, optimizer="adam", online_kappa=0.0, backup_entropy=True,
        offline_fraction=0.0, online_steps=1_000_000, online_batch_size=256, eval_every=5_000,
        eval_episodes=10,
    ),
}
# fmt: on
ALGORITHM = "smac"  # in run folders and checkpoints
PHASES = dict(score="1/3 score model", offline="2/3 offline updates", online="3/3 online steps")
# Flags that --init-from takes over from another script's file, where it has them
NETWORK_ARGS = ("num_critics", "critic_hidden", "critic_activation", "policy_hidden", "gamma")
NETWORK_ARGS += ("score_hidden", "score_blocks", "score_condition_hidden", "optimizer")
GPU = ["cuda"] if torch.cuda.is_available() else []  # its random numbers, too, logging leaves alone


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
            weights = [linear(inputs, outputs).weight.data for _ in range(args.num_critics)]
            self.weights.append(torch.stack(weights))
            self.biases.append(torch.zeros(args.num_critics, 1, outputs))

    def forward(self, s: Tensor, a: Tensor, members=slice(None)) -> Tensor:
        """(B, o), (B, a) -> (N, B), or of some members only."""
        last = self.hidden_layers(s, a, members)[-1]
        return (last * self.weights[-1][members]).sum(-1) + self.biases[-1][members].squeeze(-1)

    def hidden_layers(self, s: Tensor, a: Tensor, members=slice(None)) -> list[Tensor]:
        n = len(self.biases[0][members])
        h = torch.cat([self.normalize(s), a], -1).expand(n, -1, -1)
        layers = []
        for W, b in zip(self.weights[:-1], self.biases[:-1]):
            h = torch.baddbmm(b[members], h, W[members].mT)
            h = torch.tanh(h) if self.tanh else torch.relu(h)
            layers.append(h)
        return layers

    def action_gradient(self, s: Tensor, a: Tensor) -> Tensor:
        """grad_a Q_i(s, a), (N, B, a): autograd.grad(q.sum(), a, create_graph=True), but with the
        chain rule written out, so that its own gradient takes one backward pass and not two."""
        layers = self.hidden_layers(s, a)
        # (N, B, h); relu's slope has no gradient of its own, as in autograd
        slopes = [1 - h * h if self.tanh else (h > 0).to(h.dtype) for h in layers]
        g = self.weights[-1] * slopes[-1]  # (N, B, h): by what enters the last tanh or relu
        for W, slope in zip(reversed(self.weights[1:-1]), reversed(slopes[:-1])):
            g = (g @ W) * slope
        return g @ self.weights[0][..., -a.size(1) :]  # the actions' columns


class Policy(nn.Module):
    """a = tanh(mu(s) + sigma(s) xi), xi ~ N(0, 1), sigma in [1e-5, 10] (WSRL)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.normalize = Normalizer(obs_dim)
        self.trunk = mlp([obs_dim, *args.policy_hidden])
        self.head = linear(args.policy_hidden[-1], 2 * act_dim, gain=0.01)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_std = self.head(self.trunk(self.normalize(s))).chunk(2, -1)
        return mu, log_std.clamp(math.log(1e-5), math.log(10.0))

    def mode(self, s: Tensor) -> Tensor:
        return torch.tanh(self(s)[0])

    def sample(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (B, a) and their log-densities (B,)."""
        mu, log_std = self(s)
        xi = torch.randn_like(mu)
        u = mu + log_std.exp() * xi
        return torch.tanh(u), self.log_density(xi, log_std, u)

    def log_prob(self, s: Tensor, a: Tensor) -> Tensor:
        """Log-densities (B,) of given actions."""
        mu, log_std = self(s)
        u = torch.atanh(a.clamp(-1 + 1e-6, 1 - 1e-6))
        return self.log_density((u - mu) / log_std.exp(), log_std, u)

    def log_density(self, xi: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
        normal = -0.5 * xi.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), stable
        return (normal - log_slope).sum(-1)


class ScoreModel(nn.Module):
    """Diffusion model of the dataset's actions: the noise eps(s, a, w, k) in an action a that was
    noised to level k = 1 ... K. w is the return of the action's trajectory, from 0 (the dataset's
    worst) to 1 (its best). IDQL's residual network (arXiv 2304.10573) with the sizes of the paper's
    Table 6, and a cosine schedule (arXiv 2102.09672)."""

    K = 32  # noise levels (Table 6)

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        levels = torch.arange(self.K + 1, dtype=torch.float64) / self.K
        f = torch.cos((levels + 0.008) / 1.008 * math.pi / 2).square()
        alpha_bar = (f[1:] / f[:-1]).clamp(min=0.001).cumprod(0).float()
        self.register_buffer("alpha_bar", alpha_bar)  # alpha_bar[0] is level 1, sigma_1 = 0.06
        self.register_buffer("fitted", torch.tensor(False))  # saved with the weights
        frequencies = torch.exp(-math.log(10_000) * torch.arange(32) / 31)
        angles = torch.arange(1, self.K + 1)[:, None] * frequencies
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], -1))  # of levels

        self.normalize = Normalizer(obs_dim)
        self.level = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
        sizes = [obs_dim + 1, *args.score_condition_hidden]
        width = args.score_hidden
        self.condition = mlp(sizes, nn.SiLU).append(nn.Linear(sizes[-1], 64))
        self.inlet = nn.Linear(act_dim + 128, width)
        self.outlet = nn.Sequential(nn.SiLU(), nn.Linear(width, act_dim))
        self.blocks = nn.ModuleList()
        for _ in range(args.score_blocks):
            up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            block = nn.Sequential(nn.Dropout(0.1), nn.LayerNorm(width), up, nn.SiLU(), down)
            self.blocks.append(block)

    def forward(self, s: Tensor, a: Tensor, w: Tensor, k: Tensor) -> Tensor:
        """(B, o), (B, a), (B,), (B,) -> (B, a)."""
        condition = self.condition(torch.cat([self.normalize(s), w[:, None]], -1))
        level = self.level(self.positions[k - 1])
        h = self.inlet(torch.cat([a, condition, level], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.outlet(h)

    def loss(self, s: Tensor, a: Tensor, w: Tensor) -> Tensor:
        """E || eps - eps_omega(s, sqrt(abar_k) a + sqrt(1 - abar_k) eps, w, k) ||^2 (App. J)."""
        k = torch.randint(1, self.K + 1, (len(a),), device=a.device)
        alpha_bar, eps = self.alpha_bar[k - 1, None], torch.randn_like(a)
        noised = alpha_bar.sqrt() * a + (1 - alpha_bar).sqrt() * eps
        return (eps - self(s, noised, w, k)).square().sum(-1).mean()

    def score(self, s: Tensor, a: Tensor) -> Tensor:
        """-eps(s, a, w, k) for the best return, w = 1, at the lowest noise, k = 1. As eps estimates
        -sigma_k grad log p_k, this is grad_a log p_1(a | s, w=1) in units of sigma_1."""
        one = torch.ones(len(s), device=s.device)
        # bfloat16 is enough for what no gradient passes through
        with torch.autocast(s.device.type, torch.bfloat16, enabled=bf16_is_fast(s.device)):
            return -self(s, a, one, one.long()).float()


# ============================================ updates =============================================
class Agent(nn.Module):
    """All networks, and the updates of phases 2 and 3. They return tensors: no wait for the GPU.

    `policy` is trained, and collects. `policy_average`, its slow average, is evaluated and handed
    over: from one update to the next the policy itself jumps by up to 20 points (docs/smac.md)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.target_entropy = args.target_entropy_scale * act_dim
        self.average_rate = args.policy_average_rate  # main() sets online's
        self.policy = Policy(obs_dim, act_dim, args)
        self.critic = Critics(obs_dim, act_dim, args)
        self.policy_average = copy.deepcopy(self.policy).requires_grad_(False)
        self.policy_target = copy.deepcopy(self.policy).requires_grad_(False)  # for TD3's targets
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))  # SAC's weight of the entropy
        self.alpha_net = mlp([obs_dim, 256, 256]).append(linear(256, 1))  # --alpha-mode learned
        self.register_buffer("q_scale", torch.zeros(()))  # running mean |y|: alpha grows from 0
        # --online-kappa auto: its weight starts at --kappa, and is never larger
        self.register_buffer("learned_kappa", torch.tensor(args.kappa or 1.0))
        self.register_buffer("cosine_bound", torch.zeros(()))  # what it keeps
        # Muon takes the matrices between hidden layers, not the first and not the head
        critic_matrices = self.critic.weights[1:-1]
        policy_matrices = [layer.weight for layer in self.policy.trunk[2::2]]
        self.optimizers = dict(
            critic=make_optimizer(self.critic, critic_matrices, args.critic_lr, args),
            policy=make_optimizer(self.policy, policy_matrices, args.policy_lr, args),
            temperature=Muon([], [self.log_temperature], args.temperature_lr),  # no matrices: Adam
            alpha_net=Muon([], self.alpha_net.parameters(), 1e-4),  # (Table 7)
        )
        self.score_model = ScoreModel(obs_dim, act_dim, args).eval().requires_grad_(False)

    def offline_update(self, batch: "Batch") -> dict[str, Tensor]:
        """Score-matched critics, no entropy in their target; SAC's policy and temperature."""
        with torch.no_grad():
            target = self.td_target(batch, self.policy.sample(batch.s_next)[0])
        metrics = self.critic_update(batch, target, self.args.kappa)
        follow(self.critic_target, self.critic, self.args.tau)
        return metrics | self.sac_policy_update(batch.s)

    def online_update(self, batch: "Batch", policy_turn: bool) -> dict[str, Tensor]:
        """SAC, TD3, TD3+BC or AWR. TD3 moves its policy and all targets only at `policy_turn`."""
        args, td3 = self.args, self.args.online_algorithm.startswith("td3")
        with torch.no_grad():
            if td3:  # target policy smoothing, with TD3's 0.2 and 0.5
                a_next = self.policy_target.mode(batch.s_next)
                noise = (0.2 * torch.randn_like(a_next)).clamp(-0.5, 0.5)
                target = self.td_target(batch, (a_next + noise).clamp(-1, 1))
            else:
                a_next, log_pi = self.policy.sample(batch.s_next)
                has_bonus = args.backup_entropy and args.online_algorithm == "sac"
                bonus = -self.log_temperature.exp() * log_pi if has_bonus else 0.0
                target = self.td_target(batch, a_next, bonus)
        if args.online_kappa == "auto":
            metrics = self.critic_update(batch, target, self.learned_kappa)
            # a Lagrange multiplier, as SAC's temperature: it rises where the cosine is too low, up
            # to --kappa, pretraining's weight. Rate 0.01 and the limits are ours
            self.learned_kappa.mul_((0.01 * (self.cosine_bound - metrics["cosine_batch"])).exp())
            self.learned_kappa.clamp_(1e-3, args.kappa or 1.0)
            metrics["online_kappa"] = self.learned_kappa.clone()
        else:
            metrics = self.critic_update(batch, target, args.online_kappa)
        if td3 and not policy_turn:
            return metrics
        follow(self.critic_target, self.critic, args.tau)
        if td3:
            return metrics | self.td3_policy_update(batch)
        if args.online_algorithm == "awr":
            return metrics | self.awr_policy_update(batch)
        return metrics | self.sac_policy_update(batch.s)

    def td_target(self, batch: "Batch", a_next: Tensor, bonus: Tensor | float = 0.0) -> Tensor:
        """y = r + gamma (min Q'(s', a') + bonus), the minimum over two random critics (REDQ), which
        are drawn on the device, so that a GPU need not wait."""
        pair = torch.rand(self.args.num_critics, device=a_next.device).argsort()[:2]
        q_next = self.critic_target(batch.s_next, a_next, pair).min(0).values
        return batch.r + self.args.gamma * (1 - batch.terminal) * (q_next + bonus)

    def critic_update(
        self, batch: "Batch", target: Tensor, kappa: float | Tensor
    ) -> dict[str, Tensor]:
        """L = E (Q(s, a) - y)^2 + kappa L_SM (paper, 6.2), means over critics and batch."""
        q = self.critic(batch.s, batch.a)
        td_loss = (q - target).square().mean()
        metrics = dict(td_loss=td_loss, q=q.mean(), q_std=q.std(0, correction=0).mean())
        self.q_scale.lerp_(target.abs().mean(), 0.005)
        loss = td_loss
        if isinstance(kappa, Tensor) or kappa > 0:  # auto's is a tensor, and never 0
            sm_loss, alpha, cosine = self.score_matching_loss(batch.s)
            if self.args.alpha_mode == "learned":  # alpha(s) minimises the same loss
                descend(sm_loss, self.optimizers["alpha_net"], retain_graph=True)
            metrics.update(sm_loss=sm_loss, alpha=alpha.mean(), cosine_batch=cosine)
            loss = td_loss + kappa * sm_loss
        descend(loss, self.optimizers["critic"])
        return detached(metrics)

    def score_matching_loss(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_SM = E || grad_b Q(s, b) - alpha score(s, b) ||^2 (paper, 6.2); alpha; the cosine of
        the two on the policy's actions.

        alpha is no temperature. It says how steeply Q falls away from the data: large is close to
        cloning, 0 makes Q flat. Half of the actions b are the policy's, half uniform. The dataset's
        are not needed: the TD loss says what Q is there."""
        with torch.no_grad():
            half = len(s) // 2
            b_policy = self.policy.sample(s[:half])[0]
            b_uniform = 2 * torch.rand(len(s) - half, b_policy.size(1), device=s.device) - 1
            b = torch.cat([b_policy, b_uniform])
            score = self.score_model.score(s, b)
        alpha = self.args.alpha_scale * self.q_scale
        if self.args.alpha_mode == "learned":
            alpha = self.alpha_net(self.score_model.normalize(s))
        gradient = self.critic.action_gradient(s, b)
        loss = (gradient - alpha * score).square().sum(-1).mean()
        mean_gradient = gradient[:, :half].detach().mean(0)  # over critics
        return loss, alpha, F.cosine_similarity(mean_gradient, score[:half]).mean()

    def sac_policy_update(self, s: Tensor) -> dict[str, Tensor]:
        """L_pi = E[temperature log pi(a | s) - min Q(s, a)] over all critics (WSRL)."""
        a, log_pi = self.policy.sample(s)
        temperature = self.log_temperature.detach().exp()
        loss = (temperature * log_pi - self.critic(s, a).min(0).values).mean()
        descend(loss, self.optimizers["policy"])
        surplus = (log_pi.detach() + self.target_entropy).mean()
        descend(-self.log_temperature * surplus, self.optimizers["temperature"])
        self.follow_policy()
        return detached(dict(policy_loss=loss, entropy=-log_pi.mean(), temperature=temperature))

    def td3_policy_update(self, batch: "Batch") -> dict[str, Tensor]:
        """TD3: -Q. TD3+BC: -Q / mean |Q| + bc_weight (pi(s) - a)^2 (arXiv 2106.06860, where
        alpha = 2.5 is bc_weight 0.4). Q is the minimum over all critics, as in SAC."""
        a = self.policy.mode(batch.s)
        q = self.critic(batch.s, a).min(0).values
        loss = -q.mean()
        if self.args.online_algorithm == "td3+bc":
            imitation = (a - batch.a).square().mean()
            loss = loss / q.abs().mean().detach() + self.args.bc_weight * imitation
        descend(loss, self.optimizers["policy"])
        self.follow_policy()
        return dict(policy_loss=loss.detach())

    def awr_policy_update(self, batch: "Batch") -> dict[str, Tensor]:
        """Clone the batch's actions with weights exp(awr_temperature (Q - V)), at most 100 (WSRL).
        V is the mean value of four actions of the policy (the number is ours)."""
        s, a = batch.s, batch.a
        with torch.no_grad():
            q = self.critic(s, a).min(0).values
            samples = [self.policy.sample(s)[0] for _ in range(4)]
            v = torch.stack([self.critic(s, sample).min(0).values for sample in samples]).mean(0)
            weight = (self.args.awr_temperature * (q - v)).exp().clamp(max=100)
        loss = -(weight * self.policy.log_prob(s, a)).mean()
        descend(loss, self.optimizers["policy"])
        self.follow_policy()
        return dict(policy_loss=loss.detach())

    def set_rates(self, scale: float) -> None:
        set_lr(self.optimizers["critic"], scale * self.args.critic_lr)
        set_lr(self.optimizers["policy"], scale * self.args.policy_lr)

    def follow_policy(self) -> None:
        follow(self.policy_target, self.policy, self.args.tau)
        follow(self.policy_average, self.policy, self.average_rate)

    @torch.no_grad()
    def act(self, s: Tensor, noisy_mode: bool) -> Tensor:
        """Actions for collecting: samples of the policy, or TD3's mean with noise."""
        if not noisy_mode:
            return self.policy.sample(s)[0]
        a = self.policy.mode(s)
        return (a + self.args.exploration_noise * torch.randn_like(a)).clamp(-1, 1)

    @torch.random.fork_rng(GPU)  # at each call: logging does not change the run's random numbers
    @torch.no_grad()
    def cosines(self, dataset: "Replay", replay: "Replay") -> dict[str, Tensor]:
        """Cosine of grad_a Q and the score (App. F): 1 is parallel, 0 unrelated. At the dataset's
        states with the data's, the policy's and uniform actions; at collected states with the
        policy's, which is what a failing hand-over loses first (docs/smac.md)."""
        if not self.score_model.fitted:
            return {}
        batch = dataset.unpack(dataset.sample(256))
        a_policy, a_uniform = self.policy.sample(batch.s)[0], 2 * torch.rand_like(batch.a) - 1
        cosines = dict(
            cosine_data=self.cosine(batch.s, batch.a),
            cosine_policy=self.cosine(batch.s, a_policy),
            cosine_uniform=self.cosine(batch.s, a_uniform),
        )
        if replay.n > 0:
            s = replay.unpack(replay.sample(256)).s
            cosines["cosine_collected"] = self.cosine(s, self.policy.sample(s)[0])
        return cosines

    @torch.random.fork_rng(GPU)
    @torch.no_grad()
    def set_cosine_bound(self, dataset: "Replay", replay: "Replay") -> None:
        """--online-kappa auto: the critics shall keep the present cosine, on states mixed as in the
        batches (ours)."""
        from_dataset = round(2000 * self.args.offline_fraction)
        rows = torch.cat([replay.sample(2000 - from_dataset), dataset.sample(from_dataset)])
        s = dataset.unpack(rows).s
        self.cosine_bound.copy_(self.cosine(s, self.policy.sample(s)[0]))

    def cosine(self, s: Tensor, a: Tensor) -> Tensor:
        gradient = self.critic.action_gradient(s, a).mean(0)
        return F.cosine_similarity(gradient, self.score_model.score(s, a)).mean()


def make_optimizer(module: nn.Module, matrices, lr: float, args: Args) -> Muon:
    """Muon on the matrices between two hidden layers, Adam on all else (Jordan's advice)."""
    matrices = set(matrices) if args.optimizer == "muon" else set()
    hidden = [p for p in module.parameters() if p in matrices]
    others = [p for p in module.parameters() if p not in matrices]
    return Muon(hidden, others, lr, scale=args.muon_scale)


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
    if not 0 <= args.offline_cooldown <= 1:
        sys.exit("error: --offline-cooldown is a share of the offline updates, from 0 to 1.")
    if args.kappa < 0 or (args.online_kappa != "auto" and args.online_kappa < 0):
        sys.exit("error: --kappa and --online-kappa are weights: 0 or more, or auto online.")
    env, eval_envs = TaskEnv(task), [TaskEnv(task) for _ in range(args.eval_episodes)]
    env.reset(episode_seed(args.seed, TRAINING, 0))
    obs_dim, act_dim = len(env.obs), env.action_space.shape[0]
    replay = Replay(args.online_steps, obs_dim, act_dim, device)
    with device:
        agent = Agent(obs_dim, act_dim, args)

    pretrains = args.offline_steps > 0 and not args.init_from
    from_scratch = args.offline_steps == 0 and not args.init_from
    if from_scratch:
        dataset = replay
    else:
        data = load_dataset(args.dataset, obs_dim, act_dim)
        dataset = dataset_replay(data, task, device)
        s, a = dataset.unpack(dataset.rows)[:2]
        w = torch.as_tensor(min_max(data["returns"]), dtype=torch.float32, device=device)
        if not args.score_return:
            w.fill_(1)
        agent.score_model.normalize.fit(s)
        if args.normalize_observations:
            policies = agent.policy, agent.policy_average, agent.policy_target
            for network in (*policies, agent.critic, agent.critic_target):
                network.normalize.fit(s)
    networks = dict(agent=agent, **agent.optimizers)
    if args.init_from and not args.resume:
        load_networks(networks, args.init_from, dataset)
    # phase 1 trains `model`; agent.score_model, which phases 2 and 3 use, is its running average
    model = copy.deepcopy(agent.score_model).train().requires_grad_(True)
    score_optimizer = Muon([], model.parameters())  # Adam; its rate is set at every step
    matches_offline = pretrains and args.kappa > 0
    has_score = bool(agent.score_model.fitted or args.resume)  # --init-from may have brought one
    if args.online_kappa == "auto" and not (matches_offline or has_score):
        args.online_kappa = 0.0  # nothing was matched: there is nothing to keep
        if not from_scratch:
            print("online_kappa auto is 0 here: no score was matched. A number fits a score first")
    uses_score = matches_offline or args.online_kappa != 0
    if uses_score and not has_score and from_scratch:
        sys.exit("error: no dataset to fit a score to: from scratch --online-kappa has to be 0.")
    if uses_score and not has_score and args.score_steps == 0:
        sys.exit("error: nothing fits a score: needs --score-steps, or --kappa 0 --online-kappa 0.")
    agent.offline_update = accelerated(agent.offline_update, args)
    agent.online_update = accelerated(agent.online_update, args)
    run = Run(args, task, networks, dict(model=model, fit=score_optimizer, replay=replay, env=env))

    # ---- phase 1: the score of the dataset's actions
    fits_score = uses_score and not agent.score_model.fitted  # --resume may have brought one, too

    def fit_score(s: Tensor, a: Tensor, w: Tensor) -> dict[str, Tensor]:
        loss = model.loss(s, a, w)
        descend(loss, score_optimizer)
        return dict(loss=loss.detach())

    fit_score = recorded(fit_score, args)
    for step in run.steps("score", args.score_steps if fits_score else 0):
        decay = 0.5 * (1 + math.cos(math.pi * step / args.score_steps))
        set_lr(score_optimizer, args.score_lr * decay)
        i = torch.randint(len(s), (args.score_batch_size,), device=device)
        metrics = fit_score(s[i], a[i], w[i])
        follow(agent.score_model, model, max(1e-3, 1 / (step + 1)))  # IDQL's, faster at the start
        agent.score_model.fitted.fill_(step + 1 == args.score_steps)
        if run.due(args.log_every):
            run.log(metrics)

    # ---- phase 2: score-matched pretraining
    for step in run.steps("offline", args.offline_steps if pretrains else 0):
        if step == 0:
            run.evaluate(0, agent.policy_average, eval_envs)
        # at constant rates Q's maximum keeps jittering, and the policy with it (docs/smac.md)
        agent.set_rates(1 + (args.online_lr_scale - 1) * cooled(step, args))
        metrics = agent.offline_update(dataset.unpack(dataset.sample(args.offline_batch_size)))
        if run.due(args.log_every):
            run.log(metrics | agent.cosines(dataset, replay))
        if run.due(args.eval_every):
            run.evaluate(step + 1, agent.policy_average, eval_envs)
        if step + 1 == args.offline_steps:
            run.save("offline.pt", networks)

    # ---- phase 3: the hand-over, and a plain online algorithm
    td3 = args.online_algorithm.startswith("td3")
    from_dataset = round(args.offline_fraction * args.online_batch_size)
    agent.set_rates(args.online_lr_scale)
    agent.average_rate = args.online_average_rate
    set_lr(agent.optimizers["temperature"], args.temperature_lr)  # --init-from loads an old rate
    warned = False
    for step in run.steps("online", args.online_steps):
        if step == 0:  # what was evaluated is what collects the warm start and goes on
            agent.policy.load_state_dict(agent.policy_average.state_dict())
            agent.policy_target.load_state_dict(agent.policy_average.state_dict())
            run.evaluate(0, agent.policy_average, eval_envs)
        learning = step >= args.warmup_steps

        obs = env.obs
        if from_scratch and not learning:
            action = 2 * torch.rand(act_dim) - 1
        else:
            noisy_mode = td3 and learning  # the warm start samples, whatever the algorithm
            action = agent.act(torch.as_tensor(obs, device=device)[None], noisy_mode)[0]
        action = action.cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # easy to overlook: a time-out is no terminal, and s' is this episode's last state
        replay.add(obs, action, task.train_reward(reward), next_obs, terminated)
        if terminated or truncated:
            run.log_episode(env)
            env.reset(episode_seed(args.seed, TRAINING, replay.n))

        if learning:
            if step == args.warmup_steps and args.online_kappa == "auto":
                agent.set_cosine_bound(dataset, replay)
            collected = replay.sample(args.online_batch_size - from_dataset)
            rows = torch.cat([collected, dataset.sample(from_dataset)])
            # shuffled: score matching gives the first half the policy's actions
            batch = dataset.unpack(rows[torch.randperm(len(rows), device=device)])
            metrics = agent.online_update(batch, policy_turn=not td3 or run.due(2))
            if run.due(args.log_every):
                cosines = agent.cosines(dataset, replay)
                run.log(metrics | cosines)
                if cosines.get("cosine_collected", 1) < 0 and args.online_kappa == 0 and not warned:
                    tqdm.write("cosine_collected < 0: --online-kappa auto keeps it (docs/smac.md)")
                    warned = True
        if run.due(args.eval_every):
            run.evaluate(step + 1, agent.policy_average, eval_envs)

    run.finish(agent.policy_average)


def cooled(step: int, args: Args) -> float:
    """0 in most of pretraining; from 0 to 1 in its last --offline-cooldown."""
    length = args.offline_cooldown * args.offline_steps
    if length == 0:
        return 0.0
    return max(0.0, 1 - (args.offline_steps - step) / length)


def min_max(returns: np.ndarray) -> np.ndarray:
    """w of each row: from 0, the dataset's worst trajectory, to 1, its best (paper, 6.1)."""
    low, high = returns.min(), returns.max()
    return (returns - low) / (high - low) if high > low else np.ones_like(returns)


def load_networks(networks: dict, path: str, dataset: "Replay") -> None:
    """--init-from. From another script's file: policy and critics, with their targets. A policy
    without a deviation gets IQL's state-independent one, or TD3's noise, 0.1."""
    saved, agent = read_checkpoint(path), networks["agent"]
    if saved["algorithm"] == ALGORITHM:
        load_parts(networks, saved, path)
        return
    state = agent.state_dict()
    for name, value in saved["agent"].items():
        if name.startswith(("policy.", "critic", "log_temperature")):
            state[name] = value
    weight, bias = state["policy.head.weight"], state["policy.head.bias"]
    act_dim = len(agent.policy.head.bias) // 2
    log_std = state.pop("policy.log_std", torch.full((act_dim,), math.log(0.1)))
    if len(bias) == act_dim:
        state["policy.head.weight"] = torch.cat([weight, torch.zeros_like(weight)])
        state["policy.head.bias"] = torch.cat([bias, log_std])
    load_parts(dict(agent=agent), dict(agent=state), path)
    agent.policy_average.load_state_dict(agent.policy.state_dict())
    agent.policy_target.load_state_dict(agent.policy.state_dict())
    every_100th = dataset.unpack(dataset.rows[::100])
    agent.q_scale.copy_(agent.critic(every_100th.s, every_100th.a).detach().abs().mean())


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
