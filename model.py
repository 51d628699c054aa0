"""
The networks, what their output means, and how their weights travel.

    1. Flow matching    the identities that every stage and every sampler shares
    2. Cameras          PRoPE: projective matrices as a relative position encoding
    3. Wan DiT          the diffusion transformer, bidirectional and causal with the same weights; its KV cache
    4. Sampling         Euler and few-step samplers, and the rollout chunk by chunk
    5. Weights          what a checkpoint says of itself; shard, average, save, load, resume
    6. VAEs             Wan's causal 3-D convolutions, whole or as a stream; linear patches for the toy world
    7. Presets          tiny (trained on a laptop), wan-1.3b, wan-14b
    ---- the course ends here ----
    8. HY DiT           HunyuanVideo-1.5: video and text as two streams, an image to go on from, actions
    9. HY VAE           16 times smaller in space; what was a stride is channels folded out of the grid; HY's presets
    10. UniPC           the multistep sampler that public Wan is used with
    11. Released files  Wan2.1's, HunyuanVideo-1.5's, HY-WorldPlay's and minWM's, each in their own format
    12. The bill        what a training step takes: memory, FLOPs and bytes, planned without a GPU or measured

One call for every backbone, so that a stage does not know which network it trains:

    v = net(x_t, sigma, prompt, camera)                         every frame sees every frame
    v = net(x_t, sigma, prompt, camera, clean=x0, chunk=2)      teacher forcing: each chunk sees the clean past
    v = net(x_t, sigma, prompt, camera, kv_cache=kv_cache)      streaming: each chunk sees cached keys and values
    kv_cache = net(x0, zero, prompt, camera, kv_cache=kv_cache, update_cache=True)    ... and a finished chunk joins

    x_t     [b f c h w] fp32, noisy latents
    sigma   [b f] fp32, the noise level of each frame: 0 is clean, 1 is pure noise
    prompt  [b l d], what a frozen encoder made of the text; for HY a tuple of such tensors (HYPrompt)
    camera  Camera: viewmats [b f 4 4] and Ks [b f 3 3], one per latent frame
    v       [b f c h w] fp32, the velocity

Axis letters, here and in every file: b batch, f latent frames, c latent channels, h w latent grid, s tokens of a frame,
n tokens, d width, nh heads, hd head width, l text tokens; in pixels t frames, H W.
"""
import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import weakref
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# ----------------------------------------------------------------------------------------------------------------------
# 1. Flow matching. A straight line from data to noise, x_t = (1 - sigma) x0 + sigma noise, and a network that predicts
# its slope v = dx_t / dsigma = noise - x0 (rectified flow, arXiv:2209.03003). Everything below follows from that line.


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise.  x0, noise [b f c h w], sigma [b f]."""
    sigma = rearrange(sigma, "b f -> b f 1 1 1")
    return (1 - sigma) * x0 + sigma * noise


def velocity_to_x0(v: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma v: where the straight line through x_t with slope v meets sigma = 0."""
    return x_t - rearrange(sigma, "b f -> b f 1 1 1") * v


def masked_mse(a: Tensor, b: Tensor, generated: Tensor) -> Tensor:
    """Mean square of a - b [b f c h w] over the frames that the model makes: generated [b f], 0 on given frames."""
    per_frame = (a - b).square().mean((2, 3, 4))
    return (per_frame * generated).sum() / generated.sum()


def guide(v_cond: Tensor, v_null: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, v_null + guidance (v_cond - v_null) (arXiv:2207.12598); 1 is off.

    Code that writes v_cond + w (v_cond - v_null) means guidance = w + 1.
    """
    return torch.lerp(v_null, v_cond, guidance)  # exact at 0 and 1


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Spend more of [0, 1] at high noise; shift 1 is the identity (SD3, arXiv:2403.03206 eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_levels(steps: int, shift: float, start: float = 1.0) -> list[float]:
    """The sigmas that a sampler visits, from pure noise to clean: steps + 1 numbers from 1.0 to 0.0.

    A grid of 48 contains the grid of 4 at every shift, so a distilled student is asked only at levels its teacher
    integrated through. noise_levels(4, 5) is 1, 0.9375, 0.8333, 0.625, 0. start: the first level, before the shift.
    """
    return shift_sigma(torch.linspace(start, 0, steps + 1, dtype=torch.float64), shift).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# 2. Cameras. PRoPE (arXiv:2507.10496) as the released checkpoints have it: a second attention over the same queries,
# keys and values, taken before RoPE, in which every group of four channels is a homogeneous vector that the frame's
# camera P = K [R t] maps between world and image. Query i meets key j through P_i P_j^-1, the motion between the two
# frames, so the choice of world frame drops out. Its output enters through a linear layer that starts at zero.


class Camera(NamedTuple):
    """One camera per latent frame, OpenCV axes (x right, y down, z forward)."""
    viewmats: Tensor  # [b f 4 4] world-to-camera; the first frame of a video is the identity
    Ks: Tensor  # [b f 3 3] intrinsics, divided by image width and height

    def frames(self, frames: slice) -> "Camera":
        """The cameras of some frames."""
        return Camera(self.viewmats[:, frames], self.Ks[:, frames])

    def seen_from(self, origin: Tensor) -> "Camera":
        """The same cameras in the world in which the one with viewmat `origin` [b 4 4] is the identity."""
        return Camera((self.viewmats.double() @ invert_se3(origin.double())[:, None]).float(), self.Ks)


def invert_se3(pose: Tensor) -> Tensor:
    """Inverse of rigid transforms [... 4 4] by transposition: R^T, -R^T t."""
    R, t = pose[..., :3, :3].mT, pose[..., :3, 3:]
    last = F.pad(torch.zeros_like(t.mT), (0, 1), value=1.0)  # 0 0 0 1, made on the device: nothing waits for the host
    return torch.cat([torch.cat([R, -R @ t], dim=-1), last], dim=-2)


def projections(camera: Camera) -> tuple[Tensor, Tensor]:
    """P = K [R t] and its inverse, each [b f 4 4] in fp32.

    The principal point is left out (as released). fp32 matters: in bf16 the error of P P^-1 is a tenth of one step.
    """
    viewmats, Ks = camera.viewmats.float(), camera.Ks.float()
    focal = F.pad(torch.stack([Ks[..., 0, 0], Ks[..., 1, 1]], dim=-1), (0, 2), value=1.0)  # [b f 4]: fx fy 1 1
    P = focal[..., :, None] * viewmats
    P_inv = invert_se3(viewmats) / focal[..., None, :]
    return P, P_inv


def four_copies(P: Tensor, d: int) -> Tensor:
    """P [b f 4 4] -> [b f 16 16], along the diagonal. Of its products three in four are with zero, and it is faster.

    Where the width d is no multiple of 16, two copies or one.
    """
    return torch.kron(torch.eye(math.gcd(d, 16) // 4, dtype=P.dtype, device=P.device), P)


def apply_projection(x: Tensor, P: Tensor) -> Tensor:
    """Multiply every group of four channels of x [b f s d] by its frame's matrix P [b f 4 4], in P's precision.

    Or, what is the same, every group of sixteen by its four_copies [b f 16 16]: on a CPU up to four times as fast.
    """
    y = rearrange(x.to(P.dtype), "b f s (g j) -> b f (s g) j", j=P.shape[-1]) @ P.mT  # y = P x is y^T = x^T P^T
    return y.view(x.shape).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Wan DiT, with Wan2.1's structure and parameter names. Tokens are [b f s d]: s = h w / 4 patches a frame.


@dataclass(frozen=True)
class DiTConfig:
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    channels: int  # of the latents
    text_dim: int
    freq_dim: int = 256  # of the sinusoid that the noise level becomes
    patch: int = 2  # latents along height and width that make a token
    recompute: bool = False  # in training, keep of a block its input alone and run it again for backward

    @property
    def rope_bands(self) -> tuple[int, int, int]:
        """How many channels of a head turn with the frame, the row and the column."""
        head_dim = self.dim // self.heads
        third = 2 * (head_dim // 6)  # even: channels turn in pairs; what is left over goes to time
        return head_dim - 2 * third, third, third


class KVCache(NamedTuple):
    """Keys and values of the finished frames, a piece for each chunk. Never written in place: update_cache=True returns
    a new one, which has one piece more and shares the others.

    So a cache may be kept, gone back to or used twice, and nothing is copied when a chunk joins. The function
    update_cache makes it under no_grad, so that no gradient runs through it from one chunk to another.
    """
    frames: int  # how many have joined
    layers: list[list[tuple[Tensor, ...]]]  # per block and piece of n tokens: k, v, with a camera PRoPE's, [b nh n hd]
    text: tuple[list[tuple[Tensor, Tensor]], Tensor | None] | None = None  # per block k, v of the prompt; HY: its mask
    last_pose: Tensor | None = None  # HY with actions: viewmat of the last frame [b 4 4], to tell the next one's motion
    # of a window that has moved (move_window)
    evicted: int = 0  # by how many frames RoPE's positions were moved back
    origin: Tensor | None = None  # viewmat [b 4 4] of the camera that PRoPE's world was moved to; None: the path's own
    sinks: list[list[tuple[Tensor, ...]]] | None = None  # per block, the sink's pieces as they were first cached

    @property
    def position(self) -> int:
        """Where RoPE places the next frame."""
        return self.frames - self.evicted


def one_piece(pieces: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """A block's cached pieces, joined to a single one; none stay none."""
    return [tuple(torch.cat(z, dim=2) for z in zip(*pieces, strict=True))] if pieces else []


def sinusoid(position: Tensor, width: int) -> Tensor:
    """position [...] -> [... width]: cosines, then sines, of the position at speeds from 1 down to 1/10000.

    In the precision of `position`: fp64 for Wan, fp32 for HY, as each was trained. At 1000, fp32 is off by 3e-5.
    """
    half = width // 2
    index = torch.arange(half, dtype=position.dtype, device=position.device)
    angle = position[..., None] * torch.exp(-math.log(10000) * index / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_speed(width: int, theta: float, device: torch.device) -> Tensor:
    """By what angle a frame, a row or a column turns each pair of a band of `width` channels [width/2]."""
    # fp64: in bf16 the angle at position 1000 would be off by up to a third of a turn
    return theta ** -(torch.arange(0, width, 2, device=device).double() / width)


def rope_table(frames: Tensor, h: int, w: int, bands: tuple[int, int, int], theta: float) -> Tensor:
    """Unit complex numbers [f*s 1 hd/2]: channel pairs turn with frame, row and column, in three bands of a head.

    frames [f]: the position of each frame in the video. bands: channels of each band, hd together.
    """
    rows, columns = (torch.arange(n, device=frames.device) for n in (h, w))
    angles = []
    for position, width in zip((frames, rows, columns), bands, strict=True):
        angles.append(torch.outer(position.double(), rope_speed(width, theta, frames.device)))  # [positions width/2]
    t, y, x = angles
    f = len(frames)
    grid = [repeat(t, "f e -> f h w e", h=h, w=w), repeat(y, "h e -> f h w e", f=f, w=w),
            repeat(x, "w e -> f h w e", f=f, h=h)]
    angle = my_part(rearrange(torch.cat(grid, dim=-1), "f h w e -> f (h w) 1 e"), dim=1).flatten(0, 1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def apply_rope(x: Tensor, rope: Tensor, heads: int) -> Tensor:
    """Turn x [b f s d] by rope [f*s 1 hd/2], two neighbouring channels forming one complex number."""
    # a rotation of q and k by their own positions leaves q . k a function of the difference alone
    pairs = rearrange(x.float(), "b f s (nh e two) -> b (f s) nh e two", nh=heads, two=2).contiguous()
    turned = torch.view_as_complex(pairs) * rope
    return torch.view_as_real(turned).flatten(2).view_as(x).type_as(x)


class RMSNorm(nn.Module):
    """Over the last axis, in fp32: Wan's full width before the heads are split, HY's every head."""

    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).type_as(x) * self.weight


class Segments(NamedTuple):
    """Which tokens see which, as data: the frames are cut into pieces, and each piece attends to some of them."""
    lengths: list[int]  # of the pieces, in frames
    seen: list[list[int]]  # for every piece, which pieces its queries see


def teacher_forcing_segments(f: int, chunk: int) -> Segments:
    """Clean chunks 0 .. n-2, noisy chunks 0 .. n-1. Clean chunk i sees clean <= i, noisy chunk i clean < i and itself.

        keys      clean 0 1   noisy 0 1 2          Two full attentions per chunk, no mask: the same numbers as a masked
        clean 0         x                          pass on any device, with exact gradients, and no work on pairs that
        clean 1         x x                        the mask would throw away. The last clean chunk is left out: no
        noisy 0                     x              noisy chunk comes after it.
        noisy 1         x             x
        noisy 2         x x             x
    """
    noisy = [min(chunk, f - start) for start in range(0, f, chunk)]  # the last one may be short
    n = len(noisy)
    seen = [[*range(i + 1)] for i in range(n - 1)] + [[*range(i), n - 1 + i] for i in range(n)]
    return Segments(noisy[:-1] + noisy, seen)


# Sequence parallelism (Ulysses, arXiv:2309.14509). With --sp n, n ranks share a video: each holds an n-th of every
# frame's tokens. Around an attention, one all-to-all turns "some tokens, all heads" into "all tokens, some heads", and
# another turns it back; so attention itself, its segments and the cache know nothing of it.

SEQUENCE_GROUP: dist.ProcessGroup | None = None  # the ranks that share a video with this one (start_process_group)


def sequence_rank() -> tuple[int, int]:
    """This rank's place among those that share a video, and how many they are."""
    if SEQUENCE_GROUP is None:
        return 0, 1
    return dist.get_rank(SEQUENCE_GROUP), dist.get_world_size(SEQUENCE_GROUP)


class AllToAll(torch.autograd.Function):
    """Part i of x [n ...] goes to rank i; part i of the result came from there."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x, group=SEQUENCE_GROUP)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return AllToAll.apply(grad)


class AllGather(torch.autograd.Function):
    """x [...] of every rank -> [n ...]. What comes back is the sum of all ranks' gradients of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.new_empty(sequence_rank()[1], *x.shape)
        dist.all_gather(list(y), x.contiguous(), group=SEQUENCE_GROUP)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return AllToAll.apply(grad).sum(0)


def my_part(z: Tensor, dim: int) -> Tensor:
    """Of what every rank has whole, this rank's share along dim. Raises ValueError when it cannot be shared evenly."""
    rank, n = sequence_rank()
    if z.shape[dim] % n:
        raise ValueError(f"--sp {n}: {z.shape[dim]} heads or tokens of a frame cannot be shared evenly by {n} ranks")
    return z.chunk(n, dim)[rank]


def whole(z: Tensor, pattern: str) -> Tensor:
    """Of what every rank has a share, all of it; pattern: from [n ...], as in "n b f s c -> b f (n s) c"."""
    return z if SEQUENCE_GROUP is None else rearrange(AllGather.apply(z), pattern)


def to_heads(z: Tensor, heads: int) -> Tensor:
    """Some tokens and all heads [b f s (nh hd)] -> all tokens and some heads [b nh (f s) hd]."""
    n = sequence_rank()[1]
    if n == 1:
        return rearrange(z, "b f s (nh hd) -> b nh (f s) hd", nh=heads)
    if heads % n:  # 12 heads for 8 ranks would become 8 wider ones, without a word
        raise ValueError(f"--sp {n}: {heads} heads cannot be shared evenly by {n} ranks")
    z = AllToAll.apply(rearrange(z, "b f s (n nh hd) -> n b f s nh hd", n=n, nh=heads // n))
    return rearrange(z, "n b f s nh hd -> b nh (f n s) hd")


def to_tokens(y: Tensor, s: int) -> Tensor:
    """All tokens and some heads [b nh (f s) hd] -> s tokens of a frame and all heads [b f s (nh hd)]."""
    n = sequence_rank()[1]
    if n == 1:
        return rearrange(y, "b nh (f s) hd -> b f s (nh hd)", s=s)
    y = AllToAll.apply(rearrange(y, "b nh (f n s) hd -> n b f s nh hd", s=s, n=n))
    return rearrange(y, "n b f s nh hd -> b f s (n nh hd)")


def sdpa(q: Tensor, seen: list[tuple[Tensor, Tensor]], mask: Tensor | None = None) -> Tensor:
    """q [b nh n hd] attends to all pieces (k, v) in `seen`; mask [b l], if any: which keys of the first piece count."""
    if len(seen) == 1:
        k, v = seen[0]
    else:
        k, v = (torch.cat(pieces, dim=2) for pieces in zip(*seen, strict=True))  # softmax needs all keys at once
    if mask is not None:  # every key after the first piece counts
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[1]), value=True)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, segments: Segments | None,
                      context: list[tuple[Tensor, Tensor]], mask: Tensor | None = None):
    """q, k, v [b f s d] -> attention output [b f s d], and this pass's keys and values [b nh n hd] for the cache.

    context: keys and values that every query sees besides, the cached past, for HY the prompt before it.
    mask: [b l], which keys of the first piece of context count.
    """
    f, s = q.shape[1:3]
    q, k, v = (to_heads(z, heads) for z in (q, k, v))

    if segments is None:  # everything sees everything
        y = sdpa(q, [*context, (k, v)], mask)
    else:  # one attention per piece, over exactly the keys that it sees
        tokens = [n * q.shape[2] // f for n in segments.lengths]
        qs, ks, vs = (z.split(tokens, dim=2) for z in (q, k, v))  # split, not slices: their gradients come in one piece
        outputs = []
        for piece, seen in zip(qs, segments.seen, strict=True):
            outputs.append(sdpa(piece, context + [(ks[i], vs[i]) for i in seen], mask))
        y = torch.cat(outputs, dim=2)
    return to_tokens(y, s), (k, v)


class SelfAttention(nn.Module):
    """Two attentions over the same q, k, v: one with RoPE, and with a camera one with PRoPE; their outputs add up."""

    def __init__(self, d: int, heads: int, camera: bool):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)
        if camera:
            self.prope_o = nn.Linear(d, d)

    def forward(self, x: Tensor, rope: Tensor, projection: tuple[Tensor, Tensor] | None, segments: Segments | None,
                cached: list[tuple[Tensor, ...]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [b f s d], projection (P, P^-1), cached pieces of k, v, ... -> output [b f s d], this pass's k, v, ...

        Each branch caches what it attends to, after its own transform, so later passes read a key as it is.
        """
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)  # [b f s d]
        # where tokens are: RoPE turns queries and keys, values stay
        q_rope, k_rope = apply_rope(q, rope, self.heads), apply_rope(k, rope, self.heads)
        past = [piece[:2] for piece in cached]
        y, kv = segment_attention(q_rope, k_rope, v, self.heads, segments, past)
        y = self.o(y)
        if projection is not None:
            P, P_inv = projection
            # how their cameras stand to each other: PRoPE, on queries and keys without RoPE, and on values, too
            # (P_i^T q_i) . (P_j^-1 k_j) = q_i . (P_i P_j^-1 k_j): the score sees the motion from frame j to frame i
            q, k, v = apply_projection(q, P.mT), apply_projection(k, P_inv), apply_projection(v, P_inv)
            past = [piece[2:] for piece in cached]
            z, kv_prope = segment_attention(q, k, v, self.heads, segments, past)
            y = y + self.prope_o(apply_projection(z, P))  # values come back into frame i's image
            kv = kv + kv_prope
        return y, kv


class CrossAttention(nn.Module):
    """Video asks, text answers. Padding is not masked: Wan was trained that way."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [b l d] -> its keys and values [b nh l hd]."""
        k = rearrange(self.norm_k(self.k(text)), "b l (nh hd) -> b nh l hd", nh=self.heads)
        v = rearrange(self.v(text), "b l (nh hd) -> b nh l hd", nh=self.heads)
        return k, v

    def forward(self, x: Tensor, text_kv: tuple[Tensor, Tensor]) -> Tensor:
        """x [b f s d] -> [b f s d]."""
        q = rearrange(self.norm_q(self.q(x)), "b f s (nh hd) -> b nh (f s) hd", nh=self.heads)
        y = F.scaled_dot_product_attention(q, *text_kv)
        return self.o(rearrange(y, "b nh (f s) hd -> b f s (nh hd)", s=x.shape[2]))


class Block(nn.Module):
    def __init__(self, cfg: DiTConfig, camera: bool):
        super().__init__()
        d = cfg.dim
        self.norm1 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(d, cfg.heads, camera)
        self.norm3 = nn.LayerNorm(d, eps=1e-6)
        self.cross_attn = CrossAttention(d, cfg.heads)
        self.norm2 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(d, cfg.ffn_dim), nn.GELU("tanh"), nn.Linear(cfg.ffn_dim, d))
        self.modulation = nn.Parameter(torch.empty(1, 6, d))

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor | None, text_kv: tuple[Tensor, Tensor] | None,
                rope: Tensor, projection: tuple[Tensor, Tensor] | None, segments: Segments | None,
                cached: list[tuple[Tensor, ...]], update_cache: bool):
        """x [b f s d], modulation [b f 6 d], text [b l d], or instead its keys and values from the cache -> x, and of
        the video and the text the keys and values if they are to be cached."""
        # every frame has a noise level of its own, so adaLN's six vectors are per frame, not per video
        m = rearrange(self.modulation + modulation, "b f six d -> six b f 1 d")
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = m
        y, kv = self.self_attn(self.norm1(x) * (1 + scale_sa) + shift_sa, rope, projection, segments, cached)
        x = x + gate_sa * y
        text_kv = self.cross_attn.read(text) if text_kv is None else text_kv
        x = x + self.cross_attn(self.norm3(x), text_kv)  # as Wan has it: not modulated, not gated
        x = x + gate_ffn * self.ffn(self.norm2(x) * (1 + scale_ffn) + shift_ffn)
        return x, kv if update_cache else None, text_kv if update_cache else None


class Head(nn.Module):
    def __init__(self, d: int, c_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(d, c_out)
        self.modulation = nn.Parameter(torch.empty(1, 2, d))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [b f s d], time embedding e [b f d] -> [b f s c_out]."""
        shift, scale = rearrange(self.modulation + e[:, :, None], "b f two d -> two b f 1 d")
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanDiT(nn.Module):
    """Wan2.1's text-to-video transformer; with `camera`, plus PRoPE's zero-initialised output layers."""
    rope_theta = 10000.0
    text_column = "embeds"  # which column of a table of prompts (data.py) its text_dim is the width of

    def __init__(self, cfg: DiTConfig, camera: bool = True):
        super().__init__()
        self.cfg = cfg
        d = cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.channels, d, (1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, d), nn.GELU("tanh"), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList([Block(cfg, camera) for _ in range(cfg.layers)])
        self.head = Head(d, 4 * cfg.channels)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Training from scratch: the head and PRoPE start at zero, so the network starts by predicting nothing."""
        for name, p in self.named_parameters():
            if name.endswith("modulation"):
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
            elif name.endswith("bias") or "prope_o" in name or name.startswith("head.head"):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            else:
                nn.init.xavier_uniform_(p.flatten(1))

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma [b f] -> time embedding e [b f d] for the head, and its projection [b f 6 d] for the blocks."""
        waves = sinusoid(1000 * sigma.double(), self.cfg.freq_dim)  # Wan counts noise to 1000, here and nowhere else
        e = self.time_embedding(waves.to(self.head.modulation.dtype))
        return e, rearrange(self.time_projection(e), "b f (six d) -> b f six d", six=6)

    def forward(self, x_t: Tensor, sigma: Tensor, prompt: Tensor, camera: Camera | None = None, *,
                clean: Tensor | None = None, chunk: int = 0, kv_cache: KVCache | None = None,
                update_cache: bool = False) -> Tensor | KVCache:
        """x_t [b f c h w], sigma [b f], prompt [b l text_dim] -> v [b f c h w], fp32.

        camera: None turns the camera branch off.
        clean, chunk: teacher forcing on the clean video [b f c h w], `chunk` frames at a time.
        kv_cache: the past of a stream; with update_cache=True the result is not v but the cache extended by x_t. The
        prompt is read into the cache by the first pass; later ones take it from there, unless they have gradient.
        Raises ValueError when sigma or the camera are of another shape than x_t.
        """
        b, f, _, h, w = x_t.shape
        check_shapes(x_t, sigma, camera)
        past = KVCache(0, []) if kv_cache is None else kv_cache
        frames = past.position + torch.arange(f, device=x_t.device)  # a stream's positions go on from what was cached
        rope = rope_table(frames, h // 2, w // 2, self.cfg.rope_bands, self.rope_theta)  # once a pass, for all blocks
        if camera is not None and past.origin is not None:
            camera = camera.seen_from(past.origin)
        projection = None if camera is None else tuple(four_copies(P, self.cfg.dim) for P in projections(camera))
        segments = None  # every frame sees every frame, and the cache
        if clean is not None:  # [clean | noisy] along the frames; both stand at the same places and times
            before = slice(0, (f - 1) // chunk * chunk)  # nothing comes after the last clean chunk to see it
            x_t = torch.cat([clean[:, before], x_t], dim=1)
            sigma = torch.cat([torch.zeros_like(sigma[:, before]), sigma], dim=1)
            rope = torch.cat([rope[: before.stop * len(rope) // f], rope])
            if projection is not None:
                projection = tuple(torch.cat([P[:, before], P], dim=1) for P in projection)
            segments = teacher_forcing_segments(f, chunk)

        weight = self.patch_embedding.weight.flatten(1)  # a convolution whose stride is its kernel is a linear map
        x = rearrange(x_t, "b f c (h p) (w q) -> b f (h w) (c p q)", p=2, q=2).to(weight.dtype)
        x = F.linear(my_part(x, dim=2), weight, self.patch_embedding.bias)  # [b f s d]
        if past.text is not None and not torch.is_grad_enabled():
            text, text_kvs = None, past.text[0]
        else:  # where there is gradient, what reads the prompt is to learn from it
            text, text_kvs = self.text_embedding(prompt.to(x.dtype)), [None] * len(self.blocks)  # [b l d]
        e, modulation = self.embed_time(sigma)
        layers, new_text_kvs = [], []
        for i, block in enumerate(self.blocks):
            cached = past.layers[i] if past.layers else []
            x, kv, text_kv = block(x, modulation, text, text_kvs[i], rope, projection, segments, cached, update_cache)
            layers.append(kv)
            new_text_kvs.append(text_kv)
        if update_cache:  # the velocity of clean frames means nothing: what this pass was for is its keys and values
            return past._replace(frames=past.frames + f, layers=append_layers(past.layers, layers),
                                 text=(new_text_kvs, None))
        v = whole(self.head(x[:, -f:], e[:, -f:]), "n b f s c -> b f (n s) c")  # of the noisy frames alone
        return rearrange(v, "b f (h w) (p q c) -> b f c (h p) (w q)", h=h // 2, p=2, q=2).float()


def check_shapes(x_t: Tensor, sigma: Tensor, camera: Camera | None) -> None:
    """Raises ValueError when x_t [b f ...], sigma [b f] and viewmats [b f 4 4] do not belong together."""
    b, f = x_t.shape[:2]
    if sigma.shape != (b, f) or (camera is not None and camera.viewmats.shape != (b, f, 4, 4)):
        raise ValueError(f"x_t {list(x_t.shape)} needs sigma [{b} {f}] and viewmats [{b} {f} 4 4], found "
                         f"{list(sigma.shape)} and {None if camera is None else list(camera.viewmats.shape)}")


def append_layers(old: list[list[tuple[Tensor, ...]]], new: list[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
    """Per block, the cached pieces, and this pass's keys and values as one more, unless it was a pass of no frames."""
    old = old or [[]] * len(new)
    if new[0][0].shape[2] == 0:
        return old
    return [[*pieces, piece] for pieces, piece in zip(old, new, strict=True)]


# A walk that never ends has a window: the first few frames, the sink, and the latest ones. Public Wan drops what is
# between them and lets all else be, so that RoPE's positions and PRoPE's cameras move further and further away from
# what was trained. move_window also closes the gap.


def some_frames(pieces: list[tuple[Tensor, ...]], tokens: int, start: int, stop: int) -> list[tuple[Tensor, ...]]:
    """Of a block's cached pieces, of `tokens` tokens a frame, those of frames start .. stop - 1."""
    found, at = [], 0  # at: the piece's first frame
    for piece in pieces:
        n = piece[0].shape[2] // tokens
        first, last = max(start - at, 0), min(stop - at, n)
        if last - first == n:
            found.append(piece)
        elif first < last:  # cloned, or the rest of the piece would stay in memory
            found.append(tuple(z[:, :, first * tokens : last * tokens].clone() for z in piece))
        at += n
    return found


def cached_frames(kv_cache: KVCache, tokens: int) -> int:
    """How many frames it holds."""
    return sum(piece[0].shape[2] for piece in kv_cache.layers[0]) // tokens


def rolling_cache(kv_cache: KVCache, tokens: int, sink: int, recent: int) -> KVCache:
    """The first `sink` and the last `recent` frames of a cache, of `tokens` tokens each; all of it if it is shorter.

    Every key keeps the RoPE position it was cached with, and the next chunk's go on from there. Before a chunk of n
    frames, rolling_cache(kv_cache, tokens, s, window - s - n) is public Wan's cache of `window` frames with s sink
    frames.
    """
    held = cached_frames(kv_cache, tokens)
    if held <= sink + recent:
        return kv_cache
    layers = [some_frames(pieces, tokens, 0, sink) + some_frames(pieces, tokens, held - recent, held)
              for pieces in kv_cache.layers]
    return kv_cache._replace(layers=layers)


def move_window(net: nn.Module, kv_cache: KVCache, tokens: int, sink: int, recent: int, origin: Tensor) -> KVCache:
    """The first `sink` and the last `recent` frames of a cache, as if nothing had been between them.

    RoPE's positions close up, by a turn of the recent keys (arXiv:2511.20649). PRoPE's world becomes that of the camera
    with viewmat `origin` [b 4 4], so that cameras stay near: P_j^-1 k of the old world is O P_j^-1 k in the new one.
    Both are exact, in fp32, and but for the gap no score between frames changes. A recent frame is rounded anew by each
    move until it is evicted; a sink stays for ever, and so is always moved from where it was first cached.
    """
    held, change = cached_frames(kv_cache, tokens), origin
    gap = held - sink - recent
    if kv_cache.origin is not None:
        change = origin.double() @ invert_se3(kv_cache.origin.double())
    sinks = kv_cache.sinks or [some_frames(pieces, tokens, 0, sink) for pieces in kv_cache.layers]
    layers = []
    for pieces, first in zip(kv_cache.layers, sinks, strict=True):
        latest = some_frames(pieces, tokens, held - recent, held)
        layers.append([move_piece(net, piece, 0, origin) for piece in first]
                      + [move_piece(net, piece, -gap, change) for piece in latest])
    return kv_cache._replace(layers=layers, evicted=kv_cache.evicted + gap, origin=origin, sinks=sinks)


def move_piece(net: nn.Module, piece: tuple[Tensor, ...], frames: int, change: Tensor) -> tuple[Tensor, ...]:
    """A cached piece, `frames` frames later and in another world: change [b 4 4] times the old one's coordinates."""
    k, v, *prope = piece
    if frames != 0:
        width = net.cfg.rope_bands[0]  # of a head's channels, those that turn with time
        angle = frames * rope_speed(width, net.rope_theta, k.device)
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        pairs = k[..., :width].float().unflatten(-1, (-1, 2)).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).type_as(k)
        k = torch.cat([turned, k[..., width:]], dim=-1)
    G = four_copies(change.float()[:, None], k.shape[-1])
    return (k, v, *(apply_projection(z.flatten(1, 2)[:, None], G).view(z.shape) for z in prope))


# ----------------------------------------------------------------------------------------------------------------------
# 4. Sampling. A chunk starts as noise, is denoised after the chunks before it, and joins the cache once it is clean.
# What trainers show and stream.py serves.
#
# With guidance there are two prompts, the text and the null prompt, and two caches: what the null prompt's pass sees of
# the past, it has read itself. Each is a pass of its own: a batch of twice the size would need twice the memory.

Prompt = Any  # a tensor [b l d], or a tuple of tensors and such tuples, each batch-first (HYPrompt)


def tree_map(f, *trees):
    """f over tensors, or over the tensors at the same place of tuples of them (a HYPrompt)."""
    if isinstance(trees[0], Tensor):
        return f(*trees)
    return type(trees[0])(*(tree_map(f, *leaves) for leaves in zip(*trees, strict=True)))


def where_prompt(condition: Tensor, a: Prompt, b: Prompt) -> Prompt:
    """Prompts a where condition [b] holds, else b. condition: on any device, as HY's masks are on the CPU."""
    return tree_map(lambda x, y: torch.where(condition.to(x.device).view(-1, *[1] * (x.ndim - 1)), x, y), a, b)


def velocity(net: nn.Module, x_t: Tensor, sigma: Tensor, prompts: list[Prompt], camera: Camera | None, guidance: float,
             kv_caches: list[KVCache | None]) -> Tensor:
    """v [b f c h w], guided if there is a null prompt behind the prompt. One cache for each prompt."""
    vs = [net(x_t, sigma, prompt, camera, kv_cache=kv_cache)
          for prompt, kv_cache in zip(prompts, kv_caches, strict=True)]
    return vs[0] if len(vs) == 1 else guide(*vs, guidance)


@torch.no_grad()
def euler(net: nn.Module, noise: list[Tensor], sigmas: list[float], prompts: list[Prompt], camera: Camera | None,
          guidance: float, kv_caches: list[KVCache | None], generated: Tensor) -> Tensor:
    """x_t = noise[0] [b f c h w] -> x0 by Euler steps along the velocity, down `sigmas`: the sampler of a teacher.

    prompts: [prompt], or with guidance [prompt, null]. Frames where generated [b f] is 0 are given: noise[0] holds them
    clean, they stay at noise level zero and come out unchanged.
    """
    x_t = noise[0]
    for upper, lower in zip(sigmas, sigmas[1:]):
        v = velocity(net, x_t, upper * generated, prompts, camera, guidance, kv_caches)
        step = (lower - upper) * generated  # [b f], 0 on given frames
        x_t = x_t + step[..., None, None, None] * v
    return x_t


@torch.no_grad()
def few_step(net: nn.Module, noise: list[Tensor], sigmas: list[float], prompts: list[Prompt], camera: Camera | None,
             guidance: float, kv_caches: list[KVCache | None], generated: Tensor) -> Tensor:
    """As `euler`, but each step predicts x0 and noises it anew to the next level: the sampler of a distilled student.

    (Multistep consistency sampling, arXiv:2303.01469 algorithm 1.) noise: one tensor for each level above 0.
    """
    x_t = noise[0]
    for i, (upper, lower) in enumerate(zip(sigmas, sigmas[1:])):
        sigma = upper * generated  # [b f]
        v = velocity(net, x_t, sigma, prompts, camera, guidance, kv_caches)
        x0 = velocity_to_x0(v, x_t, sigma)
        x_t = add_noise(x0, noise[i + 1], lower * generated) if lower > 0 else x0
    return x_t


SAMPLERS = {"euler": euler, "few_step": few_step}


@torch.no_grad()
def update_cache(net: nn.Module, x0: Tensor, prompt: Prompt, camera: Camera | None,
                 kv_cache: KVCache | None = None) -> KVCache:
    """The cache, extended by finished frames x0 [b f c h w]: one pass at noise level zero."""
    sigma = x0.new_zeros(x0.shape[:2])
    return net(x0, sigma, prompt, camera, kv_cache=kv_cache, update_cache=True)


def prefill(net: nn.Module, x: Tensor, prompt: Prompt, camera: Camera | None) -> KVCache:
    """The cache of a stream that has no frames yet, only its prompt. x, camera: any frames of the video's shape.

    HY could not do without it: in its bidirectional pass the text attends to the video, in a stream it must not, and
    that there is a cache is all that tells the two apart.
    """
    nothing = slice(0, 0)
    return update_cache(net, x[:, nothing], prompt, None if camera is None else camera.frames(nothing))


class Chunk(NamedTuple):
    """A finished chunk, as the cache reads it, or what of it is still in the window."""
    start: int  # which of the video's frames is its first
    x0: Tensor  # [b n c h w]
    camera: Camera
    last_pose: Tensor | None  # KVCache's, before it joined

    def part(self, first: int, last: int) -> "Chunk":
        """Its frames from `first` to last - 1, counted within it."""
        frames, last_pose = slice(first, last), self.last_pose
        if first > 0 and last_pose is not None:
            last_pose = self.camera.viewmats[:, first - 1]
        return Chunk(self.start + first, self.x0[:, frames], self.camera.frames(frames), last_pose)


class StreamState(NamedTuple):
    """A stream between two chunks: all that the next one depends on, but for its prompt and its camera."""
    kv_caches: list[KVCache | None]  # one for each prompt; None: a bidirectional network has no past
    rng: list[torch.Generator]  # one for each video, of its noise; drawing moves them on, nothing else changes in place
    shape: tuple[int, ...]  # [c h w] of a latent frame
    past: list[Chunk]  # what the caches hold, to read it again with another prompt


def check_window(meta: "Meta") -> None:
    """Raises ValueError when meta has a window that its sink and a chunk do not fit into."""
    window, sink, chunk = meta.get("window", 0), meta.get("sink", 0), meta["chunk"]
    if window and not chunk:
        raise ValueError(f"--window {window}: a bidirectional network makes all frames at once, and keeps none")
    if window and window < sink + chunk:
        raise ValueError(f"--window {window}: too short for --sink {sink} and chunks of {chunk}")


def start_stream(net: nn.Module, meta: "Meta", rng: list[torch.Generator], shape: tuple[int, ...],
                 prompts: list[Prompt], device: torch.device) -> StreamState:
    """The state before the first chunk. prompts: [prompt], or with guidance [prompt, null]; shape: [c h w]."""
    check_window(meta)
    nothing = torch.zeros(len(rng), 0, *shape, device=device)
    camera = Camera(nothing.new_zeros(len(rng), 0, 4, 4), nothing.new_zeros(len(rng), 0, 3, 3))
    kv_caches = [prefill(net, nothing, prompt, camera if meta["camera"] else None) if meta["chunk"] else None
                 for prompt in prompts]
    return StreamState(kv_caches, rng, shape, [])


@torch.no_grad()
def next_chunk(net: nn.Module, meta: "Meta", state: StreamState, prompts: list[Prompt], camera: Camera,
               given: Tensor | None = None) -> Tensor:
    """x0 [b n c h w]: a frame for each of the n poses of `camera`, denoised together after what was committed.

    meta: how the checkpoint is to be sampled. Noise is drawn for this chunk alone, so that no later one can change it,
    and by each video's own generator, so that it does not depend on the others in its batch.
    given: the first frames of the chunk [b p c h w], p <= n, if they are given rather than generated.
    """
    b, n = camera.viewmats.shape[:2]
    device = camera.viewmats.device
    # UniPC works in log-SNR, which pure noise has at -inf
    sigmas = noise_levels(meta["sampling_steps"], meta["shift"], start=0.999 if meta["sampler"] == "unipc" else 1.0)
    count = meta["sampling_steps"] if meta["sampler"] == "few_step" else 1
    noise = [torch.stack([torch.randn((n, *state.shape), generator=g) for g in state.rng]).to(device)
             for _ in range(count)]
    generated = torch.ones(b, n, device=device)
    if given is not None:  # clean from the start
        p = given.shape[1]
        noise[0] = torch.cat([given, noise[0][:, p:]], dim=1)
        generated[:, :p] = 0
    seen = camera if meta["camera"] else None  # the base model is shown no camera, whatever the path
    return SAMPLERS[meta["sampler"]](net, noise, sigmas, prompts, seen, meta["guidance"], state.kv_caches, generated)


def commit(net: nn.Module, meta: "Meta", state: StreamState, x0: Tensor, prompts: list[Prompt],
           camera: Camera) -> StreamState:
    """The state after a finished chunk x0 [b n c h w]. The last one, which nothing comes after to read, needs none."""
    if not meta["chunk"]:
        raise ValueError("a bidirectional network makes all frames of a video as one chunk: nothing comes after it")
    seen, before = camera if meta["camera"] else None, state.kv_caches[0]
    kv_caches = [update_cache(net, x0, prompt, seen, kv_cache)
                 for prompt, kv_cache in zip(prompts, state.kv_caches, strict=True)]
    past = [*state.past, Chunk(before.frames, x0, camera, before.last_pose)]
    state = state._replace(kv_caches=kv_caches, past=past)
    return slide_window(net, meta, state) if meta.get("window") else state


@torch.no_grad()
def slide_window(net: nn.Module, meta: "Meta", state: StreamState) -> StreamState:
    """What the next chunk is to see of a state: with its own frames, meta's `window` of which the first `sink` stay."""
    sink, end = meta.get("sink", 0), state.kv_caches[0].frames
    recent = meta["window"] - sink - meta["chunk"]
    if sum(chunk.x0.shape[1] for chunk in state.past) <= sink + recent:
        return state
    tokens, latest = frame_tokens(net, state.shape), some_chunks(state.past, end - recent, end)
    if meta.get("absolute_positions"):
        kv_caches = [rolling_cache(kv_cache, tokens, sink, recent) for kv_cache in state.kv_caches]
    else:
        # PRoPE's world: the first frame behind the sink, as near as the first of all in training
        origin = latest[0].camera.viewmats[:, 0] if latest else state.past[-1].camera.viewmats[:, -1]
        kv_caches = [move_window(net, kv_cache, tokens, sink, recent, origin) for kv_cache in state.kv_caches]
    return state._replace(kv_caches=kv_caches, past=some_chunks(state.past, 0, sink) + latest)


def frame_tokens(net: nn.Module, shape: tuple[int, ...]) -> int:
    """How many tokens a latent frame [c h w] is."""
    return shape[1] * shape[2] // net.cfg.patch**2


def some_chunks(chunks: list[Chunk], start: int, stop: int) -> list[Chunk]:
    """What of them lies in the video's frames start .. stop - 1."""
    spans = [(max(start - z.start, 0), min(stop - z.start, z.x0.shape[1])) for z in chunks]
    return [z.part(first, last) for z, (first, last) in zip(chunks, spans, strict=True) if first < last]


def reread(net: nn.Module, meta: "Meta", state: StreamState, prompts: list[Prompt]) -> StreamState:
    """The state as if all that is in the window had been made for these prompts, which the next chunk then has.

    It is committed again, chunk by chunk, where it stood (LongLive's re-cache, arXiv:2509.22622).
    """
    def read(kv_cache: KVCache, prompt: Prompt, chunks: list[Chunk]) -> KVCache:
        for chunk in chunks:
            kv_cache = kv_cache._replace(frames=chunk.start, last_pose=chunk.last_pose)
            kv_cache = update_cache(net, chunk.x0, prompt, chunk.camera if meta["camera"] else None, kv_cache)
        return kv_cache

    sink, tokens = meta.get("sink", 0), frame_tokens(net, state.shape)
    first, latest = ([z for z in state.past if (z.start < sink) == early] for early in (True, False))
    empty = start_stream(net, meta, state.rng, state.shape, prompts, next(net.parameters()).device).kv_caches
    kv_caches = []
    for prompt, old, new in zip(prompts, state.kv_caches, empty, strict=True):
        kv_cache = read(new, prompt, first)
        if old.sinks is not None:  # the window has moved: what follows stands close behind the sink, seen from near
            kv_cache = move_window(net, kv_cache, tokens, sink, 0, old.origin)._replace(evicted=old.evicted)
        kv_cache = read(kv_cache, prompt, latest)
        kv_caches.append(kv_cache._replace(frames=old.frames, last_pose=old.last_pose))
    return state._replace(kv_caches=kv_caches)


def rollout(net: nn.Module, meta: "Meta", rng: list[torch.Generator], shape: tuple[int, ...], prompt: Prompt,
            null: Prompt, camera: Camera, given: Tensor | None = None):
    """Yield x0 [b f c h w] chunk by chunk, each denoised after what was yielded before it.

    rng: one generator per video, shape: [f c h w]. meta: how the checkpoint is to be sampled.
    prompt, null: b each. What HY's says of an image, it says in both.
    given: the first latent frames [b p c h w], an image or a short video, if they are given rather than generated.
    """
    f, chunk = shape[0], meta["chunk"] or shape[0]  # bidirectional models have chunk 0: all frames at once
    prompts = [prompt] if meta["guidance"] == 1 else [prompt, null]
    state = start_stream(net, meta, rng, shape[1:], prompts, camera.viewmats.device)
    for start in range(0, f, chunk):
        frames = slice(start, start + chunk)
        here = camera.frames(frames)
        x0 = next_chunk(net, meta, state, prompts, here, None if given is None else given[:, frames])
        yield x0
        if frames.stop < f:
            state = commit(net, meta, state, x0, prompts, here)


@contextmanager
def timed(seconds: dict[str, float] | None, name: str):
    """Add the time of a with-block to seconds[name]; None measures nothing and waits for nothing."""
    if seconds is None:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------------------
# 5. Weights. A checkpoint is {"model": name -> tensor, "meta": Meta}: fp32 masters while it trains, sharded over all
# ranks (FSDP2), and the EMA of them as one file for the next stage.


Meta = TypedDict("Meta", {  # what a checkpoint says of itself: all that it takes to sample it, and to train it further
    "stage": str,  # base, camera, ar, ode, cd or dmd; or vae
    "preset": str,  # of PRESETS: backbone and size
    "step": int,  # optimizer steps it was trained for in its stage
    "from": str | None,  # what it was trained from, "ar.pt at step 1000, 1f3a9c05"; None: nothing of ours
    # the videos it knows
    "size": list[int],  # pixels, height and width
    "fps": float,  # pixel frames a second
    "frames": int,  # latent frames of a video
    "K": list[float],  # intrinsics (fx, fy, cx, cy), divided by width and height
    "vae_fingerprint": str,  # of the VAE that made its latents
    "camera": bool,  # has it a camera branch?
    "given_prob": float,  # how often the first frame or two were given in training; at 0 it cannot go on from an image
    # how it is sampled
    "chunk": int,  # latent frames denoised together; 0: bidirectional, all of them at once
    "shift": float,  # of the noise levels, towards pure noise
    "sampler": str,  # of SAMPLERS
    "sampling_steps": int,  # denoising steps of a chunk
    "guidance": float,  # w in v_null + w (v_cond - v_null); 1 is off
    "window": int,  # latent frames that a chunk sees, its own with them; 0: all that there are
    "sink": int,  # of the window, how many are the video's first, which stay for ever
    "absolute_positions": bool,  # with a window: leave positions and cameras as they were cached, as public code does
    # quirks of released networks, HY's: see HYDiT
    "timed_text": bool,
    "released_cache": bool,
    "fingerprint": str,  # of its weights, found when they are read
    # of a VAE
    "mean": list[float],  # of its latents, per channel, and their deviation
    "std": list[float],
}, total=False)
OLD_KEYS = {"steps": "sampling_steps", "prefix_prob": "given_prob"}  # a key's name in older files: its name today


def upgrade(meta: dict) -> dict:
    """A meta in today's words, whatever version of this code wrote it."""
    meta = {OLD_KEYS.get(key, key): value for key, value in meta.items()}
    if meta.get("sampler") == "renoise":
        meta["sampler"] = "few_step"
    return meta


SHARD_OVER: int | None = None  # how many ranks share a copy of the weights; None: all of them


def usual_shards(ranks: int, node: int, sp: int) -> int:
    """How many ranks share a copy of the weights, of whom so many are on a node and share a video: those of a node. Or,
    where a video takes a whole node, of two such groups: a network that large has no room for its states, either."""
    return 2 * sp if sp >= node and ranks % (2 * sp) == 0 else node


def start_process_group(sp: int = 1, shard_over: int | None = None) -> tuple[int, int, torch.device]:
    """rank, world size, device. Under torchrun, nccl on GPUs and gloo on CPUs; plain python is a world of one.

    sp, shard_over: how many neighbouring ranks share a video, and a copy of the weights (shard; None: usual_shards).
    Raises ValueError when the ranks are no multiple of them.
    """
    global SEQUENCE_GROUP, SHARD_OVER
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    world_of_one = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **world_of_one)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % sp:
        raise ValueError(f"--sp {sp}: {world_size} processes cannot be cut into groups of {sp}")
    if shard_over and world_size % shard_over:
        raise ValueError(f"--shard-over {shard_over}: {world_size} processes cannot be cut into groups of {shard_over}")
    SHARD_OVER = shard_over or usual_shards(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), sp)
    SEQUENCE_GROUP = dist.new_subgroups(sp)[0] if sp > 1 else None
    STOP.clear()
    return rank, world_size, device


STOP: set[str] = set()  # "asked": this rank got SIGTERM, as before a preemption; "agreed": all ranks know that one did


def stopping() -> bool:
    """Has any rank been asked to end? The same answer on all of them, renewed by check_finite.

    From the first call on, SIGTERM only asks; whatever never calls this, it ends at once, as it does any program.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: STOP.add("asked"))
    return "agreed" in STOP


def batch_part(micro: int, accum: int) -> tuple[int, int]:
    """Which part of a step's batch this rank's micro-batch is, of how many. Ranks that share a video have the same."""
    sp = sequence_rank()[1]
    replica, replicas = dist.get_rank() // sp, dist.get_world_size() // sp
    return micro * replicas + replica, accum * replicas


def fresh_weights(preset: str, camera: bool, seed: int) -> dict[str, Tensor]:
    """Weights to train from scratch, the same on every rank."""
    net = build(preset, camera)
    torch.manual_seed(seed)
    net.init_weights()
    return net.state_dict()


def with_camera(weights: dict[str, Tensor], preset: str) -> tuple[dict[str, Tensor], int]:
    """Add what the preset's network has for its camera and the weights lack: PRoPE's output layers, at zero, and for HY
    the embedding of action labels, its second layer at zero. The network computes what it did. Returns the weights and
    how many were added."""
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in build(preset).state_dict().items()}
    added = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in weights}
    if "action_in.mlp.0.weight" in added:  # at zero, too, it would never learn
        added["action_in.mlp.0.weight"].normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return {**weights, **added}, len(added)


def compile_block(block: nn.Module) -> None:
    """torch.compile its forward, in place: no parameter changes its name. All blocks of a network share what is made,
    once for every kind of pass; only the length of a cache may vary.
    """
    import torch._dynamo
    forward = torch.compile(block.forward)

    def run(x: Tensor, *others):
        # each thread has its own; DMD has seven kinds: a chunk or a video, with gradient or without, ...
        torch._dynamo.config.recompile_limit = 64
        x = x.clone() if x._is_view() else x  # the first block's is a view, the others' are not: two kinds for nothing
        args = [one_piece(z) if isinstance(z, list) else z for z in others]  # the one list among them is the cache
        for piece in next(z for z in args if isinstance(z, list)):
            for z in piece:
                torch._dynamo.maybe_mark_dynamic(z, 2)
        return forward(x, *args)

    block.forward = run


def shard(net: nn.Module, weights: dict[str, Tensor], device: torch.device, train: bool = False,
          compiled: bool = False) -> nn.Module:
    """A network built on the meta device -> the same, sharded over all ranks (FSDP2) and filled with rank 0's weights.

    One fully_shard per block and one for the rest. fp32 master weights; on a GPU, bf16 compute and fp32 reduction.
    Where cfg.recompute says so, a trained block runs forward twice: the same gradients, bit for bit, in less memory.
    """
    compute = torch.bfloat16 if device.type == "cuda" else None
    # across nodes (torchrun --nnodes), weights are sharded within a node and replicated from node to node: HSDP
    world_size = dist.get_world_size()
    local = SHARD_OVER or world_size
    shape, names = ((world_size,), ("shard",)) if local == world_size else (
        (world_size // local, local), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # the networks cast their inputs themselves: sigma and the camera must reach them in fp32
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if compiled:
        for block in net.blocks:
            compile_block(block)
    if train and net.cfg.recompute:
        recompute_blocks(net)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    # resharded even at the root: between passes every parameter is a shard again, which update_ema relies on
    fully_shard(net, mesh=mesh, mp_policy=precision, reshard_after_forward=True).to_empty(device=device)
    weights = {name: w.float() for name, w in weights.items()} if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(net, weights, options=options)
    return net.train(train).requires_grad_(train)


@contextmanager
def gathered(net: nn.Module, on: bool = True):
    """In a with-block, a sharded network's weights stay whole after the first pass, so that others gather nothing.

    For passes between which no weight changes. After it, parameters are shards again. on=False changes nothing.
    """
    if not on:
        yield
        return
    net.set_reshard_after_forward(False)
    net.set_reshard_after_backward(False)
    yield
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    net.set_reshard_after_forward(True)
    net.set_reshard_after_backward(True)


def recompute_blocks(net: nn.Module) -> None:
    """Activation checkpointing: of a block, autograd keeps the inputs, and backward runs it again."""
    for block in net.blocks:  # within FSDP's hooks, and without a wrapper: no parameter changes its name
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) net, shard by shard: no communication."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def check_finite(step: int, metrics: dict[str, Tensor], ids: list[int]) -> dict[str, float]:
    """Average metrics over the ranks. Raises ValueError on NaN or inf, on every rank at once, before the update."""
    values = [value.detach().float() for value in metrics.values()]
    asked = torch.full_like(values[0], float("asked" in STOP))  # goes along, for ranks must stop together
    sums = torch.stack([*values, asked])
    dist.all_reduce(sums)
    *means, asked = (sums / dist.get_world_size()).tolist()
    if asked > 0:
        STOP.add("agreed")
    row = dict(zip(metrics, means, strict=True))
    if not sums.isfinite().all():
        raise ValueError(f"step {step}: {row} is not finite; batch rows on rank {dist.get_rank()}: {ids}. "
                         "The last checkpoint and state are untouched")
    return row


def full_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """All weights in CPU memory on rank 0, empty elsewhere. Every rank must call it."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_checkpoint(path: Path, weights: dict[str, Tensor], meta: Meta) -> None:
    """Write {"model", "meta"} so that a crash or a full disk never leaves half a file under the final name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"model": {name: w.contiguous() for name, w in weights.items()}, "meta": meta}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path}: could not be written ({error}); what was there before is untouched") from error


def point_to(name: Path, target: Path) -> None:
    """Let `name` be the same file as `target`: a hard link, or where there are none a copy. It is never missing."""
    temporary = name.with_name(name.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(target, temporary)
        except OSError:
            shutil.copy(target, temporary)
        os.replace(temporary, name)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{name}: could not be written ({error}); what was there before is untouched") from error


def save_average(out: Path, step: int, ema: nn.Module, meta: Meta, keep: int) -> None:
    """Write the averaged weights of this step beside `out`, as out/step-STEP.pt, and let `out` be that file.

    The newest `keep` stay, so that a stage that went too far can be rewound. Every rank must call it; rank 0 writes.
    """
    weights = full_state_dict(ema)
    if dist.get_rank() > 0:
        return
    path = out.with_suffix("") / f"step-{step:06d}.pt"
    about = {name: value for name, value in meta.items() if name != "fingerprint"}  # that of what it was made from
    save_checkpoint(path, weights, about | {"step": step})
    point_to(out, path)
    for old in sorted(path.parent.glob("step-*.pt"), key=lambda file: file.stat().st_mtime)[:-keep]:
        old.unlink()


def fingerprint(weights: dict[str, Tensor], numbers: int | None = None) -> str:
    """A short name for these very weights, by which what was made of them knows them.

    numbers: read only the first of each tensor. Training changes them all, and a large file is not read twice.
    """
    parts = (w.flatten()[:numbers].float().cpu().numpy().tobytes() for w in weights.values())
    return f"{zlib.crc32(b''.join(parts)):08x}"


def check_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], owner: str) -> None:
    """Raises ValueError unless two state dicts agree name for name and shape for shape. owner: whose `expected` is."""
    right = {name: tuple(w.shape) for name, w in expected.items()}
    there = {name: tuple(w.shape) for name, w in found.items()}
    wrong = [name for name in right | there if right.get(name) != there.get(name)]
    if wrong:
        raise ValueError(f"{len(wrong)} of its tensors are not those of {owner}, first {wrong[0]}: "
                         f"expected shape {right.get(wrong[0], 'none')}, found {there.get(wrong[0], 'none')}")


def origin(path: Path, meta: Meta) -> str:
    """What is said of a checkpoint in those that are made from it: its name, and which of that name it was."""
    return f"{path.name} at step {meta['step']}, {meta['fingerprint']}"


MAKERS = {  # stage: the command that makes its checkpoint
    "vae": "python data.py", "base": "python train_camera.py --no-camera --data data/images",
    "camera": "python train_camera.py", "ar": "python train_ar.py", "ode": "python distill_ode.py",
    "cd": "python distill_cd.py", "dmd": "python train_dmd.py",
}


def load_checkpoint(path: Path, *stages: str, preset: str | None = None,
                    any_size: bool = False) -> tuple[dict[str, Tensor], Meta]:
    """weights, meta of our own checkpoint (memory-mapped) or a released one, file or folder.

    preset: of the network that is wanted; with any_size, larger and smaller ones that read the same will do.
    Raises ValueError for a missing, broken or foreign file, or the wrong stage's. Weights are returned only if they
    are, name for name and shape for shape, those of the network that meta describes.
    """
    if not path.exists():
        other = f" --preset {preset}" if preset not in (None, "tiny") else ""
        hint = f"; `{MAKERS[path.stem]}{other}` makes it" if path.stem in MAKERS else ""
        shipped = Path(__file__).parent / "ckpt" / (preset or "tiny") / path.name
        stand_in = f", and {os.path.relpath(shipped)} could stand in" if shipped.exists() else ""
        raise ValueError(f"{path}: no such file{hint}{stand_in}")
    if path.is_dir() or path.suffix == ".safetensors":
        weights, meta = read_released_folder(path, want_vae="vae" in stages)
    else:
        weights, meta = read_file(path)
    stage = meta["stage"]
    if stages and stage not in stages:
        raise ValueError(f"{path}: expected a checkpoint of stage {' or '.join(stages)}, found {stage}")
    if stages and "base" not in stages and not meta.get("camera", True):
        raise ValueError(f"{path}: expected a network with a camera, found one of stage {stage} without; "
                         "stream.py can show it, train_camera.py teaches a base its camera")
    if meta["preset"] not in PRESETS:
        raise ValueError(f"{path}: a network of preset {meta['preset']!r}, known are {', '.join(PRESETS)}")
    if meta.get("sampler", "euler") not in SAMPLERS:
        raise ValueError(f"{path}: sampled by {meta['sampler']!r}, known are {', '.join(SAMPLERS)}")
    if preset and meta["preset"] != preset and not (any_size and read_the_same(meta["preset"], preset)):
        raise ValueError(f"{path}: a {meta['preset']} network, but --preset is {preset}")
    with torch.device("meta"):
        net = build_vae(meta["preset"]) if stage == "vae" else build(meta["preset"], meta["camera"])
    expected = net.state_dict()
    try:
        check_same_tensors(weights, expected, owner=meta["preset"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, w in weights.items():
        if not w.is_floating_point() or not (w.is_meta or w.float().isfinite().all()):
            found = "NaN or inf" if w.is_floating_point() else str(w.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: expected finite floats, {name} holds {found}")
    weights = {name: weights[name] for name in expected}  # in our order, which a fingerprint depends on
    if stage != "vae":
        meta["fingerprint"] = fingerprint(weights, numbers=1000)
    elif "fingerprint" not in meta:
        meta["fingerprint"] = fingerprint(weights)
    return weights, meta


def read_file(path: Path) -> tuple[dict[str, Tensor], Meta]:
    """Our own checkpoint, or a file that others released."""
    try:  # without code, and memory-mapped where the format allows it
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(f"{path}: truncated, or not a checkpoint of ours ({type(error).__name__})") from error
    if not isinstance(saved, dict):
        saved = {}
    weights, meta = saved.get("model"), saved.get("meta")
    if is_state_dict(weights) and isinstance(meta, dict) and "stage" in meta:
        return weights, upgrade(meta)
    return read_released_file(path, saved)


def is_state_dict(weights: object) -> bool:
    return isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values())


def load_net(path: Path, device: torch.device, *stages: str, compiled: bool = False) -> tuple[nn.Module, Meta]:
    """A checkpoint's network for inference, unsharded, and its meta; bf16 on a GPU."""
    weights, meta = load_checkpoint(path, *stages)
    with torch.device("meta"):
        net = build(meta["preset"], meta["camera"])
    net.timed_text = meta.get("timed_text", False)  # HYDiT's: some released networks were trained that way
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net.load_state_dict({name: w.to(device, dtype) for name, w in weights.items()}, assign=True)
    for block in net.blocks if compiled else ():
        compile_block(block)
    return net.eval().requires_grad_(False), meta


def load_vae(path: Path, device: torch.device, known_as: str) -> nn.Module:
    """Raises ValueError if it is not the very VAE that made the latents: `known_as`, its fingerprint."""
    weights, meta = load_checkpoint(path, "vae")
    if meta["fingerprint"] != known_as:
        raise ValueError(f"{path}: not the VAE that made the latents, expected fingerprint {known_as}, "
                         f"found {meta['fingerprint']}")
    vae = build_vae(meta["preset"])
    vae.cfg = replace(vae.cfg, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    vae.load_state_dict({name: w.float() for name, w in weights.items()})
    return vae.to(device).eval().requires_grad_(False)


Nets = dict[str, nn.Module]
Optimizers = dict[str, torch.optim.Optimizer]


def _training_state(nets: Nets, optimizers: Optimizers) -> dict[str, Any]:
    state: dict[str, Any] = {name: get_model_state_dict(net) for name, net in nets.items()}
    for name, optimizer in optimizers.items():
        state[f"{name}.optimizer"] = get_optimizer_state_dict(nets[name], optimizer)
    return state


def _reason(error: CheckpointException) -> str:
    """One line of an exception that carries every rank's traceback."""
    return "; ".join(f"rank {rank}: {failure!r}" for rank, (failure, _) in error.failures.items()).replace("\n", " ")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}")
    return found


LOCK: Any = None  # the open file that keeps this process's folder


def lock_folder(out: Path) -> Path:
    """The folder of a run, beside `out`: ckpt/ar for ckpt/ar.pt. It is this process's alone until it ends, however that
    may be. Raises ValueError when another run has it."""
    global LOCK
    folder = out.with_suffix("")
    if dist.get_rank() > 0:
        return folder
    import fcntl  # of Unix
    LOCK = None
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(f"{folder}: another run is writing here (process {lock.read().strip()}); wait for it, or "
                         "choose another --out") from None
    except OSError as error:  # of a full disk, which names no file, or of one that cannot lock
        raise ValueError(f"{path}: could not be written ({error})") from error
    LOCK = lock
    return folder


# A resumed run must be the run that was saved. These flags and the weights it started from are what makes it that run;
# all others may change, and are named when they do.
LASTING = ("preset", "no_camera", "seed", "shift", "chunk", "given_prob", "teacher_steps", "sampling_steps")


def describe_run(args: argparse.Namespace, **made_of: Meta | None) -> dict:
    """What a state says of the run it belongs to. made_of: the checkpoints that it started from, by their flag."""
    flags = {name: str(tuple(value) if isinstance(value, list) else value)  # a list if given, a tuple if by default
             for name, value in vars(args).items() if name != "resume"}
    videos = args.batch_size * args.accum * dist.get_world_size() // sequence_rank()[1]
    weights = {name: meta["fingerprint"] for name, meta in made_of.items() if meta}
    return {"flags": flags, "videos per step": videos, "weights": weights}


def compare_runs(path: Path, saved: dict, run: dict) -> None:
    """Raises ValueError when the state at path is of another run; prints what may and does differ."""
    for name, mark in run["weights"].items():
        if saved["weights"].get(name) != mark:
            raise ValueError(f"--resume: {path} was made from other weights than --{name} {run['flags'][name]} holds")
    for name, value in run["flags"].items():
        was, flag = saved["flags"].get(name), f"--{name.replace('_', '-')}"
        if was is not None and was != value and name in LASTING:
            raise ValueError(f"--resume: {path} was made with {flag} {was}, now {value}; that is another run")
        if was != value and dist.get_rank() == 0:
            print(f"--resume: {flag} is {value} from now on, was {was}")
    if saved["videos per step"] != run["videos per step"] and dist.get_rank() == 0:
        print(f"--resume: a step has {run['videos per step']} videos from now on, had {saved['videos per step']}")


def save_state(folder: Path, step: int, nets: Nets, optimizers: Optimizers, run: dict) -> None:
    """Everything --resume needs, still sharded, in folder/state-STEP; older states go when this one is complete."""
    path = folder / f"state-{step:06d}"
    state = _training_state(nets, optimizers) | {"step": torch.tensor(step)}
    try:
        if dist.get_rank() == 0:
            if path.exists():  # of an earlier run: half of it must not pass for this one's
                shutil.rmtree(path)
            path.mkdir(parents=True)
            (path / "run.json").write_text(json.dumps(run))
        dist.barrier()
        dcp.save(state, checkpoint_id=path)
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error}); the state before it is untouched") from None
    except CheckpointException as error:
        raise ValueError(f"{path}: could not be written ({_reason(error)}); the state before it is untouched") from None
    if dist.get_rank() == 0:
        for old in folder.glob("state-*"):
            if old != path:
                shutil.rmtree(old)


def load_state(folder: Path, nets: Nets, optimizers: Optimizers, run: dict) -> int:
    """Restore in place, on any number of ranks, and return the step to continue from."""
    complete = sorted(path for path in folder.glob("state-*") if (path / ".metadata").exists())  # written last
    if not complete:
        raise ValueError(f"--resume: {folder} holds no saved state")
    path = complete[-1]
    state = _training_state(nets, optimizers) | {"step": torch.tensor(0)}
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle has many
        raise ValueError(f"{path}: its .metadata is truncated ({type(error).__name__})") from None
    compare_runs(path, read_json(path / "run.json"), run)
    for name in optimizers:  # what no gradient has reached, HY's last text outputs for one, has no moments to restore
        moments = state[f"{name}.optimizer"]["state"]
        for parameter in [p for p in moments if f"{name}.optimizer.state.{p}.step" not in saved]:
            del moments[parameter]
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(f"{path}: truncated, or a state of another network ({_reason(error)})") from None
    for name, net in nets.items():
        set_model_state_dict(net, state[name])
    for name, optimizer in optimizers.items():
        settings = [{key: z for key, z in group.items() if key != "params"} for group in optimizer.param_groups]
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(nets[name], optimizer, state[f"{name}.optimizer"], options=options)
        for group, asked in zip(optimizer.param_groups, settings, strict=True):
            group.update(asked)  # learning rate, betas ... are this run's, not those of the run that was saved
    return int(state["step"])


# ----------------------------------------------------------------------------------------------------------------------
# 6. VAEs. Pixels [b 3 t H W] in [-1, 1] <-> latents [b f c h w], t = 1 + 4 (f - 1): the first frame stands alone,
# then every four frames share a latent. All convolutions look backwards in time only, so a video can be encoded and
# decoded in pieces. What a layer must remember between pieces is passed in and handed back as `feat_cache`, a dict from
# layer to its last input frames; an empty dict is the start of a video. Whole = one piece: same code, same numbers.

FeatCache = dict[nn.Module, Tensor]


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x). On a CPU, PyTorch leaves what it takes for small, as a stream's chunk, to a loop; oneDNN is faster."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, 1)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding)


class CausalConv3d(nn.Conv3d):
    """Conv3d that sees the past: time is padded on the left only, with remembered frames or, at the start, zeros."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], time_stride: int = 1):
        super().__init__(c_in, c_out, kernel, stride=(time_stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        need = self.kernel_size[0] - 1
        if need == 0:
            return convolve(self, x)
        b, c, _, h, w = x.shape
        past = feat_cache[self] if self in feat_cache else x.new_zeros(b, c, need, h, w)
        x = torch.cat([past, x], dim=2)
        feat_cache[self] = x[:, :, -need:].clone()  # a view would keep the whole piece in memory
        return convolve(self, x)


class ChannelNorm(nn.Module):
    """Unit length over channels, times sqrt(c) and a learned gain: Wan's RMS_norm."""

    def __init__(self, c: int, dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice, around a skip. `residual` is numbered as released (5 was a dropout, 1 and 4 SiLU)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.residual = nn.ModuleDict({
            "0": ChannelNorm(c_in, 3), "2": CausalConv3d(c_in, c_out, (3, 3, 3)),
            "3": ChannelNorm(c_out, 3), "6": CausalConv3d(c_out, c_out, (3, 3, 3)),
        })
        self.shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else None

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        r = self.residual
        skip = x if self.shortcut is None else self.shortcut(x, feat_cache)
        x = r["2"](F.silu(r["0"](x)), feat_cache)
        return skip + r["6"](F.silu(r["3"](x)), feat_cache)


class FrameAttention(nn.Module):
    """Single-head attention within each frame."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = ChannelNorm(c, 2)
        self.to_qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        t, h = x.shape[2:4]
        y = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        q, k, v = rearrange(self.to_qkv(y), "bt (three c) h w -> three bt 1 (h w) c", three=3).contiguous()
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "bt 1 (h w) c -> bt c h w", h=h)
        return x + rearrange(self.proj(y), "(b t) c h w -> b c t h w", t=t)


class Downsample(nn.Module):
    """Halve the grid; with `time`, also the frame rate, the first frame of the video passing through unpaired."""

    def __init__(self, c: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))
        self.time_conv = nn.Conv3d(c, c, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        t = x.shape[2]
        x = rearrange(self.resample(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=t)
        if self.time_conv is None:
            return x
        past = feat_cache.get(self)
        feat_cache[self] = x[:, :, -1:].clone()
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))
        # at the start frame 0 alone, then (0 1 2), (2 3 4), ...
        return x if t == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double the grid and halve the channels; with `time`, also double the frame rate, except for the first frame."""

    def __init__(self, c: int, time: bool):
        super().__init__()
        nearest = nn.Upsample(scale_factor=2, mode="nearest-exact")
        self.resample = nn.Sequential(nearest, nn.Conv2d(c, c // 2, 3, padding=1))
        self.time_conv = CausalConv3d(c, 2 * c, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        if self.time_conv is not None:
            alone = 0 if self in feat_cache else 1  # the video's first frame stays one frame
            first, rest = x[:, :, :alone], x[:, :, alone:]
            feat_cache[self] = x.new_empty(0)  # only a mark: the first frame is over, and is *no* history of the second
            if rest.shape[2]:
                rest = rearrange(self.time_conv(rest, feat_cache), "b (two c) t h w -> b c (t two) h w", two=2)
            x = torch.cat([first, rest], dim=2)
        t = x.shape[2]
        return rearrange(self.resample(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=t)


def residual_stack(widths: list[int], samplers: list[nn.Module], blocks: int) -> tuple[list[nn.Module], int]:
    """`blocks` residual blocks at each width with samplers between the widths -> the layers and their last channels."""
    layers: list[nn.Module] = []
    c = widths[0]
    for width, sampler in zip(widths[1:], [*samplers, None], strict=True):
        for _ in range(blocks):
            layers.append(ResidualBlock(c, width))
            c = width
        if sampler is not None:
            layers.append(sampler)
            c = sampler.resample[1].out_channels
    return layers, c


def middle_blocks(c: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(c, c), FrameAttention(c), ResidualBlock(c, c)])


def output_head(c: int, c_out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(c, 3), "2": CausalConv3d(c, c_out, (3, 3, 3))})


class Encoder3d(nn.Module):
    """Pixels [b 3 t H W] -> moments [b 2c f h w]: down to the small grid, then the middle."""

    def __init__(self, widths: list[int], c_out: int, samplers: list[nn.Module], blocks: int):
        super().__init__()
        layers, c = residual_stack(widths, samplers, blocks)
        self.conv1 = CausalConv3d(3, widths[0], (3, 3, 3))
        self.middle = middle_blocks(widths[-1])
        self.head = output_head(c, c_out)
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        x = self.conv1(x, feat_cache)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, feat_cache)
        return self.head["2"](F.silu(self.head["0"](x)), feat_cache)


class Decoder3d(nn.Module):
    """Raw latents [b c f h w] -> pixels [b 3 t H W]: the middle, then up from the small grid."""

    def __init__(self, c_in: int, widths: list[int], samplers: list[nn.Module], blocks: int):
        super().__init__()
        layers, c = residual_stack(widths, samplers, blocks)
        self.conv1 = CausalConv3d(c_in, widths[0], (3, 3, 3))
        self.middle = middle_blocks(widths[0])
        self.head = output_head(c, 3)
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        x = self.conv1(x, feat_cache)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, feat_cache)
        return self.head["2"](F.silu(self.head["0"](x)), feat_cache)


@dataclass(frozen=True)
class VAEConfig:
    dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    res_blocks: int
    time_down: tuple[bool, ...]  # per downsampling stage of the encoder, also in time?
    mean: tuple[float, ...]  # of the latents, per channel: diffusion sees (z - mean) / std
    std: tuple[float, ...]

    @property
    def stride(self) -> int:
        """Pixels per latent, along height and width."""
        return 2 ** len(self.time_down)


class WanVAE(nn.Module):
    """Wan2.1's VAE with its released parameter names (`Wan2.1_VAE.pth` loads strictly)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        down = [Downsample(width, time) for width, time in zip(widths[1:], cfg.time_down)]
        self.encoder = Encoder3d(widths, 2 * cfg.z_dim, down, cfg.res_blocks)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, (1, 1, 1))
        widths = [widths[-1], *reversed(widths[1:])]
        up = [Upsample(width, time) for width, time in zip(widths[1:], reversed(cfg.time_down))]
        self.decoder = Decoder3d(cfg.z_dim, widths, up, cfg.res_blocks + 1)

    def compress(self, video: Tensor, feat_cache: FeatCache) -> Tensor:
        """video [b 3 t H W] -> raw latents [b c f h w]: their mean, without the log-variance that comes with it."""
        return self.conv1(self.encoder(video, feat_cache), feat_cache).chunk(2, dim=1)[0]

    def reconstruct(self, z: Tensor, feat_cache: FeatCache) -> Tensor:
        """Raw latents [b c f h w] -> video [b 3 t H W]: what `compress` started from."""
        return self.decoder(self.conv2(z, feat_cache), feat_cache)

    def encode(self, video: Tensor, feat_cache: FeatCache | None = None) -> tuple[Tensor, FeatCache]:
        """video [b 3 t H W] in [-1, 1] -> latents [b f c h w], feat_cache for the next piece.

        t is 1 + 4k at the start of a video and 4k after it. Raises ValueError otherwise: frames that fill no latent
        would be dropped silently.
        """
        feat_cache, t = dict(feat_cache or {}), video.shape[2]
        if t % 4 != (0 if feat_cache else 1):
            raise ValueError(f"a piece of {t} frames: expected {'4k' if feat_cache else '4k + 1'} frames")
        z = self.compress(video, feat_cache)
        mean, std = (z.new_tensor(s).view(-1, 1, 1, 1) for s in (self.cfg.mean, self.cfg.std))
        return rearrange((z - mean) / std, "b c f h w -> b f c h w"), feat_cache

    def decode(self, latents: Tensor, feat_cache: FeatCache | None = None) -> tuple[Tensor, FeatCache]:
        """latents [b f c h w] -> video [b 3 t H W], feat_cache for the next piece. Not clamped."""
        feat_cache = dict(feat_cache or {})
        mean, std = (latents.new_tensor(s).view(-1, 1, 1, 1) for s in (self.cfg.mean, self.cfg.std))
        z = rearrange(latents, "b f c h w -> b c f h w") * std + mean
        # four at a time: the same video, in the memory of a chunk
        pieces = [self.reconstruct(piece, feat_cache) for piece in z.split(4, dim=2)]
        return torch.cat(pieces, dim=2), feat_cache


# The toy world's VAE is the best linear map of patches, by principal components: found in a second. Convolutions beside
# it add 0.05 dB in two minutes (examples/LOG.md).


class LinearPatches(nn.Module):
    """A square of pixels of one frame, or of four <-> z_dim numbers, linearly."""

    def __init__(self, z_dim: int, stride: int, frames: int):
        super().__init__()
        self.sides = {"t": frames, "p": stride, "q": stride}
        pixels = 3 * frames * stride**2
        shapes = (pixels,), (pixels, z_dim), (z_dim, pixels)
        self.centre, self.down, self.up = (nn.Parameter(torch.zeros(z), requires_grad=False) for z in shapes)

    def patches(self, video: Tensor) -> Tensor:
        """[b 3 t H W] -> [b f h w pixels]"""
        return rearrange(video, "b c (f t) (h p) (w q) -> b f h w (c t p q)", **self.sides)

    @torch.no_grad()
    def fit(self, video: Tensor) -> None:
        """Find the map from videos like [b 3 t H W]; the numbers have variance 1."""
        x = self.patches(video).flatten(0, 3)
        variance, direction = (z[..., -self.down.shape[1] :] for z in torch.linalg.eigh(torch.cov(x.mT)))  # ascending
        scale = variance.clamp_min(1e-4).sqrt()  # below a byte's step there is nothing to be scaled up
        for part, found in (self.centre, x.mean(0)), (self.down, direction / scale), (self.up, (direction * scale).mT):
            part.copy_(found)

    def encode(self, video: Tensor) -> Tensor:
        """[b 3 t H W] -> [b c f h w]"""
        return rearrange((self.patches(video) - self.centre) @ self.down, "b f h w c -> b c f h w")

    def decode(self, z: Tensor) -> Tensor:
        """[b c f h w] -> [b 3 t H W]"""
        x = rearrange(z, "b c f h w -> b f h w c") @ self.up + self.centre
        return rearrange(x, "b f h w (c t p q) -> b c (f t) (h p) (w q)", **self.sides)


@dataclass(frozen=True)
class ToyVAEConfig:
    z_dim: int
    stride: int  # pixels per latent, along height and width
    mean: tuple[float, ...]  # of the latents, per channel: as VAEConfig's
    std: tuple[float, ...]


class ToyVAE(nn.Module):
    """Linear patches in the place of WanVAE: same pixels, same pieces."""

    def __init__(self, cfg: ToyVAEConfig):
        super().__init__()
        self.cfg = cfg
        self.first, self.later = (LinearPatches(cfg.z_dim, cfg.stride, frames) for frames in (1, 4))

    def fit(self, video: Tensor) -> None:
        """Find both maps from videos like [b 3 t H W]."""
        self.first.fit(video)
        self.later.fit(video[:, :, 1:])

    def alone(self, feat_cache: FeatCache) -> int:
        """How many frames of this piece have a latent each: 1 at the start of a video, else 0. Marks that it has begun.
        """
        begun = self in feat_cache
        feat_cache[self] = self.first.centre.new_empty(0)  # nothing: no map looks back
        return 0 if begun else 1

    def compress(self, video: Tensor, feat_cache: FeatCache) -> Tensor:
        """video [b 3 t H W] -> raw latents [b c f h w]."""
        n = self.alone(feat_cache)
        return torch.cat([self.first.encode(video[:, :, :n]), self.later.encode(video[:, :, n:])], dim=2)

    def reconstruct(self, z: Tensor, feat_cache: FeatCache) -> Tensor:
        """Raw latents [b c f h w] -> video [b 3 t H W]: what `compress` started from."""
        n = self.alone(feat_cache)
        return torch.cat([self.first.decode(z[:, :, :n]), self.later.decode(z[:, :, n:])], dim=2)

    encode, decode = WanVAE.encode, WanVAE.decode


# ----------------------------------------------------------------------------------------------------------------------
# 7. Presets.

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
WAN_VAE = VAEConfig(96, 16, (1, 2, 4, 4), 2, (False, True, True), WAN_MEAN, WAN_STD)
TOY_VAE = ToyVAEConfig(16, 8, (0.0,) * 16, (1.0,) * 16)


class Preset(NamedTuple):
    """A backbone at one size: its network and its VAE, each a class and what the class is built from."""
    net: type[nn.Module]
    dit: Any  # DiTConfig for WanDiT, HYConfig for HYDiT
    vae_net: type[nn.Module]
    vae: Any  # VAEConfig for WanVAE, HYVAEConfig for HYVAE, ToyVAEConfig for ToyVAE


PRESETS = {
    # the toy world's videos are latents [8 16 8 8]: 8 frames of 16 channels, 8 x 8, so 16 tokens a frame
    "tiny": Preset(WanDiT, DiTConfig(192, 768, 4, 4, channels=16, text_dim=96, freq_dim=128), ToyVAE, TOY_VAE),
    "wan-1.3b": Preset(WanDiT, DiTConfig(1536, 8960, 12, 30, channels=16, text_dim=4096, recompute=True),
                       WanVAE, WAN_VAE),
    "wan-14b": Preset(WanDiT, DiTConfig(5120, 13824, 40, 40, channels=16, text_dim=4096, recompute=True),
                      WanVAE, WAN_VAE),
}


def build(preset: str, camera: bool = True) -> nn.Module:
    """A preset's network, weights not yet set; under torch.device("meta") it takes no memory."""
    return PRESETS[preset].net(PRESETS[preset].dit, camera)


def read_the_same(preset: str, other: str) -> bool:
    """Do the networks of two presets, whatever their size, read the same latents and prompts?"""
    kinds = [(p.net, p.vae_net, p.vae, p.dit.channels, p.dit.text_dim) for p in (PRESETS[preset], PRESETS[other])]
    return kinds[0] == kinds[1]


def build_vae(preset: str) -> nn.Module:
    """A preset's VAE, weights not yet set."""
    return PRESETS[preset].vae_net(PRESETS[preset].vae)


# ======================================================================================================================
# The course ends here. Nothing above refers to what follows, but for one call each way of reading a released checkpoint
# (load_checkpoint, read_file), and for the entries that the second backbone adds to PRESETS and UniPC to SAMPLERS.


# ----------------------------------------------------------------------------------------------------------------------
# 8. HY DiT, with HunyuanVideo-1.5's structure and parameter names, and HY-WorldPlay's names for camera and actions.
# Video and text are two streams of tokens, each with weights of its own, that meet in one attention (MMDiT,
# arXiv:2403.03206). The text is a stream like any other, of one "frame" of l tokens: [b 1 l d].
#
# In a bidirectional pass the text attends to the video, too. In a stream and under teacher forcing it must not: it sees
# only itself, at noise level zero, and so depends on the prompt alone. Its keys and values are computed once, by
# `prefill`, and stay in the KV cache.


class HYPrompt(NamedTuple):
    """What HY's encoders make of a prompt and of an image to go on from. Every leaf is batch-first, so that prompts are
    stacked, joined and chosen leaf by leaf (tree_map).

    The masks, False on padding, stay on the CPU: they decide how many tokens there are, and a GPU that is asked for
    that must first finish all that it was given to do.
    """
    text: Tensor  # [b l text_dim] of the language model (Qwen2.5-VL)
    text_mask: Tensor  # [b l]
    byt5: Tensor  # [b l byt5[0]] of the glyph encoder: the words that the video is to show in quotes
    byt5_mask: Tensor  # [b l]
    vision: Tensor  # [b l vision_dim], the image as SigLIP sees it
    vision_mask: Tensor  # [b l]; where there is no image, its tokens are padding
    given_latents: Tensor  # [b p c+1 h w], what is given of the first p latent frames, and a channel of ones


@dataclass(frozen=True)
class HYConfig:
    dim: int
    mlp_dim: int
    heads: int
    layers: int
    channels: int  # of the latents
    text_dim: int
    vision_dim: int
    byt5: tuple[int, int, int]  # widths on the way to dim
    rope_bands: tuple[int, int, int]  # channels of a head that turn with frame, row, column
    action: bool  # with the camera also its discrete labels
    refiner_layers: int = 2
    patch: int = 1
    recompute: bool = False  # see DiTConfig


# The class of a motion: rows backward, none, forward; columns left, none, right.
# The class of a turn: rows left, none, right; columns down, none, up.
ACTIONS = torch.tensor([[8, 2, 7], [4, 0, 3], [6, 1, 5]])


def action_labels(viewmats: Tensor, last_pose: Tensor | None = None) -> Tensor:
    """HY-WorldPlay's label of the step that leads to each frame: viewmats [... f 4 4] -> [... f] int64.

    last_pose [... 4 4]: the viewmat of the frame before; without it the first label is 0, no step.
    A label is 9 * motion + turn, both classes of ACTIONS. Motion of less than 0.01 units or along y counts as none, and
    so does a turn of less than 0.05 degrees. Only poses count: minWM's table of keys exchanges left and right, its
    training data and WorldPlay do not.
    """
    def side(amount: Tensor, least: float) -> Tensor:
        """0 below -least, 1 between, 2 above least: a row or column of ACTIONS."""
        return (amount > least).long() - (amount < -least).long() + 1

    classes = ACTIONS.to(viewmats.device)
    before = viewmats[..., :1, :, :] if last_pose is None else last_pose[..., None, :, :]
    w2c = torch.cat([before, viewmats], dim=-3).double()
    step = w2c[..., :-1, :, :] @ invert_se3(w2c[..., 1:, :, :])  # each camera in the axes of the one before
    R, move = step[..., :3, :3], step[..., :3, 3]
    distance = move.norm(dim=-1, keepdim=True)
    cosines = torch.where(distance > 0.01, move / distance.clamp_min(1e-12), 0)
    motion = classes[side(cosines[..., 2], 0.5), side(cosines[..., 0], 0.5)]  # 0.5: within 60 degrees of an axis
    yaw = -torch.asin(R[..., 2, 0].clamp(-1, 1)).rad2deg()
    pitch = torch.atan2(R[..., 2, 1], R[..., 2, 2]).rad2deg()
    labels = 9 * motion + classes[side(yaw, 0.05), side(pitch, 0.05)]
    if last_pose is None:
        labels[..., :1] = 0  # also where the first pose is not quite rigid
    return labels


class NumberEmbedding(nn.Module):
    """A number -> sinusoid -> [d]: noise levels, counted from 0 to 1000, and action labels, counted from 0 to 80."""

    def __init__(self, d: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, number: Tensor) -> Tensor:
        return self.mlp(sinusoid(number.float(), 256).to(self.mlp[0].weight.dtype))


class MLP(nn.Module):
    def __init__(self, d: int, hidden: int, act: nn.Module):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(d, hidden), act, nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class RefinerBlock(nn.Module):
    """A transformer block over the text alone. adaLN gates its two branches, but neither shifts nor scales them."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=1e-6) for _ in range(2))
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = MLP(d, 4 * d, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x: Tensor, e: Tensor, mask: Tensor) -> Tensor:
        """x [b l d], e [b d], mask [b l] -> x."""
        gate_attn, gate_mlp = rearrange(self.adaLN_modulation(e), "b (two d) -> two b 1 d", two=2)
        qkv = self.self_attn_qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b l (three nh hd) -> three b nh l hd", three=3, nh=self.heads)
        y = rearrange(sdpa(q, [(k, v)], mask), "b nh l hd -> b l (nh hd)")
        x = x + gate_attn * self.self_attn_proj(y)
        return x + gate_mlp * self.mlp(self.norm2(x))


class TokenRefiner(nn.Module):
    """The language model saw each word after those before it; here every word sees the whole prompt."""

    def __init__(self, cfg: HYConfig):
        super().__init__()
        d = cfg.dim
        self.input_embedder = nn.Linear(cfg.text_dim, d)
        self.t_embedder = NumberEmbedding(d)
        self.c_embedder = nn.ModuleDict({"linear_1": nn.Linear(cfg.text_dim, d), "linear_2": nn.Linear(d, d)})
        blocks = [RefinerBlock(d, cfg.heads) for _ in range(cfg.refiner_layers)]
        self.individual_token_refiner = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})

    def forward(self, text: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
        """text [b l text_dim], mask [b l], sigma [b] -> [b l d]; rows of padding hold anything."""
        # gates from the noise level and the mean of the words; summed in fp32, since in bf16 a sum over a thousand
        # tokens stops growing
        count = rearrange(mask.sum(1), "b -> b 1").clamp(min=1)
        mean = ((text.float() * mask[..., None]).sum(1) / count).to(text.dtype)  # [b text_dim]
        e = self.t_embedder(1000 * sigma)
        e = e + self.c_embedder["linear_2"](F.silu(self.c_embedder["linear_1"](mean)))  # [b d]
        # of an empty prompt keep one key, or softmax over an empty set is NaN
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        x = self.input_embedder(text)
        for block in self.individual_token_refiner["blocks"]:
            x = block(x, e, mask)
        return x


class GlyphMapper(nn.Module):
    """byT5's tokens [b l widths[0]] -> [b l d]."""

    def __init__(self, widths: tuple[int, int, int], d: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(widths[0])
        self.fc1, self.fc2 = nn.Linear(widths[0], widths[1]), nn.Linear(widths[1], widths[2])
        self.fc3 = nn.Linear(widths[2], d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(x))))))


class VisionProjection(nn.Module):
    """SigLIP's tokens [b l c] -> [b l d]."""

    def __init__(self, c: int, d: int):
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU(), nn.Linear(c, d), nn.LayerNorm(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [b f s d] normalised, then moved and stretched by shift, scale [b f 1 d]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DoubleBlock(nn.ModuleDict):
    """The same layers twice over, for the streams "img" (the video) and "txt", by their released names."""
    prope_cache = slice(2, None)  # where in a cached piece k, v, PRoPE's k, v PRoPE's queries read: use_released_cache

    def __init__(self, cfg: HYConfig, camera: bool):
        super().__init__()
        self.cfg = cfg
        d, head_dim = cfg.dim, cfg.dim // cfg.heads
        for stream in ("img", "txt"):
            self[f"{stream}_mod"] = nn.ModuleDict({"linear": nn.Linear(d, 6 * d)})
            for layer in ("q", "k", "v", "proj"):
                self[f"{stream}_attn_{layer}"] = nn.Linear(d, d)
            self[f"{stream}_attn_q_norm"] = RMSNorm(head_dim)
            self[f"{stream}_attn_k_norm"] = RMSNorm(head_dim)
            self[f"{stream}_mlp"] = MLP(d, cfg.mlp_dim, nn.GELU("tanh"))
        if camera:
            self["img_attn_prope_proj"] = nn.Linear(d, d)

    def modulation(self, stream: str, e: Tensor) -> Tensor:
        """e [b f d] -> (shift, scale, gate) of attention and of MLP, [2 3 b f 1 d]: tokens of a frame share them."""
        m = self[f"{stream}_mod"]["linear"](F.silu(e))
        return rearrange(m, "b f (two three d) -> two three b f 1 d", two=2, three=3)

    def qkv(self, stream: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b f s d] -> q, k, v [b f s d]; q and k with every head at its own unit scale."""
        q, k, v = (self[f"{stream}_attn_{name}"](x) for name in ("q", "k", "v"))
        q, k = (rearrange(z, "b f s (nh hd) -> b f s nh hd", nh=self.cfg.heads) for z in (q, k))
        q, k = self[f"{stream}_attn_q_norm"](q), self[f"{stream}_attn_k_norm"](k)
        return q.flatten(3), k.flatten(3), v

    def mlp(self, stream: str, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gate * self[f"{stream}_mlp"](modulated_norm(x, shift, scale))

    def forward(self, x: Tensor, e: Tensor, text: Tensor | None, e_text: Tensor | None,
                text_kv: tuple[Tensor, Tensor] | None, mask: Tensor | None, rope: Tensor,
                projection: tuple[Tensor, Tensor] | None, segments: Segments | None, cached: list[tuple[Tensor, ...]],
                text_sees_video: bool, update_cache: bool):
        """One layer of both streams: x [b f s d], text [b 1 l d] with their time embeddings e [b f d], e_text [b 1 d].

        text_kv: the text's keys and values [b nh l hd] from the cache; its stream then does not run, and text is None.
        mask: [b l], False on the text's padding; None if nothing is padding.
        projection, segments, cached: as in Wan's Block.
        Returns x, text, and of both streams the keys and values if they are to be cached.
        """
        heads = self.cfg.heads
        text_q = None
        if text_kv is None:
            text_attn, text_mlp = self.modulation("txt", e_text)
            shift, scale, text_gate = text_attn
            qkv = self.qkv("txt", modulated_norm(text, shift, scale))  # no rope: the text has no place in the video
            qkv = [rearrange(z, "b 1 l (nh hd) -> b nh l hd", nh=heads) for z in qkv]
            text_q, text_k, text_v = (my_part(z, dim=1) for z in qkv)  # every rank has the whole text: some heads of it
            text_kv = (text_k, text_v)

        # the video sees the text, the cached past and itself; with a camera twice over, as in Wan's SelfAttention
        attn, mlp = self.modulation("img", e)
        shift, scale, gate = attn
        q, k, v = self.qkv("img", modulated_norm(x, shift, scale))  # [b f s d]
        q_rope, k_rope = apply_rope(q, rope, heads), apply_rope(k, rope, heads)
        context = [text_kv] + [piece[:2] for piece in cached]
        y, kv = segment_attention(q_rope, k_rope, v, heads, segments, context, mask)
        seen_by_text = [text_kv, kv] if text_sees_video else [text_kv]  # of the video, RoPE's keys
        y = self["img_attn_proj"](y)
        if projection is not None:
            P, P_inv = projection
            q, k, v = apply_projection(q, P.mT), apply_projection(k, P_inv), apply_projection(v, P_inv)
            # the text has no camera: its keys and values are read as they are
            context = [text_kv] + [piece[self.prope_cache] for piece in cached]
            z, kv_prope = segment_attention(q, k, v, heads, segments, context, mask)
            y = y + self["img_attn_prope_proj"](apply_projection(z, P))
            kv = kv + kv_prope
        x = self.mlp("img", x + gate * y, *mlp)

        if text_q is not None:
            # an empty prompt sees its own padding, or softmax over an empty set is NaN; nobody reads what comes of it
            if mask is not None:
                mask = mask | ~mask.any(1, keepdim=True)
            y = whole(sdpa(text_q, seen_by_text, mask), "n b nh l hd -> b (n nh) l hd")
            y = rearrange(y, "b nh l hd -> b 1 l (nh hd)")
            text = self.mlp("txt", text + text_gate * self["txt_attn_proj"](y), *text_mlp)
        return x, text, kv if update_cache else None, text_kv if update_cache else None


class FinalLayer(nn.Module):
    def __init__(self, d: int, c_out: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.linear = nn.Linear(d, c_out)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [b f s d], time embedding e [b f d] -> [b f s c_out]."""
        shift, scale = rearrange(self.adaLN_modulation(e), "b f (two d) -> two b f 1 d", two=2)
        return self.linear(modulated_norm(x, shift, scale))


class HYDiT(nn.Module):
    """HunyuanVideo-1.5's transformer; with `camera`, plus HY-WorldPlay's PRoPE and, if cfg has them, action labels."""
    rope_theta = 256.0
    text_column = "text"  # which column of a table of prompts (data.py) its text_dim is the width of
    # Does the text stand at the video's noise level in a bidirectional pass? HunyuanVideo-1.5 was trained so; load_net
    # sets it. Ours, as minWM's, hold the text at zero there, too, as all must where it is cached.
    timed_text = False

    def __init__(self, cfg: HYConfig, camera: bool = True):
        super().__init__()
        self.cfg = cfg
        d, p = cfg.dim, cfg.patch
        # a frame is its noisy latents, its given latents, and a channel that is one where it is given
        self.img_in = nn.ModuleDict({"proj": nn.Conv3d(2 * cfg.channels + 1, d, (1, p, p), stride=(1, p, p))})
        self.time_in = NumberEmbedding(d)
        self.txt_in = TokenRefiner(cfg)
        self.byt5_in = GlyphMapper(cfg.byt5, d)
        self.vision_in = VisionProjection(cfg.vision_dim, d)
        self.cond_type_embedding = nn.Embedding(3, d)  # tells text, glyphs and image apart
        self.action_in = NumberEmbedding(d) if camera and cfg.action else None
        self.double_blocks = nn.ModuleList([DoubleBlock(cfg, camera) for _ in range(cfg.layers)])
        self.final_layer = FinalLayer(d, p * p * cfg.channels)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.double_blocks

    @torch.no_grad()
    def init_weights(self) -> None:
        """Training from scratch: every residual branch is closed, and the network starts by predicting nothing."""
        closed = ("_mod.linear", "adaLN_modulation", "prope_proj", "final_layer.linear", "action_in.mlp.2")
        for name, p in self.named_parameters():
            if name.endswith("bias") or any(part in name for part in closed):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            elif name.startswith("cond_type_embedding"):
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p.flatten(1))

    def embed_prompt(self, prompt: HYPrompt, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompt as one sequence [b 1 l d], image, glyphs and text, and its mask [b l], None if nothing is padding.

        Attention knows no order among these tokens. Those that are padding for the whole batch are dropped.
        """
        dtype, device = self.time_in.mlp[0].weight.dtype, sigma.device
        vision, byt5, text = prompt.vision.to(dtype), prompt.byt5.to(dtype), prompt.text.to(dtype)
        kind = self.cond_type_embedding.weight
        tokens = [self.vision_in(vision) + kind[2], self.byt5_in(byt5) + kind[1],
                  self.txt_in(text, prompt.text_mask.bool().to(device), sigma) + kind[0]]  # each [b l d]
        mask = torch.cat([prompt.vision_mask, prompt.byt5_mask, prompt.text_mask], dim=1).bool()  # on the CPU
        used = mask.any(0).nonzero().flatten()  # as numbers: a GPU would have to count the True first
        mask = mask[:, used]
        return torch.cat(tokens, dim=1)[:, None, used.to(device)], None if mask.all() else mask.to(device)

    def forward(self, x_t: Tensor, sigma: Tensor, prompt: HYPrompt, camera: Camera | None = None, *,
                clean: Tensor | None = None, chunk: int = 0, kv_cache: KVCache | None = None,
                update_cache: bool = False) -> Tensor | KVCache:
        """x_t [b f c h w], sigma [b f], prompt -> v [b f c h w], fp32. The keywords are WanDiT's.

        Unlike Wan's, a stream must start with `prefill`: a pass with neither `clean` nor a kv_cache is bidirectional,
        and in it the text sees the video.
        """
        b, f, _, h, w = x_t.shape
        check_shapes(x_t, sigma, camera)
        p = self.cfg.patch
        past = KVCache(0, []) if kv_cache is None else kv_cache
        frames = past.position + torch.arange(f, device=x_t.device)
        rope = rope_table(frames, h // p, w // p, self.cfg.rope_bands, self.rope_theta)
        last_pose, action = past.last_pose, None
        if self.action_in is not None and camera is not None:
            action = action_labels(camera.viewmats, last_pose)  # [b f]
            if f > 0:
                last_pose = camera.viewmats[:, -1]
        if camera is not None and past.origin is not None:
            camera = camera.seen_from(past.origin)
        projection = None if camera is None else tuple(four_copies(P, self.cfg.dim) for P in projections(camera))

        # beside each noisy frame its given one, [b f c+1 h w], zeros where nothing is given
        given = prompt.given_latents[:, past.frames : past.frames + f]
        given = F.pad(given, (0, 0, 0, 0, 0, 0, 0, f - given.shape[1]))
        x_t = torch.cat([x_t, given], dim=2)
        text_sees_video = clean is None and kv_cache is None and not update_cache
        text_sigma = sigma.amax(1) if self.timed_text and text_sees_video else sigma.new_zeros(b)
        segments = None
        if clean is not None:  # [clean | noisy] along the frames; both stand at the same places and times
            before = slice(0, (f - 1) // chunk * chunk)  # nothing comes after the last clean chunk to see it
            x_t = torch.cat([torch.cat([clean, given], dim=2)[:, before], x_t], dim=1)
            sigma = torch.cat([torch.zeros_like(sigma[:, before]), sigma], dim=1)
            rope = torch.cat([rope[: before.stop * len(rope) // f], rope])
            if projection is not None:
                projection = tuple(torch.cat([P[:, before], P], dim=1) for P in projection)
            if action is not None:
                action = torch.cat([action[:, before], action], dim=1)
            segments = teacher_forcing_segments(f, chunk)

        weight = self.img_in["proj"].weight.flatten(1)  # a convolution whose stride is its kernel is a linear map
        x = rearrange(x_t, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p).to(weight.dtype)
        x = F.linear(my_part(x, dim=2), weight, self.img_in["proj"].bias)  # [b f s d]
        e = self.time_in(1000 * sigma)  # [b f d]
        if action is not None:
            e = e + self.action_in(action)
        if past.text is not None:  # its keys and values are all that is needed of the text
            text, e_text = None, None
            text_kvs, mask = past.text
        else:
            text, mask = self.embed_prompt(prompt, text_sigma)
            e_text = self.time_in(1000 * text_sigma)[:, None]  # [b 1 d]
            text_kvs = [None] * len(self.blocks)

        layers, new_text_kvs = [], []
        for i, block in enumerate(self.blocks):
            cached = past.layers[i] if past.layers else []
            x, text, kv, text_kv = block(x, e, text, e_text, text_kvs[i], mask, rope, projection, segments, cached,
                                         text_sees_video, update_cache)
            layers.append(kv)
            new_text_kvs.append(text_kv)
        if update_cache:
            return past._replace(frames=past.frames + f, layers=append_layers(past.layers, layers),
                                 text=(new_text_kvs, mask), last_pose=last_pose)
        v = whole(self.final_layer(x[:, -f:], e[:, -f:]), "n b f s c -> b f (n s) c")  # of the noisy frames alone
        v = rearrange(v, "b f (h w) (c p q) -> b f c (h p) (w q)", h=h // p, p=p, q=p)
        return v.float().contiguous()  # no view: FSDP's hook is on the tensor that is returned


# ----------------------------------------------------------------------------------------------------------------------
# 9. HY VAE, with HunyuanVideo-1.5's parameter names. Same pixels, same pieces and the same `feat_cache` as Wan's. The
# grid is made smaller by moving neighbouring pixels into channels (pixel unshuffle), and a skip without weights leads
# around every such step. The borders are padded with their own pixels, the start of the video with its first frame.


def pixel_unshuffle(x: Tensor, frames: int) -> Tensor:
    """Neighbours, 2 x 2 in a frame and as many `frames`, become channels."""
    return rearrange(x, "b c (t r) (h p) (w q) -> b (r p q c) t h w", r=frames, p=2, q=2)


def pixel_shuffle(x: Tensor, frames: int) -> Tensor:
    return rearrange(x, "b (r p q c) t h w -> b c (t r) (h p) (w q)", r=frames, p=2, q=2)


def group_mean(x: Tensor, c: int) -> Tensor:
    """Neighbouring channels averaged down to c."""
    return reduce(x, "b (c g) t h w -> b c t h w", "mean", c=c)


def repeat_channels(x: Tensor, c: int) -> Tensor:
    """Every channel repeated in place up to c."""
    return repeat(x, "b i t h w -> b (i g) t h w", g=c // x.shape[1])


class EdgeConv3d(nn.Module):
    """A 3 x 3 x 3 convolution that sees the past; what lies outside the video is like what lies at its edge."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3)

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        past = feat_cache[self] if self in feat_cache else repeat(x[:, :, 0], "b c h w -> b c two h w", two=2)
        x = torch.cat([past, x], dim=2)
        feat_cache[self] = x[:, :, -2:].clone()  # a view would keep the whole piece in memory
        return convolve(self.conv, F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))


class HYResidualBlock(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(c, 3), ChannelNorm(c, 3)
        self.conv1, self.conv2 = EdgeConv3d(c, c), EdgeConv3d(c, c)

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), feat_cache)
        return x + self.conv2(F.silu(self.norm2(y)), feat_cache)


class PastAttention(nn.Module):
    """Single-head attention in which a frame sees itself and all before it, so its cache grows with the video.

    recall=False: every frame sees itself only, in constant memory. That is another function, and minWM's latents were
    made with it: its streamed copy of this VAE forgets the keys and values that the released one attends to.
    """

    def __init__(self, c: int, recall: bool):
        super().__init__()
        self.recall = recall
        self.norm = ChannelNorm(c, 3)
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        t, h = x.shape[2:4]
        y = self.norm(x)
        q, k, v = (rearrange(layer(y), "b c t h w -> b 1 t (h w) c") for layer in (self.q, self.k, self.v))
        kv = torch.stack([k, v])  # [2 b 1 t s c]
        if self.recall:
            if self in feat_cache:
                kv = torch.cat([feat_cache[self], kv], dim=3)
            feat_cache[self] = kv
        before = kv.shape[3] - t  # frames in the cache
        frames = []
        for i in range(t):
            first = 0 if self.recall else i
            k, v = kv[:, :, :, first : before + i + 1].flatten(3, 4)  # each [b 1 n c]
            frames.append(F.scaled_dot_product_attention(q[:, :, i], k, v))
        return x + self.proj_out(rearrange(frames, "t b 1 (h w) c -> b c t h w", h=h))


def forget(feat_cache: FeatCache, frames: int) -> FeatCache:
    """A VAE's feat_cache without what is further back than `frames` latent frames. PastAttention alone has such."""
    return {layer: z[:, :, :, -frames:].clone() if isinstance(layer, PastAttention) and z.shape[3] > frames else z
            for layer, z in feat_cache.items()}


class HYDownsample(nn.Module):
    """Halve the grid; with `time`, also the frame rate, the first frame of the video passing through unpaired."""

    def __init__(self, c_in: int, c_out: int, time: bool):
        super().__init__()
        self.c_out, self.time = c_out, time
        self.conv = EdgeConv3d(c_in, c_out // (8 if time else 4))

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        y = self.conv(x, feat_cache)
        if not self.time:
            return pixel_unshuffle(y, 1) + group_mean(pixel_unshuffle(x, 1), self.c_out)
        alone = 0 if self in feat_cache else 1  # the video's first frame stays one frame
        feat_cache[self] = x.new_empty(0)  # only a mark: the first frame is over
        first = pixel_unshuffle(y[:, :, :alone], 1)
        first = torch.cat([first, first], dim=1)  # half the channels of a pair: twice the same
        first = first + group_mean(pixel_unshuffle(x[:, :, :alone], 1), self.c_out)
        pairs = pixel_unshuffle(y[:, :, alone:], 2) + group_mean(pixel_unshuffle(x[:, :, alone:], 2), self.c_out)
        return torch.cat([first, pairs], dim=2)


class HYUpsample(nn.Module):
    """Double the grid; with `time`, also double the frame rate, except for the first frame."""

    def __init__(self, c_in: int, c_out: int, time: bool):
        super().__init__()
        self.c_out, self.time = c_out, time
        self.conv = EdgeConv3d(c_in, c_out * (8 if time else 4))

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        y = self.conv(x, feat_cache)
        if not self.time:
            return pixel_shuffle(y + repeat_channels(x, 4 * self.c_out), 1)
        alone = 0 if self in feat_cache else 1
        feat_cache[self] = x.new_empty(0)
        first = pixel_shuffle(y[:, :, :alone], 1)[:, : self.c_out]  # the other half would be a second frame
        first = first + repeat_channels(pixel_shuffle(x[:, :, :alone], 1), self.c_out)
        pairs = pixel_shuffle(y[:, :, alone:], 2) + repeat_channels(pixel_shuffle(x[:, :, alone:], 2), self.c_out)
        return torch.cat([first, pairs], dim=2)


@dataclass(frozen=True)
class HYVAEConfig:
    widths: tuple[int, ...]  # of the encoder, per grid; the last two halvings are also in time
    z_dim: int  # the last width is a multiple of its double
    res_blocks: int
    mean: tuple[float, ...]  # of the latents, per channel: diffusion sees (z - mean) / std
    std: tuple[float, ...]
    recall: bool = True  # see PastAttention

    @property
    def stride(self) -> int:
        """Pixels per latent, along height and width."""
        return 2 ** (len(self.widths) - 1)


def hy_middle(c: int, recall: bool) -> nn.ModuleDict:
    return nn.ModuleDict({"block_1": HYResidualBlock(c), "attn_1": PastAttention(c, recall),
                          "block_2": HYResidualBlock(c)})


class HYEncoder3d(nn.Module):
    """Pixels [b 3 t H W] -> moments [b 2c f h w]: down to the small grid, then the middle."""

    def __init__(self, widths: tuple[int, ...], c_out: int, blocks: int, recall: bool):
        super().__init__()
        levels = []
        for i, width in enumerate(widths):
            level = nn.ModuleDict({"block": nn.ModuleList([HYResidualBlock(width) for _ in range(blocks)])})
            if i < len(widths) - 1:  # the two steps next to the latents are also in time
                level["downsample"] = HYDownsample(width, widths[i + 1], time=i >= len(widths) - 3)
            levels.append(level)
        self.conv_in = EdgeConv3d(3, widths[0])
        self.down = nn.ModuleList(levels)
        self.mid = hy_middle(widths[-1], recall)
        self.norm_out, self.conv_out = ChannelNorm(widths[-1], 3), EdgeConv3d(widths[-1], c_out)

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        x = self.conv_in(x, feat_cache)
        for level in self.down:
            for block in level["block"]:
                x = block(x, feat_cache)
            if "downsample" in level:
                x = level["downsample"](x, feat_cache)
        for layer in self.mid.values():
            x = layer(x, feat_cache)
        y = self.conv_out(F.silu(self.norm_out(x)), feat_cache)
        return y + group_mean(x, y.shape[1])


class HYDecoder3d(nn.Module):
    """Raw latents [b c f h w] -> pixels [b 3 t H W]: the middle, then up from the small grid."""

    def __init__(self, c_in: int, widths: tuple[int, ...], blocks: int, recall: bool):
        super().__init__()
        levels = []
        for i, width in enumerate(widths):
            level = nn.ModuleDict({"block": nn.ModuleList([HYResidualBlock(width) for _ in range(blocks)])})
            if i < len(widths) - 1:  # the two steps next to the latents are also in time
                level["upsample"] = HYUpsample(width, widths[i + 1], time=i < 2)
            levels.append(level)
        self.conv_in = EdgeConv3d(c_in, widths[0])
        self.up = nn.ModuleList(levels)
        self.mid = hy_middle(widths[0], recall)
        self.norm_out, self.conv_out = ChannelNorm(widths[-1], 3), EdgeConv3d(widths[-1], 3)

    def forward(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        y = self.conv_in(x, feat_cache)
        x = y + repeat_channels(x, y.shape[1])
        for layer in self.mid.values():
            x = layer(x, feat_cache)
        for level in self.up:
            for block in level["block"]:
                x = block(x, feat_cache)
            if "upsample" in level:
                x = level["upsample"](x, feat_cache)
        return self.conv_out(F.silu(self.norm_out(x)), feat_cache)


class HYVAE(nn.Module):
    """HunyuanVideo-1.5's VAE with its released parameter names."""

    def __init__(self, cfg: HYVAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = HYEncoder3d(cfg.widths, 2 * cfg.z_dim, cfg.res_blocks, cfg.recall)
        self.decoder = HYDecoder3d(cfg.z_dim, cfg.widths[::-1], cfg.res_blocks + 1, cfg.recall)

    def compress(self, video: Tensor, feat_cache: FeatCache) -> Tensor:
        """video [b 3 t H W] -> raw latents [b c f h w]."""
        return self.encoder(video, feat_cache).chunk(2, dim=1)[0]

    def reconstruct(self, z: Tensor, feat_cache: FeatCache) -> Tensor:
        """Raw latents [b c f h w] -> video [b 3 t H W]: what `compress` started from."""
        return self.decoder(z, feat_cache)

    encode, decode = WanVAE.encode, WanVAE.decode  # the same scale, the same pieces, the same refusals


HY_VAE = HYVAEConfig((128, 256, 512, 1024, 1024), 32, 2, (0.0,) * 32, (1 / 1.03682,) * 32)
PRESETS["tiny-hy"] = Preset(
    HYDiT, HYConfig(144, 288, 3, 3, channels=16, text_dim=96, vision_dim=16, byt5=(8, 8, 8), rope_bands=(16, 16, 16),
                    action=False, refiner_layers=1, patch=2),
    ToyVAE, TOY_VAE)
PRESETS["hy-8b"] = Preset(
    HYDiT, HYConfig(2048, 8192, 16, 54, channels=32, text_dim=3584, vision_dim=1152, byt5=(1472, 2048, 2048),
                    rope_bands=(16, 56, 56), action=True, recompute=True),
    HYVAE, HY_VAE)


# ----------------------------------------------------------------------------------------------------------------------
# 10. UniPC (arXiv:2302.04867), the multistep sampler that public Wan is used with: Euler's result in fewer steps.
#
# Between two levels the network's x0 is taken for a smooth function of log-SNR. Each step is made twice. `predict`
# extends the line through the last two predictions of x0; the network then sees the result and predicts x0 at the
# step's own end, which the next step needs anyway; with it, `correct` makes the step once more.


@torch.no_grad()
def unipc(net: nn.Module, noise: list[Tensor], sigmas: list[float], prompts: list[Prompt], camera: Camera | None,
          guidance: float, kv_caches: list[KVCache | None], generated: Tensor) -> Tensor:
    """As `euler`. The first and the last step are of first order, all others of second.

    sigmas[0] must be under 1, where log-SNR is -inf: noise_levels(..., start=0.999).
    """
    log_snr = [math.log((1 - s) / s) if s > 0 else math.inf for s in sigmas]
    steps = len(sigmas) - 1
    x0s: list[Tensor] = []  # the network's prediction at each level so far

    def advance(x: Tensor, i: int, x0: Tensor) -> Tensor:
        """From sigmas[i] to sigmas[i + 1], exact if x0 stayed the same on the way."""
        h = log_snr[i + 1] - log_snr[i]
        return sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * math.expm1(-h) * x0

    def slope(i: int) -> tuple[Tensor, float]:
        """How x0 changes over step i by the line through the predictions at i - 1 and i; and where i - 1 lies, in
        steps from i."""
        r = (log_snr[i - 1] - log_snr[i]) / (log_snr[i + 1] - log_snr[i])  # negative
        return (x0s[i - 1] - x0s[i]) / r, r

    def predict(x: Tensor, i: int) -> Tensor:
        """Step i, by the predictions at its start and before it."""
        x0 = x0s[i]
        if 0 < i < steps - 1:
            x0 = x0 + slope(i)[0] / 2
        return advance(x, i, x0)

    def correct(x: Tensor, i: int) -> Tensor:
        """Step i once more, also by the prediction at its end. The last step has none to be corrected by."""
        change = x0s[i + 1] - x0s[i]
        if i == 0:
            return advance(x, i, x0s[i] + change / 2)
        # weights that make the step exact where x0 is of first or second order in log-SNR (eq. 9, B(h) = e^h - 1)
        before, r = slope(i)
        h = log_snr[i + 1] - log_snr[i]
        decay = math.expm1(-h)
        b_1, b_2 = -1 / h - 1 / decay, 2 * (1 / h + 1 / decay) / h - 1 / decay
        w = (b_1 - b_2) / (1 - r)
        return advance(x, i, x0s[i] + (w * before + (b_1 - w) * change))

    x = x_t = noise[0]  # x_t, what the network sees, is the prediction; x, what the steps start from, its correction
    for i in range(steps):
        sigma = sigmas[i] * generated
        v = velocity(net, x_t, sigma, prompts, camera, guidance, kv_caches)
        x0s.append(velocity_to_x0(v, x_t, sigma))
        if i > 0:
            x = correct(x, i - 1)
        x_t = torch.where(generated[..., None, None, None] > 0, predict(x, i), noise[0])  # given frames stay
    return x_t


SAMPLERS["unipc"] = unipc


# ----------------------------------------------------------------------------------------------------------------------
# 11. Released files. They say little about themselves. What follows reads them as they are: public Wan2.1 and
# HunyuanVideo-1.5 (a folder in its own or in diffusers' names, and the VAE), HY-WorldPlay and minWM. What they leave
# unsaid is written out here; a meta.json beside the weights has the last word, {"size": [480, 832]} say.

WAN_STUDENT = {  # Wan2.1's and minWM's settings
    "K": [0.5050505, 0.89786756, 0.5, 0.5], "size": [480, 832], "fps": 16, "frames": 20, "vae_fingerprint": "Wan2.1",
    "given_prob": 0.0, "camera": True, "chunk": 4, "shift": 5.0, "sampler": "few_step", "sampling_steps": 4,
    "guidance": 1.0, "step": 0, "from": None,
}
WAN_TEACHER = WAN_STUDENT | {"sampler": "unipc", "sampling_steps": 50}
RELEASED = {  # stage: its meta
    "base": WAN_TEACHER | {"camera": False, "chunk": 0, "guidance": 5.0},
    "camera": WAN_TEACHER | {"chunk": 0, "guidance": 8.0},
    "ar": WAN_TEACHER | {"guidance": 3.0},
    "ode": WAN_STUDENT, "cd": WAN_STUDENT, "dmd": WAN_STUDENT,
}
# two keys that only these have: timed_text (HYDiT), and released_cache, of files that use_released_cache is meant for
HY_STUDENT = WAN_STUDENT | {"vae_fingerprint": "HunyuanVideo-1.5", "timed_text": False, "released_cache": False}
HY_TEACHER = HY_STUDENT | {"sampler": "euler", "sampling_steps": 50, "guidance": 6.0}
RELEASED_HY = {  # HunyuanVideo-1.5 at 480p (base), and minWM's networks made of it
    # sampled with timed text, as released; trained further without, as by minWM
    "base": HY_TEACHER | {"camera": False, "chunk": 0, "fps": 24, "frames": 31, "timed_text": True},
    "camera": HY_TEACHER | {"chunk": 0},
    "ar": HY_TEACHER,
    # The students were trained for "few_step", though the public scripts take Euler steps. Their latents are those of
    # the released VAE but for PastAttention's recall: close enough to train them further on the released VAE's.
    "ode": HY_STUDENT, "cd": HY_STUDENT, "dmd": HY_STUDENT | {"released_cache": True},
}
# HY-WorldPlay. Its own runtime makes a chunk after at most 20 frames, which it picks and reads anew, renumbered and at
# noise level 0.014; ours after all of them, read once. So its weights are a start to train from, more than to stream.
WORLDPLAY = {"fps": 24, "frames": 32, "released_cache": False}
# Where the files of minWM and HY-WorldPlay lie is all that tells their stage.
MINWM_FOLDERS = {"bidirectional": "camera", "ar_diffusion_tf": "ar", "causal_ode": "ode", "causal_cd": "cd",
                 "dmd": "dmd", "dmd_ourbi": "dmd"}
WORLDPLAY_FOLDERS = {"bidirectional_model": "camera", "ar_model": "ar", "ar_rl_model": "ar",
                     "ar_distilled_action_model": "dmd"}
SIZES = {  # class of network: what its config.json calls our sizes
    "WanModel": {"dim": "dim", "ffn_dim": "ffn_dim", "num_heads": "heads", "num_layers": "layers", "in_dim": "channels",
                 "freq_dim": "freq_dim"},
    "WanTransformer3DModel": {
        "dim": "dim", "ffn_dim": "ffn_dim", "num_attention_heads": "heads", "num_layers": "layers",
        "in_channels": "channels", "text_dim": "text_dim", "freq_dim": "freq_dim"},
    "HunyuanVideo_1_5_DiffusionTransformer": {
        "hidden_size": "dim", "heads_num": "heads", "mm_double_blocks_depth": "layers", "out_channels": "channels",
        "text_states_dim": "text_dim", "vision_states_dim": "vision_dim", "rope_dim_list": "rope_bands"},
    "HunyuanVideo15Transformer3DModel": {
        "dim": "dim", "num_attention_heads": "heads", "num_layers": "layers", "out_channels": "channels",
        "text_embed_dim": "text_dim", "image_embed_dim": "vision_dim", "rope_axes_dim": "rope_bands",
        "num_refiner_layers": "refiner_layers", "patch_size": "patch"},
}
SIZES["ARHunyuanVideo_1_5_DiffusionTransformer"] = SIZES["HunyuanVideo_1_5_DiffusionTransformer"]  # minWM's
VAE_CLASSES = ("AutoencoderKLWan", "AutoencoderKLConv3D", "AutoencoderKLHunyuanVideo15")  # the second is Tencent's


def read_released_folder(path: Path, want_vae: bool) -> tuple[dict[str, Tensor], Meta]:
    """A released folder, or the one around it: its transformer, or with want_vae its VAE. Or one file of safetensors,
    its config.json beside it."""
    if want_vae and (path / "Wan2.1_VAE.pth").exists():
        return read_file(path / "Wan2.1_VAE.pth")
    folder = find_weights(path, "vae" if want_vae else "transformer")
    weights = read_safetensors(path if path.is_file() else folder)
    config_path, config = folder / "config.json", {}
    if config_path.exists() or not (path.is_file() or is_hy(weights)):  # HY-WorldPlay's weights need none, either
        config = read_json(config_path)
    elif not is_hy(weights):
        return read_single_file(path, weights)

    kind = config.get("_class_name")
    if kind in VAE_CLASSES:
        weights = from_diffusers(weights)
        return weights, describe_vae(folder, weights, config)
    if kind not in SIZES and (kind is not None or not is_hy(weights)):
        raise ValueError(f"{config_path}: expected a {', '.join([*SIZES, *VAE_CLASSES])}, found {kind}")
    for key, value in {"eps": 1e-6, "rope_theta": 256}.items():
        if config.get(key, value) != value:
            raise ValueError(f"{config_path}: expected {key} {value}, found {config[key]}")
    if "attention_head_dim" in config:  # diffusers'
        weights = from_diffusers(weights)

    meta_path = find_meta_json(path, folder)
    # a base says what it is; of minWM's and HY-WorldPlay's networks only the name of a folder does
    stage = None if has_prope(weights) or kind is None or kind.startswith("AR") else "base"
    if is_hy(weights) and stage == "base" and not meta_path.exists():
        size = (config.get("ideal_resolution", "480p"), config.get("target_size", 640))
        if "distilled" in folder.name or size != ("480p", 640):
            raise ValueError(f"{folder}: not at 480p, or distilled, so it wants other settings than those we know: "
                             f"expected its size, shift, sampling_steps and guidance in {meta_path}")
    return describe_net(path, meta_path, weights, stage, sizes_of(config))


def read_single_file(path: Path, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Meta]:
    """Wan's network or VAE as one file of safetensors with nothing beside it, as for ComfyUI: shapes say the rest."""
    weights = renamed(weights, ((r"^(model\.)?diffusion_model\.", ""),))
    if any("lora_" in name for name in weights):
        raise ValueError(f"{path}: a LoRA, which is no network: expected the weights that it was merged into")
    if "encoder.conv1.weight" in weights:
        return weights, describe_vae(path, weights, {})
    if "patch_embedding.weight" not in weights:
        raise ValueError(f"{path}: expected Wan's network or VAE, or a config.json beside it that says what it is; it "
                         f"holds {', '.join([*weights][:3]) or 'nothing'}")
    stage = None if any("prope" in name for name in weights) else "base"
    return describe_net(path, find_meta_json(path, path.parent), weights, stage, {})


def read_released_file(path: Path, saved: dict) -> tuple[dict[str, Tensor], Meta]:
    """What torch.load made of minWM's model.pt, HY-WorldPlay's .pt or Wan2.1_VAE.pth."""
    if is_state_dict(saved) and "encoder.conv1.weight" in saved:
        return saved, describe_vae(path, saved, {})
    found = [key for key in ("generator_ema", "generator", "module") if key in saved]  # the average, if there is one
    if found and is_state_dict(saved[found[0]]):
        # FSDP, torch.compile and activation checkpointing have each put their own into the names
        wrappers = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."
        weights = renamed(saved[found[0]], ((wrappers, ""), (r"^model\.", "")))
        return describe_net(path, find_meta_json(path, path.parent), weights, None, {})
    raise ValueError(f"{path}: not a checkpoint of ours, of minWM or Wan's VAE: it holds {[*saved][:3]}")


def find_weights(path: Path, part: str) -> Path:
    """The folder in which the weights of a part, "transformer" or "vae", lie."""
    if path.is_file():
        return path.parent
    folder = path / part if (path / part).is_dir() else path
    # HunyuanVideo-1.5 has one for every size and task
    return folder / "480p_i2v" if (folder / "480p_i2v").is_dir() else folder


def sizes_of(config: dict) -> dict[str, Any]:
    """Of a config.json, in our words."""
    if "attention_head_dim" in config:  # diffusers' does not say the width
        config = config | {"dim": config.get("num_attention_heads", 0) * config["attention_head_dim"]}
    sizes = {}
    for theirs, ours in SIZES.get(config.get("_class_name"), {}).items():
        if theirs in config:
            sizes[ours] = tuple(config[theirs]) if isinstance(config[theirs], list) else config[theirs]
    return sizes


def find_meta_json(path: Path, folder: Path) -> Path:
    """The meta.json in `folder`, beside the weights, or in one between it and the `path` that the user named; or where
    one could be."""
    root = path if path.is_dir() else path.parent
    for place in (folder, *folder.parents):
        if place.is_relative_to(root) and (place / "meta.json").exists():
            return place / "meta.json"
    return folder / "meta.json"


def find_maker_folder(path: Path, folders: dict[str, str]) -> str | None:
    """The innermost folder around the files whose name tells their stage."""
    for place in (path.absolute(), *path.absolute().parents):
        if place.name in folders:
            return place.name
    return None


def describe_net(path: Path, meta_path: Path, weights: dict[str, Tensor], stage: str | None,
                 sizes: dict[str, Any]) -> tuple[dict[str, Tensor], Meta]:
    """Weights, and what a checkpoint of ours would have said of them.

    path: what the user named. stage: None if only the name of a folder tells, as with minWM and HY-WorldPlay.
    sizes: of a config.json in our words, or empty.
    """
    hy = is_hy(weights)
    folders = MINWM_FOLDERS | WORLDPLAY_FOLDERS if hy else MINWM_FOLDERS
    maker_folder = find_maker_folder(path, folders) if stage is None else None
    overrides = upgrade(read_json(meta_path)) if meta_path.exists() else {}
    stage = overrides.pop("stage", folders.get(maker_folder, stage))
    if stage is None and not meta_path.exists():
        raise ValueError(f"{path}: these files do not say their stage, expected one in a folder {', '.join(folders)}, "
                         f"or {{\"stage\": ...}} in {meta_path}")
    released = RELEASED_HY if hy else RELEASED
    if stage not in released or not overrides.keys() <= released[stage].keys():
        raise ValueError(f"{meta_path}: expected a stage of {', '.join(released)} and some of "
                         f"{', '.join(released['dmd'])}, found stage {stage} and {', '.join(overrides) or 'nothing'}")

    meta = released[stage] | {"stage": stage}
    if maker_folder in WORLDPLAY_FOLDERS:
        meta |= WORLDPLAY | {"timed_text": stage == "camera", "sampler": "euler"}
    if hy and not has_prope(weights):  # minWM's TI2V models, which have no camera at any stage
        meta |= {"camera": False, "released_cache": False, "stage": "base" if stage == "camera" else stage}
    preset = find_preset(path, weights, sizes)
    meta |= overrides | {"preset": preset}
    if hy and meta["camera"] and PRESETS[preset].dit.action:
        weights = with_action_labels(path, weights, preset)
    return weights, meta


def find_preset(path: Path, weights: dict[str, Tensor], sizes: dict[str, Any]) -> str:
    """The first preset of these sizes; of width and layers, if no config.json said any."""
    hy = is_hy(weights)
    if not sizes:
        blocks = [name for name in weights if name.endswith((".cross_attn.o.bias", ".img_attn_proj.bias"))]
        width = axis_length(weights, "img_in.proj.bias" if hy else "patch_embedding.bias", 0)
        sizes = {"dim": width, "layers": len(blocks)}
    for name, preset in PRESETS.items():
        differ = [key for key, value in sizes.items() if getattr(preset.dit, key, None) != value]
        if preset.net is (HYDiT if hy else WanDiT) and not differ:
            return name
    raise ValueError(f"{path}: a network with {sizes}, known presets are {', '.join(PRESETS)}")


def with_action_labels(path: Path, weights: dict[str, Tensor], preset: str) -> dict[str, Tensor]:
    """Add the embedding of action labels, at zero output, unless any of it is there."""
    if any(name.startswith("action_in.") for name in weights):
        return weights
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{path} knows no action labels: 4 tensors of them are added, at zero output", file=sys.stderr)
    more, _ = with_camera(weights, preset)
    # not what else may be missing: load_checkpoint is to name that
    return weights | {name: w for name, w in more.items() if name.startswith("action_in.")}


def describe_vae(path: Path, weights: dict[str, Tensor], config: dict) -> Meta:
    """config: of its config.json, or nothing. Released weights are known by name, all others by fingerprint."""
    if "encoder.conv_in.conv.bias" in weights:
        width = axis_length(weights, "encoder.conv_in.conv.bias", 0)
        z_dim = axis_length(weights, "decoder.conv_in.conv.weight", 1)
        known = [name for name, preset in PRESETS.items() if preset.vae_net is HYVAE
                 and (preset.vae.widths[0], preset.vae.z_dim) == (width, z_dim)]
    else:
        width, z_dim = axis_length(weights, "encoder.conv1.bias", 0), axis_length(weights, "conv2.bias", 0)
        known = [name for name, preset in PRESETS.items() if preset.vae_net is WanVAE
                 and (preset.vae.dim, preset.vae.z_dim) == (width, z_dim)]
    if not known:
        raise ValueError(f"{path}: a VAE of width {width} with {z_dim} channels, "
                         f"known presets are {', '.join(PRESETS)}")
    cfg = PRESETS[known[0]].vae
    mean, std = tuple(config.get("latents_mean", cfg.mean)), tuple(config.get("latents_std", cfg.std))
    if config.get("scaling_factor"):  # HunyuanVideo-1.5's: one for all channels
        mean = (config.get("shift_factor") or 0.0,) * z_dim
        std = (1 / config["scaling_factor"],) * z_dim
    meta = {"stage": "vae", "preset": known[0], "mean": list(mean), "std": list(std)}
    scaled = replace(cfg, mean=mean, std=std)
    if scaled == WAN_VAE:
        meta["fingerprint"] = "Wan2.1"
    elif scaled == HY_VAE:
        meta["fingerprint"] = "HunyuanVideo-1.5"
    return meta


def use_released_cache(net: HYDiT, meta: Meta, path: Path) -> None:
    """Reproduce a defect that minWM's DMD networks were distilled with: in a stream, PRoPE's queries read the keys and
    values that the RoPE branch cached. Raises ValueError for any other network."""
    if not meta.get("released_cache"):
        made = f" made from {meta['from']}" if meta.get("from") else ""
        raise ValueError(f"{path}: --released-cache is for minWM's DMD of HunyuanVideo-1.5 with a camera, as released, "
                         f"found stage {meta['stage']} of {meta['preset']}{made}")
    for block in net.blocks:
        block.prope_cache = slice(0, 2)


def is_hy(weights: dict[str, Tensor]) -> bool:
    return any(name.startswith("double_blocks.") for name in weights)


def has_prope(weights: dict[str, Tensor]) -> bool:
    """For HY's: has it a camera branch?"""
    return any(".img_attn_prope_proj." in name for name in weights)


def axis_length(weights: dict[str, Tensor], name: str, axis: int) -> int:
    """0 if there is no such tensor or axis."""
    return weights[name].shape[axis] if name in weights and weights[name].ndim > axis else 0


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A file, or of a folder diffusion_pytorch_model*.safetensors, one file or the shards that an index names. One of
    HY-WorldPlay's folders has model.safetensors instead."""
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors")) or sorted(path.glob("model.safetensors"))
    if path.is_file():
        files = [path]
    elif index.exists():
        names = set(read_json(index).get("weight_map", {}).values())
        files = [path / name for name in sorted(names)]
    if not files:
        raise ValueError(f"{path}: no diffusion_pytorch_model*.safetensors in it")
    weights = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: no such file, but {index.name} names it")
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: truncated, or not safetensors ({error})") from None
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# 12. The bill. What a step of a stage takes, counted where there is no GPU (--plan) and timed where there is one
# (--bench). Each stage lists its passes at its end; here they are made of a batch of noise.
#
# Little is estimated: for --plan they run on the meta device, where tensors have a shape but no numbers, through
# networks of two blocks and of three. What the third block takes, every further one would take. (The first takes less:
# its input is kept anyway.) With --sp n, a GPU holds what it would of a video with an n-th of the tokens.

# FLOP/s of dense matmuls in bf16, and bytes/s of memory: NVIDIA's data sheets, SXM
CARDS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
CARD_SIZES, ROOM = (24, 80, 141), 0.93  # GB, and how much of it tensors can have: CUDA, NCCL and gaps have the rest
NODE = 8  # GPUs of a node
COMPUTE = 2  # bytes of a number in bf16
NVLINK, NETWORK = 450e9, 50e9  # bytes/s that a GPU sends within a node, and to other nodes (400 Gb/s InfiniBand)


class Meter(TorchFunctionMode):
    """What is alive in the blocks of networks, in bytes, and what GPUs would have to send each other.

    A storage counts from when a function returns it or autograd saves it until nothing holds it. What a function makes
    and drops within itself is not seen, nor are gradients on their way through a block: of them, the widest is counted.
    """

    def __init__(self):
        super().__init__()
        self.storages = weakref.WeakKeyDictionary()  # of each that is alive: [kind, bytes]
        self.live = Counter(activations=0, cache=0)
        self.peak, self.widest = self.live.copy(), 0
        self.sent = Counter()
        self.whole = {}  # the networks that gathered() keeps whole: have they been gathered yet?
        self.flops, self.flop = FlopCounterMode(display=False), 0

    def attach(self, net: nn.Module, branches: int, recompute: bool) -> None:
        """branches: attentions of a block, over the same tokens. recompute: as shard() does."""
        for p in net.parameters():
            self.storages[p.untyped_storage()] = ["weights", 0]  # are counted by themselves
        for block in net.blocks:
            block.forward = partial(self.within, block.forward)
            block.register_forward_hook(partial(self.after_block, 4 * branches, recompute))
        if recompute:
            recompute_blocks(net)
        net.register_forward_hook(self.after_net)
        # what gathered() asks of a sharded network
        net.set_reshard_after_forward = partial(self.reshard, net)
        net.set_reshard_after_backward = lambda after_backward: None

    def within(self, forward: Any, *args) -> Any:
        """A block's forward, whose FLOPs are spent again if it is recomputed."""
        before = self.flops.get_total_flops()
        with self:
            y = forward(*args)
        self.sent["again"] += y[0].requires_grad * (self.flops.get_total_flops() - before)
        return y

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:  # as on a GPU: meta's own holds all scores
            y, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*args)
            self.watch(sums)
        else:
            y = func(*args, **(kwargs or {}))
        for z in y if isinstance(y, (tuple, list)) else (y,):
            if isinstance(z, Tensor):
                self.watch(z)
        return y

    def watch(self, z: Tensor) -> Tensor:
        storage = z.untyped_storage()
        if storage not in self.storages:
            self.storages[storage] = entry = ["activations", storage.nbytes()]
            weakref.finalize(storage, self.forget, entry)
            self.live["activations"] += storage.nbytes()
            self.sent["memory"] += 2 * storage.nbytes()  # is written, and read at least once
            if self.live.total() > self.peak.total():
                self.peak = self.live.copy()
            if torch.is_grad_enabled():
                self.widest = max(self.widest, storage.nbytes())
        return z

    def forget(self, entry: list) -> None:
        self.live[entry[0]] -= entry[1]

    def after_block(self, tensors: int, recompute: bool, block: nn.Module, args: tuple, output: tuple) -> None:
        """--sp: q, k, v and y change hands, in forward and in backward, and when forward is done again."""
        times = 1 + output[0].requires_grad * (1 + recompute)
        self.sent["tokens"] += times * tensors * args[0].nbytes

    def after_net(self, net: nn.Module, args: tuple, output: Tensor | KVCache) -> None:
        """FSDP: weights are gathered in bf16 for forward and again for backward, which adds up gradients in fp32."""
        count = sum(p.numel() for p in net.parameters())
        # of a cache, the newest piece tells: older ones may have gradient where this pass has none
        newest = output if isinstance(output, Tensor) else next((z[-1][0] for z in output.layers if z), None)
        backward = newest is not None and newest.requires_grad
        if not self.whole.get(net):
            self.sent["weights"] += 2 * count
        if net in self.whole:
            self.whole[net] = True
        elif backward:
            self.sent["weights"] += 2 * count
        self.sent["gradients"] += 4 * count * backward
        if isinstance(output, KVCache):
            self.keep(output)

    def reshard(self, net: nn.Module, after_forward: bool) -> None:
        if after_forward:
            del self.whole[net]
        else:
            self.whole[net] = False

    def keep(self, kv_cache: KVCache) -> None:
        """What a pass made for the cache is not an activation of that pass."""
        text = kv_cache.text[0] if kv_cache.text else []
        for z in chain.from_iterable([*chain.from_iterable(kv_cache.layers), *text]):
            self.watch(z)  # what a window moved was made outside of the blocks
            entry = self.storages[z.untyped_storage()]
            if entry[0] == "activations":
                entry[0] = "cache"
                self.live.update(activations=-entry[1], cache=entry[1])

    def settle(self) -> Counter:
        """All of this since the last time."""
        cost = self.peak + self.sent + Counter(activations=self.widest)
        cost["flop"] = self.flops.get_total_flops() - self.flop
        self.flop += cost["flop"]
        self.sent, self.peak, self.widest = Counter(), self.live.copy(), 0
        return cost


def usual_meta(preset: str, stage: str) -> Meta:
    """What a checkpoint of the stage says of itself: minWM's settings, or the toy world's."""
    toy = {"size": [64, 64], "frames": 8, "chunk": 1, "shift": 5.0} if preset.startswith("tiny") else {}
    return (RELEASED_HY if PRESETS[preset].net is HYDiT else RELEASED)[stage] | toy


class Work(NamedTuple):
    """What a stage does in a step: what train_x.py tells --plan and --bench."""
    stage: str
    nets: dict[str, bool]  # its networks: are they trained?
    rehearse: Any  # (args, nets, batch, meta) -> passes; where an optimizer would step, yields its network's name
    make_batch: Any  # data.py's random_batch
    repeats: str = ""  # the flag that says how often the last update of a step is made
    linear: str = ""  # a flag, a multiple of --sampling-steps, in which all costs are linear: two small values will do
    of_run: Meta | None = None  # what a run says of its checkpoint, if there is a run

    def meta(self, args: argparse.Namespace) -> Meta:
        """What the stage's checkpoint says, or would say, flags heard."""
        if self.of_run is not None:
            return self.of_run
        flags = {name: value for name, value in vars(args).items() if name in ("chunk", "shift")}
        meta = usual_meta(args.preset, self.stage) | flags
        return meta | ({"chunk": 0, "camera": not args.no_camera} if self.stage == "camera" else {})


Costs = list[tuple[str, Counter]]  # of each update of a step: whose it is, and what it takes, by kind


def count(args: argparse.Namespace, work: Work, size: list[int], layers: int, recompute: bool, flops: bool) -> Costs:
    """A step of one micro-batch of videos of this size, through networks of so many blocks, on one GPU.

    flops: count them, too; not with recompute, as the counter keeps alive what that would drop.
    """
    global SEQUENCE_GROUP
    group, SEQUENCE_GROUP = SEQUENCE_GROUP, None  # what is counted here is nobody's part
    preset, meta, nets, costs = PRESETS[args.preset], work.meta(args) | {"size": size}, {}, []
    meter = Meter()
    times = vars(args).get(work.repeats, 1)
    args = argparse.Namespace(**vars(args) | {work.repeats: 1})
    for name, trained in work.nets.items():
        with torch.device("meta"):
            net = preset.net(replace(preset.dit, layers=layers), meta["camera"]).bfloat16()
        nets[name] = net.train(trained).requires_grad_(trained)
        meter.attach(net, 1 + meta["camera"], recompute and trained)
    batch = work.make_batch(args.preset, meta, args.batch_size, torch.device("meta"))
    with saved_tensors_hooks(meter.watch, lambda z: z), meter.flops if flops else nullcontext():
        for name in chain(work.rehearse(args, nets, batch, meta), [""]):  # "": what no optimizer follows
            cost = meter.settle()
            if name:
                cost["trained"] = sum(p.numel() for p in nets[name].parameters() if p.grad is not None)
                nets[name].zero_grad()
            if name or not costs:
                costs.append((name, cost))
    SEQUENCE_GROUP = group
    return costs[:-1] + costs[-1:] * times


def extrapolate(a: Costs, b: Costs, times: float) -> Costs:
    """a + times (b - a)."""
    return [(name, Counter({kind: x[kind] + times * (y[kind] - x[kind]) for kind in x | y}))
            for (name, x), (_, y) in zip(a, b, strict=True)]


def count_all_blocks(args: argparse.Namespace, work: Work, size: list[int], recompute: bool, flops: bool) -> Costs:
    """As `count`, through whole networks: a straight line through what two blocks take and what three do."""
    if work.linear:
        once, n = args.sampling_steps, vars(args)[work.linear]
        few, more = (argparse.Namespace(**vars(args) | {work.linear: times * once}) for times in (1, 2))
        few, more = (count_all_blocks(fewer, work._replace(linear=""), size, recompute, flops) for fewer in (few, more))
        return extrapolate(few, more, n / once - 1)
    two, three = (count(args, work, size, layers, recompute, flops) for layers in (2, 3))
    return extrapolate(two, three, PRESETS[args.preset].dit.layers - 2)


def plan(args: argparse.Namespace, work: Work, gpus: int) -> dict[str, Any]:
    """What one of so many GPUs holds, and what a step takes of it. Raises ValueError if they cannot share the work."""
    sp, preset, meta = args.sp, PRESETS[args.preset], work.meta(args)
    dit, token = preset.dit, preset.vae.stride * preset.dit.patch  # pixels, along height and width
    tokens = math.prod(meta["size"]) // token**2
    node = min(gpus, int(os.environ.get("LOCAL_WORLD_SIZE", NODE)))
    shards = args.shard_over or usual_shards(gpus, node, sp)
    if gpus % sp or gpus % node or gpus % shards or dit.heads % sp or tokens % sp:
        raise ValueError(f"--plan {gpus} --sp {sp} --shard-over {shards}: expected whole nodes of {node}, whole groups "
                         f"and, of a video, an even share of {dit.heads} heads and {tokens} tokens of a frame")

    costs = count_all_blocks(args, work, meta["size"], False, flops=True)
    if sp > 1:  # the GPUs share all that a video takes which is not of a single token a frame, too
        costs = extrapolate(count_all_blocks(args, work, [token, token], False, flops=True), costs, 1 / sp)
    accum = args.accum if any(name for name, _ in costs) else 1  # pairs are made batch by batch
    flop = accum * sum(cost["flop"] + dit.recompute * cost["again"] for _, cost in costs)
    without = max(cost["activations"] for _, cost in costs)
    if dit.recompute and any(name for name, _ in costs):
        costs = count_all_blocks(args, work, [token, tokens // sp * token], True, flops=False)
    peak = max((cost for _, cost in costs), key=lambda cost: cost["activations"] + cost["cache"])

    with torch.device("meta"):
        net = build(args.preset, meta["camera"])
    total, block = (sum(p.numel() for p in part.parameters()) for part in (net, net.blocks[0]))
    trained = {name: cost["trained"] for name, cost in costs if name}  # what no gradient reaches has no moments either
    kept = max(1, len(trained))  # of --generate the teacher is kept
    held = {
        "weights": 4 * total * kept / shards,  # fp32, as are gradients and moments
        "gradients": 4 * max(trained.values(), default=0) / shards,  # of one network at a time
        "optimizer": 8 * sum(trained.values()) / shards,
        "ema": 4 * total * bool(trained) / shards,
        "other": 4 * total * (len(work.nets) - 1 - kept) / shards,
        # what is outside of blocks and the block at work, with gradients, in bf16; the next one, in bf16, and the
        # gradients of the last one, on their way in fp32
        "gathered": COMPUTE * (total - dit.layers * block) + COMPUTE * (1 + bool(trained)) * block
        + (COMPUTE + 4 * bool(trained)) * block * (dit.layers > 1),
        "activations": peak["activations"], "cache": peak["cache"]}
    if vars(args).get("gather"):
        held["gathered"] += COMPUTE * total

    kinds = ("weights", "gradients", "tokens", "memory")
    moved = {kind: accum * sum(cost[kind] for _, cost in costs) for kind in kinds}
    sharded = moved["weights"] + moved["gradients"]
    # parts of weights and gradients, sums of gradients over the copies of the weights, and parts of videos
    sent = sharded * (1 - 1 / shards) + 2 * moved["gradients"] / shards * (1 - shards / gpus)
    sent += moved["tokens"] * (1 - 1 / sp)
    # of that, to other nodes: what all GPUs of a node need comes into it once, through all of them
    between = sharded * max(0, 1 / node - 1 / shards)
    between += 2 * moved["gradients"] / max(node, shards) * (1 - max(node, shards) / gpus)
    between += moved["tokens"] * max(0, 1 - node / sp)
    seconds = {card: max(flop / rate, moved["memory"] / bandwidth, (sent - between) / NVLINK + between / NETWORK)
               for card, (rate, bandwidth) in CARDS.items()}
    stage = work.stage + " --generate" * vars(args).get("generate", False)
    return {"preset": args.preset, "stage": stage, "gpus": gpus, "sp": sp, "shard_over": shards,
            "batch_size": args.batch_size, "accum": accum,
            "gb": {kind: n / 1e9 for kind, n in (held | {"total": sum(held.values())}).items()},
            "activations_without_checkpointing_gb": without / 1e9,
            "tflop": flop / 1e12, "bytes_between_gpus": sent, "bytes_between_nodes": between,
            "seconds_at_limit": seconds["H100"], "seconds_at_limit_h200": seconds["H200"]}


def print_plan(found: dict[str, Any]) -> None:
    """A table to read, and the same as a line of JSON."""
    gb = found["gb"]
    notes = {
        "weights": "of what is trained, fp32", "gradients": "of one network at a time, fp32",
        "optimizer": "AdamW's two moments", "ema": "averaged weights", "other": "frozen networks",
        "gathered": "whole blocks in bf16, and gradients on their way",
        "activations": f"without checkpointing {found['activations_without_checkpointing_gb']:.4g}",
        "cache": "keys and values of finished chunks", "total": ""}
    print(f"{found['stage']}, {found['preset']}, {found['gpus']} GPUs, --sp {found['sp']}, --batch-size "
          f"{found['batch_size']}, --shard-over {found['shard_over']}: GB that one holds")
    for kind, note in notes.items():
        print(f"  {kind:12}{gb[kind]:9.4g}   {note}")
    print(f"a step: {found['tflop']:.4g} TFLOP a GPU, {found['bytes_between_gpus'] / 1e9:.4g} GB between GPUs; "
          f"at least {found['seconds_at_limit']:.3g} s on an H100, {found['seconds_at_limit_h200']:.3g} s on an H200")
    for card in CARD_SIZES:
        print(f"  a card of {card} GB: {remedy(found, card)}")
    print(json.dumps(found))


def remedy(found: dict[str, Any], card: int) -> str:
    """Does it fit, or which flags would make it fit? The fewest, and of those the smallest."""
    gb, own = found["gb"], {name: found[name] for name in ("gpus", "shard_over", "sp", "batch_size")}
    states = sum(gb[kind] for kind in ("weights", "gradients", "optimizer", "ema", "other")) * own["shard_over"]
    video = (gb["activations"] + gb["cache"]) * own["sp"] / own["batch_size"]  # a whole one
    heads, sizes, fitting = PRESETS[found["preset"]].dit.heads, {1, 2, 4, 8, 16, 32, 64}, []
    told = own["shard_over"] != usual_shards(own["gpus"], min(own["gpus"], NODE), own["sp"])  # by --shard-over
    choices = (sizes | {own["gpus"]}, sizes | {own["shard_over"]}, sizes | {own["sp"]}, {1, own["batch_size"]})
    for gpus, shards, sp, batch_size in product(*choices):
        flags = {"--plan": gpus, "--shard-over": shards, "--sp": sp, "--batch-size": batch_size}
        now = own if told else own | {"shard_over": usual_shards(gpus, min(gpus, NODE), sp)}
        changes = {flag: n for (flag, n), old in zip(flags.items(), now.values()) if n != old}
        held = states / shards + gb["gathered"] + video * batch_size / sp
        if gpus % shards == 0 and gpus % sp == 0 and heads % sp == 0 and held < ROOM * card:
            if gpus >= own["gpus"] and sp >= own["sp"]:
                fitting.append((len(changes), gpus, shards, sp, changes, held))
    if not fitting:
        return "does not fit, whatever the flags"
    *_, changes, held = min(fitting, key=lambda found: found[:4])
    return f"fits with {' '.join(f'{flag} {n}' for flag, n in changes.items())}, {held:.4g} GB" if changes else "fits"


def bench(args: argparse.Namespace, work: Work) -> None:
    """Time --bench steps on weights and videos of noise, after one that is not timed; rank 0 prints a line of JSON."""
    rank, world_size, device = start_process_group(args.sp, args.shard_over)
    planned = plan(args, work, world_size)
    meta, nets, optimizers = work.meta(args), {}, {}
    for name, trained in work.nets.items():
        with torch.device("meta"):
            net = build(args.preset, meta["camera"])
        zeros = {name: torch.zeros(()).expand(w.shape) for name, w in net.state_dict().items()}  # of no size
        nets[name] = shard(net, zeros, device, train=trained, compiled=args.compile)
        fill_with_noise(nets[name])
    batch = work.make_batch(args.preset, meta, args.batch_size, device)
    for step in range(1 + args.bench):
        if step == 1:
            start = clock(device)
        for names in zip(*(work.rehearse(args, nets, batch, meta) for _ in range(planned["accum"])), strict=True):
            net = nets[names[0]]
            optimizer = optimizers.setdefault(names[0], torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True))
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if optimizers:
            update_ema(nets["ema"], nets[next(iter(optimizers))], 0.99)
    seconds = (clock(device) - start) / args.bench
    rate = matmul_rate(device)
    flops = 1e12 * planned["tflop"] / seconds
    if rank == 0:
        print(json.dumps({
            "preset": args.preset, "stage": planned["stage"], "gpus": world_size, "sp": args.sp, "card": card_name(),
            "seconds": seconds, "peak_gb": peak_memory(device) / 1e9, "planned_gb": planned["gb"]["total"],
            "flops": flops, "matmul_flops": rate, "share": flops / rate}))


@torch.no_grad()
def fill_with_noise(net: nn.Module) -> None:
    """Weights that keep the scale of what goes through them, each rank its own shards'."""
    for p in net.parameters():
        own = p.to_local() if isinstance(p, DTensor) else p
        own.normal_(std=p.shape[1:].numel() ** -0.5 if p.ndim > 1 else 0.1)


def clock(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held, of the GPU or, without one, of all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # of Unix
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def card_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matmul: bf16 on a GPU, fp32 on a CPU."""
    cuda = device.type == "cuda"
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    times = []
    for _ in range(20 if cuda else 2):
        start = clock(device)
        a @ a
        times.append(clock(device) - start)
    return 2 * 4096**3 / min(times)


def print_peak(args: argparse.Namespace, work: Work, meta: Meta) -> None:
    """On a GPU: the most memory that it has held so far, beside what --plan would say of videos as the run's."""
    if torch.cuda.is_available():
        planned = plan(args, work._replace(of_run=meta), dist.get_world_size())["gb"]["total"]
        print(f"GPU 0 held at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, planned were {planned:.1f}")


def bill(args: argparse.Namespace, work: Work) -> None:
    """--plan or --bench."""
    if args.bench:
        bench(args, work)
    elif os.environ.get("RANK", "0") == "0":
        print_plan(plan(args, work, args.plan))


# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """python model.py ckpt/ar.pt describes a checkpoint; --half OUT also writes it with its weights rounded to fp16."""
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("checkpoint", type=Path, help="file, or released folder")
    p.add_argument("--half", type=Path, metavar="OUT", help="write a copy in half precision, to ship")
    args = p.parse_args(argv)
    weights, meta = load_checkpoint(args.checkpoint)
    print(json.dumps(meta | {"parameters": sum(w.numel() for w in weights.values())}, indent=2))
    if args.half:
        # views of one tensor: a file has a record for each tensor that is not, half a kilobyte beside the numbers
        flat = torch.cat([w.half().flatten() for w in weights.values()])
        parts = flat.split([w.numel() for w in weights.values()])
        halves = {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}
        save_checkpoint(args.half, halves, meta)


# ----------------------------------------------------------------------------------------------------------------------
# diffusers' names of the released networks' parameters. The networks are the same functions (tests/test_diffusers*.py).


def from_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names of Wan's or HunyuanVideo-1.5's transformer or VAE -> their own. Other names stay as they are."""
    if "encoder.conv_in.conv.weight" in weights:
        return renamed(weights, DIFFUSERS_HY_VAE)
    if "x_embedder.proj.weight" in weights:
        return hy_dit_from_diffusers(weights)
    if "encoder.conv_in.weight" in weights:
        return wan_vae_from_diffusers(weights)
    return renamed(weights, DIFFUSERS_DIT)


def renamed(weights: dict[str, Tensor], table: tuple) -> dict[str, Tensor]:
    """Each name through every (pattern, replacement) of the table in turn. Names that would meet stay as they are."""
    names = {name: name for name in weights}
    for pattern, replacement in table:
        names = {old: re.sub(pattern, replacement, name) for old, name in names.items()}
    count = Counter(names.values())
    return {new if count[new] == 1 else old: weights[old] for old, new in names.items()}


def hy_dit_from_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = renamed(weights, DIFFUSERS_HY_DIT)
    for name in [name for name in weights if ".self_attn_q." in name]:  # the refiner's q, k and v are one tensor
        parts = [name.replace("attn_q.", f"attn_{part}.") for part in "qkv"]
        shapes = {weights[part].shape if part in weights else None for part in parts}
        if len(shapes) == 1:
            joined = torch.cat([weights.pop(part) for part in parts])
            weights[name.replace("attn_q.", "attn_qkv.")] = joined
    for name, w in weights.items():
        if name.startswith("final_layer.adaLN") and w.ndim:  # scale, shift; HunyuanVideo-1.5's own is shift, scale
            weights[name] = torch.cat(w.chunk(2)[::-1])
    return weights


def wan_vae_from_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wan's file counts the decoder's layers through: of each stage the blocks, then the upsampler."""
    stage_0 = [name for name in weights if name.startswith("decoder.up_blocks.0.resnets.")]
    blocks = sum(name.endswith("conv1.bias") for name in stage_0)

    def count_through(match: re.Match) -> str:
        stage, kind, i = int(match[1]), match[2], int(match[3])
        return f".upsamples.{stage * (blocks + 1) + (i if kind == 'resnets' else blocks)}."

    return renamed(weights, ((r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", count_through), *DIFFUSERS_VAE))


DIFFUSERS_DIT = (  # parameter names: diffusers' -> Wan's, one after the other
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."), (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"), (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."), (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."), (r"\.norm2\.", ".norm3."), (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)
DIFFUSERS_VAE = (
    (r"\.(\d+)\.norm1\.", r".\1.residual.0."), (r"\.(\d+)\.conv1\.", r".\1.residual.2."),
    (r"\.(\d+)\.norm2\.", r".\1.residual.3."), (r"\.(\d+)\.conv2\.", r".\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."), (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."), (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.conv_in\.", ".conv1."), (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."),
    (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."), (r"\.down_blocks\.", ".downsamples."),
)
DIFFUSERS_HY_DIT = (  # diffusers' -> HunyuanVideo-1.5's
    (r"\.timestep_embedder\.linear_1\.", ".mlp.0."), (r"\.timestep_embedder\.linear_2\.", ".mlp.2."),
    (r"^time_embed\.", "time_in."), (r"^x_embedder\.", "img_in."), (r"^cond_type_embed\.", "cond_type_embedding."),
    (r"^context_embedder\.time_text_embed\.mlp\.", "txt_in.t_embedder.mlp."),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
    (r"^(txt_in\..*)\.attn\.to_out\.0\.", r"\1.self_attn_proj."),
    (r"^(txt_in\..*)\.attn\.to_([qkv])\.", r"\1.self_attn_\2."), (r"^(txt_in\..*)\.ff\.", r"\1.mlp."),
    (r"^(txt_in\..*)\.norm_out\.linear\.", r"\1.adaLN_modulation.1."),
    (r"^context_embedder_2\.norm\.", "byt5_in.layernorm."), (r"^context_embedder_2\.linear_", "byt5_in.fc"),
    (r"^image_embedder\.norm_in\.", "vision_in.proj.0."), (r"^image_embedder\.linear_1\.", "vision_in.proj.1."),
    (r"^image_embedder\.linear_2\.", "vision_in.proj.3."), (r"^image_embedder\.norm_out\.", "vision_in.proj.4."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."), (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "double_blocks."), (r"\.norm1\.linear\.", ".img_mod.linear."),
    (r"\.norm1_context\.", ".txt_mod."), (r"\.attn\.to_([qkv])\.", r".img_attn_\1."),
    (r"\.attn\.add_([qkv])_proj\.", r".txt_attn_\1."), (r"\.attn\.norm_([qk])\.", r".img_attn_\1_norm."),
    (r"\.attn\.norm_added_([qk])\.", r".txt_attn_\1_norm."), (r"\.attn\.to_out\.0\.", ".img_attn_proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn_proj."), (r"\.ff\.", ".img_mlp."), (r"\.ff_context\.", ".txt_mlp."),
    (r"\.net\.0\.proj\.", ".fc1."), (r"\.net\.2\.", ".fc2."),
)
DIFFUSERS_HY_VAE = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."), (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."), (r"\.to_([qkv])\.", r".\1."), (r"\.resnets\.", ".block."),
    (r"\.(down|up)_blocks\.", r".\1."), (r"\.(down|up)samplers\.0\.", r".\1sample."),
)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # no console stops a run over a letter that it lacks
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
