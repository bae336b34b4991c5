"""Two ranks with half of the tokens each decide as one process with all of them does.

diffusers' own context parallelism (Ulysses) over gloo on the CPU. The ranks are forked, which
spares them the imports.
"""

import multiprocessing
import queue
import traceback

import pytest
import torch
from diffusers import ContextParallelConfig

import fewstep
from fewstep.caching import Dmd, EasyCache, FirstBlock, Fora, SeaCache, Session, TeaCache, dmd
from patching.tiny_pipelines import build, call

RANKS, STEPS = 2, 8
SCHEDULED = {
    "output": Fora(every=3),
    "blocks": Fora(every=3, scope="blocks"),
    "module": Fora(every=3, scope="module"),
    "dmd-output": Dmd(every=3, warmup=3),
    "dmd-blocks": Dmd(every=3, warmup=3, scope="blocks"),
}
MEASURED = {
    "first-block": lambda threshold: FirstBlock(threshold, max_skips=9),
    "teacache": lambda threshold: TeaCache(threshold, max_skips=9),
    "seacache": lambda threshold: SeaCache(threshold, max_skips=9),
    "easycache": lambda threshold: EasyCache(threshold, max_skips=9, warmup=1),
}


def run(cache, parallel=None):
    """Return the latents, the decisions, and the changes and weights that were measured."""
    pipe = build("flux")
    changes, judge, find = [], Session._judge, dmd._weights

    def judged(session, call, reasons, change):
        changes.append(change.tolist())
        return judge(session, call, reasons, change)

    def found(*args):
        weights = find(*args)
        changes.append(weights[0].tolist())  # of the gap's first step
        return weights

    def shard():
        pipe.transformer.set_attention_backend("native")
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))

    if parallel == "before":
        shard()
    patch = fewstep.patch(pipe, cache=cache)
    if parallel == "after":
        shard()
        call(pipe, num_inference_steps=1)
    Session._judge, dmd._weights = judged, found
    try:
        latents = call(pipe, num_inference_steps=STEPS, batch=2)
    finally:
        Session._judge, dmd._weights = judge, find
    return latents, patch.report()["cache"]["branches"], changes


def rank_main(rank, file, jobs, results):
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS
        )
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
        found = {name: run(*job) for name, job in jobs.items()}
        results.put((rank, {k: (latents.tolist(), *v) for k, (latents, *v) in found.items()}))
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))


def on_ranks(file, jobs):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(rank, file, jobs, results)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        return dict(results.get(timeout=120) for _ in ranks)
    except queue.Empty:
        pytest.fail("the ranks wait for each other")
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ranks_decide_alike_and_as_one_process(tmp_path):
    alone, jobs = {}, {}
    for name, cache in SCHEDULED.items():
        alone[name] = run(cache)
        jobs[name] = cache, "before"
    for name, make in MEASURED.items():
        _, _, changes = run(make(1e9))
        flat = sorted(x for change in changes for x in change)
        # Between two changes that were seen: a share of the tokens falls on the other side of it.
        middle = len(flat) // 2
        cache = make((flat[middle - 1] + flat[middle]) / 2)
        alone[name] = run(cache)
        kinds = {d for decisions in alone[name][1].values() for d in decisions}
        assert kinds == {"full", "skip"}
        for order in ("before", "after"):
            jobs[f"{name} {order}"] = cache, order
    found = on_ranks(tmp_path / "store", jobs)
    for rank, results in found.items():
        assert isinstance(results, dict), results
        for job, (latents, decisions, changes) in results.items():
            want = alone[job.split()[0]]
            assert decisions == want[1], (rank, job)
            # Sums over two halves of the tokens, in float32.
            torch.testing.assert_close(
                torch.tensor(changes), torch.tensor(want[2]), rtol=1e-3, atol=1e-5
            )
            torch.testing.assert_close(torch.tensor(latents), want[0], rtol=1e-3, atol=1e-3)
    assert found[0] == found[1]
