"""attention_jvp with `score_dtype`: what the rounding costs, and that it is the documented one.

The kernels' own rounding is compared with the reference's in tests/cuda/test_attention_jvp_sm90.py.
"""

import pytest
import torch

from fewstep import ops
from helpers import relative_error

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
# What 8 bits leave of t_o at scores of deviation 1: docs/ops/attention_jvp.md has the table.
BOUNDS = {INT8: 1.5e-2, E4M3: 6e-2}


def draw(d=64, heads=4, groups=2, nq=32, nk=300):
    torch.manual_seed(0)
    shapes = [(1, h, n, d) for h, n in ((heads, nq), (groups, nk), (groups, nk)) * 2]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def attend(inputs, score_dtype=None, **options):
    """Return (o, t_o, lse, mu) of the reference."""
    options = {"return_stats": True, "impl": "reference", **options}
    return ops.attention_jvp(*inputs, score_dtype=score_dtype, **options)


def errors(inputs, score_dtype, **options):
    pairs = zip(attend(inputs, score_dtype, **options), attend(inputs, **options), strict=True)
    return [relative_error(a, b) for a, b in pairs]


@pytest.mark.parametrize("score_dtype", BOUNDS)
@pytest.mark.parametrize("d", [40, 64, 128, 160])
@pytest.mark.parametrize("size", [0, 30])
def test_error(d, size, score_dtype):
    inputs = draw(d)
    for i in (1, 4):
        inputs[i] += size * torch.randn(1, 2, 1, d)
    o, t_o, lse, _ = errors(inputs, score_dtype)
    assert max(o, t_o) < BOUNDS[score_dtype]
    # An average over keys: no larger, and the centre is added back. Were it lost, this would be 1.
    assert lse < 5e-3
    # It is not the exact result under another name.
    assert t_o > BOUNDS[score_dtype] / 4


def test_int8_with_channels_that_are_larger():
    """Rotated they share what they have; with a scale for the row alone the error is 1.9 %."""
    inputs = draw()
    for i in (1, 4):
        inputs[i][..., :2] *= 3
    assert max(errors(inputs, INT8)[:2]) < BOUNDS[INT8]


def hadamard(n):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix / n**0.5


def test_what_8_bits_hold_is_exact():
    """Whole numbers up to 127 behind the rotation; e4m3's own values without one."""
    torch.manual_seed(0)
    d, n = 64, 20

    def rows(values):
        values = values[torch.randint(len(values), (1, 1, n, d))].double()
        values[..., 0] = 127.0
        return values

    def paired(rows):
        return torch.cat([rows, -rows], -2)  # the mean of these keys is 0

    for score_dtype, values, after in (
        (INT8, torch.arange(-127, 128), hadamard(d) / 127),
        (E4M3, torch.tensor([-24, -3, -1.25, 0, 0.5, 7, 11, 60]), torch.eye(d) / 128),
    ):
        q, k = rows(values), paired(rows(values))
        if score_dtype == E4M3:
            q[..., 0], k[..., 0] = 120, 120
            k = paired(k[..., :n, :])
        inputs = [q @ after.double(), k @ after.double(), torch.randn(1, 1, 2 * n, d).double()]
        # Tangents are the same rows in another order, four times as large: then a is 4.
        inputs += [4 * x.roll(5, -2) for x in inputs[:2]]
        inputs += [torch.randn_like(inputs[2])]
        assert max(errors(inputs, score_dtype)) < 1e-12


def test_a_vector_added_to_every_key_changes_nothing():
    inputs = draw()
    shifted = list(inputs)
    shifted[1] = inputs[1] + 5 * torch.randn(1, 2, 1, 64, dtype=torch.float64)
    shifted[4] = inputs[4] + 5 * torch.randn(1, 2, 1, 64, dtype=torch.float64)
    a, b = attend(inputs, INT8), attend(shifted, INT8)
    # t_o: t_q sees the shift of k, q that of t_k, and both are constants of a row.
    assert all(relative_error(x, y) < 1e-10 for x, y in zip(a[:2], b[:2], strict=True))


def test_tangents_of_any_size_and_of_few_tokens():
    for size in (1e-20, 1e10):
        inputs = draw()
        inputs[3:5] = [size * x for x in inputs[3:5]]
        inputs[5] = None
        assert max(errors(inputs, INT8)[:2]) < BOUNDS[INT8]
    inputs = draw()
    inputs[3], inputs[4][..., 1:, :] = None, 0  # one key moves
    assert max(errors(inputs, INT8)[:2]) < 2 * BOUNDS[INT8]


def test_directions_have_ratios_of_their_own():
    inputs = draw()
    sizes = torch.tensor([1, 1e-3, 50], dtype=torch.float64).view(3, 1, 1, 1, 1)
    many = inputs[:3] + [sizes * torch.randn(3, *x.shape, dtype=torch.float64) for x in inputs[3:]]
    for ours, exact in zip(attend(many, INT8)[1], attend(many)[1], strict=True):
        assert relative_error(ours, exact) < 1.2 * BOUNDS[INT8]  # u and w fit all three


@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "one tangent", "none"])
def test_masks_and_absent_tangents(kind):
    inputs, options = draw(), {}
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "bool":
        options["attn_mask"] = torch.rand(32, 300) > 0.5
    elif kind == "additive":
        mask = torch.randn(2, 32, 300, dtype=torch.float64)
        options = {"attn_mask": mask[0], "t_attn_mask": mask[1]}
    elif kind == "one tangent":
        inputs[3] = inputs[5] = None
    else:
        inputs[3:] = [None] * 3
    o, t_o, *_ = errors(inputs, INT8, **options)
    assert o < BOUNDS[INT8]
    assert t_o < 1.2 * BOUNDS[INT8] or kind == "none"


@pytest.mark.parametrize("score_dtype", BOUNDS)
def test_gradients_are_those_of_exact_scores(score_dtype):
    """The rounding counts as the identity: gradients are off by about what o and t_o are."""
    cotangents = [torch.randn(1, 4, 32, 64, dtype=torch.float64) for _ in range(2)]

    def gradients(score_dtype):
        inputs = [x.requires_grad_() for x in draw()]
        outputs = ops.attention_jvp(*inputs, score_dtype=score_dtype)
        return torch.autograd.grad(outputs, inputs, cotangents)

    pairs = zip(gradients(score_dtype), gradients(None), strict=True)
    found = [relative_error(a, b) for a, b in pairs]
    assert 1e-4 < max(found) < BOUNDS[score_dtype], found


def test_the_reference_differentiates_past_the_rounding():
    """Its derivatives are those of the scores: round's own are zero."""
    from fewstep.reference import attention_jvp as reference

    def gradients(score_dtype):
        inputs = [x.requires_grad_() for x in draw()]
        o, t_o, *_ = reference(*inputs, score_dtype=score_dtype)
        return torch.autograd.grad(o.square().sum() + t_o.square().sum(), inputs)

    pairs = zip(gradients(INT8), gradients(None), strict=True)
    found = [relative_error(a, b) for a, b in pairs]
    assert 1e-4 < max(found) < 3 * BOUNDS[INT8], found


def test_forward_mode_and_vmap():
    inputs = draw()
    primals, tangents = tuple(inputs[:3]), tuple(inputs[3:])

    def attention(q, k, v):
        return ops.attention_jvp(q, k, v, score_dtype=INT8)[0]

    want = attend(inputs, INT8)[1]
    assert torch.equal(torch.func.jvp(attention, primals, tangents)[1], want)
    several = [torch.stack([t, 2 * t]) for t in tangents]
    along = torch.func.vmap(lambda *t: ops.attention_jvp(*primals, *t, score_dtype=INT8)[1])
    assert relative_error(along(*several)[1], 2 * want) < BOUNDS[INT8]


def test_who_takes_it():
    inputs = [x.float() for x in draw()]
    said = ops.explain("attention_jvp", *inputs, score_dtype=INT8)
    assert said.choice == "reference"
    assert said.reasons["native"] == "score_dtype: expected None on the CPU, got torch.int8"
    assert said.reasons["triton"] == "score_dtype: expected None, got torch.int8"
    for impl in ("native", "triton"):
        with pytest.raises(ops.UnsupportedError, match="score_dtype: expected None"):
            ops.attention_jvp(*inputs, score_dtype=INT8, impl=impl)


def test_hopper_says_which_masks_it_leaves():
    from fewstep.ops.attention_jvp import _refuse_scores

    mask = torch.zeros(3, 3)
    for options, reason in (
        ({"attn_mask": mask}, "attn_mask: expected a boolean one beside score_dtype"),
        ({"attn_mask": mask.bool(), "scale": 0.1}, None),
        ({"scale": -0.1}, "scale: expected more than 0 beside score_dtype, got -0.1"),
    ):
        found = _refuse_scores((), options)
        assert found is None if reason is None else found.startswith(reason)


def test_bad_score_dtypes_are_named():
    inputs = draw()
    expected = "score_dtype: expected torch.int8 or torch.float8_e4m3fn or None, got"
    with pytest.raises(ValueError, match=f"{expected} torch.float8_e5m2"):
        ops.attention_jvp(*inputs, score_dtype=torch.float8_e5m2)
    with pytest.raises(TypeError, match=f"{expected} str"):
        ops.attention_jvp(*inputs, score_dtype="int8")


def test_opcheck_and_compile():
    inputs = [x.float() for x in draw(d=16, nq=9, nk=12)]
    directed = [x[None] for x in inputs[3:]]
    raw = (*inputs[:3], *directed, None, None, None, None, False, 0.3, INT8, "reference")
    torch.library.opcheck(torch.ops.fewstep.attention_jvp.default, raw)

    def attention(*tensors):
        return ops.attention_jvp(*tensors, score_dtype=INT8)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), attention(*inputs), strict=True):
        assert torch.equal(got, want)
