// The Python module vitfast._C: what was built, which instruction set runs, and operators to be called directly. This
// file and direct.h are the only ones that know Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/results.h"
#include "cpu/scratch.h"
#include "direct.h"
#include "operators.h"

namespace py = pybind11;
using namespace vitfast::cpu;

namespace {

std::vector<std::string> names(const std::vector<InstructionSet>& sets) {
  std::vector<std::string> result;
  for (const InstructionSet set : sets) result.emplace_back(name(set));
  return result;
}

// "80;90a" -> ["80", "90a"]
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ';');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = VITFAST_COMPILER;
  info["flags"] = VITFAST_FLAGS;
  info["torch_target"] = VITFAST_TORCH_TARGET;
  info["instruction_sets"] = names(compiled_instruction_sets());
  info["cuda_architectures"] = split(VITFAST_CUDA_ARCHITECTURES);
  return info;
}

// Operators that small calls of models spend their time in, by their registered names.
void define_operators(py::module_ module) {
  const auto define = [&](const char* name, auto function) { vitfast::direct::define(module, name, function); };
  py::register_exception<vitfast::direct::Unsuited>(module, "Unsuited");
  vitfast::direct::Python::instance();
  define("attention", &vitfast::attention_cpu);
  define("attention_backward", &vitfast::attention_backward_cpu);
  define("attention_qkvpacked", &vitfast::attention_qkvpacked_cpu);
  define("attention_qkvpacked_backward", &vitfast::attention_qkvpacked_backward_cpu);
  define("blur_pool2d", &vitfast::blur_pool2d_cpu);
  define("blur_pool2d_backward", &vitfast::blur_pool2d_backward_cpu);
  define("window_attention", &vitfast::window_attention_cpu);
  define("window_attention_backward", &vitfast::window_attention_backward_cpu);
  define("window_attention_qkvpacked", &vitfast::window_attention_qkvpacked_cpu);
  define("window_attention_qkvpacked_backward", &vitfast::window_attention_qkvpacked_backward_cpu);
}

void set_instruction_set(const std::optional<std::string>& text) {
  text.has_value() ? force_instruction_set(instruction_set_from_name(*text)) : reset_instruction_set();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of vitfast. Importing it registers the operators torch.ops.vitfast.*";
  m.def("build_info", &build_info,
        "How this extension was built: compiler, flags, torch_target, instruction_sets, cuda_architectures.");
  m.def("instruction_set", [] { return name(instruction_set()); }, "The instruction set that CPU kernels run with.");
  m.def(
      "usable_instruction_sets", [] { return names(usable_instruction_sets()); }, "Those that this processor can run.");
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"),
        "Forces an instruction set ('baseline', 'avx2', 'avx512') for all later calls; None chooses the best again.");
  m.def("scratch_bytes", &ScratchMeter::peak,
        "The most scratch memory that kernels held at one time since the last reset.");
  m.def("poison_scratch", &Scratch::poison, py::arg("poisoned"),
        "Whether scratch memory is full of NaN before kernels write to it, and results come from PyTorch: for tests.");
  m.def("reset_scratch_bytes", &ScratchMeter::reset, "Starts the measurement of scratch_bytes anew.");
  m.def("keep_result_bytes", &keep_result_bytes, py::arg("limit"),
        "Keeps up to so many bytes of the memory of freed results for later ones; 0: none. Returns the limit before.");
  m.def("kept_result_bytes", &kept_result_bytes, "How much memory of freed results is kept.");
  define_operators(m.def_submodule("direct", "Operators on the CPU without PyTorch's dispatcher."));
}
