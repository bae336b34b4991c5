"""fewstep.jvp of a wrapped module in two processes, against one. Run by test_distributed.py.

python distributed.py RANK FILE ddp|ddp_unused|fsdp2
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fewstep
from tangent_nets import double_net, point, unfused_jvp

RANKS = 2


def expected(x, t):
    """Mean over ranks of the gradient of each rank's loss, on an unwrapped module."""
    net = double_net()
    for rank in range(RANKS):
        out, t_out = unfused_jvp(net, x * (rank + 1), t)
        (out.sin().sum() + t_out.cos().sum()).div(RANKS).backward()
    return [p.grad for p in net.parameters()]


def wrapped(kind):
    net = double_net()
    if kind.startswith("ddp"):
        return DistributedDataParallel(net, find_unused_parameters=kind == "ddp_unused")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def main(rank, file, kind):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    x, t = point()
    net = wrapped(kind)
    plain = double_net()
    if kind == "ddp_unused":  # it puts a Function without forward mode behind the output
        try:
            fewstep.jvp(net, x, t)
        except NotImplementedError:
            leave("raises")
        leave("did not raise")
    for step in range(2):  # a second step finds what the first left behind
        out, t_out = fewstep.jvp(net, x * (rank + 1), t)
        torch.testing.assert_close((out, t_out), unfused_jvp(plain, x * (rank + 1), t))
        (out.sin().sum() + t_out.cos().sum()).backward()
        for p, want in zip(net.parameters(), expected(x, t), strict=True):
            got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(got, want, msg=lambda m: f"step {step}: {m}")  # noqa: B023
            p.grad = None
    leave("right")


def leave(ending):
    """Say how it ended and end, both ranks together.

    Not through the interpreter's teardown, in which gloo's threads sometimes abort or never end.
    """
    dist.barrier()
    print(ending, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
