"""Triton kernels, one file per op. Installed as ``pytransformer.kernels``.

A module holds an op's kernels and the functions that allocate its outputs and launch them: ``layer_norm_fwd``
and the like, over plain tensors. Importing one imports triton; importing this package does not, for a machine
without a GPU needs no Triton.

Under ``TRITON_INTERPRET=1``, set before triton is imported, every kernel runs on CPU tensors in Triton's
interpreter, which is how they are tested where there is no GPU.
"""
