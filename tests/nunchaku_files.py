"""Files of Nunchaku's packed layers for tests, and what each of their layers computes.

`svdq` and `awq` draw a layer: its natural tensors, and `dense`, the float64 weight that it stands
for on x itself (bias included where the file shifts its input).
"""

import torch

from fewstep.ops.quantize_int4 import pack_nibbles
from fewstep.quantization import pack_awq, pack_svdq

SHIFT = 0.171875


def svdq(outputs, inputs, rank=16, dtype=torch.bfloat16, smooth=True, bias=True):
    """Return (natural, q [outputs, inputs]) of a layer with weights of about 1 / sqrt(inputs)."""
    q = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    size = inputs**-0.5
    natural = {
        "weight_int4": pack_nibbles(q),
        "weight_scale": (size * (0.1 + 0.1 * torch.rand(outputs, inputs // 64))).to(dtype),
    }
    if bias:
        natural["bias"] = (0.1 * torch.randn(outputs)).to(dtype)
    if smooth:
        natural["smooth"] = (0.5 + torch.rand(inputs)).to(dtype)
    if rank:
        natural["down"] = (size * torch.randn(rank, inputs)).to(dtype)
        natural["up"] = (rank**-0.5 * torch.randn(outputs, rank)).to(dtype)
    return natural, q


def awq(outputs, inputs, dtype=torch.bfloat16, zero=-7):
    """Return (natural, q) of a layer; zeros are about `zero` scales."""
    q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scale = (inputs**-0.5 * (0.1 + 0.1 * torch.rand(outputs, inputs // 64))).to(dtype)
    natural = {
        "weight_uint4": pack_nibbles(q),
        "weight_scale": scale,
        "weight_zero": zero * scale,
        "bias": (0.1 * torch.randn(outputs)).to(dtype),
    }
    return natural, q


def spread(x, columns):
    """Return values of groups for every column."""
    return x.double().repeat_interleave(64, 1)[:, :columns]


def quantized_part(natural, q):
    """Return the float64 weight without the branch, for x that is not smoothed."""
    weight = q.double() * spread(natural["weight_scale"], q.shape[1])
    return weight / natural["smooth"].double() if "smooth" in natural else weight


def dense_svdq(natural, q):
    """Return the float64 weight."""
    weight = quantized_part(natural, q)
    if "down" in natural:
        weight = weight + natural["up"].double() @ natural["down"].double()
    return weight


def dense_awq(natural, q):
    """Return the float64 weight."""
    scale, zero = (spread(natural[f"weight_{part}"], q.shape[1]) for part in ("scale", "zero"))
    return q.double() * scale + zero


class FluxFile:
    """A file for a FluxTransformer2DModel, by Nunchaku's names or by diffusers' own.

    state     the tensors of the file
    weights   diffusers' layer -> its float64 weight
    biases    diffusers' layer -> its float64 bias
    """

    def __init__(self, model, lite=False, dtype=torch.bfloat16):
        self.model, self.lite, self.dtype = model, lite, dtype
        self.state, self.weights, self.biases = {}, {}, {}
        for index in range(len(model.transformer_blocks)):
            self._double(f"transformer_blocks.{index}.")
        for index in range(len(model.single_transformer_blocks)):
            self._single(f"single_transformer_blocks.{index}.")
        layers = tuple(f"{name}." for name in self.weights)
        for key, value in model.state_dict().items():
            if not key.startswith(layers):
                name = key if lite or "blocks" not in key else key.replace(".attn.norm", ".norm")
                self.state[name] = (value + 0.1 * torch.randn(value.shape)).to(dtype)

    def _double(self, block):
        self._modulation(f"{block}norm1.linear", 6)
        self._modulation(f"{block}norm1_context.linear", 6)
        self._rows(block, "qkv_proj", ["attn.to_q", "attn.to_k", "attn.to_v"])
        added = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
        self._rows(block, "qkv_proj_context", added)
        self._rows(block, "out_proj", ["attn.to_out.0"])
        self._rows(block, "out_proj_context", ["attn.to_add_out"])
        self._rows(block, "mlp_fc1", ["ff.net.0.proj"])
        self._rows(block, "mlp_fc2", ["ff.net.2"], shifted=True)
        self._rows(block, "mlp_context_fc1", ["ff_context.net.0.proj"])
        self._rows(block, "mlp_context_fc2", ["ff_context.net.2"], shifted=True)

    def _single(self, block):
        self._modulation(f"{block}norm.linear", 3)
        self._rows(block, "qkv_proj", ["attn.to_q", "attn.to_k", "attn.to_v"])
        self._rows(block, "mlp_fc1", ["proj_mlp"])
        if self.lite:
            self._rows(block, "", ["proj_out"])
            return
        proj_out = self.model.get_submodule(f"{block}proj_out")
        outputs = proj_out.out_features
        attention = svdq(outputs, outputs, dtype=self.dtype)
        mlp = svdq(outputs, proj_out.in_features - outputs, rank=32, dtype=self.dtype)
        self._add(f"{block}out_proj", pack_svdq(attention[0]))
        self._add(f"{block}mlp_fc2", pack_svdq(mlp[0]))
        self.weights[f"{block}proj_out"] = torch.cat([dense_svdq(*attention), dense_svdq(*mlp)], 1)
        bias = attention[0]["bias"].double() + mlp[0]["bias"].double()
        self.biases[f"{block}proj_out"] = bias + SHIFT * quantized_part(*mlp).sum(1)

    def _add(self, name, fields):
        self.state |= {f"{name}.{field}": value for field, value in fields.items()}

    def _rows(self, block, name, layers, shifted=False):
        """Add one packed layer for several of diffusers', or one for each by diffusers' names."""
        if self.lite and len(layers) > 1:
            for layer in layers:
                self._rows(block, "", [layer])
            return
        linears = [self.model.get_submodule(block + layer) for layer in layers]
        outputs = [linear.out_features for linear in linears]
        natural, q = svdq(sum(outputs), linears[0].in_features, dtype=self.dtype)
        weight, bias = dense_svdq(natural, q), natural["bias"].double()
        if shifted and not self.lite:
            bias = bias + SHIFT * quantized_part(natural, q).sum(1)
        self._add(block + (layers[0] if self.lite else name), pack_svdq(natural, lite=self.lite))
        for layer, w, b in zip(layers, weight.split(outputs), bias.split(outputs), strict=True):
            self.weights[block + layer], self.biases[block + layer] = w, b

    def _modulation(self, name, chunks):
        linear = self.model.get_submodule(name)
        natural, q = awq(linear.out_features, linear.in_features, self.dtype)
        weight, bias = dense_awq(natural, q), natural["bias"].double()
        self._add(name, pack_awq(natural))
        if not self.lite:
            features = linear.out_features // chunks
            rows = [chunks * d + c for c in range(chunks) for d in range(features)]
            weight, bias = weight[rows], bias[rows]
            for scale in (1, 4)[: chunks // 3]:
                bias[scale * features : (scale + 1) * features] -= 1
        self.weights[name], self.biases[name] = weight, bias
