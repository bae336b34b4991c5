"""One-step generation from nothing: a MeanFlow on two moons, its exact derivative by `fewstep.jvp`.

    x_t = (1 - t) x0 + t eps,   v = eps - x0                    t = 1 is noise
    u(x_t, r, t) = 1 / (t - r) * integral_r^t v(x_s, s) ds      the average velocity
    u = v - (t - r) du/dt,      du/dt = (du/dx) v + du/dt|_x    the MeanFlow identity
    loss = w |u - sg(v - (t - r) du/dt)|^2                      w = 1 / sg(|...|^2 + c)^(1/2)
    one step: x0 = eps - u(eps, 0, 1)

(arXiv 2505.13447.) In the network the two coordinates, r and t are tokens that meet in attention,
and an MLP reads the velocity off them. `fewstep.jvp` returns u and du/dt from one pass; gradients
flow into the weights through u. Trains in under a minute on one CPU core (more don't help so small
a network), and draws samples of 1, 2 and 32 steps beside the data.

    python examples/two_moons_meanflow.py --output two_moons.png
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from rich.progress import track
from sklearn.datasets import make_moons
from torch import Tensor, nn

import fewstep


class AverageVelocity(nn.Module):
    """u(x [B, 2], r [B], t [B]) -> [B, 2]."""

    def __init__(self, width: int = 32, depth: int = 3, frequencies: int = 8):
        super().__init__()
        # Octaves of the coordinates, then lower ones of the times, in which u is smoother.
        octaves = [torch.linspace(*span, frequencies) for span in ((-1, 3), (-2, 1))]
        self.register_buffer("frequencies", 2 ** torch.stack(octaves).repeat_interleave(2, 0))
        self.embed = nn.Linear(2 * frequencies + 1, width)
        self.position = nn.Parameter(torch.randn(4, width))
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        layers = [nn.Sequential(nn.Linear(4 * width, 4 * width), nn.SiLU()) for _ in range(depth)]
        self.mlp = nn.Sequential(*layers, nn.Linear(4 * width, 2))

    def forward(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Embed the four numbers as tokens, mix them by attention, read the velocity off."""
        values = torch.stack([*x.unbind(-1), r, t], dim=-1)[..., None]
        angles = values * self.frequencies
        features = torch.cat([values, angles.sin(), angles.cos()], dim=-1)
        tokens = self.embed(features) + self.position
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, dim=-1)
        tokens = tokens + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.mlp(tokens.flatten(1))


def moons(n: int, seed: int) -> Tensor:
    """Return n points of the two moons, centred, of about unit variance."""
    points, _ = make_moons(n, noise=0.05, random_state=seed)
    x = torch.tensor(points, dtype=torch.float32)
    return (x - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def sample_times(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return r <= t in (0, 1), often near the one step from 1 to 0; a quarter has r = t.

    Where they are equal, the loss is that of flow matching.
    """
    t, fraction, kind = torch.rand(3, n, generator=generator)
    t = t.sqrt()
    return torch.where(kind < 0.25, t, t * fraction.square()), t


def meanflow_loss(net: nn.Module, x0: Tensor, noise: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """Return the loss of the module's header, a scalar."""
    v = noise - x0
    x = x0 + t[:, None] * v
    u, du_dt = fewstep.jvp(net, (x, r, t), (v, None, torch.ones_like(t)))
    error = (u - (v - (t - r)[:, None] * du_dt).detach()).square().sum(-1)
    return (error / (error.detach() + 1e-2).sqrt()).mean()


def train(steps: int, batch: int, seed: int) -> nn.Module:
    """Return the network with its averaged weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, net = moons(20_000, seed), AverageVelocity()
    averaged = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), 6e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.1)
    for step in track(range(steps), description="two moons"):
        x0 = data[torch.randint(len(data), (batch,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        loss = meanflow_loss(net, x0, noise, *sample_times(batch, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for average, weight in zip(averaged.parameters(), net.parameters(), strict=True):
                average.lerp_(weight, max(0.005, 1 / (step + 1)))
    return averaged


@torch.no_grad()
def sample(net: nn.Module, n: int, steps: int, seed: int = 1) -> Tensor:
    """Return n samples from `steps` evaluations on an even grid."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    for i in range(steps, 0, -1):
        t, r = torch.full((n,), i / steps), torch.full((n,), (i - 1) / steps)
        x = x - (t - r)[:, None] * net(x, r, t)
    return x


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| over pairs: 0 if the distributions agree."""
    within = sum(torch.pdist(z).mean() for z in (x, y))
    return (2 * torch.cdist(x, y).mean() - within).item()


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("two_moons.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    net = train(args.steps, args.batch, args.seed)
    print(f"trained {args.steps} steps in {time.perf_counter() - began:.0f} s")

    data, other = moons(4000, seed=10), moons(4000, seed=11)
    pictures = {"data": data}
    print("energy distance to the data")
    print(f"    other data  {energy_distance(data, other):7.4f}    what perfect samples score")
    for steps in (1, 2, 32):
        pictures[f"{steps} step{'s' * (steps > 1)}"] = x = sample(net, 4000, steps)
        print(f"    {steps:2} step{'s' * (steps > 1):5} {energy_distance(data, x):7.4f}")

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3), sharey=True)
    for axis, (title, points) in zip(axes, pictures.items(), strict=True):
        axis.scatter(*points.T, s=1)
        axis.set(title=title, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    figure.savefig(args.output, dpi=120, bbox_inches="tight")
    print(f"samples: {args.output}")


if __name__ == "__main__":
    main()
