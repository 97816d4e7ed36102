// pybind11 <-> torch.Tensor, without libtorch.
//
// torch publishes a table of C functions (the DLPack exchange API, torch >= 2.10) as a capsule on the
// Tensor class. One call through it fills a DLPack tensor from a Python object with no attribute
// look-ups and no reference counting: 0.1 us a tensor, where data_ptr/shape/stride cost 0.6 us.
// None becomes a TensorView that is not `defined`.
//
// An argument of type Rows is a contiguous tensor [..., columns], seen as [rows, columns]: the adapters need not
// reshape it, nor what the kernel writes. One that is not contiguous is seen as it is, for the binding to refuse.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "tensor_view.h"

namespace pytransformer {

inline const dlpack::ExchangeApi*& exchange_api() {
  static const dlpack::ExchangeApi* api = nullptr;
  return api;
}

// Called once when a module is imported, after torch.
inline void load_exchange_api() {
  namespace py = pybind11;
  py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (api == nullptr) throw py::error_already_set();
  exchange_api() = static_cast<const dlpack::ExchangeApi*>(api);
}

inline DType dtype_from(const dlpack::DataType& type) {
  if (type.lanes == 1) {
    if (type.code == dlpack::code_float && type.bits == 32) return DType::float32;
    if (type.code == dlpack::code_float && type.bits == 64) return DType::float64;
    if (type.code == dlpack::code_float && type.bits == 16) return DType::float16;
    if (type.code == dlpack::code_bfloat && type.bits == 16) return DType::bfloat16;
    if (type.code == dlpack::code_int && type.bits == 32) return DType::int32;
    if (type.code == dlpack::code_int && type.bits == 64) return DType::int64;
    if (type.code == dlpack::code_bool && type.bits == 8) return DType::boolean;
  }
  throw pybind11::type_error("pytransformer: a kernel was given a tensor of an unsupported dtype");
}

struct Rows : TensorView {};

inline dlpack::Tensor dlpack_of(pybind11::handle tensor) {
  dlpack::Tensor source;
  if (exchange_api()->dltensor_from_py_object_no_sync(tensor.ptr(), &source) != 0) {
    throw pybind11::error_already_set();
  }
  return source;
}

inline TensorView view_of(const dlpack::Tensor& source) {
  if (source.ndim > TensorView::max_dims) {
    throw pybind11::value_error("pytransformer: a kernel was given a tensor of more than 6 dimensions");
  }
  TensorView view;
  view.data = static_cast<char*>(source.data) + source.byte_offset;
  view.ndim = source.ndim;
  view.dtype = dtype_from(source.dtype);
  view.defined = true;
  for (int i = 0; i < source.ndim; ++i) {
    view.shape[i] = source.shape[i];
    view.stride[i] = source.strides[i];
  }
  return view;
}

inline TensorView view_of(pybind11::handle tensor) {
  return view_of(dlpack_of(tensor));
}

inline Rows rows_of(pybind11::handle tensor) {
  dlpack::Tensor source = dlpack_of(tensor);
  const int last = source.ndim - 1;
  int64_t shape[2] = {1, 0}, stride[2] = {0, 1};
  if (last >= 0 && contiguous(source.ndim, source.shape, source.strides)) {
    for (int i = 0; i < last; ++i) shape[0] *= source.shape[i];
    shape[1] = stride[0] = source.shape[last];
    source.ndim = 2;
    source.shape = shape;
    source.strides = stride;
  }
  return {view_of(source)};
}

}  // namespace pytransformer

namespace pybind11::detail {

template <>
struct type_caster<pytransformer::TensorView> {
  PYBIND11_TYPE_CASTER(pytransformer::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (!source.is_none()) value = pytransformer::view_of(source);
    return true;
  }
};

template <>
struct type_caster<pytransformer::Rows> {
  PYBIND11_TYPE_CASTER(pytransformer::Rows, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (!source.is_none()) value = pytransformer::rows_of(source);
    return true;
  }
};

}  // namespace pybind11::detail
