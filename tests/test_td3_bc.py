"""TD3+BC: its losses and its update against references, whole tiny runs, resuming, and the way on to SMAC."""

import contextlib
import copy
import dataclasses
import io
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
from torch import nn, tensor
from torch.nn import functional as F

import smac_offline_to_online as smac
import td3_bc

SCRIPT = ROOT / "td3_bc.py"
NETWORKS = shlex.split("--critic-hidden 16 16 --policy-hidden 24 24")
SHORT = shlex.split("""
    --device cpu --offline-steps 50 --offline-batch-size 16 --online-steps 60 --warmup-steps 20 --online-batch-size 16
    --eval-every 25 --eval-episodes 2 --final-episodes 2 --log-every 5 --checkpoint-every 20
""")
TINY = NETWORKS + SHORT
OBS, ACT, BATCH = 5, 2, 16
SIZES = (OBS, ACT, 1, OBS, 1, 1)


def main_of(module, *given):
    """The script's main() in this process."""
    argv = [module.__file__, *map(str, given)]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    try:
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out):
            module.main()
    finally:
        plt.close("all")
        for number, handler in before.items():
            signal.signal(number, handler)
    return td3_bc.Path(re.search("^run folder: (.*)$", out.getvalue(), re.MULTILINE)[1])


def run_here(*given):
    return main_of(td3_bc, *given)


def parse(*given):
    with mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, given)]):
        return td3_bc.parse_flags()


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The folder of a run of both phases, never interrupted."""
    return run_here(*TINY, "--dataset", dataset, "--runs-dir", tmp_path_factory.mktemp("td3_bc"))


def evaluations(folder, phase, step=None):
    rows = [row for row in rows_of(folder / "evaluations.csv") if row["phase"] == phase]
    return [(r["episode"], r["return"], r["length"], r["score"]) for r in rows if step in (None, int(r["step"]))]


def updates_of(monkeypatch):
    """A list that fills with (rows, weight of the imitation, delayed) of every update."""
    update, seen = td3_bc.Updates.update, []

    def watched(self, rows, bc_weight, delayed):
        seen.append((rows, float(bc_weight), delayed))
        return update(self, rows, bc_weight, delayed)

    monkeypatch.setattr(td3_bc.Updates, "update", watched)
    return seen


# ---- losses, by hand
def test_smoothing_clips_the_noise_and_then_the_action():
    a, xi = tensor([0.0, 0.0, 0.0, 0.9, -0.9]), tensor([1.0, 4.0, -4.0, 4.0, -1.0])
    expected = tensor([0.2, 0.5, -0.5, 1.0, -1.0])
    torch.testing.assert_close(td3_bc.smoothed(a, xi, 0.2, 0.5), expected)


def test_td_target_takes_the_smallest_value_and_stops_at_terminals_only():
    r, terminal, q_next = tensor([[1.0], [1.0]]), tensor([[0.0], [1.0]]), tensor([[3.0, 7.0], [2.0, 9.0], [4.0, 8.0]])
    torch.testing.assert_close(td3_bc.td_target(r, terminal, q_next, 0.9), tensor([1 + 0.9 * 2, 1.0]))


def test_td_loss_sums_over_critics_and_averages_over_the_batch():
    q = tensor([[1.0, 2.0], [3.0, 4.0]])
    assert td3_bc.td_loss(q, tensor([0.0, 2.0])).item() == pytest.approx((1 + 0) / 2 + (9 + 4) / 2)


def test_bc_loss_averages_over_batch_and_dimensions():
    loss = td3_bc.bc_loss(tensor([[1.0, 0.0], [0.0, 2.0]]), tensor([[0.0, 0.0], [0.0, -1.0]]))
    assert loss.item() == pytest.approx((1 + 9) / 4)


def test_policy_loss_scales_q_without_gradient():
    q, bc = tensor([2.0, -4.0, 6.0], requires_grad=True), tensor(3.0, requires_grad=True)
    loss = td3_bc.policy_loss(q, bc, 2.5, tensor(0.4))
    loss.backward()
    assert loss.item() == pytest.approx(-2.5 / 4 * (4 / 3) + 0.4 * 3)
    torch.testing.assert_close(q.grad, torch.full((3,), -2.5 / 4 / 3))  # a gradient through mean |Q| would differ
    assert bc.grad.item() == pytest.approx(0.4)


def test_policy_loss_does_not_know_the_scale_of_the_rewards():
    q, bc, one = tensor([2.0, -4.0, 6.0]), tensor(3.0), tensor(1.0)
    torch.testing.assert_close(td3_bc.policy_loss(100 * q, bc, 2.5, one), td3_bc.policy_loss(q, bc, 2.5, one))


# ---- networks and the update
def make(**flags):
    args = parse(*TINY)
    vars(args).update(flags)
    agent = td3_bc.Agent(OBS, ACT, args)
    for network in agent.children():  # not the identity
        network.mean.copy_(torch.linspace(-1, 1, OBS)), network.std.copy_(torch.linspace(0.5, 2, OBS))
    with torch.no_grad():  # a head as small as at the start leaves all actions, and all gradients, near 0
        agent.policy.head.weight.normal_(std=0.1)
    agent.policy_target.load_state_dict(agent.policy.state_dict())
    optimizers = td3_bc.make_optimizers(agent, args)
    td3_bc.set_learning_rates(optimizers, args)
    return agent, td3_bc.Updates(agent, optimizers, SIZES, args)


def batch():
    s, a, r = torch.randn(BATCH, OBS), 2 * torch.rand(BATCH, ACT) - 1, torch.randn(BATCH, 1)
    terminal = (torch.rand(BATCH, 1) < 0.3).float()
    return torch.cat([s, a, r, torch.randn(BATCH, OBS), terminal, torch.zeros(BATCH, 1)], 1)


ONE = torch.ones(())


class Reference:
    """TD3+BC in the layout of its authors' code: separate networks, torch's Adam, backward()."""

    def __init__(self, agent, args):
        self.args, self.mean, self.std = args, agent.policy.mean, agent.policy.std
        trunk = [layer for layer in agent.policy.trunk if isinstance(layer, nn.Linear)]
        self.policy = [copy.deepcopy(layer) for layer in (*trunk, agent.policy.head)]
        self.critics = [[self.layer(W[i], b[i, 0]) for W, b in zip(agent.critic.weights, agent.critic.biases)]
                        for i in range(2)]  # fmt: skip
        self.policy_target, self.critic_targets = copy.deepcopy(self.policy), copy.deepcopy(self.critics)
        self.policy_adam = torch.optim.Adam(self.parameters(self.policy), args.policy_lr)
        self.critic_adam = torch.optim.Adam([p for c in self.critics for p in self.parameters(c)], args.critic_lr)

    @staticmethod
    def layer(weight, bias):
        layer = nn.Linear(weight.size(1), weight.size(0))
        layer.weight.data.copy_(weight), layer.bias.data.copy_(bias)
        return layer

    @staticmethod
    def parameters(layers):
        return [p for layer in layers for p in layer.parameters()]

    @staticmethod
    def forward(layers, x):
        for layer in layers[:-1]:
            x = F.relu(layer(x))
        return layers[-1](x)

    def update(self, rows, delayed):
        s, a, r, s_next, terminal, _ = rows.split(SIZES, 1)
        s, s_next = (s - self.mean) / self.std, (s_next - self.mean) / self.std
        with torch.no_grad():
            noise = (torch.randn(BATCH, ACT) * 0.2).clamp(-0.5, 0.5)
            a_next = (torch.tanh(self.forward(self.policy_target, s_next)) + noise).clamp(-1, 1)
            q1, q2 = (self.forward(c, torch.cat([s_next, a_next], 1)) for c in self.critic_targets)
            y = r + (1 - terminal) * 0.99 * torch.min(q1, q2)
        q1, q2 = (self.forward(c, torch.cat([s, a], 1)) for c in self.critics)
        loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
        self.critic_adam.zero_grad(), loss.backward(), self.critic_adam.step()
        if delayed:
            pi = torch.tanh(self.forward(self.policy, s))
            q = self.forward(self.critics[0], torch.cat([s, pi], 1))
            loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
            self.policy_adam.zero_grad(), loss.backward(), self.policy_adam.step()
            for target, source in zip([self.policy_target, *self.critic_targets], [self.policy, *self.critics]):
                for p, q in zip(self.parameters(target), self.parameters(source)):
                    p.data.copy_(self.args.tau * q.data + (1 - self.args.tau) * p.data)

    def networks(self):
        return [self.policy, self.policy_target, *self.critics, *self.critic_targets]


def test_updates_follow_the_authors_code():
    """Six of them, with large steps: the order, the delay, Q_1, the noise, the targets, all networks and both Adams."""
    agent, updates = make(critic_lr=3e-3, policy_lr=3e-3, tau=0.1)
    reference = Reference(agent, updates.args)
    batches = [batch() for _ in range(6)]
    for i, rows in enumerate(batches):
        torch.manual_seed(i)
        updates.update(rows, ONE, i % 2 == 1)
        torch.manual_seed(i)
        reference.update(rows, i % 2 == 1)
    ours = Reference(agent, updates.args).networks()
    targets = SimpleNamespace(policy=agent.policy_target, critic=agent.critic_target)
    (policy_target, _, *critic_targets) = Reference(targets, updates.args).networks()[:4]
    for mine, other in zip([ours[0], policy_target, *ours[2:4], *critic_targets], reference.networks()):
        for p, q in zip(Reference.parameters(mine), Reference.parameters(other)):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def moved(agent, before):
    now = agent.state_dict()
    return {k.split(".")[0] for k in now if not torch.equal(now[k], before[k])}


def test_policy_and_targets_move_only_in_a_delayed_update():
    agent, updates = make()
    start = copy.deepcopy(agent.state_dict())
    updates.update(batch(), ONE, False)
    assert moved(agent, start) == {"critic"}
    start = copy.deepcopy(agent.state_dict())
    updates.update(batch(), ONE, True)
    assert moved(agent, start) == {"policy", "critic", "policy_target", "critic_target"}


def test_the_policys_step_leaves_the_critics_alone():
    rows, ends = batch(), []
    for delayed in (False, True):
        torch.manual_seed(1)
        agent, updates = make()
        updates.update(rows, ONE, delayed)
        ends.append(agent.critic.state_dict())
    assert same(dict(ends[0]), dict(ends[1]))


@pytest.mark.parametrize("member, matters", [(0, True), (1, False)])
def test_the_policy_follows_the_first_critic(member, matters):
    rows, ends = batch(), []
    for change in (0.0, 0.5):
        torch.manual_seed(1)
        agent, updates = make()
        with torch.no_grad():
            agent.critic.weights[0][member] += change * torch.randn_like(agent.critic.weights[0][member])
        torch.manual_seed(2)
        updates.update(rows, ONE, True)
        ends.append(agent.policy.state_dict())
    assert same(dict(ends[0]), dict(ends[1])) != matters


def test_without_imitation_the_policy_does_not_see_the_batchs_actions(monkeypatch):
    monkeypatch.setattr(td3_bc, "td_loss", lambda q, y: 0 * q.sum())  # nor does then the critic
    ends = []
    for a in (torch.zeros(BATCH, ACT), torch.ones(BATCH, ACT)):
        for weight in (ONE, 0 * ONE):
            torch.manual_seed(1)
            (agent, updates), rows = make(), batch()
            rows[:, OBS : OBS + ACT] = a
            updates.update(rows, weight, True)
            ends.append(agent.policy.state_dict())
    assert same(dict(ends[1]), dict(ends[3])) and not same(dict(ends[0]), dict(ends[2]))


def test_collected_actions_have_noise_within_bounds():
    agent, updates = make(exploration_noise=0.1)
    s = torch.randn(4000, OBS)
    with torch.no_grad():
        agent.policy.head.weight.mul_(0.1)
    noise = updates.act(s) - agent.policy.mode(s)
    torch.testing.assert_close(noise.std(0), torch.full((ACT,), 0.1), rtol=0.1, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(ACT), rtol=0, atol=0.01)
    with torch.no_grad():
        agent.policy.head.bias += 20
    a = updates.act(s)
    assert a.max() == 1 and 0.4 < a.min() < 0.95


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_every_parameter_has_one_optimizer(optimizer):
    agent, updates = make(optimizer=optimizer)
    names = {id(p): name for name, p in agent.named_parameters()}
    groups = [(g["muon"], [names[id(p)] for p in g["params"]])
              for o in updates.optimizers.values() for g in o.param_groups]  # fmt: skip
    listed = sorted(name for _, group in groups for name in group)
    assert listed == sorted(name for name, p in agent.named_parameters() if "target" not in name)
    on_muon = {name for muon, group in groups for name in group if muon}
    assert on_muon == ({"critic.weights.1", "policy.trunk.2.weight"} if optimizer == "muon" else set())


# ---- whole runs
def test_a_run_of_both_phases(run):
    state = load(run / "last.pt")
    assert state["position"] == dict(offline=50, online=60) and state["args"]["algorithm"] == "td3_bc"
    assert state.keys() >= {"agent", "critic", "policy", "replay", "env"}
    assert load(run / "offline.pt").keys() >= {"agent", "critic", "policy"}
    steps = [(row["phase"], int(row["step"])) for row in rows_of(run / "evaluations.csv")[::2]]
    assert steps == [*(("offline", i) for i in (0, 25, 50)), *(("online", i) for i in (0, 25, 50)), ("final", 110)]


def test_the_hand_over_changes_nothing(run):
    assert evaluations(run, "online", 0) == evaluations(run, "offline", 50) != []


def test_every_metric_is_explained_and_every_explained_metric_is_there(run):
    table = (ROOT / "docs" / "td3_bc.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    names = {row["name"] for row in rows_of(run / "metrics.csv")}
    assert names == set(re.findall(r"`([\w/]+)`", table)) - {"metrics.csv"}


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory):
    return hopper_file(tmp_path_factory.mktemp("other") / "hopper.hdf5", episodes=3, seed=100)


def test_normalisation_is_in_the_checkpoint_and_stays_as_it_was_offline(run, dataset, other_dataset, tmp_path):
    start = ["--init-from", run / "offline.pt", "--dataset", other_dataset, "--runs-dir", tmp_path]
    other = run_here(*SHORT, *start, "--online-steps", 25)
    with h5py.File(dataset) as f:
        keep = ~(f["timeouts"][()] | (np.arange(len(f["rewards"])) == len(f["rewards"]) - 1)) | f["terminals"][()]
        s = torch.as_tensor(f["observations"][()][keep])
    for folder in (run, other):
        for file in ("offline.pt", "last.pt") if folder == run else ("last.pt",):
            agent = load(folder / file)["agent"]
            for network in ("policy", "policy_target", "critic", "critic_target"):
                torch.testing.assert_close(agent[f"{network}.mean"], s.mean(0))
                torch.testing.assert_close(agent[f"{network}.std"], s.std(0, correction=0) + 1e-3)
    assert evaluations(other, "online", 0) == evaluations(run, "offline", 50)


def test_without_normalisation_states_are_as_they_are(dataset, tmp_path):
    few = ["--dataset", dataset, "--runs-dir", tmp_path, "--offline-steps", 2, "--online-steps", 0]
    agent = load(run_here(*TINY, *few, "--no-normalize-observations") / "offline.pt")["agent"]
    assert (agent["policy.mean"] == 0).all() and (agent["critic_target.std"] == 1).all()


@pytest.mark.parametrize("mode", ["keep", "anneal", "drop"])
def test_imitation_online(run, dataset, tmp_path, monkeypatch, mode):
    seen = updates_of(monkeypatch)
    start = ["--init-from", run / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    run_here(*SHORT, *start, "--online-bc", mode, "--warmup-steps", 30, "--online-steps", 50)
    weights = [weight for _, weight, _ in seen]
    expected = dict(keep=[1.0] * 20, drop=[0.0] * 20, anneal=[1 - i / 20 for i in range(20)])[mode]
    assert weights == pytest.approx(expected)


def test_updates_are_delayed_fully_imitating_offline_and_mixed_online(dataset, tmp_path, monkeypatch):
    seen = updates_of(monkeypatch)
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-bc", "drop", "--offline-fraction", 0.25]
    folder = run_here(*TINY, *flags)
    offline, online = seen[:50], seen[50:]
    assert {weight for _, weight, _ in offline} == {1.0} and len(online) == 60 - 20  # none in the warm start
    for phase in (offline, online):
        assert [delayed for _, _, delayed in phase] == [False, True] * (len(phase) // 2)
    collected = {tuple(row.tolist()) for row in load(folder / "last.pt")["replay"]["rows"]}
    mine = torch.tensor([[tuple(row.tolist()) in collected for row in rows] for rows, _, _ in online])
    assert (mine.sum(1) == 12).all() and mine.shape == (40, 16)


def test_the_warm_start_is_the_pretrained_policy_with_noise(run):
    policy = td3_bc.DeterministicPolicy(11, 3, (24, 24))
    agent = load(run / "offline.pt")["agent"]
    policy.load_state_dict({k.removeprefix("policy."): v for k, v in agent.items() if k.startswith("policy.")})
    rows = load(run / "last.pt")["replay"]["rows"][:20]
    noise = rows[:, 11:14] - policy.mode(rows[:, :11])
    assert noise.std().item() == pytest.approx(0.1, rel=0.3)


def test_from_scratch_is_td3_without_a_dataset(tmp_path, monkeypatch):
    seen = updates_of(monkeypatch)
    args = parse("--offline-steps", 0)
    assert args.online_bc == "drop" and args.warmup_steps == 25_000 and args.online_batch_size == 256
    flags = ["--offline-steps", 0, "--offline-fraction", 0.5, "--runs-dir", tmp_path, "--dataset", tmp_path / "none"]
    state = load(run_here(*TINY, *flags) / "last.pt")
    assert state["position"] == dict(online=60) and {weight for _, weight, _ in seen} == {0.0}
    actions = state["replay"]["rows"][:20, 11:14]  # the warm start is uniform
    assert actions.abs().max() > 0.8 and 0.4 < actions.std() < 0.75
    assert (state["agent"]["policy.mean"] == 0).all()


def test_no_online_steps_end_after_the_offline_phase(dataset, tmp_path):
    folder = run_here(*TINY, "--dataset", dataset, "--runs-dir", tmp_path, "--online-steps", 0, "--optimizer", "muon")
    assert load(folder / "last.pt")["position"] == dict(offline=50)
    assert len(evaluations(folder, "final")) == 2 and not evaluations(folder, "online")


def test_init_from_takes_networks_and_their_shape_and_the_learning_rates_of_the_flags(run, dataset, tmp_path):
    start = ["--init-from", run / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*SHORT, *start, "--critic-lr", 1e-5, "--warmup-steps", 59)
    state, before = load(folder / "last.pt"), load(run / "offline.pt")
    assert state["args"]["policy_hidden"] == (24, 24)
    assert {float(group["lr"]) for group in state["critic"]["param_groups"]} == {float(tensor(1e-5))}
    assert evaluations(folder, "online", 0) == evaluations(run, "offline", 50)
    assert state["critic"]["state"][0]["step"] == before["critic"]["state"][0]["step"] + 1  # Adam goes on, too


# ---- resuming
def outcome(folder) -> dict:
    """All that a run leaves and that does not tell the time."""
    state = load(folder / "last.pt")
    state = {k: v for k, v in state.items() if k not in ("args", "seconds", "sizes")}
    metrics = [tuple(row.values()) for row in rows_of(folder / "metrics.csv") if "seconds" not in row["name"]]
    return dict(state=state, metrics=metrics, evaluations=rows_of(folder / "evaluations.csv"))


class Killed(BaseException):
    """Nobody catches this."""


@pytest.mark.parametrize("how", ["killed", "sigterm"])
@pytest.mark.parametrize("call", [37, 50 + 24], ids=["offline", "online"])
def test_interrupted_and_resumed_equals_uninterrupted(run, dataset, tmp_path, monkeypatch, how, call):
    """Killed: some steps after a checkpoint, when rows have been written that it does not know."""
    update, calls = td3_bc.Updates.update, []

    def interrupted(*x):
        calls.append(0)
        if len(calls) == call and how == "killed":
            raise Killed
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*x)

    with monkeypatch.context() as patch, pytest.raises(Killed if how == "killed" else td3_bc.BadInput) as stop:
        patch.setattr(td3_bc.Updates, "update", interrupted)
        run_here(*TINY, "--dataset", dataset, "--runs-dir", tmp_path)
    folder = only_run(tmp_path)
    position = load(folder / "last.pt")["position"]
    if how == "killed":
        assert position == (dict(offline=20) if call == 37 else dict(offline=50, online=40))
    else:  # not one step lost
        assert position == (dict(offline=37) if call == 37 else dict(offline=50, online=20 + 24))
        assert stop.value.code == 143 and f"td3_bc.py --resume {folder}" in str(stop.value)
    run_here("--resume", folder)
    ours, theirs = outcome(folder), outcome(run)
    assert ours["metrics"] == theirs["metrics"] and ours["evaluations"] == theirs["evaluations"]
    assert len({row[1] for row in theirs["metrics"]}) == 2  # of both phases
    assert [k for k, v in theirs["state"].items() if not same(ours["state"][k], v)] == []


# ---- on to SMAC
@pytest.mark.parametrize("algorithm", ["sac", "td3", "td3+bc", "awr"])
def test_smac_goes_on_from_offline_pt(run, dataset, tmp_path, algorithm):
    """Its first evaluation is the last one here, episode by episode; then it learns, with this script's networks. Its
    head has twice as many rows, of which the matrix product rounds the last bits in another way."""
    start = ["--init-from", run / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    score = shlex.split("--score-hidden 16 --score-blocks 1 --score-condition-hidden 16")
    folder = main_of(smac, *SHORT, *score, *start, "--online-algorithm", algorithm)
    ours, theirs = (
        [[float(x) for x in row] for row in episodes]
        for episodes in (evaluations(folder, "online", 0), evaluations(run, "offline", 50))
    )
    assert len(theirs) == 2 and theirs == ours
    after, before = load(folder / "last.pt"), load(run / "offline.pt")["agent"]
    assert after["args"]["policy_hidden"] == (24, 24) and after["args"]["optimizer"] == "adam"
    for name in ("policy.trunk.0.weight", "critic.weights.0"):
        assert not torch.equal(after["agent"][name], before[name])
        torch.testing.assert_close(after["agent"][name], before[name], rtol=0, atol=0.1)
    assert torch.equal(after["agent"]["policy.mean"], before["policy.mean"])


# ---- wrong input
@pytest.mark.parametrize("flags", [["--policy-delay", 0], ["--num-critics", 0], ["--offline-fraction", 1.5]])
def test_impossible_numbers_are_refused(tmp_path, flags):
    with pytest.raises(td3_bc.BadInput) as problem:
        run_here(*TINY, "--runs-dir", tmp_path / "runs", *flags)
    assert flags[0] in str(problem.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", [["--online-bc", "some"], ["--online-algorithm", "sac"]])
def test_what_is_no_flag_or_no_choice_ends_with_code_2(capsys, flag):
    with pytest.raises(SystemExit) as end:
        parse(*flag)
    assert end.value.code == 2 and flag[0] in "".join(capsys.readouterr())


@pytest.mark.parametrize("change", ["wider", "gaussian", "vector"])
def test_a_checkpoint_that_does_not_fit_is_refused(run, dataset, tmp_path, change):
    state, flags = load(run / "offline.pt"), []
    agent = state["agent"]
    if change == "wider":
        flags = ["--policy-hidden", 32, 32]
    elif change == "gaussian":  # SMAC's and Cal-QL's policies
        agent["policy.head.weight"], agent["policy.head.bias"] = torch.zeros(6, 24), torch.zeros(6)
    else:  # IQL's
        agent["policy.log_std"] = torch.zeros(3)
    torch.save(state, tmp_path / "offline.pt")
    start = ["--init-from", tmp_path / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path / "runs"]
    sentence = "offline.pt was trained with" if change == "wider" else "offline.pt does not fit"
    with pytest.raises(td3_bc.BadInput, match=sentence):
        run_here(*SHORT, *start, *flags)
    assert not (tmp_path / "runs").exists()


def test_an_absurd_learning_rate_stops_the_run(dataset, tmp_path):
    with pytest.raises(td3_bc.BadInput, match="not finite") as stop:
        run_here(*TINY, "--critic-lr", 1e30, "--dataset", dataset, "--runs-dir", tmp_path)
    assert stop.value.code == 1


# ---- flags
def test_every_flag_is_in_the_help_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert [name for name in vars(parse()) if f"--{name.replace('_', '-')}" not in text] == []
    for group in (td3_bc.OfflineFlags, td3_bc.OnlineFlags):
        for f in dataclasses.fields(group):
            assert re.search(rf"^    {f.name}: .*  # \S+", SCRIPT.read_text(), re.MULTILINE), f.name


def test_rows_name_real_flags_with_values_of_their_type():
    flags = vars(parse("--task", "hopper-medium-v2"))
    for name, row in td3_bc.ROWS.items():
        assert row.keys() <= flags.keys(), name
        assert all(type(value) is type(flags[k]) for k, value in row.items()), name
    for task in td3_bc.TASKS:
        assert parse("--task", task).task == task
    assert parse("--task", "kitchen-mixed-v0").offline_steps == 400_000
    assert parse("--task", "pen-binary-v0", "--alpha", 1).alpha == 1 and flags["alpha"] == 2.5


# ---- compilation
@pytest.mark.skipif(not os.environ.get("SMAC_TEST_COMPILE"), reason="minutes of compilation: set SMAC_TEST_COMPILE=1")
def test_compiled_updates_compute_the_same(run, dataset, tmp_path):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--compile", "--online-bc", "anneal"]
    state = load(run_here(*TINY, *flags) / "offline.pt")
    for name, x in load(run / "offline.pt")["agent"].items():
        torch.testing.assert_close(state["agent"][name], x, rtol=1e-3, atol=1e-4)
    assert load(only_run(tmp_path) / "last.pt")["position"] == dict(offline=50, online=60)
