"""The top-1 layer whose experts are all on this process and have buffers of a fixed capacity, as one function.

    forward     gate, slots     expert, gate and row of each token
                x_e = gather(x)    pre = x_e @ w1    h = gate * gelu(pre + b1)    y = (h @ w2)[row] + gate * b2
    kept        x, x_e, pre, h
    backward    dy_e = gather(dy)  dh = dy_e @ w2^T  d_pre, d_b1 and dh . h from pre and dh in one pass
                d_w2 = h^T @ dy_e  d_w1 = x_e^T @ d_pre
                dx_e = d_pre @ w1^T, gathered where the router's part of dx is computed

The gate's gradient is dy . (gelu @ w2 + b2) = (dy @ w2^T) . gelu + dy . b2, and dy @ w2^T is computed anyway. So
expert outputs are not kept, and the gate, applied to the activations, costs nothing. The products are cuBLAS's:
batches of equal sizes come within a few percent of one large product.

Shapes: T tokens, H hidden, F FFN hidden, E experts, C rows of each expert's buffer, R = E * C.
"""

import torch
from torch.autograd.function import once_differentiable

from megatron.moe.kernels.gate import NO_BALANCE, Balance, Gating, launch_backward, launch_forward
from megatron.moe.kernels.gelu import bias_gelu, bias_gelu_backward, dot_parts
from megatron.moe.kernels.permute import combine, gather, gather_gradients


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, router_EH, w1_EHF, b1_EF, w2_EFH, b2_EH, capacity, random, balance):
        E = router_EH.size(0)
        decided, kept = launch_forward(x_TH, router_EH, capacity, random, balance=balance)
        x_RH, gate_R = gather(x_TH, decided.token_R, decided.gate_T)
        x_ECH, gate_EC = x_RH.view(E, capacity, -1), gate_R.view(E, capacity)
        pre_ECF = torch.bmm(x_ECH, w1_EHF)
        h_ECF = bias_gelu(pre_ECF, b1_EF, gate_EC)
        y_RH = torch.bmm(h_ECF, w2_EFH).flatten(0, 1)
        y_TH = combine(y_RH, b2_EH, decided.row_T, decided.expert_T, decided.gate_T)
        ctx.save_for_backward(
            x_TH, router_EH, *kept, decided.token_R, x_ECH, pre_ECF, h_ECF, gate_EC, w1_EHF, b1_EF, w2_EFH, b2_EH
        )
        ctx.set_materialize_grads(False)
        rest = (decided.gate_T, *decided[3:])
        ctx.mark_non_differentiable(*rest)
        return y_TH, decided.aux_loss.clone(), decided.z_loss.clone(), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH, d_aux, d_z, *_):
        x_TH, router_EH, *kept, token_R, x_ECH, pre_ECF, h_ECF, gate_EC, w1_EHF, b1_EF, w2_EFH, b2_EH = (
            ctx.saved_tensors  # once: with activation checkpointing each access would compute them anew
        )
        expert_T = kept[0]
        E, C, F = pre_ECF.shape
        dy_TH = torch.zeros_like(x_TH) if dy_TH is None else dy_TH.contiguous()
        d_gate_R = gate_EC.new_empty(E * C, dot_parts(F))  # in parts
        dy_ECH = gather_gradients(dy_TH, b2_EH, token_R, expert_T, d_gate_R).view(E, C, -1)
        d_w2_EFH = torch.bmm(h_ECF.mT, dy_ECH)
        d_b2_EH = torch.bmm(gate_EC[:, None].to(dy_ECH.dtype), dy_ECH)[:, 0]
        d_pre_ECF = torch.bmm(dy_ECH, w2_EFH.mT)  # dh at first
        del dy_ECH
        d_b1_EF = bias_gelu_backward(pre_ECF, b1_EF, d_pre_ECF, gate_EC, d_gate_R)
        d_w1_EHF = torch.bmm(x_ECH.mT, d_pre_ECF)
        dx_RH = torch.bmm(d_pre_ECF, w1_EHF.mT).flatten(0, 1)
        del d_pre_ECF
        dx_TH, d_router_EH = launch_backward(x_TH, router_EH, kept, d_gate_R, (d_aux, d_z), dx_RH, by_row=True)
        biases = d_b1_EF.to(b1_EF.dtype), d_b2_EH.to(b2_EH.dtype)
        return dx_TH, d_router_EH, d_w1_EHF, biases[0], d_w2_EFH, biases[1], None, None, None


def top1_layer(
    x_TH: torch.Tensor,
    router_EH: torch.Tensor,
    experts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    capacity: int,
    *,
    random: bool,
    balance: Balance = NO_BALANCE,
) -> tuple[torch.Tensor, Gating]:
    """The output of each token's expert, times its gate, [T, H]; zeros for a dropped token.

    Args:
        x_TH: tokens, at least one, in the number format of the weights; contiguous.
        router_EH: the router's weight.
        experts: w1 [E, H, F], b1 [E, F], w2 [E, F, H], b2 [E, H].
        capacity: C.
        random: see :func:`megatron.moe.kernels.gate.gate`.
        balance: see :class:`megatron.moe.kernels.gate.Balance`.

    Returns:
        The outputs; and the decisions, of which only the losses carry gradients here.
    """
    y_TH, aux_loss, z_loss, gate_T, *rest = _Layer.apply(
        x_TH, router_EH.contiguous(), *experts, capacity, random, balance
    )
    return y_TH, Gating(gate_T, aux_loss, z_loss, *rest)
