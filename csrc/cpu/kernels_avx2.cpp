// All kernels for x86-64 processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/kernel_prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define VITFAST_ISA avx2
#define VITFAST_VECTOR_BYTES 32
#include "cpu/window_attention_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
