"""The small trained pipeline that the demo, the tests and the benchmarks run on."""
