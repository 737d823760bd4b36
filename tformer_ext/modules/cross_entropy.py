"""CrossEntropyLoss on the fused cross entropy."""

from torch import nn

from .. import functional as F


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss: same constructor, results and errors; what is fused `functional.cross_entropy` says.

    input: logits (M, N); target: (M,) int64; all else that torch takes is torch's.
    """

    def forward(self, input, target):
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
