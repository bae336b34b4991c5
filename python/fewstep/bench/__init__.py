"""The benchmark harness: `fewstep bench ops`, and what a file in benchmarks/ops is written against.

A file `benchmarks/ops/<op>.py` ends in one `BENCHMARK = Benchmark(...)`; docs/guides/benchmarks.md
walks through one. No number is printed before the op's correctness gate has passed.
"""

from .limits import copy_limit, matmul_limit
from .model import Benchmark, Case, Provider
from .providers import baseline, implementations, needs
from .roofline import roofline_picture
from .run import Result, Settings, run_benchmark

__all__ = [
    "Benchmark",
    "Case",
    "Provider",
    "Result",
    "Settings",
    "baseline",
    "copy_limit",
    "implementations",
    "matmul_limit",
    "needs",
    "roofline_picture",
    "run_benchmark",
]
