// What each op adds to a module. One short file per op defines its function, for both modules where the problem is
// the same (see call.h); the CUDA module's own stand in <op>_cuda.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace pytransformer {

void bind_attention(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_ffn(pybind11::module_& module);
void bind_large_memory(pybind11::module_& module);
void bind_layer_norm(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_linear_cross_entropy(pybind11::module_& module);
void bind_peak(pybind11::module_& module);

}  // namespace pytransformer
