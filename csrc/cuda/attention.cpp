// Attention on CUDA: tensors to parameters, memory of results and between kernels, launches.
#include <cmath>
#include <tuple>

#include "../host/attention_arguments.h"
#include "attention_few_queries.h"
#include "attention_launch.h"
#include "hopper/attention_choice.h"
#include "runtime.h"

namespace tformer {
namespace {

using gpu::check_launch;
using gpu::OnDevice;

// Rows begin at multiples of 16 bytes.
bool aligned(const Rows& rows, const Tensor& t) {
  const auto size = static_cast<int64_t>(element_bytes(t.scalar_type()));
  bool all = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  for (int d = 0; d < 3; ++d) all = all && (t.size(d) <= 1 || t.stride(d) * size % 16 == 0);
  return all;
}

AttentionCall attention_call(const AttentionParams& p) {
  AttentionCall call{};
  call.p = p;
  call.packed = p.cu_seqlens_q != nullptr;
  call.plain_but_bias =
      rows_share_mask(p) && !p.alibi_slopes && p.softcap == 0 && p.scale > 0 && std::isfinite(p.scale);
  call.plain = call.plain_but_bias && !p.bias.data;
  call.splits = call.parts = call.pairs = call.shared_batches = call.shared_heads = 1;
  return call;
}

bool on_device_of(const Tensor& query, const Tensor& t) {
  return t.is_cpu() == query.is_cpu() && t.get_device_index() == query.get_device_index();
}
bool on_device_of(const Tensor& query, const OptionalTensor& t) { return !t.has_value() || on_device_of(query, *t); }

// A kernel cannot read what lies elsewhere.
template <class... Tensors>
void check_devices(const Tensor& query, const Tensors&... others) {
  check((on_device_of(query, others) && ...), "expected all tensors on the device of query");
}

void check_sizes(const AttentionParams& p) {
  check(std::max(p.D, p.Dv) <= kMostHeadDim, "query, value: expected head dimensions up to ", kMostHeadDim,
        " on CUDA, got ", p.D, " and ", p.Dv);
  check(std::max(p.Sq, p.Sk) <= kMostPositions, "query, key: expected lengths up to ", kMostPositions, " on CUDA");
}

// What a forward call takes, without memory for its results.
AttentionCall forward_call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
                           const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                           const OptionalTensor& key_lengths, const OptionalTensor& cu_seqlens_q,
                           const OptionalTensor& cu_seqlens_k, const OptionalTensor& dropout_seed, int64_t causal,
                           int64_t window_left, int64_t window_right, std::optional<double> scale, double softcap,
                           double dropout_p) {
  AttentionParams p =
      attention_params(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k);
  check_devices(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k);
  set_options(p, query, dropout_seed, causal, window_left, window_right, scale, softcap, dropout_p);
  check_sizes(p);
  AttentionCall call = attention_call(p);
  // the result is dense: its rows are Dv apart, or there is one
  const bool one_row = query.size(0) <= 1 && p.Hq <= 1 && query.size(2) <= 1;
  const auto row_bytes = static_cast<int64_t>(element_bytes(query.scalar_type())) * p.Dv;
  call.aligned = aligned(p.q, query) && aligned(p.k, key) && aligned(p.v, value) && (one_row || row_bytes % 16 == 0);
  return call;
}

// For sm_90a; without a build for it hopper_refusal lets no call through.
gpu::Status launch_hopper_forward(const AttentionCall& call, [[maybe_unused]] const Tensor& query, const OnDevice& on) {
#ifdef TFORMER_HOPPER
  const AttentionParams& p = call.p;
  const int multiprocessors = on.device().multiprocessors;
  const int64_t tiles =
      (call.packed ? 1 : p.B) * p.Hq * query_tiles(call, hopper_forward_queries(std::max(p.D, p.Dv), hopper_extra(p)));
  // Equal tiles are dealt out beforehand, and so is one for each multiprocessor.
  std::optional<Tensor> ticket;
  if (tiles > multiprocessors && (p.causal != kNotCausal || p.key_lengths || call.packed)) {
    ticket = empty({1}, ScalarType::Int, query);
    torch::stable::zero_(*ticket);
  }
  int32_t* word = ticket ? static_cast<int32_t*>(ticket->mutable_data_ptr()) : nullptr;
  return p.dtype == DType::bf16 ? gpu::launch_hopper_forward<gpu::bf16>(call, multiprocessors, word, on.stream())
                                : gpu::launch_hopper_forward<gpu::f16>(call, multiprocessors, word, on.stream());
#else
  return launch_attention_forward(call, on.stream());
#endif
}

// dq, dk and dv.
void launch_backward(const AttentionCall& call, [[maybe_unused]] const Tensor& query, const OnDevice& on) {
#ifdef TFORMER_HOPPER
  if (hopper_backward_refusal(call, on.device()) == HopperRefusal::none) {
    const int64_t slots = hopper_slots(call);
    Tensor sums = empty({slots, kHopperSlotFloats}, ScalarType::Float, query);
    Tensor turns = empty({slots + 1}, ScalarType::Int, query);
    torch::stable::zero_(turns);
    const HopperSums between{static_cast<float*>(sums.mutable_data_ptr()),
                             static_cast<int32_t*>(turns.mutable_data_ptr())};
    check_launch(call.p.dtype == DType::bf16 ? gpu::launch_hopper_backward<gpu::bf16>(call, between, on.stream())
                                             : gpu::launch_hopper_backward<gpu::f16>(call, between, on.stream()),
                 "attention backward for sm_90a");
    return;
  }
#endif
  if (goes_in_one_pass(call, on.device().shared_bytes)) {
    const int64_t tiles = one_pass_tiles(call);
    Tensor sums = empty({tiles, kOnePassQueries, one_pass_width(call)}, ScalarType::Float, query);
    Tensor turns = empty({tiles + 1}, ScalarType::Int, query);
    torch::stable::zero_(turns);
    auto* words = static_cast<int32_t*>(turns.mutable_data_ptr());
    const OnePassCall one_pass{call, static_cast<float*>(sums.mutable_data_ptr()), words, words + tiles};
    check_launch(launch_attention_one_pass(one_pass, on.device().shared_bytes, on.stream()), "attention backward");
    return;
  }
  check_launch(launch_attention_dkv(call, on.stream()), "attention backward, dk and dv");
  check_launch(launch_attention_dq(call, on.stream()), "attention backward, dq");
}

std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value, OptionalTensor bias,
                                             OptionalTensor mask, OptionalTensor alibi_slopes, OptionalTensor sinks,
                                             OptionalTensor key_lengths, OptionalTensor cu_seqlens_q,
                                             OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed, int64_t causal,
                                             int64_t window_left, int64_t window_right, std::optional<double> scale,
                                             double softcap, double dropout_p) {
  const OnDevice on(query);
  AttentionCall call =
      forward_call(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k,
                   dropout_seed, causal, window_left, window_right, scale, softcap, dropout_p);
  AttentionParams& p = call.p;
  Tensor out = empty_in_order_of(query, {query.size(0), p.Hq, query.size(2), p.Dv});
  Tensor lse = empty({query.size(0), p.Hq, query.size(2)}, accumulator_type(p.dtype), query);
  p.o = rows_of(out, p.cu_seqlens_q);
  set_lse(p, lse.mutable_data_ptr());
  AttentionCall launched = forward_launch(call);
  if (hopper_forward_refusal(launched, on.device()) == HopperRefusal::none) {
    check_launch(launch_hopper_forward(launched, query, on), "attention forward for sm_90a");
    return {out, lse};
  }
  if (launched.splits == 1) {
    check_launch(launch_attention_forward(launched, on.stream()), "attention forward");
    return {out, lse};
  }
  Tensor split_o = empty({launched.splits, p.B, p.Hq, p.Sq, p.Dv}, accumulator_type(p.dtype), query);
  Tensor split_lse = empty({launched.splits, p.B, p.Hq, p.Sq}, accumulator_type(p.dtype), query);
  launched.split_o = split_o.mutable_data_ptr();
  launched.split_lse = split_lse.mutable_data_ptr();
  launched.split_stride[0] = p.B * p.Hq * p.Sq, launched.split_stride[1] = p.Hq * p.Sq;
  launched.split_stride[2] = launched.p.Sq;
  check_launch(launch_attention_forward(launched, on.stream()), "attention forward, split keys");
  launched.p = p;
  check_launch(launch_attention_merge(launched, on.stream()), "attention merge");
  return {out, lse};
}

Tensor attention_inference(Tensor query, Tensor key, Tensor value, int64_t causal) {
  constexpr std::nullopt_t kNone = std::nullopt;
  return std::get<0>(attention_forward(query, key, value, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone,
                                       causal, -1, -1, kNone, 0, 0));
}

// A HopperRefusal for each direction; nothing is computed.
std::tuple<int64_t, int64_t> attention_refusals(Tensor query, Tensor key, Tensor value, OptionalTensor bias,
                                                OptionalTensor mask, OptionalTensor alibi_slopes, OptionalTensor sinks,
                                                OptionalTensor key_lengths, OptionalTensor cu_seqlens_q,
                                                OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
                                                int64_t causal, int64_t window_left, int64_t window_right,
                                                std::optional<double> scale, double softcap, double dropout_p) {
  const OnDevice on(query);
  const AttentionCall call =
      forward_call(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k,
                   dropout_seed, causal, window_left, window_right, scale, softcap, dropout_p);
  return {static_cast<int64_t>(hopper_forward_refusal(forward_launch(call), on.device())),
          static_cast<int64_t>(hopper_backward_refusal(call, on.device()))};
}

// Where the gradient of the bias is summed. With a query dimension: in the bias's own shape, by the kernel for dq,
// several times over where many batches and heads share it; where not, nothing is left to add. Without: (B, Hq, 1, Sk),
// by the kernel for dk and dv. A sum in fixed order then gives the bias's shape.
class BiasGradient {
 public:
  BiasGradient(AttentionCall& call, const OptionalTensor& bias, bool wanted) {
    AttentionParams& p = call.p;
    if (!wanted) return;
    check(bias.has_value(), "bias_needs_grad: there is no bias");
    for (int d = 0; d < 4; ++d) shape_.push_back(bias->size(d));
    call.bias_has_rows = shape_[2] > 1;
    sizes_ = call.bias_has_rows ? shape_ : Sizes{p.B, p.Hq, 1, p.Sk};
    const Sizes strides = contiguous_strides(sizes_);
    const int64_t full[4] = {p.B, p.Hq, p.Sq, p.Sk};
    call.part_stride = 1;
    for (int d = 0; d < 4; ++d) {
      p.grad_bias_stride[d] = sizes_[d] == 1 && full[d] > 1 ? 0 : strides[d];
      call.part_stride *= sizes_[d];
    }
    if (call.bias_has_rows) choose_parts(call);
    const Sizes with_parts{call.parts, sizes_[0], sizes_[1], sizes_[2], sizes_[3]};
    sums_ = empty(call.parts == 1 ? sizes_ : with_parts, accumulator_type(p.dtype), *bias);
    torch::stable::zero_(*sums_);
    p.grad_bias = sums_->mutable_data_ptr();
  }

  Tensor result(const AttentionCall& call, const OptionalTensor& bias, const Tensor& like, gpu::Stream stream) {
    if (!sums_) return empty({0}, bias.has_value() ? bias->scalar_type() : like.scalar_type(), like);
    if (call.bias_has_rows && call.parts == 1) return torch::stable::to(*sums_, bias->scalar_type());
    Tensor sum = empty(shape_, accumulator_type(call.p.dtype), *bias);
    SumCall over{};
    over.in = call.p.grad_bias;
    over.out = sum.mutable_data_ptr();
    over.is_double = call.p.dtype == DType::f64;
    const Sizes strides = contiguous_strides(sizes_);
    for (int d = 0; d < 4; ++d) {
      const bool reduced = shape_[d] == 1;
      over.size[d] = shape_[d], over.stride[d] = reduced ? 0 : strides[d];
      over.reduced_size[d + 1] = reduced ? sizes_[d] : 1, over.reduced_stride[d + 1] = reduced ? strides[d] : 0;
    }
    over.reduced_size[0] = call.parts, over.reduced_stride[0] = call.part_stride;
    check_launch(launch_sum(over, stream), "sum of the bias's gradient");
    return torch::stable::to(sum, bias->scalar_type());
  }

 private:
  // A block adds up what is shared, so few entries would be few blocks. Sizes alone decide, as above.
  static void choose_parts(AttentionCall& call) {
    constexpr int64_t kRows = 64, kWantedBlocks = 256, kMostParts = 8;
    const AttentionParams& p = call.p;
    if (p.grad_bias_stride[0] == 0) call.shared_batches = p.B;
    if (p.grad_bias_stride[1] == 0) call.shared_heads = p.Hq;
    const int64_t shared_by = call.shared_batches * call.shared_heads;
    if (shared_by == 0) return;
    const int64_t blocks = std::max<int64_t>(p.B * p.Hq / shared_by * ((p.Sq + kRows - 1) / kRows), 1);
    const int64_t parts = std::min({(kWantedBlocks + blocks - 1) / blocks, kMostParts, (shared_by + 1) / 2});
    call.pairs = (shared_by + parts - 1) / parts;
    call.parts = (shared_by + call.pairs - 1) / call.pairs;
  }

  Sizes shape_, sizes_;
  std::optional<Tensor> sums_;
};

void check_gradients(const AttentionParams& p, const Tensor& query, const Tensor& grad_out, const Tensor& out,
                     const Tensor& lse, const OptionalTensor& grad_lse) {
  check_like(grad_out, "grad_out", {query.size(0), p.Hq, query.size(2), p.Dv}, query.scalar_type());
  check_like(out, "out", {query.size(0), p.Hq, query.size(2), p.Dv}, query.scalar_type());
  check_like(lse, "lse", {query.size(0), p.Hq, query.size(2)}, accumulator_type(p.dtype));
  check(grad_out.size(3) == 1 || grad_out.stride(3) == 1 || grad_out.numel() == 0,
        "grad_out: expected a last stride of 1");
  check(lse.is_contiguous(), "lse: expected a contiguous tensor");
  if (!grad_lse.has_value()) return;
  check_like(*grad_lse, "grad_lse", {query.size(0), p.Hq, query.size(2)}, accumulator_type(p.dtype));
  check(grad_lse->is_contiguous(), "grad_lse: expected a contiguous tensor");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
    OptionalTensor bias, OptionalTensor mask, OptionalTensor alibi_slopes, OptionalTensor sinks,
    OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
    bool bias_needs_grad, int64_t causal, int64_t window_left, int64_t window_right, std::optional<double> scale,
    double softcap, double dropout_p) {
  const OnDevice on(query);
  AttentionParams p =
      attention_params(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k);
  check_devices(query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, grad_out,
                grad_lse, out, lse);
  set_options(p, query, dropout_seed, causal, window_left, window_right, scale, softcap, dropout_p);
  check_sizes(p);
  check_gradients(p, query, grad_out, out, lse, grad_lse);
  p.o = rows_of(out, p.cu_seqlens_q);
  p.grad_o = rows_of(grad_out, p.cu_seqlens_q);
  set_lse(p, const_cast<void*>(lse.const_data_ptr()));
  p.grad_lse = grad_lse.has_value() ? grad_lse->const_data_ptr() : nullptr;
  Tensor grad_query = empty_in_order_of(query, {query.size(0), p.Hq, query.size(2), p.D});
  Tensor grad_key = empty_in_order_of(key, {key.size(0), p.Hk, key.size(2), p.D});
  Tensor grad_value = empty_in_order_of(value, {value.size(0), p.Hk, value.size(2), p.Dv});
  p.grad_q = rows_of(grad_query, p.cu_seqlens_q);
  p.grad_k = rows_of(grad_key, p.cu_seqlens_k);
  p.grad_v = rows_of(grad_value, p.cu_seqlens_k);
  Tensor delta = empty({query.size(0), p.Hq, query.size(2)}, ScalarType::Double, query);
  p.delta = static_cast<const double*>(delta.const_data_ptr());

  AttentionCall call = attention_call(p);
  call.aligned = aligned(p.q, query) && aligned(p.k, key) && aligned(p.v, value) && aligned(p.o, out) &&
                 aligned(p.grad_o, grad_out) && aligned(p.grad_q, grad_query) && aligned(p.grad_k, grad_key) &&
                 aligned(p.grad_v, grad_value);
  BiasGradient bias_gradient(call, bias, bias_needs_grad);
  check_launch(launch_attention_delta(call, on.stream()), "attention delta");
  Tensor grad_sinks =
      empty({sinks.has_value() ? p.Hq : 0}, sinks.has_value() ? ScalarType::Double : ScalarType::Float, query);
  if (sinks.has_value()) {
    call.grad_sinks = static_cast<double*>(grad_sinks.mutable_data_ptr());
    check_launch(launch_attention_sinks(call, on.stream()), "attention sinks");
    grad_sinks = torch::stable::to(grad_sinks, sinks->scalar_type());
  }
  launch_backward(call, query, on);
  return {grad_query, grad_key, grad_value, bias_gradient.result(call, bias, query, on.stream()), grad_sinks};
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(TFORMER_NAMESPACE, TFORMER_CUDA_KEY, m) {
  m.impl("_attention_forward", TORCH_BOX(&tformer::attention_forward));
  m.impl("_attention_inference", TORCH_BOX(&tformer::attention_inference));
  m.impl("_attention_refusals", TORCH_BOX(&tformer::attention_refusals));
  m.impl("_attention_backward", TORCH_BOX(&tformer::attention_backward));
}
