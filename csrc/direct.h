// Operators called from Python without PyTorch's dispatcher.
//
// The dispatcher boxes every argument on its way through the stable ABI, which takes longer than a small map's kernel.
// Here tensors cross by DLPack: arguments are borrowed for the length of a call, results are handed over.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace vitfast::direct {

namespace py = pybind11;
using torch::stable::Tensor;

// An argument is no tensor that may cross: the dispatcher has to see the call.
struct Unsuited : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What is used of PyTorch's Python; it stays for as long as the process. Made when the module is, for the lock that a
// thread holds while it makes a static variable would not go together with Python's own.
struct Python {
  PyObject *tensor, *parameter;       // types
  PyObject *to_dlpack, *from_dlpack;  // functions
  PyObject* is_neg;                   // the name of a method

  static const Python& instance() {
    static const Python python;
    return python;
  }

 private:
  Python() {
    const auto torch = py::module_::import("torch");
    const auto kept = [](py::object object) { return object.release().ptr(); };
    tensor = kept(torch.attr("Tensor"));
    parameter = kept(torch.attr("nn").attr("Parameter"));
    to_dlpack = kept(torch.attr("_C").attr("_to_dlpack"));
    from_dlpack = kept(torch.attr("_C").attr("_from_dlpack"));
    is_neg = kept(py::str("is_neg"));
  }
};

inline void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("vitfast: PyTorch refused a tensor");
}

inline int32_t dtype_of(DLDataType type) {
  if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return aoti_torch_dtype_bfloat16();
  if (type.lanes == 1 && type.code == kDLFloat) {
    if (type.bits == 16) return aoti_torch_dtype_float16();
    if (type.bits == 32) return aoti_torch_dtype_float32();
    if (type.bits == 64) return aoti_torch_dtype_float64();
  }
  throw Unsuited("dtype");
}

inline DLDataType dlpack_type_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return {kDLBfloat, 16, 1};
    case ScalarType::Half:
      return {kDLFloat, 16, 1};
    case ScalarType::Float:
      return {kDLFloat, 32, 1};
    case ScalarType::Double:
      return {kDLFloat, 64, 1};
    default:
      throw std::logic_error("vitfast: an operator returned a tensor that is not of floating point");
  }
}

// The memory of a tensor of Python, for as long as that lives. Throws Unsuited for subclasses, wrappers of torch.func,
// views that negate, tensors without memory and those on other devices.
inline Tensor borrow(PyObject* object) {
  const Python& python = Python::instance();
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != python.tensor && type != python.parameter) throw Unsuited("type");
  const auto negates = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, python.is_neg));
  if (!negates) throw py::error_already_set();
  if (negates.is(py::bool_(true))) throw Unsuited("negated");
  const auto capsule = py::reinterpret_steal<py::object>(PyObject_CallOneArg(python.to_dlpack, object));
  if (!capsule) {
    PyErr_Clear();
    throw Unsuited("memory");
  }
  const auto* managed = static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  const DLTensor& tensor = managed->dl_tensor;
  if (tensor.device.device_type != kDLCPU) throw Unsuited("device");
  AtenTensorHandle handle;
  check(aoti_torch_create_tensor_from_blob(static_cast<std::byte*>(tensor.data) + tensor.byte_offset, tensor.ndim,
                                           tensor.shape, tensor.strides, 0, dtype_of(tensor.dtype),
                                           aoti_torch_device_type_cpu(), -1, &handle));
  Tensor borrowed(handle);
  if (tensor.data == nullptr && borrowed.numel() > 0) throw Unsuited("memory");
  return borrowed;
}

// A result on its way to Python.
class Handover {
 public:
  explicit Handover(Tensor&& tensor) : tensor_(std::move(tensor)) {
    const int64_t dims = tensor_.dim();
    for (int64_t i = 0; i < dims; ++i) shape_and_strides_.push_back(tensor_.size(i));
    for (int64_t i = 0; i < dims; ++i) shape_and_strides_.push_back(tensor_.stride(i));
    int64_t* const shape = shape_and_strides_.data();
    managed_.dl_tensor = {
        tensor_.data_ptr(), {kDLCPU, 0}, static_cast<int32_t>(dims), dlpack_type_of(tensor_), shape, shape + dims, 0};
    managed_.manager_ctx = this;
    managed_.deleter = [](DLManagedTensor* self) { delete static_cast<Handover*>(self->manager_ctx); };
  }

  DLManagedTensor* managed() { return &managed_; }

 private:
  Tensor tensor_;
  std::vector<int64_t> shape_and_strides_;
  DLManagedTensor managed_;
};

inline py::object hand_over(Tensor&& tensor) {
  auto handover = std::make_unique<Handover>(std::move(tensor));
  const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(handover->managed(), "dltensor", nullptr));
  if (!capsule) throw py::error_already_set();
  auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(Python::instance().from_dlpack, capsule.ptr()));
  if (!PyCapsule_IsValid(capsule.ptr(), "dltensor")) handover.release();  // it was taken, and its deleter is PyTorch's
  if (!result) throw py::error_already_set();
  return result;
}

// Defines an operator's CPU implementation in a module.
template <class Function>
void define(py::module_& module, const char* name, Function function) {
  module.def(name, function, py::call_guard<py::gil_scoped_release>());
}

}  // namespace vitfast::direct

template <>
class pybind11::detail::type_caster<torch::stable::Tensor> {
 public:
  static constexpr auto name = const_name("torch.Tensor");
  template <class>
  using cast_op_type = torch::stable::Tensor;

  bool load(handle source, bool) {
    value_ = vitfast::direct::borrow(source.ptr());
    return true;
  }
  operator torch::stable::Tensor() { return *std::move(value_); }

  static handle cast(torch::stable::Tensor tensor, return_value_policy, handle) {
    return vitfast::direct::hand_over(std::move(tensor)).release();
  }

 private:
  std::optional<torch::stable::Tensor> value_;  // a Tensor without value would be one of PyTorch's
};
