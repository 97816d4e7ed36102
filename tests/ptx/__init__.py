"""Runs CUDA kernels on a CPU: the PTX that nvcc or Triton emits, translated to C++, with detectors of races.

python -m pytest tests/ptx                  the runner's own tests
translate/     PTX text to C++
runtime/       threads as fibers, shared memory, barriers, matrix fragments; vector clocks, bounds, counts
cudart/        a stand-in for the CUDA runtime, so that the real host code launches kernels here
build.py       nvcc, g++ and a cache of what they made
emulator.py    launches, options, findings
backend.py     the module ``_cuda`` over all this, as a backend ``cuda_emulated`` of the tests
kernels/       small kernels that the runner itself is tested with, and triton_kernels.py
"""
