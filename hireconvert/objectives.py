"""Losses of the finetune: divergence of the logits, layer outputs, the text itself.

A vocabulary of 262,144 makes one float32 row of logits a megabyte, so the divergence is taken over
a few positions at a time and its gradient with respect to the hidden states is computed in the
same pass: no more than one chunk of logits is ever alive.

Shape suffixes: N rows (positions), D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hireconvert.measures import logit_chunks

Head = Callable[[torch.Tensor], torch.Tensor]

# Logits held at once, in elements: four float32 tensors of this size live together.
LOGITS_AT_ONCE = 2**22


class _Chunked(torch.autograd.Function):
    """Mean loss of the logits over positions; its input's gradient is computed going forward."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, loss: Any) -> torch.Tensor:
        leaf_ND = hidden_ND.detach().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        with torch.enable_grad():
            for rows in loss.chunks:
                part = loss(leaf_ND[rows], rows)
                part.backward()
                total += float(part.detach())
        ctx.save_for_backward(leaf_ND.grad)
        return total.to(hidden_ND.device, torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grads[0], None


class LogitsLoss:
    """Weighted sum of KL(teacher || student) and cross-entropy, in nats per position.

    `student_head` and `teacher_head` give float32 logits [N, V] of hidden states [N, D];
    `target_N` holds the next tokens. The student's head receives gradients where its weights
    ask for them.
    """

    def __init__(
        self,
        student_head: Head,
        teacher_head: Head,
        teacher_ND: torch.Tensor,
        target_N: torch.Tensor,
        *,
        kl: float,
        lm: float,
        vocabulary: int,
    ) -> None:
        self.student_head, self.teacher_head = student_head, teacher_head
        self.teacher_ND, self.target_N = teacher_ND, target_N
        self.kl, self.lm = kl, lm
        self.chunks = logit_chunks(len(target_N), vocabulary, LOGITS_AT_ONCE)

    def __call__(self, hidden_ND: torch.Tensor, rows: slice) -> torch.Tensor:
        """This chunk's share of the mean."""
        log_NV = self.student_head(hidden_ND).log_softmax(-1)
        total = log_NV.new_zeros(())
        if self.kl:
            with torch.no_grad():
                teacher_NV = self.teacher_head(self.teacher_ND[rows]).log_softmax(-1)
            kl = F.kl_div(log_NV, teacher_NV, reduction="sum", log_target=True)
            total = total + self.kl * kl
        if self.lm:
            total = total + self.lm * F.nll_loss(log_NV, self.target_N[rows], reduction="sum")
        return total / len(self.target_N)

    def mean(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The loss over all positions, a scalar."""
        return _Chunked.apply(hidden_ND, self)


def feature_loss(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of ||student - teacher||^2 / ||teacher||^2 (SquareHead, arXiv 2310.06927).

    Each row of a layer counts relative to the teacher's mean square, rows whose norm is more than
    ten times the median (attention sinks) left out: one of them would outweigh all others.
    """
    parts = []
    for mine_ND, theirs_ND in zip(student, teacher, strict=True):
        size_N = theirs_ND.square().sum(-1)
        usual_N = size_N <= 100 * size_N.median()
        error_N = (mine_ND - theirs_ND).square().sum(-1)
        parts.append(error_N[usual_N].sum() / size_N[usual_N].sum().clamp_min(1e-12))
    return torch.stack(parts).mean()
