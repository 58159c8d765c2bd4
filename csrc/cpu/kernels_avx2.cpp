// All kernels for x86-64 processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/kernel_prelude.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define VITFAST_ISA avx2
#define VITFAST_VECTOR_BYTES 32
#include "cpu/attention_kernel.h"
#include "cpu/blur_pool_kernel.h"
#include "cpu/gelu_kernel.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/matrix_sum_kernel.h"
#include "cpu/normalization_tangents_kernel.h"
#include "cpu/weight_gradient_kernel.h"
#include "cpu/window_attention_kernel.h"
#include "cpu/winograd_kernel.h"

#pragma GCC pop_options
#endif
