"""DDP with an async function as communication hook, compared with plain DDP.

    pip install '.[examples]'    # in a checkout
    torchrun --standalone --nproc-per-node 2 examples/ddp_async_hook.py

This example trains the same small classifier of handwritten digits on gloo five times: with
plain DDP, with an async hook that reduces in the same way, with an async hook that halves
the traffic by sending float16, with PyTorch's own float16 hook, and with a hook that fails.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from torchfut_aio import as_future
from torchfut_aio.distributed import async_comm_hook, shutdown

try:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
except ModuleNotFoundError:
    sys.exit("This example needs scikit-learn: pip install '.[examples]'")

STEPS = 40


@async_comm_hook
async def mean(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.Tensor:
    """Reduce as DDP does without a hook."""
    gradients = bucket.buffer().div_(dist.get_world_size(group))
    await as_future(dist.all_reduce(gradients, group=group, async_op=True))
    return gradients


class Traffic:
    """Counts the bytes that this process has sent."""

    sent = 0  # bytes


@async_comm_hook
async def compressed(traffic: Traffic, bucket: dist.GradBucket) -> torch.Tensor:
    """Send half of the bytes."""
    small = bucket.buffer().to(torch.float16).div_(dist.get_world_size())
    traffic.sent += small.nbytes
    await as_future(dist.all_reduce(small, async_op=True))
    return bucket.buffer().copy_(small)


class QuotaExceeded(Exception):
    """The error of the last hook."""


@async_comm_hook
async def failing(state: object, bucket: dist.GradBucket) -> torch.Tensor:  # noqa: ARG001
    """Raise an error."""
    raise QuotaExceeded(f"bucket {bucket.index()}")


def train(hook: Any = None, state: Any = None) -> tuple[list[float], list[torch.Tensor]]:
    """Return the losses, and the gradients of the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    # The cap is small, so that even this small model has several buckets.
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
    if hook is not None:
        ddp.register_comm_hook(state, hook)
    images, labels = load_digits(return_X_y=True)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    x = torch.tensor(images[mine], dtype=torch.float32) / 16
    y = torch.tensor(labels[mine])
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.5)
    losses: list[float] = []
    first: list[torch.Tensor] = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(ddp(x), y)
        optimiser.zero_grad()
        loss.backward()
        if not losses:
            first = [p.grad.clone() for p in ddp.parameters() if p.grad is not None]
        losses.append(loss.item())
        optimiser.step()
    return losses, first


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    traffic = Traffic()
    losses, gradients = train()
    mean_losses, mean_gradients = train(mean)
    half_losses, half_gradients = train(compressed, traffic)
    torch_losses, _ = train(fp16_compress_hook)
    same = all(map(torch.equal, mean_gradients, gradients))
    apart = max(
        float((ours - plain).abs().max() / plain.abs().max())
        for ours, plain in zip(half_gradients, gradients, strict=True)
    )
    assert same
    assert mean_losses == losses
    assert half_losses == torch_losses
    assert apart < 2e-3
    if dist.get_rank() == 0:
        print(f"loss, first and last of {STEPS} steps, {dist.get_world_size()} processes")
        for name, curve in [
            ("plain DDP", losses),
            ("async hook", mean_losses),
            ("async hook, float16", half_losses),
            ("PyTorch's hook, float16", torch_losses),
        ]:
            print(f"  {name:24} {curve[0]:.6f} {curve[-1]:.6f}")
        print("async hook: gradients and losses equal plain DDP's, bit for bit")
        print("async hook, float16: losses equal those of PyTorch's hook, bit for bit;")
        print(f"  gradients within {apart:.1e} of plain DDP's; {traffic.sent:,} bytes sent")
    try:
        train(failing)
    except QuotaExceeded as error:
        print(f"rank {dist.get_rank()}: backward() raised QuotaExceeded: {error}", flush=True)
    dist.destroy_process_group()
    shutdown()


if __name__ == "__main__":
    main()
