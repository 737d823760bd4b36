"""The encoder-decoder of translation.py and summarization.py, and its search for the best output."""

import torch
from common import END, PAD, START, UNKNOWN, pad, widen
from simple_transformer import TokenEmbedding
from torch import nn
from torch.nn import functional

import tformer_ext as tx


class Seq2Seq(nn.Module):
    """Encoder-decoder that may copy: a word of the output comes from the vocabulary or from the source.

    The copying is that of See et al. 2017 ("Get To The Point"): one more attention over the source, whose weights are
    probabilities of the source's tokens, and a gate between the two. Names and rare words so need not be learned.

    Ids from `vocabulary` on are words that only this one source has: they are read as UNKNOWN and may be copied.

    modules: torch.nn or tformer_ext; both have the classes used here, with the same arguments and weights.
    """

    def __init__(self, modules, vocabulary, d_model, layers, dropout=0.1):
        super().__init__()
        self.modules_of = modules
        self.embed = TokenEmbedding(vocabulary, d_model, dropout)
        sizes = {"d_model": d_model, "nhead": d_model // 32, "dim_feedforward": 4 * d_model, "dropout": dropout}
        encoder_layer = modules.TransformerEncoderLayer(**sizes, batch_first=True, norm_first=True)
        decoder_layer = modules.TransformerDecoderLayer(**sizes, batch_first=True, norm_first=True)
        norms = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.encoder = modules.TransformerEncoder(encoder_layer, layers, norms[0], enable_nested_tensor=False)
        self.decoder = modules.TransformerDecoder(decoder_layer, layers, norms[1])
        self.copy_query = nn.Linear(d_model, d_model)
        self.copy_gate = nn.Linear(d_model, 1)

    def known(self, ids):
        return ids.masked_fill(ids >= self.embed.embedding.num_embeddings, UNKNOWN)

    def encode(self, source):
        """Memory (B, S, d_model) of source ids (B, S)."""
        return self.encoder(self.embed(self.known(source)), src_key_padding_mask=source == PAD)

    def decode(self, target, memory, source, cache=None):
        """Log-probabilities (B, T, vocabulary and the source's own words) of what follows each of target (B, T).

        With a cache (tx.KeyValueCache) target holds only the positions that came since the call before.
        """
        start = 0 if cache is None else cache.length
        # A cache makes self-attention causal by itself.
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]) if cache is None else None
        x = self.decoder(
            self.embed(self.known(target), start),
            memory,
            tgt_mask=mask,
            tgt_is_causal=mask is not None,
            memory_key_padding_mask=source == PAD,
            **({} if cache is None else {"cache": cache}),
        )
        words = widen(functional.linear(x, self.embed.embedding.weight)).softmax(-1)
        words = functional.pad(words, (0, max(0, int(source.max()) + 1 - words.shape[-1])))
        scores = widen(self.copy_query(x) @ memory.mT) * x.shape[-1] ** -0.5
        copied = scores.masked_fill((source == PAD)[:, None], -torch.inf).softmax(-1)
        gate = widen(self.copy_gate(x)).sigmoid()
        index = source[:, None].expand_as(copied)
        return (words * gate).scatter_add(-1, index, copied * (1 - gate)).clamp_min(1e-12).log()

    def new_cache(self):
        """The state of incremental decoding; None with torch.nn's modules, which have none."""
        return tx.KeyValueCache() if self.modules_of is tx else None


def loss_of(model, batch):
    """Mean of -log p over the target tokens of [(source ids, target ids)]."""
    source = pad([source for source, _ in batch])
    given, wanted = pad([[START, *target] for _, target in batch]), pad([[*target, END] for _, target in batch])
    log_p = model.decode(given, model.encode(source), source)
    return functional.nll_loss(log_p.flatten(0, 1), wanted.flatten(), ignore_index=PAD)


@torch.inference_mode()
def search(model, source, beams=1, max_length=48, length_power=0.7, forbidden=(PAD, START), repeat=True):
    """The outputs (lists of ids without START and END) found by beam search for source ids (B, S); 1 beam is greedy.

    At each step the `beams` most probable beginnings of each source are kept. In the end the best one is that with the
    highest log-probability over (length ** length_power). `forbidden` ids are never put out; with repeat=False no three
    ids follow each other twice.
    """
    batch, memory, cache = len(source), model.encode(source), model.new_cache()
    tokens = torch.full((batch, 1), START)
    # The log-probability of each beginning: (B, beginnings). Elsewhere they are B * beginnings rows.
    total = torch.zeros(batch, 1)
    for _ in range(max_length):
        given = tokens if cache is None else tokens[:, -1:]
        log_p = model.decode(given, memory, source, cache)[:, -1]
        log_p[:, list(forbidden)] = -torch.inf
        if not repeat:
            same = (tokens[:, :-2] == tokens[:, -2:-1]) & (tokens[:, 1:-1] == tokens[:, -1:])
            log_p.masked_fill_(torch.zeros_like(log_p).scatter_add_(1, tokens[:, 2:], same.to(log_p)) > 0, -torch.inf)
        ended = (tokens == END).any(1)
        log_p[ended] = -torch.inf
        log_p[ended, END] = 0.0  # an output that has ended stays as it is
        scores = (total.flatten()[:, None] + log_p).unflatten(0, (batch, -1)).flatten(1)
        total, index = scores.topk(min(beams, scores.shape[1]))
        rows = torch.arange(batch)[:, None] * (len(tokens) // batch) + index // log_p.shape[1]
        rows, chosen = rows.flatten(), (index % log_p.shape[1]).flatten()
        tokens = torch.cat([tokens[rows], chosen[:, None]], dim=1)
        if (tokens == END).any(1).all():
            break
        if cache is not None:
            cache.reorder(rows)
        memory, source = memory[rows], source[rows]
    lengths = (tokens[:, 1:-1] != END).sum(1).unflatten(0, (batch, -1)) + 1  # END counts, where it was reached
    best = (total / lengths**length_power).argmax(1)
    outputs = tokens.unflatten(0, (batch, -1))[torch.arange(batch), best, 1:].tolist()
    return [[token for token in output if token != END] for output in outputs]


def search_all(model, rows, **arguments):
    """search for any number of sources (lists of ids), those of about equal length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = {}
    for i in range(0, len(order), 50):
        part = order[i : i + 50]
        found.update(zip(part, search(model, pad([rows[j] for j in part]), **arguments), strict=True))
    return [found[i] for i in range(len(rows))]
