"""What d3rlpy's TD3+BC, IQL and CQL learn from our datasets, as run folders.

    python experiments/peers.py td3_bc --seed 0          # or iql, cal_ql (as CQL)
    python experiments/report.py runs/peers runs/NAME    # beside our own runs

Networks, rates, batch, discount, rewards, normalised observations and number of updates are those
of our script's preset; so are the evaluation's environments and starts. Three things stay d3rlpy's
own: torch's initialisation, IQL's policy, whose mean is a tanh, and IQL's three losses, all taken
before any of the three steps. requirements-peers.txt says how d3rlpy is installed. A run folder is
<out>/<dataset>__d3rlpy-<script>__<seed>, with config.json, metrics.csv (seconds) and
evaluations.csv.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import h5py
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cal_ql
import iql
import td3_bc

try:
    import d3rlpy
except ImportError as error:
    sys.exit(f"error: d3rlpy is not installed ({error}): see requirements-peers.txt.")

SCRIPTS = dict(td3_bc=td3_bc, iql=iql, cal_ql=cal_ql)


@dataclass
class Args:
    script: Annotated[Literal["td3_bc", "iql", "cal_ql"], tyro.conf.Positional]  # whose method
    seed: int = 0
    dataset: str = "hopper-embedded"  # as the scripts' --dataset, of locomotion
    preset: str = "small"  # of the script: other defaults
    steps: int = 30_000  # updates
    eval_every: int = 2_500  # updates between evaluations
    eval_episodes: int = 10  # episodes an evaluation
    final_episodes: int = 50  # of the last evaluation, from starts never seen before
    out: Path = Path("runs/peers")  # where the run folder is made


def algorithm(name: str, flags, steps: int, observations: np.ndarray):
    """d3rlpy's algorithm with our flags' values. Its critic loss sums over members, ours is a mean:
    to Adam the same."""

    def layers(hidden: tuple[int, ...], dropout: float = 0.0):
        dropout = dropout or None
        return d3rlpy.models.VectorEncoderFactory(hidden_units=list(hidden), dropout_rate=dropout)

    mean, std = observations.mean(0), observations.std(0)
    scaler = d3rlpy.preprocessing.StandardObservationScaler(mean, std, eps=1e-3)
    decay = d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=steps)
    decays = getattr(flags, "policy_lr_decay", False)
    common = dict(
        batch_size=flags.offline_batch_size,
        gamma=flags.gamma,
        tau=flags.tau,
        n_critics=flags.num_critics,
        actor_learning_rate=flags.policy_lr,
        critic_learning_rate=flags.critic_lr,
        actor_encoder_factory=layers(flags.policy_hidden, getattr(flags, "dropout", 0.0)),
        critic_encoder_factory=layers(flags.critic_hidden),
        actor_optim_factory=d3rlpy.optimizers.AdamFactory(
            lr_scheduler_factory=decay if decays else None
        ),
        observation_scaler=scaler if flags.normalize_observations else None,
    )
    if name == "td3_bc":
        return d3rlpy.algos.TD3PlusBCConfig(
            **common,
            alpha=flags.alpha,
            update_actor_interval=flags.policy_delay,
            target_smoothing_sigma=flags.target_noise,
            target_smoothing_clip=flags.target_noise_clip,
        )
    if name == "iql":
        return d3rlpy.algos.IQLConfig(
            **common,
            expectile=flags.expectile,
            weight_temp=flags.beta,
            max_weight=100.0,
            value_encoder_factory=layers(flags.critic_hidden),
        )
    return d3rlpy.algos.CQLConfig(
        **common,
        temp_learning_rate=flags.temperature_lr,
        initial_temperature=1.0,
        max_q_backup=flags.max_target_backup,
        n_action_samples=flags.cql_actions,
        soft_q_backup=False,
        conservative_weight=flags.cql_alpha,
        alpha_learning_rate=0.0,  # 0: not learned
        alpha_threshold=0.0,
    )


class Policy(torch.nn.Module):
    """d3rlpy's deterministic policy in the form that our evaluation asks."""

    def __init__(self, learner):
        super().__init__()
        self.learner, self.device = learner, torch.nn.Parameter(torch.zeros(()))

    def mode(self, s: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.learner.predict(s.numpy()))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    script = SCRIPTS[args.script]
    file = script.find_dataset(args.dataset)
    task = script.read_task(file)
    if task.family != "locomotion":
        sys.exit(f"error: {file} is of {task.env_id}: the comparison is for locomotion datasets.")
    path = args.out / f"{file.stem}__d3rlpy-{args.script}__{args.seed}"
    if path.exists():
        sys.exit(f"error: {path} exists: remove it, or name another --out.")
    flags = replace(script.Args(dataset=args.dataset), **script.PRESETS[args.preset])
    flags = replace(flags, seed=args.seed, offline_steps=args.steps, online_steps=0, device="cpu")
    script.set_up(flags)
    d3rlpy.seed(args.seed)  # numpy's, torch's and Python's generators
    with h5py.File(file) as f:  # with each episode's last state, from which d3rlpy takes s'
        columns = {name: f[name][:] for name in f}
    observations, terminals = columns["observations"], columns["terminals"]
    data = d3rlpy.dataset.MDPDataset(
        observations,
        columns["actions"],
        task.train_reward(columns["rewards"]),
        terminals.astype(np.float32),
        timeouts=(columns["ends"] & ~terminals).astype(np.float32),
    )
    learner = algorithm(args.script, flags, args.steps, observations).create(device="cpu")
    learner.build_with_dataset(data)
    policy = Policy(learner)
    envs = [script.TaskEnv(task) for _ in range(max(args.eval_episodes, args.final_episodes))]

    path.mkdir(parents=True)
    config = asdict(flags) | dict(algorithm=f"d3rlpy-{args.script}", d3rlpy=d3rlpy.__version__)
    config |= dict(command=sys.argv, task=task._asdict(), torch=torch.__version__)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "metrics.csv").write_text("step,phase,name,value\n")
    (path / "evaluations.csv").write_text("step,phase,episode,return,length,normalized\n")

    def evaluate(phase: str, step: int, count: int, stream: int) -> None:
        seeds = [script.episode_seed(args.seed, stream, i) for i in range(count)]
        script.rollout(policy, envs[:count], seeds)
        with open(path / "evaluations.csv", "a") as f:
            for i, env in enumerate(envs[:count]):
                row = f"{sum(env.rewards):.9g},{len(env.actions)},{env.normalized_return():.6g}"
                f.write(f"{step},{phase},{i},{row}\n")
        mean = np.mean([env.normalized_return() for env in envs[:count]])
        print(f"{phase:>8} {step:>9,}  normalized return {mean:6.1f}", flush=True)

    seconds = 0.0
    for step in range(args.steps + 1):
        if step % args.eval_every == 0 or step == args.steps:
            evaluate("offline", step, args.eval_episodes, script.EVALUATION)
            with open(path / "metrics.csv", "a") as f:
                f.write(f"{step},offline,seconds of updates,{seconds:.6g}\n")
        if step < args.steps:
            start = time.perf_counter()
            learner.update(data.sample_transition_batch(flags.offline_batch_size))
            seconds += time.perf_counter() - start
    evaluate("final", args.steps, args.final_episodes, script.FINAL)
    print(path)


if __name__ == "__main__":
    main()
