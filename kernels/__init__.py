"""The bytes: block formats, panels and the compiled forward pass; imports NumPy, Numba and llvmlite, nothing of
smolrun.

Import the module you need (`from smolrun.kernels import formats`); nothing is imported here, so that NumPy-only parts
stay cheap.
"""
