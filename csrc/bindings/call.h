// How a binding calls its kernel, in either module. The last argument of every bound kernel function is a Call:
//
//     _cpu    rng: int64 [2], the Philox seed and offset, or None
//     _cuda   (device, stream, rng, workspace, counters): see cuda::Launch
//
// A file of bindings whose op has the same problem on both kinds of machine is compiled once for each module, and
//
//     call(PYTRANSFORMER_KERNEL(layer_norm_fwd), problem)
//
// is all that it says of where it runs. The GIL is released; the CUDA module also makes the tensors' device current,
// and long calls of the CPU module look for signals now and then.
#pragma once

#include "interrupt.h"
#include "kernels.h"  // of the module that is being built
#include "tensor_caster.h"

#ifdef PYTRANSFORMER_CUDA_MODULE
#define PYTRANSFORMER_KERNEL(name) ::pytransformer::cuda::name
#else
#define PYTRANSFORMER_KERNEL(name) ::pytransformer::kernels().name
#endif

namespace pytransformer {

inline const int64_t* rng_from(const TensorView& rng) {
  if (rng && (rng.dtype != DType::int64 || rng.numel() != 2 || !rng.contiguous())) {
    throw pybind11::value_error("pytransformer: rng must be int64 [2]");
  }
  return rng.ptr<const int64_t>();
}

#ifdef PYTRANSFORMER_CUDA_MODULE

struct Call {
  int device = 0;
  cuda::Launch launch;

  // A problem's own seed and offset, which a CUDA kernel does not read.
  static uint64_t seed() { return 0; }
  static uint64_t offset() { return 0; }

  template <class Problem>
  void operator()(void (*kernel)(const Problem&, const cuda::Launch&), const Problem& problem) const {
    pybind11::gil_scoped_release released;
    const cuda::DeviceGuard guard(device);
    kernel(problem, launch);
  }
};

inline Call call_from(pybind11::handle source) {
  const auto parts = pybind11::cast<pybind11::tuple>(source);
  if (parts.size() != 5) throw pybind11::type_error("pytransformer: call must be a tuple of 5, got another length");
  const auto view = [&](int i) { return parts[i].is_none() ? TensorView() : view_of(parts[i]); };
  Call call;
  call.device = pybind11::cast<int>(parts[0]);
  call.launch.stream = reinterpret_cast<CUstream_st*>(pybind11::cast<uintptr_t>(parts[1]));
  call.launch.rng = rng_from(view(2));
  call.launch.workspace = view(3);
  call.launch.counters = view(4);
  return call;
}

#else

// Has Python a signal to handle, and did its handler raise? Then that is the error of the call (see _cpu's translator).
inline bool signalled() {
  const pybind11::gil_scoped_acquire acquired;
  return PyErr_CheckSignals() != 0;
}

// A kernel of the CPU module runs.
struct Running {
  pybind11::gil_scoped_release released;
  Interruptible interruptible{&signalled};
};

struct Call {
  const int64_t* rng = nullptr;

  uint64_t seed() const { return rng == nullptr ? 0 : uint64_t(rng[0]); }
  uint64_t offset() const { return rng == nullptr ? 0 : uint64_t(rng[1]); }

  template <class Problem>
  void operator()(void (*kernel)(const Problem&), const Problem& problem) const {
    const Running running;
    kernel(problem);
  }
};

inline Call call_from(pybind11::handle source) {
  return {source.is_none() ? nullptr : rng_from(view_of(source))};
}

#endif

}  // namespace pytransformer

namespace pybind11::detail {

template <>
struct type_caster<pytransformer::Call> {
  PYBIND11_TYPE_CASTER(pytransformer::Call, const_name("Call"));

  bool load(handle source, bool) {
    value = pytransformer::call_from(source);
    return true;
  }
};

}  // namespace pybind11::detail
