"""Cross entropy of logits in plain PyTorch."""

import torch


def cross_entropy(input, target, *, ignore_index=-100, label_smoothing=0.0):
    """-(1 - s) log p[target] - s mean(log p) of each row, p = softmax(input): (...), float32 (float64 for float64).

    input: (..., N) logits; target: (...) int64, 0 to N - 1, or ignore_index, whose rows have loss 0 and no gradient;
    s: label_smoothing.
    """
    rows = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    ignored = target == ignore_index
    log_p = torch.log_softmax(rows, -1)
    loss = -log_p.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    return torch.where(ignored, 0, loss)
