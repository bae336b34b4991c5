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
    if case.name == "late":
        time.sleep(60)
    with (HERE / "prepared").open("a") as file:
        print(os.getpid(), torch.get_num_threads(), x.sum().item(), file=file)
    calls.clear()
    return case.name, x

calls = []

def peer(name, x):
    calls.append(time.sleep(0.008))
    if len(calls) > 6 and name == "raised":  # 2 to warm up, 2 a turn: in the third
        raise RuntimeError("lost its layers\\nand more")
    if len(calls) > 6 and name == "exited":
        os._exit(9)

NAMES = ("done", "refused", "absent", "raised", "late", "again", "exited", "killed")
CASES = [Case(name, {"N": 64}, torch.float32) for name in NAMES]
absent = lambda case, x: "has none" if case.name == "absent" else None

BENCHMARK = Benchmark(
    "cache_metric",
    CASES,
    lambda case, device: (torch.randn(case["N"], device=device),),
    [
        Provider("ours", lambda case, x: lambda: time.sleep(0.002)),
        baseline("peer", peer, prepare, absent, package="pytest"),
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
        found, cases = {}, bench.run_benchmark(benchmark, settings)
        for case in benchmark.cases:
            patch.setattr(apart, "READY_SECONDS", 0.5 if case.name == "late" else 300.0)
            found[case.name] = {r.provider: r for r in next(cases)}
        cases.close()
    return found, folder / "ops" / "prepared"


def test_a_peer_is_timed_in_its_own_process_on_the_same_inputs(results):
    done, prepared = results[0]["done"], results[1]
    assert done["peer"].package.startswith("pytest ")
    assert done["ours"].package is None
    assert done["ours"].median_s >= 0.002
    assert done["peer"].median_s >= 0.008
    assert done["ours"].ratios == {"peer": done["peer"].median_s / done["ours"].median_s}
    assert done["ours"].samples == done["peer"].samples == 3
    rows = [line.split() for line in prepared.read_text().splitlines()][:2]
    torch.manual_seed(0)
    sums = [torch.randn(64).sum().item() for _ in range(2)]
    assert [float(row[2]) for row in rows] == sums
    assert {int(row[1]) for row in rows} == {torch.get_num_threads()}
    assert len({row[0] for row in rows}) == 1
    assert int(rows[0][0]) != os.getpid()


def test_why_a_peer_has_no_number(results):
    found, _ = results
    refused, absent, killed = found["refused"], found["absent"], found["killed"]
    assert refused["peer"].skipped == "NotImplementedError: no such width"
    assert refused["ours"].skipped is None
    assert killed["peer"].skipped == "its process ended with exit code 7"
    assert list(absent) == ["peer"]  # nothing to be timed beside
    assert absent["peer"].skipped == "has none"


def test_a_peer_that_fails_in_its_turn_is_left_out_of_that_case(results):
    raised, exited = results[0]["raised"], results[0]["exited"]
    assert raised["peer"].skipped == "in its turn: RuntimeError: lost its layers"
    assert exited["peer"].skipped == "in its turn: its process ended with exit code 9"
    for case in (raised, exited):
        assert list(case) == ["ours", "peer"]
        assert case["ours"].samples == 3
        assert case["ours"].ratios == {}
        assert case["peer"].samples == 0


def test_a_peer_without_an_answer_is_started_anew_for_the_next_case(results):
    late, again = results[0]["late"], results[0]["again"]
    assert late["peer"].skipped == "TimeoutError: no answer within 0.5 s"
    assert late["ours"].samples == 3
    assert again["peer"].samples == 3


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
