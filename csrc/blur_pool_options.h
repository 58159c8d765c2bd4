// The options of blur pooling, by the numbers by which vitfast/ops/blur_pool.py knows them.
#pragma once

namespace vitfast {

enum class BlurPadding { kZeros, kReflect, kReplicate, kCircular };
enum class BlurActivation { kNone, kRelu, kRelu6, kTanhRelu };  // the last: relu(temperature * tanh(z / temperature))

}  // namespace vitfast
