"""
What one step of every stage computes at toy size, for tests to compare across ranks: of each loss its value, its
gradient and the weights three steps later, and a guided rollout after a given frame; both backbones, camera and actions
on.

    torchrun --nproc_per_node 4 tests/scale_worker.py OUT --sp 1 2 4     rank 0 writes {sp: {name: tensor}}
    compute()                          in a process without ranks: the same by plain modules, nothing sharded
"""
import argparse
import gc
from dataclasses import replace

from conftest import ROOT  # first: it finds the files below

assert ROOT

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import model
import train_dmd
from data import Batch
from distill_cd import consistency_loss
from distill_ode import ode_loss
from helpers import rigid
from model import (
    Camera, DiTConfig, HYConfig, HYDiT, HYPrompt, WanDiT, batch_part, noise_levels, rollout, sequence_rank, shard,
    start_process_group, tree_map,
)
from train_ar import teacher_forcing_loss
from train_camera import flow_matching_loss

CPU = torch.device("cpu")
KINDS = {
    "wan": (WanDiT, DiTConfig(64, 96, 4, 2, channels=4, text_dim=24, freq_dim=32)),
    "hy": (HYDiT, HYConfig(96, 64, 4, 2, channels=4, text_dim=24, vision_dim=16, byt5=(8, 8, 8), rope_bands=(8, 8, 8),
                           action=True, patch=1)),
}
VIDEOS, F, STEPS = 4, 5, 3  # the last chunk of a video is a short one
META = {"sampling_steps": 2, "shift": 3.0, "chunk": 2, "guidance": 2.0, "camera": True, "sampler": "euler"}
LEVELS, GRID, EXIT_STEP = noise_levels(2, 3.0), noise_levels(48, 3.0), 1


def make_net(kind, seed, recompute=False, train=False):
    """Weights of a useful size everywhere; sharded if there are ranks."""
    net_type, cfg = KINDS[kind]
    cfg = replace(cfg, recompute=recompute)
    torch.manual_seed(seed)
    net = net_type(cfg)
    for p in net.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.3)
    if not dist.is_initialized():
        return net.train(train).requires_grad_(train)
    with torch.device("meta"):
        empty = net_type(cfg)
    return shard(empty, net.state_dict(), CPU, train)


def make_prompt(kind):
    if kind == "wan":
        return torch.randn(VIDEOS, 5, 24)
    text, byt5, vision, given = (torch.randn(VIDEOS, *shape) for shape in ((5, 24), (3, 8), (4, 16), (1, 5, 4, 4)))
    words = torch.arange(5) < torch.tensor([[5], [3], [4], [1]])  # padding in other places, and one without an image
    has_image = torch.tensor([True, False, True, True])
    return HYPrompt(text, words, byt5, torch.arange(3) < torch.tensor([[2], [0], [3], [1]]),
                    vision * has_image.view(-1, 1, 1), has_image[:, None].expand(VIDEOS, 4), given)


def make_batch(kind, step, part):
    """A part of a step's four videos. The first frame of each is given: a mean over parts is then one over videos."""
    torch.manual_seed(step)
    x0, states = torch.randn(VIDEOS, F, 4, 4, 4), torch.randn(VIDEOS, 3, F, 4, 4, 4)
    prompt, null = make_prompt(kind), make_prompt(kind)
    camera = Camera(rigid(VIDEOS, F), torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).expand(VIDEOS, F, 3, 3))
    generated = torch.tensor([0.0, 1, 1, 1, 1]).expand(VIDEOS, F)
    index, parts = part
    rows = slice(index * VIDEOS // parts, (index + 1) * VIDEOS // parts)
    x0, states, prompt, null, camera, generated = (
        tree_map(lambda z: z[rows], tree) for tree in (x0, states, prompt, null, camera, generated))
    rng = [torch.Generator().manual_seed(VIDEOS * step + row) for row in range(rows.start, rows.stop)]
    return Batch(x0, prompt, null, camera, generated, rng, [], states)


def generator_loss_and_replay(net, batch, real, fake, share):
    """A micro-batch of train_dmd.py's main."""
    x, passes = train_dmd.self_rollout(net, batch, META, EXIT_STEP)
    loss = share * train_dmd.generator_loss(x.requires_grad_(), real, fake, batch, META, 2.0)
    loss.backward()
    for last in passes:
        train_dmd.predict(net, batch, last).backward(x.grad[:, last.frames])
    return loss.detach()


def fake_score_loss(net, batch, generator):
    x, _ = train_dmd.self_rollout(generator, batch, META, EXIT_STEP)
    return train_dmd.fake_score_loss(x, net, batch, META)


LOSSES = {  # of a network, a batch, and two others that are not trained
    "camera": lambda net, batch, *_: flow_matching_loss(net, batch, META, 0.3),
    "ar": lambda net, batch, *_: teacher_forcing_loss(net, batch, META, 0.3),
    "ode": lambda net, batch, *_: ode_loss(net, batch, LEVELS, META),
    "cd": lambda net, batch, real, fake: consistency_loss(net, fake, real, batch, GRID, META),
    "fake score": lambda net, batch, real, fake: fake_score_loss(net, batch, real),
}


def whole(z):
    """Of a shard, the tensor, on every rank."""
    return z.detach().full_tensor() if isinstance(z, DTensor) else z.detach().clone()


def train(kind, name, net, others, accum):
    """Three steps of a loss -> loss and gradient of the first, weights after the last; the net is as it was."""
    found, start = {}, [p.detach().clone() for p in net.parameters()]
    # eps: where a gradient is small, Adam's step is its sign, and rounding has no sign
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-2, fused=True)
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(accum):
            part = batch_part(micro, accum) if dist.is_initialized() else (micro, accum)
            batch = make_batch(kind, step, part)
            if name == "generator":
                total += generator_loss_and_replay(net, batch, *others, 1 / accum)
            else:
                loss = LOSSES[name](net, batch, *others) / accum
                loss.backward()
                total += loss.detach()
        if step == 0:
            if dist.is_initialized():
                dist.all_reduce(total)
                total /= dist.get_world_size()
            found["loss"] = total
            found |= {f"gradient of {n}": whole(p.grad) for n, p in net.named_parameters() if p.grad is not None}
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found |= {n: whole(p) for n, p in net.named_parameters()}
    with torch.no_grad():
        for p, was in zip(net.parameters(), start, strict=True):
            p.copy_(was)
    return found


def sample(kind, net):
    """Videos of a guided rollout after a given frame, of all ranks."""
    part = batch_part(0, 1) if dist.is_initialized() else (0, 1)
    batch = make_batch(kind, 0, part)
    shape, given = batch.x0.shape[1:], batch.x0[:, :1]
    chunks = rollout(net, META, batch.rng, shape, batch.prompt, batch.null, batch.camera, given)
    x0 = torch.cat(list(chunks), dim=1)
    if not dist.is_initialized():
        return {"video": x0}
    everyones = [torch.empty_like(x0) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, x0.contiguous())
    sp = sequence_rank()[1]
    found = {"video": torch.cat(everyones[::sp])}
    return found | {f"video of rank {rank} among those that share it": torch.cat(everyones[rank::sp])
                    for rank in range(1, sp)}


def compute(accum=1, recompute=False):
    """name: tensor."""
    found = {}
    for kind in KINDS:
        net, others = make_net(kind, 0, recompute, train=True), [make_net(kind, seed) for seed in (1, 2)]
        results = {name: train(kind, name, net, others, accum) for name in (*LOSSES, "generator")}
        results["rollout"] = sample(kind, net)
        found |= {f"{kind}, {name}: {of}": z for name, result in results.items() for of, z in result.items()}
    return found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--sp", type=int, nargs="+")
    p.add_argument("--shard-over", type=int)
    p.add_argument("--recompute", action="store_true", help="also with blocks run again for backward, last sp")
    args = p.parse_args()
    rank, _, _ = start_process_group(shard_over=args.shard_over)
    mesh = make_net("wan", 0).head.modulation.device_mesh
    found = {"mesh": dict(zip(mesh.mesh_dim_names, mesh.shape))}
    for sp in args.sp:
        model.SEQUENCE_GROUP = dist.new_subgroups(sp)[0] if sp > 1 else None  # as start_process_group(sp), but in turn
        found[sp] = compute()
    if args.recompute:
        found["recompute"] = compute(recompute=True)
    if rank == 0:
        torch.save(found, args.out)
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
