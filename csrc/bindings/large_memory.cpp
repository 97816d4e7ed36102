// Tensors of large memory (large_memory.h), made through torch's table of functions: no attribute of torch is looked
// up, and the tensor is one like any other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings.h"
#include "dlpack.h"
#include "large_memory.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

// What a tensor owns: its memory, and the arrays that its description points to.
struct Result {
  Result(std::vector<int64_t> sizes, size_t bytes) : shape(std::move(sizes)), strides(shape.size(), 1), memory(bytes) {
    for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  }

  std::vector<int64_t> shape, strides;
  LargeBuffer memory;
  dlpack::ManagedTensor tensor{};
};

dlpack::DataType type_named(const std::string& name) {
  if (name == "float32") return {dlpack::code_float, 32, 1};
  if (name == "float16") return {dlpack::code_float, 16, 1};
  if (name == "bfloat16") return {dlpack::code_bfloat, 16, 1};
  throw py::value_error("empty: no results are of dtype " + name);
}

py::object empty(std::vector<int64_t> shape, const std::string& dtype) {
  const dlpack::DataType type = type_named(dtype);
  size_t bytes = type.bits / 8;
  for (const int64_t size : shape) bytes *= size_t(size);
  auto result = std::make_unique<Result>(std::move(shape), bytes);
  dlpack::Tensor& view = result->tensor.tensor;
  view.data = result->memory.data();
  view.device = {dlpack::device_cpu, 0};
  view.ndim = int32_t(result->shape.size());
  view.dtype = type;
  view.shape = result->shape.data();
  view.strides = result->strides.data();
  result->tensor.version = {1, 0};
  result->tensor.context = result.get();
  result->tensor.deleter = [](dlpack::ManagedTensor* self) { delete static_cast<Result*>(self->context); };
  void* object = nullptr;
  if (exchange_api()->managed_tensor_to_py_object_no_sync(&result->tensor, &object) != 0) throw py::error_already_set();
  result.release();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

}  // namespace

void bind_large_memory(py::module_& module) {
  module.attr("LARGE") = large_unit;
  module.def("empty", &empty, py::arg("shape"), py::arg("dtype"), "A tensor of large memory.");
  module.def("release_large", &release_large, "Gives memory that is kept to the system; returns the bytes.");
}

}  // namespace pytransformer
