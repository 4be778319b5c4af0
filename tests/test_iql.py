"""IQL: its losses, the order of its updates, its two phases, and what it hands over to SMAC's online algorithms."""

import contextlib
import copy
import io
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, load, only_run, rows_of, run_here, same
from torch import tensor

import iql

FLAGS = shlex.split("""
    --device cpu --offline-steps 50 --offline-batch-size 16 --num-critics 3 --critic-hidden 16 16 --policy-hidden 16 16
    --online-steps 80 --warmup-steps 30 --online-batch-size 16 --eval-every 25 --eval-episodes 2 --final-episodes 2
    --log-every 5 --checkpoint-every 20
""")


@contextlib.contextmanager
def command_line(*given):
    with mock.patch.object(sys, "argv", ["iql.py", *map(str, given)]):
        yield


def parse(*given) -> SimpleNamespace:
    with command_line(*given):
        return iql.parse_flags()


def run(*given) -> Path:
    """iql.main() in this process. Returns the run folder."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with command_line(*given), contextlib.redirect_stdout(out := io.StringIO()):
            iql.main()
    finally:
        plt.close("all")
        for number, handler in before.items():
            signal.signal(number, handler)
    return Path(re.search("^run folder: (.*)$", out.getvalue(), re.MULTILINE)[1])


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The folder of a run of both phases, never interrupted, and what each call of its update saw."""
    calls, step = [], iql.Updates.step

    def seen(self, rows):
        rates = {name: float(o.param_groups[-1]["lr"]) for name, o in self.optimizers.items()}
        calls.append(SimpleNamespace(rows=rows, rates=rates, beta=self.beta))
        return step(self, rows)

    with mock.patch.object(iql.Updates, "step", seen):
        folder = run(*FLAGS, "--dataset", dataset, "--runs-dir", tmp_path_factory.mktemp("iql"))
    return SimpleNamespace(folder=folder, calls=calls)


def evaluations(folder, phase, step=None):
    rows = [row for row in rows_of(folder / "evaluations.csv") if row["phase"] == phase]
    return [(r["episode"], r["return"], r["length"], r["score"]) for r in rows if step in (None, int(r["step"]))]


# ---- losses
def test_value_loss_weighs_positive_errors_by_the_expectile_and_negative_ones_by_its_complement():
    q, v = tensor([1.0, 3.0]), tensor([2.0, 1.0], requires_grad=True)  # u = -1, 2
    loss = iql.value_loss(q, v, 0.9)
    loss.backward()
    assert loss.item() == pytest.approx((0.1 * 1 + 0.9 * 4) / 2)
    torch.testing.assert_close(v.grad, tensor([2 * 0.1 * 1, -2 * 0.9 * 2]) / 2)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_value_loss_is_smallest_at_the_expectile(expectile):
    """m with expectile E(q - m)+ = (1 - expectile) E(m - q)+, found by bisection without the loss."""
    q = torch.randn(1000, dtype=torch.float64)
    low, high = q.min(), q.max()
    for _ in range(60):
        m = (low + high) / 2
        above, below = (q - m).clamp(min=0).mean(), (m - q).clamp(min=0).mean()
        low, high = (m, high) if expectile * above > (1 - expectile) * below else (low, m)
    v = m.clone().requires_grad_()
    iql.value_loss(q, v.expand(1000), expectile).backward()
    assert abs(v.grad.item()) < 1e-7
    assert m.item() == pytest.approx(q.mean().item()) if expectile == 0.5 else m > q.mean() + 0.1


def test_td_loss_is_the_mean_square_over_members_and_batch():
    q = tensor([[1.0, 2.0], [3.0, 4.0]])
    assert iql.td_loss(q, tensor([0.0, 2.0])).item() == pytest.approx((1 + 0 + 9 + 4) / 4)


def test_advantage_weights_stop_at_100():
    q, v = tensor([1.0, 0.0, 3.0, 1000.0]), tensor([1.0, 2.0, 1.0, 0.0])
    expected = tensor([1.0, math.exp(-1.0), math.exp(1.0), 100.0])
    torch.testing.assert_close(iql.advantage_weights(q, v, 0.5), expected)


def test_policy_loss_weighs_log_densities():
    loss = iql.policy_loss(tensor([-1.0, -2.0]), tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx((3 * 1 + 0.5 * 2) / 2)


# ---- networks
def policy(log_std=(0.0, -1.0), hidden=(8, 8)):
    pi = iql.Policy(3, 2, hidden)
    pi.log_std.data = tensor(log_std)
    return pi


def test_the_density_is_a_gaussians_on_the_actions_themselves():
    pi, s = policy(), torch.randn(5, 3)
    a = torch.cat([2 * torch.rand(3, 2) - 1, torch.ones(1, 2), -torch.ones(1, 2)])  # the bounds are no trouble
    normal = torch.distributions.Normal(torch.tanh(pi.head(pi.trunk(s))), tensor([0.0, -1.0]).exp())
    torch.testing.assert_close(pi.log_prob(s, a), normal.log_prob(a).sum(-1))


@pytest.mark.parametrize("given, used", [(-9.0, -5.0), (-4.0, -4.0), (5.0, 2.0)])
def test_the_deviation_is_bounded(given, used):
    pi, s, a = policy((given, given)), torch.randn(4, 3), torch.rand(4, 2)
    normal = torch.distributions.Normal(pi.mode(s), math.exp(used))
    torch.testing.assert_close(pi.log_prob(s, a), normal.log_prob(a).sum(-1))


def test_samples_scatter_around_the_mode_and_stay_within_the_bounds():
    pi = policy((-2.0, 1.0))
    s = torch.randn(1, 3).expand(20_000, 3)
    pi.head.weight.data *= 0.1
    a, mode = pi.sample(s), pi.mode(s)
    assert a.abs().max() == 1.0 and (a[:, 1].abs() == 1).float().mean() > 0.5  # deviation e: mostly on the bounds
    assert a[:, 0].mean().item() == pytest.approx(mode[0, 0].item(), abs=0.01)
    assert a[:, 0].std().item() == pytest.approx(math.exp(-2), rel=0.05)


def test_every_layer_starts_orthogonal_with_gain_sqrt_2():
    agent = iql.Agent(11, 3, parse(*FLAGS))
    single = [layer.weight for net in (agent.policy, agent.value) for layer in (net.head, net.trunk[2])]
    for w in [*single, *agent.critic.weights[1], *agent.critic.weights[2]]:
        torch.testing.assert_close(w @ w.mT, 2 * torch.eye(len(w)), atol=1e-5, rtol=0)
    assert (agent.policy.log_std == 0).all() and (agent.policy.head.bias == 0).all()
    assert all(torch.equal(p, q) for p, q in zip(agent.critic.parameters(), agent.critic_target.parameters()))
    assert not any(p.requires_grad for p in agent.critic_target.parameters())


def test_dropout_follows_each_hidden_layer_and_only_in_the_loss(monkeypatch):
    pi, s, a, rates = policy(hidden=(64, 64)), torch.randn(6, 3), torch.rand(6, 2), []
    monkeypatch.setattr(
        iql.F, "dropout", lambda h, p: (rates.append((h.size(1), p, h.detach().min().item())), h * 0)[1]
    )
    normal = torch.distributions.Normal(torch.zeros(6, 2), tensor([0.0, -1.0]).exp())
    torch.testing.assert_close(pi.log_prob(s, a, 0.1), normal.log_prob(a).sum(-1))  # all dropped: mean tanh(0)
    assert [(width, p) for width, p, _ in rates] == [(64, 0.1), (64, 0.1)]
    assert rates[0][2] == 0  # after the ReLU
    pi.log_prob(s, a), pi.mode(s), pi.sample(s)
    assert len(rates) == 2


# ---- updates
SIZES = (3, 2, 1, 3, 1, 1)


def some_rows(n=32):
    s, a, r, s_next = torch.randn(n, 3), 2 * torch.rand(n, 2) - 1, torch.randn(n, 1), torch.randn(n, 3)
    return torch.cat([s, a, r, s_next, (torch.rand(n, 1) < 0.3).float(), torch.zeros(n, 1)], 1)


def make_updates(**flags):
    args = parse(*FLAGS, "--tau", 0.3, "--expectile", 0.8)
    vars(args).update(dict(critic_lr=3e-3, value_lr=2e-2, policy_lr=5e-3) | flags)
    agent = iql.Agent(3, 2, args)
    for w in agent.critic_target.weights:  # so that it matters which of the two is asked
        w.data += 0.1 * torch.randn_like(w)
    optimizers = iql.make_optimizers(agent, args)
    iql.set_learning_rates(optimizers, args, 0.0)
    return iql.Updates(agent, optimizers, SIZES, 0.7, args)


def by_hand(agent, batches, args, beta, stale=None):
    """The official order with torch.optim.Adam and backward(). stale: "policy" or "q" gets V as it was before its step,
    or "order": the target moves before the policy."""
    names = ("value", "policy", "critic")
    adam = {k: torch.optim.Adam(getattr(agent, k).parameters(), getattr(args, f"{k}_lr")) for k in names}

    def move(name, loss):
        agent.zero_grad()
        loss.backward()
        adam[name].step()

    def policy_step(s, a, v):
        weight = torch.exp(beta * (agent.critic_target(s, a).amin(0) - v(s))).clamp(max=100).detach()
        mean = torch.tanh(agent.policy.head(agent.policy.trunk(s)))
        density = torch.distributions.Normal(mean, agent.policy.log_std.exp()).log_prob(a).sum(1)
        move("policy", -(weight * density).mean())

    for s, a, r, s_next, terminal, _ in (rows.split(SIZES, 1) for rows in batches):
        before = copy.deepcopy(agent.value)
        u = agent.critic_target(s, a).amin(0).detach() - agent.value(s)
        move("value", ((args.expectile - (u < 0).float()).abs() * u**2).mean())
        if stale != "order":
            policy_step(s, a, before if stale == "policy" else agent.value)
        v_next = (before if stale == "q" else agent.value)(s_next).detach()
        y = r[:, 0] + args.gamma * (1 - terminal[:, 0]) * v_next
        move("critic", sum(((q - y) ** 2).mean() for q in agent.critic(s, a)) / args.num_critics)
        for p, q in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            p.data.copy_((1 - args.tau) * p + args.tau * q)
        if stale == "order":
            policy_step(s, a, agent.value)


def distance(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values())
    return max((a - b).abs().max().item() for a, b in pairs)


def test_the_update_is_the_official_order_with_the_fresh_value():
    u = make_updates()
    batches, start = [some_rows() for _ in range(6)], copy.deepcopy(u.agent)
    for rows in batches:
        metrics = u.step(rows)
    assert not any(x.requires_grad for x in metrics.values())
    differences = {}
    for stale in (None, "policy", "q", "order"):
        agent = copy.deepcopy(start)
        by_hand(agent, batches, u.args, 0.7, stale)
        differences[stale] = distance(agent, u.agent)
    assert differences.pop(None) < 2e-5
    assert all(d > 1e-3 for d in differences.values()), differences


@pytest.mark.parametrize("name", ["value", "policy", "critic"])
def test_each_loss_moves_its_own_network_alone(name):
    others = {f"{k}_lr": 0.0 for k in ("value", "policy", "critic") if k != name}
    u = make_updates(**others, tau=0.0)
    before = copy.deepcopy(u.agent.state_dict())
    u.step(some_rows())
    moved = {k.split(".")[0] for k, x in u.agent.state_dict().items() if not torch.equal(x, before[k])}
    assert moved == {name}


def test_a_terminal_state_ends_the_target(monkeypatch):
    u, rows, seen = make_updates(), some_rows(), []
    td_loss = iql.td_loss
    monkeypatch.setattr(iql, "td_loss", lambda q, y: (seen.append(y), td_loss(q, y))[1])
    u.step(rows)
    _, _, r, s_next, terminal, _ = rows.split(SIZES, 1)
    over = terminal[:, 0] == 1
    assert 0 < over.sum() < len(rows)
    assert torch.equal(seen[0][over], r[over, 0])
    torch.testing.assert_close(seen[0][~over], (r[:, 0] + 0.99 * u.agent.value(s_next))[~over])


def test_the_updates_policy_loss_drops_out(monkeypatch):
    seen, log_prob = [], iql.Policy.log_prob
    monkeypatch.setattr(iql.Policy, "log_prob", lambda *x: (seen.append(x[-1]), log_prob(*x))[1])
    make_updates(dropout=0.25).step(some_rows())
    assert seen == [0.25]


def test_muon_takes_the_matrices_between_hidden_layers():
    u = make_updates(optimizer="muon")
    for name, shapes in dict(value=[(16, 16)], policy=[(16, 16)], critic=[(3, 16, 16)]).items():
        matrices, others = (group["params"] for group in u.optimizers[name].param_groups)
        assert [tuple(p.shape) for p in matrices] == shapes
        assert len(matrices) + len(others) == len(list(getattr(u.agent, name).parameters()))
    assert all(len(o.param_groups) == 1 for o in make_updates().optimizers.values())  # Adam alone


# ---- learning rates
def test_the_policys_rate_falls_along_half_a_cosine():
    u = make_updates(policy_lr_decay=True)

    def rates(progress):
        iql.set_learning_rates(u.optimizers, u.args, progress)
        return [float(u.optimizers[k].param_groups[0]["lr"]) for k in ("critic", "value", "policy")]

    assert [rates(x)[2] / 5e-3 for x in (0, 0.25, 0.5, 1)] == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, 0], abs=1e-6)
    assert rates(0.7)[:2] == pytest.approx([3e-3, 2e-2])
    u.args.policy_lr_decay = False
    assert rates(0.7)[2] == pytest.approx(5e-3)


def test_rates_in_a_run_fall_offline_and_are_constant_online(finished):
    rates = [call.rates["policy"] for call in finished.calls]
    given = parse(*FLAGS).policy_lr
    expected = [given * (1 + math.cos(math.pi * i / 50)) / 2 for i in range(50)]
    assert rates == pytest.approx(expected + [given] * 50)  # 30 of 80 online steps are the warm start
    assert {call.rates["critic"] for call in finished.calls} == {tensor(parse(*FLAGS).critic_lr).item()}


# ---- batches, rewards
def buffers(old, new, capacity):
    dataset, replay = (iql.Replay(n, 1, 1, torch.device("cpu")) for n in (old, capacity))
    for buffer, n, mark in ((dataset, old, 1.0), (replay, new, 2.0)):
        buffer.add(np.arange(n), *[np.full(n, mark)] * 5)
    return dataset, replay


@pytest.mark.parametrize("fraction, expected", [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_balanced_batches_have_a_fixed_share_of_the_dataset(fraction, expected):
    args = SimpleNamespace(online_buffer="balanced", online_batch_size=40, offline_fraction=fraction)
    rows = iql.online_batch(*buffers(30, 5, 50), args)
    assert (rows[:, 1] == 1).sum() == expected and (rows[:, 1] == 2).sum() == 40 - expected


def test_shared_batches_are_uniform_over_dataset_and_replay():
    args = SimpleNamespace(online_buffer="shared", online_batch_size=20_000, offline_fraction=0.5)
    rows = iql.online_batch(*buffers(6, 2, 50), args)  # 48 rows of the replay are still empty
    counts = [((rows[:, 1] == mark) & (rows[:, 0] == i)).sum() for mark, n in ((1, 6), (2, 2)) for i in range(n)]
    assert sum(counts) == 20_000
    assert all(abs(count - 2500) < 250 for count in counts)


def test_advantages_in_returns_are_the_official_reward_scale():
    data, scale = dict(returns=np.array([-100.0, 400.0, 150.0])), 1000 / 500
    beta = iql.scaled_beta(data, SimpleNamespace(advantage_unit="returns", beta=3.0))
    q, v = torch.randn(20), torch.randn(20)
    torch.testing.assert_close(iql.advantage_weights(q, v, beta), iql.advantage_weights(scale * q, scale * v, 3.0))
    assert iql.scaled_beta(data, SimpleNamespace(advantage_unit="reward", beta=3.0)) == 3.0


def test_rewards_stay_in_the_tasks_units_offline_and_online(finished, dataset, tmp_path):
    """Even where the official scale is asked for: no row's reward has another size than the file's and Hopper's."""
    flags = ["--offline-steps", 5, "--online-steps", 15, "--warmup-steps", 5, "--final-episodes", 1]
    with mock.patch.object(iql.Updates, "__init__", autospec=True, side_effect=iql.Updates.__init__) as made:
        run(*FLAGS, *flags, "--advantage-unit", "returns", "--dataset", dataset, "--runs-dir", tmp_path)
    with h5py.File(dataset) as f:
        rewards, ends = f["rewards"][()], (f["terminals"][()] | f["timeouts"][()]).nonzero()[0]
    returns = [part.sum() for part in np.split(rewards, ends[:-1] + 1)]
    assert made.call_args.args[4] == pytest.approx(1000 / (max(returns) - min(returns)), rel=1e-5)
    assert finished.calls[0].beta == 1.0
    known = {np.float32(r).item() for r in rewards}
    state = load(only_run(tmp_path) / "last.pt")["replay"]["rows"]
    env = iql.TaskEnv(iql.TASKS["hopper-embedded"])
    env.reset(seed=iql.episode_seed(0, iql.TRAINING, 0))
    online = [env.step(row[11:14].numpy())[1] for row in state[:5]]
    assert state[:5, 14].tolist() == pytest.approx(online, rel=1e-6)
    assert {x.item() for call in finished.calls[:50] for x in call.rows[:, 14]} <= known


# ---- runs
def test_a_run_leaves_what_the_page_on_checkpoints_says(finished):
    assert {"offline.pt", "last.pt", "best.pt", "curve.png", "iql.py"} <= {p.name for p in finished.folder.iterdir()}
    state = load(finished.folder / "offline.pt")
    assert state["args"]["algorithm"] == "iql"
    assert {"agent", "policy", "critic", "value"} <= state.keys() and not {"replay", "env"} & state.keys()
    agent = state["agent"]
    assert {k.split(".")[0] for k in agent} == {"policy", "critic", "critic_target", "value"}
    trunk = {k for k in agent if k.startswith("policy.trunk")}
    assert trunk == {f"policy.trunk.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert agent["policy.head.weight"].shape == (3, 16) and agent["policy.log_std"].shape == (3,)
    assert {"replay", "env"} <= load(finished.folder / "last.pt").keys()


def test_every_network_has_the_datasets_normaliser(finished, dataset, tmp_path):
    agent = load(finished.folder / "offline.pt")["agent"]
    with h5py.File(dataset) as f:
        mean = tensor(f["observations"][()].mean(0))
    for network in ("policy", "critic", "critic_target", "value"):
        torch.testing.assert_close(agent[f"{network}.mean"], mean, rtol=1e-3, atol=1e-3)
        assert (agent[f"{network}.std"] != 1).all()
    few = ("--no-normalize-observations", "--offline-steps", 1, "--online-steps", 0, "--final-episodes", 1)
    agent = load(run(*FLAGS, *few, "--dataset", dataset, "--runs-dir", tmp_path) / "offline.pt")["agent"]
    for network in ("policy", "critic", "critic_target", "value"):
        assert (agent[f"{network}.mean"] == 0).all() and (agent[f"{network}.std"] == 1).all()


def test_metrics_are_those_of_the_page(finished):
    table = (ROOT / "docs" / "iql.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    rows = rows_of(finished.folder / "metrics.csv")
    explained = set(re.findall(r"`([\w/]+)`", table))
    assert {row["name"] for row in rows if row["phase"] == "online"} == explained
    assert {row["name"] for row in rows if row["phase"] == "offline"} == explained - {"seconds/environment"}


def test_the_online_phase_starts_with_the_pretrained_policy_and_explores_with_its_samples(finished):
    folder = finished.folder
    assert evaluations(folder, "online", 0) == evaluations(folder, "offline", 50) != []
    state, start = load(folder / "last.pt"), load(folder / "offline.pt")
    pi = iql.Policy(11, 3, (16, 16))
    pi.load_state_dict({k[7:]: x for k, x in start["agent"].items() if k.startswith("policy.")})
    warm = state["replay"]["rows"][:30]
    mode, a = pi.mode(warm[:, :11]), warm[:, 11:14]
    assert a.abs().max() <= 1
    inside = a.abs() < 1  # sampled, not the mean; the deviation is still near its start, 1
    assert 0.2 < (a - mode)[inside].std() < 1.2


def test_nothing_is_learned_in_the_warm_start(finished):
    state = load(finished.folder / "last.pt")
    assert len(finished.calls) == 50 + 50
    collected = {tuple(row.tolist()) for row in state["replay"]["rows"]}
    mine = [[tuple(row.tolist()) in collected for row in call.rows] for call in finished.calls]
    assert not any(map(any, mine[:50])) and all(sum(batch) == 8 for batch in mine[50:])  # half from the dataset


def test_an_offline_pt_starts_the_online_phase(finished, dataset, tmp_path):
    """With no flag for any network, none of which has its default size, and with the optimisers' states."""
    shapes = ("--num-critics", "--critic-hidden", "--policy-hidden")
    flags = shlex.split(re.sub(rf"({'|'.join(shapes)})( \d+)+", "", shlex.join(FLAGS)))
    assert not set(shapes) & set(flags)
    start = load(finished.folder / "offline.pt")
    begin = ["--init-from", finished.folder / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run(*flags, *begin, "--online-steps", 30, "--policy-lr", 1e-5, "--online-buffer", "shared")
    assert evaluations(folder, "online", 0) == evaluations(finished.folder, "offline", 50)
    state = load(folder / "last.pt")
    assert state["position"] == dict(online=30)
    assert same(state["agent"], start["agent"])  # all of it was warm start
    assert all(same(state[name]["state"], start[name]["state"]) for name in ("critic", "policy", "value"))
    assert {group["lr"].item() for group in state["policy"]["param_groups"]} == {tensor(1e-5).item()}


def test_a_resumed_run_needs_no_offline_pt(finished, dataset, tmp_path, monkeypatch):
    path = tmp_path / "offline.pt"
    path.write_bytes((finished.folder / "offline.pt").read_bytes())
    ends = []
    for runs in (tmp_path / "a", tmp_path / "b"):
        flags = [*FLAGS, "--init-from", path, "--dataset", dataset, "--runs-dir", runs, "--online-buffer", "shared"]
        if not ends:
            ends.append(run(*flags))
            continue
        with monkeypatch.context() as patch, pytest.raises(iql.BadInput):
            interrupt(patch, 23)
            run(*flags)
        path.unlink()
        ends.append(run("--resume", only_run(runs)))
    assert same(outcome(ends[0]), outcome(ends[1]))


# ---- resume
def outcome(folder) -> dict:
    """All that a run leaves and that does not tell the time."""
    state = {k: v for k, v in load(folder / "last.pt").items() if k not in ("args", "seconds", "sizes")}
    metrics = [tuple(row.values()) for row in rows_of(folder / "metrics.csv") if "seconds" not in row["name"]]
    return dict(state=state, metrics=metrics, evaluations=rows_of(folder / "evaluations.csv"))


def interrupt(patch, call):
    """SIGTERM at the given call of the update."""
    step, calls = iql.Updates.step, []

    def hooked(*x):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*x)

    patch.setattr(iql.Updates, "step", hooked)


@pytest.mark.parametrize("phase, call, position", [("offline", 37, 37), ("offline", 50, 50), ("online", 71, 51)])
def test_stopped_and_resumed_equals_uninterrupted(finished, dataset, tmp_path, monkeypatch, phase, call, position):
    with monkeypatch.context() as patch, pytest.raises(iql.BadInput) as stop:
        interrupt(patch, call)
        run(*FLAGS, "--dataset", dataset, "--runs-dir", tmp_path)
    folder = only_run(tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM and load(folder / "last.pt")["position"][phase] == position
    assert run("--resume", folder) == folder
    ours, theirs = outcome(folder), outcome(finished.folder)
    assert {"agent", "critic", "policy", "value", "replay", "env", "rng"} <= theirs["state"].keys()
    assert len(theirs["metrics"]) > 100 and len(theirs["evaluations"]) == 2 * (3 + 4 + 1)
    assert [k for k, v in theirs["state"].items() if not same(ours["state"].get(k), v)] == []
    assert ours["metrics"] == theirs["metrics"] and ours["evaluations"] == theirs["evaluations"]


# ---- on to SMAC's online algorithms
@pytest.mark.parametrize("algorithm", ["sac", "td3", "td3+bc", "awr"])
def test_smac_goes_on_from_offline_pt(finished, dataset, tmp_path, algorithm):
    shapes = r"--(num-critics|critic-hidden|policy-hidden)( \d+)+"
    flags = shlex.split(re.sub(shapes, "", shlex.join(TINY)))
    begin = ["--init-from", finished.folder / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    few = ["--online-steps", 40, "--warmup-steps", 30, "--keep-every", 1]
    folder = run_here(*flags, *begin, *few, "--online-algorithm", algorithm)
    ours, theirs = evaluations(folder, "online", 0), evaluations(finished.folder, "offline", 50)
    assert ours == theirs != []
    theirs = load(finished.folder / "offline.pt")["agent"]
    warm, end = load(folder / "online-30.pt")["agent"], load(folder / "last.pt")["agent"]
    for name in ("critic", "critic_target"):
        assert [k for k, x in theirs.items() if k.startswith(f"{name}.") and not torch.equal(x, warm[k])] == []
    for name in ("policy", "policy_target"):  # the target is a copy, not a network that nobody trained
        assert torch.equal(warm[f"{name}.head.weight"][:3], theirs["policy.head.weight"])
        assert torch.equal(warm[f"{name}.mean"], theirs["policy.mean"])
    assert torch.equal(warm["policy.head.bias"][3:], theirs["policy.log_std"])
    assert not torch.equal(end["policy.head.weight"], warm["policy.head.weight"])


# ---- flags
def test_rows_name_real_flags_with_values_of_their_type():
    flags = vars(parse("--task", "hopper-medium-v2"))
    for name, row in iql.ROWS.items():
        assert row.keys() <= flags.keys(), name
        assert all(type(value) is type(flags[k]) for k, value in row.items()), name
    assert set(iql.NETWORK_FLAGS) <= flags.keys()


@pytest.mark.parametrize(
    "task, expectile, beta, dropout, critic, policy",
    [
        ("walker2d-medium-replay-v2", 0.9, 1.0, 0.0, (256, 256), (256, 256)),
        ("door-binary-v0", 0.7, 0.5, 0.1, (256,) * 3, (512,) * 3),
        ("kitchen-partial-v0", 0.7, 0.5, 0.1, (512,) * 3, (512,) * 3),
    ],
)
def test_defaults_are_those_of_table_8(task, expectile, beta, dropout, critic, policy):
    args = parse("--task", task)
    assert (args.expectile, args.beta, args.dropout) == (expectile, beta, dropout)
    assert (args.critic_hidden, args.policy_hidden, args.num_critics) == (critic, policy, 2)
    assert (args.critic_lr, args.value_lr, args.policy_lr, args.tau, args.gamma) == (3e-4, 3e-4, 1e-4, 0.005, 0.99)
    assert args.critic_activation == "relu" and args.optimizer == "adam"


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--expectile", 1], "--expectile 1"),
        (["--expectile", 0], "--expectile 0"),
        (["--dropout", 1], "--dropout 1"),
        (["--num-critics", 1], "--num-critics 1"),
        (["--offline-steps", 0], "--init-from"),
        (["--task", "door-binary-v0", "--advantage-unit", "returns"], "--advantage-unit"),
    ],
)
def test_bad_flags_end_with_one_sentence_and_no_run_folder(dataset, tmp_path, capsys, flags, named):
    with pytest.raises(iql.BadInput) as end:
        run(*FLAGS, "--dataset", dataset, "--runs-dir", tmp_path / "runs", *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and named in line
    assert not (tmp_path / "runs").exists()


def test_equal_returns_have_no_unit():
    with pytest.raises(iql.BadInput, match="different returns"):
        iql.scaled_beta(dict(returns=np.ones(3)), SimpleNamespace(advantage_unit="returns", beta=1.0))


@pytest.mark.parametrize("change, sentence", [("smac", "holds no V"), ("iql", "was trained with")])
def test_another_scripts_file_or_another_shape_is_refused(finished, dataset, tmp_path, change, sentence):
    state = load(finished.folder / "offline.pt")
    state["args"]["algorithm"] = change
    torch.save(state, tmp_path / "offline.pt")
    begin = ["--init-from", tmp_path / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path / "runs"]
    with pytest.raises(iql.BadInput, match=sentence):
        run(*FLAGS, *begin, *(["--policy-hidden", 8] if change == "iql" else []))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not os.environ.get("SMAC_TEST_COMPILE"), reason="minutes of compilation: set SMAC_TEST_COMPILE=1")
def test_compiled_updates_compute_the_same(dataset, tmp_path):
    flags = ["--dataset", dataset, "--offline-steps", 20, "--online-steps", 50]
    states = []
    for extra in ([], ["--compile"]):
        states.append(load(run(*FLAGS, *flags, "--runs-dir", tmp_path / str(len(extra)), *extra) / "offline.pt"))
    for name, x in states[0]["agent"].items():
        torch.testing.assert_close(states[1]["agent"][name], x, rtol=1e-3, atol=1e-4)
