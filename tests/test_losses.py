"""Each loss, on numbers small enough to compute by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

import smac_offline_to_online as smac


def test_td_loss_is_the_mean_square_over_members_and_batch():
    q = tensor([[1.0, 2.0], [3.0, 4.0]])
    assert smac.td_loss(q, tensor([0.0, 2.0])).item() == pytest.approx((1 + 0 + 9 + 4) / 4)


def test_score_matching_loss_sums_over_dimensions_and_averages_over_members_and_batch():
    gradient = tensor([[[1.0, 2.0]], [[3.0, -1.0]]])  # 2 members, 1 row, 2 dimensions
    loss = smac.score_matching_loss(gradient, tensor([[1.0, 1.0]]), tensor(2.0))
    assert loss.item() == pytest.approx(((1 + 0) + (1 + 9)) / 2)


def test_score_matching_loss_takes_an_alpha_for_each_state():
    gradient, score = tensor([[[1.0], [1.0], [4.0]]]), tensor([[1.0], [1.0], [1.0]])
    loss = smac.score_matching_loss(gradient, score, tensor([[1.0], [-1.0], [2.0]]))
    assert loss.item() == pytest.approx((0 + 4 + 4) / 3)


def test_sac_policy_loss_takes_the_minimum_over_all_members():
    q = tensor([[1.0, 5.0], [3.0, 2.0]])
    loss = smac.sac_policy_loss(q, tensor([0.5, -1.0]), tensor(0.2))
    assert loss.item() == pytest.approx(((0.1 - 1) + (-0.2 - 2)) / 2)


def test_temperature_rises_when_the_entropy_is_below_its_target():
    log_temperature, log_prob = tensor(0.5, requires_grad=True), tensor([1.0, 3.0], requires_grad=True)
    loss = smac.temperature_loss(log_temperature, log_prob, -1.0)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * (2 - 1))
    assert log_temperature.grad.item() == pytest.approx(-1.0)  # entropy is -2
    assert log_prob.grad is None


def test_td3_policy_loss_is_minus_the_smallest_q():
    q, a = tensor([[2.0, -4.0], [3.0, 1.0]]), torch.rand(2, 2)
    assert smac.td3_policy_loss(q, a, a + 1, 0.0).item() == pytest.approx(1.0)


def test_td3_bc_scales_q_without_gradient_and_averages_the_square_over_dimensions():
    q = tensor([[2.0, -4.0], [3.0, 1.0]], requires_grad=True)
    a_pi, a = tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True), torch.zeros(2, 2)
    loss = smac.td3_policy_loss(q, a_pi, a, 5.0)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 3 + 5 * (1 + 4) / 4)
    torch.testing.assert_close(q.grad, tensor([[-1 / 6, -1 / 6], [0.0, 0.0]]))
    torch.testing.assert_close(a_pi.grad, 5 * 2 * (a_pi - a).detach() / 4)


def test_awr_weights_stop_at_100():
    log_prob, q, v = tensor([-1.0, -2.0, -3.0]), tensor([1.0, 101.0, 0.0]), tensor([1.0, 1.0, 1.0])
    loss = smac.awr_policy_loss(log_prob, q, v, 0.4)
    assert loss.item() == pytest.approx((1 * 1 + 100 * 2 + math.exp(-0.4) * 3) / 3, rel=1e-5)


def updates(q_target, log_prob=0.0, log_temperature=0.0, mode=0.0, **flags):
    """Updates around an agent that knows a single answer to everything; q_target (N,) or a function of the action."""

    def critic_target(s, a, members=slice(None)):
        return (q_target(a) if callable(q_target) else tensor(q_target)[:, None].expand(-1, len(s)))[members]

    policy = SimpleNamespace(
        sample=lambda s: (torch.zeros(len(s), 1), torch.full((len(s),), float(log_prob))),
        mode=lambda s: torch.full((len(s), 1), float(mode)),
    )
    agent = SimpleNamespace(policy=policy, policy_target=policy, critic_target=critic_target)
    agent.log_temperature = tensor(log_temperature)
    number = 2 if callable(q_target) else len(q_target)
    args = dict(gamma=0.9, num_critics=number, backup_entropy=False, online_algorithm="sac", compile=False)
    return smac.Updates(agent, None, {}, (1, 1, 1, 1, 1, 1), SimpleNamespace(**args | flags))


def test_td_target_bootstraps_unless_terminal():
    r, s_next, terminal = tensor([[1.0], [1.0]]), torch.zeros(2, 1), tensor([[0.0], [1.0]])
    y = updates([3.0, 2.0]).td_target(r, s_next, terminal, "sac")
    torch.testing.assert_close(y, tensor([1 + 0.9 * 2, 1.0]))


def test_td_target_has_an_entropy_bonus_only_with_the_flag():
    row = tensor([[1.0]]), torch.zeros(1, 1), tensor([[0.0]])
    known = dict(log_prob=-3.0, log_temperature=math.log(0.5))
    plain, bonus = updates([2.0, 2.0], **known), updates([2.0, 2.0], **known, backup_entropy=True)
    assert plain.td_target(*row, "sac").item() == pytest.approx(1 + 0.9 * 2)
    assert bonus.td_target(*row, "sac").item() == pytest.approx(1 + 0.9 * (2 + 0.5 * 3))
    assert bonus.td_target(*row, "td3").item() == pytest.approx(1 + 0.9 * 2)  # TD3 has no entropy
    assert bonus.td_target(*row, "smac").item() == pytest.approx(1 + 0.9 * 2)  # nor has pretraining


def test_td_target_takes_the_minimum_over_two_members_drawn_anew():
    u, row = updates([1.0, 2.0, 3.0], gamma=1.0), (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
    drawn = [u.td_target(*row, "sac").item() for _ in range(300)]
    assert set(drawn) == {1.0, 2.0}
    assert 0.55 < drawn.count(1.0) / 300 < 0.78  # two of the three pairs hold member 1


def test_td3_target_action_has_clipped_noise_within_bounds():
    row = torch.zeros(2000, 1), torch.zeros(2000, 1), torch.zeros(2000, 1)

    def q_is_action(a):
        return a.squeeze(1).expand(2, -1)

    middle = updates(q_is_action, gamma=1.0).td_target(*row, "td3")
    edge = updates(q_is_action, mode=0.9, gamma=1.0).td_target(*row, "td3")
    assert middle.abs().max() <= 0.5 and middle.std().item() == pytest.approx(0.2, abs=0.02)
    assert edge.max() == 1.0 and edge.min() >= 0.4 - 1e-6


class Knows:
    """A noise model that solves the noising equation for the noise, given the clean action, plus `error`."""

    K = 4
    alpha_bar = tensor([0.9, 0.7, 0.4, 0.1])

    def __init__(self, clean, error=0.0):
        self.clean, self.error = clean, error

    def __call__(self, s, noised, w, k):
        self.k, alpha_bar = k, self.alpha_bar[k - 1, None]
        return (noised - alpha_bar.sqrt() * self.clean) / (1 - alpha_bar).sqrt() + self.error


def test_diffusion_loss_is_the_square_of_the_error_in_the_noise():
    s, a, w = torch.zeros(512, 2), torch.rand(512, 3), torch.ones(512)
    model = Knows(a)
    assert smac.diffusion_loss(model, s, a, w).item() == pytest.approx(0.0, abs=1e-9)
    assert smac.diffusion_loss(Knows(a, 2.0), s, a, w).item() == pytest.approx(3 * 2.0**2, rel=1e-5)
    assert sorted(set(model.k.tolist())) == [1, 2, 3, 4]
