"""TD3+BC: its losses and its update against references, its two phases, and the way on to SMAC."""

import copy
import os
import re
import shlex
import signal
from dataclasses import asdict, replace

import pytest
import torch
from helpers import ROOT, load, only_run, rows_of, run_here, same
from torch import nn, tensor
from torch.nn import functional as F

import smac_offline_to_online as smac
import td3_bc

FLAGS = shlex.split("""
    --device cpu --offline-steps 50 --offline-batch-size 16 --critic-hidden 16 16
    --policy-hidden 24 24 --online-steps 60 --warmup-steps 20 --online-batch-size 16
    --eval-every 25 --eval-episodes 2 --final-episodes 2 --log-every 5 --checkpoint-every 20
""")
ARGS = replace(td3_bc.Args(), critic_hidden=(16, 16), policy_hidden=(24, 24))
OBS, ACT, BATCH = 5, 2, 16
ONE = torch.ones(())


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The folder of a run of both phases, never interrupted."""
    runs = tmp_path_factory.mktemp("td3_bc")
    return run_here(td3_bc, *FLAGS, "--dataset", dataset, "--runs-dir", runs)


def evaluations(folder, phase, step):
    """Return and length of each episode."""
    rows = rows_of(folder / "evaluations.csv")
    rows = [row for row in rows if row["phase"] == phase and int(row["step"]) == step]
    return [(float(row["return"]), int(row["length"])) for row in rows]


def make(**flags):
    agent = td3_bc.Agent(OBS, ACT, replace(ARGS, **flags))
    for network in agent.children():  # not the identity
        network.normalize.mean.copy_(torch.linspace(-1, 1, OBS))
        network.normalize.std.copy_(torch.linspace(0.5, 2, OBS))
    # a head as small as at the start leaves all actions, and all gradients, near 0
    agent.policy.head.weight.data.normal_(std=0.1)
    agent.policy_target.load_state_dict(agent.policy.state_dict())
    return agent


def batch():
    s, s_next, a = torch.randn(BATCH, OBS), torch.randn(BATCH, OBS), 2 * torch.rand(BATCH, ACT) - 1
    terminal = (torch.rand(BATCH) < 0.3).float()
    return td3_bc.Batch(s, a, torch.randn(BATCH), s_next, terminal, torch.zeros(BATCH))


# ---- losses, by hand
@pytest.mark.parametrize("bc_weight", [1.0, 0.25])
def test_losses_by_hand(bc_weight):
    """Constant networks: Q = -1 and 3, Q' = 5 and 4, pi(s) = 0; nothing moves Q."""
    agent = make(gamma=0.9, critic_lr=0.0)
    for p in agent.parameters():
        p.data.zero_()
    agent.critic.biases[-1].data += tensor([-1.0, 3.0]).view(2, 1, 1)
    agent.critic_target.biases[-1].data += tensor([5.0, 4.0]).view(2, 1, 1)
    s, a = torch.randn(2, OBS), tensor([[0.5, 0.0], [1.0, -1.0]])
    r, terminal = tensor([1.0, 2.0]), tensor([0.0, 1.0])
    one = td3_bc.Batch(s, a, r, torch.randn(2, OBS), terminal, torch.zeros(2))
    metrics = agent.update(one, tensor(bc_weight), True)
    y = (1 + 0.9 * 4, 2.0)  # the smaller value, and none after a terminal
    bc_loss = (0.25 + 1 + 1) / 4
    expected = dict(
        td_loss=((-1 - y[0]) ** 2 + (-1 - y[1]) ** 2 + (3 - y[0]) ** 2 + (3 - y[1]) ** 2) / 2,
        q=1.0,
        q_std=2.0,
        q_policy=-1.0,
        bc_loss=bc_loss,
        policy_loss=2.5 + bc_weight * bc_loss,  # lambda = 2.5 / |-1|
    )
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected)
    assert not any(x.requires_grad for x in metrics.values())


def test_q1_is_the_first_of_the_critics():
    agent, (s, a, *_) = make(num_critics=3), batch()
    torch.testing.assert_close(agent.critic.first(s, a), agent.critic(s, a)[0])
    agent = make(critic_activation="tanh")
    torch.testing.assert_close(agent.critic.first(s, a), agent.critic(s, a)[0])


# ---- update
class Reference:
    """TD3+BC in the layout of its authors' code: separate networks, torch's Adam, backward()."""

    def __init__(self, policy, critic, args):
        self.args, self.normalize = args, policy.normalize
        trunk = [layer for layer in policy.trunk if isinstance(layer, nn.Linear)]
        self.policy = nn.ModuleList(copy.deepcopy(layer) for layer in (*trunk, policy.head))
        self.critics = nn.ModuleList()
        for i in range(2):
            layers = nn.ModuleList()
            for W, b in zip(critic.weights, critic.biases):
                layer = nn.Linear(W.size(2), W.size(1))
                layer.weight.data.copy_(W[i])
                layer.bias.data.copy_(b[i, 0])
                layers.append(layer)
            self.critics.append(layers)
        self.policy_target = copy.deepcopy(self.policy)
        self.critics_target = copy.deepcopy(self.critics)
        self.policy_adam = torch.optim.Adam(self.policy.parameters(), args.policy_lr)
        self.critic_adam = torch.optim.Adam(self.critics.parameters(), args.critic_lr)

    def forward(self, layers, *x):
        x = torch.cat(x, 1)
        for layer in layers[:-1]:
            x = F.relu(layer(x))
        return layers[-1](x)

    def update(self, one, policy_turn):
        s, a, s_next = self.normalize(one.s), one.a, self.normalize(one.s_next)
        with torch.no_grad():
            noise = (torch.randn(BATCH, ACT) * 0.6).clamp(-0.5, 0.5)
            a_next = torch.tanh(self.forward(self.policy_target, s_next))
            a_next = (a_next + noise).clamp(-1, 1)
            q1, q2 = (self.forward(c, s_next, a_next) for c in self.critics_target)
            y = one.r[:, None] + (1 - one.terminal[:, None]) * 0.99 * torch.min(q1, q2)
        q1, q2 = (self.forward(c, s, a) for c in self.critics)
        self.critic_adam.zero_grad()
        (F.mse_loss(q1, y) + F.mse_loss(q2, y)).backward()
        self.critic_adam.step()
        if policy_turn:
            pi = torch.tanh(self.forward(self.policy, s))
            q = self.forward(self.critics[0], s, pi)
            loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
            self.policy_adam.zero_grad()
            loss.backward()
            self.policy_adam.step()
            pairs = (self.policy_target, self.policy), (self.critics_target, self.critics)
            for target, source in pairs:
                for p, q in zip(target.parameters(), source.parameters()):
                    p.data.copy_(self.args.tau * q.data + (1 - self.args.tau) * p.data)


def test_updates_follow_the_authors_code():
    """Six of them with large steps: order, delay, Q_1, noise, targets, all networks and Adams."""
    agent = make(critic_lr=3e-3, policy_lr=3e-3, tau=0.1, target_noise=0.6)
    reference = Reference(agent.policy, agent.critic, agent.args)
    for i in range(6):
        one = batch()
        torch.manual_seed(i)
        agent.update(one, ONE, i % 2 == 1)
        torch.manual_seed(i)
        reference.update(one, i % 2 == 1)
    ours = Reference(agent.policy, agent.critic, agent.args)
    targets = Reference(agent.policy_target, agent.critic_target, agent.args)
    for mine, other in (
        (ours.policy, reference.policy),
        (ours.critics, reference.critics),
        (targets.policy, reference.policy_target),
        (targets.critics, reference.critics_target),
    ):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "policy_turn, expected",
    [(False, {"critic"}), (True, {"policy", "critic", "policy_target", "critic_target"})],
)
def test_policy_and_targets_move_only_at_a_policy_turn(policy_turn, expected):
    agent = make()
    before = copy.deepcopy(agent.state_dict())
    agent.update(batch(), ONE, policy_turn)
    after = agent.state_dict()
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == expected


def test_without_imitation_the_policy_does_not_see_the_batchs_actions():
    ends = []
    for a in (-1, 1):
        for weight in (ONE, 0 * ONE):
            torch.manual_seed(1)
            agent, one = make(critic_lr=0.0), batch()
            agent.update(one._replace(a=torch.full((BATCH, ACT), a)), weight, True)
            ends.append(dict(agent.policy.state_dict()))
    assert same(ends[1], ends[3]) and not same(ends[0], ends[2])


def test_collected_actions_have_noise_within_bounds():
    agent, s = make(), torch.randn(4000, OBS)
    agent.policy.head.weight.data *= 0.1
    noise = agent.act(s) - agent.policy.mode(s)
    torch.testing.assert_close(noise.std(0), torch.full((ACT,), 0.1), rtol=0.1, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(ACT), rtol=0, atol=0.01)
    agent.policy.head.bias.data += 20
    a = agent.act(s)
    assert a.max() == 1 and 0.4 < a.min() < 0.95


@pytest.mark.parametrize("policy_turn", [False, True])
def test_the_update_compiles_to_one_graph(policy_turn):
    """The backend runs the graph as it is: no compiler, but the same number of graphs."""
    update = torch.compile(make().update, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # as `compiled` does
        assert update(batch(), ONE, policy_turn)["td_loss"].isfinite()


# ---- whole runs
def test_the_hand_over_changes_nothing(run):
    assert evaluations(run, "online", 0) == evaluations(run, "offline", 50) != []
    assert load(run / "last.pt")["done"] == dict(offline=50, online=60)


def test_metrics_are_those_of_the_page(run):
    table = (ROOT / "docs" / "td3_bc.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    names = {row["name"] for row in rows_of(run / "metrics.csv")}
    assert names == set(re.findall(r"`(\w+)`", table))


def test_every_network_has_the_datasets_normaliser(run, dataset):
    s = tensor(td3_bc.load_dataset(str(dataset), 11, 3)["observations"])
    for file in ("offline.pt", "last.pt"):
        agent = load(run / file)["agent"]
        for network in ("policy", "policy_target", "critic", "critic_target"):
            torch.testing.assert_close(agent[f"{network}.normalize.mean"], s.mean(0))
            torch.testing.assert_close(agent[f"{network}.normalize.std"], s.std(0) + 1e-3)


@pytest.mark.parametrize("mode", ["keep", "anneal", "drop"])
def test_imitation_online(run, tmp_path, monkeypatch, mode):
    """From the checkpoint come the networks, their sizes, the dataset and Adam's state; from the
    flags the rates. A quarter of each batch is the dataset's."""
    update, seen = td3_bc.Agent.update, []

    def watched(self, one, bc_weight, policy_turn):
        seen.append((one.s, float(bc_weight), policy_turn))
        return update(self, one, bc_weight, policy_turn)

    monkeypatch.setattr(td3_bc.Agent, "update", watched)
    begin = ["--init-from", run / "offline.pt", "--runs-dir", tmp_path, "--online-bc", mode]
    rest = ["--online-steps", 60, "--offline-fraction", 0.25, "--critic-lr", 1e-5]
    folder = run_here(td3_bc, *begin, *rest, "--no-cuda-graphs")
    left = [1 - i / 40 for i in range(40)]
    expected = dict(keep=[1.0] * 40, anneal=left, drop=[0.0] * 40)[mode]
    assert [weight for _, weight, _ in seen] == pytest.approx(expected)
    assert [policy_turn for *_, policy_turn in seen] == [False, True] * 20
    end, start = load(folder / "last.pt"), load(run / "offline.pt")
    collected = end["replay"]["rows"][:, :11].tolist()
    assert {sum(s in collected for s in one.tolist()) for one, *_ in seen} == {12}
    assert evaluations(folder, "online", 0) == evaluations(run, "offline", 50)
    assert end["critic"]["param_groups"][0]["lr"] == tensor(1e-5)
    assert end["critic"]["state"][0]["step"] == start["critic"]["state"][0]["step"] + 40


def test_the_warm_start_is_the_pretrained_policy_with_noise(run):
    agent = td3_bc.Agent(11, 3, ARGS)
    agent.load_state_dict(load(run / "offline.pt")["agent"])
    rows = load(run / "last.pt")["replay"]["rows"][:20]
    noise = rows[:, 11:14] - agent.policy.mode(rows[:, :11])
    assert noise.std().item() == pytest.approx(0.1, rel=0.3)


def test_from_scratch_is_td3_without_a_dataset(dataset, tmp_path):
    flags = ["--offline-steps", 0, "--runs-dir", tmp_path, "--dataset", dataset]
    state = load(run_here(td3_bc, *FLAGS, *flags) / "last.pt")
    args = state["args"]
    assert (args["online_bc"], args["offline_fraction"], args["tau"]) == ("drop", 0.0, 0.005)
    assert state["done"] == dict(online=60)
    actions = state["replay"]["rows"][:20, 11:14]  # the warm start is uniform
    assert actions.abs().max() > 0.8 and 0.4 < actions.std() < 0.75
    assert (state["agent"]["policy.normalize.mean"] == 0).all()


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
        ("killed", 50 + 24, dict(offline=50, online=40)),
    ],
)
def test_interrupted_and_resumed_is_as_if_it_never_stopped(
    run, dataset, tmp_path, monkeypatch, how, call, done
):
    """Killed: when there are rows that the checkpoint does not know."""
    update, calls = td3_bc.Agent.update, []

    def interrupted(*x, **flags):
        calls.append(0)
        if len(calls) == call and how == "killed":
            raise Killed
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*x, **flags)

    with monkeypatch.context() as patch, pytest.raises((Killed, SystemExit)):
        patch.setattr(td3_bc.Agent, "update", interrupted)
        run_here(td3_bc, *FLAGS, "--dataset", dataset, "--runs-dir", tmp_path)
    folder = only_run(tmp_path)
    assert load(folder / "last.pt")["done"] == done
    assert run_here(td3_bc, "--resume", folder) == folder
    ours, theirs = outcome(folder), outcome(run)
    assert {"agent", "critic", "policy", "replay", "env", "rng"} <= theirs.keys()
    assert len(theirs["metrics"]) > 80
    assert [name for name in theirs if not same(ours[name], theirs[name])] == []


# ---- presets, hand-over
def test_presets_name_flags_with_values_of_their_type():
    defaults = asdict(td3_bc.Args())
    for name, preset in td3_bc.PRESETS.items():
        for flag, value in preset.items():
            assert type(value) is type(defaults[flag]), (name, flag)
    assert set(td3_bc.NETWORK_ARGS) <= defaults.keys()


def test_smac_goes_on_from_offline_pt(run, tmp_path):
    """Its first evaluation is the last one here, but for the last bits: its head has twice as many
    rows. Sizes and dataset are the checkpoint's."""
    begin = ["--init-from", run / "offline.pt", "--runs-dir", tmp_path, "--device", "cpu"]
    few = shlex.split("""
        --online-steps 40 --warmup-steps 30 --online-batch-size 16 --eval-every 25 --keep-every 30
        --eval-episodes 2 --final-episodes 1 --score-hidden 16 --score-blocks 1
    """)
    folder = run_here(smac, *begin, *few, "--online-algorithm", "sac")
    last = evaluations(run, "offline", 50)
    for ours, theirs in zip(evaluations(folder, "online", 0), last, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    theirs = load(run / "offline.pt")["agent"]
    warm, end = load(folder / "online-30.pt")["agent"], load(folder / "last.pt")["agent"]
    for name in ("critic", "critic_target"):
        values = [value for key, value in theirs.items() if key.startswith(f"{name}.")]
        copies = [value for key, value in warm.items() if key.startswith(f"{name}.")]
        assert same(copies, values)
    for name in ("policy", "policy_target", "policy_average"):
        assert torch.equal(warm[f"{name}.head.weight"][:3], theirs["policy.head.weight"])
        assert torch.equal(warm[f"{name}.normalize.mean"], theirs["policy.normalize.mean"])
    assert warm["policy.head.bias"][3:].exp().tolist() == pytest.approx([0.1] * 3)
    assert not torch.equal(end["policy.head.weight"], warm["policy.head.weight"])
