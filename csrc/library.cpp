// Every operator's schema, and its CPU implementation. Fakes, autograd and the Triton implementations are registered
// from Python, in vitfast/ops.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY(vitfast, m) {
  // Residual branches: of some rows of the map x, each once, or of all without an index. Maps are written in these
  // rows.
  //   add_linear:    out = x + scale (y weight^T + bias)
  //   norm_linear:   out = norm(x) weight^T + bias; the backward adds the gradient of x to start, if any
  //   residual_mlp:  out = x + scale mlp(norm(x)); hidden are the values before the activation
  // Gradients of parameters are written, or added to what is there.
  m.def(
      "add_linear(Tensor x, Tensor y, Tensor? index, Tensor? scale, Tensor weight, Tensor? bias, Tensor(a!) out) -> "
      "()");
  m.def(
      "add_linear_backward(Tensor grad, Tensor y, Tensor? index, Tensor? scale, Tensor weight, bool add, Tensor(a!) "
      "y_grad, Tensor(b!)? weight_grad, Tensor(c!)? bias_grad) -> ()");
  m.def(
      "norm_linear(Tensor x, Tensor? index, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? "
      "bias, Tensor(a!) out) -> ()");
  m.def(
      "norm_linear_backward(Tensor grad, Tensor? start, Tensor x, Tensor? index, Tensor? norm_weight, Tensor? "
      "norm_bias, float eps, Tensor weight, bool add, Tensor(a!) x_grad, Tensor(b!)? norm_weight_grad, Tensor(c!)? "
      "norm_bias_grad, Tensor(d!)? weight_grad, Tensor(e!)? bias_grad) -> ()");
  m.def(
      "residual_mlp(Tensor x, Tensor? index, Tensor? scale, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor "
      "weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor(a!) out, Tensor(b!)? hidden) -> ()");
  m.def(
      "residual_mlp_backward(Tensor grad, Tensor x, Tensor? index, Tensor? scale, Tensor? norm_weight, Tensor? "
      "norm_bias, float eps, Tensor weight1, Tensor weight2, Tensor hidden, bool add, Tensor(a!) x_grad, Tensor(b!)? "
      "norm_weight_grad, Tensor(c!)? norm_bias_grad, Tensor(d!)? weight1_grad, Tensor(e!)? bias1_grad, Tensor(f!)? "
      "weight2_grad, Tensor(g!)? bias2_grad) -> ()");
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, bool return_lse) -> "
      "(Tensor output, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, Tensor lse, "
      "float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)");
  m.def("attention_qkvpacked(Tensor qkv, Tensor? bias, float scale, bool return_lse) -> (Tensor output, Tensor lse)");
  m.def(
      "attention_qkvpacked_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, float scale) -> "
      "(Tensor grad_qkv, Tensor grad_bias)");
  // Tangents, `count` at once: of the output, and of what the backward returns. Results that are given are written.
  m.def(
      "attention_tangents(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? grad, Tensor? query_t, Tensor? "
      "key_t, Tensor? value_t, Tensor? bias_t, Tensor? grad_t, int count, float scale, Tensor(a!)? out_t, Tensor(b!)? "
      "query_grad_t, Tensor(c!)? key_grad_t, Tensor(d!)? value_grad_t, Tensor(e!)? bias_grad_t) -> ()");
  // Scale and shift of a blur's prologue; or, with mean and variance, the weight and bias of a normalisation, on the
  // CPU alone. The gradients of scale and shift are empty without sums.
  m.def(
      "blur_pool2d(Tensor x, Tensor kernel, int[] stride, int[] padding, int padding_mode, Tensor? scale, Tensor? "
      "shift, Tensor? mean, Tensor? variance, float eps, int activation, float temperature) -> Tensor");
  m.def(
      "blur_pool2d_backward(Tensor grad, Tensor? x, Tensor kernel, int[] size, int[] stride, int[] padding, int "
      "padding_mode, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? variance, float eps, int activation, float "
      "temperature, bool sums) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)");
  // Of 3x3 filters with stride 1, K at a time and channels last: out = x_t * weight + x * weight_t, transposed or not;
  // and the gradients of filters, those by (x_t, grad) and by (x, grad_t), added up. Half of either may be missing.
  m.def(
      "conv3x3(Tensor? x_t, Tensor? weight, Tensor? x, Tensor? weight_t, int padding, bool transposed, Tensor(a!) out) "
      "-> ()");
  m.def(
      "conv3x3_weight_gradient(Tensor? x_t, Tensor? grad, Tensor? x, Tensor? grad_t, int padding, Tensor(a!) out) -> "
      "()");
  // Steps of the fused MLP: out = gelu(x); and out = gelu(x) while grad, that of out, becomes that of x.
  m.def("gelu(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_backward(Tensor x, Tensor(a!) out, Tensor(b!) grad) -> ()");
  m.def("gelu_tangents(Tensor x, Tensor? grad, Tensor? x_t, Tensor? grad_t, Tensor(a!) result) -> ()");
  // a b + a2 b2 + start, of matrices or of K of them; either product and start may be missing.
  m.def("matrix_sum(Tensor? a, Tensor? b, Tensor? a2, Tensor? b2, Tensor? start, Tensor(a!) out) -> ()");
  // Of layer normalisation and, with statistics of channels that are constants, of batch normalisation: `count` at
  // once.
  m.def(
      "normalization_tangents(Tensor x, Tensor mean, Tensor inverse, bool per_channel, Tensor? weight, Tensor? grad, "
      "Tensor? x_t, Tensor? weight_t, Tensor? bias_t, Tensor? grad_t, int count, Tensor(a!)? out_t, Tensor(b!)? "
      "x_grad_t, Tensor(c!)? weight_grad_t, Tensor(d!)? bias_grad_t) -> ()");
  // Of a linear layer: weight = grad^T x + grad2^T x2, of matrices or of K of them, and bias = the sum of the rows of
  // grad; or these added to what they hold. The second term may be missing.
  m.def(
      "weight_gradient(Tensor grad, Tensor x, Tensor? grad2, Tensor? x2, Tensor(a!) weight, Tensor(b!)? bias, "
      "bool add) -> ()");
  m.def(
      "window_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, int[] window_size, int[] shift, float "
      "scale, bool return_lse) -> (Tensor output, Tensor lse)");
  m.def(
      "window_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor lse, int[] "
      "window_size, int[] shift, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor "
      "grad_bias)");
  m.def(
      "window_attention_qkvpacked(Tensor qkv, Tensor? bias, int[] window_size, int[] shift, float scale, bool "
      "return_lse) -> (Tensor output, Tensor lse)");
  m.def(
      "window_attention_qkvpacked_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor lse, int[] window_size, int[] "
      "shift, float scale) -> (Tensor grad_qkv, Tensor grad_bias)");
  m.def(
      "window_attention_tangents(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? grad, Tensor? query_t, "
      "Tensor? key_t, Tensor? value_t, Tensor? bias_t, Tensor? grad_t, int count, int[] window_size, int[] shift, "
      "float scale, Tensor(a!)? out_t, Tensor(b!)? query_grad_t, Tensor(c!)? key_grad_t, Tensor(d!)? value_grad_t, "
      "Tensor(e!)? bias_grad_t) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitfast, CPU, m) {
  m.impl("add_linear", TORCH_BOX(&vitfast::add_linear_cpu));
  m.impl("add_linear_backward", TORCH_BOX(&vitfast::add_linear_backward_cpu));
  m.impl("attention", TORCH_BOX(&vitfast::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&vitfast::attention_backward_cpu));
  m.impl("attention_qkvpacked", TORCH_BOX(&vitfast::attention_qkvpacked_cpu));
  m.impl("attention_qkvpacked_backward", TORCH_BOX(&vitfast::attention_qkvpacked_backward_cpu));
  m.impl("attention_tangents", TORCH_BOX(&vitfast::attention_tangents_cpu));
  m.impl("blur_pool2d", TORCH_BOX(&vitfast::blur_pool2d_cpu));
  m.impl("blur_pool2d_backward", TORCH_BOX(&vitfast::blur_pool2d_backward_cpu));
  m.impl("conv3x3", TORCH_BOX(&vitfast::conv3x3_cpu));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&vitfast::conv3x3_weight_gradient_cpu));
  m.impl("gelu", TORCH_BOX(&vitfast::gelu_cpu));
  m.impl("gelu_backward", TORCH_BOX(&vitfast::gelu_backward_cpu));
  m.impl("gelu_tangents", TORCH_BOX(&vitfast::gelu_tangents_cpu));
  m.impl("matrix_sum", TORCH_BOX(&vitfast::matrix_sum_cpu));
  m.impl("norm_linear", TORCH_BOX(&vitfast::norm_linear_cpu));
  m.impl("norm_linear_backward", TORCH_BOX(&vitfast::norm_linear_backward_cpu));
  m.impl("normalization_tangents", TORCH_BOX(&vitfast::normalization_tangents_cpu));
  m.impl("residual_mlp", TORCH_BOX(&vitfast::residual_mlp_cpu));
  m.impl("residual_mlp_backward", TORCH_BOX(&vitfast::residual_mlp_backward_cpu));
  m.impl("weight_gradient", TORCH_BOX(&vitfast::weight_gradient_cpu));
  m.impl("window_attention", TORCH_BOX(&vitfast::window_attention_cpu));
  m.impl("window_attention_backward", TORCH_BOX(&vitfast::window_attention_backward_cpu));
  m.impl("window_attention_qkvpacked", TORCH_BOX(&vitfast::window_attention_qkvpacked_cpu));
  m.impl("window_attention_qkvpacked_backward", TORCH_BOX(&vitfast::window_attention_qkvpacked_backward_cpu));
  m.impl("window_attention_tangents", TORCH_BOX(&vitfast::window_attention_tangents_cpu));
}
