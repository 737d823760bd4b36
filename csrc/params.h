// What a kernel sees of a call: plain structs of raw pointers, shared by every backend. No torch header here or below.
#pragma once

#include <cstdint>

namespace tformer {

enum class DType : int32_t { f64, f32, bf16, f16, boolean };

// An optional tensor that broadcasts to (B, Hq, Sq, Sk). data is null where the call has none.
struct ScoreOperand {
  const void* data;
  DType dtype;
  int64_t stride[4];  // elements; 0 in a broadcast dimension
};

// A tensor of rows: (B, H, S, width), unit stride in the last dimension.
struct Rows {
  void* data;
  int64_t stride[3];  // elements: batch, head, position
};

// One sequence of the batch. In a packed (varlen) call q_begin and k_begin are rows of the packed tensors.
struct Sequence {
  int64_t q_begin, k_begin;
  int64_t Sq, Sk;
};

enum Causal : int64_t { kNotCausal = 0, kUpperLeft = 1, kLowerRight = 2 };

struct AttentionParams {
  DType dtype;  // of q, k, v, o and their gradients
  int64_t B, Hq, Hk, Sq, Sk, D, Dv;

  Rows q;                     // (B, Hq, Sq, D)
  Rows k;                     // (B, Hk, Sk, D)
  Rows v;                     // (B, Hk, Sk, Dv)
  Rows o;                     // (B, Hq, Sq, Dv)
  void* lse;                  // (B, Hq, Sq) float, or double where dtype is f64; natural logarithm
  int64_t lse_stride[2];      // batch, head
  ScoreOperand bias;          // floating, added to the scaled scores
  ScoreOperand mask;          // boolean, true = may attend
  const float* alibi_slopes;  // (B, Hq) through alibi_stride, or null
  int64_t alibi_stride[2];
  const void* sinks;  // (Hq) of sinks_dtype, or null
  DType sinks_dtype;
  const int32_t* key_lengths;   // (B), or null
  const int32_t* cu_seqlens_q;  // (B + 1), or null: packed sequences, batch strides are then 0
  const int32_t* cu_seqlens_k;  // (B + 1), or null

  int64_t causal;                     // a value of Causal
  int64_t window_left, window_right;  // -1 = unbounded
  double scale, softcap;              // softcap 0 = none
  double dropout_p;                   // 0 = none
  bool split;                         // CPU: products of numbers split into slices, see cpu/split.h
  const int64_t* dropout_seed;        // one element, null without dropout

  // Forward only: keys of a part, where the keys of a row are computed in parts that are merged in the end; else 0.
  int64_t part_keys;
  void* parts;  // (parts, B, Hq, Sq, Dv + 2) float (double for f64): o before the division, m, l

  // Backward only.
  Rows grad_o;  // (B, Hq, Sq, Dv)
  Rows grad_q, grad_k, grad_v;
  const void* grad_lse;         // like lse, contiguous strides lse_stride; or null
  const double* delta;          // (B, Hq, Sq) through lse_stride: rowsum(do * o) - dlse; a CPU task makes its own
  void* grad_bias;              // accumulator in float (double for f64), null where no gradient is wanted
  int64_t grad_bias_stride[4];  // elements; 0 in a dimension that is summed over
};

constexpr Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s{0, 0, p.Sq, p.Sk};
  if (p.cu_seqlens_q) {
    s.q_begin = p.cu_seqlens_q[b];
    s.k_begin = p.cu_seqlens_k[b];
    s.Sq = p.cu_seqlens_q[b + 1] - s.q_begin;
    s.Sk = p.cu_seqlens_k[b + 1] - s.k_begin;
  } else if (p.key_lengths) {
    s.Sk = p.key_lengths[b] < p.Sk ? p.key_lengths[b] : p.Sk;
  }
  return s;
}

// A rectangle of one attention call: what one thread computes at a time. Its bounds never enter a result.
struct AttentionTask {
  int64_t b_begin, b_end;
  int64_t h_begin, h_end;              // query heads
  int64_t q_begin, q_end;              // rows inside the sequence
  int64_t k_begin, k_end;              // keys inside the sequence
  bool want_dq, want_dkv, want_dbias;  // backward: which gradients this task writes
};

// Which task the thread takes after the one at hand; null if that is its last. Taken when it is asked for, so that its
// rows can be fetched before it begins.
struct NextTask {
  const AttentionTask* (*take_from)(void* queue);
  void* queue;

  const AttentionTask* take() const { return take_from(queue); }
};

struct NormParams {
  int64_t M, N;          // rows, width
  DType dtype;           // of x, y and their gradients
  DType sum_dtype;       // of residual, sum and their gradients: dtype, or f32 beside a 16-bit dtype
  const void* x;         // (M, N)
  int64_t x_stride;      // elements between rows, as all strides here
  const void* residual;  // (M, N) or null
  int64_t residual_stride;
  const void* weight;  // (N) of weight_dtype, or null
  const void* bias;    // (N) of bias_dtype, or null
  DType weight_dtype, bias_dtype;
  void* y;     // (M, N)
  void* sum;   // (M, N) residual + dropout(x), or null where it is not kept
  void* mean;  // (M) float (double for f64), or null: for RMS, and where it is not kept
  void* rstd;  // (M) likewise
  double eps, dropout_p;
  const int64_t* dropout_seed;  // one element, null without dropout
  bool rms;
  bool around_cache;  // the results would not stay in the caches and are aligned to their lines: write them past these

  int64_t rows_ahead;  // forward: fetches the row so many after the one that is read; from M on none

  // Backward only; x, residual, y and sum are then unused.
  const void* saved;  // (M, N) of sum_dtype: the rows that were normalised
  int64_t saved_stride;
  const void* grad_y;  // (M, N) of dtype
  int64_t grad_y_stride;
  const void* grad_sum;  // (M, N) of sum_dtype, or null
  int64_t grad_sum_stride;
  void* grad_x;          // (M, N) of dtype
  void* grad_residual;   // (M, N) of sum_dtype, or null
  void* partial_weight;  // (chunks, N) float (double for f64), or null
  void* partial_bias;    // likewise
  int64_t chunk_rows;    // rows that share one partial: a function of sizes alone, so that threads do not show in sums
  bool fetch_results;    // asks for the lines of the gradients of x and residual before they are written
};

// y (M, N) = x (M, K) weightT + bias, one dtype, floating and not double.
struct LinearParams {
  DType dtype;
  int64_t M, N, K;
  const void* x;  // (M, K)
  int64_t x_stride;
  const void* weight;        // (N, K)
  int64_t weight_stride[2];  // one of them 1: torch's Linear has rows along K, GPT-2's Conv1D along N
  const void* bias;          // (N), or null
  void* y;                   // (M, N), contiguous

  // Of weights with rows along N: these are cut into parts of so many, each with sums of its own, added up in the end.
  int64_t part_rows;
  float* parts;  // (parts, M, N)
};

// loss (M) of rows of logits x (M, N) whose right class is target (M).
struct CrossEntropyParams {
  int64_t M, N;
  DType dtype;    // of x and its gradient
  const void* x;  // (M, N)
  int64_t x_stride;
  const int64_t* target;   // (M): 0 to N - 1, or ignore_index
  int64_t ignore_index;    // rows with it have loss and gradient 0
  double label_smoothing;  // the part of the target that all classes share
  void* loss;              // (M) float (double for f64)
  void* highest;           // (M) likewise: the highest logit
  void* sum;               // (M) likewise: that of exp(x - highest)

  // Backward only; loss is then unused.
  const void* grad_loss;  // (M) likewise
  void* grad_x;           // (M, N)
  int64_t grad_x_stride;  // elements from row to row
  bool around_cache;      // grad_x would not stay in the caches: write it past these
};

}  // namespace tformer
