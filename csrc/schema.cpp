// Schemas of all operators: the only place where they are written down.
//
// All are functional: nothing is mutated, no output aliases an input. Their names begin with an underscore
// because they carry no gradient formula: the Python functions check the arguments and wrap these operators
// into autograd Functions.
// Letters: B batch, Hq/Hk query/key heads, Sq/Sk lengths, D/Dv head dimensions; M rows, N columns.
#include <torch/csrc/stable/library.h>

#include "host/registration.h"

STABLE_TORCH_LIBRARY(TFORMER_NAMESPACE, m) {
  // Attention: softmax(softcap(scale * query @ key^T) + bias + alibi, masked) @ value.
  //   query (B, Hq, Sq, D), key (B, Hk, Sk, D), value (B, Hk, Sk, Dv): one dtype, last stride 1, others free
  //   bias floating, mask bool: 4-D, each dimension 1 or that of (B, Hq, Sq, Sk)
  //   alibi_slopes float32 (Hq) or (B, Hq); sinks floating (Hq); key_lengths int32 (B)
  //   cu_seqlens_* int32 (sequences + 1), then B = 1 and the sequences lie one after the other in Sq and Sk
  //   dropout_seed int64, one element; causal 0 none, 1 upper_left, 2 lower_right; window_* -1 unbounded
  //   scale None: 1 / sqrt(D). The defaults make the plain call short: most of what a tiny call takes is its arguments.
  //   out (B, Hq, Sq, Dv) in query's memory order; lse (B, Hq, Sq) float32, or float64 for float64
  m.def(
      "_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? mask=None, "
      "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? key_lengths=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, Tensor? dropout_seed=None, int causal=0, int window_left=-1, "
      "int window_right=-1, float? scale=None, float softcap=0., float dropout_p=0.) -> (Tensor out, Tensor lse)");
  // out alone of a call without options: an inference step keeps nothing, and operands that are left out and a second
  // result take longer than a tiny kernel.
  m.def("_attention_inference(Tensor query, Tensor key, Tensor value, int causal=0) -> Tensor");
  // On CUDA: why _attention_forward and _attention_backward do not take the kernels for sm_90a, a HopperRefusal each;
  // 0: they take them, backward if grad_out and out have rows at multiples of 16 bytes and no expanded dimension.
  m.def(
      "_attention_refusals(Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? mask=None, "
      "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? key_lengths=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, Tensor? dropout_seed=None, int causal=0, int window_left=-1, "
      "int window_right=-1, float? scale=None, float softcap=0., float dropout_p=0.) -> (int forward, int backward)");
  // Its gradients, each in the memory order of its input. grad_bias is empty, (0), without bias_needs_grad,
  // and grad_sinks without sinks.
  m.def(
      "_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor "
      "out, Tensor lse, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? key_lengths, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? dropout_seed, bool bias_needs_grad, int causal, "
      "int window_left, int window_right, float? scale, float softcap, float dropout_p) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_sinks)");

  // Residual normalisation: y = norm(h) * weight + bias with h = residual + dropout(x), LayerNorm or RMSNorm.
  //   x, residual (..., N): rows evenly spaced, last stride 1; weight, bias (N) contiguous
  //   y (..., N) of x's dtype; sum = h (..., N) of sum_dtype, or empty (0) without save_sum
  //   mean (...), or empty (0) if rms, and rstd (...): float32, or float64 for float64
  //   sum_dtype None: that of x and residual promoted
  m.def(
      "_residual_norm_forward(Tensor x, Tensor? residual=None, Tensor? weight=None, Tensor? bias=None, "
      "Tensor? dropout_seed=None, float eps=1e-05, float dropout_p=0., bool rms=False, bool save_sum=False, "
      "ScalarType? sum_dtype=None) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  // y alone, without dropout: an inference step keeps nothing, and four results take longer than a tiny kernel.
  m.def(
      "_residual_norm_inference(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms) "
      "-> Tensor");
  // The gradients of _residual_norm_forward; empty (0) where there was no such input. grad_residual is also empty when
  // it would equal grad_x bit for bit (no dropout, same dtype): the caller then uses grad_x for both.
  m.def(
      "_residual_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, "
      "Tensor? weight, Tensor? dropout_seed, float dropout_p, bool rms, ScalarType x_dtype, "
      "ScalarType? residual_dtype, ScalarType? bias_dtype) "
      "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");

  // x @ weight^T + bias on the CPU for a few rows, where the time is that of reading the weights.
  //   x (..., K): rows evenly spaced, last stride 1; weight (N, K), one of its strides 1; bias (N) contiguous
  //   all of one dtype: float32, bfloat16 or float16; returns (..., N)
  //   Where AVX-512 multiplies bfloat16 itself it takes and gives 0 for subnormal numbers, here as in oneDNN.
  m.def("_linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // Uninitialised (rows, columns) on the CPU, in memory that freed results have left (block_cache.h).
  m.def("_empty_matrix(Tensor like, int rows, int columns, ScalarType dtype) -> Tensor");

  // Cross entropy on the CPU: loss = (1 - s) (lse - input[target]) + s (lse - mean(input)) of each row, 0 where the
  // target is ignore_index; s = label_smoothing, lse = log sum exp(input).
  //   input (..., N): rows evenly spaced, last stride 1; target int64 (...) contiguous, 0 to N - 1 or ignore_index
  //   loss, the highest logit and sum exp(input - highest): (...), float32, or float64 for float64
  m.def(
      "_cross_entropy_forward(Tensor input, Tensor target, int ignore_index, float label_smoothing) "
      "-> (Tensor loss, Tensor highest, Tensor sum)");
  // The gradient of input: grad_loss (softmax(input) - what the target asks for), contiguous.
  m.def(
      "_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor highest, Tensor sum, "
      "int ignore_index, float label_smoothing) -> Tensor");
  // Likewise, in the place of input.
  m.def(
      "_cross_entropy_backward_(Tensor grad_loss, Tensor(a!) input, Tensor target, Tensor highest, Tensor sum, "
      "int ignore_index, float label_smoothing) -> ()");
}
