"""Muon: momentum, orthogonalised, for matrices; Adam for all else. One optimiser, one process.

    optimizer = Muon(hidden_matrices, other_parameters, lr=3e-4)

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Bernstein & Newhouse 2024)
replaces the momentum of a weight matrix by the nearest matrix whose singular values are all about
1. Use it for the hidden matrices of a network and keep input layers, output heads, biases and
scalars on Adam. A stack of matrices (N, out, in), such as the hidden layer of a critic ensemble, is
treated as N separate matrices. All matrices of one shape take one batched product.

What differs from the reference code (KellerJordan/Muon): gradients are left as they were, a
parameter without a gradient does not move, float32 is used where bfloat16 would be slow, and
`POLYNOMIAL` takes three steps, not five.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.adam import adam  # the function behind torch.optim.Adam

# Keller Jordan's quintic, five times, after a division by the Frobenius norm: the reference, and
# torch.optim.Muon's.
KELLER = ((3.4445, -4.7750, 2.0315),) * 5
# Three odd quintics, each the best approximation of 1 on the interval that the one before leaves
# (Polar Express, Amsel et al. 2025, arXiv 2505.16932), computed for singular values in [0.01, 1] by
# linear programming. They follow a division by the Schatten-4 norm, which bounds the largest
# singular value about 3 times tighter than the Frobenius norm and costs nothing: it comes from X
# X^T, which the first quintic needs. Three steps do what Jordan's five do (docs/smac.md).
POLYNOMIAL = ((8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


@torch.compiler.assume_constant_result
def bf16_is_fast(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices faster than float32 ones. A CPU without units
    for it is 30 times slower."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def orthogonalize(G: Tensor, polynomial: tuple = POLYNOMIAL) -> Tensor:
    """Move the singular values of each matrix in G (..., out, in) towards 1, keep its vectors.

    X <- a X + b (X X^T) X + c (X X^T)^2 X for each (a, b, c) of `polynomial`, on the shorter side.
    """
    X = G.to(torch.bfloat16) if bf16_is_fast(G.device) else G
    tall = X.size(-2) > X.size(-1)
    X = (X.mT if tall else X).reshape(-1, *sorted(X.shape[-2:]))
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for step, (a, b, c) in enumerate(polynomial):
        A = X @ X.mT
        if step == 0 and polynomial is not KELLER:
            # The largest singular value is at most ||X X^T||_F^(1/2). 2 % more: of a matrix of rank
            # one it is exactly that, and bfloat16 rounds by 0.4 %. Above 1 the quintics are steep:
            # they make 9.7 of 1.002.
            square = 1.02 * A.norm(dim=(-2, -1), keepdim=True) + 1e-7
            A, X = A / square, X / square.sqrt()
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.view(*G.shape[:-2], *X.shape[-2:])
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, Adam for `others`.

    matrices: parameters of shape (out, in) or (N, out, in), as they multiply column vectors.
    others: parameters of any shape. Both take the rate `lr`, a tensor in each group: use fill_.
    scale: "rms" multiplies the orthogonal update by 0.2 sqrt(max(out, in)): its entries are as
        large as Adam's (Moonlight, arXiv 2502.16982), and Adam's rates carry over.
        "spectral" multiplies it by sqrt(max(1, out / in)) (Jordan).
    momentum: 0.95, Nesterov (Jordan). betas, eps: torch.optim.Adam's. No weight decay, as SMAC.
    """

    def __init__(
        self,
        matrices,
        others=(),
        lr: float = 3e-4,
        momentum: float = 0.95,
        scale: str = "rms",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        polynomial: tuple = POLYNOMIAL,
    ):
        matrices, others = list(matrices), list(others)
        for p in matrices:
            if p.dim() not in (2, 3):
                raise ValueError(
                    f"Muon takes (out, in) or (N, out, in), not {tuple(p.shape)}: put it in others."
                )
        if scale not in ("rms", "spectral"):
            raise ValueError(f'scale is "rms" or "spectral", not {scale!r}.')
        groups = [{"params": matrices, "muon": True}] if matrices else []
        # fused: torch then keeps `step` on its device
        groups += [{"params": others, "muon": False, "fused": True}] if others else []
        self.polynomial = polynomial
        super().__init__(groups, dict(lr=lr, momentum=momentum, scale=scale, betas=betas, eps=eps))
        # The whole state exists from the start: a checkpoint always has the same keys, and CUDA
        # graphs fixed addresses.
        for group in self.param_groups:
            # a tensor, not a number: torch.compile would compile anew for each number
            group["lr"] = torch.tensor(float(lr), device=group["params"][0].device)
            for p in group["params"]:
                if group["muon"]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                else:
                    self.state[p]["step"] = torch.zeros((), device=p.device)
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    def load_state_dict(self, state_dict: dict) -> None:
        scales = [group["scale"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, scale in zip(self.param_groups, scales):
            group["scale"] = scale  # the constructor's, a flag, and not the checkpoint's
            # torch moves the state to its device, but not this
            group["lr"] = group["lr"].to(group["params"][0].device)

    @torch.no_grad()
    def step(self) -> None:
        # torch.compile does not trace the fused kernel, it fuses by itself
        compiling = torch.compiler.is_compiling()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["muon"]:
                self._muon_step(params, group)
            elif params:
                states = [self.state[p] for p in params]
                # on a CPU the fused kernel overlooks strides
                grads = [p.grad.contiguous() for p in params]
                adam(
                    params,
                    grads,
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    [],
                    [s["step"] for s in states],
                    fused=not compiling,
                    foreach=compiling,
                    capturable=compiling,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=0.0,
                    eps=group["eps"],
                    maximize=False,
                )

    def _muon_step(self, params: list[Tensor], group: dict) -> None:
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        # out of place: the gradients stay readable
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        same_shape = defaultdict(list)
        for p, u in zip(params, nesterov):
            same_shape[p.shape[-2:]].append((p, u.reshape(-1, *p.shape[-2:])))
        for (rows, columns), members in same_shape.items():
            if group["scale"] == "rms":
                size = 0.2 * max(rows, columns) ** 0.5
            else:
                size = max(1.0, rows / columns) ** 0.5
            stack = torch.cat([u for _, u in members]) if len(members) > 1 else members[0][1]
            updates = orthogonalize(stack, self.polynomial).split([len(u) for _, u in members])
            for (p, _), update in zip(members, updates):
                p.addcmul_(update.view_as(p), group["lr"], value=-size)
