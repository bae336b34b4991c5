"""The benchmark harness on a fake op with known times: gate, rotation, arithmetic, records."""

import contextlib
import functools
import itertools
import json
import math
import subprocess
import time

import pytest
import torch

from fewstep import bench, ops
from fewstep.bench import discover, environment, measure
from fewstep.bench.run import Result, compare, run_case
from fewstep.ops import _gate

CPU = torch.device("cpu")
BUDGET = measure.Budget(seconds=0.0, min_rounds=5, max_rounds=5, warmup_seconds=0.0)
SETTINGS = bench.Settings(CPU, budget=BUDGET)
FIELDS = {
    *("schema", "op", "case", "shape", "dtype", "provider", "role", "impl", "skipped"),
    *("samples", "median_s", "iqr_s", "flops", "bytes", "flops_per_s", "bytes_per_s"),
    *("ratios", "of_limit", "device", "driver", "cpu", "isa", "threads", "torch", "triton"),
    *("fewstep", "commit", "dirty", "date"),
}
CASE = bench.Case("small", {"N": 1000}, torch.float32)


def nap(seconds, *inputs):
    time.sleep(seconds)


def fake(providers, op="fake", cases=(CASE,), inputs=lambda case, device: (torch.ones(case["N"]),)):
    return bench.Benchmark(op, cases, inputs, providers, lambda c: 2e6, lambda c: 1e6)


def by_provider(results):
    return {result.provider: result for result in results}


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr("fewstep.bench.inputs.cache_bytes", lambda device: 16_000)
    monkeypatch.setattr("fewstep.bench.limits.cache_bytes", lambda device: 16_000)


@pytest.fixture
def passing_gate(monkeypatch):
    checked = []
    monkeypatch.setattr(_gate, "check", lambda op, impl, device: checked.append((op, impl)))
    return checked


def op_provider(call, impl="native"):
    return bench.Provider("ours", lambda case, *x: functools.partial(call, *x), "op", impl)


def test_known_times_give_known_ratios(small_cache, passing_gate):
    providers = [
        op_provider(functools.partial(nap, 0.002)),
        bench.baseline("slow", functools.partial(nap, 0.008)),
    ]
    found = by_provider(run_case(fake(providers), CASE, SETTINGS, {}))
    assert passing_gate == [("fake", "native")]
    assert found["ours"].median_s >= 0.002
    assert found["slow"].median_s >= 0.008
    ours, slow = found["ours"], found["slow"]
    assert ours.ratios == {"slow": slow.median_s / ours.median_s}
    assert ours.flops_per_s == pytest.approx(2e6 / ours.median_s)
    assert ours.bytes_per_s == pytest.approx(1e6 / ours.median_s)
    assert ours.samples == 5
    assert ours.q1_s <= ours.median_s <= ours.q3_s


def test_share_of_the_limit_takes_the_binding_rate():
    blank = dict(op="o", case="c", shape={}, dtype="float32", impl=None)
    result = Result(**blank, provider="p", role="op", median_s=2.0, flops=100.0, bytes=10.0)
    limits = {"copy": ("bytes", 10.0), "matmul": ("flops", 200.0)}  # 1 s and 0.5 s at least
    (compared,) = compare([result], limits)
    assert compared.limit == "copy"
    assert compared.of_limit == pytest.approx(0.5)
    assert compare([result], {})[0].of_limit is None
    # Of two rates for one resource the higher is the limit: 0.5 s by flops, not 5 s.
    (compared,) = compare([result], {"slow": ("flops", 20.0), "fast": ("flops", 200.0)})
    assert compared.limit == "fast"
    assert compared.of_limit == pytest.approx(0.25)


def test_a_failing_gate_refuses_the_number(small_cache, monkeypatch):
    def check(op, impl, device):
        raise AssertionError("Tensor-likes are not close!\n\nMismatched elements: 3")

    def never(*inputs):
        raise AssertionError("was called")

    monkeypatch.setattr(_gate, "check", check)
    providers = [op_provider(never), bench.baseline("torch", lambda x: x + 1)]
    found = by_provider(run_case(fake(providers), CASE, SETTINGS, {}))
    expected = "refused: its correctness gate failed: Tensor-likes are not close!"
    assert found["ours"].skipped == expected
    assert math.isnan(found["ours"].median_s)
    assert found["torch"].skipped is None
    assert found["torch"].ratios == {}


def test_providers_of_other_devices_leave_no_line(small_cache):
    def never(case, *inputs):
        raise AssertionError("was made")

    providers = [bench.Provider("a GPU's", never, devices=("cuda",)), bench.baseline("torch", abs)]
    assert [r.provider for r in run_case(fake(providers), CASE, SETTINGS, {})] == ["torch"]


def test_a_state_holds_in_gate_and_call_and_is_not_timed(small_cache, monkeypatch):
    entered, seen = [], []

    @contextlib.contextmanager
    def state(name):
        entered.append(name)
        time.sleep(0.02)
        yield
        entered.pop()

    def look(*inputs):
        seen.append(tuple(entered))

    monkeypatch.setattr(_gate, "check", look)
    make = lambda case, *x: functools.partial(look, *x)  # noqa: E731
    providers = [
        bench.Provider(name, make, "op", "native", state=functools.partial(state, name))
        for name in ("first", "second")
    ]
    found = by_provider(run_case(fake([*providers, op_provider(look)]), CASE, SETTINGS, {}))
    gates = [seen.index(x) for x in (("first",), ("second",), ())]
    assert gates == sorted(gates)  # each by itself, none within another
    assert set(seen) == {("first",), ("second",), ()}
    assert found["first"].median_s < 0.02


def test_the_gate_runs_once_per_implementation(small_cache, passing_gate):
    cases = [CASE, bench.Case("other", {"N": 2000}, torch.float32)]
    benchmark = fake([op_provider(lambda x: x)], cases=cases)
    assert len(list(bench.run_benchmark(benchmark, SETTINGS))) == 2
    assert passing_gate == [("fake", "native")]


def test_unavailable_providers_say_why(small_cache):
    providers = [
        bench.baseline("peer", lambda x: x, unless=bench.needs("no_such_package")),
        bench.baseline("gpu peer", lambda x: x, unless=bench.needs("torch", "cuda")),
        bench.baseline("torch", lambda x: x + 1),
    ]
    found = by_provider(run_case(fake(providers), CASE, SETTINGS, {}))
    assert "no_such_package is not installed" in found["peer"].skipped
    assert found["gpu peer"].skipped == "torch runs on cuda only"
    assert found["torch"].skipped is None


def test_compiled_baselines_stay_compiled_over_many_shapes(small_cache):
    seen = []

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    # torch.compile falls back to eager past 8 shapes of one function.
    cases = [bench.Case(f"{n}", {"N": n}, torch.float32) for n in range(100, 110)]
    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    benchmark = fake([bench.baseline("compiled", compiled)], cases=cases)
    assert len(list(bench.run_benchmark(benchmark, SETTINGS))) == len(seen) == len(cases)


def test_inputs_rotate_past_the_cache(small_cache):
    made = itertools.count()
    seen = []

    def inputs(case, device):
        return (torch.full((case["N"],), float(next(made))),)

    providers = [bench.baseline(n, lambda x: seen.append(x[0].item())) for n in ("a", "b")]
    results = run_case(fake(providers, inputs=inputs), CASE, SETTINGS, {})
    # 32,000 bytes are two caches: eight sets of 4,000.
    assert results[0].input_sets == 8
    assert results[0].rotated_bytes == 32_000
    timed = seen[-10:]
    assert all(left != right for left, right in itertools.pairwise(timed))
    assert timed == [float(i % 8) for i in range(10)]


def test_a_limit_may_be_one_of_one_device_type_only():
    case, x = bench.Case("c", {}, torch.float32), torch.ones(1)
    assert callable(bench.matmul_limit(torch.float32, only="cpu").make(case, x))
    assert bench.matmul_limit(only="cuda").make(case, x) == "it is the limit on cuda only"


def test_limits_measure_their_own_work(small_cache):
    providers = [bench.baseline("torch", lambda x: x + 1), bench.copy_limit()]
    found = by_provider(run_case(fake(providers), CASE, SETTINGS, {}))
    assert found["copy"].bytes == 64_000
    assert found["torch"].limit == "copy"
    # The best copy is the limit, so a share is never larger than against the median copy.
    floor = 1e6 / found["copy"].bytes_per_s
    assert 0 < found["torch"].of_limit <= floor / found["torch"].median_s
    assert found["copy"].ratios == {}


def test_records_are_json_with_the_machine(small_cache):
    skipped = bench.baseline("peer", lambda x: x, unless=bench.needs("no_such_package"))
    results = run_case(fake([bench.baseline("torch", lambda x: x), skipped]), CASE, SETTINGS, {})
    machine = environment.environment(CPU)
    for result in results:
        record = json.loads(json.dumps(result.record(machine), allow_nan=False))
        assert record.keys() >= FIELDS
    assert results[1].record(machine)["median_s"] is None


def test_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("FEWSTEP_COMMIT", "abc+dirty")
    assert environment.commit(None) == ("abc", True)


def test_the_commit_is_the_packages_and_not_that_of_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FEWSTEP_COMMIT", raising=False)
    assert environment.commit(None) == (None, None)
    here = environment.environment(CPU)["commit"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    assert environment.environment(CPU)["commit"] == here
    # Installed elsewhere: no checkout around the package.
    site = tmp_path / "lib" / "site-packages" / "fewstep" / "bench"
    monkeypatch.setattr(environment, "__file__", str(site / "environment.py"))
    assert environment.package_checkout() is None
    assert environment.environment(CPU)["commit"] is None


def test_records_are_no_local_changes(monkeypatch, tmp_path):
    monkeypatch.delenv("FEWSTEP_COMMIT", raising=False)
    record, code = tmp_path / "benchmarks" / "results" / "x.jsonl", tmp_path / "x.py"
    record.parent.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for path in (record, code):
        path.write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    assert environment.commit(tmp_path)[1] is False
    record.write_text("2")
    assert environment.commit(tmp_path)[1] is False
    code.write_text("2")
    assert environment.commit(tmp_path)[1] is True


def test_discovery_and_its_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run this from a checkout"):
        discover.find_directory()
    folder = tmp_path / "benchmarks" / "ops"
    folder.mkdir(parents=True)
    (folder / "x.py").write_text("BENCHMARK = 3")
    assert discover.find_directory() == tmp_path / "benchmarks"
    with pytest.raises(ValueError, match="expected BENCHMARK = Benchmark"):
        discover.load(discover.find_directory(), "x")
    with pytest.raises(ValueError, match="expected one of x, got 'y'"):
        discover.load(discover.find_directory(), "y")


ROOT = next(p for p in discover.Path(__file__).parents if (p / "benchmarks" / "ops").is_dir())


@pytest.mark.parametrize("op", discover.available(ROOT / "benchmarks"))
def test_every_benchmark_file_declares_cases_and_a_baseline(op):
    benchmark = discover.load(ROOT / "benchmarks", op)
    assert op in ops.OPS
    assert any(p.role == "baseline" for p in benchmark.providers)
    assert any(p.role == "limit" for p in benchmark.providers)
    names = [p.name for p in benchmark.providers]
    assert len(set(names)) == len(names)
    cases = {(c.name, *c.shape.items(), c.dtype, c.devices) for c in benchmark.cases}
    assert len(cases) == len(benchmark.cases)
    for case in benchmark.cases:
        assert benchmark.bytes_moved(case) > 0
        assert benchmark.flops(case) >= 0  # copies of rows have none


def _timed(provider, role, flops, moved, seconds, dtype="float32"):
    return Result(
        *("fake", "case", {"N": 1}, dtype, provider, role, "native"),
        median_s=seconds,
        flops=flops,
        bytes=moved,
        flops_per_s=flops / seconds,
        bytes_per_s=moved / seconds,
    )


def test_roofline_has_a_panel_per_dtype_and_names_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    results = [
        *(_timed("ours", "op", 1e9, 1e6, 0.1, dtype) for dtype in ("float32", "bfloat16")),
        *(_timed("matmul", "limit", 1e9, 0, 0.05, dtype) for dtype in ("float32", "bfloat16")),
        _timed("slow", "baseline", 1e9, 1e6, 0.4),
        _timed("copy", "limit", 0, 1e9, 0.1),
    ]
    sizes = []
    for part in (results, [r for r in results if r.dtype == "float32"]):
        bench.roofline_picture(tmp_path / "r.png", part, "fake", ["slow"])
        sizes.append(plt.imread(tmp_path / "r.png").shape)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] == 2 * sizes[1][1]
    with pytest.raises(ValueError, match=r"expected a timed kernel and a limit in FLOP/s"):
        bench.roofline_picture(tmp_path / "r.png", results[:2], "fake")
