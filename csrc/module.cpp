// Python module tformer_ext._C: everything that is no tensor operation. Importing it also registers the
// operators, which are linked into the same library. No torch header here: pybind11 and torch need not agree.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/isa.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the operators on import; chooses the CPU instruction set; tells how it was built.";
  // Throws on a wrong TFORMER_CPU_ISA, which Python sees as ImportError.
  tformer::set_cpu_isa_from_environment();

  m.def("built_isas", &tformer::built_cpu_isas, "Instruction sets compiled in, least capable first.");
  m.def("supported_isas", &tformer::supported_cpu_isas,
        "Those of built_isas() that this CPU can run, least capable first.");
  m.def("cpu_isa", [] { return tformer::cpu_kernels().name; }, "The instruction set in use.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { tformer::set_cpu_isa(name); }, py::arg("name"),
      "Uses the kernels of this instruction set from now on, in all threads. ValueError lists what can be.");
  m.def("vector_bytes", [] { return tformer::cpu_kernels().vector_bytes; }, "Width of its vector registers.");
  m.def("build_info", &build_info,
        "How this was built: version, commit, torch, cuda, sanitize, flags (per instruction set), compiler.");
}
