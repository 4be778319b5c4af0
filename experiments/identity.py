"""The paper's identity check (App. F) on any checkpoint: does the critic's action gradient follow the data's score?

    python experiments/identity.py smac/offline.pt iql/offline.pt cal_ql/last.pt --score smac/offline.pt
    python experiments/identity.py runs/NAME/*.pt --score runs/NAME/offline.pt --out runs/identity.csv

A baseline fits no score model, so all checkpoints are held against the one of --score, which a run of
smac_offline_to_online.py has fitted to the same dataset. Prints, and with --out writes, the mean cosine between
grad_a Q (mean over the critics) and score(s, a) on the dataset's actions, on samples of the checkpoint's own policy and
on uniform actions.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from torch.nn import functional as F

import smac_offline_to_online as smac


@dataclass
class Args:
    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional]  # offline.pt, last.pt, ... of the four scripts
    score: Path = tyro.MISSING  # a checkpoint of smac_offline_to_online.py with a fitted score model
    dataset: str | None = None  # as the scripts' --dataset (default: the one the score was fitted to)
    states: int = 5_000  # dataset states
    seed: int = 0  # of the states and actions
    out: Path | None = None  # CSV, one row a checkpoint and kind of action


def load(module: torch.nn.Module, state: dict, path: Path) -> torch.nn.Module:
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        raise smac.BadInput(f"{path} does not fit the score's task ({e}).") from e
    return module.eval()


def part(state: dict, name: str) -> dict:
    return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}


@torch.no_grad()
def cosines(path: Path, model: smac.ScoreModel, s: torch.Tensor, a: torch.Tensor, seed: int) -> dict[str, float]:
    """{kind of action: mean cosine between grad_a Q and the score} for states (B, o) and their data actions (B, a)."""
    saved = smac.read_checkpoint(path)
    args, agent = SimpleNamespace(**saved["args"]), smac.adopt(saved["agent"], a.size(1))
    sizes = s.size(1), a.size(1)
    critic = smac.Critics(args.num_critics, *sizes, args.critic_hidden, args.critic_activation)
    critic = load(critic, part(agent, "critic"), path)
    policy = part(agent, "policy")
    policy.pop("log_std", None)  # IQL's: adopt has put it into the head
    policy = load(smac.Policy(*sizes, args.policy_hidden), policy, path)
    torch.manual_seed(seed)
    actions = dict(data=a, policy=policy.sample(s)[0], uniform=2 * torch.rand_like(a) - 1)
    pairs = {k: (smac.action_gradient(critic, s, b).mean(0), model.score(s, b)) for k, b in actions.items()}
    return {k: float(F.cosine_similarity(*pair).mean()) for k, pair in pairs.items()}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.states < 1 or not args.checkpoints:
        raise smac.BadInput("One checkpoint and --states 1 are needed at least.")
    start = smac.read_checkpoint(args.score)
    if not start.get("score_model", {}).get("fitted"):
        raise smac.BadInput(f"{args.score} holds no fitted score model: name a SMAC run's offline.pt.")
    if (name := start["args"]["task"]) not in smac.TASKS:
        raise smac.BadInput(f"{args.score} is of the task {name}, which this version does not have.")
    task, dataset = smac.TASKS[name], args.dataset or start["args"].get("dataset")
    raw = smac.read_dataset(task, dataset)
    raw |= {k: smac.observation(task, v) for k, v in raw.items() if "observations" in k}
    obs_dim, act_dim = len(start["score_model"]["mean"]), len(start["score_model"]["outlet.1.bias"])
    smac.check_dataset(raw, obs_dim, act_dim, dataset or name)
    model = smac.ScoreModel(obs_dim, act_dim, SimpleNamespace(**start["args"]))
    model = load(model, start["score_model"], args.score)
    data = smac.to_transitions(raw, task)
    i = torch.randperm(len(data["w"]), generator=torch.Generator().manual_seed(args.seed))[: args.states]
    s, a = (torch.as_tensor(data[k])[i] for k in ("observations", "actions"))
    rows = []
    for path in args.checkpoints:
        values = cosines(path, model, s, a, args.seed)
        print("  ".join(f"{k} {v:6.3f}" for k, v in values.items()), f" {path}")
        rows += [dict(checkpoint="/".join(path.parts[-3:]), actions=k, cosine=f"{v:.4f}") for k, v in values.items()]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader(), writer.writerows(rows)


if __name__ == "__main__":
    main()
