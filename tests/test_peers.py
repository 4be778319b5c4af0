"""td3_bc.py, iql.py and cal_ql.py against d3rlpy's implementations, with the same weights, batch
and random numbers.

They are left out where d3rlpy is not installed (requirements-peers.txt). Where d3rlpy's method is
another one, the test says so and compares the parts that are the same.
"""

import math
import sys

import numpy as np
import pytest
import torch
from helpers import HOPPER, ROOT, rows_of
from torch.distributions import Normal

import cal_ql
import iql
import td3_bc

d3rlpy = pytest.importorskip("d3rlpy", reason="needs d3rlpy: see requirements-peers.txt")
TorchMiniBatch = d3rlpy.torch_utility.TorchMiniBatch

OBS, ACT, BATCH = 11, 3, 64
ENCODER = d3rlpy.models.encoders.VectorEncoderFactory(hidden_units=[32, 32])
COMMON = dict(actor_encoder_factory=ENCODER, critic_encoder_factory=ENCODER, batch_size=BATCH)


def agents(script, config, **changes):
    """Our agent, with every parameter moved off its special start, and d3rlpy's algorithm without
    weights yet."""
    torch.manual_seed(0)
    sizes = dict(critic_hidden=(32, 32), policy_hidden=(32, 32))
    agent = script.Agent(OBS, ACT, script.Args(**sizes | changes))
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    algorithm = config.create(device="cpu")
    algorithm.create_impl((OBS,), ACT)
    return agent, algorithm.impl


def batches(n=1, seed=1):
    """Our batch and d3rlpy's of the same transitions."""
    generator, pairs = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        s, s_next = torch.randn(2, BATCH, OBS, generator=generator)
        a = torch.randn(BATCH, ACT, generator=generator).tanh()
        r, G, chance = torch.randn(3, BATCH, generator=generator)
        terminal = (chance > 1).float()
        theirs = TorchMiniBatch(
            observations=s,
            actions=a,
            rewards=r[:, None],
            next_observations=s_next,
            next_actions=a,
            returns_to_go=G[:, None],
            terminals=terminal[:, None],
            intervals=torch.ones(BATCH, 1),
            device="cpu",
        )
        pairs.append((td3_bc.Batch(s, a, r, s_next, terminal, G), theirs))
    return pairs


@torch.no_grad()
def give(layer, weight, bias):
    layer.weight.copy_(weight)
    layer.bias.copy_(bias.reshape(-1))


def linear(theirs):
    return [module for module in theirs.modules() if isinstance(module, torch.nn.Linear)]


def layers(ours):
    return [ours.trunk[0], ours.trunk[2], ours.head]


def give_critics(ours, theirs):
    for i, critic in enumerate(theirs):
        for layer, W, b in zip(linear(critic), ours.weights, ours.biases, strict=True):
            give(layer, W[i], b[i])


def give_network(ours, theirs):
    """A policy's or a value's layers, in their order; a tanh-Gaussian head, which is two layers
    there, is left out."""
    for layer, mine in zip(linear(theirs), layers(ours)):
        if layer.weight.shape == mine.weight.shape:
            give(layer, mine.weight, mine.bias)


def check_critics(ours, theirs, **tolerance):
    for i, critic in enumerate(theirs):
        for layer, W, b in zip(linear(critic), ours.weights, ours.biases, strict=True):
            torch.testing.assert_close(W[i], layer.weight, **tolerance)
            torch.testing.assert_close(b[i, 0], layer.bias, **tolerance)


def check_gradients(ours, theirs, last=None):
    for mine, layer in list(zip(layers(ours), linear(theirs)))[:last]:
        torch.testing.assert_close(mine.weight.grad, layer.weight.grad, rtol=1e-3, atol=1e-6)


def targets(impl):
    return impl._modules.targ_q_funcs


# ---- TD3+BC: the whole update is the same one
def test_td3_bc_goes_the_same_way_for_six_updates():
    """Losses, critics, policy and all targets, with d3rlpy's own optimisers; the policy moves every
    second time."""
    agent, impl = agents(td3_bc, d3rlpy.algos.TD3PlusBCConfig(**COMMON))
    policies = [(agent.policy, impl.policy), (agent.policy_target, impl._modules.targ_policy)]
    for ours, theirs in policies:
        give_network(ours, theirs)
    critics = [(agent.critic, impl.q_function), (agent.critic_target, targets(impl))]
    for ours, theirs in critics:
        give_critics(ours, theirs)
    start = agent.policy.head.weight.detach().clone()
    for i, (batch, theirs_batch) in enumerate(batches(6)):
        torch.manual_seed(i)
        ours = agent.update(batch, torch.ones(()), i % 2 == 0)
        torch.manual_seed(i)
        theirs = impl.inner_update(theirs_batch, i)
        near = dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(float(ours["td_loss"]), theirs["critic_loss"], **near)
        if i % 2 == 0:
            torch.testing.assert_close(float(ours["policy_loss"]), theirs["actor_loss"], **near)
            torch.testing.assert_close(float(ours["bc_loss"]), theirs["bc_loss"], **near)
    near = dict(rtol=1e-3, atol=1e-5)
    for ours, theirs in critics:
        check_critics(ours, theirs, **near)
    for ours, theirs in policies:
        for mine, layer in zip(layers(ours), linear(theirs)):
            torch.testing.assert_close(mine.weight, layer.weight, **near)
    assert (agent.policy.head.weight - start).abs().max() > 5e-4


# ---- IQL: d3rlpy takes all losses but the policy's before any step, we and the official code V's
# step first
@pytest.mark.parametrize("expectile, beta", [(0.7, 3.0), (0.9, 1.0)])
def test_iql_losses_and_gradients(expectile, beta):
    """Of V, of the policy's mean and of the critics, the latter a sum over members in d3rlpy."""
    flags = dict(expectile=expectile, weight_temp=beta)
    config = d3rlpy.algos.IQLConfig(value_encoder_factory=ENCODER, **flags, **COMMON)
    agent, impl = agents(iql, config, expectile=expectile, beta=beta)
    give_network(agent.policy, impl.policy)
    give_network(agent.value, impl._modules.value_func)
    give_critics(agent.critic, impl.q_function)
    give_critics(agent.critic_target, targets(impl))
    with torch.no_grad():  # theirs is a sigmoid between the same bounds, in which ours is clipped
        impl.policy._logstd.copy_(torch.logit((agent.policy.log_std + 5) / 7))
    # V stands still: then both take advantages and targets from one V
    iql.set_lr(agent.optimizers["value"], 0.0)
    [(batch, theirs_batch)] = batches()
    critic_loss = impl.compute_critic_grad(theirs_batch)
    policy_loss = impl.compute_actor_grad(theirs_batch)
    metrics, n = agent.update(batch), agent.args.num_critics
    torch.testing.assert_close(metrics["value_loss"], critic_loss.v_loss)
    torch.testing.assert_close(n * metrics["td_loss"], critic_loss.q_loss)
    torch.testing.assert_close(metrics["policy_loss"], policy_loss.actor_loss)
    check_gradients(agent.policy, impl.policy)
    check_gradients(agent.value, impl._modules.value_func)
    for i, critic in enumerate(impl.q_function):
        for W, layer in zip(agent.critic.weights, linear(critic)):
            near = dict(rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(n * W.grad[i], layer.weight.grad, **near)


# ---- Cal-QL: d3rlpy weighs each critic's gap and sums them; its temperature moves before the
# policy's loss is taken
N = 5  # actions of each kind


@pytest.fixture
def noise(monkeypatch):
    """A list of normal numbers that both draw from while it lasts: ours (B, n, a), d3rlpy's n
    first."""
    numbers, randn, randn_like = [], torch.randn, torch.randn_like

    def rsample(self, shape=()):
        xi = numbers.pop(0)
        return self.loc + self.scale * (xi.transpose(0, 1) if shape else xi)

    def next_or(original):
        return lambda *a, **b: numbers.pop(0) if numbers else original(*a, **b)

    monkeypatch.setattr(Normal, "rsample", rsample)
    monkeypatch.setattr(torch, "randn", next_or(randn))
    monkeypatch.setattr(torch, "randn_like", next_or(randn_like))
    return numbers


def cal_ql_pair(calibrate):
    kind = d3rlpy.algos.CalQLConfig if calibrate else d3rlpy.algos.CQLConfig
    config = kind(
        conservative_weight=5.0,
        alpha_threshold=0.0,
        alpha_learning_rate=0.0,  # 0: not learned
        temp_learning_rate=0.0,
        n_action_samples=N,
        max_q_backup=True,
        soft_q_backup=False,
        **COMMON,
    )
    agent, impl = agents(cal_ql, config, calibrate=calibrate, cql_actions=N)
    with torch.no_grad():
        agent.log_temperature.zero_()
    give_network(agent.policy, impl.policy)
    weight, bias = agent.policy.head.weight.chunk(2), agent.policy.head.bias.chunk(2)
    give(impl.policy._mu, weight[0], bias[0])
    give(impl.policy._logstd, weight[1], bias[1])
    give_critics(agent.critic, impl.q_function)
    give_critics(agent.critic_target, targets(impl))
    return agent, impl


def test_cal_ql_target(noise):
    """The best of N next actions by the least of the critics."""
    agent, impl = cal_ql_pair(True)
    [(batch, theirs_batch)] = batches()
    xi = torch.empty(BATCH, N, ACT).normal_()
    noise[:] = [xi, xi]
    next_value = impl.compute_target(theirs_batch)[:, 0]
    y = batch.r + agent.args.gamma * (1 - batch.terminal) * next_value
    torch.testing.assert_close(agent.td_target(batch), y)
    assert not noise


@pytest.mark.parametrize("calibrate", [True, False])
def test_cal_ql_critics_and_policy(calibrate, noise):
    """TD loss, conservative term, both critics' gradients, and the policy's loss and gradient."""
    agent, impl = cal_ql_pair(calibrate)
    [(batch, theirs_batch)] = batches()
    xi = [torch.empty(BATCH, N, ACT).normal_() for _ in range(3)]
    xi.append(torch.empty(BATCH, ACT).normal_())
    noise[:] = xi[:3]
    torch.manual_seed(3)  # of the uniform actions, the only other random numbers
    loss = impl.compute_critic_grad(theirs_batch)
    gradients = []
    for critic in impl.q_function:
        gradients.append([layer.weight.grad.clone() for layer in linear(critic)])
    noise[:] = xi
    torch.manual_seed(3)
    metrics = agent.update(batch)
    assert not noise
    assert 0.1 < metrics["bound_rate"] < 0.9  # calibration has something to do
    n, near = agent.args.num_critics, dict(rtol=1e-3, atol=1e-3)
    gap = n * agent.args.cql_alpha * metrics["gap"]
    torch.testing.assert_close(gap, loss.conservative_loss, rtol=1e-4, atol=1e-4)
    td_loss = loss.critic_loss - loss.conservative_loss
    torch.testing.assert_close(n * metrics["td_loss"], td_loss, **near)
    for i, theirs in enumerate(gradients):
        for W, gradient in zip(agent.critic.weights, theirs, strict=True):
            near = dict(rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
            torch.testing.assert_close(n * W.grad[i], gradient, **near)

    give_critics(agent.critic, impl.q_function)  # ours moved before the policy did
    noise[:] = xi[3:]
    policy_loss = impl.compute_actor_grad(theirs_batch).actor_loss
    torch.testing.assert_close(metrics["policy_loss"], policy_loss, rtol=1e-4, atol=1e-5)
    check_gradients(agent.policy, impl.policy, last=2)
    both = torch.cat([impl.policy._mu.weight.grad, impl.policy._logstd.weight.grad])
    torch.testing.assert_close(agent.policy.head.weight.grad, both, rtol=1e-3, atol=1e-6)


def test_calibration_matters(noise):
    """The test above can tell the two apart."""
    gaps = []
    for calibrate in (True, False):
        agent, _ = cal_ql_pair(calibrate)
        [(batch, _)] = batches()
        torch.manual_seed(3)
        gaps.append(agent.update(batch)["gap"])
    assert gaps[0] > gaps[1] + 1e-3


def test_returns_to_go():
    """Of terminal episodes and of those that a time-out cut: nothing follows a cut, as on
    locomotion here."""
    rng, n = np.random.default_rng(0), 60
    r, terminal, cut = rng.standard_normal(n).astype(np.float32), np.zeros(n), np.zeros(n)
    terminal[[9, 45]], cut[[29, 59]] = 1, 1
    columns = [rng.standard_normal((n, k)).astype(np.float32) for k in (OBS, ACT)]
    ends = terminal.astype(np.float32)
    data = d3rlpy.dataset.MDPDataset(*columns, r, ends, timeouts=cut.astype(np.float32))
    values = HOPPER | dict(env_kwargs={})
    task = cal_ql.Task(*(values[name] for name in cal_ql.Task._fields))
    rows = dict(rewards=r, terminals=terminal > 0, last=terminal + cut > 0)
    G = cal_ql.dataset_returns_to_go(rows, task, 0.99)
    starts = [0, 10, 30, 46]
    assert [len(episode) for episode in data.episodes] == np.diff([*starts, n]).tolist()
    picker = d3rlpy.dataset.BasicTransitionPicker()
    how = dict(gamma=0.99, compute_returns_to_go=True, device="cpu")
    for episode, start in zip(data.episodes, starts):
        count = episode.transition_count
        transitions = [picker(episode, i) for i in range(count)]
        batch = d3rlpy.dataset.TransitionMiniBatch.from_transitions(transitions)
        theirs = TorchMiniBatch.from_batch(batch, **how).returns_to_go[:, 0].numpy()
        np.testing.assert_allclose(G[start : start + count], theirs, rtol=1e-4, atol=1e-5)
    assert math.isclose(G[9], r[9], rel_tol=1e-6)
    assert not math.isclose(G[8], r[8], rel_tol=1e-3)


# ---- experiments/peers.py
@pytest.mark.parametrize("script", [td3_bc, iql, cal_ql])
def test_what_d3rlpy_learns_is_a_run_folder(script, dataset, tmp_path, monkeypatch):
    """With our preset's values in d3rlpy's algorithm, and its deterministic policy in our
    evaluation."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import peers

    name = script.ALGORITHM
    flags = script.Args(**script.PRESETS["small"])
    config = peers.algorithm(name, flags, 4, np.zeros((2, OBS), np.float32))
    assert config.critic_learning_rate == flags.critic_lr
    assert config.actor_learning_rate == flags.policy_lr
    assert config.batch_size == flags.offline_batch_size
    assert (config.tau, config.gamma) == (flags.tau, flags.gamma)
    assert tuple(config.critic_encoder_factory.hidden_units) == flags.critic_hidden == (128, 128)
    words = f"{name} --steps 4 --eval-every 2 --eval-episodes 2 --final-episodes 3".split()
    words += ["--dataset", str(dataset), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    peers.main()
    [run] = tmp_path.iterdir()
    rows = rows_of(run / "evaluations.csv")
    steps = [(row["phase"], int(row["step"])) for row in rows]
    expected = [("offline", step) for step in (0, 0, 2, 2, 4, 4)]
    assert steps == expected + 3 * [("final", 4)]
    assert len({row["normalized"] for row in rows[:6:2]}) == 3  # the policy moves
    with pytest.raises(SystemExit, match="exists"):
        peers.main()
