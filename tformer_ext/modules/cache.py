"""Keys and values kept between the steps of incremental decoding."""

import torch


class AttentionCache:
    """Keys and values of one attention: those of every step (grows), or of the first one for good (fixed)."""

    def __init__(self, fixed=False, capacity=64):
        self.fixed = fixed
        self.capacity = capacity
        self.length = 0
        self._key = self._value = None  # (B, capacity, Hk, D): a step's rows are written in one piece

    def get(self):
        """(key, value), both (B, Hk, length, D)."""
        return tuple(t[:, : self.length].transpose(1, 2) for t in (self._key, self._value))

    def append(self, key, value):
        """Adds key and value (B, Hk, L, D); returns those of all steps."""
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("cache: expected decoding under torch.no_grad(): a cache keeps no graph")
        end = self.length + key.shape[2]
        if self._key is None:
            self._key, self._value = (self._empty(t, end) for t in (key, value))
        elif key.shape[0] != self._key.shape[0] or key.dtype != self._key.dtype or key.device != self._key.device:
            raise ValueError(
                f"cache: expected batch {self._key.shape[0]}, {self._key.dtype} on {self._key.device} as in the steps "
                f"before, got batch {key.shape[0]}, {key.dtype} on {key.device}"
            )
        elif end > self._key.shape[1]:
            old = self._key[:, : self.length], self._value[:, : self.length]
            self._key, self._value = (self._empty(t, max(end, 2 * self._key.shape[1])) for t in (key, value))
            for new, rows in zip((self._key, self._value), old, strict=True):
                new[:, : self.length] = rows
        self._key[:, self.length : end] = key.transpose(1, 2)
        self._value[:, self.length : end] = value.transpose(1, 2)
        self.length = end
        return self.get()

    def _empty(self, t, length):
        length = length if self.fixed else max(length, self.capacity)
        return t.new_empty(t.shape[0], length, t.shape[1], t.shape[3])

    def select(self, index):
        """Entries index (B') of the batch take the place of all."""
        if self._key is not None:
            self._key, self._value = self._key.index_select(0, index), self._value.index_select(0, index)


class LayerCache:
    """The caches of one layer: self_attention grows, cross_attention keeps the projections of memory."""

    def __init__(self, capacity):
        self.self_attention = AttentionCache(capacity=capacity)
        self.cross_attention = AttentionCache(fixed=True)


class KeyValueCache:
    """State of incremental decoding with TransformerDecoder or TransformerEncoder: `model(..., cache=cache)`.

    Each call takes the next positions only, one or several, and sees all of the calls before; self-attention is then
    causal, whatever the layers are told. A mask, if given, is (L, length) or (N * H, L, length), a key padding mask
    (N, length), where length counts the positions of this call too. Works without gradients.

    Args:
        max_length: room made at once; beyond it the cache doubles when it is full.
    """

    def __init__(self, max_length=64):
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length: expected an int above 0, got {max_length!r}")
        self.max_length = max_length
        self.layers = []

    @property
    def length(self):
        """Positions seen so far."""
        return self.layers[0].self_attention.length if self.layers else 0

    def layer(self, index):
        """The LayerCache of a layer, made when first asked for."""
        while len(self.layers) <= index:
            self.layers.append(LayerCache(self.max_length))
        return self.layers[index]

    def reorder(self, index):
        """Batch entries index (int64, (B')) take the place of all, as beam search chooses them."""
        for layer in self.layers:
            layer.self_attention.select(index)
            layer.cross_attention.select(index)

    def crop(self, length):
        """Forgets all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, the positions in the cache, got {length}")
        for layer in self.layers:
            layer.self_attention.length = length

    def __repr__(self):
        return f"KeyValueCache(length={self.length}, layers={len(self.layers)})"
