"""
The networks, what their output means, and how their weights travel.

    1. Flow matching    the four identities every stage and every sampler shares
    2. Cameras          PRoPE: projective matrices as relative position encoding
    3. Wan DiT          the diffusion transformer, bidirectional and causal with the same weights
    4. Wan VAE          causal 3-D convolutions; encode and decode whole or as a stream
    5. Presets          tiny (trained on a laptop), wan-1.3b, wan-14b
    6. Sampling         the three samplers and the chunked rollout
    7. Weights          shard, average, save, load (ours and released ones), resume

One call for every backbone, so that a stage does not know which network it trains:

    v = net(x_t, sigma, prompt, camera)                            every frame sees every frame
    v = net(x_t, sigma, prompt, camera, clean=x0, chunk=2)         teacher forcing: each chunk sees the clean past
    v = net(x_t, sigma, prompt, camera, past=past)                 streaming: each chunk sees cached keys and values
    past = net(x0, zero, prompt, camera, past=past, commit=True)   ... and a finished chunk joins them

    x_t [b f c h w]   sigma [b f] fp32, 1 is pure noise   prompt [b l d]   camera = (viewmats [b f 4 4], Ks [b f 3 3])

Axis letters, here and in every file: b batch, f latent frames, c latent channels, h w latent grid, n tokens, d width,
nh heads, hd head width, l text tokens, t pixel frames.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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


def masked_mse(a: Tensor, b: Tensor, free: Tensor) -> Tensor:
    """Mean square of a - b [b f c h w] over the frames that are to be made: free [b f] is 1 there, 0 on given ones."""
    return ((a - b).square().mean((2, 3, 4)) * free).sum() / free.sum()


def guide(v_cond: Tensor, v_null: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598). 1 is off. Code that writes cond + w (cond - null) means w + 1."""
    return torch.lerp(v_null, v_cond, guidance)  # exact at 0 and 1


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Spend more of [0, 1] at high noise; shift 1 is the identity (SD3, arXiv:2403.03206 eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_levels(steps: int, shift: float, start: float = 1.0) -> list[float]:
    """The levels a sampler visits, from pure noise to clean: steps + 1 numbers from 1.0 to 0.0.

    A grid of 48 contains the grid of 4 at every shift, so a distilled student is asked only at levels its teacher
    integrated through. noise_levels(4, 5) is 1, 0.9375, 0.8333, 0.625, 0. start: the first level, before the shift.
    """
    return shift_sigma(torch.linspace(start, 0, steps + 1, dtype=torch.float64), shift).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# 2. Cameras. PRoPE (arXiv:2507.10496) as the released checkpoints have it: a second attention over the same queries,
# keys and values, taken before RoPE, in which every group of four channels is a homogeneous vector that the frame's
# camera P = K [R t] maps between world and image. Query i meets key j through P_i P_j^-1, the motion between the two
# frames, so the choice of world frame drops out. Its output enters through a linear layer that starts at zero.


def projections(viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
    """viewmats [b f 4 4], Ks [b f 3 3] -> P and P^-1 [b f 4 4] in fp32.

    The principal point is left out (as released). fp32 matters: in bf16 the error of P P^-1 is a tenth of one step.
    """
    viewmats, Ks = viewmats.float(), Ks.float()
    focal = F.pad(torch.stack([Ks[..., 0, 0], Ks[..., 1, 1]], dim=-1), (0, 2), value=1.0)
    R, t = viewmats[..., :3, :3].mT, viewmats[..., :3, 3:]
    inverse = torch.cat([torch.cat([R, -R @ t], dim=-1), viewmats[..., 3:, :]], dim=-2)
    return focal[..., :, None] * viewmats, inverse / focal[..., None, :]


def per_frame(x: Tensor, P: Tensor) -> Tensor:
    """Multiply every group of four channels of x [b f s d] by its frame's matrix P [b f 4 4], in P's precision."""
    y = rearrange(x.to(P.dtype), "b f s (g j) -> b f (s g) j", j=4) @ P.mT
    return rearrange(y, "b f (s g) i -> b f s (g i)", s=x.shape[2]).to(x.dtype)


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
    freq_dim: int = 256


class Past(NamedTuple):
    """Keys and values of the frames committed so far. Never written in place: a commit makes a new one."""
    frames: int  # committed so far; the next chunk's RoPE positions start here
    layers: list[tuple[Tensor, ...]]  # per block: k, v and, with a camera, PRoPE's k, v, each [b nh n hd]


def keep(past: Past, tokens: int, sink: int, window: int) -> Past:
    """The first `sink` and the last `window` frames of a past, of `tokens` tokens each; all of it if it is shorter.

    Every key keeps the RoPE position it was committed with, and the next chunk's go on from past.frames. Before a chunk
    of n frames, keep(past, tokens, s, size - s - n) is public Wan's rolling cache of `size` frames with s sink frames.
    """
    def cut(z: Tensor) -> Tensor:
        n = z.shape[2]
        return z if n <= (sink + window) * tokens else torch.cat([z[:, :, : sink * tokens],
                                                                  z[:, :, n - window * tokens :]], dim=2)
    return past._replace(layers=[tuple(cut(z) for z in layer) for layer in past.layers])


def rope_table(frames: Tensor, h: int, w: int, head_dim: int) -> Tensor:
    """Unit complex numbers [f*h*w 1 hd/2]: channel pairs turn with frame, row and column, in three bands of a head."""
    third = 2 * (head_dim // 6)
    rows, columns = (torch.arange(n, device=frames.device).double() for n in (h, w))
    bands = (frames.double(), head_dim - 2 * third), (rows, third), (columns, third)
    t, y, x = (torch.outer(position, 10000 ** -(torch.arange(0, width, 2, device=frames.device).double() / width))
               for position, width in bands)
    grid = [repeat(t, "f e -> f h w e", h=h, w=w), repeat(y, "h e -> f h w e", f=len(t), w=w),
            repeat(x, "w e -> f h w e", f=len(t), h=h)]
    angle = rearrange(torch.cat(grid, dim=-1), "f h w e -> (f h w) 1 e")
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, rope: Tensor, heads: int) -> Tensor:
    """Apply rope [f*s 1 hd/2] to x [b f s d], two neighbouring channels forming one complex number."""
    pairs = torch.view_as_complex(rearrange(x.float(), "b f s (nh e r) -> b (f s) nh e r", nh=heads, r=2).contiguous())
    return torch.view_as_real(pairs * rope).flatten(2).view_as(x).type_as(x)


class RMSNorm(nn.Module):
    """Over the full width, before the heads are split; in fp32."""

    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).type_as(x) * self.weight


# Which queries see which keys, as data: (queries, [keys, ...]) in frames; None lets everything see everything.
Spans = list[tuple[slice, list[slice]]] | None


def teacher_forcing_spans(f: int, chunk: int) -> Spans:
    """Frames 0 .. f-1 are clean, f .. 2f-1 noisy. Clean chunk i sees clean chunks <= i, noisy i clean < i and itself.

        keys      clean 0 1 2   noisy 0 1 2          Two full attentions per chunk, no mask: the same numbers as a
        clean 0         x                            masked pass on any device, with exact gradients, and no work
        clean 1         x x                          on pairs that the mask would throw away.
        clean 2         x x x
        noisy 0                       x
        noisy 1         x               x
        noisy 2         x x               x
    """
    spans = []
    for start in range(0, f, chunk):
        stop = min(start + chunk, f)
        spans.append((slice(start, stop), [slice(0, stop)]))
    for start in range(0, f, chunk):
        stop = min(start + chunk, f)
        spans.append((slice(f + start, f + stop), [slice(0, start), slice(f + start, f + stop)]))
    return spans


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, spans: Spans, past: tuple[Tensor, Tensor] | None):
    """q, k, v [b f s d] -> attention output [b f s d], and this pass's keys and values [b nh n hd] for the cache."""
    f, s = q.shape[1:3]
    q, k, v = (rearrange(z, "b f s (nh hd) -> b nh (f s) hd", nh=heads) for z in (q, k, v))
    new = (k, v)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    if spans is None:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        tokens = lambda z, frames: z[:, :, frames.start * s : frames.stop * s]
        y = torch.cat([F.scaled_dot_product_attention(
            tokens(q, queries), *(torch.cat([tokens(z, keys) for keys in seen], dim=2) for z in (k, v))
        ) for queries, seen in spans], dim=2)
    return rearrange(y, "b nh (f s) hd -> b f s (nh hd)", f=f), new


class SelfAttention(nn.Module):
    def __init__(self, d: int, heads: int, camera: bool):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)
        if camera:
            self.prope_o = nn.Linear(d, d)

    def forward(self, x: Tensor, rope: Tensor, camera: tuple[Tensor, Tensor] | None, spans: Spans, past: tuple | None):
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)  # [b f s d]
        q_rope, k_rope = rotate(q, rope, self.heads), rotate(k, rope, self.heads)
        y, kv = attend(q_rope, k_rope, v, self.heads, spans, past and past[:2])
        y = self.o(y)
        if camera is not None:
            P, P_inv = camera
            q, k, v = per_frame(q, P.mT), per_frame(k, P_inv), per_frame(v, P_inv)
            z, kv_camera = attend(q, k, v, self.heads, spans, past and past[2:])
            y, kv = y + self.prope_o(per_frame(z, P)), kv + kv_camera
        return y, kv


class CrossAttention(nn.Module):
    """Video asks, text answers. Padding is not masked: Wan was trained that way."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = rearrange(self.norm_q(self.q(x)), "b f s (nh hd) -> b nh (f s) hd", nh=self.heads)
        k = rearrange(self.norm_k(self.k(text)), "b l (nh hd) -> b nh l hd", nh=self.heads)
        v = rearrange(self.v(text), "b l (nh hd) -> b nh l hd", nh=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(rearrange(y, "b nh (f s) hd -> b f s (nh hd)", f=x.shape[1]))


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

    def forward(self, x, modulation, text, rope, camera, spans, past, commit):
        """x [b f s d], modulation [b f 6 d] -> x, and this pass's keys and values if they are to be committed."""
        m = rearrange(self.modulation + modulation, "b f six d -> six b f 1 d")
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = m
        y, kv = self.self_attn(self.norm1(x) * (1 + scale_sa) + shift_sa, rope, camera, spans, past)
        x = x + gate_sa * y
        x = x + self.cross_attn(self.norm3(x), text)
        return x + gate_ffn * self.ffn(self.norm2(x) * (1 + scale_ffn) + shift_ffn), kv if commit else None


class Head(nn.Module):
    def __init__(self, d: int, c_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(d, c_out)
        self.modulation = nn.Parameter(torch.empty(1, 2, d))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = rearrange(self.modulation + e[:, :, None], "b f two d -> two b f 1 d")
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanDiT(nn.Module):
    """Wan2.1's text-to-video transformer; with `camera`, plus PRoPE's zero-initialised output layers."""

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

    def time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma [b f] -> time embedding e [b f d] for the head, and its projection [b f 6 d] for the blocks."""
        half = self.cfg.freq_dim // 2
        speed = 10000 ** -(torch.arange(half, dtype=torch.float64, device=sigma.device) / half)
        angle = 1000 * sigma.double()[..., None] * speed  # Wan counts noise from 0 to 1000, here and nowhere else
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.head.modulation.dtype))
        return e, rearrange(self.time_projection(e), "b f (six d) -> b f six d", six=6)

    def forward(self, x_t: Tensor, sigma: Tensor, prompt: Tensor, camera: tuple[Tensor, Tensor] | None = None, *,
                clean: Tensor | None = None, chunk: int = 0, past: Past | None = None, commit: bool = False):
        """x_t [b f c h w], sigma [b f], prompt [b l text_dim], camera ([b f 4 4], [b f 3 3]) -> v [b f c h w], fp32.

        clean, chunk: teacher forcing on the clean video [b f c h w], `chunk` frames at a time.
        past: what streaming has committed; with commit=True the result is not v but the extended Past.
        camera=None turns the camera branch off.
        """
        b, f, c, h, w = x_t.shape
        if sigma.shape != (b, f) or (camera is not None and camera[0].shape != (b, f, 4, 4)):
            raise ValueError(f"x_t {list(x_t.shape)} needs sigma [{b} {f}] and viewmats [{b} {f} 4 4], found "
                             f"{list(sigma.shape)} and {camera and list(camera[0].shape)}")
        start = past.frames if past else 0
        frames = torch.arange(start, start + f, device=x_t.device)
        rope = rope_table(frames, h // 2, w // 2, self.cfg.dim // self.cfg.heads)
        cameras = None if camera is None else projections(*camera)
        spans = None
        if clean is not None:  # [clean | noisy] along the frames, the clean half at noise level zero
            x_t, sigma = torch.cat([clean, x_t], dim=1), torch.cat([torch.zeros_like(sigma), sigma], dim=1)
            rope, cameras = torch.cat([rope, rope]), cameras and tuple(torch.cat([P, P], dim=1) for P in cameras)
            spans = teacher_forcing_spans(f, chunk)

        weight = self.patch_embedding.weight.flatten(1)  # a convolution whose stride is its kernel is a linear map
        x = rearrange(x_t, "b f c (h p) (w q) -> b f (h w) (c p q)", p=2, q=2).to(weight.dtype)
        x = F.linear(x, weight, self.patch_embedding.bias)  # [b f s d]
        text = self.text_embedding(prompt.to(x.dtype))  # [b l d]
        e, modulation = self.time(sigma)
        kvs = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, modulation, text, rope, cameras, spans, past.layers[i] if past else None, commit)
            kvs.append(kv)
        if commit:
            if past:
                kvs = [tuple(torch.cat(z, dim=2) for z in zip(*pair)) for pair in zip(past.layers, kvs)]
            return Past(start + f, kvs)
        v = self.head(x[:, -f:], e[:, -f:])
        return rearrange(v, "b f (h w) (p q c) -> b f c (h p) (w q)", h=h // 2, p=2, q=2).float()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Wan VAE. Pixels [b 3 t H W] in [-1, 1] <-> latents [b f c h w], t = 1 + 4 (f - 1): the first frame stands alone,
# then every four frames share a latent. All convolutions look backwards in time only, so a video can be encoded and
# decoded in pieces. What a layer must remember between pieces is passed in and handed back as `memory`, a dict from
# layer to its last input frames; an empty dict is the start of a video. Whole = one piece: same code, same numbers.

Memory = dict[nn.Module, Tensor]


class CausalConv3d(nn.Conv3d):
    """Conv3d that sees the past: time is padded on the left only, with remembered frames or, at the start, zeros."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], time_stride: int = 1):
        super().__init__(c_in, c_out, kernel, stride=(time_stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        need = self.kernel_size[0] - 1
        if need == 0:
            return super().forward(x)
        b, c, _, h, w = x.shape
        past = memory[self] if self in memory else x.new_zeros(b, c, need, h, w)
        x = torch.cat([past, x], dim=2)
        memory[self] = x[:, :, -need:].clone()  # a view would keep the whole piece in memory
        return super().forward(x)


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

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        r = self.residual
        skip = x if self.shortcut is None else self.shortcut(x, memory)
        x = r["2"](F.silu(r["0"](x)), memory)
        return skip + r["6"](F.silu(r["3"](x)), memory)


class FrameAttention(nn.Module):
    """Single-head attention within each frame."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = ChannelNorm(c, 2)
        self.to_qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        t, h, w = x.shape[2:]
        y = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        q, k, v = rearrange(self.to_qkv(y), "bt (s c) h w -> s bt 1 (h w) c", s=3).contiguous()
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "bt 1 (h w) c -> bt c h w", h=h)
        return x + rearrange(self.proj(y), "(b t) c h w -> b c t h w", t=t)


class Downsample(nn.Module):
    """Halve the grid; with `time`, also the frame rate, the first frame of the video passing through unpaired."""

    def __init__(self, c: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))
        self.time_conv = nn.Conv3d(c, c, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        t = x.shape[2]
        x = rearrange(self.resample(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=t)
        if self.time_conv is None:
            return x
        start = self not in memory
        last, memory[self] = memory.get(self), x[:, :, -1:].clone()
        if start:  # frame 0 alone, then (0 1 2), (2 3 4), ...
            return x if t == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
        return self.time_conv(torch.cat([last, x], dim=2))


class Upsample(nn.Module):
    """Double the grid and halve the channels; with `time`, also double the frame rate, except for the first frame."""

    def __init__(self, c: int, time: bool):
        super().__init__()
        nearest = nn.Upsample(scale_factor=2, mode="nearest-exact")
        self.resample = nn.Sequential(nearest, nn.Conv2d(c, c // 2, 3, padding=1))
        self.time_conv = CausalConv3d(c, 2 * c, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            first, rest = (x[:, :, :0], x) if self in memory else (x[:, :, :1], x[:, :, 1:])
            memory[self] = x.new_empty(0)  # only a mark: the first frame is over, and is *not* history for the second
            if rest.shape[2]:
                rest = rearrange(self.time_conv(rest, memory), "b (s c) t h w -> b c (t s) h w", s=2)
            x = torch.cat([first, rest], dim=2)
        t = x.shape[2]
        return rearrange(self.resample(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=t)


class Coder(nn.Module):
    """Encoder or decoder: a list of layers, each called with (x, memory)."""

    def __init__(self, c_in: int, widths: list[int], c_out: int, samplers: list[nn.Module], blocks: int, name: str):
        super().__init__()
        layers, c = [], widths[0]
        for width, sampler in zip(widths[1:], [*samplers, None], strict=True):
            for _ in range(blocks):
                layers.append(ResidualBlock(c, width))
                c = width
            if sampler is not None:
                layers.append(sampler)
                c = sampler.resample[1].out_channels
        wide = widths[-1] if name == "downsamples" else widths[0]  # the middle sits where the grid is smallest
        self.conv1 = CausalConv3d(c_in, widths[0], (3, 3, 3))
        self.middle = nn.ModuleList([ResidualBlock(wide, wide), FrameAttention(wide), ResidualBlock(wide, wide)])
        self.head = nn.ModuleDict({"0": ChannelNorm(c, 3), "2": CausalConv3d(c, c_out, (3, 3, 3))})
        setattr(self, name, nn.ModuleList(layers))
        self.layers = [*layers, *self.middle] if name == "downsamples" else [*self.middle, *layers]

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = self.conv1(x, memory)
        for layer in self.layers:
            x = layer(x, memory)
        return self.head["2"](F.silu(self.head["0"](x)), memory)


@dataclass(frozen=True)
class VAEConfig:
    dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    res_blocks: int
    time_down: tuple[bool, ...]  # per downsampling stage of the encoder, also in time?
    mean: tuple[float, ...]  # of the latents, per channel: diffusion sees (mu - mean) / std
    std: tuple[float, ...]

    @property
    def stride(self) -> int:
        return 2 ** len(self.time_down)


class WanVAE(nn.Module):
    """Wan2.1's VAE with its released parameter names (`Wan2.1_VAE.pth` loads strictly)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        down = [Downsample(w, time) for w, time in zip(widths[1:], cfg.time_down)]
        self.encoder = Coder(3, widths, 2 * cfg.z_dim, down, cfg.res_blocks, "downsamples")
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, (1, 1, 1))
        widths = [widths[-1], *reversed(widths[1:])]
        up = [Upsample(w, time) for w, time in zip(widths[1:], reversed(cfg.time_down))]
        self.decoder = Coder(cfg.z_dim, widths, 3, up, cfg.res_blocks + 1, "upsamples")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Training from scratch: every convolution keeps the scale of its input, residual blocks start as the identity
        and the posterior narrow, so that latents carry the video through from the first step."""
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
                nn.init.zeros_(layer.bias)
                if name.endswith(("residual.6", "proj")):
                    nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.conv1.weight[self.cfg.z_dim :])
        nn.init.constant_(self.conv1.bias[self.cfg.z_dim :], -5.0)  # log-variance

    def moments(self, video: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """video [b 3 t H W] -> mean and log-variance of the raw latents, each [b c f h w]. Only training needs both."""
        return self.conv1(self.encoder(video, memory), memory).chunk(2, dim=1)

    def encode(self, video: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """video [b 3 t H W] in [-1, 1] -> latents [b f c h w], memory for the next piece.

        t is 1 + 4k at the start of a video and 4k after it. Raises ValueError otherwise: frames that fill no latent
        would be dropped silently.
        """
        memory, t = dict(memory or {}), video.shape[2]
        if t % 4 != (0 if memory else 1):
            raise ValueError(f"a piece of {t} frames: expected {'4k' if memory else '4k + 1'} frames")
        mu, _ = self.moments(video, memory)
        mean, std = (mu.new_tensor(s).view(-1, 1, 1, 1) for s in (self.cfg.mean, self.cfg.std))
        return rearrange((mu - mean) / std, "b c f h w -> b f c h w"), memory

    def decode(self, latents: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """latents [b f c h w] -> video [b 3 t H W], memory for the next piece. Not clamped."""
        memory = dict(memory or {})
        mean, std = (latents.new_tensor(s).view(-1, 1, 1, 1) for s in (self.cfg.mean, self.cfg.std))
        z = rearrange(latents, "b f c h w -> b c f h w") * std + mean
        return self.decoder(self.conv2(z, memory), memory), memory


# ----------------------------------------------------------------------------------------------------------------------
# 5. Presets.

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
WAN_VAE = VAEConfig(96, 16, (1, 2, 4, 4), 2, (False, True, True), WAN_MEAN, WAN_STD)


@dataclass(frozen=True)
class Preset:
    dit: DiTConfig
    vae: VAEConfig


PRESETS = {
    "tiny": Preset(DiTConfig(192, 768, 4, 4, channels=8, text_dim=96, freq_dim=128),
                   VAEConfig(16, 8, (1, 2, 2), 1, (True, True), (0.0,) * 8, (1.0,) * 8)),
    "wan-1.3b": Preset(DiTConfig(1536, 8960, 12, 30, channels=16, text_dim=4096), WAN_VAE),
    "wan-14b": Preset(DiTConfig(5120, 13824, 40, 40, channels=16, text_dim=4096), WAN_VAE),
}


def build(preset: str, camera: bool = True) -> WanDiT:
    """The network of a preset, weights not yet set; under torch.device("meta") it takes no memory."""
    return WanDiT(PRESETS[preset].dit, camera)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Sampling. What trainers show and stream.py serves.


@contextmanager
def timed(seconds: dict[str, float] | None, name: str):
    """Add the time of a with-block to seconds[name]; None measures nothing and waits for nothing."""
    wait = torch.cuda.synchronize if seconds is not None and torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    if seconds is not None:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def doubled(*tensors: Tensor, guidance: float) -> list[Tensor]:
    """With guidance, a batch goes through the network twice over, for the prompt and for the null prompt."""
    return [torch.cat([z, z]) if guidance != 1 else z for z in tensors]


def guided(net: nn.Module, x_t: Tensor, sigma: Tensor, prompt: Tensor, camera, guidance: float, past: Past | None):
    """v [b f c h w], with classifier-free guidance unless it is 1."""
    camera = camera and tuple(doubled(*camera, guidance=guidance))
    v = net(*doubled(x_t, sigma, guidance=guidance), prompt, camera, past=past)
    return v if guidance == 1 else guide(*v.chunk(2), guidance)


@torch.no_grad()
def denoise(net: nn.Module, x_t: Tensor, levels: list[float], prompt: Tensor, camera, guidance: float = 1.0,
            past: Past | None = None, renoise: list[Tensor] | None = None, free: Tensor | None = None) -> Tensor:
    """Noise x_t [b f c h w] -> x0 along `levels`. prompt [b l d], or with guidance [2b l d], the null prompts behind.

    Without renoise, Euler steps along the velocity: the sampler of a teacher. With renoise, one fresh noise for each
    level after the first, each step predicts x0 and noises it again to the next: the sampler of a distilled student.
    Frames where free [b f] is 0 are given: x_t holds them clean, they stay at noise level zero and come out unchanged.
    """
    free = x_t.new_ones(x_t.shape[:2]) if free is None else free
    for i, (upper, lower) in enumerate(zip(levels, levels[1:])):
        sigma = upper * free
        v = guided(net, x_t, sigma, prompt, camera, guidance, past)
        if renoise is None:
            x_t = x_t + ((lower - upper) * free)[..., None, None, None] * v
        else:
            x0 = velocity_to_x0(v, x_t, sigma)
            x_t = add_noise(x0, renoise[i], lower * free) if lower > 0 else x0
    return x_t


@torch.no_grad()
def unipc(net: nn.Module, x_t: Tensor, levels: list[float], prompt: Tensor, camera, guidance: float = 1.0,
          past: Past | None = None, free: Tensor | None = None) -> Tensor:
    """As `denoise` without renoise, in fewer steps: UniPC (arXiv:2302.04867), the sampler public Wan is used with.

    Of second order in log-SNR, x0 being taken for a straight line there. Each step is made twice: first through the two
    predictions of x0 at hand, then again with the one at its own end, which the next step needs anyway. The first and
    the last step are of first order. levels[0] must be under 1, where log-SNR is -inf: noise_levels(..., start=0.999).
    """
    log_snr = [math.log((1 - s) / s) if s > 0 else math.inf for s in levels]
    free, given, x0s = x_t.new_ones(x_t.shape[:2]) if free is None else free, x_t, []

    def leap(x: Tensor, i: int, end: Tensor | None) -> Tensor:
        """From levels[i] to levels[i + 1]; end: x0 as predicted there, once it is known."""
        h = log_snr[i + 1] - log_snr[i]
        B, x0 = math.expm1(-h), x0s[i]
        if 0 < i < len(levels) - 2:
            r = (log_snr[i - 1] - log_snr[i]) / h
            slope = (x0s[i - 1] - x0s[i]) / r
            # weights that make the step exact where x0 is of first or second order in log-SNR (eq. 9, B(h) = e^h - 1)
            b = -1 / h - 1 / B, 2 * (1 / h + 1 / B) / h - 1 / B
            w = (b[0] - b[1]) / (1 - r)
            x0 = x0 + (slope / 2 if end is None else w * slope + (b[0] - w) * (end - x0s[i]))
        elif end is not None:
            x0 = x0 + (end - x0s[i]) / 2
        return levels[i + 1] / levels[i] * x - (1 - levels[i + 1]) * B * x0

    for i, upper in enumerate(levels[:-1]):
        sigma = upper * free
        x0s.append(velocity_to_x0(guided(net, x_t, sigma, prompt, camera, guidance, past), x_t, sigma))
        x = leap(x, i - 1, x0s[i]) if i else x_t
        x_t = torch.where(free[..., None, None, None] > 0, leap(x, i, None), given)
    return x_t


@torch.no_grad()
def commit(net: nn.Module, x0: Tensor, prompt: Tensor, camera, guidance: float = 1.0, past: Past | None = None) -> Past:
    """The past, extended by finished frames x0 [b f c h w]: one pass at noise level zero. prompt as in `denoise`."""
    camera = camera and tuple(doubled(*camera, guidance=guidance))
    x0, sigma = doubled(x0, x0.new_zeros(x0.shape[:2]), guidance=guidance)
    return net(x0, sigma, prompt, camera, past=past, commit=True)


@torch.no_grad()
def rollout(net: nn.Module, meta: dict, rng: list[torch.Generator], shape: tuple[int, ...], prompt: Tensor,
            null: Tensor, camera: tuple[Tensor, Tensor], seconds: dict[str, float] | None = None,
            prefix: Tensor | None = None):
    """Yield x0 [b f c h w] chunk by chunk, each denoised after what was yielded before it.

    meta: how the checkpoint says it is to be sampled. Bidirectional models have chunk 0: all frames at once.
    rng: one generator per video, shape: [f c h w]; so a video does not depend on the others in its batch.
    seconds: if given, the time spent is added to its "denoise" and "commit".
    prefix: the first latent frames [b p c h w], an image or a short video, if they are given rather than made.
    """
    renoise, multistep = meta["sampler"] == "renoise", meta["sampler"] == "unipc"
    levels, guidance = noise_levels(meta["steps"], meta["shift"], 0.999 if multistep else 1.0), meta["guidance"]
    noise = [torch.stack([torch.randn(shape, generator=g) for g in rng]).to(prompt.device)
             for _ in range(meta["steps"] if renoise else 1)]  # one for each level above 0
    text, past = torch.cat([prompt, null]) if guidance != 1 else prompt, None
    prefix = noise[0][:, :0] if prefix is None else prefix
    noise[0] = torch.cat([prefix, noise[0][:, prefix.shape[1] :]], dim=1)
    free = (torch.arange(shape[0], device=prompt.device) >= prefix.shape[1]).float().expand(len(prompt), -1)
    for start in range(0, shape[0], meta["chunk"] or shape[0]):
        frames = slice(start, start + (meta["chunk"] or shape[0]))
        here = tuple(z[:, frames] for z in camera) if meta["camera"] else None
        x_t, *rest = (z[:, frames] for z in noise)
        with timed(seconds, "denoise"):
            if multistep:
                x0 = unipc(net, x_t, levels, text, here, guidance, past, free[:, frames])
            else:
                x0 = denoise(net, x_t, levels, text, here, guidance, past, rest if renoise else None, free[:, frames])
        yield x0
        if frames.stop < shape[0]:
            with timed(seconds, "commit"):
                past = commit(net, x0, text, here, guidance, past)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Weights: shard, average, save, load, resume.


def start_process_group() -> tuple[int, int, torch.device]:
    """rank, world size, device. Under torchrun, nccl on GPUs and gloo on CPUs; plain python is a world of one."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    world_of_one = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **world_of_one)
    return dist.get_rank(), dist.get_world_size(), device


def fresh_weights(preset: str, camera: bool, seed: int) -> dict[str, Tensor]:
    """Weights to train from scratch, the same on every rank."""
    net = build(preset, camera)
    torch.manual_seed(seed)
    net.init_weights()
    return net.state_dict()


def with_camera(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Add PRoPE's output layers, at zero, to weights that lack them. Returns the weights and how many were added."""
    added = {}
    for name, w in weights.items():
        if ".self_attn.o." in name and (prope := name.replace(".o.", ".prope_o.")) not in weights:
            added[prope] = torch.zeros_like(w)
    return {**weights, **added}, len(added)


def shard(net: nn.Module, weights: dict[str, Tensor], device: torch.device, train: bool = False) -> nn.Module:
    """A network built on the meta device -> the same, sharded over all ranks (FSDP2) and filled with rank 0's weights.

    One fully_shard per block and one for the rest. fp32 master weights; on a GPU, bf16 compute and fp32 reduction.
    """
    compute = torch.bfloat16 if device.type == "cuda" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in net.blocks:
        fully_shard(block, mp_policy=precision)
    # resharded even at the root: between passes every parameter is a shard again, which update_ema relies on
    fully_shard(net, mp_policy=precision, reshard_after_forward=True).to_empty(device=device)
    weights = {name: w.float() for name, w in weights.items()} if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(net, weights, options=options)
    return net.train(train).requires_grad_(train)


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) net, shard by shard: no communication."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def check_finite(step: int, metrics: dict[str, Tensor], ids: list[int]) -> dict[str, float]:
    """Average metrics over the ranks. Raises ValueError on NaN or inf, on every rank at once and before any update."""
    means = torch.stack([value.detach().float() for value in metrics.values()])
    dist.all_reduce(means)
    row = dict(zip(metrics, (means / dist.get_world_size()).tolist()))
    if not means.isfinite().all():
        raise ValueError(f"step {step}: {row} is not finite; batch rows on rank {dist.get_rank()}: {ids}. "
                         "The last checkpoint and state are untouched")
    return row


def gather(net: nn.Module) -> dict[str, Tensor]:
    """The whole state dict in CPU memory on rank 0, empty elsewhere. Every rank must call it."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_checkpoint(path: Path, weights: dict[str, Tensor], meta: dict) -> None:
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


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A short name for these very weights; latents and the models trained on them remember their VAE by it."""
    return f"{zlib.crc32(b''.join(w.float().cpu().numpy().tobytes() for w in weights.values())):08x}"


MAKERS = {  # stage: the command that makes its checkpoint
    "vae": "python data.py", "base": "python train_camera.py --no-camera", "camera": "python train_camera.py",
    "ar": "python train_ar.py", "ode": "python distill_ode.py", "cd": "python distill_cd.py",
    "dmd": "python train_dmd.py",
}


# Released files say little about themselves. What follows reads them as they are: public Wan2.1 (a folder in its own or
# in diffusers' names, and the VAE) and minWM's model.pt. What they leave unsaid is written out here; a meta.json beside
# the weights has the last word, {"size": [480, 832]} say.

_RELEASED = {  # Wan2.1's and minWM's settings
    "K": [0.5050505, 0.89786756, 0.5, 0.5], "size": [480, 832], "fps": 16, "frames": 20, "vae_fingerprint": "Wan2.1",
    "prefix_prob": 0.0, "camera": True, "chunk": 4, "shift": 5.0, "sampler": "renoise", "steps": 4, "guidance": 1.0,
    "step": 0, "from": None,
}
RELEASED = {  # stage: its meta
    "base": _RELEASED | {"camera": False, "chunk": 0, "sampler": "unipc", "steps": 50, "guidance": 5.0},
    "camera": _RELEASED | {"chunk": 0, "sampler": "unipc", "steps": 50, "guidance": 8.0},
    "ar": _RELEASED | {"sampler": "unipc", "steps": 50, "guidance": 3.0},
    "ode": _RELEASED, "cd": _RELEASED, "dmd": _RELEASED,
}
MINWM_FOLDERS = {"bidirectional": "camera", "ar_diffusion_tf": "ar", "causal_ode": "ode", "causal_cd": "cd",
                 "dmd": "dmd"}  # where minWM's files lie: their only word about their stage
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


def renamed(weights: dict[str, Tensor], table: tuple) -> dict[str, Tensor]:
    """Each name through every (pattern, replacement) of the table in turn. Names that would meet stay as they are."""
    names = {name: name for name in weights}
    for pattern, replacement in table:
        names = {old: re.sub(pattern, replacement, name) for old, name in names.items()}
    count = Counter(names.values())
    return {new if count[new] == 1 else old: weights[old] for old, new in names.items()}


def from_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """WanTransformer3DModel's or AutoencoderKLWan's names -> Wan's. Any other name stays as it is."""
    if "encoder.conv_in.weight" not in weights:
        return renamed(weights, DIFFUSERS_DIT)
    blocks = sum(name.startswith("decoder.up_blocks.0.resnets.") and name.endswith("conv1.bias") for name in weights)
    # the decoder's layers are counted through in Wan's file: of each stage the blocks, then the upsampler
    place = lambda m: f".upsamples.{int(m[1]) * (blocks + 1) + (int(m[3]) if m[2] == 'resnets' else blocks)}."
    return renamed(weights, ((r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", place), *DIFFUSERS_VAE))


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """diffusion_pytorch_model*.safetensors: one file, or the shards that an index names."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if index.exists():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    if not files:
        raise ValueError(f"{folder}: no diffusion_pytorch_model*.safetensors in it")
    weights = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: no such file, but {index.name} names it")
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: truncated, or not safetensors ({error})") from None
    return weights


def _width(weights: dict[str, Tensor], name: str) -> int:
    return weights[name].shape[0] if name in weights and weights[name].ndim else 0


def _released_meta(path: Path, stage: str | None, weights: dict[str, Tensor], sizes: dict) -> dict:
    """What a checkpoint of ours would have said of a released network. path: the meta.json that may correct it."""
    said = _read_json(path) if path.exists() else {}
    stage = said.pop("stage", stage)
    if stage not in RELEASED or not said.keys() <= RELEASED[stage].keys():
        raise ValueError(f"{path}: expected a stage of {', '.join(RELEASED)} and some of {', '.join(_RELEASED)}, "
                         f"found stage {stage} and {', '.join(said) or 'nothing'}")
    sizes = sizes or {"dim": _width(weights, "patch_embedding.bias"),
                      "layers": sum(name.endswith(".cross_attn.o.bias") for name in weights)}
    known = [name for name, preset in PRESETS.items() if all(getattr(preset.dit, key) == z for key, z in sizes.items())]
    if not known:
        raise ValueError(f"{path.parent}: a network with {sizes}, known presets are {', '.join(PRESETS)}")
    return RELEASED[stage] | said | {"stage": stage, "preset": known[0]}


def _vae_meta(path: Path, weights: dict[str, Tensor], config: dict) -> dict:
    """config: diffusers' config.json, or nothing. Its released weights are known by name, all others by fingerprint."""
    dim, z_dim = _width(weights, "encoder.conv1.bias"), _width(weights, "conv2.bias")
    known = [name for name, preset in PRESETS.items() if (preset.vae.dim, preset.vae.z_dim) == (dim, z_dim)]
    if not known:
        raise ValueError(f"{path}: a VAE of width {dim} with {z_dim} channels, known presets are {', '.join(PRESETS)}")
    cfg = PRESETS[known[0]].vae
    mean, std = tuple(config.get("latents_mean", cfg.mean)), tuple(config.get("latents_std", cfg.std))
    name = {"fingerprint": "Wan2.1"} if replace(cfg, mean=mean, std=std) == WAN_VAE else {}
    return {"stage": "vae", "preset": known[0], "mean": list(mean), "std": list(std)} | name


def _read_folder(path: Path, want_vae: bool) -> tuple[dict[str, Tensor], dict]:
    """A released folder, or the one around it: the transformer, or with want_vae its VAE."""
    if want_vae and (path / "Wan2.1_VAE.pth").exists():
        return _read_file(path / "Wan2.1_VAE.pth")
    part = path / ("vae" if want_vae else "transformer")
    folder = part if part.is_dir() else path
    config, weights = _read_json(folder / "config.json"), _read_safetensors(folder)
    kind, keys = config.get("_class_name"), {"ffn_dim": "ffn_dim", "num_layers": "layers", "freq_dim": "freq_dim"}
    if kind == "AutoencoderKLWan":
        weights = from_diffusers(weights)
        return weights, _vae_meta(folder, weights, config)
    if kind == "WanTransformer3DModel":
        weights = from_diffusers(weights)
        keys |= {"num_attention_heads": "heads", "in_channels": "channels", "text_dim": "text_dim"}
        config["dim"] = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    elif kind != "WanModel":
        raise ValueError(f"{folder / 'config.json'}: expected a WanModel, WanTransformer3DModel or AutoencoderKLWan, "
                         f"found {kind}")
    if config.get("eps", 1e-6) != 1e-6:
        raise ValueError(f"{folder / 'config.json'}: expected eps 1e-6, found {config['eps']}")
    keys |= {"dim": "dim", "num_heads": "heads", "in_dim": "channels"}
    sizes = {ours: config[theirs] for theirs, ours in keys.items() if theirs in config}
    return weights, _released_meta(path / "meta.json", "base", weights, sizes)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Our own checkpoint, minWM's model.pt or Wan2.1_VAE.pth."""
    try:  # without code, and memory-mapped where the format allows it
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(f"{path}: truncated, or not a checkpoint of ours ({type(error).__name__})") from error
    saved = saved if isinstance(saved, dict) else {}
    of = next((key for key in ("model", "generator_ema", "generator") if key in saved), None)
    weights, meta = saved[of] if of else saved, saved.get("meta")
    whole = isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values())
    if whole and of == "model" and isinstance(meta, dict) and "stage" in meta:
        return weights, meta
    if whole and of is None and "encoder.conv1.weight" in weights:
        return weights, _vae_meta(path, weights, {})
    if whole and of in ("generator_ema", "generator"):
        # FSDP, torch.compile and activation checkpointing have each put their own into the names
        wrappers = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."
        weights = renamed(weights, ((wrappers, ""), (r"^model\.", "")))
        folders = [MINWM_FOLDERS[part.name] for part in path.absolute().parents if part.name in MINWM_FOLDERS]
        meta = path.with_name("meta.json")
        if not folders and not meta.exists():
            raise ValueError(f"{path}: minWM's files do not say their stage, expected one in a folder "
                             f"{', '.join(MINWM_FOLDERS)}, or {{\"stage\": ...}} in {meta}")
        return weights, _released_meta(meta, folders[0] if folders else None, weights, {})
    raise ValueError(f"{path}: not a checkpoint of ours, of minWM or Wan's VAE: it holds {[*saved][:3]}")


def load_checkpoint(path: Path, *stages: str, preset: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """weights, meta of our own checkpoint (memory-mapped) or a released one, file or folder.

    Raises ValueError for a missing, broken or foreign file, or the wrong stage's. Weights are returned only if they
    are, name for name and shape for shape, those of the network that meta describes.
    """
    if not path.exists():
        hint = f"; `{MAKERS[path.stem]}` makes it" if path.stem in MAKERS else ""
        shipped = Path(__file__).parent / "ckpt/tiny" / path.name
        stand_in = f", and {os.path.relpath(shipped)} could stand in" if shipped.exists() else ""
        raise ValueError(f"{path}: no such file{hint}{stand_in}")
    weights, meta = _read_folder(path, "vae" in stages) if path.is_dir() else _read_file(path)
    stage = meta["stage"]
    if stages and stage not in stages:
        raise ValueError(f"{path}: expected a checkpoint of stage {' or '.join(stages)}, found {stage}")
    if preset and meta["preset"] != preset:
        raise ValueError(f"{path}: a {meta['preset']} network, but --preset is {preset}")
    if meta["preset"] not in PRESETS:
        raise ValueError(f"{path}: a network of preset {meta['preset']!r}, known are {', '.join(PRESETS)}")
    with torch.device("meta"):
        net = WanVAE(PRESETS[meta["preset"]].vae) if stage == "vae" else build(meta["preset"], meta["camera"])
    expected, found = ({name: tuple(w.shape) for name, w in z.items()} for z in (net.state_dict(), weights))
    if wrong := [name for name in expected | found if expected.get(name) != found.get(name)]:
        raise ValueError(f"{path}: {len(wrong)} of its tensors are not those of {meta['preset']}, first {wrong[0]}: "
                         f"expected shape {expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}")
    weights = {name: weights[name] for name in expected}  # in our order, which a fingerprint depends on
    if stage == "vae" and "fingerprint" not in meta:
        meta["fingerprint"] = fingerprint(weights)
    return weights, meta


def load_net(path: Path, device: torch.device, *stages: str) -> tuple[nn.Module, dict]:
    """A checkpoint's network for inference, unsharded, and its meta; bf16 on a GPU."""
    weights, meta = load_checkpoint(path, *stages)
    with torch.device("meta"):
        net = build(meta["preset"], meta["camera"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net.load_state_dict({name: w.to(device, dtype) for name, w in weights.items()}, assign=True)
    return net.eval().requires_grad_(False), meta


def load_vae(path: Path, device: torch.device, known_as: str) -> WanVAE:
    """Raises ValueError if it is not the very VAE that made the latents: `known_as`, its fingerprint."""
    weights, meta = load_checkpoint(path, "vae")
    if meta["fingerprint"] != known_as:
        raise ValueError(f"{path}: another VAE than the latents', expected fingerprint {known_as}, "
                         f"found {meta['fingerprint']}")
    vae = WanVAE(replace(PRESETS[meta["preset"]].vae, mean=tuple(meta["mean"]), std=tuple(meta["std"])))
    vae.load_state_dict({name: w.float() for name, w in weights.items()})
    return vae.to(device).eval().requires_grad_(False)


Nets, Optimizers = dict[str, nn.Module], dict[str, torch.optim.Optimizer]


def _training_state(nets: Nets, optimizers: Optimizers) -> dict:
    state = {name: get_model_state_dict(net) for name, net in nets.items()}
    return state | {f"{name}.optimizer": get_optimizer_state_dict(nets[name], opt) for name, opt in optimizers.items()}


def _reason(error: CheckpointException) -> str:
    """One line of an exception that carries every rank's traceback."""
    return "; ".join(f"rank {rank}: {failure!r}" for rank, (failure, _) in error.failures.items()).replace("\n", " ")


def save_state(folder: Path, step: int, nets: Nets, optimizers: Optimizers) -> None:
    """Everything --resume needs, still sharded, in folder/state-STEP; all others go when this one is complete."""
    path, state = folder / f"state-{step:06d}", _training_state(nets, optimizers) | {"step": torch.tensor(step)}
    if dist.get_rank() == 0 and path.exists():  # of an earlier run: half of it must not pass for this one's
        shutil.rmtree(path)
    dist.barrier()
    try:
        dcp.save(state, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(f"{path}: could not be written ({_reason(error)}); the state before it is untouched") from None
    if dist.get_rank() == 0:
        for old in folder.glob("state-*"):
            if old != path:
                shutil.rmtree(old)


def load_state(folder: Path, nets: Nets, optimizers: Optimizers) -> int:
    """Restore in place, on any number of ranks, and return the step to continue from."""
    complete = sorted(path for path in folder.glob("state-*") if (path / ".metadata").exists())  # written last
    if not complete:
        raise ValueError(f"--resume: {folder} holds no saved state")
    state = _training_state(nets, optimizers) | {"step": torch.tensor(0)}
    try:
        dcp.load(state, checkpoint_id=complete[-1])
    except CheckpointException as error:
        raise ValueError(f"{complete[-1]}: truncated, or a state of another network ({_reason(error)})") from None
    for name, net in nets.items():
        set_model_state_dict(net, state[name])
    for name, opt in optimizers.items():
        set_optimizer_state_dict(nets[name], opt, state[f"{name}.optimizer"])
    return int(state["step"])


def main(argv: list[str] | None = None) -> None:
    """python model.py ckpt/ar.pt describes a checkpoint; --half OUT also writes it with its weights rounded to fp16."""
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--half", type=Path, metavar="OUT", help="write a copy in half precision, to ship")
    args = p.parse_args(argv)
    weights, meta = load_checkpoint(args.checkpoint)
    print(json.dumps(meta | {"parameters": sum(w.numel() for w in weights.values())}, indent=2))
    if args.half:
        save_checkpoint(args.half, {name: w.half() for name, w in weights.items()}, meta)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
