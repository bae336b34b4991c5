"""Forward mode through every transformer and UNet class of diffusers, against fp64.

The bound is 1e-5 relative, in the norm of the joined outputs. Plain torch in fp32 over math
attention stays below 1.2e-6 for the transformers and below 4e-6 for the UNets, which are deeper
and divide by the norm of a few values; a lost tangent is 5e-5 at least (a test below).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tangent.zoo import CASES, EXCLUDED
from tangent.zoo.case import build, classes
from tangent.zoo.measure import measure, relative
from tangent.zoo.routes import LostTangent
from tangent.zoo.subject import forward_jvp

names = pytest.mark.parametrize("name", CASES)
TABLE = Path(__file__).parents[3] / "docs" / "forward_mode_models.md"


def test_every_class_is_here_or_excluded_with_a_reason():
    covered = {name.split()[0] for name in CASES}
    assert covered | set(EXCLUDED) == set(classes())
    assert not covered & set(EXCLUDED)
    assert all(EXCLUDED.values())
    assert all(case.note for case in CASES.values() if case.budget > 1e-5 or not case.wide_tables)


def test_the_table_in_docs_has_every_row():
    rows = TABLE.read_text().split("|---|---|---|---|---:|---|\n")[1].splitlines()
    stated = [line.split("|")[1].strip() for line in rows]
    assert sorted(stated) == sorted([*CASES, *EXCLUDED])
    assert all("| works |" in line or "| left out |" in line for line in rows)


@names
def test_tangent_agrees_with_fp64(name):
    run = measure(name)
    assert run.output.dtype == run.tangent.dtype == torch.float32
    assert run.expected_tangent.dtype == torch.float64
    assert run.expected_tangent.norm() > 0
    assert relative(run.output, run.expected_output) <= CASES[name].budget
    assert relative(run.tangent, run.expected_tangent) <= CASES[name].budget


@names
def test_attention_is_reached_as_declared(name):
    counts = measure(name).routes
    declared = set(CASES[name].attention.split("+"))
    for route in ("sdpa", "flex"):
        assert (counts[route] > 0) == (route in declared), counts
    assert counts["softmax"] > 0 or "softmax" not in declared


@pytest.mark.parametrize("name", [name for name in CASES if "sdpa" in CASES[name].attention])
def test_a_lost_attention_tangent_is_seen(name):
    run = measure(name)

    def spoiled(*primals):
        with LostTangent():
            return run.single(*primals)

    _, tangent = forward_jvp(spoiled, run.single.primals, run.single.tangents)
    assert relative(tangent, run.expected_tangent) > 5 * CASES[name].budget


@names
def test_every_primal_matters(name):
    """A zero tangent in all but one input still moves the output: no input is dead weight."""
    run = measure(name)
    for index in range(len(run.single.primals)):
        tangents = tuple(
            t if i == index else torch.zeros_like(t) for i, t in enumerate(run.single.tangents)
        )
        _, tangent = forward_jvp(run.single, run.single.primals, tangents)
        assert tangent.norm() > 1e-4 * run.expected_tangent.norm()


def test_a_case_is_the_same_every_time():
    name = "FluxTransformer2DModel"
    first, second = (build(name, CASES[name])[0] for _ in range(2))
    assert torch.equal(first(*first.primals), second(*second.primals))
