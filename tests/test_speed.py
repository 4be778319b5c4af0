"""The work of an update step, which a machine's noise does not change: matrix products, copies, graphs, waits. And
SMAC's update against the naive one of experiments/speed.py."""

import csv
import itertools
import os
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT

import muon
import smac_offline_to_online as smac
from muon import KELLER, Muon

sys.path.insert(0, str(ROOT / "experiments"))

import speed
from speed import ACT, BATCH, OBS, SCORE, SIZES

B, N, (h, _) = BATCH, SIZES["num_critics"], SIZES["critic_hidden"]


@pytest.fixture
def float32(monkeypatch):
    """bfloat16 rounds differently when it is compiled, and the naive update knows none."""
    for module in (muon, smac):
        monkeypatch.setattr(module, "bf16_is_fast", lambda device: False)


def batch(row, n=BATCH):
    return speed.replay(row, speed.transitions(1000)).sample(n)


# ---- work. A product of (m, k) and (k, n) is 2 m k n operations. Forward passes; a critic's head is no matrix product
STATE, HIDDEN = 2 * B * OBS * h, 2 * B * h * h  # the first layer of a policy, any hidden layer
PI, V = STATE + HIDDEN + 2 * B * h * ACT, STATE + HIDDEN + 2 * B * h  # a deterministic policy; a value
GAUSSIAN = PI + 2 * B * h * ACT  # twice as many outputs
Q = N * (2 * B * (OBS + ACT) * h + HIDDEN)  # all critics
# A backward pass repeats the forward pass for the weights, and for what goes in; into the first layer nothing needs to.
Q_STEP = Q + Q + N * HIDDEN
POLICY_STEP = GAUSSIAN + Q + Q + 2 * GAUSSIAN - STATE  # through the critics, whose own weights get no gradient
MUON = 3 * 3 * 2 * h**3  # three steps of three products for a matrix


def smac_products():
    width, condition = SCORE["score_hidden"], SCORE["score_condition_hidden"][0]
    score = (OBS + 1) * condition + condition**2 + condition * 64 + 2 * 64 * 64  # the condition, the time
    score += (ACT + 128) * width + SCORE["score_blocks"] * 2 * 4 * width**2 + width * ACT
    gradient = N * (HIDDEN + 2 * B * h * ACT)  # grad_a Q back from the last layer: as many products as its forward pass
    critics = GAUSSIAN + Q + Q_STEP  # TD target and TD loss
    # the score of half policy actions, then grad_a Q: two passes, each with weights and inputs on the way back
    matching = GAUSSIAN / 2 + 2 * B * score + Q_STEP + 3 * gradient
    return critics + matching + POLICY_STEP + (N + 1) * MUON


n = 10  # actions of each kind that Cal-QL asks about
PRODUCTS = {
    "SAC": GAUSSIAN + Q + Q_STEP + POLICY_STEP,
    # the policy moves every second time; TD3's follows the least of all critics, TD3+BC's the first
    "TD3": GAUSSIAN + Q + Q_STEP + POLICY_STEP / 2,
    "TD3+BC": PI + Q + Q_STEP + (PI + Q / N + Q / N + 2 * PI - STATE) / 2,
    "IQL": Q + (3 * V - STATE) + 2 * V + (3 * PI - STATE) + Q_STEP,
    "Cal-QL": GAUSSIAN + n * Q + Q_STEP + 2 * GAUSSIAN + 3 * n * Q_STEP + POLICY_STEP,
    "SMAC": smac_products(),
}


@pytest.mark.parametrize("row", PRODUCTS)
def test_an_update_has_no_more_products_than_the_formula(row):
    update, rows = speed.build(row).update, batch(row)
    counted = speed.flops(lambda: update(rows))
    assert counted <= PRODUCTS[row]
    assert counted > 0.9 * PRODUCTS[row]  # else the formula is to be lowered, or the counter does not see the step


@pytest.mark.parametrize("row", ["SMAC", "Cal-QL"])
def test_sampling_is_one_gather(row):
    """It reads a batch's rows, however many the dataset has."""
    rows = speed.replay(row, speed.transitions(1000))
    with torch.profiler.profile(record_shapes=True) as profile:
        rows.sample(BATCH)
    read = {e.key for e in profile.key_averages(True) if [1000, sum(rows.sizes)] in e.input_shapes}
    assert read - {"aten::select", "aten::as_strided"} == {"aten::index_select"}  # those two are views


# ---- float32 products
def test_products_stay_float32_whoever_multiplies():
    x, y = torch.randn(256, 256), torch.randn(256, 256)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(smac.float32_products(x.device))
        error = ((x @ y).double() - x.double() @ y.double()).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert error < 1e-3  # bfloat16's is near 0.3


@pytest.mark.parametrize(
    "device, capability, amx, precision",
    [
        ("cpu", "AVX512", False, "medium"),
        ("cpu", "AVX512", True, "highest"),
        ("cpu", "AVX2", False, "highest"),
        ("cuda", "AVX512", False, "highest"),
    ],
)
def test_onednn_multiplies_where_it_keeps_float32_and_avx512_is_there(monkeypatch, device, capability, amx, precision):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert smac.float32_products(torch.device(device)) == precision


# ---- the naive reference
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_naive_smac_has_the_same_losses_and_gradients(activation, float32):
    fast = speed.build("SMAC", critic_activation=activation, num_critics=3)
    for p in fast.agent.parameters():  # zero biases would hide a mistake in them
        p.data.add_(0.05 * torch.randn(p.shape))
    naive, rows = speed.NaiveSMAC(fast), batch("SMAC", 64)
    torch.manual_seed(1)
    losses = naive.critic_loss(rows)
    parameters = list(naive.critics.parameters())
    gradients = torch.autograd.grad(losses[0] + fast.args.kappa * losses[1], parameters)
    torch.manual_seed(1)
    metrics = fast.update(rows)
    torch.testing.assert_close(torch.stack(losses), torch.stack([metrics["td_loss"], metrics["sm_loss"]]))
    assert metrics["sm_loss"] > 1e-3  # the comparison is not of zeros
    critic = fast.agent.critic
    stacked = [p.grad.reshape(3, -1) for pair in zip(critic.weights, critic.biases) for p in pair]
    for i, ours in enumerate(stacked):
        theirs = torch.stack([g.reshape(-1) for g in gradients[i :: len(stacked)]])
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_naive_smac_takes_the_same_steps(float32):
    """Five updates of critics, policy, temperature, targets and averages, with Jordan's polynomial in both."""
    fast = speed.build("SMAC", num_critics=3, critic_lr=1e-3, policy_lr=1e-3, temperature_lr=1e-3)
    for optimizer in fast.optimizers.values():
        optimizer.polynomial = KELLER
    naive, rows = speed.NaiveSMAC(fast), [batch("SMAC", 64) for _ in range(5)]
    start = [p.detach().clone() for p in fast.agent.critic.parameters()]
    for update in (fast.update, naive.update):
        torch.manual_seed(1)
        for part in rows:
            metrics = update(part)
        assert metrics["policy_loss"].isfinite()
    for name in ("policy", "policy_target", "policy_average", "log_temperature", "q_scale"):
        ours, theirs = getattr(fast.agent, name), getattr(naive.agent, name)
        pairs = zip(ours.parameters(), theirs.parameters()) if isinstance(ours, torch.nn.Module) else [(ours, theirs)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for stack, modules in ((fast.agent.critic, naive.critics), (fast.agent.critic_target, naive.targets)):
        for i, module in enumerate(modules):
            for layer, W, b in zip(module[::2], stack.weights, stack.biases):
                torch.testing.assert_close(W[i], layer.weight, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(b[i, 0], layer.bias, rtol=1e-3, atol=1e-4)
    assert min((p.detach() - q).abs().max() for p, q in zip(fast.agent.critic.parameters(), start)) > 1e-3


def test_naive_muon_is_muon(float32):
    torch.manual_seed(0)
    wide, tall = torch.nn.Linear(24, 16), torch.nn.Linear(16, 24)
    for layer in (wide, tall):
        copy = torch.nn.Parameter(layer.weight.detach().clone())
        ours = Muon([copy], lr=0.1, polynomial=KELLER)
        naive = speed.NaiveMuon(layer, [layer.weight], 0.1)
        for _ in range(3):
            x = torch.randn(8, layer.in_features)
            copy.grad = torch.autograd.grad((x @ copy.T + layer.bias.detach()).square().sum(), copy)[0]
            naive.descend(layer(x).square().sum())
            ours.step()
            layer.bias.data.zero_()
        torch.testing.assert_close(copy.detach(), layer.weight.detach(), rtol=1e-4, atol=1e-5)


# ---- compilation
needs_compiler = pytest.mark.skipif(
    not os.environ.get("SMAC_TEST_COMPILE") or not shutil.which(os.environ.get("CXX", "g++")),
    reason="minutes of compilation: set SMAC_TEST_COMPILE=1, with a C++ compiler",
)


@needs_compiler
@pytest.mark.parametrize("row", PRODUCTS)
def test_an_update_is_one_graph(row):
    fast, rows = speed.build(row), batch(row)
    smac.compiled(None, mock.Mock(compile=True), torch.device("cpu"))  # its settings
    torch.compile(fast.update, fullgraph=True, dynamic=False, backend="eager")(rows)


@needs_compiler
@pytest.mark.parametrize("row", PRODUCTS)
def test_compiled_updates_go_the_same_way(row, float32):
    sizes = dict(critic_hidden=(32, 32), policy_hidden=(32, 32), score_hidden=32, score_condition_hidden=(32, 32))
    runs = []
    for compile in (False, True):
        fast, rows = speed.build(row, compile, **sizes), speed.replay(row, speed.transitions(1000))
        torch.manual_seed(1)
        for _ in range(200):
            metrics = fast.update(rows.sample(64))
        runs.append((metrics, fast.agent.state_dict()))
    (metrics, state), (compiled_metrics, compiled_state) = runs
    for name, x in metrics.items():
        torch.testing.assert_close(compiled_metrics[name], x, rtol=1e-4, atol=1e-5, msg=name)
    for name, x in state.items():
        # looser than the losses: where a gradient is near 0, Adam makes full steps of what is rounding in it
        worst = (compiled_state[name] - x).norm() / x.norm().clamp(min=1e-3) if x.is_floating_point() else 0
        assert worst < 5e-3, name


# ---- CUDA
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("row", PRODUCTS)
def test_an_update_never_waits_for_the_gpu(row):
    fast, rows = speed.build(row, device="cuda"), speed.replay(row, speed.transitions(1000), "cuda")
    for _ in range(4):
        fast.update(rows.sample(BATCH))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            fast.update(rows.sample(BATCH))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the measurement
def test_turns_are_taken_in_order(monkeypatch):
    called, clock = [], itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    steps = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = speed.take_turns(steps, speed.Args(quick=True))
    assert [len(x) for x in seconds.values()] == [5, 5]
    assert called[-20:] == list("aabb") * 5  # two calls a turn, since a call seems to take longer than a turn shall


def test_the_table_is_written(tmp_path, monkeypatch, capsys):
    def take_turns(steps, args):
        for step in steps.values():
            step()
        return {key: [1.0, 2.0, 4.0] if "eager" in key else [2.0, 4.0, 4.0] for key in steps}

    monkeypatch.setattr(speed, "take_turns", take_turns)
    monkeypatch.setattr(speed, "transitions", lambda n, small=speed.transitions: small(400))
    monkeypatch.setitem(speed.PEERS, "TD3+BC", ("no-such-library", mock.Mock(side_effect=ImportError("gone"))))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick", "--only", "TD3+BC", "SMAC", "--out", f"{tmp_path}/s.csv"])
    speed.main()
    assert "TD3+BC: left out beside no-such-library" in capsys.readouterr().out
    with open(tmp_path / "s.csv", newline="") as f:
        table = list(csv.DictReader(f))
    one = {(line["row"], line["contender"]): line for line in table}
    smac_line = one["SMAC", "eager"]
    assert [float(smac_line[k]) for k in ("value", "low", "high", "ratio")] == [0.5, 0.25, 1.0, 2.0]
    assert float(smac_line["gflop"]) == pytest.approx(PRODUCTS["SMAC"] / 1e9, rel=1e-3)
    assert one["TD3+BC", "eager"]["ratio"] == "" and ("TD3+BC", "peer") not in one
    assert smac_line["torch"] == torch.__version__ and smac_line["threads"] == "1"
    sigma = [float(one["2 x 256 x 256", "ours"][k]) for k in ("sigma_5", "sigma_50", "sigma_max")]
    most = 1.8 if muon.bf16_is_fast(torch.device("cpu")) else 1.3  # its rounding lifts one value in a hundred
    assert 0.5 < sigma[0] < sigma[1] < sigma[2] < most


def test_random_transitions_end_their_episodes():
    columns = speed.transitions(1000)
    assert list(columns) == list(smac.COLUMNS)
    ends = np.flatnonzero(columns["terminals"] | columns["cuts"])
    assert ends[-1] == 999 and np.diff(ends).max() <= 200
    assert not (columns["terminals"] & columns["cuts"]).any()
