// The operator for sums of matrix products on the CPU. Arguments come from vitfast/ops/linear.py and layers.py; what is
// checked here only keeps a direct call within bounds.
#include "cpu/matrix_sum.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/dispatch.h"
#include "operators.h"

namespace vitfast {

void cpu::run(const MatrixSum& call) {
  kernels_for(avx512::matrix_sum_kernels, avx2::matrix_sum_kernels, baseline::matrix_sum_kernels).run(call);
}

namespace {

using torch::headeronly::ScalarType;

void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "vitfast::matrix_sum: ", what); }

struct Matrices {
  const float* data;
  int64_t step, rows, columns, row, column;
};

// (K, rows, columns), or one matrix for all.
Matrices matrices(const Tensor& tensor, int64_t count) {
  const int64_t d = tensor.dim() - 2;
  check(tensor.scalar_type() == ScalarType::Float && (d == 0 || (d == 1 && tensor.size(0) == count)),
        "factors must be float32 matrices, maybe with K in front");
  return {static_cast<const float*>(tensor.data_ptr()),
          d == 0 ? 0 : tensor.stride(0),
          tensor.size(d),
          tensor.size(d + 1),
          tensor.stride(d),
          tensor.stride(d + 1)};
}

}  // namespace

void matrix_sum_cpu(std::optional<Tensor> a, std::optional<Tensor> b, std::optional<Tensor> a2,
                    std::optional<Tensor> b2, std::optional<Tensor> start, Tensor out) {
  check(out.dim() == 3 && out.scalar_type() == ScalarType::Float && out.is_contiguous(),
        "out must be (K, rows, columns) in float32, contiguous");
  cpu::MatrixSum call{};
  call.count = out.size(0), call.rows = out.size(1), call.columns = out.size(2);
  check(call.count > 0 && call.rows > 0 && call.columns > 0 && call.columns % cpu::kMatrixSumColumns == 0,
        "out must have elements, and a multiple of 16 columns");
  const auto add = [&](const std::optional<Tensor>& left, const std::optional<Tensor>& right) {
    if (!left.has_value() || !right.has_value()) return;
    const Matrices l = matrices(*left, call.count), r = matrices(*right, call.count);
    check(l.rows == call.rows && r.columns == call.columns && l.columns == r.rows && l.columns > 0,
          "factors must be (rows, depth) and (depth, columns) with some depth");
    check((l.column == 1 || l.columns == 1) && (r.row == 1 || r.column == 1),
          "elements must be adjacent in rows of the first factor, and in rows or columns of the second");
    call.terms[call.terms_in_use++] = {l.data, r.data, l.columns, l.step, l.row, r.step, r.row, r.column};
  };
  add(a, b);
  add(a2, b2);
  check(call.terms_in_use > 0, "there must be a product");
  if (start.has_value()) {
    const int64_t d = start->dim() - 1;
    check(start->scalar_type() == ScalarType::Float && (d == 0 || (d == 1 && start->size(0) == call.count)) &&
              start->size(d) == call.columns && start->stride(d) == 1,
          "start must be (columns,) or (K, columns) in float32, with adjacent elements in a row");
    call.start = static_cast<const float*>(start->data_ptr()), call.start_step = d == 0 ? 0 : start->stride(0);
  }
  call.out = static_cast<float*>(out.data_ptr());
  cpu::run(call);
}

}  // namespace vitfast
