"""Norms, residual blocks, linear layers and activations of transformers' models on the fused operations.

Each is a subclass that has nothing but a forward: an object of the stock class becomes one by its __class__ alone, so
that parameters, hooks and flags stay what and where they are. It keeps the stock class's name, by which transformers
and accelerate find layers. Which classes of transformers compute the same is said in FORMS.
"""

import importlib
import inspect

import torch

from .. import functional as F
from ..modules import residual_norm
from ..modules.dropout import Dropout, drop
from ..modules.linear import linear
from ..modules.plain import is_plain


class RMSNorm:
    """weight * (x / rms(x)), in the wider type of the two. weight: (N,)."""

    def result_dtype(self, x):
        return torch.promote_types(self.weight.dtype, x.dtype)

    def operands(self):
        return self.weight, self.variance_epsilon

    def forward(self, hidden_states):
        return self.of_sum(hidden_states, None)

    def of_sum(self, x, residual, keep=False):
        """The norm of residual + x, and with keep the sum too; in one operation if all types are the same."""
        dtype = self.result_dtype(x)
        weight, eps = self.operands()
        if residual is not None and x.dtype == residual.dtype == dtype and x.shape == residual.shape:
            return F.residual_rms_norm(x, residual, weight, eps=eps, return_residual=keep)
        x = x if residual is None else residual + x
        y = F.residual_rms_norm(x.to(torch.promote_types(x.dtype, dtype)), None, weight, eps=eps).to(dtype)
        return (y, x) if keep else y


class RMSNormInDtypeOfInput(RMSNorm):
    """RMSNorm whose result has the type of x (GPT-OSS, OLMo 2)."""

    def result_dtype(self, x):
        return x.dtype


class RMSNormAroundOne(RMSNormInDtypeOfInput):
    """(1 + weight) * (x / rms(x)), in the type of x (Gemma)."""

    def operands(self):
        return 1.0 + self.weight.float(), self.eps


class RMSNormInDtypeOfWeight(RMSNorm):
    """RMSNorm whose result has the type of a 16-bit weight, else float32 or wider (T5)."""

    def result_dtype(self, x):
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            return self.weight.dtype
        return torch.promote_types(torch.promote_types(x.dtype, torch.float32), self.weight.dtype)


def add_norm(x, dropout, residual, norm, keep=False):
    """norm(residual + dropout(x)), with keep also the sum; as tformer_ext.modules.residual_norm.add_norm."""
    if isinstance(norm, RMSNorm) and is_plain(norm, type(norm)):
        return norm.of_sum(x if dropout is None else dropout(x), residual, keep)
    return residual_norm.add_norm(x, dropout, residual, norm, keep)


class TransposedLinear:
    """x weight + bias, with a weight of (in, out): GPT-2's Conv1D."""

    def forward(self, x):
        return linear(x, self.weight.t(), self.bias)


class TanhGELU:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), GPT-2's, which the stock classes take in eight operations.

    FastGELUActivation has ten digits of sqrt(2 / pi), which shows in float64 only.
    """

    def forward(self, input):
        return torch.nn.functional.gelu(input, approximate="tanh")


class Block:
    """A block whose forward calls the stock one's submodules in its order; hooks on all of them are called."""

    @staticmethod
    def why_not(module):
        """Why this object of the stock class would gain nothing, or None."""

    def by_name(self, args, kwargs):
        """The arguments after hidden_states by their names in the stock forward."""
        return dict(zip(self.names, args, strict=False)) | kwargs


class PostNormOutput(Block):
    """LayerNorm(dropout(dense(x)) + input): BERT's BertSelfOutput and BertOutput."""

    def forward(self, hidden_states, input_tensor):
        return add_norm(self.dense(hidden_states), self.dropout, input_tensor, self.LayerNorm)


class DistilBertBlock(Block):
    """Attention and feed-forward, each followed by the sum and its norm."""

    def forward(self, hidden_states, *args, **kwargs):
        attended, _ = self.attention(hidden_states, **self.by_name(args, kwargs))
        x = add_norm(attended, None, hidden_states, self.sa_layer_norm)
        return add_norm(self.ffn(x), None, x, self.output_layer_norm)


class LlamaPreNorm(Block):
    """Pre-norm attention and feed-forward; the first sum and the second norm are one operation."""

    def forward(self, hidden_states, *args, **kwargs):
        options = {"attention_mask": None} | self.by_name(args, kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        y, x = add_norm(attended, None, hidden_states, self.post_attention_layernorm, keep=True)
        return x + self.mlp(y)


class GPT2PreNorm(Block):
    def forward(self, hidden_states, *args, **kwargs):
        options = self.by_name(args, kwargs)
        if options.get("encoder_hidden_states") is not None:
            return super().forward(hidden_states, *args, **kwargs)
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            options.pop(name, None)
        attended, _ = self.attn(self.ln_1(hidden_states), **options)
        y, x = add_norm(attended, None, hidden_states, self.ln_2, keep=True)
        return x + self.mlp(y)


class OPTPreNorm(Block):
    @staticmethod
    def why_not(module):
        return None if module.do_layer_norm_before else "it normalises after the sum (do_layer_norm_before=False)"

    def forward(self, hidden_states, *args, **kwargs):
        options = {"attention_mask": None} | self.by_name(args, kwargs)
        options.pop("use_cache", None)
        attended, _ = self.self_attn(hidden_states=self.self_attn_layer_norm(hidden_states), **options)
        dropout = _dropout(self)
        flat = [t.reshape(-1, t.shape[-1]) for t in (attended, hidden_states)]
        y, x = add_norm(flat[0], dropout, flat[1], self.final_layer_norm, keep=True)
        return (x + dropout(self.fc2(self.activation_fn(self.fc1(y))))).view(hidden_states.shape)


class GPTNeoXPreNorm(Block):
    @staticmethod
    def why_not(module):
        return "its residual is parallel: no sum is followed by a norm" if module.use_parallel_residual else None

    def forward(self, hidden_states, *args, **kwargs):
        options = {"attention_mask": None} | self.by_name(args, kwargs)
        attended, _ = self.attention(self.input_layernorm(hidden_states), **options)
        y, x = add_norm(attended, self.post_attention_dropout, hidden_states, self.post_attention_layernorm, keep=True)
        return self.post_mlp_dropout(self.mlp(y)) + x


class BartEncoder(Block):
    """Post-norm attention and feed-forward; each sum and its norm are one operation."""

    def forward(self, hidden_states, *args, **kwargs):
        attended, _ = self.self_attn(hidden_states, **self.by_name(args, kwargs))
        x = add_norm(attended, _dropout(self), hidden_states, self.self_attn_layer_norm)
        x = self.feed_forward(x)
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            bound = torch.finfo(x.dtype).max - 1000
            x = torch.clamp(x, min=-bound, max=bound)
        return x

    def feed_forward(self, x):
        y = self.activation_fn(self.fc1(x))
        y = drop(y, self.activation_dropout) if self.training else y
        return add_norm(self.fc2(y), _dropout(self), x, self.final_layer_norm)


class BartDecoder(BartEncoder):
    """The same with attention to the encoder between the two."""

    def forward(self, hidden_states, *args, **kwargs):
        options = {"attention_mask": None, "cache": None} | self.by_name(args, kwargs)
        memory, memory_mask = (options.pop(f"encoder_{name}", None) for name in ("hidden_states", "attention_mask"))
        options.pop("use_cache", None)
        attended, _ = self.self_attn(hidden_states, **options)
        x = add_norm(attended, _dropout(self), hidden_states, self.self_attn_layer_norm)
        if memory is not None:
            options["attention_mask"] = memory_mask
            attended, _ = self.encoder_attn(x, key_value_states=memory, **options)
            x = add_norm(attended, _dropout(self), x, self.encoder_attn_layer_norm)
        return self.feed_forward(x)


class CLIPPreNorm(Block):
    def forward(self, hidden_states, *args, **kwargs):
        options = self.by_name(args, kwargs)
        attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **options)
        y, x = add_norm(attended, None, hidden_states, self.layer_norm2, keep=True)
        return x + self.mlp(y)


class ViTPreNorm(Block):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        y, x = add_norm(attended, self.dropout, hidden_states, self.layernorm_after, keep=True)
        return self.dropout(self.mlp(y)) + x


def _dropout(layer):
    """For layers that hold the probability only."""
    return Dropout(layer.dropout).train(layer.training)


# form -> "folder.Class ..." of transformers.models, or of a module beside it
FORMS = {
    TransposedLinear: "pytorch_utils.Conv1D",
    TanhGELU: "activations.NewGELUActivation activations.FastGELUActivation activations.AccurateGELUActivation",
    PostNormOutput: """
        bert.BertSelfOutput bert.BertOutput roberta.RobertaSelfOutput roberta.RobertaOutput
        xlm_roberta.XLMRobertaSelfOutput xlm_roberta.XLMRobertaOutput camembert.CamembertSelfOutput
        camembert.CamembertOutput electra.ElectraSelfOutput electra.ElectraOutput ernie.ErnieSelfOutput
        ernie.ErnieOutput deberta.DebertaSelfOutput deberta.DebertaOutput deberta_v2.DebertaV2SelfOutput
        deberta_v2.DebertaV2Output layoutlm.LayoutLMSelfOutput layoutlm.LayoutLMOutput
        layoutlmv3.LayoutLMv3SelfOutput layoutlmv3.LayoutLMv3Output longformer.LongformerSelfOutput
        longformer.LongformerOutput mpnet.MPNetOutput roformer.RoFormerSelfOutput roformer.RoFormerOutput
        """,
    DistilBertBlock: "distilbert.TransformerBlock",
    RMSNorm: """
        llama.LlamaRMSNorm mistral.MistralRMSNorm mixtral.MixtralRMSNorm qwen2.Qwen2RMSNorm
        qwen2_moe.Qwen2MoeRMSNorm qwen3.Qwen3RMSNorm qwen3_moe.Qwen3MoeRMSNorm phi3.Phi3RMSNorm
        granite.GraniteRMSNorm smollm3.SmolLM3RMSNorm deepseek_v3.DeepseekV3RMSNorm olmoe.OlmoeRMSNorm
        """,
    RMSNormInDtypeOfInput: "gpt_oss.GptOssRMSNorm olmo2.Olmo2RMSNorm olmo3.Olmo3RMSNorm",
    RMSNormAroundOne: "gemma.GemmaRMSNorm gemma2.Gemma2RMSNorm gemma3.Gemma3RMSNorm qwen3_next.Qwen3NextRMSNorm",
    RMSNormInDtypeOfWeight: "t5.T5LayerNorm mt5.MT5LayerNorm umt5.UMT5LayerNorm longt5.LongT5LayerNorm",
    LlamaPreNorm: """
        llama.LlamaDecoderLayer mistral.MistralDecoderLayer qwen2.Qwen2DecoderLayer qwen2_moe.Qwen2MoeDecoderLayer
        qwen3.Qwen3DecoderLayer qwen3_moe.Qwen3MoeDecoderLayer smollm3.SmolLM3DecoderLayer gemma.GemmaDecoderLayer
        olmo.OlmoDecoderLayer starcoder2.Starcoder2DecoderLayer
        """,
    BartEncoder: "bart.BartEncoderLayer marian.MarianEncoderLayer plbart.PLBartEncoderLayer",
    BartDecoder: "bart.BartDecoderLayer marian.MarianDecoderLayer plbart.PLBartDecoderLayer",
    CLIPPreNorm: "clip.CLIPEncoderLayer siglip.SiglipEncoderLayer siglip2.Siglip2EncoderLayer",
    ViTPreNorm: "vit.ViTLayer vit_mae.ViTMAELayer deit.DeiTLayer",
    GPT2PreNorm: "gpt2.GPT2Block",
    OPTPreNorm: "opt.OPTDecoderLayer",
    GPTNeoXPreNorm: "gpt_neox.GPTNeoXLayer",
}
_FORM_OF = {name: form for form, names in FORMS.items() for name in names.split()}
_made = {}


def fused_class(stock):
    """The fused subclass of a class of transformers, or None where none is known."""
    folder = stock.__module__.rpartition(".")[2].removeprefix("modeling_")
    form = _FORM_OF.get(f"{folder}.{stock.__name__}")
    if form is None or stock.__module__ != _module_of(folder):
        return None
    if stock not in _made:
        body = {"__module__": __name__, "__qualname__": stock.__name__, "__doc__": form.__doc__}
        body["names"] = tuple(inspect.signature(stock.forward).parameters)[2:]
        _made[stock] = type(stock.__name__, (form, stock), body)
    return _made[stock]


def _module_of(folder):
    """The name of the one that has its classes."""
    beside = folder in ("activations", "pytorch_utils")
    return f"transformers.{folder}" if beside else f"transformers.models.{folder}.modeling_{folder}"


def __getattr__(name):
    """Fused classes by their names, for pickle."""
    for known in _FORM_OF:
        folder, _, of_class = known.partition(".")
        if of_class == name:
            return fused_class(getattr(importlib.import_module(_module_of(folder)), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
