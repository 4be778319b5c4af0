"""Muon against torch's own Muon and Adam, and what sets it apart."""

import copy
from unittest import mock

import pytest
import torch

import muon
from muon import KELLER, POLYNOMIAL, Muon, orthogonalize


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(muon, "bf16_is_fast", lambda device: False)


def gradients(*shapes, steps=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]


def train(optimizer, params, all_gradients):
    for step in all_gradients:
        for p, g in zip(params, step):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def parameters(*shapes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def singular_values(shape, polynomial=POLYNOMIAL):
    torch.manual_seed(0)
    return torch.linalg.svdvals(orthogonalize(torch.randn(shape), polynomial)).flatten()


@pytest.mark.parametrize(
    "scale, adjustment", [("spectral", "original"), ("rms", "match_rms_adamw")]
)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_equals_torch_muon_step_by_step(shape, scale, adjustment):
    (ours,), (theirs,) = parameters(shape), parameters(shape)
    reference = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.0, momentum=0.9, adjust_lr_fn=adjustment
    )
    optimizer = Muon([ours], lr=0.01, momentum=0.9, scale=scale, polynomial=KELLER)
    for step in gradients(shape):
        train(optimizer, [ours], [step])
        with mock.patch.object(
            torch.Tensor, "bfloat16", lambda G: G.clone()
        ):  # torch's own, but in float32
            train(reference, [theirs], [step])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_stack_equals_separate_matrices():
    (stack,), all_gradients = parameters((3, 6, 4)), gradients((3, 6, 4))
    separate = [torch.nn.Parameter(p.clone()) for p in stack.detach()]
    train(Muon([stack], lr=0.01), [stack], all_gradients)
    train(Muon(separate, lr=0.01), separate, [list(g) for (g,) in all_gradients])
    torch.testing.assert_close(
        stack.detach(), torch.stack([p.detach() for p in separate]), rtol=1e-5, atol=1e-6
    )


def test_matrices_of_one_shape_do_not_mix():
    """Parameters of one shape share a batched product, and the odd one out has another shape."""
    shapes = [(6, 4), (2, 6, 4), (6, 4), (4, 6)]
    together, all_gradients = parameters(*shapes), gradients(*shapes)
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    train(Muon(together, lr=0.01), together, all_gradients)
    for i, p in enumerate(alone):
        train(Muon([p], lr=0.01), [p], [[step[i]] for step in all_gradients])
        torch.testing.assert_close(together[i], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 4), (3, 9, 4), (2, 3, 5, 5)])
def test_transposed_input_gives_transposed_output(shape):
    G = torch.randn(shape)
    torch.testing.assert_close(orthogonalize(G.mT).mT, orthogonalize(G), rtol=1e-5, atol=1e-5)


def test_orthogonalize_keeps_singular_vectors_and_forgets_the_size():
    G = torch.randn(10, 6)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    inside = U.T @ orthogonalize(G) @ V.T
    torch.testing.assert_close(inside, inside.diag().diag(), rtol=0, atol=1e-5)
    torch.testing.assert_close(orthogonalize(1000 * G), orthogonalize(G), rtol=1e-4, atol=1e-4)
    assert orthogonalize(torch.zeros(3, 2)).abs().max() == 0


@pytest.mark.parametrize("shape", [(256, 17), (17, 256), (4, 128, 128), (256, 256), (512, 256)])
def test_nineteen_of_twenty_singular_values_come_near_one(shape):
    """At least as near as by Jordan's five; the last ones of a square matrix need more."""
    error, reference = (
        (singular_values(shape, p) - 1).abs().quantile(0.95) for p in (POLYNOMIAL, KELLER)
    )
    assert error < 0.3 and error <= reference


def test_in_bfloat16_a_matrix_of_rank_one_stays_below_the_steep_part(monkeypatch):
    """Its largest singular value is the norm that divides it: rounded up, it would fly away."""
    monkeypatch.setattr(muon, "bf16_is_fast", lambda device: True)
    G = torch.randn(60, 64, 1) @ torch.randn(60, 1, 64) + 1e-3 * torch.randn(60, 64, 64)
    assert torch.linalg.svdvals(orthogonalize(G)).max() < 1.35


def test_gradients_may_lie_in_memory_in_any_order():
    """torch's fused Adam on a CPU takes them as they lie: a transposed view comes in order."""
    straight, turned = parameters((6, 4)), parameters((6, 4))
    gradient = torch.randn(6, 4)
    for p, g in zip((*straight, *turned), (gradient, gradient.mT.contiguous().mT)):
        p.grad = g
        Muon([], [p], lr=0.01).step()
    assert not turned[0].grad.is_contiguous() and torch.equal(straight[0], turned[0])


def test_the_gradient_stays_readable():
    params, all_gradients = parameters((6, 4), (5,)), gradients((6, 4), (5,))
    train(Muon(params[:1], params[1:]), params, all_gradients)
    for p, g in zip(params, all_gradients[-1]):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


def test_a_parameter_without_gradient_does_not_move():
    """Not even when it has momentum from before."""
    params = parameters((6, 4), (6, 4), (5,), (5,))
    optimizer = Muon(params[:2], params[2:])
    before = train(optimizer, params, gradients(*(p.shape for p in params)))
    after = train(optimizer, params, [[torch.randn(6, 4), None, torch.randn(5), None]])
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, True, False, True]


def test_the_others_get_torch_adam_exactly():
    shapes = [(6, 4), (5,), ()]
    ours, theirs, all_gradients = parameters(*shapes), parameters(*shapes), gradients(*shapes)
    train(Muon([], ours, lr=0.01, betas=(0.8, 0.99), eps=1e-6), ours, all_gradients)
    lr = torch.tensor(0.01)
    train(torch.optim.Adam(theirs, lr, (0.8, 0.99), 1e-6, fused=True), theirs, all_gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_state_dict_round_trip_goes_on_identically():
    shapes = [(6, 4), (2, 6, 4), (5,)]
    params, all_gradients = parameters(*shapes), gradients(*shapes, steps=8)
    optimizer = Muon(params[:2], params[2:], lr=0.01)
    train(optimizer, params, all_gradients[:4])
    state, copies = (
        copy.deepcopy(optimizer.state_dict()),
        [torch.nn.Parameter(p.detach().clone()) for p in params],
    )
    resumed = Muon(copies[:2], copies[2:], lr=0.01)
    resumed.load_state_dict(state)
    expected = train(optimizer, params, all_gradients[4:])
    assert all(
        torch.equal(a, b) for a, b in zip(train(resumed, copies, all_gradients[4:]), expected)
    )


def test_state_exists_before_the_first_step():
    """Checkpoints have the same keys at step 0 and later."""
    params = parameters((6, 4), (5,))
    optimizer = Muon(params[:1], params[1:])
    before = {k: v.keys() for k, v in optimizer.state_dict()["state"].items()}
    train(optimizer, params, gradients((6, 4), (5,)))
    assert {k: v.keys() for k, v in optimizer.state_dict()["state"].items()} == before


@pytest.mark.parametrize("shape", [(5,), (), (2, 2, 3, 3)])
def test_only_matrices_and_stacks_of_them_are_taken(shape):
    with pytest.raises(ValueError, match="others"):
        Muon(parameters(shape))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale"):
        Muon(parameters((3, 3)), scale="moonlight")


def test_bfloat16_is_used_where_it_is_fast_and_stays_inside(monkeypatch):
    G = torch.randn(3, 16, 8)
    exact = orthogonalize(G)
    monkeypatch.setattr(muon, "bf16_is_fast", lambda device: True)
    rough = orthogonalize(G)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)


def test_a_loaded_state_keeps_the_scale_of_the_constructor():
    """--init-from with another --muon-scale."""
    (saved,), (loaded,) = parameters((4, 6)), parameters((4, 6))
    state = Muon([saved], scale="rms").state_dict()
    optimizer = Muon([loaded], scale="spectral")
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["scale"] == "spectral"
