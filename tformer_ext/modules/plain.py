"""Which modules may be passed by: what they do is known, and nobody would see that they were not called."""

from torch.nn.modules.module import _has_any_global_hook


def is_plain(module, kind):
    """Whether a call of module does what `kind` does and nothing else: no subclass, no hook, no forward of its own."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )
