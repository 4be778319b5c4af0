"""The method in one picture: actions with two numbers, one state, one step, a return that grows to
the upper right. The critics have to say what Q is where the dataset holds no action.

python experiments/picture.py                # about a minute; writes docs/method.png
"""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from matplotlib.figure import Figure

import smac_offline_to_online as smac


@dataclass
class Args:
    out: Path = Path("docs/method.png")
    score_steps: int = 2000
    offline_steps: int = 2000


def train(a, r, flags: smac.Args) -> smac.Agent:
    """Phases 1 and 2 on the actions a (n, 2) with the returns r (n,)."""
    w, s = (r - r.min()) / (r.max() - r.min()), torch.zeros(len(a), 1)
    agent = smac.Agent(1, 2, flags)
    model = copy.deepcopy(agent.score_model).train().requires_grad_(True)
    fit = smac.Muon([], model.parameters(), flags.score_lr)
    for step in range(flags.score_steps):
        i = torch.randint(len(a), (flags.score_batch_size,))
        smac.descend(model.loss(s[i], a[i], w[i]), fit)
        smac.follow(agent.score_model, model, max(1e-3, 1 / (step + 1)))
    for _ in range(flags.offline_steps):
        i = torch.randint(len(a), (flags.offline_batch_size,))
        agent.offline_update(smac.Batch(s[i], a[i], r[i], s[i], torch.ones(len(i)), r[i]))
    return agent


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    # a steeper alpha than usual: here Q's own slope, 1.4, is large beside its mean size, 0.5
    flags = smac.Args(**smac.PRESETS["small"], device="cpu", alpha_scale=1.0)
    smac.set_up(flags)
    angle, radius = 2 * torch.pi * torch.rand(4000), 0.55 + 0.05 * torch.randn(4000)
    a = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    flags.score_steps, flags.offline_steps = args.score_steps, args.offline_steps
    agents = [train(a, a.sum(1), replace(flags, kappa=kappa)) for kappa in (0.0, flags.kappa)]

    ticks = torch.linspace(-0.95, 0.95, 20)
    x, y = torch.meshgrid(ticks, ticks, indexing="xy")
    grid = torch.stack([x, y], -1).reshape(-1, 2)
    s = torch.zeros(len(grid), 1)
    arrows = [agents[1].score_model.score(s, grid)]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    panels[0].set_title("dataset, score of its good actions")
    figure.colorbar(panels[0].scatter(*a[::4].T, c=a[::4].sum(1), s=4), label="return")
    for panel, agent, name in zip(panels[1:], agents, ("alone", "with score matching")):
        q = agent.critic(s, grid).detach().mean(0)
        arrows.append(agent.critic.action_gradient(s, grid).detach().mean(0))
        cosine = torch.cosine_similarity(arrows[0], arrows[-1]).mean()
        panel.set(title=f"critics {name}", xlabel=f"cosine of gradient and score: {cosine:.2f}")
        filled = panel.contourf(x, y, q.reshape(x.shape), levels=20)
        figure.colorbar(filled, label="Q; arrows: its gradient")
        panel.scatter(*a[::20].T, s=1, color="white")
        panel.plot(*grid[q.argmax()], "r*", ms=18, label="largest Q")
        panel.legend(loc="lower left")
    for panel, direction in zip(panels, arrows):
        panel.quiver(*grid.T, *torch.nn.functional.normalize(direction).T, scale=28, width=0.004)
        panel.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
