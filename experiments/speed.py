"""Updates per second of the scripts' gradient steps, beside other libraries and beside naive SMAC.

    python experiments/speed.py --quick                # three minutes on a calm machine
    python experiments/speed.py --compile --sweep      # everything; compiling takes a minute a row
    python experiments/speed.py --quick --device cuda --paper        # and at the paper's sizes
    python experiments/speed.py --quick --clock cpu    # on a busy machine: the thread's own time

Batch 256, two critics, hidden layers 256 x 256, 11 observations, 3 actions, float32, sampling
included. All contenders take turns, some updates each, for several rounds. A rate is the median
over rounds, a ratio the median of each round's own ratios, so that a machine that slows down for a
while does it to both. GFLOP are the eager step's matrix products, as torch counts them; `share`
compares their rate with the product of two 256 x 256 matrices, which takes turns with the rest.
Ours multiply as the scripts do (set_up), peers and the naive update as torch does unasked. Peers
that are not installed are left out (requirements-peers.txt).
"""

import contextlib
import copy
import csv
import functools
import importlib.metadata
import io
import itertools
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cal_ql
import iql
import smac_offline_to_online as smac
import td3_bc
from muon import KELLER, POLYNOMIAL, orthogonalize

Row = Literal["SAC", "TD3", "TD3+BC", "IQL", "Cal-QL", "SMAC"]


@dataclass
class Args:
    quick: bool = False  # 5 rounds of 0.3 seconds a contender; without: 11 of a second
    compile: bool = False  # also measure the compiled updates (needs a C++ compiler)
    sweep: bool = False  # also time against the sizes of dataset and ensemble, with a figure
    paper: bool = False  # also SMAC's updates at the sizes of the presets paper and adroit
    only: tuple[Row, ...] = get_args(Row)  # which rows
    device: str = "cpu"
    threads: int = 1  # CPU threads
    clock: Literal["wall", "cpu"] = "wall"  # cpu: this thread's time, where others use the cores
    out: Path = Path("runs/speed.csv")  # the table; the figure of --sweep goes beside it


# ---- our updates
OBS, ACT, BATCH, HIDDEN = 11, 3, 256, (256, 256)
SIZES = dict(num_critics=2, critic_hidden=HIDDEN, policy_hidden=HIDDEN)
SCORE = dict(score_hidden=256, score_blocks=3, score_condition_hidden=(256, 256))
SCRATCH = smac.PRESETS["from-scratch"]
# Script, and flags over its defaults. SMAC's critics are tanh, all others relu, as the methods say
ROWS = {
    "SAC": (smac, SCRATCH),
    "TD3": (smac, SCRATCH | dict(online_algorithm="td3")),
    "TD3+BC": (td3_bc, {}),
    "IQL": (iql, {}),
    "Cal-QL": (cal_ql, dict(calibrate=True)),
    "SMAC": (smac, SCORE | dict(kappa=1.0)),
}


def transitions(n: int) -> dict[str, np.ndarray]:
    """Random rows under D4RL's names; one in a hundred is terminal, an episode has 200 at most."""
    rng = np.random.default_rng(0)
    s = rng.standard_normal((n, OBS), np.float32)
    terminal = rng.random(n) < 0.01
    terminal[-1] = True
    return dict(
        observations=s,
        actions=2 * rng.random((n, ACT), np.float32) - 1,
        rewards=rng.standard_normal(n, np.float32),
        next_observations=np.roll(s, -1, 0),
        terminals=terminal,
        timeouts=(np.arange(n) % 200 == 199) & ~terminal,
        returns_to_go=rng.standard_normal(n, np.float32),
    )


def make_replay(columns: dict[str, np.ndarray], device="cpu") -> smac.Replay:
    """All scripts have the same one; only Cal-QL reads the returns-to-go."""
    replay = smac.Replay(len(columns["rewards"]), OBS, ACT, torch.device(device))
    replay.add(*(column for name, column in columns.items() if name != "timeouts"))
    return replay


def build(row: str, compile: bool = False, device="cpu", record: bool = False, **changes):
    """A script's agent at the sizes above, and update(batch), its next update."""
    script, flags = ROWS[row]
    torch.manual_seed(0)
    with torch.device(device):
        agent = script.Agent(OBS, ACT, script.Args(**flags | SIZES | changes))
    name = "update"
    if script is smac:
        name = "offline_update" if row == "SMAC" else "online_update"
    if compile:
        setattr(agent, name, script.compiled(getattr(agent, name)))
    if record:
        setattr(agent, name, script.Recorded(getattr(agent, name)))
    update, number, one = getattr(agent, name), itertools.count(1), torch.ones((), device=device)
    if row in ("SAC", "TD3"):
        return agent, lambda batch: update(batch, policy_turn=next(number) % 2 == 0)
    if row == "TD3+BC":
        return agent, lambda batch: update(batch, one, policy_turn=next(number) % 2 == 0)
    return agent, update


def step_of(update, replay: smac.Replay, batch: int = BATCH):
    return lambda: update(replay.unpack(replay.sample(batch)))


# ---- SMAC, naively: the reference that the fast update is tested against
def newton_schulz(G: Tensor) -> Tensor:
    """Jordan's five steps in float32, one matrix at a time."""
    tall = G.size(0) > G.size(1)
    X = (G.T if tall else G) / (G.norm() + 1e-7)
    for a, b, c in KELLER:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


class NaiveMuon:
    """Muon a matrix at a time, and torch's Adam with its loop over parameters for all else."""

    def __init__(self, module: nn.Module, matrices: list[nn.Parameter], lr: float):
        others = [p for p in module.parameters() if all(p is not m for m in matrices)]
        self.matrices, self.lr = matrices, lr
        self.momenta = [torch.zeros_like(m) for m in matrices]
        self.parameters = [*matrices, *others]
        self.adam = torch.optim.Adam(others, lr, foreach=False, fused=False)

    def descend(self, loss: Tensor) -> None:
        for p in self.parameters:
            p.grad = None
        loss.backward()  # also fills gradients that nobody uses: the critics' in the policy's step
        self.adam.step()
        with torch.no_grad():
            for p, momentum in zip(self.matrices, self.momenta):
                momentum.lerp_(p.grad, 0.05)
                size = self.lr * 0.2 * max(p.shape) ** 0.5
                p.sub_(newton_schulz(p.grad.lerp(momentum, 0.95)), alpha=size)


class NaiveSMAC:
    """SMAC's offline update as one would first write it: a module a critic, asked in a loop; the
    action gradient from autograd, and so a double backward pass; targets parameter by parameter. It
    draws the same random numbers."""

    def __init__(self, fast: smac.Agent):
        self.args, self.agent = fast.args, copy.deepcopy(fast)
        self.policy = self.agent.policy
        members = range(self.args.num_critics)
        self.critics = nn.ModuleList(unstack(self.agent.critic, i) for i in members)
        self.targets = nn.ModuleList(unstack(self.agent.critic_target, i) for i in members)
        hidden = [layer.weight for critic in self.critics for layer in critic[2:-1:2]]
        self.critic_optimizer = NaiveMuon(self.critics, hidden, self.args.critic_lr)
        trunk = [layer.weight for layer in self.policy.trunk[2::2]]
        self.policy_optimizer = NaiveMuon(self.policy, trunk, self.args.policy_lr)
        temperature, rate = [self.agent.log_temperature], self.args.temperature_lr
        self.adam = torch.optim.Adam(temperature, rate, foreach=False, fused=False)

    def q(self, critics, s: Tensor, a: Tensor) -> Tensor:
        x = torch.cat([self.agent.critic.normalize(s), a], 1)
        return torch.stack([critic(x).squeeze(1) for critic in critics])

    def critic_loss(self, batch: smac.Batch) -> tuple[Tensor, Tensor]:
        """TD loss and L_SM."""
        s, args = batch.s, self.args
        with torch.no_grad():
            a_next, _ = self.policy.sample(batch.s_next)
            pair = torch.rand(args.num_critics, device=s.device).argsort()[:2]
            q_next = self.q([self.targets[i] for i in pair], batch.s_next, a_next).min(0).values
            y = batch.r + args.gamma * (1 - batch.terminal) * q_next
        td_loss = (self.q(self.critics, s, batch.a) - y).square().mean()
        with torch.no_grad():
            self.agent.q_scale.lerp_(y.abs().mean(), 0.005)
            half = len(s) // 2
            a_policy = self.policy.sample(s[:half])[0]
            a = torch.cat([a_policy, 2 * torch.rand_like(batch.a[half:]) - 1])
            one = torch.ones(len(s), device=s.device)
            score = -self.agent.score_model(s, a, one, one.long())
        a.requires_grad_()
        gradients = []
        for q in self.q(self.critics, s, a):
            gradients.append(torch.autograd.grad(q.sum(), a, create_graph=True)[0])
        alpha = args.alpha_scale * self.agent.q_scale
        return td_loss, (torch.stack(gradients) - alpha * score).square().sum(-1).mean()

    def update(self, batch: smac.Batch) -> dict[str, Tensor]:
        td_loss, sm_loss = self.critic_loss(batch)
        self.critic_optimizer.descend(td_loss + self.args.kappa * sm_loss)
        a, log_pi = self.policy.sample(batch.s)
        temperature = self.agent.log_temperature.detach().exp()
        q = self.q(self.critics, batch.s, a).min(0).values
        loss = (temperature * log_pi - q).mean()
        self.policy_optimizer.descend(loss)
        self.adam.zero_grad()
        surplus = (log_pi.detach() + self.agent.target_entropy).mean()
        (-self.agent.log_temperature * surplus).backward()
        self.adam.step()
        follow(self.targets, self.critics, self.args.tau)
        follow(self.agent.policy_target, self.policy, self.args.tau)
        follow(self.agent.policy_average, self.policy, self.args.policy_average_rate)
        return dict(td_loss=td_loss.detach(), sm_loss=sm_loss.detach(), policy_loss=loss.detach())


def unstack(critic: smac.Critics, i: int) -> nn.Sequential:
    layers = []
    for W, b in zip(critic.weights, critic.biases):
        layer = nn.Linear(W.size(2), W.size(1), device=W.device)
        layer.weight.data.copy_(W[i])
        layer.bias.data.copy_(b[i, 0])
        layers += [layer, nn.Tanh() if critic.tanh else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, rate: float) -> None:
    for p, q in zip(target.parameters(), source.parameters()):
        p.mul_(1 - rate).add_(rate * q)


# ---- peers: each returns a step with its own sampling
def sb3_sac(columns: dict[str, np.ndarray], device):
    import gymnasium as gym
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    env = gym.Env()  # never stepped
    env.observation_space = gym.spaces.Box(-9, 9, (OBS,))
    env.action_space = gym.spaces.Box(-1, 1, (ACT,))
    model = SAC("MlpPolicy", env, buffer_size=len(columns["rewards"]), device=device)
    model.set_logger(Logger(None, []))
    for name in ("observations", "actions", "rewards", "next_observations", "dones"):
        array = getattr(model.replay_buffer, name)
        array[:] = columns["terminals" if name == "dones" else name].reshape(array.shape)
    model.replay_buffer.full = True
    return lambda: model.train(1, BATCH)


def d3rlpy_step(config: str, columns: dict[str, np.ndarray], device, **flags):
    import d3rlpy

    names = ("observations", "actions", "rewards", "terminals")
    rows = [columns[name].astype(np.float32) for name in names]
    data = d3rlpy.dataset.MDPDataset(*rows, timeouts=columns["timeouts"])
    config = getattr(d3rlpy.algos, f"{config}Config")(batch_size=BATCH, **flags)
    algorithm = config.create(device=str(device))
    algorithm.build_with_dataset(data)
    return lambda: algorithm.update(data.sample_transition_batch(BATCH))


# What makes d3rlpy's Cal-QL do the same work as ours
CAL_QL = dict(max_q_backup=True, n_action_samples=10, alpha_learning_rate=0.0, alpha_threshold=0.0)
PEERS = {  # distribution, and the step
    "SAC": ("stable-baselines3", sb3_sac),
    "TD3": ("d3rlpy", lambda *given: d3rlpy_step("TD3", *given)),
    "TD3+BC": ("d3rlpy", lambda *given: d3rlpy_step("TD3PlusBC", *given)),
    "IQL": ("d3rlpy", lambda *given: d3rlpy_step("IQL", *given)),
    "Cal-QL": ("d3rlpy", lambda *given: d3rlpy_step("CalQL", *given, **CAL_QL)),
}


# ---- measuring
def take_turns(steps: dict, args: Args) -> dict:
    """{key: seconds a call, one for each round} of every step; the turns of a round follow each
    other. "peer" or "naive" ends the key of what multiplies by torch's default, not as scripts."""
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    smac.set_up(smac.Args(device=args.device, threads=args.threads))
    ours = torch.get_float32_matmul_precision()
    on_gpu = args.device.startswith("cuda")

    def seconds(key: tuple, n: int) -> float:
        theirs = key[-1].endswith(("peer", "naive"))
        torch.set_float32_matmul_precision("highest" if theirs else ours)
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(n):
            steps[key]()
        if on_gpu:
            torch.cuda.synchronize()
        return (clock() - start) / n

    rounds, share = (5, 0.3) if args.quick else (11, 1.0)
    n = {}
    for key in steps:
        seconds(key, 8)  # memory, algorithms, graphs: both of TD3's kinds of update
        n[key] = 2 * max(1, round(share / seconds(key, 2) / 2))  # even, for the same reason
    turns = [{key: seconds(key, n[key]) for key in steps} for _ in range(rounds)]
    return {key: [turn[key] for turn in turns] for key in steps}


def flops(step) -> float:
    """Of the matrix products in one call, a mean over two."""
    with FlopCounterMode(display=False) as counter:
        step()
        step()
    return counter.get_total_flops() / 2


def updates_table(args: Args) -> list[dict]:
    columns = transitions(10_000 if args.quick else 100_000)
    replay = make_replay(columns, args.device)
    A, B = torch.randn(2, 256, 256, device=args.device)
    on_gpu = args.device.startswith("cuda")
    steps, names = {("sgemm", ""): lambda: A @ B}, {}
    for row in args.only:
        steps[row, "eager"] = step_of(build(row, device=args.device)[1], replay)
        if args.compile:
            steps[row, "compiled"] = step_of(build(row, True, args.device)[1], replay)
        if on_gpu:  # as the scripts run there
            recorded = build(row, device=args.device, record=True)[1]
            steps[row, "recorded"] = step_of(recorded, replay)
        if on_gpu and args.compile:
            recorded = build(row, True, args.device, record=True)[1]
            steps[row, "compiled, recorded"] = step_of(recorded, replay)
        if row == "SMAC":
            naive = NaiveSMAC(build(row, device=args.device)[0])
            steps[row, "naive"] = step_of(naive.update, replay)
            continue
        distribution, peer = PEERS[row]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                steps[row, "peer"] = peer(columns, args.device)
            names[row] = f"{distribution} {importlib.metadata.version(distribution)}"
        except ImportError as error:
            print(f"{row}: without {distribution}, which is not installed ({error}).")
    plain = ("", "eager", "naive", "peer")
    work = {key: flops(step) for key, step in steps.items() if key[1] in plain}
    seconds, table = take_turns(steps, args), []
    limit = 2 * 256**3 / statistics.median(seconds.pop(("sgemm", ""))) / 1e9
    for (row, kind), times in seconds.items():
        others = seconds.get((row, "peer"), seconds.get((row, "naive")))
        gflop = work[row, kind if kind in plain else "eager"] / 1e9
        speed = gflop / statistics.median(times)
        line = dict(table="updates", row=row, contender=names[row] if kind == "peer" else kind)
        line |= spread([1 / t for t in times]) | dict(unit="updates/s", gflop=gflop)
        line |= dict(gflop_per_s=speed, share=speed / limit)
        if others:
            line["ratio"] = statistics.median(other / t for other, t in zip(others, times))
        table.append(line)
    sgemm = dict(table="updates", row="sgemm 256", contender="torch", value=limit, share=1.0)
    return [*table, sgemm | dict(unit="GFLOP/s")]


def spread(values: list[float]) -> dict[str, float]:
    return dict(value=statistics.median(values), low=min(values), high=max(values))


def muon_table(args: Args) -> list[dict]:
    """What three steps of POLYNOMIAL cost and do beside Jordan's five, on Gaussian matrices."""
    steps = {}
    for shape in ((4, 128, 128), (2, 256, 256), (10, 512, 512)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        for name, polynomial in dict(ours=POLYNOMIAL, Jordan=KELLER).items():
            steps[shape, name] = lambda G=G, polynomial=polynomial: orthogonalize(G, polynomial)
    seconds, table = take_turns(steps, args), []
    for (shape, name), times in seconds.items():
        values = torch.linalg.svdvals(steps[shape, name]().float()).flatten().cpu()
        line = dict(table="muon", row=" x ".join(map(str, shape)), contender=name, unit="ms")
        line |= spread([1e3 * t for t in times])
        for quantile, key in ((0.05, "sigma_5"), (0.5, "sigma_50"), (1.0, "sigma_max")):
            line[key] = float(values.quantile(quantile))
        jordan = seconds[shape, "Jordan"]
        line["ratio"] = statistics.median(other / t for other, t in zip(jordan, times))
        table.append(line)
    return table


def paper_table(args: Args) -> list[dict]:
    """SMAC, offline and online (SAC with the term), with the observations and actions of Hopper and
    of door. On a GPU also recorded, as the script does it."""
    kinds, steps = {"eager": lambda update: update}, {}
    if args.device.startswith("cuda"):
        kinds["recorded"] = smac.Recorded
    for preset, obs, act in (("paper", 11, 3), ("adroit", 39, 28)):
        flags = smac.Args(**smac.PRESETS[preset])
        replay = smac.Replay(100_000, obs, act, torch.device(args.device))
        replay.rows.uniform_()
        replay.n = len(replay.rows)
        for kind, wrapped in kinds.items():
            with torch.device(args.device):
                agent = smac.Agent(obs, act, flags)
            offline = wrapped(agent.offline_update)
            online = functools.partial(wrapped(agent.online_update), policy_turn=True)
            steps[f"{preset}, offline", kind] = step_of(offline, replay, flags.offline_batch_size)
            steps[f"{preset}, online", kind] = step_of(online, replay, flags.online_batch_size)
    table, seconds = [], take_turns(steps, args)
    for (row, kind), times in seconds.items():
        line = dict(table="paper", row=row, contender=kind, unit="updates/s")
        line |= spread([1 / t for t in times])
        line["ratio"] = statistics.median(e / t for e, t in zip(seconds[row, "eager"], times))
        table.append(line)
    return table


def sweep_table(args: Args) -> list[dict]:
    """Milliseconds an update against rows of the dataset and members of the ensemble."""
    steps = {}
    for n in (10**5, 10**6, 10**7):
        replay = smac.Replay(n, OBS, ACT, torch.device(args.device))
        replay.rows.uniform_()  # writes every page: else the large ones cost nothing to read
        replay.n = n
        steps["rows", n, "TD3+BC"] = step_of(build("TD3+BC", device=args.device)[1], replay)
        steps["rows", n, "its sample alone"] = step_of(lambda batch: None, replay)
    replay = make_replay(transitions(10_000), args.device)
    for n in (2, 5, 10, 20):
        agent, update = build("SMAC", device=args.device, num_critics=n)
        steps["critics", n, "SMAC"] = step_of(update, replay)
        steps["critics", n, "SMAC, naive"] = step_of(NaiveSMAC(agent).update, replay)
    table = []
    for (what, n, name), times in take_turns(steps, args).items():
        line = dict(table=what, row=n, contender=name, unit="ms")
        table.append(line | spread([1e3 * t for t in times]))
    return table


def sizes_figure(table: list[dict], path: Path) -> None:
    """Of the lines that sweep_table returns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("rows", "critics")):
        lines = [line for line in table if line["table"] == what]
        for name in dict.fromkeys(line["contender"] for line in lines):
            points = [(line["row"], line["value"]) for line in lines if line["contender"] == name]
            axes.plot(*zip(*points), ".-", label=name)
        axes.set(xlabel=what, ylabel="ms per update", ylim=(0, None))
        axes.set_xscale("log" if what == "rows" else "linear")
        axes.set_xticks(sorted({line["row"] for line in lines}))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


# ---- main
def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            info[name.strip()] = value.strip()
    has = info.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in has]
    return f"{info.get('model name', 'unknown CPU')}, {' '.join(units)}"


FIELDS = ("row", "contender", "value", "low", "high", "unit", "gflop", "gflop_per_s", "share")
FIELDS += ("ratio", "sigma_5", "sigma_50", "sigma_max")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = updates_table(args) + muon_table(args)
    if args.paper:
        table += paper_table(args)
    if args.sweep:
        sizes = sweep_table(args)
        sizes_figure(sizes, args.out.with_suffix(".png"))
        table += sizes
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about = dict(date=time.strftime("%Y-%m-%d"), commit=commit, machine=machine(args.device))
    about |= dict(cores=os.cpu_count(), threads=args.threads, clock=args.clock)
    about["torch"] = torch.__version__
    with open(args.out, "w", newline="") as f:
        writer = csv.DictWriter(f, ("table", *FIELDS, *about))
        writer.writeheader()
        for line in table:
            cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()}
            writer.writerow(cells | about)
    print(about)
    for line in table:
        what = f"{line['table']:<8} {line['row']:<13} {line['contender']:<24}"
        ratio = f"{line['ratio']:8.2f} times as fast" if "ratio" in line else ""
        print(f"{what} {line['value']:8.3g} {line['unit']:<9} {ratio}")
    print(args.out)


if __name__ == "__main__":
    main()
