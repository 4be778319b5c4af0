"""Policy, critics and score model against references; which network an update moves."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, parse
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import smac_offline_to_online as smac

OBS, ACT, BATCH = 5, 2, 16


# ---- policy
def policy_and_reference(mean_bias=0.0, log_std_bias=-0.5):
    policy = smac.Policy(OBS, ACT, (16, 16)).double()
    nn.init.normal_(policy.head.weight, std=0.3)  # the states differ, in both halves
    with torch.no_grad():
        policy.head.bias.copy_(torch.tensor([mean_bias] * ACT + [log_std_bias] * ACT))
    s = torch.randn(BATCH, OBS, dtype=torch.double)
    mu, log_std = policy(s)
    return policy, s, TransformedDistribution(Normal(mu, log_std.exp()), TanhTransform(cache_size=1))


def test_sample_has_the_log_density_of_a_tanh_gaussian():
    policy, s, reference = policy_and_reference()
    a, log_prob = policy.sample(s)
    torch.testing.assert_close(log_prob, reference.log_prob(a).sum(-1), rtol=1e-6, atol=1e-6)


def test_log_prob_of_given_actions_is_a_tanh_gaussians():
    policy, s, reference = policy_and_reference()
    a = 1.98 * torch.rand(BATCH, ACT, dtype=torch.double) - 0.99
    torch.testing.assert_close(smac.log_prob(policy, s, a), reference.log_prob(a).sum(-1), rtol=1e-6, atol=1e-6)


def test_samples_have_the_mean_and_deviation_of_the_network():
    policy, s, _ = policy_and_reference()
    mu, log_std = policy(s[:1])
    u = torch.atanh(policy.sample(s[:1].expand(20_000, -1))[0])
    torch.testing.assert_close(u.mean(0), mu[0], rtol=0, atol=0.03)
    torch.testing.assert_close(u.std(0), log_std[0].exp(), rtol=0.03, atol=0)


@pytest.mark.parametrize("mean", [20.0, -20.0])
def test_log_densities_and_gradients_are_finite_at_saturated_actions(mean):
    policy, s, _ = policy_and_reference(mean_bias=mean)
    policy, s = policy.float(), s.float()
    a, log_prob = policy.sample(s)
    given = smac.log_prob(policy, s, torch.full((BATCH, ACT), math.copysign(1.0, mean)))
    gradients = torch.autograd.grad(log_prob.sum() + given.sum() + a.sum(), list(policy.parameters()))
    assert all(x.isfinite().all() for x in (log_prob, given, *gradients))


def test_mode_is_the_tanh_of_the_mean():
    policy, s, _ = policy_and_reference()
    assert policy.mode(s).abs().max() < 1
    torch.testing.assert_close(torch.atanh(policy.mode(s)), policy(s)[0])


@pytest.mark.parametrize("bias, deviation", [(-50.0, 1e-5), (50.0, 10.0)])
def test_the_deviation_is_clipped(bias, deviation):
    policy, s, _ = policy_and_reference(log_std_bias=bias)
    torch.testing.assert_close(policy(s)[1].exp(), torch.full((BATCH, ACT), deviation, dtype=torch.double))


def test_normalisation_is_the_identity_until_set_and_then_inside_the_checkpoint():
    policy, s, _ = policy_and_reference()
    raw = policy.mode(s)
    policy.mean.copy_(torch.arange(OBS)), policy.std.copy_(torch.arange(OBS) + 2)
    torch.testing.assert_close(policy.mode(s * policy.std + policy.mean), raw)
    assert {"mean", "std"} <= policy.state_dict().keys()


# ---- critics
def critics(activation, double=True):
    module = smac.Critics(3, OBS, ACT, (16, 12, 8), activation)
    with torch.no_grad():
        for b in module.biases:
            b.normal_()
    s, a = torch.randn(BATCH, OBS), 2 * torch.rand(BATCH, ACT) - 1
    return (module.double(), s.double(), a.double()) if double else (module, s, a)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_critics_equal_separate_networks(activation):
    module, s, a = critics(activation)
    separate = []
    for i in range(3):
        x = torch.cat([s, a], 1)
        for j, (W, b) in enumerate(zip(module.weights, module.biases)):
            x = nn.functional.linear(x, W[i], b[i, 0])
            x = x if j == 3 else getattr(torch, activation)(x)
        separate.append(x.squeeze(1))
    torch.testing.assert_close(module(s, a), torch.stack(separate))
    assert not torch.equal(separate[0], separate[1])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_action_gradient_is_autograds(activation):
    module, s, a = critics(activation)
    module.mean.normal_(), module.std.uniform_(0.5, 2)
    a.requires_grad_()
    expected = torch.stack([torch.autograd.grad(q.sum(), a, retain_graph=True)[0] for q in module(s, a)])
    torch.testing.assert_close(smac.action_gradient(module, s, a), expected)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_score_matching_gradient_is_double_backwards(activation):
    """In single precision, as in training: one pass through action_gradient against autograd's two."""
    module, s, a = critics(activation, double=False)
    score, a_, weights = torch.randn(BATCH, ACT), a.clone().requires_grad_(), list(module.parameters())
    g = torch.stack([torch.autograd.grad(q.sum(), a_, create_graph=True)[0] for q in module(s, a_)])
    losses = [smac.score_matching_loss(g, score, torch.tensor(0.5)) for g in (smac.action_gradient(module, s, a), g)]
    ours, reference = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses)
    torch.testing.assert_close(*losses)
    for x, y, w in zip(ours, reference, weights):
        zero = torch.zeros_like(w)
        torch.testing.assert_close(zero if x is None else x, zero if y is None else y, rtol=1e-5, atol=1e-5)
    assert all(x.abs().max() > 1e-3 for x in ours[: len(module.weights)])


# ---- score model
def score_model(**sizes):
    args = dict(score_hidden=64, score_blocks=1, score_condition_hidden=(32,))
    return smac.ScoreModel(1, 2, SimpleNamespace(**args | sizes))


def test_noise_levels():
    alpha_bar = score_model().alpha_bar
    assert alpha_bar.shape == (32,) == (smac.ScoreModel.K,)
    assert (1 - alpha_bar[0]).sqrt().item() == pytest.approx(0.060, abs=0.0005)
    assert (alpha_bar.diff() < 0).all() and 0 < alpha_bar[-1] < 0.01


MEAN, DEVIATION = {0.0: -0.5, 1.0: 0.4}, 0.3


@pytest.fixture(scope="module")
def fitted():
    """A small model of a | s, w ~ N(0.3 s + MEAN[w], DEVIATION^2) in two dimensions."""
    torch.manual_seed(0)
    model = score_model()
    average, steps = copy.deepcopy(model).eval(), 2000
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        s, w = 2 * torch.rand(256, 1) - 1, torch.randint(2, (256,)).float()
        a = 0.3 * s + torch.where(w == 1, MEAN[1.0], MEAN[0.0])[:, None] + DEVIATION * torch.randn(256, 2)
        loss = smac.diffusion_loss(model, s, a, w)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smac.follow(average, model, max(0.005, 1 / (step + 1)))
    return average


def gaussian_score(model, s, a):
    """sigma_1 grad_a log p_1(a | s, w=1): the density of actions at the lowest noise level is a Gaussian as well."""
    alpha_bar = model.alpha_bar[0]
    mean = alpha_bar.sqrt() * (0.3 * s + MEAN[1.0])
    return (1 - alpha_bar).sqrt() * (mean - a) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)


def test_the_score_is_a_gaussians_in_sign_and_scale(fitted):
    s = 2 * torch.rand(2000, 1) - 1
    a = 0.3 * s + MEAN[1.0] + DEVIATION * torch.randn(2000, 2)
    with torch.no_grad():
        ours, exact = fitted.score(s, a).flatten(), gaussian_score(fitted, s, a).flatten()
    assert torch.corrcoef(torch.stack([ours, exact]))[0, 1] > 0.95
    slope = ours @ exact / (exact @ exact)  # above 1: a short fit blurs over the next levels, whose noise is larger
    assert 0.8 < slope < 1.4


def test_the_score_points_to_the_mean_of_the_best_returns(fitted):
    """Between the two modes, and to both sides of the better one."""
    s, a = torch.zeros(3, 1), torch.tensor([[-0.1, -0.1], [0.9, -0.3], [-0.3, 0.9]])
    assert torch.equal(fitted.score(s, a).sign(), torch.tensor([[1.0, 1], [-1, 1], [1, -1]]))


def test_the_noise_estimate_depends_on_the_return(fitted):
    s, a, k = torch.zeros(1, 1), torch.zeros(1, 2), torch.ones(1, dtype=torch.long)
    low, high = (fitted(s, a, torch.full((1,), w), k) for w in (0.0, 1.0))
    assert (low > 0).all() and (high < 0).all()  # noise is what leads away from each mode


def test_score_is_minus_the_noise_estimate_at_return_one_and_level_one(fitted, monkeypatch):
    monkeypatch.setattr(smac, "bf16_is_fast", lambda device: False)
    s, a = torch.randn(BATCH, 1), torch.randn(BATCH, 2)
    one = torch.ones(BATCH)
    torch.testing.assert_close(fitted.score(s, a), -fitted(s, a, one, one.long()))


def test_dropout_is_active_only_while_fitting(fitted):
    s, a = torch.randn(BATCH, 1), torch.randn(BATCH, 2)
    assert torch.equal(fitted.score(s, a), fitted.score(s, a))
    fitting = copy.deepcopy(fitted).train()
    assert not torch.equal(fitting.score(s, a), fitting.score(s, a))


# ---- updates
def small(**flags):
    """(agent, updates, rows) of small networks; the model's score is -a, towards the middle."""
    args = SimpleNamespace(**vars(parse(*TINY, "--critic-lr", "1e-3")) | flags)
    agent = smac.Agent(OBS, ACT, args)
    model = SimpleNamespace(score=lambda s, a: -a, normalize=lambda s: s)
    replay = smac.Replay(BATCH, OBS, ACT, torch.device("cpu"))
    random = [torch.randn(BATCH, size).clamp(-1, 1).numpy() for size in replay.sizes]
    random[4][:] = random[5][:] = 0
    replay.add(*random)
    smac.set_learning_rates(optimizers := smac.make_optimizers(agent, args), args)
    return agent, smac.Updates(agent, model, optimizers, replay.sizes, args), replay.rows


def moved(agent, update):
    before = copy.deepcopy(agent.state_dict())
    update()
    names = {name.split(".")[0] for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    return names - {"q_scale"}


def test_descend_touches_only_its_own_optimisers_parameters():
    agent, updates, _ = small()
    s, a = torch.randn(BATCH, OBS), torch.rand(BATCH, ACT)
    loss = agent.critic(s, agent.policy.mode(s)).mean() + smac.log_prob(agent.policy, s, a).mean()
    assert moved(agent, lambda: smac.descend(loss, updates.optimizers["policy"])) == {"policy"}
    assert all(p.grad is None for p in agent.critic.parameters())


def test_optimisers_share_out_every_parameter_once():
    agent, updates, _ = small()
    for name, optimizer in updates.optimizers.items():
        module = getattr(agent, name, None)
        expected = list(module.parameters()) if module is not None else [agent.log_temperature]
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, expected))
    assert set(updates.optimizers) == {"critic", "policy", "alpha_net", "temperature"}


def test_muon_gets_the_matrices_between_hidden_layers_alone():
    for optimizer, expected in (("muon", {(3, 16, 16), (16, 16)}), ("adam", set())):
        _, updates, _ = small(optimizer=optimizer)
        groups = [group for o in updates.optimizers.values() for group in o.param_groups if group["muon"]]
        assert {tuple(p.shape) for group in groups for p in group["params"]} == expected


@pytest.mark.parametrize("idle, expected", [("policy", {"critic", "critic_target"}), ("critic", {"policy"})])
def test_each_loss_moves_its_own_network(idle, expected, monkeypatch):
    """With one network's optimiser out of work, nothing else moves that network."""
    agent, updates, rows = small()
    monkeypatch.setattr(updates.optimizers[idle], "step", lambda: None)
    names = moved(agent, lambda: updates.offline(rows))
    averages = {"policy_target", "policy_average"}
    assert names - averages == expected | {"log_temperature"}
    assert averages <= names or "policy" not in names


ALL = {"critic", "critic_target", "policy", "policy_target", "policy_average"}


@pytest.mark.parametrize(
    "algorithm, delayed, expected",
    [
        ("sac", True, ALL | {"log_temperature"}),
        ("sac", False, ALL | {"log_temperature"}),
        ("td3", True, ALL),
        ("td3", False, {"critic"}),
        ("td3+bc", True, ALL),
        ("td3+bc", False, {"critic"}),
        ("awr", True, ALL),
        ("awr", False, ALL),
    ],
)
def test_what_an_online_update_moves(algorithm, delayed, expected):
    agent, updates, rows = small(online_algorithm=algorithm)
    assert moved(agent, lambda: updates.online(rows, delayed)) == expected


def test_the_average_of_policies_follows_and_the_policy_itself_acts():
    agent, updates, rows = small(policy_average=0.1)
    old = [p.clone() for p in agent.policy_average.parameters()]
    updates.online(rows, True)
    for before, after, policy in zip(old, agent.policy_average.parameters(), agent.policy.parameters()):
        torch.testing.assert_close(after, before + 0.1 * (policy.detach() - before))
    agent.policy_average.head.bias[:ACT] = 9.0
    agent.policy_average.head.bias[ACT:] = -9.0
    agent.policy.head.bias.data[:ACT] = -9.0
    agent.policy.head.bias.data[ACT:] = -9.0
    s = rows.split(updates.sizes, 1)[0]
    assert (updates.act(s, td3=False) < -0.9).all()
    noisy = updates.act(s, td3=True)
    assert (noisy < -0.4).all() and noisy.std() > 0.01


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_offline_targets_follow_at_rate_tau(activation):
    agent, updates, rows = small(tau=0.1, critic_activation=activation)
    old = [p.clone() for p in agent.critic_target.parameters()]
    updates.offline(rows)
    for before, after, critic in zip(old, agent.critic_target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(after.detach(), before + 0.1 * (critic.detach() - before))


def test_utd_updates_the_critic_on_equal_parts_and_the_policy_once(monkeypatch):
    agent, updates, rows = small(utd=4)
    steps, batches = [], []
    for name in ("critic", "policy"):
        step = updates.optimizers[name].step
        monkeypatch.setattr(updates.optimizers[name], "step", lambda name=name, step=step: (steps.append(name), step()))
    td_target = updates.td_target
    monkeypatch.setattr(updates, "td_target", lambda r, *rest: (batches.append(r), td_target(r, *rest))[1])
    updates.online(rows, True)
    assert steps == ["critic"] * 4 + ["policy"]
    assert [len(r) for r in batches] == [BATCH // 4] * 4
    torch.testing.assert_close(torch.cat(batches), rows.split(updates.sizes, 1)[2])


@pytest.mark.parametrize("sign, expected", [("minus", 1.0), ("plus", -1.0)])
def test_pretraining_turns_the_critics_gradient_along_the_score(sign, expected):
    agent, updates, rows = small(score_sign=sign, kappa=100.0, alpha_mode="fixed", alpha_scale=0.5, gamma=0.0)
    rows[:, OBS + ACT] = 0  # rewards: only the score is left to learn
    for _ in range(150):
        metrics = updates.offline(rows)
    cosine = {k: float(v) for k, v in updates.identity(rows).items()}
    assert cosine["cosine_uniform"] == pytest.approx(expected, abs=0.2)
    assert metrics["alpha"] == 0.5


def test_scaled_alpha_follows_the_size_of_the_target():
    agent, updates, rows = small(alpha_mode="scaled", alpha_scale=0.02, gamma=0.0)
    rows[:, OBS + ACT] = -50.0
    for _ in range(100):
        alpha = updates.offline(rows)["alpha"]
    assert alpha.item() == pytest.approx(0.02 * 50 * (1 - 0.995**100), rel=1e-3)


def test_learned_alpha_is_the_only_mode_that_trains_its_network():
    for mode, expected in (("learned", True), ("scaled", False), ("fixed", False)):
        agent, updates, rows = small(alpha_mode=mode)
        assert ("alpha_net" in moved(agent, lambda u=updates, rows=rows: u.offline(rows))) == expected


def test_without_kappa_the_score_model_is_not_asked():
    agent, updates, rows = small(kappa=0.0)
    updates.model = None
    assert "sm_loss" not in updates.offline(rows)


def test_score_matching_actions_are_half_the_policys_and_half_uniform(monkeypatch):
    agent, updates, rows = small()
    asked = []
    monkeypatch.setattr(updates.model, "score", lambda s, a: (asked.append(a), -a)[1])
    monkeypatch.setattr(agent.policy, "sample", lambda s: (torch.full((len(s), ACT), 0.123), torch.zeros(len(s))))
    monkeypatch.setattr(updates, "sac_policy", lambda s: {})
    updates.offline(rows)
    (a,) = asked
    assert (a[: BATCH // 2] == 0.123).all() and (a[BATCH // 2 :] != 0.123).all() and a.abs().max() <= 1


def test_collected_actions_are_samples_or_td3s_mean_with_noise():
    agent, updates, _ = small(online_algorithm="td3", exploration_noise=0.1)
    nn.init.constant_(agent.policy.head.bias, 0.0)
    s = torch.randn(1, OBS).expand(4000, -1)
    with torch.no_grad():
        noise = updates.act(s, True) - agent.policy.mode(s)
    assert noise.std().item() == pytest.approx(0.1, rel=0.05) and updates.act(s, True).abs().max() <= 1
    assert updates.act(s, False).std() > 0.3  # the stochastic policy at its initial deviation
