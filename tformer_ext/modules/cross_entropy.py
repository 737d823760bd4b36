"""CrossEntropyLoss and LinearCrossEntropyLoss on the fused cross entropy."""

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


if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13

    class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss):
        """torch.nn.LinearCrossEntropyLoss: same constructor, parameters, results and errors; what is fused
        `functional.linear_cross_entropy` says. Options for torch's own chunks make the call torch's.

        input: (M, in_features); target: (M,) int64; all else that torch takes is torch's.
        """

        def forward(self, input, target):
            shape = self.num_classes, *self.out_features
            bias = self.linear.bias
            return F.linear_cross_entropy(
                input,
                self.linear.weight.view(*shape, -1),
                target,
                linear_bias=None if bias is None else bias.view(shape),
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
            )
