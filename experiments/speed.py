"""Updates per second of the scripts' gradient steps, beside other libraries and beside SMAC written naively.

    python experiments/speed.py --quick                  # three minutes on a calm machine
    python experiments/speed.py --compile --sweep        # everything; compiling takes about half a minute a row
    python experiments/speed.py --device cuda --compile
    python experiments/speed.py --quick --clock cpu      # one thread of a busy machine: its own time, not the wall's

Batch 256, two critics, hidden layers 256 x 256, 11 observations, 3 actions, float32, sampling included. All contenders
take turns, some updates each, for several rounds. A rate is the median over rounds, a ratio the median of each round's
own ratios, so that a machine that slows down for a while does it to both. GFLOP are the eager step's matrix products,
as torch counts them; `share` compares their rate with the product of two 256 x 256 matrices, which takes turns with the
rest. Ours multiply as the scripts do (`float32_products`), peers and the naive update as torch does unasked. Peers that
are not installed are left out (requirements-peers.txt). Writes docs/results/speed.csv.
"""

import contextlib
import copy
import csv
import importlib.metadata
import io
import itertools
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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

ROOT = Path(__file__).resolve().parents[1]
Row = Literal["SAC", "TD3", "TD3+BC", "IQL", "Cal-QL", "SMAC"]


@dataclass
class Args:
    quick: bool = False  # 5 rounds of 0.3 seconds a contender; without: 11 of a second
    compile: bool = False  # also measure the compiled updates (needs a C++ compiler)
    sweep: bool = False  # also seconds per update against the sizes of dataset and ensemble, and a figure
    only: tuple[Row, ...] = get_args(Row)  # which rows
    device: str = "cpu"
    threads: int = 1  # CPU threads
    clock: Literal["wall", "cpu"] = "wall"  # cpu: this thread's time, where other processes share the cores
    out: Path = ROOT / "docs" / "results" / "speed.csv"  # the table; the figure of --sweep goes beside it


# ==== our updates
OBS, ACT, BATCH, HIDDEN = 11, 3, 256, (256, 256)
SIZES = dict(num_critics=2, critic_hidden=HIDDEN, policy_hidden=HIDDEN)
SCORE = dict(score_hidden=256, score_blocks=3, score_condition_hidden=(256, 256))
ROWS = {  # script, and flags over its defaults. The critics of SMAC are tanh, all others relu: the methods' own choice
    "SAC": (smac, smac.ROWS["from-scratch"] | dict(online_algorithm="sac")),
    "TD3": (smac, smac.ROWS["from-scratch"] | dict(online_algorithm="td3")),
    "TD3+BC": (td3_bc, {}),
    "IQL": (iql, {}),
    "Cal-QL": (cal_ql, dict(calibrate=True)),
    "SMAC": (smac, SCORE | dict(kappa=1.0)),
}


def transitions(n: int) -> dict[str, np.ndarray]:
    """Random rows in episodes of at most 200 steps; one row in a hundred is terminal. Keys are those of COLUMNS."""
    rng = np.random.default_rng(0)
    s, a = rng.standard_normal((n, OBS), np.float32), 2 * rng.random((n, ACT), np.float32) - 1
    terminal, cut = rng.random(n) < 0.01, np.arange(n) % 200 == 199
    terminal[-1] = True
    columns = (s, a, rng.standard_normal(n, np.float32), np.roll(s, -1, 0), terminal, cut & ~terminal)
    return dict(zip(smac.COLUMNS, columns))


def build(row: str, compile: bool = False, device="cpu", **changes) -> SimpleNamespace:
    """A script's agent, optimisers and update at the sizes above; update(rows) is its next update."""
    script, flags = ROWS[row]
    defaults = {k: v for group in script.GROUPS.values() for k, v in vars(group()).items()}
    args = SimpleNamespace(**defaults | flags | SIZES | dict(compile=compile) | changes)
    torch.manual_seed(0)
    agent, sizes, number = script.Agent(OBS, ACT, args).to(device), (OBS, ACT, 1, OBS, 1, 1), itertools.count(1)
    optimizers = script.make_optimizers(agent, args)
    script.set_learning_rates(optimizers, args, *([0.0] if script is iql else []))
    if script is smac:
        model = smac.ScoreModel(OBS, ACT, args).to(device).eval().requires_grad_(False)
        updates = smac.Updates(agent, model, optimizers, sizes, args)
        update = updates.offline if row == "SMAC" else lambda rows: updates.online(rows, next(number) % 2 == 0)
    elif script is td3_bc:
        updates, one = td3_bc.Updates(agent, optimizers, sizes, args), torch.ones((), device=device)

        def update(rows):
            return updates.update(rows, one, next(number) % args.policy_delay == 0)

    elif script is iql:
        updates = iql.Updates(agent, optimizers, sizes, args.beta, args)
        update = updates.step
    else:
        updates = cal_ql.Updates(agent, optimizers, (*sizes, 1), args)
        update = updates.update
    return SimpleNamespace(args=args, agent=agent, optimizers=optimizers, updates=updates, update=update)


def replay(row: str, columns: dict[str, np.ndarray], device="cpu") -> smac.Replay:
    """The rows in the tensor that the row's script samples from; Cal-QL's has the return-to-go as well."""
    extra = 1 if row == "Cal-QL" else 0
    rows = smac.Replay(n := len(columns["rewards"]), OBS, ACT, torch.device(device), extra)
    rows.add(*columns.values(), *np.zeros((extra, n)))
    if extra:
        cal_ql.set_returns_to_go(rows, 0, n, cal_ql.TASKS["hopper-embedded"], 0.99)
    return rows


# ==== SMAC, naively: the reference that the fast update is tested against
def newton_schulz(G: Tensor) -> Tensor:
    """Jordan's five steps in float32, one matrix at a time."""
    X = (G.T if G.size(0) > G.size(1) else G) / (G.norm() + 1e-7)
    for a, b, c in KELLER:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if G.size(0) > G.size(1) else X


class NaiveMuon:
    """Muon a matrix at a time, and torch's Adam with its loop over parameters for everything else."""

    def __init__(self, module: nn.Module, matrices: list[nn.Parameter], lr: float):
        others = [p for p in module.parameters() if all(p is not m for m in matrices)]
        self.matrices, self.lr, self.momenta = matrices, lr, [torch.zeros_like(m) for m in matrices]
        self.parameters, self.adam = [*matrices, *others], torch.optim.Adam(others, lr, foreach=False, fused=False)

    def descend(self, loss: Tensor) -> None:
        for p in self.parameters:
            p.grad = None
        loss.backward()  # also fills gradients that nobody uses: those of the critics in the policy's step
        self.adam.step()
        with torch.no_grad():
            for p, momentum in zip(self.matrices, self.momenta):
                momentum.lerp_(p.grad, 0.05)
                p.sub_(newton_schulz(p.grad.lerp(momentum, 0.95)), alpha=self.lr * 0.2 * max(p.shape) ** 0.5)


class NaiveSMAC:
    """SMAC's offline update as one would first write it: a module a critic, asked in a loop; the action gradient from
    autograd, and so a double backward pass; targets parameter by parameter. It draws the same random numbers."""

    def __init__(self, fast: SimpleNamespace):
        self.args, self.model, self.agent = fast.args, fast.updates.model, copy.deepcopy(fast.agent)
        self.policy, critics = self.agent.policy, (self.agent.critic, self.agent.critic_target)
        members = range(self.args.num_critics)
        self.critics, self.targets = (nn.ModuleList(self.unstack(c, i) for i in members) for c in critics)
        hidden = [layer.weight for critic in self.critics for layer in critic[2:-1:2]]
        self.critic_optimizer = NaiveMuon(self.critics, hidden, self.args.critic_lr)
        trunk = [layer.weight for layer in self.policy.trunk[2::2]]
        self.policy_optimizer = NaiveMuon(self.policy, trunk, self.args.policy_lr)
        parameters, rate = [self.agent.log_temperature], self.args.temperature_lr
        self.temperature_optimizer = torch.optim.Adam(parameters, rate, foreach=False, fused=False)

    @staticmethod
    def unstack(critic: smac.Critics, i: int) -> nn.Sequential:
        layers = []
        for W, b in zip(critic.weights, critic.biases):
            layers += [nn.Linear(*reversed(W.shape[1:]), device=W.device), nn.Tanh() if critic.tanh else nn.ReLU()]
            layers[-2].weight.data.copy_(W[i]), layers[-2].bias.data.copy_(b[i, 0])
        return nn.Sequential(*layers[:-1])

    def q(self, critics, s: Tensor, a: Tensor) -> Tensor:
        x = torch.cat([self.agent.critic.normalize(s), a], 1)
        return torch.stack([critic(x).squeeze(1) for critic in critics])

    def critic_loss(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """L_AC and L_SM."""
        s, a, r, s_next, terminal, _ = rows.split((OBS, ACT, 1, OBS, 1, 1), 1)
        with torch.no_grad():
            a_next, _ = self.policy.sample(s_next)
            pair = torch.rand(self.args.num_critics, device=s.device).argsort()[:2]
            q_next = self.q([self.targets[i] for i in pair], s_next, a_next).min(0).values
            y = r[:, 0] + self.args.gamma * (1 - terminal[:, 0]) * q_next
        q, half = self.q(self.critics, s, a), len(s) // 2
        with torch.no_grad():
            a_B = torch.cat([self.policy.sample(s[:half])[0], 2 * torch.rand_like(a[half:]) - 1])
            one = torch.ones(len(s), device=s.device)
            score = -self.model(s, a_B, one, one.long())
            self.agent.q_scale.lerp_(y.abs().mean(), 0.005)
        a_B.requires_grad_()
        values = self.q(self.critics, s, a_B)
        gradient = torch.stack([torch.autograd.grad(v.sum(), a_B, create_graph=True)[0] for v in values])
        alpha = self.args.alpha_scale * self.agent.q_scale
        return smac.td_loss(q, y), smac.score_matching_loss(gradient, score, alpha)

    def update(self, rows: Tensor) -> dict[str, Tensor]:
        td_loss, sm_loss = self.critic_loss(rows)
        self.critic_optimizer.descend(td_loss + self.args.kappa * sm_loss)
        s, temperature = rows[:, :OBS], self.agent.log_temperature.detach().exp()
        a, log_pi = self.policy.sample(s)
        loss = smac.sac_policy_loss(self.q(self.critics, s, a), log_pi, temperature)
        self.policy_optimizer.descend(loss)
        self.temperature_optimizer.zero_grad()
        smac.temperature_loss(self.agent.log_temperature, log_pi, self.args.target_entropy_scale * ACT).backward()
        self.temperature_optimizer.step()
        follow(self.targets, self.critics, self.args.tau)
        follow(self.agent.policy_target, self.policy, self.args.tau)
        follow(self.agent.policy_average, self.policy, self.args.policy_average)
        return dict(td_loss=td_loss.detach(), sm_loss=sm_loss.detach(), policy_loss=loss.detach())


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    for p, q in zip(target.parameters(), source.parameters()):
        p.mul_(1 - tau).add_(tau * q)


# ==== peers: each returns a step with its own sampling
def sb3_sac(columns: dict[str, np.ndarray], device):
    import gymnasium as gym
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    env = gym.Env()  # never stepped
    env.observation_space, env.action_space = gym.spaces.Box(-9, 9, (OBS,)), gym.spaces.Box(-1, 1, (ACT,))
    model = SAC("MlpPolicy", env, buffer_size=len(columns["rewards"]), device=device)  # its networks are HIDDEN
    model.set_logger(Logger(None, []))
    for name in ("observations", "actions", "rewards", "next_observations", "dones"):
        array = getattr(model.replay_buffer, name)
        array[:] = columns["terminals" if name == "dones" else name].reshape(array.shape)
    model.replay_buffer.full = True
    return lambda: model.train(1, BATCH)


def d3rlpy_step(config: str, columns: dict[str, np.ndarray], device, **flags):
    import d3rlpy

    data = [columns[k].astype(np.float32) for k in ("observations", "actions", "rewards", "terminals")]
    data = d3rlpy.dataset.MDPDataset(*data, timeouts=columns["cuts"])
    algorithm = getattr(d3rlpy.algos, f"{config}Config")(batch_size=BATCH, **flags).create(device=str(device))
    algorithm.build_with_dataset(data)
    return lambda: algorithm.update(data.sample_transition_batch(BATCH))


CALQL = dict(max_q_backup=True, n_action_samples=10, alpha_learning_rate=0.0, alpha_threshold=0.0)  # the same work
PEERS = {  # distribution, and the step
    "SAC": ("stable-baselines3", sb3_sac),
    "TD3": ("d3rlpy", lambda *given: d3rlpy_step("TD3", *given)),
    "TD3+BC": ("d3rlpy", lambda *given: d3rlpy_step("TD3PlusBC", *given)),
    "IQL": ("d3rlpy", lambda *given: d3rlpy_step("IQL", *given)),
    "Cal-QL": ("d3rlpy", lambda *given: d3rlpy_step("CalQL", *given, **CALQL)),
}


# ==== measuring
def take_turns(steps: dict, args: Args) -> dict:
    """{key: seconds a call, one for each round} of every step; the turns of a round follow each other. "peer" or
    "naive" at the end of a key: with torch's default products, not with the scripts' own."""
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    ours = smac.float32_products(torch.device(args.device))

    def seconds(key: tuple, n: int) -> float:
        step, theirs = steps[key], any(word in key[-1] for word in ("peer", "naive"))
        torch.set_float32_matmul_precision("highest" if theirs else ours)
        wait()
        start = clock()
        for _ in range(n):
            step()
        wait()
        return (clock() - start) / n

    rounds, share = (5, 0.3) if args.quick else (11, 1.0)
    n = {}
    for key in steps:
        seconds(key, 2)  # memory, algorithms, graphs: both of TD3's kinds of update
        n[key] = 2 * max(1, round(share / seconds(key, 2) / 2))  # even, for the same reason
    turns = [{key: seconds(key, n[key]) for key in steps} for _ in range(rounds)]
    return {key: [turn[key] for turn in turns] for key in steps}


def flops(step) -> float:
    """Of the matrix products in one call, a mean over two."""
    with FlopCounterMode(display=False) as counter:
        step(), step()
    return counter.get_total_flops() / 2


def updates_table(args: Args) -> list[dict]:
    columns, sgemm = transitions(10_000 if args.quick else 100_000), torch.randn(2, 256, 256, device=args.device)
    steps, names, work = {("sgemm", ""): lambda: sgemm[0] @ sgemm[1]}, {}, {}
    for row in args.only:
        rows = replay(row, columns, args.device)
        for kind in ["eager", "compiled"][: 1 + args.compile]:
            update = build(row, kind == "compiled", args.device).update
            steps[row, kind] = lambda update=update, rows=rows: update(rows.sample(BATCH))
        distribution, peer = PEERS.get(row, ("", None))
        if row == "SMAC":
            naive = NaiveSMAC(build(row, device=args.device))
            steps[row, "naive"] = lambda naive=naive, rows=rows: naive.update(rows.sample(BATCH))
        else:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    steps[row, "peer"] = peer(columns, args.device)
                names[row] = f"{distribution} {importlib.metadata.version(distribution)}"
            except ImportError as e:
                print(f"{row}: left out beside {distribution}, which is not installed ({e}).")
        work |= {key: flops(steps[key]) for key in [(row, "eager"), (row, "peer"), (row, "naive")] if key in steps}
        work[row, "compiled"] = work[row, "eager"]
    torch.set_num_threads(args.threads)  # a peer may have changed it
    seconds, table = take_turns(steps, args), []
    limit = 2 * 256**3 / statistics.median(seconds.pop(("sgemm", ""))) / 1e9
    for (row, kind), times in seconds.items():
        other = seconds.get((row, "peer"), seconds.get((row, "naive")))
        rate, rates = work[row, kind] / statistics.median(times) / 1e9, sorted(1 / t for t in times)
        line = dict(table="updates", row=row, contender=names[row] if kind == "peer" else kind)
        line |= dict(value=statistics.median(rates), low=rates[0], high=rates[-1], unit="updates/s")
        line |= dict(gflop=work[row, kind] / 1e9, gflop_per_s=rate, share=rate / limit)
        table.append(line | dict(ratio=other and statistics.median(o / t for o, t in zip(other, times))))
    one = dict(table="updates", row="sgemm 256", contender="torch", value=limit, unit="GFLOP/s", share=1.0)
    return [*table, one]


def muon_table(args: Args) -> list[dict]:
    """What three steps of POLYNOMIAL cost and do beside Jordan's five, on Gaussian matrices."""
    steps, table = {}, []
    for shape in [(4, 128, 128), (2, 256, 256)] + [(10, 512, 512)] * (not args.quick):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        for name, polynomial in dict(ours=POLYNOMIAL, Jordan=KELLER).items():
            steps[shape, name] = lambda G=G, polynomial=polynomial: orthogonalize(G, polynomial)
    for (shape, name), times in (seconds := take_turns(steps, args)).items():
        values = torch.linalg.svdvals(steps[shape, name]().float()).flatten().cpu()
        low, median, high = values.quantile(torch.tensor([0.05, 0.5, 1.0])).tolist()
        line = dict(table="muon", row=" x ".join(map(str, shape)), contender=name, unit="ms")
        line |= dict(value=1e3 * statistics.median(times), low=1e3 * min(times), high=1e3 * max(times))
        ratio = statistics.median(o / t for o, t in zip(seconds[shape, "Jordan"], times))
        table.append(line | dict(ratio=ratio, sigma_5=low, sigma_50=median, sigma_max=high))
    return table


def sweep_table(args: Args) -> list[dict]:
    """Seconds per update against rows of the dataset and members of the ensemble."""
    steps = {}
    for n in (10**5, 10**6, 10**7):  # every page is written, or the large ones would cost nothing to read
        rows, update = smac.Replay(n, OBS, ACT, torch.device(args.device)), build("TD3+BC", device=args.device).update
        rows.rows.uniform_(), setattr(rows, "added", n)
        steps["rows", n, "TD3+BC"] = lambda rows=rows, update=update: update(rows.sample(BATCH))
        steps["rows", n, "its sample alone"] = lambda rows=rows: rows.sample(BATCH)
    rows = replay("SMAC", transitions(10_000), args.device)
    for n in (2, 5, 10, 20):
        fast = build("SMAC", device=args.device, num_critics=n)
        for name, update in {"SMAC": fast.update, "SMAC, naive": NaiveSMAC(fast).update}.items():
            steps["critics", n, name] = lambda update=update: update(rows.sample(BATCH))
    seconds = {key: [1e3 * t for t in times] for key, times in take_turns(steps, args).items()}
    lines = [dict(table=k[0], row=k[1], contender=k[2], unit="ms") for k in seconds]
    values = [dict(value=statistics.median(t), low=min(t), high=max(t)) for t in seconds.values()]
    return [line | value for line, value in zip(lines, values)]


def sizes_figure(table: list[dict], path: Path) -> None:
    """Of the lines that sweep_table returns."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, what in zip(axes, ("rows", "critics")):
        here = [line for line in table if line["table"] == what]
        for name in dict.fromkeys(line["contender"] for line in here):
            points = [(line["row"], line["value"]) for line in here if line["contender"] == name]
            axis.plot(*zip(*points), ".-", label=name)
        axis.set(xlabel=what, ylabel="ms per update", ylim=(0, None), xscale="log" if what == "rows" else "linear")
        axis.set_xticks(sorted({line["row"] for line in here}))
        axis.grid(alpha=0.3), axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ==== main
def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        info = {k.strip(): v.strip() for k, v in info.items()}
        flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in info.get("flags", "").split()]
        return f"{info.get('model name', 'CPU')}, {' '.join(flags)}"
    return "unknown CPU"


FIELDS = ("row", "contender", "value", "low", "high", "unit", "gflop", "gflop_per_s", "share", "ratio")
FIELDS += ("sigma_5", "sigma_50", "sigma_max")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        print("--compile needs a C++ compiler (g++, or $CXX) and finds none: going on without.", file=sys.stderr)
        args.compile = False
    table = updates_table(args) + muon_table(args)
    if args.sweep:
        table += (sizes := sweep_table(args))
        sizes_figure(sizes, args.out.with_suffix(".png"))
    about = dict(date=time.strftime("%Y-%m-%d"), commit=smac.git_commit(), machine=machine(args.device))
    about |= dict(cores=os.cpu_count(), threads=args.threads, clock=args.clock, torch=torch.__version__)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as f:
        writer = csv.DictWriter(f, ("table", *FIELDS, *about))
        writer.writeheader()
        writer.writerows(
            about | {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()} for line in table
        )
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    for name, lines in itertools.groupby(table, lambda line: line["table"]):
        lines = list(lines)
        keys = [k for k in FIELDS if any(line.get(k) is not None for line in lines)]
        cells = [
            [f"{x:.3g}" if isinstance(x := line.get(k, ""), float) else str(x or "") for k in keys] for line in lines
        ]
        print(f"\n{name}\n| {' | '.join(keys)} |\n|{'---|' * len(keys)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in cells))
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
