// The blur pooling operators on the CPU: the blur as sparse matrices, allocation, and the choice of a kernel. Arguments
// were checked by vitfast.functional; what is checked here only keeps a direct call of the operator within bounds.
#include "cpu/blur_pool.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "blur_pool_maps.h"
#include "cpu/dispatch.h"
#include "cpu/results.h"
#include "operators.h"

namespace vitfast {
namespace {

using cpu::BlurCall;
using cpu::BlurMatrix;
using cpu::BlurPlan;
using cpu::BlurRows;
using cpu::BlurTap;
using torch::headeronly::ScalarType;

const cpu::BlurKernels& kernels() {
  return cpu::kernels_for(cpu::avx512::blur_kernels, cpu::avx2::blur_kernels, cpu::baseline::blur_kernels);
}

// ---- the kernel as lines: one if it is an outer product ------------------------------------------------------------

struct Lines {
  std::vector<double> rows;                  // the weight of each row of the kernel
  std::vector<std::vector<double>> columns;  // its lines; a single one serves all rows
};

constexpr int64_t kMostTaps = 7;  // each way

// The taps of a kernel of float32 or float64, line by line.
void copy_taps(const Tensor& kernel, double* taps) {
  if (kernel.scalar_type() == ScalarType::Float) {
    std::copy_n(static_cast<const float*>(kernel.data_ptr()), kernel.numel(), taps);
  } else {
    std::copy_n(static_cast<const double*>(kernel.data_ptr()), kernel.numel(), taps);
  }
}

// `exact`: for maps of float64.
Lines lines_of(const double* values, int64_t height, int64_t width, bool exact) {
  const double* pivot =
      std::max_element(values, values + height * width, [](double a, double b) { return std::abs(a) < std::abs(b); });
  const double* pivot_row = values + (pivot - values) / width * width;
  const int64_t pivot_column = (pivot - values) % width;
  Lines lines;
  lines.columns.emplace_back(pivot_row, pivot_row + width);
  // A kernel that was multiplied out in the maps' dtype is an outer product but for rounding, and taken as one.
  const double rounding = exact ? 1e-15 : 1e-7;
  bool separable = true;
  for (int64_t y = 0; y < height; ++y) {
    lines.rows.push_back(*pivot == 0 ? 1 : values[y * width + pivot_column] / *pivot);
    for (int64_t x = 0; x < width; ++x) {
      const double value = values[y * width + x];
      separable = separable && std::abs(value - lines.rows[y] * pivot_row[x]) <= rounding * std::abs(value);
    }
  }
  if (!separable) {
    lines.columns.clear();
    for (int64_t y = 0; y < height; ++y) lines.columns.emplace_back(values + y * width, values + (y + 1) * width);
    lines.rows.assign(height, 1);
  }
  return lines;
}

// ---- padding and stride as matrices --------------------------------------------------------------------------------

struct Geometry {
  int64_t size, outputs, stride, before, after;
  BlurPadding padding;

  // The input at a place that is `at` from the first, or -1 for a zero.
  int64_t source(int64_t at) const {
    if (0 <= at && at < size) return at;
    switch (padding) {
      case BlurPadding::kZeros:
        return -1;
      case BlurPadding::kReplicate:
        return std::clamp<int64_t>(at, 0, size - 1);
      case BlurPadding::kCircular:
        return (at % size + size) % size;
      case BlurPadding::kReflect:
        break;
    }
    const int64_t period = std::max<int64_t>(2 * (size - 1), 1);
    const int64_t within = (at % period + period) % period;
    return within < size ? within : period - within;
  }
};

// Adds a tap to those since `begin`, or its weight to the one that is there.
void add_tap(std::vector<BlurTap>& taps, int64_t begin, const BlurTap& tap) {
  for (size_t i = begin; i < taps.size(); ++i) {
    if (taps[i].from == tap.from && taps[i].line == tap.line) {
      taps[i].weight += tap.weight;
      return;
    }
  }
  taps.push_back(tap);
}

BlurMatrix matrix_of(const Geometry& axis, const std::vector<double>& kernel, bool line_for_each) {
  BlurMatrix matrix;
  for (int64_t o = 0; o < axis.outputs; ++o) {
    const int64_t begin = static_cast<int64_t>(matrix.taps.size());
    matrix.begin.push_back(begin);
    for (int64_t t = 0; t < static_cast<int64_t>(kernel.size()); ++t) {
      const int64_t from = axis.source(o * axis.stride + t - axis.before);
      if (from >= 0) add_tap(matrix.taps, begin, {from, line_for_each ? t : 0, kernel[t]});
    }
  }
  matrix.begin.push_back(static_cast<int64_t>(matrix.taps.size()));
  return matrix;
}

BlurMatrix transposed(const BlurMatrix& matrix, int64_t inputs) {
  std::vector<int64_t> counts(inputs + 1);
  for (const BlurTap& tap : matrix.taps) ++counts[tap.from + 1];
  for (int64_t i = 0; i < inputs; ++i) counts[i + 1] += counts[i];
  BlurMatrix result{counts, std::vector<BlurTap>(matrix.taps.size())};
  for (size_t o = 0; o + 1 < matrix.begin.size(); ++o) {
    for (int64_t i = matrix.begin[o]; i < matrix.begin[o + 1]; ++i) {
      const BlurTap& tap = matrix.taps[i];
      result.taps[counts[tap.from]++] = {static_cast<int64_t>(o), tap.line, tap.weight};
    }
  }
  return result;
}

// ---- the order of rows ---------------------------------------------------------------------------------------------

// `strip` outputs make a strip, `group` a group.
BlurRows rows_of(BlurMatrix matrix, int64_t strip, int64_t group) {
  BlurRows rows;
  for (int64_t start = 0; start < matrix.outputs(); start += strip) {
    rows.strips.push_back(static_cast<int64_t>(rows.groups.size()));
    const int64_t stop = std::min(start + strip, matrix.outputs());
    for (int64_t first = start; first < stop; first += group) {
      rows.groups.push_back({first, std::min(first + group, stop), 0, 0});
    }
  }
  rows.strips.push_back(static_cast<int64_t>(rows.groups.size()));
  rows.matrix = std::move(matrix);
  return rows;
}

// Gives every row that a group of outputs needs a slot, if it has none yet.
void prepare_rows(BlurRows& rows, int64_t inputs) {
  std::vector<int64_t> slot_of(inputs, -1);    // of a row
  std::vector<int64_t> wanted_by(inputs, -1);  // the last group that wanted it
  std::vector<int64_t> held;                   // what is in the slots
  size_t next_strip = 0;
  for (int64_t g = 0; g < static_cast<int64_t>(rows.groups.size()); ++g) {
    if (g == rows.strips[next_strip]) {
      ++next_strip;
      std::fill(slot_of.begin(), slot_of.end(), -1);
      held.clear();
    }
    BlurRows::Group& group = rows.groups[g];
    group.begin = static_cast<int64_t>(rows.loads.size());
    const int64_t begin = rows.matrix.begin[group.first], end = rows.matrix.begin[group.last];
    for (int64_t i = begin; i < end; ++i) wanted_by[rows.matrix.taps[i].from] = g;
    size_t victim = 0;
    for (int64_t i = begin; i < end; ++i) {
      BlurTap& tap = rows.matrix.taps[i];
      int64_t& slot = slot_of[tap.from];
      if (slot < 0) {
        while (victim < held.size() && wanted_by[held[victim]] == g) ++victim;
        if (victim == held.size()) {
          held.push_back(tap.from);
        } else {
          slot_of[held[victim]] = -1;
          held[victim] = tap.from;
        }
        slot = static_cast<int64_t>(victim);
        rows.loads.push_back({tap.from, slot});
      }
      tap.from = slot;
    }
    group.end = static_cast<int64_t>(rows.loads.size());
    rows.slots = std::max(rows.slots, static_cast<int64_t>(held.size()));
  }
}

// ---- calls ---------------------------------------------------------------------------------------------------------

struct Options {
  std::vector<int64_t> stride, padding;  // (rows, columns); (left, right, top, bottom)
  int64_t padding_mode;
};

Geometry geometry_of(int64_t size, int64_t taps, int64_t stride, int64_t before, int64_t after, int64_t mode) {
  const int64_t outputs = blur_outputs(size, taps, stride, before, after, mode);
  return {size, outputs, stride, before, after, static_cast<BlurPadding>(mode)};
}

// Maps of so many bytes, input and output together, are beyond the second levels. Their strips are short, so that
// memory is met in order.
constexpr int64_t kFarBytes = 10 << 20, kFarStripBytes = 2048;

int64_t rows_of_strip(const BlurPlan& plan, int64_t element_size) {
  const int64_t in = plan.in_height * plan.in_width, out = plan.out_height * plan.out_width;
  const bool far = plan.batch * plan.channels * (in + out) * element_size >= kFarBytes;
  const int64_t values = far ? kFarStripBytes / element_size : cpu::kStripValues;
  return std::max<int64_t>(values / std::max(plan.in_width, plan.out_width), far ? 8 : 16);
}

// What a plan is made from: the blur of maps, or its transpose. Without padding, so that keys can be compared by bytes.
struct PlanKey {
  int64_t height, width, batch, channels, storage, element_size, channels_last, transpose, prepared, instructions;
  int64_t stride[2], padding[4], padding_mode, taps[2];
  double weights[kMostTaps * kMostTaps];

  bool operator==(const PlanKey& other) const { return std::memcmp(this, &other, sizeof(PlanKey)) == 0; }
};

static_assert(sizeof(PlanKey) == sizeof(double) * (19 + kMostTaps * kMostTaps), "there is padding");

std::shared_ptr<const BlurPlan> new_plan(const PlanKey& key) {
  const auto& [height, width, batch, channels, storage, element_size, channels_last, transpose, prepared, instructions,
               stride, padding, mode, taps, weights] = key;
  const Geometry rows = geometry_of(height, taps[0], stride[0], padding[2], padding[3], mode);
  const Geometry columns = geometry_of(width, taps[1], stride[1], padding[0], padding[1], mode);
  const Lines lines = lines_of(weights, taps[0], taps[1], static_cast<cpu::Storage>(storage) == cpu::Storage::kFloat64);

  const auto plan = std::make_shared<BlurPlan>();
  plan->storage = static_cast<cpu::Storage>(storage);
  plan->channels_last = channels_last;
  plan->prepared = prepared;
  plan->row_period = transpose ? stride[0] : 1;
  plan->column_period = transpose ? stride[1] : 1;
  plan->batch = batch;
  plan->channels = channels;
  plan->in_height = height, plan->out_height = rows.outputs;
  plan->in_width = width, plan->out_width = columns.outputs;
  BlurMatrix matrix = matrix_of(rows, lines.rows, lines.columns.size() > 1);
  for (const std::vector<double>& line : lines.columns) plan->columns.push_back(matrix_of(columns, line, false));
  if (transpose) {
    std::swap(plan->in_height, plan->out_height);
    std::swap(plan->in_width, plan->out_width);
    matrix = transposed(matrix, height);
    for (BlurMatrix& line : plan->columns) line = transposed(line, width);
  }
  // Enough strips for many threads, the same whatever their number, so that sums have one order.
  constexpr int64_t kTasks = 64;
  const int64_t least_rows = channels_last ? 8 : 16, maps = channels_last ? batch : batch * channels;
  const int64_t strips =
      std::clamp<int64_t>(kTasks / std::max<int64_t>(maps, 1), 1, std::max<int64_t>(plan->out_height / least_rows, 1));
  int64_t strip = (plan->out_height + strips - 1) / strips, group = 1;
  if (!channels_last) group = strip = std::min(strip, rows_of_strip(*plan, element_size));
  plan->rows = rows_of(std::move(matrix), strip, group);
  if (prepared) prepare_rows(plan->rows, plan->in_height);
  plan->tables = kernels().tables(*plan);
  return plan;
}

// The plan of a key: one of those that this thread used last, or a new one. Plans of very large maps are large and not
// kept.
std::shared_ptr<const BlurPlan> plan_of(const PlanKey& key) {
  constexpr size_t kKept = 32;
  constexpr int64_t kLargest = 2048;
  thread_local std::list<std::pair<PlanKey, std::shared_ptr<const BlurPlan>>> kept;  // the last used first
  for (auto known = kept.begin(); known != kept.end(); ++known) {
    if (known->first == key) {
      kept.splice(kept.begin(), kept, known);
      return known->second;
    }
  }
  std::shared_ptr<const BlurPlan> plan = new_plan(key);
  if (std::max({plan->in_height, plan->in_width, plan->out_height, plan->out_width}) > kLargest) return plan;
  kept.emplace_front(key, plan);
  if (kept.size() > kKept) kept.pop_back();
  return plan;
}

// The plan for a (batch, channels, height, width) map.
std::shared_ptr<const BlurPlan> plan_of(const Tensor& like, int64_t height, int64_t width, const Tensor& kernel,
                                        const Options& options, BlurActivation activation, bool channels_last,
                                        bool transpose) {
  check_blur_kernel(kernel);
  const auto& [stride, padding, mode] = options;
  check_blur(stride.size() == 2 && padding.size() == 4, "stride takes 2 numbers, padding 4");
  PlanKey key{};
  key.height = height, key.width = width;
  key.batch = like.size(0), key.channels = like.size(1);
  key.storage = static_cast<int64_t>(cpu::storage_of(like.scalar_type()));
  key.element_size = static_cast<int64_t>(like.element_size());
  key.channels_last = channels_last;
  key.transpose = transpose;
  // A row takes part in several outputs: worth a buffer for what is dear.
  key.prepared = !transpose && activation == BlurActivation::kTanhRelu;
  key.instructions = static_cast<int64_t>(cpu::instruction_set());
  std::copy(stride.begin(), stride.end(), key.stride);
  std::copy(padding.begin(), padding.end(), key.padding);
  key.padding_mode = mode;
  key.taps[0] = kernel.size(0), key.taps[1] = kernel.size(1);
  copy_taps(kernel, key.weights);
  return plan_of(key);
}

// What an operator is given for its prologue.
struct Affine {
  const std::optional<Tensor>&scale, &shift;    // of the map; or, if the next two are there,
  const std::optional<Tensor>&mean, &variance;  // weight and bias of a normalisation
  double eps;
};

// The scale of all channels, then their shift: of z = weight * (x - mean) / sqrt(variance + eps) + bias.
template <class T>
std::vector<T> fold(const Affine& norm, int64_t channels, ScalarType dtype) {
  const auto values = [&](const std::optional<Tensor>& tensor) {
    return static_cast<const T*>(per_channel(tensor, channels, dtype));
  };
  const T *weight = values(norm.scale), *bias = values(norm.shift);
  const T *mean = values(norm.mean), *variance = values(norm.variance);
  std::vector<T> folded(2 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    const T scale = (weight == nullptr ? 1 : weight[c]) / std::sqrt(variance[c] + static_cast<T>(norm.eps));
    folded[c] = scale;
    folded[channels + c] = (bias == nullptr ? 0 : bias[c]) - mean[c] * scale;
  }
  return folded;
}

// A prologue, and its scale and shift if they are those of a normalisation.
class Prologue {
 public:
  Prologue(const Tensor& like, const Affine& affine, int64_t activation, double temperature) {
    check_blur(0 <= activation && activation <= 3, "activation is unknown");
    check_blur(affine.mean.has_value() == affine.variance.has_value(), "mean and variance must come together");
    call_.activation = static_cast<BlurActivation>(activation);
    call_.temperature = temperature;
    const ScalarType dtype = cpu::compute_dtype(like.scalar_type());
    const int64_t channels = like.size(1);
    if (!affine.mean.has_value()) {
      call_.scale = per_channel(affine.scale, channels, dtype);
      call_.shift = per_channel(affine.shift, channels, dtype);
    } else if (dtype == ScalarType::Double) {
      use(fold<double>(affine, channels, dtype), doubles_);
    } else {
      use(fold<float>(affine, channels, dtype), floats_);
    }
  }
  Prologue(const Prologue&) = delete;

  const cpu::BlurPrologue& call() const { return call_; }

 private:
  template <class T>
  void use(std::vector<T>&& folded, std::vector<T>& held) {
    held = std::move(folded);
    call_.scale = held.data();
    call_.shift = held.data() + held.size() / 2;
  }

  cpu::BlurPrologue call_;
  std::vector<double> doubles_;
  std::vector<float> floats_;
};

bool empty(const Tensor& x) { return x.numel() == 0; }

}  // namespace

Tensor blur_pool2d_cpu(Tensor x, Tensor kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                       int64_t padding_mode, std::optional<Tensor> scale, std::optional<Tensor> shift,
                       std::optional<Tensor> mean, std::optional<Tensor> variance, double eps, int64_t activation,
                       double temperature) {
  const bool channels_last = is_channels_last(x);
  check_map(x, channels_last);
  const Prologue prologue(x, {scale, shift, mean, variance, eps}, activation, temperature);
  const Options options{stride, padding, padding_mode};
  const auto plan = plan_of(x, x.size(2), x.size(3), kernel, options, prologue.call().activation, channels_last, false);
  const Tensor out = new_map(x, plan->out_height, plan->out_width, channels_last, cpu::new_result);
  BlurCall call{*plan, prologue.call()};
  call.in = x.data_ptr();
  call.out = out.data_ptr();
  if (!empty(out)) kernels().run(call);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> blur_pool2d_backward_cpu(Tensor grad, std::optional<Tensor> x, Tensor kernel,
                                                            std::vector<int64_t> size, std::vector<int64_t> stride,
                                                            std::vector<int64_t> padding, int64_t padding_mode,
                                                            std::optional<Tensor> scale, std::optional<Tensor> shift,
                                                            std::optional<Tensor> mean, std::optional<Tensor> variance,
                                                            double eps, int64_t activation, double temperature,
                                                            bool sums) {
  const Tensor& leading = x.has_value() ? *x : grad;
  const bool channels_last = is_channels_last(leading);
  check_map(grad, channels_last);
  check_blur(size.size() == 2, "size must be the height and width of x");
  const Prologue prologue(grad, {scale, shift, mean, variance, eps}, activation, temperature);
  const Options options{stride, padding, padding_mode};
  const auto plan = plan_of(grad, size[0], size[1], kernel, options, prologue.call().activation, channels_last, true);
  check_blur(grad.size(2) == plan->in_height && grad.size(3) == plan->in_width,
             "grad must have the size of the output");
  const Tensor grad_x = new_map(grad, size[0], size[1], channels_last, cpu::new_result);
  BlurCall call{*plan, prologue.call()};
  call.in = grad.data_ptr();
  call.out = grad_x.data_ptr();
  Tensor none = torch::stable::new_empty(grad, {0}, ScalarType::Double);
  const bool any = activation != 0 || scale.has_value() || shift.has_value() || mean.has_value();
  check_blur(x.has_value() == any, "x is needed with a prologue, and only then");
  check_blur(!sums || x.has_value(), "there are sums with a prologue only");
  if (!x.has_value()) {
    if (!empty(grad_x)) kernels().run(call);
    return {grad_x, none, none};
  }
  check_map(*x, channels_last);
  check_blur(x->scalar_type() == grad.scalar_type() && x->size(0) == grad.size(0) && x->size(1) == grad.size(1) &&
                 x->size(2) == size[0] && x->size(3) == size[1],
             "x must have the dtype of grad, and its own size");
  call.primal = x->data_ptr();
  // The derivative of tanh is dear; there is no version of it without sums.
  if (!sums && call.prologue.activation != BlurActivation::kTanhRelu) {
    if (!empty(grad_x)) kernels().run(call);
    return {grad_x, none, none};
  }
  Tensor partial = torch::stable::new_empty(grad, {2, plan->parts(), plan->channels}, ScalarType::Double);
  Tensor totals = torch::stable::new_empty(grad, {2, plan->channels}, ScalarType::Double);
  call.scale_partial = static_cast<double*>(partial.data_ptr());
  call.shift_partial = call.scale_partial + partial.stride(0);
  if (empty(grad_x)) {
    torch::stable::zero_(totals);
  } else {
    kernels().run(call);
    cpu::add_up_partial_sums(partial, 2, plan->parts(), plan->channels, totals);
  }
  if (!sums) return {grad_x, none, none};
  return {grad_x, torch::stable::select(totals, 0, 0), torch::stable::select(totals, 0, 1)};
}

}  // namespace vitfast
