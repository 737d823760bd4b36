// Python module tformer_ext._C: everything that is no tensor operation. Importing it also registers the
// operators, which are linked into the same library. No torch header here: pybind11 and torch need not agree.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>
#include <string>

#include "cpu/block_cache.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "params.h"

namespace tformer {
extern const char* const build_info_json;  // written by setup.py
}

namespace {

namespace py = pybind11;

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info = py::module_::import("json").attr("loads")(tformer::build_info_json);
  info["compiler"] = compiler();
  return info;
}

tformer::DType dtype_of(const std::string& name) {
  if (name == "float64") return tformer::DType::f64;
  if (name == "float32") return tformer::DType::f32;
  if (name == "bfloat16") return tformer::DType::bf16;
  if (name == "float16") return tformer::DType::f16;
  throw std::invalid_argument("dtype: expected one of float64, float32, bfloat16, float16, got '" + name + "'");
}

bool splits_products(const std::string& dtype, const std::array<int64_t, 4>& sizes, bool causal,
                     const std::array<int64_t, 2>& window, bool backward) {
  tformer::AttentionParams p{};
  p.dtype = dtype_of(dtype), p.causal = causal ? tformer::kUpperLeft : tformer::kNotCausal;
  p.Sq = sizes[0], p.Sk = sizes[1], p.D = sizes[2], p.Dv = sizes[3];
  p.window_left = window[0], p.window_right = window[1];
  return tformer::splits_products(p, backward);
}

// Operations per second of the calling thread: the fastest of many short runs, since whatever disturbs one slows it.
double measure_ceiling(const std::string& kind, const std::string& dtype_name, double seconds) {
  using Clock = std::chrono::steady_clock;
  const tformer::CpuKernels& kernels = tformer::cpu_kernels();
  const tformer::DType dtype = dtype_of(dtype_name);
  if (kind != "fma" && kind != "exp") throw std::invalid_argument("kind: expected fma or exp, got '" + kind + "'");
  const auto run = kind == "fma" ? kernels.fma_operations : kernels.exp_operations;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const Clock::time_point begin = Clock::now();
  double best = 0;
  for (int64_t rounds = 1; best == 0 || since(begin) < seconds;) {
    const Clock::time_point start = Clock::now();
    const double operations = run(dtype, rounds);
    const double elapsed = since(start);
    if (elapsed < 0.5e-3) {
      rounds *= 2;
    } else {
      best = std::max(best, operations / elapsed);
    }
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the operators on import; chooses the CPU instruction set; tells how it was built.";
  // They throw on a wrong TFORMER_CPU_ISA or TFORMER_CPU_SPLIT, which Python sees as ImportError.
  tformer::set_cpu_isa_from_environment();
  tformer::set_cpu_split_from_environment();

  m.def("built_isas", &tformer::built_cpu_isas, "Instruction sets compiled in, least capable first.");
  m.def("supported_isas", &tformer::supported_cpu_isas,
        "Those of built_isas() that this CPU can run, least capable first.");
  m.def("cpu_isa", [] { return tformer::cpu_kernels().name; }, "The instruction set in use.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { tformer::set_cpu_isa(name); }, py::arg("name"),
      "Uses the kernels of this instruction set from now on, in all threads. ValueError lists what can be.");
  m.def(
      "set_cpu_split", [](const std::string& name) { tformer::set_cpu_split(name); }, py::arg("name"),
      "Whether float32 and float16 attention multiplies bfloat16 slices in tile registers from now on, in all threads: "
      "auto, always or never.");
  m.def("cpu_split", &tformer::cpu_split, "What set_cpu_split or TFORMER_CPU_SPLIT chose.");
  m.def("splits_products", &splits_products, py::arg("dtype"), py::arg("sizes"), py::arg("causal"), py::arg("window"),
        py::arg("backward"),
        "Whether the kernels do so for sizes (Sq, Sk, D, Dv) and a window (left, right), -1 = none.");
  m.def("vector_bytes", [] { return tformer::cpu_kernels().vector_bytes; }, "Width of its vector registers.");
  m.def("measure_ceiling", &measure_ceiling, py::arg("kind"), py::arg("dtype"), py::arg("seconds") = 0.02,
        py::call_guard<py::gil_scoped_release>(),
        "Operations per second of this thread: kind fma (a multiply-add is two) or exp, dtype a name like float32.");
  m.def(
      "set_kept_bytes", [](size_t bytes) { return tformer::BlockCache::instance().set_limit(bytes); }, py::arg("bytes"),
      "Keeps at most so much memory of freed results for the next ones; 0: none. Returns the limit before.");
  m.def(
      "kept_bytes", [] { return tformer::BlockCache::instance().kept_bytes(); },
      "Memory of freed results kept at the moment.");
  m.def("build_info", &build_info,
        "How this was built: version, commit, torch, cuda, sanitize, flags (per instruction set), compiler.");
}
