#include "cpu/instruction_set.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

namespace vitfast::cpu {
namespace {

constexpr std::array kAll = {InstructionSet::kBaseline, InstructionSet::kAvx2, InstructionSet::kAvx512};

bool supported([[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
  switch (set) {
    case InstructionSet::kBaseline:
      return true;
    case InstructionSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case InstructionSet::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return set == InstructionSet::kBaseline;
#endif
}

constexpr int kNotForced = -1;
std::atomic<int> forced{kNotForced};

}  // namespace

std::vector<InstructionSet> compiled_instruction_sets() {
#if defined(__x86_64__)
  return {kAll.begin(), kAll.end()};
#else
  return {InstructionSet::kBaseline};
#endif
}

std::vector<InstructionSet> usable_instruction_sets() {
  auto sets = compiled_instruction_sets();
  sets.erase(std::remove_if(sets.begin(), sets.end(), [](InstructionSet set) { return !supported(set); }), sets.end());
  return sets;
}

InstructionSet instruction_set() {
  static const InstructionSet best = usable_instruction_sets().back();
  const int set = forced.load(std::memory_order_relaxed);
  return set == kNotForced ? best : static_cast<InstructionSet>(set);
}

void force_instruction_set(InstructionSet set) {
  const auto usable = usable_instruction_sets();
  if (std::find(usable.begin(), usable.end(), set) == usable.end()) {
    throw std::invalid_argument(std::string("this processor cannot run the instruction set ") + name(set));
  }
  forced.store(static_cast<int>(set), std::memory_order_relaxed);
}

void reset_instruction_set() { forced.store(kNotForced, std::memory_order_relaxed); }

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kBaseline:
      return "baseline";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
  }
  return "unknown";
}

InstructionSet instruction_set_from_name(const std::string& text) {
  for (const InstructionSet set : kAll) {
    if (text == name(set)) return set;
  }
  throw std::invalid_argument("instruction set must be one of baseline, avx2, avx512; got '" + text + "'");
}

}  // namespace vitfast::cpu
