"""Triton kernels, imported as `fewstep.kernels` and only when an op needs one."""
