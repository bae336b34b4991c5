"""Masks by name, for the tests of attention_jvp and its backward."""

import torch

NEVER = -float("inf")


def meets(*shape):
    """Most of the pairs."""
    return torch.rand(shape) < 0.7


def masked(name, nq, nk, dtype=torch.float32):
    """The keyword arguments called `name`, for batch 2 and 4 heads."""
    if name == "causal":
        return {"is_causal": True}
    if name == "bool":
        return {"attn_mask": meets(nq, nk)}
    if name == "bool, keys":
        return {"attn_mask": meets(2, 1, 1, nk)}
    if name == "bool, heads":
        return {"attn_mask": meets(2, 4, nq, nk)}
    if name == "additive, rows":
        return {"attn_mask": torch.randn(4, nq, 1).to(dtype)}
    if name == "additive":
        mask, t_mask = torch.randn(4, nq, nk), torch.randn(2, 1, nq, nk)
        return {"attn_mask": mask.to(dtype), "t_attn_mask": t_mask.to(dtype)}
    assert name == "minus infinity"
    mask = torch.randn(nq, nk).masked_fill(~meets(nq, nk), NEVER)
    return {"attn_mask": mask.to(dtype), "t_attn_mask": torch.randn(1, nk).to(dtype)}


MASKS = [
    "causal",
    "bool",
    "bool, keys",
    "bool, heads",
    "additive, rows",
    "additive",
    "minus infinity",
]
