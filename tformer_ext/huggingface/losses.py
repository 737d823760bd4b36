"""transformers' losses of language models on the fused cross entropy.

transformers widens 16-bit logits to float32 before it takes their loss. The kernels sum in float32 and leave the logits
as they are: what is equal are the numbers, what is saved are two copies of the logits and two of their gradient.
"""

import inspect

import torch

from ..ops.cross_entropy import plain_cross_entropy
from .logits import DeferredLogits


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    """ForCausalLMLoss: that of logits (B, S, V) for the labels (B, S) of the next token; float32, a scalar."""
    targets = shift_labels
    if targets is None:
        targets = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = _loss(logits, targets, vocab_size, num_items_in_batch, ignore_index)
    if loss is None:
        from transformers.loss.loss_utils import ForCausalLMLoss as stock

        return stock(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    return loss


def masked_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
    """ForMaskedLMLoss: that of logits (B, S, V) for labels (B, S); float32, a scalar."""
    loss = _loss(logits, labels, vocab_size, num_items_in_batch, ignore_index)
    if loss is None:
        from transformers.loss.loss_utils import ForMaskedLMLoss as stock

        return stock(logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs)
    return loss


def _loss(logits, targets, vocab_size, num_items_in_batch, ignore_index):
    """The mean over targets, or the sum divided by num_items_in_batch; None where the stock loss is to be called."""
    if logits.device != targets.device or not logits.is_contiguous():
        return None
    reduction = "mean" if num_items_in_batch is None else "sum"
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    rows, targets = logits.view(-1, vocab_size), targets.reshape(-1)
    if isinstance(rows, DeferredLogits):
        return rows.loss(targets, ignore_index, reduction, divisor=num_items_in_batch)
    loss = plain_cross_entropy(rows, targets, ignore_index, reduction)
    if loss is None:
        return None
    loss = loss.float()  # transformers narrows float64 logits
    return loss if num_items_in_batch is None else loss / num_items_in_batch


FUSED = {"ForCausalLMLoss": causal_lm_loss, "ForMaskedLMLoss": masked_lm_loss}


def fused_loss(model):
    """(the stock loss function, ours) of a transformers model whose forward calls one with a fused form, or None."""
    if "_loss_function" in model.__dict__ or not _calls_loss_function(type(model)):
        return None
    from transformers.loss import loss_utils

    kind = getattr(model, "loss_type", None)  # as PreTrainedModel.loss_function, which would warn of unknown ones
    stock = loss_utils.LOSS_MAPPING.get(kind, loss_utils.LOSS_MAPPING["ForCausalLM"])
    known = stock.__module__ == loss_utils.__name__ and stock.__name__ in FUSED
    return (stock, FUSED[stock.__name__]) if known else None


def _calls_loss_function(kind):
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names
