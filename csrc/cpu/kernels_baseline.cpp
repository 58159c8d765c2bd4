// All kernels for any processor: 16-byte vectors (SSE2 on x86-64, NEON on ARM).
#include "cpu/kernel_prelude.h"

#define VITFAST_ISA baseline
#define VITFAST_VECTOR_BYTES 16
#include "cpu/attention_kernel.h"
#include "cpu/blur_pool_kernel.h"
#include "cpu/gelu_kernel.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/matrix_sum_kernel.h"
#include "cpu/normalization_tangents_kernel.h"
#include "cpu/weight_gradient_kernel.h"
#include "cpu/window_attention_kernel.h"
#include "cpu/winograd_kernel.h"
