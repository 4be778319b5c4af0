"""cal_ql.py: returns-to-go, losses, updates, whole runs, resume, and SMAC's online algorithms from its offline.pt."""

import contextlib
import io
import math
import os
import re
import shlex
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import ROOT, hopper_file, load, only_run, rows_of, same
from helpers import TINY as SMAC_TINY
from helpers import run_here as run_smac
from torch import distributions, tensor

import cal_ql

SCRIPT = ROOT / "cal_ql.py"
TINY = shlex.split("""
    --device cpu --calibrate --lagrange --cql-actions 3 --offline-steps 50 --offline-batch-size 16 --num-critics 3
    --critic-hidden 16 16 --policy-hidden 16 16 --online-steps 120 --warmup-steps 30 --online-batch-size 16
    --eval-every 25 --eval-episodes 2 --final-episodes 2 --log-every 5 --checkpoint-every 20
""")
HOPPER = cal_ql.TASKS["hopper-embedded"]
DOOR, KITCHEN = cal_ql.TASKS["door-binary-v0"], cal_ql.TASKS["kitchen-partial-v0"]


def command_line(*given):
    return mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, given)])


def parse(*given):
    with command_line(*given):
        return cal_ql.parse_flags()


def run_here(*given):
    """main() in this process. Returns the run folder."""
    before, out = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, io.StringIO()
    try:
        with command_line(*given), contextlib.redirect_stdout(out):
            cal_ql.main()
    finally:
        plt.close("all")
        for number, handler in before.items():
            signal.signal(number, handler)
    return next(p for p in map(cal_ql.Path, re.findall("^run folder: (.*)$", out.getvalue(), re.MULTILINE)))


def flags(dataset, runs):
    return [*TINY, "--dataset", dataset, "--runs-dir", runs]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The run folder of both phases, never interrupted."""
    return run_here(*flags(dataset, tmp_path_factory.mktemp("finished")))


def evaluations(folder, phase, step=None):
    rows = [row for row in rows_of(folder / "evaluations.csv") if row["phase"] == phase]
    return [(r["episode"], r["return"], r["length"], r["score"]) for r in rows if step in (None, int(r["step"]))]


# ---- returns-to-go
def returns(task, r, terminal=(), cut=(), gamma=0.5):
    """Of training's rewards r, with the rows that are terminal or cut."""
    at = np.arange(len(r))
    return cal_ql.returns_to_go(np.float32(r), np.isin(at, terminal), np.isin(at, cut), task, gamma)


@pytest.mark.parametrize(
    "task, r, ends, expected",
    [
        (HOPPER, [1, 2, 4], dict(terminal=[2]), [3, 4, 4]),
        (HOPPER, [1, 2, 4], dict(cut=[2]), [3, 4, 4]),  # what follows a cut adds nothing
        (HOPPER, [1, 2, 4, 8, 16], dict(terminal=[1], cut=[4]), [2, 2, 12, 16, 16]),  # nothing crosses trajectories
        (HOPPER, [-5, -5], dict(cut=[1]), [-7.5, -5]),  # no rule of failure
        (KITCHEN, [-4, -3, -3], dict(cut=[2]), [-7, -6, -6]),  # goes on with -3 for ever
        (KITCHEN, [-4, -2, 0], dict(terminal=[2]), [-5, -2, 0]),
        (KITCHEN, [-4, -4, -1, -2, 0], dict(cut=[1], terminal=[4]), [-8, -8, -2, -2, 0]),
        (DOOR, [-5, -5, -5], dict(cut=[2]), [-10, -10, -10]),  # failure for ever, also in the last row
        (DOOR, [-5, -5, -5], dict(terminal=[2]), [-10, -10, -10]),
        (DOOR, [-5, -5, 5], dict(terminal=[2]), [-6.25, -2.5, 5]),
        (DOOR, [-5, 5, 5], dict(terminal=[1, 2]), [-2.5, 5, 5]),  # the data's demonstrations: all successes terminal
        (DOOR, [-5, -5, -5, 5], dict(cut=[1], terminal=[3]), [-10, -10, -2.5, 5]),
        (DOOR, [-5, 5, -5], dict(cut=[2]), [-3.75, 2.5, -5]),  # a success anywhere: the sum, cut where it is cut
    ],
)
def test_returns_to_go(task, r, ends, expected):
    np.testing.assert_allclose(returns(task, r, **ends), expected)


def test_failure_is_decided_on_raw_rewards_however_the_transform_rounds():
    task = cal_ql.replace(DOOR, scale=0.3, bias=0.1)  # a failure is -0.2 only up to float32's rounding
    r = np.float32(0.3) * np.float32([-1, -1]) + np.float32(0.1)
    assert r[0] != 0.3 * -1 + 0.1
    np.testing.assert_allclose(returns(task, r, cut=[1]), [-0.4, -0.4], rtol=1e-6)
    np.testing.assert_allclose(returns(task, [-0.2, 0.1], terminal=[1]), [-0.15, 0.1], rtol=1e-6)


def discounted(r, gamma=0.99):
    """The same by its definition."""
    return [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]


def test_the_datasets_returns_to_go_are_those_of_its_episodes(tmp_path):
    """Also of the last one, which the file cuts off without any flag: its last row has no next state and is dropped."""
    path = hopper_file(tmp_path / "hopper.hdf5", episodes=4)
    with h5py.File(path, "r+") as f:
        f["terminals"][-1] = False
        r, ends = f["rewards"][()], np.flatnonzero(f["terminals"][()])
    args = parse(*flags(path, tmp_path))
    inputs = cal_ql.set_up(args, extra=1)
    cal_ql.set_returns_to_go(inputs.dataset, 0, inputs.dataset.added, inputs.task, args.gamma)
    expected = np.concatenate([discounted(part) for part in np.split(r[:-1], ends + 1)])
    np.testing.assert_allclose(inputs.dataset.rows[:, -1], expected, rtol=1e-4)


def test_collected_trajectories_get_theirs_when_they_end(finished):
    rows = load(finished / "last.pt")["replay"]["rows"].double()
    _, _, r, _, terminal, cut, G = rows.split((11, 3, 1, 11, 1, 1, 1), 1)
    ends = (terminal + cut).squeeze(1).nonzero().squeeze(1) + 1
    *whole, running = np.split(r.squeeze(1).numpy(), ends)
    assert len(whole) >= 3 and len(running) > 0
    expected = np.concatenate([*map(discounted, whole), np.zeros(len(running))])
    np.testing.assert_allclose(G.squeeze(1), expected, rtol=1e-4)


# ---- losses
def test_td_loss_is_the_mean_square_over_members_and_batch():
    q = tensor([[1.0, 2.0], [3.0, 4.0]])
    assert cal_ql.td_loss(q, tensor([0.0, 2.0])).item() == pytest.approx((1 + 0 + 9 + 4) / 4)


def test_calibration_lifts_values_to_the_bound_and_takes_their_gradient():
    q = tensor([[[1.0, 3.0], [-2.0, 5.0]]], requires_grad=True)  # a member, two states, two actions
    bounded = cal_ql.calibrated(q, tensor([2.0, -1.0]))
    assert bounded.tolist() == [[[2.0, 3.0], [-1.0, 5.0]]]
    bounded.sum().backward()
    assert q.grad.tolist() == [[[0.0, 1.0], [0.0, 1.0]]]


def test_conservative_gap_weighs_every_action_by_its_density():
    q, q_uniform = tensor([[1.0], [2.0]]), tensor([[[0.5]], [[0.0]]])  # two members, a state
    q_pi, log_pi = tensor([[[1.5, -1.0]], [[3.0, 2.0]]]), tensor([[0.2, -0.7]])
    first = math.log(math.exp(0.5) / 0.25 + math.exp(1.5) / math.exp(0.2) + math.exp(-1.0) / math.exp(-0.7)) - 1
    second = math.log(math.exp(0.0) / 0.25 + math.exp(3.0) / math.exp(0.2) + math.exp(2.0) / math.exp(-0.7)) - 2
    gap = cal_ql.conservative_gap(q, q_uniform, q_pi, log_pi, math.log(0.25))
    assert gap.item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_without_importance_sampling_the_datas_action_is_in_the_sum_instead():
    q, q_uniform, q_pi = tensor([[1.0]]), tensor([[[0.5]]]), tensor([[[1.5, -1.0]]])
    gap = cal_ql.conservative_gap(q, q_uniform, q_pi, tensor([[9.0, 9.0]]), None)
    assert gap.item() == pytest.approx(math.log(sum(map(math.exp, (1.0, 0.5, 1.5, -1.0)))) - 1, rel=1e-5)


def test_the_multiplier_grows_where_the_gap_is_too_large():
    lagrange, gap = tensor(2.0, requires_grad=True), tensor(3.0, requires_grad=True)
    loss = cal_ql.lagrange_loss(lagrange, gap, 5.0, 0.8)
    loss.backward()
    assert loss.item() == pytest.approx(-2 * 5 * 2.2)
    assert lagrange.grad.item() == pytest.approx(-5 * 2.2) and gap.grad is None
    assert cal_ql.lagrange_loss(lagrange, tensor(0.5), 5.0, 0.8).item() > 0


def test_sac_policy_loss_takes_the_minimum_over_all_members():
    q = tensor([[1.0, 5.0], [3.0, 2.0]])
    loss = cal_ql.sac_policy_loss(q, tensor([0.5, -1.0]), tensor(0.2))
    assert loss.item() == pytest.approx(((0.1 - 1) + (-0.2 - 2)) / 2)


def test_temperature_rises_when_the_entropy_is_below_its_target():
    log_temperature, log_prob = tensor(0.5, requires_grad=True), tensor([1.0, 3.0], requires_grad=True)
    loss = cal_ql.temperature_loss(log_temperature, log_prob, -1.0)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * (2 - 1))
    assert log_temperature.grad.item() == pytest.approx(-1.0) and log_prob.grad is None


# ---- networks
SIZES = (4, 2, 1, 4, 1, 1, 1)


def updates(*given, **changes):
    args = parse(*TINY, *given)
    for name, value in changes.items():
        setattr(args, name, value)
    agent = cal_ql.Agent(4, 2, args)
    optimizers = cal_ql.make_optimizers(agent, args)
    cal_ql.set_learning_rates(optimizers, args)
    return cal_ql.Updates(agent, optimizers, SIZES, args)


def batch(n=16):
    s, a, r, s_next, G = (
        torch.randn(n, 4),
        torch.rand(n, 2) * 2 - 1,
        torch.randn(n, 1),
        torch.randn(n, 4),
        torch.ones(n, 1),
    )
    return torch.cat([s, a, r, s_next, torch.arange(n)[:, None] % 4 == 0, torch.zeros(n, 1), G], 1)


def test_sampled_actions_have_the_log_density_of_a_tanh_gaussian():
    policy, s = updates().agent.policy, torch.randn(5, 4)
    a, log_pi = cal_ql.sample_actions(policy, s, 7)
    mu, log_std = (x[:, None] for x in policy(s))
    normal = distributions.Normal(mu, log_std.exp())
    expected = distributions.TransformedDistribution(normal, distributions.TanhTransform(cache_size=1)).log_prob(a)
    assert a.shape == (5, 7, 2) and len(a.unique(dim=1)[0]) == 7
    torch.testing.assert_close(log_pi, expected.sum(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [3, 700])
def test_values_of_many_actions_are_those_of_each_alone(n):
    """700: more rows than go through the critics at once."""
    critic, s, a = updates().agent.critic, torch.randn(5, 4), torch.rand(5, n, 2)
    q = cal_ql.values(critic, s, a)
    assert q.shape == (3, 5, n)
    for k in (0, n // 2, n - 1):
        torch.testing.assert_close(q[:, :, k], critic(s, a[:, k]))


# ---- updates
def q_of(*members):
    """Critics from functions of (s, a), a single state and action dimension."""
    return lambda s, a: torch.stack([f(s, a).squeeze(1) for f in members])


@pytest.mark.parametrize("max_target_backup, best", [(True, -0.1), (False, -0.4)])
def test_td_target_is_the_best_of_the_actions_smallest_values(monkeypatch, max_target_backup, best):
    """min(a, -a) = -|a|, then the maximum over actions; the other way round it would be 0.1."""
    actions = tensor([[[0.4], [0.3], [-0.1]]]).expand(2, -1, -1)
    monkeypatch.setattr(cal_ql, "sample_actions", lambda policy, s, n: (actions[:, :n], None))
    u = updates(max_target_backup=max_target_backup, gamma=0.9)
    u.agent = SimpleNamespace(policy=None, critic_target=q_of(lambda s, a: a, lambda s, a: -a))
    y = u.td_target(tensor([[1.0], [1.0]]), torch.zeros(2, 1), tensor([[0.0], [1.0]]))
    torch.testing.assert_close(y, tensor([1 + 0.9 * best, 1.0]))


@pytest.mark.parametrize("importance_sampling", [True, False])
@pytest.mark.parametrize("calibrate", [True, False])
def test_the_gap_by_hand(monkeypatch, calibrate, importance_sampling):
    """State 1, next state 2; actions: data 0, uniform 0.5, the policy's 0.3 and, at the next state, -0.5. Every value
    is asked at the state; the bound 0.9 concerns policy actions only, and comes before the densities."""
    known = {1.0: (tensor([[[0.3]]]), tensor([[-0.2]])), 2.0: (tensor([[[-0.5]]]), tensor([[0.7]]))}
    monkeypatch.setattr(cal_ql, "sample_actions", lambda policy, s, n: known[s.item()])
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 0.75))
    u = updates(cql_actions=1, calibrate=calibrate, importance_sampling=importance_sampling)
    u.sizes = (1, 1, 1, 1, 1, 1, 1)
    critic = q_of(lambda s, a: s + a, lambda s, a: s - 2 * a)
    u.agent = SimpleNamespace(policy=None, critic=critic)
    s, data = tensor([[1.0]]), tensor([[0.0]])
    gap, metrics = u.gap(s, critic(s, data), tensor([[2.0]]), tensor([0.9]))
    bound = 0.9 if calibrate else -math.inf
    expected = []
    for q_data, q_uniform, q_now, q_next in ((1.0, 1.5, 1.3, 0.5), (1.0, 0.0, 0.4, 2.0)):
        q_now, q_next = max(q_now, bound), max(q_next, bound)
        terms = [q_uniform - math.log(0.5), q_now + 0.2, q_next - 0.7]
        terms = terms if importance_sampling else [q_data, q_uniform, q_now, q_next]
        expected.append(math.log(sum(map(math.exp, terms))) - q_data)
    assert gap.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert metrics["bound_rate"].item() == pytest.approx(2 / 4)  # 0.5 and 0.4 of 1.3, 0.5, 0.4, 2.0
    assert metrics["q_policy"].item() == pytest.approx((1.3 + 0.5 + 0.4 + 2.0) / 4)  # before the bound


def test_values_below_the_bound_are_not_pushed_down():
    """With a bound above all values only the data's values have a gradient, upwards; without one there is more."""
    for calibrate in (True, False):
        u = updates(calibrate=calibrate)
        s, a, _, s_next, *_ = batch().split(SIZES, 1)
        q = u.agent.critic(s, a)
        gap, metrics = u.gap(s, q, s_next, torch.full((16,), 1e4))
        weights = list(u.agent.critic.parameters())
        ours = torch.autograd.grad(gap, weights, retain_graph=True)
        data_only = torch.autograd.grad(-q.mean(), weights)
        assert metrics["bound_rate"] == 1
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, data_only)) == calibrate


def test_values_above_the_bound_are_pushed_down_as_in_cql():
    gradients = []
    for calibrate in (True, False):
        torch.manual_seed(0)
        u = updates(calibrate=calibrate)
        s, a, _, s_next, *_ = batch().split(SIZES, 1)
        gap, metrics = u.gap(s, u.agent.critic(s, a), s_next, torch.full((16,), -1e4))
        gradients.append(torch.autograd.grad(gap, list(u.agent.critic.parameters())))
        assert metrics["bound_rate"] == 0
    assert same(*gradients)


def test_the_policy_gets_no_gradient_from_the_critics_loss():
    u = updates()
    s, a, r, s_next, terminal, *_ = batch().split(SIZES, 1)
    q = u.agent.critic(s, a)
    loss = u.gap(s, q, s_next, torch.zeros(16))[0] + cal_ql.td_loss(q, u.td_target(r, s_next, terminal))
    agent = u.agent
    others = [*agent.policy.parameters(), agent.log_temperature, agent.log_lagrange]
    assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True))


@pytest.mark.parametrize(
    "frozen, still",
    [
        ("critic_lr", ("critic.", "critic_target", "log_lagrange")),
        ("policy_lr", ("policy.",)),
        ("temperature_lr", ("log_temperature",)),
    ],
)
def test_each_network_moves_by_its_own_optimizer_only(frozen, still):
    """Also Adam's moments: a step on somebody else's gradient would move the weights at the next one."""
    u = updates(**{frozen: 0.0})
    before = {k: v.clone() for k, v in u.agent.state_dict().items()}
    for _ in range(2):
        u.update(batch())
    moved = {k for k, v in u.agent.state_dict().items() if not torch.equal(v, before[k])}
    fixed = {k for k in before if k.startswith(still) or k.endswith(("mean", "std"))}
    assert moved == before.keys() - fixed


@pytest.mark.parametrize("lagrange", [True, False])
def test_the_order_of_an_update(monkeypatch, lagrange):
    u, order = updates(lagrange=lagrange), []
    names = {id(optimizer): name for name, optimizer in u.optimizers.items()}
    step, follow = cal_ql.descend, cal_ql.follow
    monkeypatch.setattr(
        cal_ql, "descend", lambda loss, optimizer: (order.append(names[id(optimizer)]), step(loss, optimizer))
    )
    monkeypatch.setattr(cal_ql, "follow", lambda *x: (order.append("target"), follow(*x)))
    metrics = u.update(batch())
    assert order == ["critic", *["lagrange"] * lagrange, "policy", "temperature", "target"]
    assert ("lagrange" in metrics) == lagrange and not any(x.requires_grad for x in metrics.values())


def test_the_critics_descend_the_td_loss_and_the_weighted_gap(monkeypatch):
    losses = []
    monkeypatch.setattr(cal_ql, "descend", lambda loss, optimizer: losses.append(loss.item()))
    for lagrange, factor in ((False, 1.0), (True, math.e)):  # the multiplier starts at e
        metrics = updates(lagrange=lagrange, cql_alpha=3.0).update(batch())
        assert losses[0] == pytest.approx((metrics["td_loss"] + factor * 3 * metrics["gap"]).item(), rel=1e-5)
        losses.clear()


# ---- whole runs
def metrics(folder, phase):
    return {row["name"] for row in rows_of(folder / "metrics.csv") if row["phase"] == phase}


def test_metrics_are_logged_and_explained(finished):
    table = (ROOT / "docs" / "cal_ql.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    for phase in ("offline", "online"):
        names = metrics(finished, phase)
        assert {"td_loss", "gap", "bound_rate", "lagrange", "return_to_go", "policy_loss", "entropy"} <= names
        assert names <= set(re.findall(r"`([\w/]+)`", table))


def test_the_hand_over_changes_nothing(finished):
    assert evaluations(finished, "online", 0) == evaluations(finished, "offline", 50) != []


def calls(monkeypatch, owner, name):
    """A list that fills with the arguments of every call."""
    function, seen = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *x: (seen.append(x), function(*x))[1])
    return seen


def test_updates_wait_for_the_trajectorys_end_and_are_as_many_as_its_steps(dataset, finished, tmp_path, monkeypatch):
    counts, added = [], cal_ql.Replay.add
    monkeypatch.setattr(cal_ql.Replay, "add", lambda *x: (counts.append(0), added(*x))[1])  # an entry a row collected
    update = cal_ql.Updates.update

    def counted(self, rows):
        counts[-1] += 1
        return update(self, rows)

    monkeypatch.setattr(cal_ql.Updates, "update", counted)
    folder = run_here(*flags(dataset, tmp_path), "--init-from", finished / "offline.pt", "--utd", 3)
    rows = load(folder / "last.pt")["replay"]["rows"]
    last, expected = 0, []
    for step, end in enumerate(rows[:, -3:-1].any(1).tolist(), 1):
        expected.append(3 * max(0, step - max(last, 30)) * end)  # none for the 30 steps of the warm start
        last = step if end else last
    assert sum(x > 0 for x in expected) >= 3 and last > 60
    assert counts[1:] == expected  # the first one is the dataset


def test_online_batches_mix_dataset_and_replay(dataset, finished, tmp_path, monkeypatch):
    seen = calls(monkeypatch, cal_ql.Updates, "update")
    folder = run_here(*flags(dataset, tmp_path), "--init-from", finished / "offline.pt", "--offline-fraction", 0.25)
    collected = {tuple(row.tolist()) for row in load(folder / "last.pt")["replay"]["rows"]}
    mine = tensor([[tuple(row.tolist()) in collected for row in rows] for _, rows in seen])
    assert len(mine) > 40 and mine.shape[1] == 16 and (mine.sum(1) == 12).all()  # each row with its return-to-go


def test_no_online_steps_end_the_run_after_the_offline_phase(dataset, tmp_path):
    folder = run_here(*flags(dataset, tmp_path), "--online-steps", 0, "--no-calibrate", "--optimizer", "muon")
    assert load(folder / "last.pt")["position"] == dict(offline=50)
    assert same(load(folder / "offline.pt")["agent"], load(folder / "last.pt")["agent"])
    assert len(evaluations(folder, "final")) == 2


def test_init_from_takes_networks_and_optimizers_but_the_flags_learning_rates(dataset, finished, tmp_path):
    few = ["--init-from", finished / "offline.pt", "--online-steps", 20, "--critic-lr", 1e-5]  # no update: warm start
    state, start = load(run_here(*flags(dataset, tmp_path), *few) / "last.pt"), load(finished / "offline.pt")
    assert same(state["agent"], start["agent"]) and same(state["policy"]["state"], start["policy"]["state"])
    assert [group["lr"].item() for group in state["critic"]["param_groups"]] == [pytest.approx(1e-5)]


# ---- interrupted
def outcome(folder):
    """All that a run leaves and that does not tell the time."""
    state = load(folder / "last.pt")
    state = {k: v for k, v in state.items() if k not in ("args", "seconds", "sizes")}
    rows = [tuple(row.values()) for row in rows_of(folder / "metrics.csv") if "seconds" not in row["name"]]
    return dict(state=state, metrics=rows, evaluations=rows_of(folder / "evaluations.csv"))


def assert_same_outcome(folder, reference):
    ours, theirs = outcome(folder), outcome(reference)
    assert ours["evaluations"] == theirs["evaluations"] and ours["metrics"] == theirs["metrics"]
    assert [k for k, v in theirs["state"].items() if not same(ours["state"].get(k), v)] == []
    assert ours["state"].keys() == theirs["state"].keys()


def test_the_comparison_holds_whole_runs(finished):
    found = outcome(finished)
    assert {"agent", "critic", "policy", "temperature", "lagrange", "replay", "env", "rng"} <= found["state"].keys()
    assert found["state"]["position"] == dict(offline=50, online=120)
    assert {row[1] for row in found["metrics"]} == {"offline", "online"}
    assert [r["step"] for r in found["evaluations"][::2]] == ["0", "25", "50", "0", "25", "50", "75", "100", "170"]


class Killed(BaseException):
    """Nobody catches this."""


def interrupted(monkeypatch, dataset, runs, owner, name, call, number=None):
    """A run that gets the signal `number`, or dies, before the call-th call of the function. Returns its folder."""
    with monkeypatch.context() as patch:
        seen, function = [], getattr(owner, name)

        def hooked(*x):
            seen.append(x)
            if len(seen) == call and number is None:
                raise Killed
            if len(seen) == call:
                os.kill(os.getpid(), number)
            return function(*x)

        patch.setattr(owner, name, hooked)
        with pytest.raises(Killed if number is None else cal_ql.BadInput):
            run_here(*flags(dataset, runs))
    return only_run(runs)


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_resumed_in_the_offline_phase(dataset, finished, tmp_path, monkeypatch, number):
    folder = interrupted(monkeypatch, dataset, tmp_path, cal_ql.Updates, "update", 33, number)
    assert load(folder / "last.pt")["position"] == dict(offline=20 if number is None else 33)
    run_here("--resume", folder)
    assert_same_outcome(folder, finished)


def trajectory_starts(finished):
    rows = load(finished / "last.pt")["replay"]["rows"]
    return [0, *(rows[:, -3:-1].any(1).nonzero().squeeze(1) + 1).tolist()]


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_resumed_in_the_middle_of_a_trajectory(dataset, finished, tmp_path, monkeypatch, number):
    start = next(step for step in trajectory_starts(finished) if step > 50)
    folder = interrupted(monkeypatch, dataset, tmp_path, cal_ql, "collect", start + 3, number)
    state = load(folder / "last.pt")
    if number is not None:
        assert state["position"]["online"] == start + 3 and len(state["env"]["actions"]) == 3
        assert (state["replay"]["rows"][start:, -1] == 0).all()  # its returns-to-go are not known yet
    else:
        assert state["position"]["online"] == start + 2 - (start + 2) % 20
    run_here("--resume", folder)
    assert_same_outcome(folder, finished)


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_resumed_in_the_middle_of_a_trajectorys_updates(dataset, finished, tmp_path, monkeypatch, number):
    """A signal is obeyed after the trajectory's last update; a kill falls back to the checkpoint before."""
    starts = [step for step in trajectory_starts(finished) if step > 30]
    call = 50 + (starts[1] - 30) - 4  # four updates before the last one of the second trajectory after the warm start
    folder = interrupted(monkeypatch, dataset, tmp_path, cal_ql.Updates, "update", call, number)
    state = load(folder / "last.pt")
    assert state["position"]["online"] == (starts[1] if number else (starts[1] - 1) // 20 * 20)
    assert number is None or state["env"]["actions"] == []
    run_here("--resume", folder)
    assert_same_outcome(folder, finished)


# ---- to SMAC's online algorithms
@pytest.mark.parametrize("algorithm", ["sac", "td3", "td3+bc", "awr"])
def test_smac_goes_on_from_offline_pt(dataset, finished, tmp_path, algorithm):
    start = ["--init-from", finished / "offline.pt", "--online-algorithm", algorithm, "--online-steps", 40]
    folder = run_smac(*SMAC_TINY, "--dataset", dataset, "--runs-dir", tmp_path, *start)
    assert evaluations(folder, "online", 0) == evaluations(finished, "offline", 50) != []
    before, after = load(finished / "offline.pt")["agent"], load(folder / "last.pt")["agent"]
    near = dict(rtol=0.1, atol=0.02)  # ten updates away
    for key in (k for k in before if "weights.1" in k or "trunk.2.weight" in k):
        torch.testing.assert_close(after[key], before[key], **near)
    assert not torch.equal(after["policy.head.weight"], before["policy.head.weight"])
    if algorithm.startswith("td3"):  # its target policy starts as the policy
        torch.testing.assert_close(after["policy_target.trunk.2.weight"], before["policy.trunk.2.weight"], **near)


# ---- flags
@pytest.mark.parametrize(
    "given, named",
    [
        (["--utd", 0], "--utd"),
        (["--num-critics", 0], "--num-critics"),
        (["--cql-actions", 0], "--cql-actions"),
        (["--gamma", 1], "--gamma"),
        (["--offline-steps", 0], "--offline-steps"),
        (["--offline-fraction", 1.5], "--offline-fraction"),
        (["--eval-every", 0], "--eval-every"),
    ],
)
def test_impossible_flags_are_refused(dataset, tmp_path, given, named):
    with pytest.raises(cal_ql.BadInput, match=named) as problem:
        run_here(*flags(dataset, tmp_path / "runs"), *given)
    assert problem.value.code == 2 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("given", [["--critic-hidden", 8, 8], ["--num-critics", 2], ["--optimizer", "muon"]])
def test_flags_that_contradict_the_checkpoint_are_refused(dataset, finished, tmp_path, given):
    with pytest.raises(cal_ql.BadInput, match="offline.pt"):
        run_here(*flags(dataset, tmp_path), "--init-from", finished / "offline.pt", *given)


def test_a_checkpoint_of_another_script_is_refused(dataset, finished, tmp_path):
    state = load(finished / "offline.pt")
    torch.save({k: v for k, v in state.items() if k != "lagrange"}, tmp_path / "offline.pt")
    with pytest.raises(cal_ql.BadInput, match="offline.pt"):
        run_here(*flags(dataset, tmp_path / "runs"), "--init-from", tmp_path / "offline.pt")


def test_rows_choose_between_cql_and_cal_ql():
    walker, door, kitchen = (
        parse("--task", k) for k in ("walker2d-medium-replay-v2", "door-binary-v0", "kitchen-partial-v0")
    )
    assert not walker.calibrate and not parse().calibrate and door.calibrate and kitchen.calibrate
    assert (walker.cql_alpha, door.cql_alpha, kitchen.cql_alpha) == (5.0, 1.0, 5.0)
    assert door.offline_steps == 20_000 and door.importance_sampling and not kitchen.importance_sampling
    assert not parse("--task", "door-binary-v0", "--no-calibrate").calibrate
    assert {args.optimizer for args in (walker, door, kitchen, parse())} == {"adam"}


def test_every_row_names_real_flags_with_values_of_their_type():
    default = vars(parse("--task", "hopper-medium-v2"))
    for name, row in cal_ql.ROWS.items():
        assert row.keys() <= default.keys(), name
        assert all(type(value) is type(default[k]) for k, value in row.items()), name


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert [name for name in vars(parse()) if f"--{name.replace('_', '-')}" not in text] == []


# ---- compilation
@pytest.mark.skipif(not os.environ.get("SMAC_TEST_COMPILE"), reason="minutes of compilation: set SMAC_TEST_COMPILE=1")
def test_a_compiled_update_computes_the_same():
    states = []
    for compile in (False, True):
        torch.manual_seed(0)
        u = updates(compile=compile)
        for _ in range(5):
            u.update(batch())
        states.append(u.agent.state_dict())
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x, rtol=1e-3, atol=1e-4)
