// Everything that kernels include from outside, included before the instruction set is raised by a pragma: inline
// functions of these headers are then compiled for the baseline in every file, and the linker may keep any of them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/attention.h"
#include "cpu/blur_pool.h"
#include "cpu/cache.h"
#include "cpu/gelu.h"
#include "cpu/layer_norm.h"
#include "cpu/matrix_sum.h"
#include "cpu/normalization_tangents.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/weight_gradient.h"
#include "cpu/window_attention.h"
#include "cpu/winograd.h"
