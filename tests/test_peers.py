"""td3_bc.py, iql.py and cal_ql.py against d3rlpy's implementations, with the same weights, batch and random numbers.

They are left out where d3rlpy is not installed (requirements-peers.txt). Where d3rlpy's method is another one, the test
says so and compares the parts that are the same.
"""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, rows_of
from torch.distributions import Normal

import cal_ql
import iql
import td3_bc

d3rlpy = pytest.importorskip("d3rlpy", reason="needs d3rlpy: see requirements-peers.txt")
TorchMiniBatch = d3rlpy.torch_utility.TorchMiniBatch

OBS, ACT, BATCH = 11, 3, 64
SIZES = (OBS, ACT, 1, OBS, 1, 1)
ENCODER = d3rlpy.models.encoders.VectorEncoderFactory(hidden_units=[32, 32])
COMMON = dict(actor_encoder_factory=ENCODER, critic_encoder_factory=ENCODER, batch_size=BATCH)


def flags(script, **changes):
    defaults = {k: v for group in script.GROUPS.values() for k, v in vars(group()).items()}
    small = dict(critic_hidden=(32, 32), policy_hidden=(32, 32))
    return SimpleNamespace(**defaults | small | changes)


def agents(script, config, **changes):
    """Our agent, with every parameter moved off its special start, and d3rlpy's algorithm without weights yet."""
    torch.manual_seed(0)
    args = flags(script, **changes)
    agent = script.Agent(OBS, ACT, args)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    algorithm = config.create(device="cpu")
    algorithm.create_impl((OBS,), ACT)
    return args, agent, algorithm.impl


def batches(n=1, seed=1, extra=0):
    """Our rows and d3rlpy's batch of the same transitions; the column after them is the return-to-go."""
    generator, out = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        rows = torch.randn(BATCH, sum(SIZES) + extra, generator=generator)
        s, a, r, s_next, terminal, cut, *G = rows.split(SIZES + (1,) * extra, 1)
        a.tanh_(), terminal.copy_(torch.rand(BATCH, 1, generator=generator) < 0.2), cut.zero_()
        one, G = torch.ones_like(r), G[0] if extra else torch.zeros_like(r)
        theirs = dict(observations=s, actions=a, rewards=r, next_observations=s_next, next_actions=a)
        out.append((rows, TorchMiniBatch(**theirs, returns_to_go=G, terminals=terminal, intervals=one, device="cpu")))
    return out


@torch.no_grad()
def give(layer, weight, bias):
    layer.weight.copy_(weight), layer.bias.copy_(bias.reshape(-1))


def linear(theirs):
    return [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]


def give_critics(ours, theirs):
    for i, critic in enumerate(theirs):
        for layer, W, b in zip(linear(critic), ours.weights, ours.biases, strict=True):
            give(layer, W[i], b[i])


def give_network(ours, theirs):
    """A policy's or a value's layers, in their order; a tanh-Gaussian head, which is two layers there, is left out."""
    for layer, mine in zip(linear(theirs), [ours.trunk[0], ours.trunk[2], ours.head]):
        if layer.weight.shape == mine.weight.shape:
            give(layer, mine.weight, mine.bias)


def check_critics(ours, theirs, **tolerance):
    for i, critic in enumerate(theirs):
        for layer, W, b in zip(linear(critic), ours.weights, ours.biases, strict=True):
            torch.testing.assert_close(W[i], layer.weight, **tolerance)
            torch.testing.assert_close(b[i, 0], layer.bias, **tolerance)


# ---- TD3+BC: the whole update is the same one
def td3_bc_pair(**changes):
    args, agent, impl = agents(td3_bc, d3rlpy.algos.TD3PlusBCConfig(**COMMON), **changes)
    for ours, theirs in ((agent.policy, impl.policy), (agent.policy_target, impl._modules.targ_policy)):
        give_network(ours, theirs)
    for ours, theirs in ((agent.critic, impl.q_function), (agent.critic_target, impl._modules.targ_q_funcs)):
        give_critics(ours, theirs)
    return args, agent, impl


def test_td3_bc_target_and_losses():
    args, agent, impl = td3_bc_pair()
    [(rows, batch)] = batches()
    s, a, r, s_next, terminal, _ = rows.split(SIZES, 1)
    torch.manual_seed(2)
    target = impl.compute_target(batch)
    torch.manual_seed(2)
    a_next = agent.policy_target.mode(s_next)
    a_next = td3_bc.smoothed(a_next, torch.randn_like(a_next), args.target_noise, args.target_noise_clip)
    q_next = agent.critic_target(s_next, a_next)
    torch.testing.assert_close(q_next.min(0).values, target[:, 0])
    y = td3_bc.td_target(r, terminal, q_next, args.gamma).detach()
    theirs = impl.compute_critic_loss(batch, target).critic_loss
    torch.testing.assert_close(td3_bc.td_loss(agent.critic(s, a), y), theirs)
    a_pi = agent.policy.mode(s)
    bc = td3_bc.bc_loss(a_pi, a)
    loss = td3_bc.policy_loss(agent.critic(s, a_pi)[0], bc, args.alpha, torch.ones(()))
    theirs = impl.compute_actor_loss(batch, impl.policy(batch.observations))
    torch.testing.assert_close(bc, theirs.bc_loss)
    torch.testing.assert_close(loss, theirs.actor_loss)


def test_td3_bc_goes_the_same_way_for_six_updates():
    """Critics, policy and all targets, with d3rlpy's own optimisers; the policy moves every second time."""
    args, agent, impl = td3_bc_pair()
    optimizers = td3_bc.make_optimizers(agent, args)
    td3_bc.set_learning_rates(optimizers, args)
    updates, start = td3_bc.Updates(agent, optimizers, SIZES, args), agent.policy.head.weight.detach().clone()
    for i, (rows, batch) in enumerate(batches(6)):
        torch.manual_seed(i)
        ours = updates.update(rows, torch.ones(()), i % 2 == 0)
        torch.manual_seed(i)
        theirs = impl.inner_update(batch, i)
        torch.testing.assert_close(float(ours["td_loss"]), theirs["critic_loss"], rtol=1e-4, atol=0)
        if i % 2 == 0:
            torch.testing.assert_close(float(ours["policy_loss"]), theirs["actor_loss"], rtol=1e-4, atol=1e-5)
    near = dict(rtol=1e-3, atol=1e-5)
    check_critics(agent.critic, impl.q_function, **near)
    check_critics(agent.critic_target, impl._modules.targ_q_funcs, **near)
    for ours, theirs in ((agent.policy, impl.policy), (agent.policy_target, impl._modules.targ_policy)):
        for mine, layer in zip([ours.trunk[0], ours.trunk[2], ours.head], linear(theirs)):
            torch.testing.assert_close(mine.weight, layer.weight, **near)
    assert (agent.policy.head.weight - start).abs().max() > 5e-4


# ---- IQL: d3rlpy takes all losses but the policy's before any step, we and the official code V's step first
def test_iql_losses():
    args = dict(expectile=0.7, beta=3.0)
    config = d3rlpy.algos.IQLConfig(value_encoder_factory=ENCODER, expectile=0.7, weight_temp=3.0, **COMMON)
    args, agent, impl = agents(iql, config, **args)
    give_network(agent.policy, impl.policy), give_network(agent.value, impl._modules.value_func)
    give_critics(agent.critic, impl.q_function), give_critics(agent.critic_target, impl._modules.targ_q_funcs)
    with torch.no_grad():  # theirs is a sigmoid between the same bounds, -5 and 2, in which ours is clipped
        impl.policy._logstd.copy_(torch.logit((agent.policy.log_std + 5) / 7))
    [(rows, batch)] = batches()
    s, a, r, s_next, terminal, _ = rows.split(SIZES, 1)
    v, q_min = agent.value(s), agent.critic_target(s, a).min(0).values
    torch.testing.assert_close(iql.value_loss(q_min, v, args.expectile), impl.compute_value_loss(batch))
    y = (r + args.gamma * (1 - terminal) * agent.value(s_next)[:, None])[:, 0].detach()
    theirs = impl.compute_critic_loss(batch, impl.compute_target(batch))
    torch.testing.assert_close(args.num_critics * iql.td_loss(agent.critic(s, a), y), theirs.q_loss)  # theirs: a sum
    weights = iql.advantage_weights(q_min, v, args.beta).detach()
    torch.testing.assert_close(weights, impl._compute_weight(batch)[:, 0])
    loss = iql.policy_loss(agent.policy.log_prob(s, a), weights)
    torch.testing.assert_close(loss, impl.compute_actor_loss(batch, impl.policy(batch.observations)).actor_loss)


def test_iql_gradients():
    """Of V, of the policy's mean and of the critics, the latter a sum over members in d3rlpy."""
    config = d3rlpy.algos.IQLConfig(value_encoder_factory=ENCODER, expectile=0.9, weight_temp=1.0, **COMMON)
    args, agent, impl = agents(iql, config)
    give_network(agent.policy, impl.policy), give_network(agent.value, impl._modules.value_func)
    give_critics(agent.critic, impl.q_function), give_critics(agent.critic_target, impl._modules.targ_q_funcs)
    with torch.no_grad():
        impl.policy._logstd.copy_(torch.logit((agent.policy.log_std + 5) / 7))
    optimizers = iql.make_optimizers(agent, args)
    iql.set_learning_rates(optimizers, args, 0.0)
    for group in optimizers["value"].param_groups:  # V stands still: then both take advantages and targets from one V
        group["lr"].zero_()
    updates = iql.Updates(agent, optimizers, SIZES, args.beta, args)
    [(rows, batch)] = batches()
    impl.compute_critic_grad(batch), impl.compute_actor_grad(batch)
    updates.step(rows)
    for ours, theirs in ((agent.policy, impl.policy), (agent.value, impl._modules.value_func)):
        for mine, layer in zip([ours.trunk[0], ours.trunk[2], ours.head], linear(theirs)):
            torch.testing.assert_close(mine.weight.grad, layer.weight.grad, rtol=1e-3, atol=1e-6)
    for i, critic in enumerate(impl.q_function):
        for W, layer in zip(agent.critic.weights, linear(critic)):
            torch.testing.assert_close(args.num_critics * W.grad[i], layer.weight.grad, rtol=1e-3, atol=1e-6)


# ---- Cal-QL: d3rlpy weighs each critic's gap and sums them; its temperature moves before the policy's loss is taken
N = 5  # actions of each kind


@pytest.fixture
def noise(monkeypatch):
    """A list of normal numbers that both draw from while it lasts: ours (B, n, a), d3rlpy's n first."""
    numbers, randn, randn_like = [], torch.randn, torch.randn_like

    def rsample(self, shape=()):
        xi = numbers.pop(0)
        return self.loc + self.scale * (xi.transpose(0, 1) if shape else xi)

    monkeypatch.setattr(Normal, "rsample", rsample)
    monkeypatch.setattr(torch, "randn", lambda *a, **b: numbers.pop(0) if numbers else randn(*a, **b))
    monkeypatch.setattr(torch, "randn_like", lambda *a, **b: numbers.pop(0) if numbers else randn_like(*a, **b))
    return numbers


def cal_ql_pair(calibrate, max_target_backup=True):
    kind = d3rlpy.algos.CalQLConfig if calibrate else d3rlpy.algos.CQLConfig
    rates = dict(alpha_learning_rate=0.0, temp_learning_rate=0.0)  # 0: not learned
    sampling = dict(n_action_samples=N, max_q_backup=max_target_backup, soft_q_backup=False)
    config = kind(conservative_weight=5.0, alpha_threshold=0.0, **rates, **sampling, **COMMON)
    changes = dict(calibrate=calibrate, cql_actions=N, max_target_backup=max_target_backup)
    args, agent, impl = agents(cal_ql, config, **changes)
    with torch.no_grad():
        agent.log_temperature.zero_()
    give_network(agent.policy, impl.policy)
    weight, bias = agent.policy.head.weight.chunk(2), agent.policy.head.bias.chunk(2)
    give(impl.policy._mu, weight[0], bias[0]), give(impl.policy._logstd, weight[1], bias[1])
    give_critics(agent.critic, impl.q_function), give_critics(agent.critic_target, impl._modules.targ_q_funcs)
    optimizers = cal_ql.make_optimizers(agent, args)
    cal_ql.set_learning_rates(optimizers, args)
    return args, agent, impl, cal_ql.Updates(agent, optimizers, (*SIZES, 1), args)


def test_cal_ql_target(noise):
    """The best of N next actions by the least of the critics."""
    args, agent, impl, updates = cal_ql_pair(True)
    [(rows, batch)] = batches(extra=1)
    _, _, r, s_next, terminal, _, _ = rows.split((*SIZES, 1), 1)
    xi = torch.empty(BATCH, N, ACT).normal_()
    noise[:] = [xi, xi]
    target = impl.compute_target(batch)
    y = r + args.gamma * (1 - terminal) * target
    torch.testing.assert_close(updates.td_target(r, s_next, terminal), y[:, 0])
    assert not noise


@pytest.mark.parametrize("calibrate", [True, False])
def test_cal_ql_critics_and_policy(calibrate, noise):
    """TD loss, conservative term, both critics' gradients, and the policy's loss and gradient."""
    args, agent, impl, updates = cal_ql_pair(calibrate)
    [(rows, batch)] = batches(extra=1)
    xi = [torch.empty(BATCH, N, ACT).normal_() for _ in range(3)] + [torch.empty(BATCH, ACT).normal_()]
    noise[:] = xi[:3]
    torch.manual_seed(3)  # of the uniform actions, the only other random numbers
    loss = impl.compute_critic_grad(batch)
    gradients = [[layer.weight.grad.clone() for layer in linear(q)] for q in impl.q_function]
    noise[:] = xi
    torch.manual_seed(3)
    metrics = updates.update(rows)
    assert not noise
    assert 0.1 < metrics["bound_rate"] < 0.9  # calibration has something to do
    n = args.num_critics
    torch.testing.assert_close(n * args.cql_alpha * metrics["gap"], loss.conservative_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(n * metrics["td_loss"], loss.critic_loss - loss.conservative_loss, rtol=1e-3, atol=1e-3)
    for i, theirs in enumerate(gradients):
        for W, gradient in zip(agent.critic.weights, theirs, strict=True):
            torch.testing.assert_close(n * W.grad[i], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))

    give_critics(agent.critic, impl.q_function)  # ours moved before the policy did
    noise[:] = xi[3:]
    torch.testing.assert_close(metrics["policy_loss"], impl.compute_actor_grad(batch).actor_loss, rtol=1e-4, atol=1e-5)
    for mine, layer in zip([agent.policy.trunk[0], agent.policy.trunk[2]], linear(impl.policy)):
        torch.testing.assert_close(mine.weight.grad, layer.weight.grad, rtol=1e-3, atol=1e-6)
    both = torch.cat([impl.policy._mu.weight.grad, impl.policy._logstd.weight.grad])
    torch.testing.assert_close(agent.policy.head.weight.grad, both, rtol=1e-3, atol=1e-6)


def test_calibration_matters(noise):
    """The test above can tell the two apart."""
    gaps = []
    for calibrate in (True, False):
        *_, updates = cal_ql_pair(calibrate)
        [(rows, _)] = batches(extra=1)
        torch.manual_seed(3)
        gaps.append(updates.update(rows)["gap"])
    assert gaps[0] > gaps[1] + 1e-3


def test_returns_to_go():
    """Of terminal episodes and of those that a time-out cut: nothing follows a cut, as on locomotion here."""
    rng, n = np.random.default_rng(0), 60
    r, terminal, cut = rng.standard_normal(n).astype(np.float32), np.zeros(n), np.zeros(n)
    terminal[[9, 45]], cut[[29, 59]] = 1, 1
    columns = [rng.standard_normal((n, k)).astype(np.float32) for k in (OBS, ACT)]
    data = d3rlpy.dataset.MDPDataset(*columns, r, terminal.astype(np.float32), timeouts=cut.astype(np.float32))
    G = cal_ql.returns_to_go(r, terminal, cut, cal_ql.TASKS["hopper-medium-v2"], 0.99)
    starts = [0, 10, 30, 46]
    assert [len(e) for e in data.episodes] == np.diff([*starts, n]).tolist()
    picker = d3rlpy.dataset.BasicTransitionPicker()
    for episode, start in zip(data.episodes, starts):
        batch = d3rlpy.dataset.TransitionMiniBatch.from_transitions(
            [picker(episode, i) for i in range(episode.transition_count)]
        )
        theirs = TorchMiniBatch.from_batch(batch, gamma=0.99, compute_returns_to_go=True, device="cpu").returns_to_go
        count = episode.transition_count
        np.testing.assert_allclose(G[start : start + count], theirs[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    assert math.isclose(G[9], r[9], rel_tol=1e-6) and not math.isclose(G[8], r[8], rel_tol=1e-3)


# ---- experiments/peers.py
@pytest.mark.parametrize("script", ["td3_bc", "iql", "cal_ql"])
def test_what_d3rlpy_learns_is_a_run_folder(script, tmp_path, monkeypatch):
    """With our row's values in d3rlpy's algorithm, and its deterministic policy in our evaluation."""
    sys.path.insert(0, str(ROOT / "experiments"))
    import peers

    row = peers.row_of(peers.SCRIPTS[script], "hopper-embedded")
    config = peers.algorithm(script, row, 4, np.zeros((2, 11), np.float32))
    assert (config.critic_learning_rate, config.actor_learning_rate) == (row.critic_lr, row.policy_lr)
    assert (config.batch_size, config.tau, config.gamma) == (row.offline_batch_size, row.tau, row.gamma)
    assert tuple(config.critic_encoder_factory.hidden_units) == row.critic_hidden == (128, 128)
    words = f"{script} --steps 4 --eval-every 2 --eval-episodes 2 --final-episodes 3 --out {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    peers.main()
    [run] = tmp_path.iterdir()
    rows = [(r["phase"], int(r["step"])) for r in rows_of(run / "evaluations.csv")]
    assert rows == [("offline", step) for step in (0, 0, 2, 2, 4, 4)] + 3 * [("final", 4)]
    assert len({r["score"] for r in rows_of(run / "evaluations.csv")[:6:2]}) == 3  # the policy moves
    with pytest.raises(SystemExit, match="exists"):
        peers.main()
