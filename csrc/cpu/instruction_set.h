// Which instruction set the CPU kernels run with. Every kernel is compiled for all of them; one is chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace vitfast::cpu {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// Those compiled into this library and supported by this processor, from the least to the most capable.
std::vector<InstructionSet> usable_instruction_sets();

// Those compiled into this library.
std::vector<InstructionSet> compiled_instruction_sets();

// The one in use: the most capable usable one, unless another was forced.
InstructionSet instruction_set();

// Forces one, for tests and comparisons; throws std::invalid_argument when it is not usable here.
void force_instruction_set(InstructionSet set);
void reset_instruction_set();

const char* name(InstructionSet set);
InstructionSet instruction_set_from_name(const std::string& name);

}  // namespace vitfast::cpu
