"""
What several test files share: random inputs and networks of a useful size, tensors recorded from the public code, and
how a checkpoint is taken or refused.
"""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from data import K_SQUARE, Batch, intrinsics, parse_trajectory
from model import (
    HYVAE, Camera, DiTConfig, HYConfig, HYDiT, HYPrompt, HYVAEConfig, VAEConfig, WanDiT, build_vae, fingerprint,
    load_checkpoint,
)

CPU = torch.device("cpu")
ORACLE = Path(os.environ.get("ORACLE_DIR", Path(__file__).parents[2] / "shared/oracle"))  # recordings of public code


def rigid(*shape):
    """Random rigid transforms [*shape 4 4] with centres about a unit away."""
    pose = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    skew = torch.randn(*shape, 3, 3, dtype=torch.float64)
    pose[..., :3, :3] = torch.linalg.matrix_exp(skew - skew.mT)
    pose[..., :3, 3] = torch.randn(*shape, 3, dtype=torch.float64)
    return pose.float()


def cut(frames, *tensors):
    """Some frames of tensors [b f ...]."""
    return [z[:, frames] for z in tensors]


def change_per_chunk(a, b):
    """Largest change in each chunk of two frames."""
    return rearrange((a - b).abs(), "b (n k) c h w -> n (b k c h w)", k=2).amax(1)


def dense_mask(segments, s):
    """Segments of s tokens a frame, as one mask [queries keys]: True where a query sees a key."""
    piece = torch.repeat_interleave(torch.arange(len(segments.lengths)), s * torch.tensor(segments.lengths))
    sees = torch.tensor([[j in seen for j in range(len(segments.lengths))] for seen in segments.seen])
    return sees[piece[:, None], piece[None]]


def without_last_clean_chunk(mask, f, chunk, s, l=0):
    """Of a recorded mask over [text | clean | noisy], l, f s and f s tokens, the rows and columns that we have: none of
    them sees the last clean chunk."""
    last = slice(l + (f - 1) // chunk * chunk * s, l + f * s)
    ours = torch.ones(len(mask), dtype=torch.bool)
    ours[last] = False
    assert not mask[ours, last].any()
    return mask[ours][:, ours]


def check_feat_cache_is_left_as_it_was(vae, latents, video):
    """A piece of video or of latents may be followed by two others."""
    for step, start, rest in (
            (vae.decode, latents[:, :1], latents[:, 1:]), (vae.encode, video[:, :, :1], video[:, :, 1:])):
        _, feat_cache = step(start)
        before = {layer: z.clone() for layer, z in feat_cache.items()}
        assert torch.equal(step(rest, feat_cache)[0], step(rest, feat_cache)[0])
        assert before.keys() == feat_cache.keys()
        assert all(torch.equal(z, feat_cache[layer]) for layer, z in before.items())


# VAEs of the public forms, at toy size
SMALL_VAE = VAEConfig(16, 16, (1, 2, 2), 1, (True, True), (0.0,) * 16, (1.0,) * 16)
SMALL_HY_VAE = HYVAEConfig((16, 16, 32), 16, 1, (0.0,) * 16, (1.0,) * 16)


def fitted_vae(preset="tiny"):
    """A preset's toy VAE, fitted to noise."""
    vae = build_vae(preset).eval()
    vae.fit(torch.rand(4, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    return vae


# ---------------------------------------------------------------------------------------- A batch, and a network for it

GENERATED = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])  # 0: given; with chunks of two, to the second's middle


def make_batch(states=None, generated=GENERATED):
    """Two videos of five small latents; calling it again rewinds the generators."""
    torch.manual_seed(2)
    viewmats = torch.stack([parse_trajectory("w*4"), parse_trajectory("d+l*2,s*2")])
    camera = Camera(viewmats, intrinsics(K_SQUARE).expand(2, 5, 3, 3))
    rng = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    x0, prompt = torch.randn(2, 5, 4, 4, 4), torch.randn(2, 6, 24)
    return Batch(x0, prompt, torch.zeros(2, 6, 24), camera, generated, rng, [0, 1], states)


def make_net(seed, dtype=torch.float32):
    """A small network with weights of a useful size everywhere, also where training starts at zero."""
    torch.manual_seed(seed)
    net = WanDiT(DiTConfig(32, 48, 2, 2, channels=4, text_dim=24, freq_dim=32))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.to(dtype)


# -------------------------------------------------------------------------------------------------- The second backbone

SMALL_HY = HYConfig(48, 96, 2, 2, channels=4, text_dim=24, vision_dim=16, byt5=(20, 24, 28), rope_bands=(4, 10, 10),
                    action=True)


@torch.no_grad()
def random_hy_dit(camera=True, **changes):
    """Weights of a useful size everywhere, also where training starts from zero: nothing may hold trivially."""
    torch.manual_seed(0)
    net = HYDiT(replace(SMALL_HY, **changes), camera)
    for name, p in net.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.3)
        if p.ndim == 1 and name.endswith("weight"):
            p += 1
    return net.requires_grad_(False)


def hy_inputs(f, b=3, given=1):
    """x_t, a noise level for every frame, prompts with padding in other places, the camera, the clean video.

    The first prompt has no quotes, the second no image, the third both.
    """
    torch.manual_seed(1)
    x_t, x0 = torch.randn(2, b, f, 4, 2, 3)
    given_latents = F.pad(x0[:, :given], (0, 0, 0, 0, 0, 1), value=1.0)
    vision, has_image = torch.randn(b, 4, 16), torch.tensor([1.0, 0, 1])[:b]
    prompt = HYPrompt(
        torch.randn(b, 7, 24), torch.arange(7) < torch.tensor([[4], [7], [5]])[:b],
        torch.randn(b, 5, 20), torch.arange(5) < torch.tensor([[0], [3], [2]])[:b],
        vision * has_image.view(-1, 1, 1), has_image.bool()[:, None].expand(b, 4),
        given_latents * has_image.view(-1, 1, 1, 1, 1))
    Ks = torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).expand(b, f, 3, 3)
    return x_t, torch.rand(b, f), prompt, Camera(rigid(b, f), Ks), x0


@torch.no_grad()
def random_hy_vae(recall=True):
    torch.manual_seed(0)
    vae = HYVAE(HYVAEConfig((8, 8, 16, 16), 4, 1, (0.1, -0.2, 0.3, 0.0), (1.5, 2.0, 0.5, 1.0), recall))
    for name, p in vae.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim == 5 else 0.1)
        if name.endswith("gamma"):
            p += 1
    return vae.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- Checkpoints


def meta_of(path, *stages):
    """What a checkpoint says of itself. Its fingerprint, unless it is a VAE's, is that of its weights, and left out."""
    loaded, meta = load_checkpoint(path, *stages)
    if meta["stage"] != "vae":
        assert meta.pop("fingerprint") == fingerprint(loaded, numbers=1000)
    return meta


def loads(path, weights, *stages):
    """As meta_of, if the weights are these."""
    loaded, _ = load_checkpoint(path, *stages)
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], w) for name, w in weights.items())
    return meta_of(path, *stages)


def made_from(path):
    """How a checkpoint is named in those that are made from it."""
    weights, meta = load_checkpoint(path)
    return f"{path.name} at step {meta['step']}, {fingerprint(weights, numbers=1000)}"


def refused(path, *stages):
    """The one line with which a file is refused, which names it or one that belongs to it."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, *stages)
    message = str(error.value)
    assert "\n" not in message and str(path if path.is_dir() else path.parent) in message
    return message


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
