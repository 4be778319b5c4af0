"""Each loss on numbers small enough to compute by hand, and its gradient against autograd's."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import tensor

import smac_offline_to_online as smac

OBS, ACT = 5, 2
SMALL = dict(device="cpu", score_hidden=16, score_blocks=1, score_condition_hidden=(16,))
SMALL |= dict(num_critics=3, critic_hidden=(16, 16), policy_hidden=(16, 16), gamma=0.9)
SMALL |= dict(online_kappa=0.0)


def agent_of(**flags):
    return smac.Agent(OBS, ACT, smac.Args(**SMALL | flags))


def batch_of(n, r=0.0, terminal=0.0):
    rows = torch.randn(n, OBS), 2 * torch.rand(n, ACT) - 1, torch.ones(n) * tensor(r)
    return smac.Batch(*rows, torch.randn(n, OBS), torch.ones(n) * tensor(terminal), torch.zeros(n))


def answers(module, q):
    """Lets critics answer `q`: (N,), (N, B) or a function of the actions. Gradients pass."""

    def forward(s, a, members=slice(None)):
        values = q(a) if callable(q) else tensor(q)
        if values.dim() == 1:
            values = values[:, None].expand(-1, len(s))
        return values[members] + 0 * a.sum() + sum(0 * p.sum() for p in module.parameters())

    module.forward = forward


def policy_says(policy, a=0.0, log_pi=0.0):
    """Lets it sample and name as its mode the actions `a`, with log-densities `log_pi`."""

    def zero():
        return sum(0 * p.sum() for p in policy.parameters())

    def actions(s):
        return tensor(a) * torch.ones(len(s), ACT) + zero()

    policy.mode = actions
    policy.sample = lambda s: (actions(s), tensor(log_pi) * torch.ones(len(s)) + zero())
    policy.log_prob = lambda s, _: tensor(log_pi) * torch.ones(len(s)) + zero()


def gradients(module):
    """That the last `descend` followed."""
    return [p.grad for p in module.parameters()]


# ---- TD targets
def test_td_target_bootstraps_unless_terminal():
    agent, batch = agent_of(), batch_of(2, r=[1.0, 1.0], terminal=[0.0, 1.0])
    answers(agent.critic_target, [2.0, 2.0, 2.0])
    torch.testing.assert_close(agent.td_target(batch, batch.a), tensor([1 + 0.9 * 2, 1.0]))
    torch.testing.assert_close(agent.td_target(batch, batch.a, -1.0), tensor([1 + 0.9 * 1, 1.0]))


def test_td_target_takes_the_minimum_over_two_members_drawn_anew():
    agent, batch = agent_of(gamma=1.0), batch_of(1)
    answers(agent.critic_target, [1.0, 2.0, 3.0])
    drawn = [agent.td_target(batch, batch.a).item() for _ in range(300)]
    assert set(drawn) == {1.0, 2.0}
    assert 0.55 < drawn.count(1.0) / 300 < 0.78  # two of the three pairs hold member 1


def online_target(agent, batch):
    """The target and the weight of score matching that an online update trains its critics with."""
    agent.critic_update = lambda batch, target, kappa: dict(target=target, kappa=kappa)
    metrics = agent.online_update(batch, True)
    return metrics["target"], metrics["kappa"]


@pytest.mark.parametrize("algorithm, bonus", [("sac", 1.5), ("awr", 0.0), ("td3", 0.0)])
def test_backup_entropy_is_sacs_alone(algorithm, bonus):
    for backup in (False, True):
        agent = agent_of(online_algorithm=algorithm, backup_entropy=backup)
        answers(agent.critic_target, [2.0, 2.0, 2.0])
        policy_says(agent.policy, log_pi=-3.0)
        agent.log_temperature.data.fill_(math.log(0.5))
        y = online_target(agent, batch_of(2, r=1.0))[0]
        torch.testing.assert_close(y, torch.full((2,), 1 + 0.9 * (2 + backup * bonus)))


def test_td3s_target_action_has_clipped_noise_within_bounds():
    for mode, low, high in ((0.0, -0.5, 0.5), (0.9, 0.4, 1.0)):
        agent = agent_of(online_algorithm="td3", gamma=1.0)
        policy_says(agent.policy_target, mode)
        answers(agent.critic_target, lambda a: a[:, 0].expand(3, -1))  # the value is the action
        y = online_target(agent, batch_of(2000))[0]
        assert y.min().item() == pytest.approx(low) and y.max().item() == pytest.approx(high)
        assert mode or y.std().item() == pytest.approx(0.2, abs=0.02)


def test_offline_targets_have_no_entropy_bonus():
    agent = agent_of(backup_entropy=True)
    answers(agent.critic_target, [2.0, 2.0, 2.0])
    policy_says(agent.policy, log_pi=-3.0)
    agent.critic_update = lambda batch, target, kappa: dict(target=target, kappa=kappa)
    metrics = agent.offline_update(batch_of(2, r=1.0))
    torch.testing.assert_close(metrics["target"], torch.full((2,), 2.8))
    assert metrics["kappa"] == agent.args.kappa


# ---- critics
def test_td_loss_is_the_mean_square_over_members_and_batch():
    agent = agent_of()
    answers(agent.critic, [[1.0, 2.0], [3.0, 4.0], [0.0, 2.0]])
    metrics = agent.critic_update(batch_of(2), tensor([0.0, 2.0]), 0.0)
    assert metrics["td_loss"].item() == pytest.approx((1 + 0 + 9 + 4) / 6)
    assert metrics["q"].item() == pytest.approx(2) and "sm_loss" not in metrics
    assert agent.q_scale.item() == pytest.approx(0.005 * 1)


@pytest.mark.parametrize("mode", ["scaled", "learned"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_critics_follow_the_gradient_of_both_losses(mode, activation):
    """As one loss of double-backward autograd has it, alpha being a constant for the critics."""
    agent, batch, y = agent_of(alpha_mode=mode, critic_activation=activation), batch_of(8), 2.0
    agent.q_scale.fill_(10.0)
    seen = []
    agent.score_model.score = lambda s, a: seen.append(a) or -2 * a
    policy_says(agent.policy, 0.5)
    critic, alpha_net = copy.deepcopy((agent.critic, agent.alpha_net))
    metrics = agent.critic_update(batch, torch.full((8,), y), 3.0)

    a = seen[0].clone().requires_grad_()
    assert (a[:4] == 0.5).all() and (a[4:].abs() <= 1).all() and len(a[4:].unique()) == 8
    q = critic(batch.s, a)
    g = torch.stack([torch.autograd.grad(m.sum(), a, create_graph=True)[0] for m in q])
    alpha = tensor(0.015 * (10 + 0.005 * (y - 10))) if mode == "scaled" else alpha_net(batch.s)
    sm_loss = (g - alpha * (-2 * a.detach())).square().sum(-1).mean()
    td_loss = (critic(batch.s, batch.a) - y).square().mean()
    names = dict(td_loss=td_loss, sm_loss=sm_loss, alpha=alpha.mean())
    for name, x in names.items():
        torch.testing.assert_close(metrics[name], x.detach(), msg=name)
    expected = torch.autograd.grad(
        td_loss + 3 * sm_loss, list(critic.parameters()), retain_graph=True
    )
    torch.testing.assert_close(gradients(agent.critic), list(expected), rtol=1e-4, atol=1e-5)
    if mode == "learned":
        expected = torch.autograd.grad(sm_loss, list(alpha_net.parameters()))
        torch.testing.assert_close(gradients(agent.alpha_net), list(expected))


def test_score_matching_sums_over_dimensions_and_averages_over_members_and_batch():
    agent = agent_of(alpha_scale=0.5, num_critics=2)
    agent.q_scale.fill_(4.0)
    gradient = tensor([[[1.0, 2.0]], [[3.0, -1.0]]]).expand(-1, 4, -1)  # members, batch, dimensions
    agent.critic.action_gradient = lambda s, a: gradient
    agent.score_model.score = lambda s, a: torch.ones_like(a)
    loss, alpha, _ = agent.score_matching_loss(torch.randn(4, OBS))
    assert alpha.item() == 2 and loss.item() == pytest.approx(((1 + 0) + (1 + 9)) / 2)


def test_online_kappa_adds_the_term_and_0_leaves_it_out():
    with_term, without = agent_of(online_kappa=2.0), agent_of(online_kappa=0.0)
    without.score_model.score = None  # nobody asks
    with_term.score_model.score = lambda s, a: -a
    assert "sm_loss" in with_term.online_update(batch_of(8), True)
    assert "sm_loss" not in without.online_update(batch_of(8), True)
    assert online_target(with_term, batch_of(8))[1] == 2.0


@pytest.mark.parametrize("algorithm", ["sac", "td3"])
def test_auto_kappa_rises_where_the_cosine_is_below_its_bound_and_falls_above(algorithm):
    for bound, change in ((0.9, 1), (-0.9, -1)):
        agent = agent_of(online_kappa="auto", kappa=4.0, online_algorithm=algorithm)
        assert agent.learned_kappa == 4  # where it starts
        agent.learned_kappa.fill_(3.0)
        agent.critic.action_gradient = lambda s, a: torch.ones(3, len(s), ACT).requires_grad_()
        agent.score_model.score = lambda s, a: torch.eye(ACT)[0].expand(len(s), -1)
        agent.cosine_bound.fill_(bound)
        metrics = agent.online_update(batch_of(8), True)
        cosine = 1 / math.sqrt(ACT)  # between (1, 1, ...) and (1, 0, ...)
        assert metrics["cosine_batch"].item() == pytest.approx(cosine)
        expected = 3.0 * math.exp(0.01 * (bound - cosine))
        assert agent.learned_kappa.item() == pytest.approx(expected)
        assert (agent.learned_kappa.item() - 3.0) * change > 0
        assert metrics["online_kappa"] == agent.learned_kappa
        agent.learned_kappa.fill_(4.0)
        agent.online_update(batch_of(8), True)
        assert agent.learned_kappa.item() == pytest.approx(min(4.0, expected * 4 / 3))


def test_the_cosine_to_keep_is_that_on_collected_and_dataset_states():
    agent, device = agent_of(online_kappa="auto"), torch.device("cpu")
    replay, dataset = (smac.Replay(50, OBS, ACT, device) for _ in range(2))
    for one, value in ((replay, 1.0), (dataset, 3.0)):
        one.rows[:] = value
        one.n = 50
    agent.cosine = lambda s, a: s.mean() / 10
    before = torch.get_rng_state()
    agent.set_cosine_bound(dataset, replay)
    assert agent.cosine_bound.item() == pytest.approx(0.2)
    assert torch.equal(before, torch.get_rng_state())


def test_pretraining_turns_the_critics_gradient_along_the_score():
    """And against it where alpha is negative."""
    for alpha_scale in (0.5, -0.5):
        agent = agent_of(alpha_scale=alpha_scale, critic_lr=3e-3)
        agent.score_model.score = lambda s, a: -a
        for _ in range(150):
            agent.q_scale.fill_(1.0)
            agent.critic_update(batch_of(32), torch.zeros(32), 100.0)
        cosine = agent.cosine(*batch_of(64)[:2]).item()
        assert 0.6 < cosine * math.copysign(1, alpha_scale) <= 1


# ---- policies
def test_sac_takes_the_minimum_over_all_members_and_the_temperature_follows_the_entropy():
    agent = agent_of(target_entropy_scale=-0.5)
    answers(agent.critic, [[1.0, 5.0], [3.0, 2.0], [9.0, 9.0]])
    policy_says(agent.policy, log_pi=[0.5, -1.0])
    agent.log_temperature.data.fill_(math.log(0.2))
    metrics = agent.sac_policy_update(torch.randn(2, OBS))
    assert metrics["policy_loss"].item() == pytest.approx(((0.1 - 1) + (-0.2 - 2)) / 2)
    assert metrics["entropy"].item() == pytest.approx(0.25)
    assert metrics["temperature"].item() == pytest.approx(0.2)
    # the entropy, 0.25, is above its target, -1: the temperature falls
    assert agent.log_temperature.grad.item() == pytest.approx(0.25 + 1)
    assert agent.log_temperature.item() < math.log(0.2)


def test_sacs_policy_follows_the_reparameterised_gradient():
    agent, s = agent_of(), torch.randn(8, OBS)
    policy, critic = copy.deepcopy((agent.policy, agent.critic))
    torch.manual_seed(1)
    agent.sac_policy_update(s)
    torch.manual_seed(1)
    a, log_pi = policy.sample(s)
    loss = (log_pi - critic(s, a).amin(0)).mean()
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    torch.testing.assert_close(gradients(agent.policy), list(expected))


def test_td3_climbs_the_smallest_q_and_td3_bc_clones_as_well():
    for algorithm, expected in (("td3", 1.0), ("td3+bc", 1 / 3 + 5 * (1 + 4) / 4)):
        agent, batch = agent_of(online_algorithm=algorithm, bc_weight=5.0), batch_of(2)
        answers(agent.critic, [[2.0, -4.0], [3.0, 1.0], [9.0, 9.0]])
        policy_says(agent.policy, [[1.0, 0.0], [0.0, 2.0]])
        loss = agent.td3_policy_update(batch._replace(a=torch.zeros(2, 2)))["policy_loss"]
        assert loss.item() == pytest.approx(expected)


def test_td3_bc_divides_by_q_without_its_gradient():
    agent, batch = agent_of(online_algorithm="td3+bc", bc_weight=0.7), batch_of(8)
    policy, critic = copy.deepcopy((agent.policy, agent.critic))
    agent.td3_policy_update(batch)
    a = policy.mode(batch.s)
    q = critic(batch.s, a).amin(0)
    loss = -(q / q.abs().mean().item()).mean() + 0.7 * torch.nn.functional.mse_loss(a, batch.a)
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    torch.testing.assert_close(gradients(agent.policy), list(expected))


def test_awr_clones_with_weights_that_stop_at_100():
    agent, batch = agent_of(online_algorithm="awr", awr_temperature=0.4), batch_of(3)
    policy_says(agent.policy, log_pi=[-1.0, -2.0, -3.0])
    draws = iter([0.0, 0.2, 0.2, 0.0])  # V is the mean of 1, 1.2, 1.2 and 1, less 0.1
    agent.policy.sample = lambda s: (torch.full((3, ACT), next(draws)), None)
    q = tensor([1.0, 101.0, 0.0])

    def values(a):
        return (q if torch.equal(a, batch.a) else a[:, 0] + 0.9).expand(3, -1)

    answers(agent.critic, values)
    loss = agent.awr_policy_update(batch)["policy_loss"].item()
    assert loss == pytest.approx((1 * 1 + 100 * 2 + math.exp(-0.4) * 3) / 3, rel=1e-5)


# ---- the score
def score_model(obs_dim, act_dim, width=32):
    args = smac.Args(score_hidden=width, score_blocks=1, score_condition_hidden=(width,))
    return smac.ScoreModel(obs_dim, act_dim, args)


def test_diffusion_loss_is_the_square_of_the_error_in_the_noise():
    s, a, w = torch.zeros(512, 2), torch.rand(512, 3), torch.ones(512)
    model, levels = score_model(2, 3), set()

    def knows(s, noised, w, k, error=0.0):
        levels.update(k.tolist())
        alpha_bar = model.alpha_bar[k - 1, None]
        return (noised - alpha_bar.sqrt() * a) / (1 - alpha_bar).sqrt() + error

    model.forward = knows
    assert model.loss(s, a, w).item() == pytest.approx(0.0, abs=1e-6)
    model.forward = lambda *x: knows(*x, error=2.0)
    assert model.loss(s, a, w).item() == pytest.approx(3 * 2.0**2, rel=1e-3)
    assert levels == set(range(1, 33))


def test_noise_levels():
    alpha_bar = score_model(1, 1).alpha_bar
    assert alpha_bar.shape == (32,)
    assert (1 - alpha_bar[0]).sqrt().item() == pytest.approx(0.060, abs=0.0005)
    assert (alpha_bar.diff() < 0).all() and 0 < alpha_bar[-1] < 0.01


MEAN, DEVIATION = {0.0: -0.5, 1.0: 0.4}, 0.3


@pytest.fixture(scope="module")
def fitted():
    """A small model of a | s, w ~ N(0.3 s + MEAN[w], DEVIATION^2), fitted as phase 1 does it."""
    torch.manual_seed(0)
    average = score_model(1, 1, 32).eval().requires_grad_(False)
    model, steps = copy.deepcopy(average).train().requires_grad_(True), 700
    optimizer = smac.Muon([], model.parameters())
    for step in range(steps):
        smac.set_lr(optimizer, 4e-3 * (1 - step / steps))
        s, w = 2 * torch.rand(256, 1) - 1, torch.randint(2, (256,)).float()
        mean = 0.3 * s + torch.where(w == 1, MEAN[1.0], MEAN[0.0])[:, None]
        smac.descend(model.loss(s, mean + DEVIATION * torch.randn(256, 1), w), optimizer)
        smac.follow(average, model, max(0.005, 1 / (step + 1)))
    return average


def test_the_score_is_a_gaussians_in_sign_and_scale(fitted):
    """In units of sigma_1, of the density of actions at the lowest noise level."""
    s = 2 * torch.rand(2000, 1) - 1
    a = 0.3 * s + MEAN[1.0] + DEVIATION * torch.randn(2000, 1)
    alpha_bar = fitted.alpha_bar[0]
    mean, variance = alpha_bar.sqrt() * (0.3 * s + MEAN[1.0]), alpha_bar * DEVIATION**2
    exact = ((1 - alpha_bar).sqrt() * (mean - a) / (variance + 1 - alpha_bar)).flatten()
    ours = fitted.score(s, a).flatten()
    assert torch.corrcoef(torch.stack([ours, exact]))[0, 1] > 0.95
    # a short fit blurs over the next levels, whose noise is larger
    assert 0.7 < (ours @ exact / (exact @ exact)).item() < 1.5


def test_the_score_points_to_the_mean_of_the_best_returns(fitted):
    """From both sides of it, and from where the others' mean is."""
    score = fitted.score(torch.zeros(3, 1), tensor([[-0.5], [0.0], [0.9]]))
    assert torch.equal(score.sign(), tensor([[1.0], [1.0], [-1.0]]))


def test_the_score_is_minus_the_noise_at_return_one_and_level_one(fitted, monkeypatch):
    monkeypatch.setattr(smac, "bf16_is_fast", lambda device: False)
    s, a, one = torch.randn(16, 1), torch.randn(16, 1), torch.ones(16)
    torch.testing.assert_close(fitted.score(s, a), -fitted(s, a, one, one.long()))
    other = -fitted(s, a, 0 * one, one.long())
    assert not torch.allclose(fitted.score(s, a), other, atol=0.1)


def test_min_max():
    returns = np.array([-1.0, 3.0, 1.0], np.float32)
    np.testing.assert_array_equal(smac.min_max(returns), [0, 1, 0.5])
    np.testing.assert_array_equal(smac.min_max(returns[:1]), [1])
