"""IQL: its losses, the order of its update, its two phases, and what it hands over to SMAC."""

import copy
import math
import os
import re
import shlex
import signal
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, load, only_run, rows_of, run_here, same
from torch import tensor

import iql
import smac_offline_to_online as smac

FLAGS = shlex.split("""
    --device cpu --offline-steps 50 --offline-batch-size 16 --num-critics 3 --critic-hidden 16 16
    --policy-hidden 16 16 --online-steps 80 --warmup-steps 30 --online-batch-size 16
    --normalize-observations --eval-every 25 --eval-episodes 2 --final-episodes 2 --log-every 5
    --checkpoint-every 20
""")
ARGS = replace(iql.Args(), num_critics=3, critic_hidden=(16, 16), policy_hidden=(16, 16))


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The folder of a run of both phases, and what each of its updates saw."""
    calls, update = [], iql.Agent.update

    def seen(self, batch):
        rates = {name: float(o.param_groups[0]["lr"]) for name, o in self.optimizers.items()}
        calls.append(SimpleNamespace(batch=batch, rates=rates))
        return update(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iql.Agent, "update", seen)
        runs = tmp_path_factory.mktemp("iql")
        folder = run_here(iql, *FLAGS, "--dataset", dataset, "--runs-dir", runs)
    return SimpleNamespace(folder=folder, calls=calls)


def evaluations(folder, phase, step):
    """Return and length of each episode."""
    rows = rows_of(folder / "evaluations.csv")
    rows = [row for row in rows if row["phase"] == phase and int(row["step"]) == step]
    return [(float(row["return"]), int(row["length"])) for row in rows]


def batch(n=32):
    terminal = (torch.rand(n) < 0.3).float()
    s, a, s_next = torch.randn(n, 3), 2 * torch.rand(n, 2) - 1, torch.randn(n, 3)
    return iql.Batch(s, a, torch.randn(n), s_next, terminal, torch.zeros(n))


# ---- losses
@pytest.mark.parametrize("v, weight_of_error", [(1.0, 0.8), (4.0, 0.2)])
def test_losses_by_hand(v, weight_of_error):
    """Constant networks: Q = 0 and 3, Q' = 2 and 5, V = v, policy N(0, 1); nothing moves V."""
    flags = dict(num_critics=2, expectile=0.8, beta=0.5, gamma=0.9, value_lr=0.0)
    agent = iql.Agent(3, 2, replace(ARGS, **flags))
    for p in agent.parameters():
        p.data.zero_()
    agent.critic.biases[-1].data += tensor([0.0, 3.0]).view(2, 1, 1)
    agent.critic_target.biases[-1].data += tensor([2.0, 5.0]).view(2, 1, 1)
    agent.value.head.bias.data += v
    s, a = torch.randn(2, 3), tensor([[0.5, 0.0], [1.0, -1.0]])
    r, terminal = tensor([1.0, 2.0]), tensor([0.0, 1.0])
    metrics = agent.update(iql.Batch(s, a, r, torch.randn(2, 3), terminal, torch.zeros(2)))
    u, y = 2 - v, (1 + 0.9 * v, 2.0)
    log_prob = -0.5 * (0.25 + 2) / 2 - math.log(2 * math.pi)
    expected = dict(
        value_loss=weight_of_error * u**2,
        policy_loss=-math.exp(0.5 * u) * log_prob,
        td_loss=(y[0] ** 2 + y[1] ** 2 + (3 - y[0]) ** 2 + (3 - y[1]) ** 2) / 4,
        q=1.5,
        q_std=1.5,
        v=v,
        advantage=u,
        weight=math.exp(0.5 * u),
        clipped=0.0,
    )
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    assert not any(x.requires_grad for x in metrics.values())


def test_weights_stop_at_100():
    agent = iql.Agent(3, 2, replace(ARGS, beta=1000.0))
    agent.value.head.bias.data -= 10
    metrics = agent.update(batch())
    assert (metrics["weight"], metrics["clipped"]) == (100, 1)


# ---- networks
def policy(log_std=(0.0, -1.0), hidden=(8, 8)):
    pi = iql.Policy(3, 2, replace(ARGS, policy_hidden=hidden))
    pi.log_std.data = tensor(log_std)
    return pi


@pytest.mark.parametrize("given, used", [(-9.0, -5.0), (-1.0, -1.0), (5.0, 2.0)])
def test_the_density_is_a_gaussians_with_a_bounded_deviation(given, used):
    pi, s = policy((given, given)), torch.randn(5, 3)
    a = torch.cat([2 * torch.rand(3, 2) - 1, torch.ones(1, 2), -torch.ones(1, 2)])  # bounds too
    normal = torch.distributions.Normal(torch.tanh(pi.head(pi.trunk(s))), math.exp(used))
    torch.testing.assert_close(pi.log_prob(s, a), normal.log_prob(a).sum(-1))


def test_collected_actions_scatter_around_the_mode_and_stay_within_the_bounds():
    agent = iql.Agent(3, 2, ARGS)
    agent.policy.log_std.data = tensor([-2.0, 1.0])
    agent.policy.head.weight.data *= 0.1
    s = torch.randn(1, 3).expand(20_000, 3)
    a, mode = agent.act(s), agent.policy.mode(s)
    assert a.abs().max() == 1.0
    assert (a[:, 1].abs() == 1).float().mean() > 0.5  # deviation e: mostly on the bounds
    assert a[:, 0].mean().item() == pytest.approx(mode[0, 0].item(), abs=0.01)
    assert a[:, 0].std().item() == pytest.approx(math.exp(-2), rel=0.05)


def test_every_layer_starts_orthogonal_with_gain_sqrt_2():
    agent = iql.Agent(11, 3, ARGS)
    nets = (agent.policy, agent.value)
    weights = [layer.weight for net in nets for layer in (net.head, net.trunk[2])]
    for w in [*weights, *agent.critic.weights[1], *agent.critic.weights[2]]:
        torch.testing.assert_close(w @ w.mT, 2 * torch.eye(len(w)), atol=1e-5, rtol=0)
    assert same(dict(agent.critic.state_dict()), dict(agent.critic_target.state_dict()))
    assert not any(p.requires_grad for p in agent.critic_target.parameters())


def test_dropout_follows_each_hidden_layer_and_only_in_the_loss(monkeypatch):
    seen = []

    def dropout(h, p):
        seen.append((h.size(1), p))
        assert h.min() == 0  # after the ReLU
        return h * 0

    monkeypatch.setattr(iql.F, "dropout", dropout)
    pi, s, a = policy(hidden=(64, 32)), torch.randn(6, 3), torch.rand(6, 2)
    normal = torch.distributions.Normal(torch.zeros(6, 2), tensor([0.0, -1.0]).exp())
    torch.testing.assert_close(pi.log_prob(s, a, 0.1), normal.log_prob(a).sum(-1))
    assert seen == [(64, 0.1), (32, 0.1)]
    pi.mode(s)
    agent = iql.Agent(3, 2, replace(ARGS, dropout=0.25))
    agent.act(s)
    assert len(seen) == 2
    agent.update(batch())
    assert seen[2:] == [(16, 0.25), (16, 0.25)]


# ---- update
def by_hand(agent, batches, args, stale):
    """The official order with torch.optim.Adam and backward(). stale: "policy" or "q" gets V as it
    was before its step, or "order": the target moves before the policy."""
    adam = {}
    for name in ("value", "policy", "critic"):
        parameters = getattr(agent, name).parameters()
        adam[name] = torch.optim.Adam(parameters, getattr(args, f"{name}_lr"))

    def move(name, loss):
        agent.zero_grad()
        loss.backward()
        adam[name].step()

    def policy_step(s, a, v):
        weight = torch.exp(args.beta * (agent.critic_target(s, a).amin(0) - v(s))).clamp(max=100)
        mean = torch.tanh(agent.policy.head(agent.policy.trunk(s)))
        density = torch.distributions.Normal(mean, agent.policy.log_std.exp()).log_prob(a).sum(1)
        move("policy", -(weight.detach() * density).mean())

    for s, a, r, s_next, terminal, _ in batches:
        before = copy.deepcopy(agent.value)
        u = agent.critic_target(s, a).amin(0).detach() - agent.value(s)
        move("value", ((args.expectile - (u < 0).float()).abs() * u**2).mean())
        if stale != "order":
            policy_step(s, a, before if stale == "policy" else agent.value)
        v_next = (before if stale == "q" else agent.value)(s_next).detach()
        y = r + args.gamma * (1 - terminal) * v_next
        move("critic", sum(((q - y) ** 2).mean() for q in agent.critic(s, a)) / args.num_critics)
        for p, q in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            p.data.copy_((1 - args.tau) * p + args.tau * q)
        if stale == "order":
            policy_step(s, a, agent.value)


def test_the_update_is_the_official_order_with_the_fresh_value():
    """Six of them with large steps: order, gradients of each loss, targets, Adams, terminals."""
    rates = dict(critic_lr=3e-3, value_lr=2e-2, policy_lr=5e-3)
    args = replace(ARGS, tau=0.3, expectile=0.8, beta=0.7, **rates)
    agent = iql.Agent(3, 2, args)
    for w in agent.critic_target.weights:  # so that it matters which of the two is asked
        w.data += 0.1 * torch.randn_like(w)
    batches, start = [batch() for _ in range(6)], copy.deepcopy(agent)
    for one in batches:
        agent.update(one)
    distance = {}
    for stale in ("", "policy", "q", "order"):
        other = copy.deepcopy(start)
        by_hand(other, batches, args, stale)
        pairs = zip(agent.parameters(), other.parameters())
        distance[stale] = max((p - q).abs().max().item() for p, q in pairs)
    assert distance.pop("") < 2e-5
    assert all(d > 1e-3 for d in distance.values()), distance


def test_the_update_compiles_to_one_graph():
    """The backend runs the graph as it is: no compiler, but the same number of graphs."""
    agent = iql.Agent(3, 2, replace(ARGS, dropout=0.1))
    update = torch.compile(agent.update, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # as `compiled` does
        assert update(batch())["td_loss"].isfinite()


# ---- runs
def test_rates_fall_offline_and_are_constant_online(finished):
    rates = [call.rates["policy"] for call in finished.calls]
    expected = [1e-4 * (1 + math.cos(math.pi * i / 50)) / 2 for i in range(50)]
    assert rates == pytest.approx(expected + [1e-4] * 50)  # 30 online steps are the warm start
    for name in ("critic", "value"):
        assert {call.rates[name] for call in finished.calls} == {tensor(3e-4).item()}


def test_metrics_are_those_of_the_page(finished):
    table = (ROOT / "docs" / "iql.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    rows = rows_of(finished.folder / "metrics.csv")
    online = {row["name"] for row in rows if row["phase"] == "online"}
    assert online == set(re.findall(r"`(\w+)`", table))
    assert online - {row["name"] for row in rows if row["phase"] == "offline"} == {
        "collected",
        "collected_length",
    }


def test_online_batches_are_half_collected_after_the_warm_start(finished):
    collected = load(finished.folder / "last.pt")["replay"]["rows"][:, :11].tolist()
    shares = []
    for call in finished.calls:
        shares.append(sum(s in collected for s in call.batch.s.tolist()))
    assert shares == [0] * 50 + [8] * 50


def test_the_online_phase_starts_with_the_pretrained_policy_and_its_samples(finished):
    folder = finished.folder
    assert evaluations(folder, "online", 0) == evaluations(folder, "offline", 50) != []
    agent = iql.Agent(11, 3, ARGS)
    agent.load_state_dict(load(folder / "offline.pt")["agent"])
    rows = load(folder / "last.pt")["replay"]["rows"][:30]
    a, mode = rows[:, 11:14], agent.policy.mode(rows[:, :11])
    assert 0.2 < (a - mode)[a.abs() < 1].std() < 1.2  # the deviation is still near its start, 1


def test_every_network_has_the_datasets_normaliser(finished, dataset, tmp_path):
    s = tensor(iql.load_dataset(str(dataset), 11, 3)["observations"])
    agent = load(finished.folder / "offline.pt")["agent"]
    few = ("--no-normalize-observations", "--offline-steps", 1, "--online-steps", 0)
    raw = run_here(iql, *FLAGS, *few, "--dataset", dataset, "--runs-dir", tmp_path)
    raw_agent = load(raw / "offline.pt")["agent"]
    for network in ("policy", "critic", "critic_target", "value"):
        torch.testing.assert_close(agent[f"{network}.normalize.mean"], s.mean(0))
        torch.testing.assert_close(agent[f"{network}.normalize.std"], s.std(0) + 1e-3)
        assert (raw_agent[f"{network}.normalize.mean"] == 0).all()


def test_init_from_takes_networks_their_shape_and_the_flags_rates(finished, dataset, tmp_path):
    start = load(finished.folder / "offline.pt")
    begin = ["--init-from", finished.folder / "offline.pt", "--runs-dir", tmp_path]
    folder = run_here(iql, *begin, "--online-steps", 30, "--policy-lr", 1e-5)
    before, after = evaluations(finished.folder, "offline", 50), evaluations(folder, "online", 0)
    torch.testing.assert_close(after, before)  # a GPU does not always add in the same order
    end = load(folder / "last.pt")
    assert same(end["agent"], start["agent"])  # all of it was warm start
    assert same(end["policy"]["state"], start["policy"]["state"])
    assert end["policy"]["param_groups"][0]["lr"] == tensor(1e-5)


def test_from_scratch_is_one_sentence(monkeypatch, dataset):
    flags = ["iql.py", "--offline-steps", "0", "--dataset", str(dataset)]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit, match="does not start from scratch"):
        iql.main()


# ---- resume
class Killed(BaseException):
    """Nobody catches this."""


def outcome(folder) -> dict:
    """All that a run leaves and that does not tell the time."""
    times = ("args", "seconds", "metrics.csv", "evaluations.csv")
    state = {name: x for name, x in load(folder / "last.pt").items() if name not in times}
    rows = rows_of(folder / "metrics.csv")
    metrics = [tuple(row.values()) for row in rows if row["name"] != "seconds"]
    return dict(state, metrics=metrics, evaluations=rows_of(folder / "evaluations.csv"))


@pytest.mark.parametrize(
    "how, call, done",
    [
        ("SIGTERM", 37, dict(offline=37)),
        ("killed", 48, dict(offline=40)),
        ("killed", 50 + 35, dict(offline=50, online=60)),
    ],
)
def test_interrupted_and_resumed_is_as_if_it_never_stopped(
    finished, dataset, tmp_path, monkeypatch, how, call, done
):
    """Killed: when there are rows that the checkpoint does not know."""
    update, calls = iql.Agent.update, []

    def interrupted(self, batch):
        calls.append(0)
        if len(calls) == call and how == "killed":
            raise Killed
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)

    with monkeypatch.context() as patch, pytest.raises((Killed, SystemExit)):
        patch.setattr(iql.Agent, "update", interrupted)
        run_here(iql, *FLAGS, "--dataset", dataset, "--runs-dir", tmp_path)
    folder = only_run(tmp_path)
    assert load(folder / "last.pt")["done"] == done
    assert run_here(iql, "--resume", folder) == folder
    ours, theirs = outcome(folder), outcome(finished.folder)
    assert {"agent", "critic", "policy", "value", "replay", "env", "rng"} <= theirs.keys()
    assert len(theirs["metrics"]) > 100
    assert [name for name in theirs if not same(ours[name], theirs[name])] == []


# ---- presets, hand-over
def test_presets_name_flags_with_values_of_their_type():
    defaults = asdict(iql.Args())
    for name, preset in iql.PRESETS.items():
        for flag, value in preset.items():
            assert type(value) is type(defaults[flag]), (name, flag)
    assert set(iql.NETWORK_ARGS) <= defaults.keys()
    adroit = replace(iql.Args(), **iql.PRESETS["adroit"])
    assert (adroit.expectile, adroit.beta, adroit.dropout) == (0.7, 0.5, 0.1)
    assert (adroit.critic_hidden, adroit.policy_hidden) == ((256,) * 3, (512,) * 3)


def test_smac_goes_on_from_offline_pt(finished, tmp_path):
    """Its first evaluation is the last one here, but for the last bits: its head has twice as many
    rows. Sizes and dataset are the checkpoint's."""
    begin = ["--init-from", finished.folder / "offline.pt", "--runs-dir", tmp_path]
    few = shlex.split("""
        --online-steps 40 --warmup-steps 30 --online-batch-size 16 --eval-every 25 --keep-every 30
        --eval-episodes 2 --final-episodes 1 --score-hidden 16 --score-blocks 1
    """)
    folder = run_here(smac, *begin, *few, "--online-algorithm", "sac")
    last = evaluations(finished.folder, "offline", 50)
    for ours, theirs in zip(evaluations(folder, "online", 0), last, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    theirs = load(finished.folder / "offline.pt")["agent"]
    warm, end = load(folder / "online-30.pt")["agent"], load(folder / "last.pt")["agent"]
    for name in ("critic", "critic_target"):
        values = [value for key, value in theirs.items() if key.startswith(f"{name}.")]
        copies = [value for key, value in warm.items() if key.startswith(f"{name}.")]
        assert same(copies, values)
    for name in ("policy", "policy_target", "policy_average"):
        assert torch.equal(warm[f"{name}.head.weight"][:3], theirs["policy.head.weight"])
        assert torch.equal(warm[f"{name}.normalize.mean"], theirs["policy.normalize.mean"])
    assert torch.equal(warm["policy.head.bias"][3:], theirs["policy.log_std"])
    assert not torch.equal(end["policy.head.weight"], warm["policy.head.weight"])
