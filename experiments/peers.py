"""What d3rlpy's TD3+BC, IQL and CQL learn from the dataset on which our scripts learn, as run folders.

    python experiments/peers.py td3_bc --seed 0          # or iql, cal_ql (CQL, as cal_ql.py's default row has it)
    python experiments/report.py runs/peers runs/NAME    # beside our own runs

Networks, rates, batch, discount, rewards, normalised observations and number of updates are those of our script's row
for the task; so are the evaluation's environments and starts. Three things stay d3rlpy's own: torch's initialisation,
IQL's policy, whose mean is a tanh, and IQL's three losses, all taken before any of the three steps. d3rlpy is in
requirements-peers.txt. A run folder is <out>/<task>__d3rlpy-<script>__<seed>, with config.json, metrics.csv (seconds)
and evaluations.csv.
"""

import json
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cal_ql
import iql
import td3_bc

try:
    import d3rlpy
except ImportError as e:
    sys.exit(f"error: d3rlpy is not installed ({e}): see requirements-peers.txt.")

SCRIPTS = dict(td3_bc=td3_bc, iql=iql, cal_ql=cal_ql)


@dataclass
class Args:
    script: Annotated[Literal["td3_bc", "iql", "cal_ql"], tyro.conf.Positional]  # whose method, and whose row of flags
    seed: int = 0
    task: str = "hopper-embedded"  # a locomotion task
    dataset: str | None = None  # as the scripts' --dataset
    steps: int = 30_000  # updates
    eval_every: int = 2_500  # updates between evaluations
    eval_episodes: int = 10  # episodes an evaluation
    final_episodes: int = 50  # episodes of the last evaluation, from starts that no earlier one used
    out: Path = Path("runs/peers")  # where the run folder is made


def row_of(script, task: str) -> SimpleNamespace:
    """A script's flags as its row for the task has them."""
    defaults = {f.name: f.default for group in script.GROUPS.values() for f in fields(group)}
    return SimpleNamespace(**defaults | script.ROWS.get(script.TASKS[task].domain, {}) | script.ROWS.get(task, {}))


def algorithm(name: str, row: SimpleNamespace, steps: int, observations: np.ndarray):
    """d3rlpy's algorithm with our row's values. Its critic loss sums over members, ours is a mean: to Adam the same."""

    def layers(hidden: tuple[int, ...], dropout: float = 0.0):
        return d3rlpy.models.VectorEncoderFactory(hidden_units=list(hidden), dropout_rate=dropout or None)

    scaler = d3rlpy.preprocessing.StandardObservationScaler(observations.mean(0), observations.std(0), eps=1e-3)
    decay = d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=steps) if getattr(row, "policy_lr_decay", False) else None
    common = dict(
        batch_size=row.offline_batch_size,
        gamma=row.gamma,
        tau=row.tau,
        n_critics=row.num_critics,
        actor_learning_rate=row.policy_lr,
        critic_learning_rate=row.critic_lr,
        actor_encoder_factory=layers(row.policy_hidden, getattr(row, "dropout", 0.0)),
        critic_encoder_factory=layers(row.critic_hidden),
        actor_optim_factory=d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=decay),
        observation_scaler=scaler if row.normalize_observations else None,
    )
    if name == "td3_bc":
        own = dict(alpha=row.alpha, update_actor_interval=row.policy_delay)
        own |= dict(target_smoothing_sigma=row.target_noise, target_smoothing_clip=row.target_noise_clip)
        return d3rlpy.algos.TD3PlusBCConfig(**common, **own)
    if name == "iql":
        own = dict(expectile=row.expectile, weight_temp=row.beta, max_weight=100.0)
        return d3rlpy.algos.IQLConfig(**common, **own, value_encoder_factory=layers(row.critic_hidden))
    own = dict(temp_learning_rate=row.temperature_lr, initial_temperature=1.0, max_q_backup=row.max_target_backup)
    own |= dict(n_action_samples=row.cql_actions, soft_q_backup=False)
    own |= dict(conservative_weight=row.cql_alpha, alpha_learning_rate=0.0, alpha_threshold=0.0)  # 0: not learned
    return d3rlpy.algos.CQLConfig(**common, **own)


class Policy(torch.nn.Module):
    """d3rlpy's deterministic policy in the form that our evaluation asks."""

    def __init__(self, algorithm):
        super().__init__()
        self.algorithm, self.device = algorithm, torch.nn.Parameter(torch.zeros(()))

    def mode(self, s: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.algorithm.predict(s.numpy()))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    script = SCRIPTS[args.script]
    if min(args.steps, args.eval_every, args.eval_episodes, args.final_episodes) < 1:
        sys.exit("error: --steps, --eval-every, --eval-episodes and --final-episodes: 1 or more.")
    if args.task not in script.TASKS or script.TASKS[args.task].domain != "locomotion":
        sys.exit(f"error: --task {args.task}: not one of the scripts' locomotion tasks.")
    path = args.out / f"{args.task}__d3rlpy-{args.script}__{args.seed}"
    if path.exists():
        sys.exit(f"error: {path} exists: remove it, or name another --out.")
    row, task = row_of(script, args.task), script.TASKS[args.task]
    torch.set_num_threads(1)
    d3rlpy.seed(args.seed)  # numpy's, torch's and Python's generators
    envs = [script.TaskEnv(task) for _ in range(max(args.eval_episodes, args.final_episodes))]
    raw = script.read_dataset(task, args.dataset)
    if "timeouts" not in raw:
        sys.exit("error: the dataset has no timeouts, without which d3rlpy takes several episodes for one.")
    raw |= {k: script.observation(task, v) for k, v in raw.items() if "observations" in k}
    (obs_dim,), (act_dim,) = envs[0].observation_space.shape, envs[0].action_space.shape
    script.check_dataset(raw, obs_dim, act_dim, args.dataset or args.task)
    n = len(raw["rewards"])
    terminal = raw["terminals"].reshape(n) > 0
    cut = raw["timeouts"].reshape(n) > 0
    cut[-1] = True
    columns = [raw["observations"], raw["actions"], task.scale * raw["rewards"].reshape(n) + task.bias, terminal]
    data = d3rlpy.dataset.MDPDataset(*(x.astype(np.float32) for x in columns), timeouts=(cut & ~terminal) * 1.0)
    learner = algorithm(args.script, row, args.steps, columns[0]).create(device="cpu")
    learner.build_with_dataset(data)
    policy = Policy(learner)

    path.mkdir(parents=True)
    config = dict(task=args.task, seed=args.seed, algorithm=f"d3rlpy-{args.script}", d3rlpy=d3rlpy.__version__)
    config |= dict(offline_steps=args.steps, online_steps=0, command=sys.argv, git_commit=script.git_commit())
    config |= {k: v for k, v in vars(row).items() if k in {f.name for f in fields(script.OfflineFlags)} - {*config}}
    (path / "config.json").write_text(json.dumps(config | dict(torch=torch.__version__), indent=1))
    (path / "metrics.csv").write_text("step,phase,name,value\n")
    (path / "evaluations.csv").write_text("step,phase,episode,return,length,score\n")

    def evaluate(phase: str, step: int, count: int, stream: int) -> None:
        seeds = [script.episode_seed(args.seed, stream, i) for i in range(count)]
        results = script.evaluate(policy, envs[:count], seeds)
        scores = [float(task.score(total, last)) for total, _, last in results]
        with open(path / "evaluations.csv", "a") as f:
            for i, ((total, length, _), score) in enumerate(zip(results, scores)):
                f.write(f"{step},{phase},{i},{total:.9g},{length},{score:.6g}\n")
        print(f"{phase:>8} {step:>9,}  score {np.mean(scores):6.1f}  ({seconds:.0f} s of updates)", flush=True)

    seconds = 0.0
    for step in range(args.steps + 1):
        if step % args.eval_every == 0 or step == args.steps:
            evaluate("offline", step, args.eval_episodes, script.EVALUATION)
            with open(path / "metrics.csv", "a") as f:
                f.write(f"{step},offline,seconds/update,{seconds:.6g}\n")
        if step < args.steps:
            start = time.perf_counter()
            learner.update(data.sample_transition_batch(row.offline_batch_size))
            seconds += time.perf_counter() - start
    evaluate("final", args.steps, args.final_episodes, script.FINAL)


if __name__ == "__main__":
    main()
