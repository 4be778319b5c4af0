"""Policy, critics and score model against references; which network an update moves."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import same
from test_losses import ACT, OBS, agent_of, batch_of, score_model
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import smac_offline_to_online as smac

BATCH = 16


# ---- policy
def policy_and_reference(mean_bias=0.0, log_std_bias=-0.5):
    policy = smac.Policy(OBS, ACT, smac.Args(policy_hidden=(16, 16))).double()
    nn.init.normal_(policy.head.weight, std=0.3)  # the states differ, in both halves
    policy.head.bias.data.copy_(torch.tensor([mean_bias] * ACT + [log_std_bias] * ACT))
    s = torch.randn(BATCH, OBS, dtype=torch.double)
    mu, log_std = policy(s)
    tanh = TanhTransform(cache_size=1)
    return policy, s, TransformedDistribution(Normal(mu, log_std.exp()), tanh)


def test_log_densities_are_a_tanh_gaussians():
    policy, s, reference = policy_and_reference()
    a, log_prob = policy.sample(s)
    torch.testing.assert_close(log_prob, reference.log_prob(a).sum(-1), rtol=1e-6, atol=1e-6)
    a = 1.98 * torch.rand(BATCH, ACT, dtype=torch.double) - 0.99
    expected = reference.log_prob(a).sum(-1)
    torch.testing.assert_close(policy.log_prob(s, a), expected, rtol=1e-6, atol=1e-6)


def test_samples_have_the_mean_and_deviation_of_the_network():
    policy, s, _ = policy_and_reference()
    mu, log_std = policy(s[:1])
    u = torch.atanh(policy.sample(s[:1].expand(20_000, -1))[0])
    torch.testing.assert_close(u.mean(0), mu[0], rtol=0, atol=0.03)
    torch.testing.assert_close(u.std(0), log_std[0].exp(), rtol=0.03, atol=0)
    torch.testing.assert_close(torch.atanh(policy.mode(s)), policy(s)[0])


@pytest.mark.parametrize("mean", [20.0, -20.0])
def test_log_densities_and_gradients_are_finite_at_saturated_actions(mean):
    policy, s, _ = policy_and_reference(mean_bias=mean)
    policy, s = policy.float(), s.float()
    a, log_prob = policy.sample(s)
    given = policy.log_prob(s, torch.full((BATCH, ACT), math.copysign(1.0, mean)))
    gradients = torch.autograd.grad(log_prob.sum() + given.sum() + a.sum(), policy.parameters())
    assert all(x.isfinite().all() for x in (log_prob, given, *gradients))


@pytest.mark.parametrize("bias, deviation", [(-50.0, 1e-5), (50.0, 10.0)])
def test_the_deviation_is_clipped(bias, deviation):
    policy, s, _ = policy_and_reference(log_std_bias=bias)
    expected = torch.full((BATCH, ACT), deviation, dtype=torch.double)
    torch.testing.assert_close(policy(s)[1].exp(), expected)


def test_a_fresh_policy_has_mean_0_and_deviation_1_and_all_three_start_alike():
    agent = agent_of()
    mu, log_std = agent.policy(torch.randn(100, OBS))
    assert mu.abs().max() < 0.1 and log_std.abs().max() < 0.1
    for network in (agent.policy_average, agent.policy_target):
        assert same(network.state_dict(), agent.policy.state_dict())
        assert not any(p.requires_grad for p in network.parameters())


def test_normalisation_is_the_identity_until_fitted_and_then_in_the_checkpoint():
    policy, s, _ = policy_and_reference()
    raw, states = policy.mode(s), torch.randn(50, OBS, dtype=torch.double) * 4 + 2
    policy.normalize.fit(states)
    mean, std = states.mean(0), states.std(0) + 1e-3
    torch.testing.assert_close(policy.mode(s * std + mean), raw)
    names = agent_of().state_dict().keys()
    for network in ("policy", "policy_average", "policy_target", "critic", "critic_target"):
        assert {f"{network}.normalize.mean", f"{network}.normalize.std"} <= names


# ---- critics
def critics(activation):
    args = smac.Args(num_critics=3, critic_hidden=(16, 12, 8), critic_activation=activation)
    module = smac.Critics(OBS, ACT, args).double()
    for b in module.biases:
        nn.init.normal_(b)
    module.normalize.fit(3 * torch.randn(50, OBS, dtype=torch.double) + 1)
    s = torch.randn(BATCH, OBS, dtype=torch.double)
    return module, s, 2 * torch.rand(BATCH, ACT, dtype=torch.double) - 1


@pytest.mark.parametrize("activation, layer", [("tanh", nn.Tanh), ("relu", nn.ReLU)])
def test_critics_equal_separate_networks(activation, layer):
    module, s, a = critics(activation)
    separate = []
    for i in range(3):
        layers = []
        for W, b in zip(module.weights, module.biases):
            member = nn.Linear(W.shape[2], W.shape[1]).double()
            member.load_state_dict(dict(weight=W[i], bias=b[i, 0]))
            layers += [member, layer()]
        x = torch.cat([module.normalize(s), a], 1)
        separate.append(nn.Sequential(*layers[:-1])(x).squeeze(1))
    torch.testing.assert_close(module(s, a), torch.stack(separate))
    assert not torch.equal(separate[0], separate[1])
    pair = torch.tensor([2, 0])
    torch.testing.assert_close(module(s, a, pair), torch.stack([separate[2], separate[0]]))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_action_gradient_is_autograds(activation):
    module, s, a = critics(activation)
    a.requires_grad_()
    expected = [torch.autograd.grad(q.sum(), a, retain_graph=True)[0] for q in module(s, a)]
    torch.testing.assert_close(module.action_gradient(s, a), torch.stack(expected))


def test_hidden_layers_start_orthogonal():
    W = smac.Critics(OBS, ACT, smac.Args(num_critics=2, critic_hidden=(16, 16))).weights[1]
    torch.testing.assert_close(W @ W.mT, 2 * torch.eye(16).expand(2, -1, -1), rtol=0, atol=1e-5)


# ---- score model
def test_dropout_is_active_only_while_fitting():
    model, s, a = score_model(OBS, ACT).eval(), torch.randn(BATCH, OBS), torch.randn(BATCH, ACT)
    with torch.no_grad():
        assert torch.equal(model.score(s, a), model.score(s, a))
        model.train()
        assert not torch.equal(model.score(s, a), model.score(s, a))


# ---- updates
def moved(agent, update) -> set[str]:
    before = copy.deepcopy(agent.state_dict())
    update()
    after = agent.state_dict().items()
    names = {name.split(".")[0] for name, x in after if not torch.equal(x, before[name])}
    return names - {"q_scale"}


def test_descend_touches_only_its_own_optimisers_parameters():
    agent, batch = agent_of(), batch_of(BATCH)
    loss = agent.critic(batch.s, agent.policy.mode(batch.s)).mean()
    loss = loss + agent.policy.log_prob(batch.s, batch.a).mean()
    assert moved(agent, lambda: smac.descend(loss, agent.optimizers["policy"])) == {"policy"}
    assert all(p.grad is None for p in agent.critic.parameters())


def test_optimisers_share_out_every_parameter_once():
    agent = agent_of()
    for name, optimizer in agent.optimizers.items():
        expected = [agent.log_temperature]
        if name != "temperature":
            expected = list(getattr(agent, name).parameters())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, expected))
    learning = {name.split(".")[0] for name, p in agent.named_parameters() if p.requires_grad}
    assert learning == {"critic", "policy", "log_temperature", "alpha_net"}


@pytest.mark.parametrize("name, shapes", [("muon", {(3, 16, 16), (16, 16)}), ("adam", set())])
def test_muon_gets_the_matrices_between_hidden_layers_alone(name, shapes):
    agent, found = agent_of(optimizer=name, critic_lr=0.1, policy_lr=0.2, temperature_lr=0.3), set()
    for optimizer in agent.optimizers.values():
        for group in optimizer.param_groups:
            found |= {tuple(p.shape) for p in group["params"] if group["muon"]}
    assert found == shapes
    for key, rate in dict(critic=0.1, policy=0.2, temperature=0.3).items():
        for group in agent.optimizers[key].param_groups:
            assert group["lr"].item() == pytest.approx(rate)


ALL = {"critic", "critic_target", "policy", "policy_target", "policy_average"}
OFFLINE = ALL | {"log_temperature"}


@pytest.mark.parametrize(
    "flags, expected",
    [
        (dict(), OFFLINE),
        (dict(alpha_mode="learned"), OFFLINE | {"alpha_net"}),
        (dict(alpha_mode="learned", kappa=0.0), OFFLINE),
    ],
)
def test_what_an_offline_update_moves(flags, expected):
    agent = agent_of(**flags)
    assert moved(agent, lambda: agent.offline_update(batch_of(BATCH))) == expected


@pytest.mark.parametrize("idle", ["policy", "critic"])
def test_each_loss_moves_its_own_network(idle, monkeypatch):
    """With one network's optimiser out of work, nothing else moves that network."""
    agent = agent_of()
    monkeypatch.setattr(agent.optimizers[idle], "step", lambda: None)
    names = moved(agent, lambda: agent.offline_update(batch_of(BATCH)))
    assert idle not in names and {"policy", "critic", "log_temperature"} - names == {idle}


@pytest.mark.parametrize("policy_turn", [True, False])
@pytest.mark.parametrize("algorithm", ["sac", "td3", "td3+bc", "awr"])
def test_what_an_online_update_moves(algorithm, policy_turn):
    expected = {"critic"}
    if policy_turn or algorithm in ("sac", "awr"):
        expected = ALL
    if algorithm == "sac":
        expected = ALL | {"log_temperature"}
    agent = agent_of(online_algorithm=algorithm)
    assert moved(agent, lambda: agent.online_update(batch_of(BATCH), policy_turn)) == expected


def test_targets_and_average_follow_at_their_rates():
    agent = agent_of(tau=0.1, policy_average_rate=0.2, critic_lr=0.1, policy_lr=0.1)
    followers = dict(critic_target=(agent.critic, 0.1), policy_target=(agent.policy, 0.1))
    followers["policy_average"] = (agent.policy, 0.2)
    before = copy.deepcopy(agent)
    agent.offline_update(batch_of(BATCH))
    for name, (source, rate) in followers.items():
        trio = getattr(before, name), getattr(agent, name), source
        for old, new, p in zip(*(module.parameters() for module in trio)):
            torch.testing.assert_close(new, old + rate * (p.detach() - old))


def test_collected_actions_are_samples_of_the_policy_or_td3s_mean_with_noise():
    agent, s = agent_of(exploration_noise=0.1), torch.randn(1, OBS).expand(4000, -1)
    agent.policy_average.head.bias[:ACT] = 9.0  # it does not act
    noise = agent.act(s, True) - agent.policy.mode(s)
    assert noise.std().item() == pytest.approx(0.1, rel=0.05) and noise.mean().abs() < 0.01
    assert agent.act(s, False).std() > 0.3  # its initial deviation
    agent.policy.head.bias.data[:ACT] = 9.0
    assert agent.act(s, True).max() == 1


def test_cosines_draw_nothing_from_the_runs_random_numbers():
    agent, replay = agent_of(), smac.Replay(64, OBS, ACT, torch.device("cpu"))
    agent.critic.action_gradient = lambda s, a: 3 * a.expand(3, -1, -1)
    agent.score_model.score = lambda s, a: a * torch.tensor([1.0, -1.0])
    agent.score_model.fitted.fill_(True)
    dataset = smac.Replay(64, OBS, ACT, torch.device("cpu"))
    s, a, zeros = np.zeros((64, OBS)), np.ones((64, ACT)), np.zeros(64)
    dataset.add(s, a, zeros, s, zeros)
    random = torch.get_rng_state()
    cosines = agent.cosines(dataset, replay)
    assert cosines.keys() == {"cosine_data", "cosine_policy", "cosine_uniform"}
    assert cosines["cosine_data"].abs() < 1e-6 < cosines["cosine_uniform"].abs()
    replay.add(s, a, zeros, s, zeros)
    assert "cosine_collected" in agent.cosines(dataset, replay)
    assert torch.equal(torch.get_rng_state(), random)
