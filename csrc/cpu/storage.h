// The dtypes that tensors are stored in.
#pragma once

namespace vitfast::cpu {

enum class Storage { kFloat32, kFloat64, kFloat16, kBFloat16 };

}  // namespace vitfast::cpu
