// Attention on the CPU: tensors to parameters, work to tasks, kernels of the ISA in force over the tasks.
#include <cmath>
#include <memory>
#include <tuple>

#include "../host/attention_arguments.h"
#include "../key_range.h"
#include "isa.h"
#include "parallel.h"
#include "split.h"
#include "subnormals.h"

namespace tformer {
namespace {

// Rows and keys at which a head may be cut: whole row tiles and blocks of the kernels.
constexpr int64_t kRowsUnit = 96, kKeysUnit = 128;

// Query-key pairs that rows [q_begin, q_end) may attend to by position: the cost of a task.
double visible_pairs(const AttentionParams& p, const Sequence& s, int64_t q_begin, int64_t q_end) {
  const KeyRange range(p, s);
  double pairs = 0;
  const int64_t step = std::max<int64_t>((q_end - q_begin) / 16, 1);
  for (int64_t i = q_begin; i < q_end; i += step) {
    const int64_t visible = range.end(i) - range.begin(i);
    pairs += static_cast<double>(std::max<int64_t>(visible, 0)) * static_cast<double>(std::min(step, q_end - i));
  }
  return pairs;
}

struct Work {
  std::vector<AttentionTask> tasks;
  std::vector<double> cost;

  void add(const AttentionTask& task, double task_cost) {
    tasks.push_back(task);
    cost.push_back(task_cost);
  }

  double total() const {
    double sum = 0;
    for (double c : cost) sum += c;
    return sum;
  }

  // Neighbours stay together where all cost about the same.
  Share share() const {
    if (cost.empty()) return Share::kNext;
    const auto [least, most] = std::minmax_element(cost.begin(), cost.end());
    return *least >= 0.9 * *most ? Share::kNeighbours : Share::kNext;
  }

  // The costly ones first, so that the last to finish are small.
  void sort() {
    std::vector<size_t> order(tasks.size());
    for (size_t n = 0; n < order.size(); ++n) order[n] = n;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost[a] > cost[b]; });
    std::vector<AttentionTask> sorted;
    for (size_t n : order) sorted.push_back(tasks[n]);
    tasks.swap(sorted);
  }
};

// Parts to cut each of `heads` equal pieces of work into, so that every thread gets at least four.
int64_t parts_for(int64_t heads) {
  const int64_t wanted = thread_count() == 1 ? 1 : 4 * thread_count();
  return heads >= wanted ? 1 : (wanted + heads - 1) / std::max<int64_t>(heads, 1);
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Neighbouring heads that a task takes one after the other: each is fetched while the one before is computed. Tasks get
// batch entries [b, b + batches) and `heads` query heads.
struct Neighbours {
  int64_t batches = 1, heads;

  Neighbours(const AttentionParams& p, int64_t parts) : heads(p.Hq / p.Hk) {
    constexpr int64_t kTasksPerThread = 8;
    if (parts > 1) return;
    const int64_t key_heads = p.B * p.Hk / (kTasksPerThread * thread_count());  // of a task
    if (key_heads >= 2 * p.Hk && !p.cu_seqlens_q) {
      batches = key_heads / p.Hk, heads = p.Hq;
    } else if (key_heads > 0) {
      const int64_t tasks = (p.Hk + key_heads - 1) / key_heads;  // of a batch entry: near-equal ones
      heads *= (p.Hk + tasks - 1) / tasks;
    }
  }
};

// Keys of a part where few queries meet many keys (decoding): then the keys are what threads can share. A function of
// shapes alone, since it shows in the rounding. 0: no parts.
int64_t keys_of_part(const AttentionParams& p) {
  constexpr int64_t kMostQueries = 8, kLeastKeys = 512, kMostParts = 64, kKeyBlock = 64;
  if (p.cu_seqlens_q || p.Sq > kMostQueries || p.Sk < 2 * kLeastKeys) return 0;
  return std::max(kLeastKeys, round_up((p.Sk + kMostParts - 1) / kMostParts, kKeyBlock));
}

// A task for each part of the keys of a key head; of several heads where these lie side by side, since their rows are
// then on the same pages, and there are tasks enough for the threads.
Work part_work(const AttentionParams& p) {
  Work work;
  const int64_t group = p.Hq / p.Hk, parts = p.B * ((p.Sk + p.part_keys - 1) / p.part_keys);
  const bool side_by_side = p.k.stride[1] < p.k.stride[2];
  const int64_t pieces = side_by_side ? std::min(parts_for(parts), p.Hk) : p.Hk;
  const int64_t heads = group * ((p.Hk + pieces - 1) / pieces);
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence s = sequence_of(p, b);
    const KeyRange range(p, s);
    const int64_t begin = s.Sq > 0 ? range.begin(0) : 0, end = s.Sq > 0 ? range.end(s.Sq - 1) : 0;
    for (int64_t h = 0; h < p.Hq; h += heads) {
      const int64_t h_end = std::min(h + heads, p.Hq), key_heads = (h_end - h) / group;
      for (int64_t j = 0; j < p.Sk; j += p.part_keys) {
        const int64_t stop = std::min(j + p.part_keys, p.Sk);
        const double seen = static_cast<double>(std::max<int64_t>(std::min(stop, end) - std::max(j, begin), 0));
        work.add({b, b + 1, h, h_end, 0, s.Sq, j, stop, false, false, false},
                 seen * static_cast<double>(key_heads * (group * s.Sq + 8) * (p.D + p.Dv)));
      }
    }
  }
  work.sort();
  return work;
}

// One task for all query heads of a key head, cut along the queries when there are few heads.
Work forward_work(const AttentionParams& p) {
  Work work;
  const int64_t parts = parts_for(p.B * p.Hk);
  const Neighbours near(p, parts);
  for (int64_t b = 0; b < p.B; b += near.batches) {
    const int64_t b_end = std::min(b + near.batches, p.B);
    const Sequence s = sequence_of(p, b);  // several batch entries have the same Sq
    // below two units a part would spend its time packing keys
    const int64_t rows = std::max(round_up((s.Sq + parts - 1) / parts, kRowsUnit), std::min(2 * kRowsUnit, s.Sq));
    for (int64_t i = 0; i < s.Sq; i += rows) {
      const int64_t end = std::min(i + rows, s.Sq);
      double pairs = 0;
      for (int64_t n = b; n < b_end; ++n) {
        const Sequence each = sequence_of(p, n);
        pairs += visible_pairs(p, each, i, end) + static_cast<double>(each.Sk);
      }
      for (int64_t h = 0; h < p.Hq; h += near.heads) {
        const int64_t h_end = std::min(h + near.heads, p.Hq);
        work.add({b, b_end, h, h_end, i, end, 0, p.Sk, false, false, false},
                 pairs * static_cast<double>((h_end - h) * (p.D + p.Dv)));
      }
    }
  }
  work.sort();
  return work;
}

// Batch entries and query heads that share the gradient of a bias with a query dimension. One task takes all of them,
// in order: the sum then needs no second buffer and has one order.
struct Sharing {
  int64_t batches = 1, heads = 1;

  Sharing(const AttentionParams& p, bool bias_has_rows) {
    if (!p.grad_bias || !bias_has_rows) return;
    if (p.grad_bias_stride[0] == 0) batches = std::max<int64_t>(p.B, 1);
    if (p.grad_bias_stride[1] == 0) heads = p.Hq;
  }
};

// dk and dv of a range of keys; with dq as well where one task has the whole head.
void add_key_tasks(const AttentionParams& p, Work& work, int64_t parts, const Sharing& shared, bool with_dq,
                   bool with_dbias) {
  Neighbours near(p, parts);
  if (with_dq && shared.batches * shared.heads > 1) {
    near.batches = shared.batches, near.heads = std::max(shared.heads, p.Hq / p.Hk);
  }
  for (int64_t b = 0; b < p.B; b += near.batches) {
    const int64_t b_end = std::min(b + near.batches, p.B);
    const Sequence s = sequence_of(p, b);
    const int64_t length = p.cu_seqlens_k ? s.Sk : p.Sk;  // gradients of keys past key_lengths are written too
    const int64_t keys = std::max(round_up((length + parts - 1) / parts, kKeysUnit), kKeysUnit);
    double pairs = 0;
    for (int64_t n = b; n < b_end; ++n) pairs += visible_pairs(p, sequence_of(p, n), 0, s.Sq);
    for (int64_t j = 0; j < std::max<int64_t>(length, 1); j += keys) {
      const int64_t end = std::min(j + keys, length);
      const double share = static_cast<double>(end - j) / static_cast<double>(std::max<int64_t>(length, 1));
      for (int64_t h = 0; h < p.Hq; h += near.heads) {
        const int64_t h_end = std::min(h + near.heads, p.Hq);
        work.add({b, b_end, h, h_end, 0, s.Sq, j, end, with_dq, true, with_dbias},
                 pairs * share * static_cast<double>((h_end - h) * (p.D + p.Dv) * 2));
      }
    }
  }
}

// dq of a range of rows.
void add_query_tasks(const AttentionParams& p, Work& work, int64_t parts, const Sharing& shared, bool with_dbias) {
  for (int64_t b = 0; b < p.B; b += shared.batches) {
    const Sequence s = sequence_of(p, b);
    const int64_t rows = std::max(round_up((s.Sq + parts - 1) / parts, kRowsUnit), kRowsUnit);
    for (int64_t h = 0; h < p.Hq; h += shared.heads) {
      for (int64_t i = 0; i < s.Sq; i += rows) {
        const int64_t end = std::min(i + rows, s.Sq);
        const double width = static_cast<double>(shared.batches * shared.heads * (p.D + p.Dv));
        work.add({b, b + shared.batches, h, h + shared.heads, i, end, 0, p.cu_seqlens_k ? s.Sk : p.Sk, true, false,
                  with_dbias},
                 width * 1.5 * visible_pairs(p, s, i, end));
      }
    }
  }
}

// One pass of five products over whole heads where those keep the threads busy; otherwise dq apart from dk and dv
// (seven products). Both give the same bits.
Work backward_work(const AttentionParams& p, bool bias_has_rows) {
  Work work;
  const Sharing shared(p, bias_has_rows);
  const int64_t pieces = p.B / shared.batches * (shared.heads == 1 ? p.Hk : 1), threads = thread_count();
  const double rounds = std::ceil(static_cast<double>(pieces) / static_cast<double>(threads));
  const bool busy = rounds * static_cast<double>(threads) < 1.4 * static_cast<double>(pieces);
  if (busy) {
    add_key_tasks(p, work, 1, shared, true, p.grad_bias != nullptr);
  } else {
    add_key_tasks(p, work, parts_for(p.B * p.Hk), shared, false, p.grad_bias && !bias_has_rows);
    add_query_tasks(p, work, parts_for(p.B / shared.batches * (p.Hq / shared.heads)), shared,
                    p.grad_bias && bias_has_rows);
  }
  work.sort();
  return work;
}

// run(task, next task, scratch of so many bytes) for each of them.
template <class Scratch, class Run>
void run_tasks(const AttentionParams& p, const Work& work, Scratch scratch, Run run) {
  struct Queue {
    const std::vector<AttentionTask>& tasks;
    TaskTaker& taker;
  };
  const auto take_from = [](void* from) {
    const Queue& queue = *static_cast<Queue*>(from);
    const auto n = static_cast<size_t>(queue.taker.take_ahead());
    return n < queue.tasks.size() ? &queue.tasks[n] : nullptr;
  };
  parallel_tasks(static_cast<int64_t>(work.tasks.size()), work.total(), work.share(), [&](int64_t n, TaskTaker& taker) {
    const FlushSubnormals flush;
    const AttentionTask& task = work.tasks[static_cast<size_t>(n)];
    Queue queue{work.tasks, taker};
    run(p, task, NextTask{take_from, &queue}, ThreadScratch::get(scratch(p, task)));
  });
}

void run_forward(AttentionParams& p, const Tensor& query) {
  const CpuKernels& kernels = cpu_kernels();
  p.part_keys = keys_of_part(p);
  p.split = splits_products(p, false);
  std::optional<Tensor> parts;
  if (p.part_keys) {
    parts =
        empty({(p.Sk + p.part_keys - 1) / p.part_keys, p.B, p.Hq, p.Sq, p.Dv + 2}, accumulator_type(p.dtype), query);
    p.parts = parts->mutable_data_ptr();
  }
  const Work work = p.part_keys ? part_work(p) : forward_work(p);
  run_tasks(p, work, kernels.attention_forward_scratch, kernels.attention_forward);
  if (p.part_keys) {
    const FlushSubnormals flush;
    const AttentionTask all{0, p.B, 0, p.Hq, 0, p.Sq, 0, p.Sk, false, false, false};
    kernels.attention_merge(p, all, ThreadScratch::get(kernels.attention_forward_scratch(p, all)));
  }
}

std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value, OptionalTensor bias,
                                             OptionalTensor mask, OptionalTensor alibi_slopes, OptionalTensor sinks,
                                             OptionalTensor key_lengths, OptionalTensor cu_seqlens_q,
                                             OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed, int64_t causal,
                                             int64_t window_left, int64_t window_right, std::optional<double> scale,
                                             double softcap, double dropout_p) {
  AttentionParams p =
      attention_params(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k);
  set_options(p, query, dropout_seed, causal, window_left, window_right, scale, softcap, dropout_p);
  Tensor out = empty_in_order_of(query, {query.size(0), p.Hq, query.size(2), p.Dv});
  Tensor lse = empty({query.size(0), p.Hq, query.size(2)}, accumulator_type(p.dtype), query);
  p.o = rows_of(out, p.cu_seqlens_q);
  set_lse(p, lse.mutable_data_ptr());
  run_forward(p, query);
  return {out, lse};
}

Tensor attention_inference(Tensor query, Tensor key, Tensor value, int64_t causal) {
  constexpr std::nullopt_t kNone = std::nullopt;
  AttentionParams p = attention_params(query, key, value, kNone, kNone, kNone, kNone, kNone, kNone, kNone);
  set_options(p, query, kNone, causal, -1, -1, kNone, 0, 0);
  Tensor out = empty_in_order_of(query, {p.B, p.Hq, p.Sq, p.Dv});
  const std::unique_ptr<char[]> lse(
      new char[static_cast<size_t>(p.B * p.Hq * p.Sq) * element_bytes(accumulator_type(p.dtype))]);
  p.o = rows_of(out, nullptr);
  set_lse(p, lse.get());
  run_forward(p, query);
  return out;
}

// (batch, head) sums in order, in double.
Tensor sum_over_batches(const std::vector<double>& parts, int64_t B, int64_t H, const Tensor& sinks) {
  Tensor sum = empty({H}, ScalarType::Double, sinks);
  double* out = static_cast<double*>(sum.mutable_data_ptr());
  for (int64_t h = 0; h < H; ++h) {
    out[h] = 0;
    for (int64_t b = 0; b < B; ++b) out[h] += parts[static_cast<size_t>(b * H + h)];
  }
  return torch::stable::to(sum, sinks.scalar_type());
}

// The accumulator (b, h, i, j) summed in order over the dimensions that `sizes` has as 1.
template <class Real>
void sum_to_shape(const Real* from, const Sizes& from_sizes, Real* to, const Sizes& sizes) {
  const Sizes strides = contiguous_strides(sizes);
  int64_t index[4];
  for (index[0] = 0; index[0] < from_sizes[0]; ++index[0]) {
    for (index[1] = 0; index[1] < from_sizes[1]; ++index[1]) {
      for (index[2] = 0; index[2] < from_sizes[2]; ++index[2]) {
        for (index[3] = 0; index[3] < from_sizes[3]; ++index[3]) {
          int64_t at = 0;
          for (int d = 0; d < 4; ++d) at += sizes[d] == 1 ? 0 : index[d] * strides[d];
          to[at] += *from++;
        }
      }
    }
  }
}

// Where the gradient of the bias is summed. With a query dimension: the bias's own shape. Without: (B, Hq, 1, Sk),
// which every (batch, head) owns a part of, summed to the bias's shape at the end.
struct BiasGradient {
  bool has_rows = false;
  Sizes sizes;
  std::optional<Tensor> accumulator;

  BiasGradient(AttentionParams& p, const OptionalTensor& bias, bool wanted) {
    if (!wanted) return;
    check(bias.has_value(), "bias_needs_grad: there is no bias");
    has_rows = bias->size(2) > 1;
    for (int d = 0; d < 4; ++d) sizes.push_back(bias->size(d));
    if (!has_rows) sizes = {p.B, p.Hq, 1, p.Sk};
    accumulator = empty(sizes, accumulator_type(p.dtype), *bias);
    torch::stable::zero_(*accumulator);
    const Sizes strides = contiguous_strides(sizes);
    const int64_t full[4] = {p.B, p.Hq, p.Sq, p.Sk};
    for (int d = 0; d < 4; ++d) p.grad_bias_stride[d] = sizes[d] == 1 && full[d] > 1 ? 0 : strides[d];
    p.grad_bias = accumulator->mutable_data_ptr();
  }

  Tensor result(const AttentionParams& p, const OptionalTensor& bias, const Tensor& like) {
    if (!accumulator) return empty({0}, bias.has_value() ? bias->scalar_type() : like.scalar_type(), like);
    if (!has_rows) {
      Sizes shape;
      for (int d = 0; d < 4; ++d) shape.push_back(bias->size(d));
      Tensor sum = empty(shape, accumulator_type(p.dtype), *bias);
      torch::stable::zero_(sum);
      if (p.dtype == DType::f64) {
        sum_to_shape(static_cast<const double*>(p.grad_bias), sizes, static_cast<double*>(sum.mutable_data_ptr()),
                     shape);
      } else {
        sum_to_shape(static_cast<const float*>(p.grad_bias), sizes, static_cast<float*>(sum.mutable_data_ptr()), shape);
      }
      accumulator = sum;
    }
    return torch::stable::to(*accumulator, bias->scalar_type());
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
    OptionalTensor bias, OptionalTensor mask, OptionalTensor alibi_slopes, OptionalTensor sinks,
    OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
    bool bias_needs_grad, int64_t causal, int64_t window_left, int64_t window_right, std::optional<double> scale,
    double softcap, double dropout_p) {
  AttentionParams p =
      attention_params(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k);
  set_options(p, query, dropout_seed, causal, window_left, window_right, scale, softcap, dropout_p);
  check_like(grad_out, "grad_out", {query.size(0), p.Hq, query.size(2), p.Dv}, query.scalar_type());
  check_like(out, "out", {query.size(0), p.Hq, query.size(2), p.Dv}, query.scalar_type());
  check_like(lse, "lse", {query.size(0), p.Hq, query.size(2)}, accumulator_type(p.dtype));
  check(grad_out.size(3) == 1 || grad_out.stride(3) == 1 || grad_out.numel() == 0,
        "grad_out: expected a last stride of 1");
  check(lse.is_contiguous(), "lse: expected a contiguous tensor");
  p.o = rows_of(out, p.cu_seqlens_q);
  p.grad_o = rows_of(grad_out, p.cu_seqlens_q);
  set_lse(p, const_cast<void*>(lse.const_data_ptr()));
  if (grad_lse.has_value()) {
    check_like(*grad_lse, "grad_lse", {query.size(0), p.Hq, query.size(2)}, accumulator_type(p.dtype));
    check(grad_lse->is_contiguous(), "grad_lse: expected a contiguous tensor");
    p.grad_lse = grad_lse->const_data_ptr();
  }
  Tensor grad_query = empty_in_order_of(query, {query.size(0), p.Hq, query.size(2), p.D});
  Tensor grad_key = empty_in_order_of(key, {key.size(0), p.Hk, key.size(2), p.D});
  Tensor grad_value = empty_in_order_of(value, {key.size(0), p.Hk, key.size(2), p.Dv});
  p.grad_q = rows_of(grad_query, p.cu_seqlens_q);
  p.grad_k = rows_of(grad_key, p.cu_seqlens_k);
  p.grad_v = rows_of(grad_value, p.cu_seqlens_k);
  BiasGradient bias_gradient(p, bias, bias_needs_grad);

  const CpuKernels& kernels = cpu_kernels();
  std::vector<double> sink_parts(sinks.has_value() ? static_cast<size_t>(p.B * p.Hq) : 0);
  parallel_tasks(static_cast<int64_t>(sink_parts.size()), static_cast<double>(query.numel()), Share::kNext,
                 [&](int64_t n, TaskTaker&) {
                   const FlushSubnormals flush;
                   sink_parts[static_cast<size_t>(n)] = kernels.attention_sink_gradient(p, n / p.Hq, n % p.Hq);
                 });
  p.split = splits_products(p, true);
  const Work work = backward_work(p, bias_gradient.has_rows);
  run_tasks(p, work, kernels.attention_backward_scratch, kernels.attention_backward);
  Tensor grad_sinks =
      sinks.has_value() ? sum_over_batches(sink_parts, p.B, p.Hq, *sinks) : empty({0}, ScalarType::Float, query);
  return {grad_query, grad_key, grad_value, bias_gradient.result(p, bias, query), grad_sinks};
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(tformer_ext, CPU, m) {
  m.impl("_attention_forward", TORCH_BOX(&tformer::attention_forward));
  m.impl("_attention_inference", TORCH_BOX(&tformer::attention_inference));
  m.impl("_attention_backward", TORCH_BOX(&tformer::attention_backward));
}
