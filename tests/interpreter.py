"""Schedules for tests: `with concurrent_programs(seed):` around any call of a layer that runs interpreted."""

from rnn_gpu.kernels.interpreter import concurrent_programs, interpreting

__all__ = ["concurrent_programs", "interpreting"]
