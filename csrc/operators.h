// The CPU implementations of the operators that library.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace vitfast {

using torch::stable::Tensor;

void add_linear_cpu(Tensor x, Tensor y, std::optional<Tensor> index, std::optional<Tensor> scale, Tensor weight,
                    std::optional<Tensor> bias, Tensor out);

void add_linear_backward_cpu(Tensor grad, Tensor y, std::optional<Tensor> index, std::optional<Tensor> scale,
                             Tensor weight, bool add, Tensor y_grad, std::optional<Tensor> weight_grad,
                             std::optional<Tensor> bias_grad);

std::tuple<Tensor, Tensor> attention_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                         double scale, bool return_lse);

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                                  std::optional<Tensor> bias, Tensor out, Tensor lse,
                                                                  double scale);

std::tuple<Tensor, Tensor> attention_qkvpacked_cpu(Tensor qkv, std::optional<Tensor> bias, double scale,
                                                   bool return_lse);

std::tuple<Tensor, Tensor> attention_qkvpacked_backward_cpu(Tensor grad, Tensor qkv, std::optional<Tensor> bias,
                                                            Tensor out, Tensor lse, double scale);

void attention_tangents_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                            std::optional<Tensor> grad, std::optional<Tensor> query_t, std::optional<Tensor> key_t,
                            std::optional<Tensor> value_t, std::optional<Tensor> bias_t, std::optional<Tensor> grad_t,
                            int64_t count, double scale, std::optional<Tensor> out_t,
                            std::optional<Tensor> query_grad_t, std::optional<Tensor> key_grad_t,
                            std::optional<Tensor> value_grad_t, std::optional<Tensor> bias_grad_t);

Tensor blur_pool2d_cpu(Tensor x, Tensor kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                       int64_t padding_mode, std::optional<Tensor> scale, std::optional<Tensor> shift,
                       std::optional<Tensor> mean, std::optional<Tensor> variance, double eps, int64_t activation,
                       double temperature);

std::tuple<Tensor, Tensor, Tensor> blur_pool2d_backward_cpu(Tensor grad, std::optional<Tensor> x, Tensor kernel,
                                                            std::vector<int64_t> size, std::vector<int64_t> stride,
                                                            std::vector<int64_t> padding, int64_t padding_mode,
                                                            std::optional<Tensor> scale, std::optional<Tensor> shift,
                                                            std::optional<Tensor> mean, std::optional<Tensor> variance,
                                                            double eps, int64_t activation, double temperature,
                                                            bool sums);

void conv3x3_cpu(std::optional<Tensor> x_t, std::optional<Tensor> weight, std::optional<Tensor> x,
                 std::optional<Tensor> weight_t, int64_t padding, bool transposed, Tensor out);

void conv3x3_weight_gradient_cpu(std::optional<Tensor> x_t, std::optional<Tensor> grad, std::optional<Tensor> x,
                                 std::optional<Tensor> grad_t, int64_t padding, Tensor out);

void gelu_cpu(Tensor x, Tensor out);

void gelu_backward_cpu(Tensor x, Tensor out, Tensor grad);

void gelu_tangents_cpu(Tensor x, std::optional<Tensor> grad, std::optional<Tensor> x_t, std::optional<Tensor> grad_t,
                       Tensor result);

void matrix_sum_cpu(std::optional<Tensor> a, std::optional<Tensor> b, std::optional<Tensor> a2,
                    std::optional<Tensor> b2, std::optional<Tensor> start, Tensor out);

void norm_linear_cpu(Tensor x, std::optional<Tensor> index, std::optional<Tensor> norm_weight,
                     std::optional<Tensor> norm_bias, double eps, Tensor weight, std::optional<Tensor> bias,
                     Tensor out);

void norm_linear_backward_cpu(Tensor grad, std::optional<Tensor> start, Tensor x, std::optional<Tensor> index,
                              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
                              Tensor weight, bool add, Tensor x_grad, std::optional<Tensor> norm_weight_grad,
                              std::optional<Tensor> norm_bias_grad, std::optional<Tensor> weight_grad,
                              std::optional<Tensor> bias_grad);

void normalization_tangents_cpu(Tensor x, Tensor mean, Tensor inverse, bool per_channel, std::optional<Tensor> weight,
                                std::optional<Tensor> grad, std::optional<Tensor> x_t, std::optional<Tensor> weight_t,
                                std::optional<Tensor> bias_t, std::optional<Tensor> grad_t, int64_t count,
                                std::optional<Tensor> out_t, std::optional<Tensor> x_grad_t,
                                std::optional<Tensor> weight_grad_t, std::optional<Tensor> bias_grad_t);

void residual_mlp_cpu(Tensor x, std::optional<Tensor> index, std::optional<Tensor> scale,
                      std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps, Tensor weight1,
                      std::optional<Tensor> bias1, Tensor weight2, std::optional<Tensor> bias2, Tensor out,
                      std::optional<Tensor> hidden);

void residual_mlp_backward_cpu(Tensor grad, Tensor x, std::optional<Tensor> index, std::optional<Tensor> scale,
                               std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
                               Tensor weight1, Tensor weight2, Tensor hidden, bool add, Tensor x_grad,
                               std::optional<Tensor> norm_weight_grad, std::optional<Tensor> norm_bias_grad,
                               std::optional<Tensor> weight1_grad, std::optional<Tensor> bias1_grad,
                               std::optional<Tensor> weight2_grad, std::optional<Tensor> bias2_grad);

void weight_gradient_cpu(Tensor grad, Tensor x, std::optional<Tensor> grad2, std::optional<Tensor> x2, Tensor weight,
                         std::optional<Tensor> bias, bool add);

std::tuple<Tensor, Tensor> window_attention_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                                std::vector<int64_t> window_size, std::vector<int64_t> shift,
                                                double scale, bool return_lse);

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward_cpu(Tensor grad, Tensor query, Tensor key,
                                                                         Tensor value, std::optional<Tensor> bias,
                                                                         Tensor lse, std::vector<int64_t> window_size,
                                                                         std::vector<int64_t> shift, double scale);

std::tuple<Tensor, Tensor> window_attention_qkvpacked_cpu(Tensor qkv, std::optional<Tensor> bias,
                                                          std::vector<int64_t> window_size, std::vector<int64_t> shift,
                                                          double scale, bool return_lse);

std::tuple<Tensor, Tensor> window_attention_qkvpacked_backward_cpu(Tensor grad, Tensor qkv, std::optional<Tensor> bias,
                                                                   Tensor lse, std::vector<int64_t> window_size,
                                                                   std::vector<int64_t> shift, double scale);

void window_attention_tangents_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                   std::optional<Tensor> grad, std::optional<Tensor> query_t,
                                   std::optional<Tensor> key_t, std::optional<Tensor> value_t,
                                   std::optional<Tensor> bias_t, std::optional<Tensor> grad_t, int64_t count,
                                   std::vector<int64_t> window_size, std::vector<int64_t> shift, double scale,
                                   std::optional<Tensor> out_t, std::optional<Tensor> query_grad_t,
                                   std::optional<Tensor> key_grad_t, std::optional<Tensor> value_grad_t,
                                   std::optional<Tensor> bias_grad_t);

}  // namespace vitfast
