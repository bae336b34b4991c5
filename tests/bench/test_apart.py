"""Peers in processes of their own: timed there, on the same inputs, and their failures named."""

import os
import time

import pytest
import torch

from fewstep import bench
from fewstep.bench import apart, discover, measure
from fewstep.bench.run import run_case

# Packages that every test environment has stand for peers.
FILE = """
import os, time
from pathlib import Path
import torch
from fewstep.bench import Benchmark, Case, Provider, baseline

HERE = Path(__file__).parent

def prepare(case, x):
    if case.name == "refused":
        raise NotImplementedError("no such width\\nand more")
    if case.name == "killed":
        os._exit(7)
    with (HERE / "prepared").open("a") as file:
        print(os.getpid(), torch.get_num_threads(), x.sum().item(), file=file)
    return (x,)

CASES = [Case(name, {"N": 64}, torch.float32) for name in ("done", "refused", "absent", "killed")]
absent = lambda case, x: "has none" if case.name == "absent" else None

BENCHMARK = Benchmark(
    "cache_metric",
    CASES,
    lambda case, device: (torch.randn(case["N"], device=device),),
    [
        Provider("ours", lambda case, x: lambda: time.sleep(0.002)),
        baseline("peer", lambda x: time.sleep(0.008), prepare, absent, package="pytest"),
    ],
    lambda case: 1.0,
    lambda case: 1.0,
)
"""
BUDGET = measure.Budget(seconds=0.0, min_rounds=3, max_rounds=3, warmup_seconds=0.0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    (folder / "ops").mkdir()
    (folder / "ops" / "cache_metric.py").write_text(FILE)
    benchmark = discover.load(folder, "cache_metric")
    settings = bench.Settings(torch.device("cpu"), budget=BUDGET, peers=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.bench.inputs.cache_bytes", lambda device: 256)
        found = list(bench.run_benchmark(benchmark, settings))
    return [{r.provider: r for r in case} for case in found], folder / "ops" / "prepared"


def test_a_peer_is_timed_in_its_own_process_on_the_same_inputs(results):
    (done, *_), prepared = results
    assert done["peer"].package.startswith("pytest ")
    assert done["ours"].package is None
    assert done["ours"].median_s >= 0.002
    assert done["peer"].median_s >= 0.008
    assert done["ours"].ratios == {"peer": done["peer"].median_s / done["ours"].median_s}
    assert done["ours"].samples == done["peer"].samples == 3
    rows = [line.split() for line in prepared.read_text().splitlines()]
    torch.manual_seed(0)
    sums = [torch.randn(64).sum().item() for _ in range(2)]
    assert [float(row[2]) for row in rows] == sums
    assert {int(row[1]) for row in rows} == {torch.get_num_threads()}
    assert len({row[0] for row in rows}) == 1
    assert int(rows[0][0]) != os.getpid()


def test_why_a_peer_has_no_number(results):
    (_, refused, absent, killed), _ = results
    assert refused["peer"].skipped == "NotImplementedError: no such width"
    assert refused["ours"].skipped is None
    assert killed["peer"].skipped == "its process ended with exit code 7"
    assert list(absent) == ["peer"]  # nothing to be timed beside
    assert absent["peer"].skipped == "has none"


def test_without_a_file_or_on_a_gpu_a_peer_stays_in_this_process():
    peer = bench.baseline("peer", torch.neg, package="pytest")
    case = bench.Case("one", {"N": 4}, torch.float32)
    arguments = ([case], lambda case, device: (torch.ones(4),), [peer])
    benchmark = bench.Benchmark("fake", *arguments, lambda c: 1.0, lambda c: 1.0)
    settings = bench.Settings(torch.device("cpu"), budget=BUDGET)
    (result,) = run_case(benchmark, case, settings, {}, workers=None)
    assert result.skipped is None
    assert apart.Workers(benchmark, torch.device("cpu")).take(peer) is None
    assert apart.Workers(benchmark, torch.device("cuda")).take(peer) is None


def test_a_turn_wakes_with_another_set_and_times_the_call():
    order = []
    calls = apart.turns([lambda i=i: order.append(i) or time.sleep(0.003 * i) for i in range(3)])
    assert calls[1]() >= 0.003
    assert order == [0, 1]
    calls[0]()
    assert order == [0, 1, 2, 0]
