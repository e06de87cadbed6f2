"""The experts of one process in capacity mode: gather, two batched products, bias, GELU, gate, combine, and back.

    forward     x_e = gather(x)    pre = x_e @ w1    h = gelu(pre + b1)    y = gate * (h @ w2 + b2)[row]
    kept        x_e and pre: no activation of the wide kind is stored twice, and no answers
    backward    dy_e = gather(dy)  dh = dy_e @ w2^T  (gate * h, d_pre, d_b1, d_gate) from pre and dh in one pass
                d_w2 = (gate * h)^T @ dy_e           d_w1 = x_e^T @ d_pre     dx = (d_pre @ w1^T)[row]

The gate's gradient is dy . (h @ w2 + b2) = (dy @ w2^T) . h + dy . b2, and dy @ w2^T is computed anyway if the gate is
multiplied in later. The products are cuBLAS's, whose batches of equal sizes come within a few percent of one large one.

Letters: T tokens, H hidden, F FFN hidden, L experts, C rows of each expert's buffer, R = L * C.
"""

import torch
from torch.autograd.function import once_differentiable

from megatron.moe.kernels.gelu import bias_gelu, bias_gelu_backward
from megatron.moe.kernels.rows import combine, gather, gather_gradients


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, gate_T, w1_LHF, b1_LF, w2_LFH, b2_LH, token_R, row_T, expert_T):
        L = w1_LHF.size(0)
        x_LCH = gather(x_TH, token_R).view(L, -1, x_TH.size(1))
        pre_LCF = torch.bmm(x_LCH, w1_LHF)
        y_RH = torch.bmm(bias_gelu(pre_LCF, b1_LF), w2_LFH).flatten(0, 1)
        ctx.save_for_backward(x_LCH, pre_LCF, gate_T, w1_LHF, b1_LF, w2_LFH, b2_LH, token_R, row_T, expert_T)
        return combine(y_RH, b2_LH, row_T, expert_T, gate_T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        x_LCH, pre_LCF, gate_T, w1_LHF, b1_LF, w2_LFH, b2_LH, token_R, row_T, expert_T = ctx.saved_tensors
        L, C, _ = x_LCH.shape
        dy_RH, gate_R, bias_dot_R = gather_gradients(dy_TH.contiguous(), b2_LH, token_R, expert_T, gate_T)
        dy_LCH, gate_LC = dy_RH.view(L, C, -1), gate_R.view(L, C)
        dh_LCF = torch.bmm(dy_LCH, w2_LFH.mT)
        gated_LCF, d_pre_LCF, d_b1_LF, dot_LC = bias_gelu_backward(pre_LCF, b1_LF, dh_LCF, gate_LC)
        d_w2_LFH = torch.bmm(gated_LCF.mT, dy_LCH)
        del gated_LCF
        d_b2_LH = torch.bmm(gate_LC[:, None].to(dy_LCH.dtype), dy_LCH)[:, 0]
        d_w1_LHF = torch.bmm(x_LCH.mT, d_pre_LCF)
        dx_TH = gather(torch.bmm(d_pre_LCF, w1_LHF.mT).flatten(0, 1), row_T)
        d_gate_R = dot_LC.flatten() + bias_dot_R
        d_gate_T = torch.where(row_T >= 0, d_gate_R[row_T.clamp(min=0)], 0.0)
        return dx_TH, d_gate_T, d_w1_LHF, d_b1_LF.to(b1_LF.dtype), d_w2_LFH, d_b2_LH.to(b2_LH.dtype), None, None, None


def feed_forward(
    x_TH: torch.Tensor,
    gate_T: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    token_R: torch.Tensor,
    row_T: torch.Tensor,
    expert_T: torch.Tensor,
) -> torch.Tensor:
    """Each token's answer from its expert, weighted by its gate, [T, H]; zeros for a token without a row.

    Args:
        x_TH: tokens, in the number format of the weights.
        gate_T: fp32.
        weights: w1 [L, H, F], b1 [L, F], w2 [L, F, H], b2 [L, H].
        token_R: int32, the token in each row of the experts' buffers, or -1.
        row_T: int32, the row of each token, or -1.
        expert_T: int32, the expert of each token.
    """
    return _FeedForward.apply(x_TH, gate_T, *weights, token_R, row_T, expert_T)
