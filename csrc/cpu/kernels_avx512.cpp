// All kernels for x86-64 processors with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#include "cpu/kernel_prelude.h"

// GCC 12 reports its own headers' _mm512_undefined_*() as uninitialized:
// https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#define VITFAST_ISA avx512
#define VITFAST_VECTOR_BYTES 64
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
