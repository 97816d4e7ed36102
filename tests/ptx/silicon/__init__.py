"""What an instruction gives on a GPU, recorded once, and the runner held to it.

vectors.cu     kernels of inline PTX, one for each family of instructions
vectors.py     what they are given, and how they are launched
record.py      runs them on a GPU: python3 tests/ptx/silicon/record.py tests/recorded/silicon-h100.json
"""
