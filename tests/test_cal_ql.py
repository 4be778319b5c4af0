"""cal_ql.py: returns-to-go, the update against hand-computed numbers, whole runs, resuming, and the
way on to SMAC. What is the same in all four scripts is tested with smac_offline_to_online.py."""

import math
import os
import re
import shlex
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, load, only_run, prepared_file, rows_of, run_here, same
from helpers import TINY as SMAC_TINY
from torch import distributions, tensor

import cal_ql
import smac_offline_to_online as smac

TINY = shlex.split("""
    --device cpu --calibrate --lagrange --cql-actions 3 --offline-steps 50 --offline-batch-size 16
    --num-critics 3 --critic-hidden 16 16 --policy-hidden 16 16 --online-steps 120
    --warmup-steps 30 --online-batch-size 16 --eval-every 25 --eval-episodes 2 --final-episodes 2
    --log-every 5 --checkpoint-every 20
""")
SMALL = dict(num_critics=3, critic_hidden=(16, 16), policy_hidden=(16, 16), cql_actions=3)


def task_of(family, goals=0, scale=1.0, bias=0.0):
    return cal_ql.Task("Hopper-v5", {}, 1000, family, goals, scale, bias, 0.0, 1.0, 0.0)


HOPPER = task_of("locomotion")
DOOR = task_of("adroit", 1, 10.0, -5.0)
KITCHEN = task_of("kitchen", 4, 1.0, -4.0)


def parse(*flags):
    with mock.patch.object(sys, "argv", ["cal_ql.py", *map(str, flags)]):
        return cal_ql.parse_args()[0]


def agent_of(**flags):
    torch.manual_seed(0)
    return cal_ql.Agent(4, 2, cal_ql.Args(**(SMALL | flags)))


def batch_of(n=16, G=1.0):
    """Of n transitions of which every fourth is terminal, with the return-to-go G."""
    s, s_next, r = torch.randn(n, 4), torch.randn(n, 4), torch.randn(n)
    terminal = (torch.arange(n) % 4 == 0).float()
    return cal_ql.Batch(s, 2 * torch.rand(n, 2) - 1, r, s_next, terminal, torch.full((n,), G))


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The run folder of both phases, never interrupted."""
    runs = tmp_path_factory.mktemp("cal_ql")
    return run_here(cal_ql, *TINY, "--dataset", dataset, "--runs-dir", runs)


def evaluations(folder, phase, step):
    rows = rows_of(folder / "evaluations.csv")
    found = [row for row in rows if (row["phase"], row["step"]) == (phase, str(step))]
    return [(int(row["length"]), float(row["return"])) for row in found]


# ---- returns-to-go
@pytest.mark.parametrize(
    "task, rewards, terminated, expected",
    [
        (HOPPER, [1, 2, 4], True, [3, 4, 4]),
        (HOPPER, [1, 2, 4], False, [3, 4, 4]),  # what follows adds nothing
        (HOPPER, [-5, -5], False, [-7.5, -5]),
        (KITCHEN, [0, 1, 1], False, [-7, -6, -6]),  # -4, -3, -3, and -3 for ever
        (KITCHEN, [0, 2, 4], True, [-5, -2, 0]),
        (DOOR, [0, 0, 0], False, [-10, -10, -10]),  # failure for ever, also in the last row
        (DOOR, [0, 0, 1], True, [-6.25, -2.5, 5]),
    ],
)
def test_returns_to_go(task, rewards, terminated, expected):
    G = cal_ql.returns_to_go(np.float32(rewards), terminated, task, gamma=0.5)
    np.testing.assert_allclose(G, expected)


def test_nothing_crosses_the_trajectories_of_a_dataset():
    """Of binary Adroit's demonstrations each success is terminal, and so a trajectory's end."""
    terminals = np.array([False, True, True, False, False, False])
    last = np.array([False, True, True, False, True, True])
    data = dict(rewards=np.float32([0, 1, 1, 0, 0, 0]), terminals=terminals, last=last)
    G = cal_ql.dataset_returns_to_go(data, DOOR, gamma=0.5)
    np.testing.assert_allclose(G, [-2.5, 5, 5, -10, -10, -10])


def discounted(rewards, gamma=0.99):
    """The same by its definition."""
    n = len(rewards)
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]


def test_the_returns_to_go_of_a_file_are_those_of_its_episodes(dataset):
    data = cal_ql.load_dataset(str(dataset), 11, 3)
    assert not data["terminals"][-1]  # the last episode is broken off
    ends = np.flatnonzero(data["terminals"]) + 1
    expected = np.concatenate([discounted(part) for part in np.split(data["rewards"], ends)])
    G = cal_ql.dataset_returns_to_go(data, HOPPER, 0.99)
    np.testing.assert_allclose(G, expected, rtol=1e-4)


def trajectories(folder):
    """First rows of a run's collected trajectories; the last one is still running."""
    rows = rows_of(folder / "metrics.csv")
    lengths = [float(row["value"]) for row in rows if row["name"] == "collected_length"]
    return np.cumsum([0, *lengths]).astype(int).tolist()


def test_collected_trajectories_get_theirs_when_they_end(finished):
    s, a, r, s_next, terminal, G = load(finished / "last.pt")["replay"]["rows"].split(
        (11, 3, 1, 11, 1, 1), 1
    )
    *whole, running = np.split(r.squeeze(1).double().numpy(), trajectories(finished)[1:])
    assert len(whole) >= 3 and len(running) > 0
    expected = np.concatenate([*map(discounted, whole), np.zeros(len(running))])
    np.testing.assert_allclose(G.squeeze(1), expected, rtol=1e-4)


# ---- networks and optimiser
def test_sampled_actions_have_the_log_density_of_a_tanh_gaussian():
    policy, s = agent_of().policy, torch.randn(5, 4)
    a, log_pi = policy.sample_many(s, 7)
    mu, log_std = policy(s)
    normal = distributions.Normal(mu[:, None], log_std.exp()[:, None])
    squashed = distributions.TransformedDistribution(normal, distributions.TanhTransform())
    assert a.shape == (5, 7, 2) and len(a.unique(dim=1)[0]) == 7
    torch.testing.assert_close(log_pi, squashed.log_prob(a).sum(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [3, 700])
def test_values_of_many_actions_are_those_of_each_alone(n):
    """700: more rows than go through the critics at once."""
    critic, s, a = agent_of().critic, torch.randn(5, 4), torch.rand(5, n, 2)
    q = critic.of_many(s, a)
    assert q.shape == (3, 5, n)
    for k in (0, n // 2, n - 1):
        torch.testing.assert_close(q[:, :, k], critic(s, a[:, k]))


def test_critics_are_that_many_networks_of_linear_layers():
    critic, s, a = agent_of().critic, torch.randn(5, 4), torch.rand(5, 2)
    critic.normalize.fit(torch.randn(100, 4) * 3 + 1)
    q = critic(s, a)
    for i in range(3):
        h = torch.cat([(s - critic.normalize.mean) / critic.normalize.std, a], 1)
        for W, b in zip(critic.weights[:-1], critic.biases[:-1]):
            h = (h @ W[i].T + b[i]).relu()
        last = h @ critic.weights[-1][i].T + critic.biases[-1][i]
        torch.testing.assert_close(q[i], last.squeeze(1))


def test_adam_is_torchs_also_where_a_gradient_is_transposed():
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    optimizers = cal_ql.adam([ours], 1e-2), torch.optim.Adam([theirs], 1e-2)
    for _ in range(3):
        gradient = torch.randn(5, 3)
        ours.grad, theirs.grad = gradient.mT, gradient.mT.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


# ---- the update. Agent's methods are called with stand-ins for policy and critics
def q_of(*members):
    """Critics from functions of (s, a), of a single state and action dimension."""

    def of_many(s, a):
        return torch.stack([f(s[:, None], a).squeeze(-1) for f in members])

    return SimpleNamespace(of_many=of_many)


@pytest.mark.parametrize("max_target_backup, best", [(True, -0.1), (False, -0.4)])
def test_td_target_is_the_best_of_the_actions_smallest_values(max_target_backup, best):
    """min(a, -a) = -|a|, then the maximum over actions; the other way round it would be 0.1."""
    actions = tensor([[[0.4], [0.3], [-0.1]]]).expand(2, -1, -1)
    args = cal_ql.Args(max_target_backup=max_target_backup, gamma=0.9, cql_actions=3)
    policy = SimpleNamespace(sample_many=lambda s, n: (actions[:, :n], None))
    critic = q_of(lambda s, a: a, lambda s, a: -a)
    agent = SimpleNamespace(args=args, policy=policy, critic_target=critic)
    states, ones = torch.zeros(2, 1), torch.ones(2)
    batch = cal_ql.Batch(states, states, ones, states, tensor([0.0, 1.0]), ones)
    y = cal_ql.Agent.td_target(agent, batch)
    torch.testing.assert_close(y, tensor([1 + 0.9 * best, 1.0]))


@pytest.mark.parametrize("importance_sampling", [True, False])
@pytest.mark.parametrize("calibrate", [True, False])
def test_the_gap_by_hand(monkeypatch, calibrate, importance_sampling):
    """State 1, next state 2; actions: data 0, uniform 0.5, the policy's 0.3 and, at the next state,
    -0.5. Every value is asked at the state; the bound 0.9 concerns policy actions only, and comes
    before the densities."""
    known = {1.0: (tensor([[[0.3]]]), tensor([[-0.2]])), 2.0: (tensor([[[-0.5]]]), tensor([[0.7]]))}
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 0.75))
    args = cal_ql.Args(cql_actions=1, calibrate=calibrate, importance_sampling=importance_sampling)
    policy = SimpleNamespace(sample_many=lambda s, n: known[s.item()])
    critic = q_of(lambda s, a: s + a, lambda s, a: s - 2 * a)
    one, G = torch.ones(1), tensor([0.9])
    batch = cal_ql.Batch(tensor([[1.0]]), tensor([[0.0]]), one, tensor([[2.0]]), one, G)
    agent = SimpleNamespace(args=args, policy=policy, critic=critic)
    gap, metrics = cal_ql.Agent.conservative_gap(agent, batch, tensor([[1.0], [1.0]]))

    bound = 0.9 if calibrate else -math.inf
    expected = []
    for q_data, q_uniform, q_now, q_next in ((1.0, 1.5, 1.3, 0.5), (1.0, 0.0, 0.4, 2.0)):
        q_now, q_next = max(q_now, bound), max(q_next, bound)
        terms = [q_data, q_uniform, q_now, q_next]
        if importance_sampling:
            terms = [q_uniform - math.log(0.5), q_now + 0.2, q_next - 0.7]
        expected.append(math.log(sum(map(math.exp, terms))) - q_data)
    assert gap.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert metrics["bound_rate"].item() == pytest.approx(2 / 4)  # 0.5 and 0.4 of the four
    assert metrics["q_policy"].item() == pytest.approx((1.3 + 0.5 + 0.4 + 2.0) / 4)  # unbounded
    assert metrics["q_uniform"].item() == pytest.approx(1.5 / 2)


@pytest.mark.parametrize("calibrate", [True, False])
def test_values_below_the_bound_are_not_pushed_down(calibrate):
    """With a bound above all values only the data's values have a gradient, upwards."""
    agent, batch = agent_of(calibrate=calibrate), batch_of(G=1e4)
    q, weights = agent.critic(batch.s, batch.a), list(agent.critic.parameters())
    gap, metrics = agent.conservative_gap(batch, q)
    ours = torch.autograd.grad(gap, weights, retain_graph=True)
    data_only = torch.autograd.grad(-q.mean(), weights)
    assert metrics["bound_rate"] == 1
    equal = [torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, data_only)]
    assert all(equal) == calibrate


def test_values_above_the_bound_are_pushed_down_as_in_cql():
    gradients = []
    for calibrate in (True, False):
        agent, batch = agent_of(calibrate=calibrate), batch_of(G=-1e4)
        gap, metrics = agent.conservative_gap(batch, agent.critic(batch.s, batch.a))
        gradients.append(torch.autograd.grad(gap, list(agent.critic.parameters())))
        assert metrics["bound_rate"] == 0
    assert same(*gradients)


def test_the_policy_gets_no_gradient_from_the_critics_loss():
    agent, batch = agent_of(), batch_of()
    q = agent.critic(batch.s, batch.a)
    gap, _ = agent.conservative_gap(batch, q)
    loss = gap + (q - agent.td_target(batch)).square().mean()
    others = [*agent.policy.parameters(), agent.log_temperature, agent.log_lagrange]
    assert not any(x is not None for x in torch.autograd.grad(loss, others, allow_unused=True))


def losses_of(monkeypatch):
    """A list that fills with (loss, optimiser), in place of steps."""
    losses = []
    monkeypatch.setattr(cal_ql, "descend", lambda loss, optimizer: losses.append((loss, optimizer)))
    return losses


@pytest.mark.parametrize("lagrange, multiplier", [(False, 1.0), (True, math.e)])
def test_the_critics_loss_and_the_multipliers(monkeypatch, lagrange, multiplier):
    agent, batch = agent_of(lagrange=lagrange, cql_alpha=3.0), batch_of()
    losses = losses_of(monkeypatch)
    monkeypatch.setattr(agent, "td_target", lambda batch: torch.zeros(16))
    metrics = agent.critic_update(batch)
    td_loss = agent.critic(batch.s, batch.a).square().mean().item()
    assert metrics["td_loss"].item() == pytest.approx(td_loss, rel=1e-5)
    gap = metrics["gap"].item()
    assert losses[0][0].item() == pytest.approx(td_loss + multiplier * 3 * gap, rel=1e-5)
    assert [optimizer for _, optimizer in losses][:1] == [agent.optimizers["critic"]]
    assert ("lagrange" in metrics) == (len(losses) == 2) == lagrange
    assert not any(x.requires_grad for x in metrics.values())
    if lagrange:  # it grows where the gap is larger than its target, 0.8
        loss, optimizer = losses[1]
        (slope,) = torch.autograd.grad(loss, agent.log_lagrange)
        assert optimizer is agent.optimizers["lagrange"]
        assert loss.item() == pytest.approx(-math.e * 3 * (gap - 0.8), rel=1e-5)
        assert slope.item() == pytest.approx(-math.e * 3 * (gap - 0.8), rel=1e-5)


def test_sacs_policy_and_temperature(monkeypatch):
    """The minimum over all critics; the temperature rises while the entropy is below its target."""
    losses, q = losses_of(monkeypatch), tensor([[1.0, 5.0], [3.0, 2.0]])
    log_temperature = tensor(math.log(0.2), requires_grad=True)
    agent = SimpleNamespace(
        policy=SimpleNamespace(sample=lambda s: (s, tensor([0.5, -1.0], requires_grad=True))),
        critic=lambda s, a: q,
        log_temperature=log_temperature,
        target_entropy=1.0,
        optimizers=dict(policy="policy", temperature="temperature"),
    )
    metrics = cal_ql.Agent.sac_policy_update(agent, torch.zeros(2, 1))
    (policy_loss, first), (temperature_loss, second) = losses
    assert (first, second) == ("policy", "temperature")
    assert policy_loss.item() == pytest.approx(((0.1 - 1) + (-0.2 - 2)) / 2)
    assert temperature_loss.item() == pytest.approx(-math.log(0.2) * 0.75)
    assert torch.autograd.grad(temperature_loss, log_temperature)[0].item() == -0.75
    assert metrics["entropy"].item() == pytest.approx(0.25)
    assert metrics["temperature"].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "frozen, still",
    [
        ("critic_lr", ("critic.", "critic_target", "log_lagrange")),
        ("policy_lr", ("policy.",)),
        ("temperature_lr", ("log_temperature",)),
    ],
)
def test_each_network_moves_by_its_own_optimizer_only(frozen, still):
    agent = agent_of(lagrange=True, **{frozen: 0.0})
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    for _ in range(2):
        agent.update(batch_of())
    moved = {name for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    fixed = {name for name in before if name.startswith(still) or "normalize" in name}
    assert moved == before.keys() - fixed


def test_an_update_is_one_graph_with_the_numbers_of_the_plain_one():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        agent = agent_of(lagrange=True, calibrate=True)
        update = agent.update
        if compiled:
            update = torch.compile(update, fullgraph=True, dynamic=False, backend="eager")
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # as `compiled` sets it
            metrics = [update(batch_of()) for _ in range(2)]
        results.append((metrics, agent.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# ---- whole runs
def test_metrics_are_logged_and_explained(finished):
    page = (ROOT / "docs" / "cal_ql.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page.split("## Metrics")[1].split("\n## ")[0]))
    names = {"offline": set(), "online": set()}
    for row in rows_of(finished / "metrics.csv"):
        names[row["phase"]].add(row["name"])
    for found in names.values():
        assert {"td_loss", "gap", "bound_rate", "lagrange", "return_to_go", "entropy"} <= found
        assert found <= explained


def test_the_hand_over_changes_nothing(finished):
    assert evaluations(finished, "online", 0) == evaluations(finished, "offline", 50) != []


def test_updates_wait_for_the_trajectorys_end_and_are_as_many_as_its_steps(
    dataset, finished, tmp_path, monkeypatch
):
    counts, batches = [], []
    add, update = cal_ql.Replay.add, cal_ql.Agent.update

    def counted_add(self, *transition):
        counts.append(0)
        add(self, *transition)

    def counted_update(self, batch):
        counts[-1] += 1
        batches.append(batch)
        return update(self, batch)

    monkeypatch.setattr(cal_ql.Replay, "add", counted_add)
    monkeypatch.setattr(cal_ql.Agent, "update", counted_update)
    flags = ["--init-from", finished / "offline.pt", "--offline-fraction", 0.25]
    folder = run_here(cal_ql, *TINY, "--dataset", dataset, "--runs-dir", tmp_path, *flags)
    expected = [0] * 120
    starts = trajectories(folder)
    for start, end in zip(starts, starts[1:]):
        expected[end - 1] = max(0, end - max(start, 30))  # none for the warm start's 30 steps
    assert sum(x > 0 for x in expected) >= 3
    assert counts[1:] == expected  # the first is the dataset
    # each batch has a quarter from the dataset; online rows come with their returns-to-go
    rows = load(folder / "last.pt")["replay"]["rows"]
    collected = {(*row[:11].tolist(), row[-1].item()) for row in rows}
    for batch in batches:
        pairs = zip(batch.s.tolist(), batch.return_to_go.tolist())
        assert [(*s, G) in collected for s, G in pairs] == [True] * 12 + [False] * 4


def test_no_online_steps_end_the_run_after_the_offline_phase(dataset, tmp_path, monkeypatch):
    """And R's actions at s' of a terminal's row are not those of another trajectory's state."""
    seen, dataset_replay = [], cal_ql.dataset_replay

    def watched(data, task, device):
        seen.append(data)
        return dataset_replay(data, task, device)

    monkeypatch.setattr(cal_ql, "dataset_replay", watched)
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-steps", 0, "--no-calibrate"]
    folder = run_here(cal_ql, *TINY, *flags)
    last = load(folder / "last.pt")
    assert last["done"] == dict(offline=50)
    assert same(load(folder / "offline.pt")["agent"], last["agent"])
    s, s_next, terminals = (seen[0][k] for k in ("observations", "next_observations", "terminals"))
    assert (s_next[terminals] == s[terminals]).all() and terminals.sum() == 14
    assert (s_next[~terminals] != s[~terminals]).any(1).all()


def test_init_from_takes_networks_and_optimizers_but_the_flags_learning_rates(
    dataset, finished, tmp_path
):
    few = ["--online-steps", 20, "--critic-lr", 1e-5]  # no update: all of it is warm start
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--init-from", finished / "offline.pt"]
    state = load(run_here(cal_ql, *TINY, *flags, *few) / "last.pt")
    start = load(finished / "offline.pt")
    assert same(state["agent"], start["agent"])
    assert same(state["policy"]["state"], start["policy"]["state"])
    assert state["critic"]["param_groups"][0]["lr"].item() == pytest.approx(1e-5)


def test_online_from_nothing_is_refused(dataset, tmp_path):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--offline-steps", 0]
    with pytest.raises(SystemExit, match="SAC from scratch is in smac_offline_to_online.py"):
        run_here(cal_ql, *TINY, *flags)


# ---- interrupted
def assert_same_outcome(folder, reference):
    """All that a run leaves and that does not tell the time."""
    ours, theirs = load(folder / "last.pt"), load(reference / "last.pt")
    assert ours.keys() == theirs.keys() >= {"agent", "critic", "lagrange", "replay", "env", "rng"}
    differing = {name for name in theirs if not same(ours[name], theirs[name])}
    assert differing <= {"args", "seconds", "metrics.csv"}
    assert rows_of(folder / "evaluations.csv") == rows_of(reference / "evaluations.csv")
    tables = [rows_of(run / "metrics.csv") for run in (folder, reference)]
    rows = [[row for row in table if row["name"] != "seconds"] for table in tables]
    assert rows[0] == rows[1]


class Killed(BaseException):
    """Nobody catches this."""


def interrupted(monkeypatch, dataset, runs, owner, name, call, number):
    """A run that gets the signal `number`, or dies, before the call-th call of owner.name."""
    function, calls = getattr(owner, name), []

    def hooked(*inputs):
        calls.append(inputs)
        if len(calls) == call:
            if number is None:
                raise Killed
            os.kill(os.getpid(), number)
        return function(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, hooked)
        with pytest.raises(Killed if number is None else SystemExit):
            run_here(cal_ql, *TINY, "--dataset", dataset, "--runs-dir", runs)
    return only_run(runs)


@pytest.mark.parametrize(
    "where, number",
    [
        ("offline", None),
        ("trajectory", signal.SIGTERM),
        ("updates", None),
        ("updates", signal.SIGTERM),
    ],
)
def test_resumed_it_ends_like_a_run_that_was_not_interrupted(
    dataset, finished, tmp_path, monkeypatch, where, number
):
    """In the offline phase, in the middle of a trajectory, and in the middle of one's updates,
    where a signal is obeyed after the last of them."""
    starts = [start for start in trajectories(finished) if start > 30]
    if where == "offline":
        call, stopped, killed = (cal_ql.Agent, "update", 33), dict(offline=33), dict(offline=20)
    elif where == "trajectory":
        step = starts[0] + 3
        call, stopped = (cal_ql.Replay, "add", step + 1), dict(offline=50, online=step)
        killed = dict(offline=50, online=(step - 1) // 20 * 20)
    else:  # four updates before the last one of the second trajectory after the warm start
        step = starts[1]
        call, stopped = (cal_ql.Agent, "update", 50 + step - 30 - 4), dict(offline=50, online=step)
        killed = dict(offline=50, online=(step - 1) // 20 * 20)
    folder = interrupted(monkeypatch, dataset, tmp_path, *call, number)
    saved = load(folder / "last.pt")
    assert saved["done"] == (stopped if number else killed)
    if where == "trajectory" and number:  # its returns-to-go are not known yet
        assert len(saved["env"]["actions"]) == 3
        assert (saved["replay"]["rows"][starts[0] :, -1] == 0).all()
    run_here(cal_ql, "--resume", folder)
    assert_same_outcome(folder, finished)


# ---- on to SMAC
def test_smac_goes_on_from_offline_pt(dataset, finished, tmp_path):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-steps", 40]
    start = ["--init-from", finished / "offline.pt", "--online-algorithm", "sac"]
    folder = run_here(smac, *SMAC_TINY, *flags, *start)
    before, after = evaluations(finished, "offline", 50), evaluations(folder, "online", 0)
    assert before
    # a GPU does not always add in the same order
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    before, after = load(finished / "offline.pt")["agent"], load(folder / "last.pt")["agent"]
    for name in ("critic.weights.1", "policy.trunk.2.weight"):  # ten updates away
        torch.testing.assert_close(after[name], before[name], rtol=0.1, atol=0.02)
        assert not torch.equal(after[name], before[name])


# ---- presets
def test_presets_choose_between_cql_and_cal_ql(tmp_path):
    args = {}
    for family in ("locomotion", "adroit", "kitchen", "other"):
        path = prepared_file(tmp_path / f"{family}.hdf5", {}, family=family)
        args[family] = parse("--dataset", path)
        assert args[family].calibrate == (family in ("adroit", "kitchen"))
        assert not parse("--dataset", path, "--no-calibrate").calibrate
    assert [each.cql_alpha for each in args.values()] == [5.0, 1.0, 5.0, 5.0]
    assert args["adroit"].offline_steps == 20_000 and args["adroit"].importance_sampling
    assert not args["kitchen"].importance_sampling
    path = prepared_file(tmp_path / "hopper-embedded.hdf5", {})
    assert parse("--dataset", path).critic_hidden == (128, 128)
    assert not parse("--dataset", path).calibrate
    assert parse("--dataset", path, "--preset", "small-adroit").calibrate


@pytest.mark.parametrize("flag, name", [("--calibrate", "cal_ql"), ("--no-calibrate", "cql")])
def test_the_folder_is_named_after_what_ran(dataset, tmp_path, flag, name):
    steps = ["--offline-steps", 1, "--online-steps", 0]
    folder = run_here(cal_ql, *TINY, *steps, "--dataset", dataset, "--runs-dir", tmp_path, flag)
    assert folder.name.split("__")[1] == name
    assert load(folder / "offline.pt")["algorithm"] == "cal_ql"  # what --init-from reads it as


def test_every_preset_names_real_flags_with_values_of_their_type():
    default = vars(cal_ql.Args())
    for name, preset in cal_ql.PRESETS.items():
        for flag, value in preset.items():
            assert type(value) is type(default[flag]), (name, flag)
