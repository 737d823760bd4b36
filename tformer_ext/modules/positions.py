"""What tells a query how far away a key is: rotary embedding and the slopes of ALiBi."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates pairs of features of queries and keys by an angle that grows with the position (Su et al. 2021).

    Pair n of d features turns by position * base ** (-2 n / d). No parameters: state_dicts stay as they are.

    Args:
        base: of the geometric series of wave lengths.
        dim: d, the first features of a head that are rotated, an even number; None = all.
        interleaved: pairs are (2 n, 2 n + 1) as in the paper and GPT-J; else (n, n + d / 2) as in GPT-NeoX and Llama.
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False

    def check(self, head_dim):
        """Raises unless heads of so many features can be rotated."""
        d = head_dim if self.dim is None else self.dim
        if d % 2 or not 0 < d <= head_dim:
            raise ValueError(f"rotary: expected an even dim up to the head dimension {head_dim}, got {d}")

    def __call__(self, x, first=0):
        """x (B, H, S, D), whose rows stand at positions first, first + 1, ..."""
        d = x.shape[-1] if self.dim is None else self.dim
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        n = torch.arange(0, d, 2, dtype=wide, device=x.device)
        position = torch.arange(first, first + x.shape[-2], dtype=wide, device=x.device)
        angle = position.unsqueeze(-1) * self.base ** (-n / d)
        cos, sin = angle.cos(), angle.sin()
        turned, rest = x[..., :d], x[..., d:]
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack((a, b), -1).flatten(-2) if self.interleaved else torch.cat((a, b), -1)
        turned = turned.to(x.dtype)
        return turned if d == x.shape[-1] else torch.cat((turned, rest), -1)


def alibi_slopes(heads, device=None):
    """(heads) float32: 2 ** (-8 n / heads), n = 1, 2, ...; other than powers of two as the paper's code fills them up.

    Source: Press et al. 2022.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * torch.arange(1, power + 1, device=device))
    if power < heads:
        between = torch.arange(1, 2 * (heads - power), 2, device=device)
        slopes = torch.cat([slopes, 2.0 ** (-4.0 / power * between)])
    return slopes
