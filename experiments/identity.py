"""The paper's identity check (App. F): does a critic's action gradient follow the data's score?

    python experiments/identity.py runs/NAME/offline.pt runs/NAME/last.pt --out identity.csv
    python experiments/identity.py SMAC/offline.pt IQL/offline.pt

A baseline fits no score model, so all checkpoints are held against one, the first's or that of
--score, which a run of smac_offline_to_online.py has fitted to the same dataset. Prints, and with
--out writes, the mean cosine between grad_a Q (mean over the critics) and score(s, a) on the
dataset's actions, on samples of the checkpoint's own policy and on uniform actions.
"""

import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

import smac_offline_to_online as smac


@dataclass
class Args:
    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional]  # of any of the four scripts
    score: Path | None = None  # a checkpoint with a score model; default: the first of checkpoints
    dataset: str | None = None  # default: the one the score was fitted to
    states: int = 5_000  # of the dataset
    seed: int = 0  # of the states and actions
    out: Path | None = None  # CSV, one row a checkpoint and kind of action


def read_agent(path: Path, dataset: smac.Replay, args: smac.Args) -> smac.Agent:
    """The networks of a checkpoint in SMAC's agent, as at the hand-over."""
    saved = smac.read_checkpoint(path)
    sizes = {}
    for name in ("num_critics", "critic_hidden", "critic_activation", "policy_hidden"):
        sizes[name] = saved["args"][name]
    if saved["algorithm"] == "smac":
        args = smac.Args(**saved["args"])
    obs_dim, act_dim = dataset.sizes[:2]
    agent = smac.Agent(obs_dim, act_dim, replace(args, **sizes))
    smac.load_networks(dict(agent=agent), path, dataset)
    return agent


@torch.no_grad()
def cosines(agent: smac.Agent, batch: smac.Batch, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    actions = dict(
        data=batch.a,
        policy=agent.policy.sample(batch.s)[0],
        uniform=2 * torch.rand_like(batch.a) - 1,
    )
    return {kind: float(agent.cosine(batch.s, a)) for kind, a in actions.items()}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    smac.set_up(smac.Args(device="cpu"))
    if not args.checkpoints:
        sys.exit("error: name at least one checkpoint.")
    score_path = args.score or args.checkpoints[0]
    saved = smac.read_checkpoint(score_path)
    if not saved["agent"].get("score_model.fitted", False):
        how = "name a SMAC run's offline.pt with --score"
        sys.exit(f"error: {score_path} has no fitted score model: {how}.")
    flags, task = smac.Args(**saved["args"]), smac.Task(**saved["task"])
    obs_dim = len(saved["agent"]["policy.normalize.mean"])
    act_dim = len(saved["agent"]["policy.head.bias"]) // 2
    data = smac.load_dataset(args.dataset or flags.dataset, obs_dim, act_dim)
    dataset = smac.dataset_replay(data, task, torch.device("cpu"))
    score_model = read_agent(score_path, dataset, flags).score_model
    order = torch.randperm(dataset.n, generator=torch.Generator().manual_seed(args.seed))
    batch = dataset.unpack(dataset.rows[order[: args.states]])
    lines = []
    for path in args.checkpoints:
        agent = read_agent(path, dataset, flags)
        agent.score_model = score_model
        values = cosines(agent, batch, args.seed)
        print("  ".join(f"{kind} {x:6.3f}" for kind, x in values.items()), f" {path}")
        for kind, x in values.items():
            lines.append(["/".join(path.parts[-3:]), kind, f"{x:.4f}"])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows(
                [["checkpoint", "actions", "cosine"], *lines]
            )


if __name__ == "__main__":
    main()
