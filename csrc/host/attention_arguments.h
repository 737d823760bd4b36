// Tensors of an attention call to AttentionParams, checked. Shared by all backends.
#pragma once

#include <cmath>

#include "tensors.h"

namespace tformer {

inline void check_like(const Tensor& t, const char* name, const Sizes& sizes, ScalarType type) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size()) && t.scalar_type() == type;
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes[d];
  check(same, name, ": shape or dtype does not fit the other arguments");
}

// Packed sequences have one batch entry in memory, whatever the number of sequences.
inline Rows rows_of(const Tensor& t, const void* packed) {
  return {const_cast<void*>(t.const_data_ptr()), {packed ? 0 : t.stride(0), t.stride(1), t.stride(2)}};
}

inline ScoreOperand score_operand(const OptionalTensor& t, const char* name, const AttentionParams& p, bool boolean) {
  ScoreOperand operand{nullptr, DType::f32, {0, 0, 0, 0}};
  if (!t.has_value()) return operand;
  const int64_t full[4] = {p.B, p.Hq, p.Sq, p.Sk};
  check(t->dim() == 4, name, ": expected 4 dimensions, got ", t->dim());
  operand.dtype = dtype_of(*t, name);
  check((operand.dtype == DType::boolean) == boolean, name, ": wrong dtype");
  for (int d = 0; d < 4; ++d) {
    check(t->size(d) == 1 || t->size(d) == full[d], name, ": size ", t->size(d), " of dimension ", d,
          " does not broadcast to ", full[d]);
    operand.stride[d] = t->size(d) == 1 ? 0 : t->stride(d);
  }
  operand.data = t->const_data_ptr();
  return operand;
}

inline const int32_t* int32_vector(const OptionalTensor& t, const char* name) {
  if (!t.has_value()) return nullptr;
  check(t->dim() == 1 && t->scalar_type() == ScalarType::Int && t->is_contiguous(), name,
        ": expected a contiguous int32 vector");
  return pointer<int32_t>(t);
}

inline void check_cu_seqlens(const int32_t* cu, int64_t sequences, int64_t total, const char* name) {
  check(cu[0] == 0 && cu[sequences] == total, name, ": expected to run from 0 to ", total);
  for (int64_t n = 0; n < sequences; ++n) check(cu[n] <= cu[n + 1], name, ": expected no falling entry");
}

inline AttentionParams attention_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const OptionalTensor& bias, const OptionalTensor& mask,
                                        const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                        const OptionalTensor& key_lengths, const OptionalTensor& cu_seqlens_q,
                                        const OptionalTensor& cu_seqlens_k) {
  AttentionParams p{};
  check(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key, value: expected 4 dimensions");
  p.dtype = dtype_of(query, "query");
  check(p.dtype != DType::boolean && key.scalar_type() == query.scalar_type() &&
            value.scalar_type() == query.scalar_type(),
        "query, key, value: expected one floating dtype");
  p.B = query.size(0), p.Hq = query.size(1), p.Sq = query.size(2), p.D = query.size(3);
  p.Hk = key.size(1), p.Sk = key.size(2), p.Dv = value.size(3);
  check(key.size(0) == p.B && key.size(3) == p.D && value.size(0) == p.B && value.size(1) == p.Hk &&
            value.size(2) == p.Sk,
        "key, value: shape does not fit query");
  check(p.D > 0 && p.Dv > 0 && p.Hk > 0 && p.Hq > 0 && p.Hq % p.Hk == 0,
        "query: expected heads to be a multiple of key's, and head dimensions above 0");
  for (const Tensor* t : {&query, &key, &value}) {
    check(t->size(3) == 1 || t->stride(3) == 1 || t->numel() == 0, "query, key, value: expected a last stride of 1");
  }
  p.cu_seqlens_q = int32_vector(cu_seqlens_q, "cu_seqlens_q");
  p.cu_seqlens_k = int32_vector(cu_seqlens_k, "cu_seqlens_k");
  check(!p.cu_seqlens_q == !p.cu_seqlens_k, "cu_seqlens_q, cu_seqlens_k: expected both or none");
  if (p.cu_seqlens_q) {
    check(p.B == 1 && cu_seqlens_q->numel() == cu_seqlens_k->numel() && cu_seqlens_q->numel() > 0,
          "cu_seqlens: expected one batch entry and equally many sequences");
    check(!bias && !mask && !key_lengths, "bias, mask, key_lengths: not with packed sequences");
    p.B = cu_seqlens_q->numel() - 1;
    if (query.is_cpu()) {
      check_cu_seqlens(p.cu_seqlens_q, p.B, p.Sq, "cu_seqlens_q");
      check_cu_seqlens(p.cu_seqlens_k, p.B, p.Sk, "cu_seqlens_k");
    }
  }
  p.q = rows_of(query, p.cu_seqlens_q);
  p.k = rows_of(key, p.cu_seqlens_k);
  p.v = rows_of(value, p.cu_seqlens_k);
  p.bias = score_operand(bias, "bias", p, false);
  p.mask = score_operand(mask, "mask", p, true);
  p.key_lengths = int32_vector(key_lengths, "key_lengths");
  if (p.key_lengths) {
    check(key_lengths->numel() == p.B, "key_lengths: expected one length for each batch entry");
    for (int64_t b = 0; query.is_cpu() && b < p.B; ++b) {
      check(p.key_lengths[b] >= 0 && p.key_lengths[b] <= p.Sk, "key_lengths: expected 0 to ", p.Sk);
    }
  }
  if (alibi_slopes.has_value()) {
    const int64_t dim = alibi_slopes->dim();
    check(alibi_slopes->scalar_type() == ScalarType::Float && (dim == 1 || dim == 2) &&
              alibi_slopes->size(dim - 1) == p.Hq && (dim == 1 || alibi_slopes->size(0) == p.B),
          "alibi_slopes: expected float32 (Hq) or (B, Hq)");
    p.alibi_slopes = pointer<float>(alibi_slopes);
    p.alibi_stride[0] = dim == 2 ? alibi_slopes->stride(0) : 0;
    p.alibi_stride[1] = alibi_slopes->stride(dim - 1);
  }
  if (sinks.has_value()) {
    p.sinks_dtype = dtype_of(*sinks, "sinks");
    check(sinks->dim() == 1 && sinks->size(0) == p.Hq && sinks->is_contiguous() && p.sinks_dtype != DType::boolean,
          "sinks: expected a contiguous floating (Hq)");
    p.sinks = sinks->const_data_ptr();
  }
  return p;
}

inline void set_options(AttentionParams& p, const Tensor& query, const OptionalTensor& dropout_seed, int64_t causal,
                        int64_t window_left, int64_t window_right, std::optional<double> scale, double softcap,
                        double dropout_p) {
  check(causal >= kNotCausal && causal <= kLowerRight, "causal: expected 0, 1 or 2");
  check(window_left >= -1 && window_right >= -1, "window: expected -1 or more");
  check(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected 0 to 1");
  check(softcap >= 0, "softcap: expected 0 or more");
  p.causal = causal, p.window_left = window_left, p.window_right = window_right;
  p.scale = scale.value_or(1 / std::sqrt(static_cast<double>(p.D))), p.softcap = softcap, p.dropout_p = dropout_p;
  p.dropout_seed = seed_of(dropout_seed, dropout_p, query);
}

// lse is contiguous: (B, Hq, Sq), packed (1, Hq, total).
inline void set_lse(AttentionParams& p, void* lse) {
  p.lse = lse;
  p.lse_stride[0] = p.cu_seqlens_q ? 0 : p.Hq * p.Sq;
  p.lse_stride[1] = p.Sq;
}

}  // namespace tformer
