"""
model.py's course, in its order, on small random weights: flow identities, PRoPE, teacher forcing against the cached
rollout and against a dense mask, the functional cache, the samplers, checkpoints, the streamed VAE; and UniPC.
"""
import json
import os
import pickle
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import model
from conftest import ROOT
from helpers import SMALL_VAE, change_per_chunk, cut, dense_mask, fitted_vae, meta_of, rigid
from model import (
    PRESETS, SAMPLERS, Camera, DiTConfig, Meta, Preset, VAEConfig, WanDiT, WanVAE, add_noise, build, build_vae,
    fingerprint, guide, load_checkpoint, load_net, load_vae, masked_mse, noise_levels, prefill, projections,
    rolling_cache, rollout, save_checkpoint, segment_attention, shift_sigma, teacher_forcing_segments, update_cache,
    velocity_to_x0, with_camera,
)

SMALL = DiTConfig(64, 96, 4, 2, channels=4, text_dim=24, freq_dim=32)
META = {"stage": "ar", "preset": "tiny", "camera": True}
SAMPLING = {"sampling_steps": 2, "shift": 5.0, "guidance": 1.0, "sampler": "euler", "chunk": 2, "camera": True}


@torch.no_grad()
def random_net(camera=True):
    """Weights of a useful size everywhere, also where training starts from zero: nothing may hold trivially."""
    torch.manual_seed(0)
    net = WanDiT(SMALL, camera)
    for name, p in net.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.3)
        if p.ndim == 1 and "norm" in name and name.endswith("weight"):
            p += 1
    return net.requires_grad_(False)


def inputs(f, b=2):
    """x_t, a noise level for every frame, prompt, camera, and the clean video."""
    torch.manual_seed(1)
    x_t, x0 = torch.randn(2, b, f, 4, 4, 4)
    Ks = torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).expand(b, f, 3, 3)
    return x_t, torch.rand(b, f), torch.randn(b, 5, 24), Camera(rigid(b, f), Ks), x0


# ----------------------------------------------------------------------------------------------------- 1. Flow matching


def test_velocity_leads_back_to_x0_at_every_noise_level():
    x0, noise, sigma = torch.randn(2, 5, 4, 6, 6), torch.randn(2, 5, 4, 6, 6), torch.linspace(0, 1, 10).view(2, 5)
    x_t = add_noise(x0, noise, sigma)
    torch.testing.assert_close(x_t[0, 0], x0[0, 0])
    torch.testing.assert_close(x_t[1, 4], noise[1, 4])
    torch.testing.assert_close(velocity_to_x0(noise - x0, x_t, sigma), x0)


def test_guidance_1_is_exactly_the_conditional_branch_and_0_the_null():
    cond, null = torch.randn(1000), 10 * torch.randn(1000)
    assert torch.equal(guide(cond, null, 1.0), cond)
    assert torch.equal(guide(cond, null, 0.0), null)


def test_guidance_extrapolates_from_the_null_through_the_conditional():
    # minWM's 3.0 in cond + w (cond - null) is 4.0 here
    cond, null = torch.tensor([2.0]), torch.tensor([1.5])
    torch.testing.assert_close(guide(cond, null, 4.0), cond + 3.0 * (cond - null))


def test_four_levels_at_shift_5():
    assert noise_levels(4, 5) == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-12)


@pytest.mark.parametrize("shift", [1, 3, 5, 7.5])
def test_48_levels_contain_the_4(shift):
    assert noise_levels(48, shift)[::12] == noise_levels(4, shift)
    assert all(a > b for a, b in zip(noise_levels(48, shift), noise_levels(48, shift)[1:]))


def test_shift_1_is_the_identity():
    sigma = torch.linspace(0, 1, 11)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)


def test_masked_mse_counts_the_generated_frames_alone():
    a, b = torch.zeros(2, 3, 4, 2, 2), torch.ones(2, 3, 4, 2, 2)
    b[0, 0], b[1, :2] = 100.0, 100.0
    generated = torch.tensor([[0.0, 1, 1], [0, 0, 1]])
    assert masked_mse(a, b, generated) == 1  # a mean over frames, not over videos
    b[1, 2] = 2.0
    assert masked_mse(a, b, generated) == (1 + 1 + 4) / 3


# ----------------------------------------------------------------------------------------------------------- 2. Cameras


def test_projections_are_inverse_to_each_other():
    P, P_inv = projections(inputs(6)[3])
    torch.testing.assert_close(P @ P_inv, torch.eye(4).expand(2, 6, 4, 4), atol=1e-6, rtol=0)


def test_a_rigid_motion_of_the_world_changes_nothing():
    net, (x_t, sigma, prompt, (viewmats, Ks), _) = random_net(), inputs(4)
    moved = net(x_t, sigma, prompt, Camera(viewmats @ rigid(), Ks))
    torch.testing.assert_close(moved, net(x_t, sigma, prompt, Camera(viewmats, Ks)), atol=2e-5, rtol=1e-4)


def test_the_motion_of_one_frame_reaches_all_frames():
    net, (x_t, sigma, prompt, (viewmats, Ks), _) = random_net(), inputs(4)
    bent = viewmats.clone()
    bent[:, 2] = bent[:, 2] @ rigid()
    still, moved = (net(x_t, sigma, prompt, Camera(poses, Ks)) for poses in (viewmats, bent))
    assert (moved - still).abs().amax((0, 2, 3, 4)).min() > 1e-3


def test_focal_length_reaches_the_output():
    net, (x_t, sigma, prompt, (viewmats, Ks), _) = random_net(), inputs(4)
    zoomed = Ks * torch.tensor([[2.0, 1, 1], [1, 1, 1], [1, 1, 1]])
    near, far = (net(x_t, sigma, prompt, Camera(viewmats, lens)) for lens in (zoomed, Ks))
    assert (near - far).abs().max() > 1e-3


def test_the_principal_point_is_left_out_as_released():
    camera = inputs(4)[3]
    elsewhere = camera.Ks + torch.tensor([[0, 0, 0.2], [0, 0, -0.1], [0, 0, 0]])
    for P, other in zip(projections(camera), projections(Camera(camera.viewmats, elsewhere)), strict=True):
        assert torch.equal(P, other)


# ----------------------------------------------------------------------------------------------------------- 3. The DiT


@pytest.mark.parametrize("camera_on", [True, False])
@pytest.mark.parametrize("f, chunk", [(6, 2), (5, 2), (3, 1), (4, 3), (2, 2)])
def test_cached_rollout_is_the_teacher_forced_pass(f, chunk, camera_on):
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(f)
    camera = camera if camera_on else None
    whole = net(x_t, sigma, prompt, camera, clean=x0, chunk=chunk)
    kv_cache, pieces = None, []
    for start in range(0, f, chunk):
        here = slice(start, start + chunk)
        x, s, clean = cut(here, x_t, sigma, x0)
        cam = camera and camera.frames(here)
        pieces.append(net(x, s, prompt, cam, kv_cache=kv_cache))
        kv_cache = net(clean, torch.zeros_like(s), prompt, cam, kv_cache=kv_cache, update_cache=True)
    assert kv_cache.frames == f
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_one_chunk_of_all_frames_is_the_bidirectional_pass():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(4)
    forced = net(x_t, sigma, prompt, camera, clean=x0, chunk=4)
    torch.testing.assert_close(forced, net(x_t, sigma, prompt, camera), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("f, chunk", [(6, 2), (5, 2), (4, 1), (3, 3)])
def test_segments_are_the_dense_mask_in_outputs_and_gradients(f, chunk):
    s, heads, past = 3, 2, (f - 1) // chunk * chunk  # nothing sees the last clean chunk: it is left out
    frame = torch.arange((past + f) * s) // s
    noisy, n = frame >= past, torch.where(frame >= past, frame - past, frame) // chunk
    i, j, noisy_i, noisy_j = n[:, None], n[None], noisy[:, None], noisy[None]
    # clean sees clean up to its own chunk; noisy sees clean before its own chunk, and its own noisy chunk
    sees = (~noisy_i & ~noisy_j & (j <= i)) | (noisy_i & ~noisy_j & (j < i)) | (noisy_i & noisy_j & (j == i))
    q, k, v = (torch.randn(2, past + f, s, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    segments = teacher_forcing_segments(f, chunk)
    assert torch.equal(dense_mask(segments, s), sees)
    y, _ = segment_attention(q, k, v, heads, segments, [])
    split = [rearrange(z, "b f s (nh hd) -> b nh (f s) hd", nh=heads) for z in (q, k, v)]
    dense = rearrange(F.scaled_dot_product_attention(*split, attn_mask=sees), "b nh (f s) hd -> b f s (nh hd)", s=s)
    torch.testing.assert_close(y, dense)
    weights = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), (q, k, v)),
                               torch.autograd.grad((dense * weights).sum(), (q, k, v)))


def test_a_clean_chunk_is_seen_by_later_noisy_chunks_only():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(10)
    other = x0.clone()
    other[:, 4:6] += torch.randn(2, 2, 4, 4, 4)  # chunk 2 of 0 .. 4
    change = change_per_chunk(*(net(x_t, sigma, prompt, camera, clean=clean, chunk=2) for clean in (x0, other)))
    assert change[:3].max() < 1e-6 and change[3:].min() > 1e-3


def test_a_noisy_chunk_is_seen_by_itself_only():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(8)
    other = x_t.clone()
    other[:, 2:4] += torch.randn(2, 2, 4, 4, 4)  # chunk 1 of 0 .. 3
    change = change_per_chunk(*(net(x, sigma, prompt, camera, clean=x0, chunk=2) for x in (x_t, other)))
    assert change[1] > 1e-3 and change[[0, 2, 3]].max() < 1e-6


def test_a_new_camera_branch_leaves_the_base_output_unchanged(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset(WanDiT, SMALL, WanVAE, None))
    base, (x_t, sigma, prompt, camera, _) = random_net(camera=False), inputs(4)
    weights, added = with_camera(base.state_dict(), "small")
    net = WanDiT(SMALL)
    net.load_state_dict(weights)
    assert added == 2 * SMALL.layers == len(weights) - len(base.state_dict())
    assert torch.equal(net(x_t, sigma, prompt, camera), base(x_t, sigma, prompt))


def test_with_camera_keeps_a_camera_that_is_there(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset(WanDiT, SMALL, WanVAE, None))
    weights = random_net().state_dict()
    again, added = with_camera(weights, "small")
    assert added == 0 and all(torch.equal(again[name], w) for name, w in weights.items())


def test_camera_none_turns_the_branch_off():
    net, base, (x_t, sigma, prompt, camera, _) = random_net(), random_net(camera=False), inputs(4)
    base.load_state_dict({name: w for name, w in net.state_dict().items() if "prope_o" not in name})
    assert torch.equal(net(x_t, sigma, prompt), base(x_t, sigma, prompt))
    assert (net(x_t, sigma, prompt, camera) - base(x_t, sigma, prompt)).abs().max() > 1e-3


def test_init_weights_sets_every_parameter_and_predicts_nothing():
    with torch.device("meta"):
        net = WanDiT(SMALL)
    net.to_empty(device="cpu")
    for p in net.parameters():
        torch.nn.init.constant_(p, float("nan"))
    net.init_weights()
    assert all(p.isfinite().all() for p in net.parameters())
    assert net(*inputs(3)[:4]).abs().max() == 0


def test_an_updated_cache_leaves_the_old_one_as_it_was():
    net, (_, _, prompt, camera, x0) = random_net(), inputs(4)
    first, second = ((*cut(frames, x0, torch.zeros(2, 4)), prompt, camera.frames(frames))
                     for frames in (slice(0, 2), slice(2, 4)))
    kv_cache = net(*first, update_cache=True)
    before = [[tuple(z.clone() for z in piece) for piece in layer] for layer in kv_cache.layers]
    once, twice = (net(*second, kv_cache=kv_cache, update_cache=True) for _ in range(2))
    torch.testing.assert_close(kv_cache.layers, before, atol=0, rtol=0)
    torch.testing.assert_close(once, twice, atol=0, rtol=0)
    assert (kv_cache.frames, once.frames) == (2, 4)
    for old, new in zip(kv_cache.layers, once.layers, strict=True):
        assert len(old) == 1 and len(new) == 2 and new[0] is old[0]  # shared, not copied
        assert all(z.shape[2] == 2 * 4 for piece in new for z in piece)


def test_a_pass_of_no_frames_adds_no_piece():
    net, (_, _, prompt, camera, x0) = random_net(), inputs(4)
    empty = prefill(net, x0, prompt, camera)
    assert empty.frames == 0 and empty.layers == [[]] * SMALL.layers
    full = update_cache(net, x0, prompt, camera, empty)
    torch.testing.assert_close(full, update_cache(net, x0, prompt, camera), atol=0, rtol=0)
    nothing = camera.frames(slice(0))
    assert update_cache(net, x0[:, :0], prompt, nothing, full).layers == full.layers


@pytest.mark.parametrize("camera_on", (True, False))
def test_a_prompt_is_read_once_and_its_keys_are_kept(camera_on):
    net, (x_t, sigma, prompt, camera, x0) = random_net(camera_on), inputs(4)
    first, then = slice(0, 2), slice(2, 4)
    here = lambda frames: camera.frames(frames) if camera_on else None
    lost = torch.full_like(prompt, torch.nan)
    with torch.no_grad():
        kv_cache = update_cache(net, x0[:, first], prompt, here(first), prefill(net, x0, prompt, here(first)))
        for start in (kv_cache, prefill(net, x0, prompt, here(first))):
            kept = net(x_t[:, then], sigma[:, then], lost, here(then), kv_cache=start)
            again = net(x_t[:, then], sigma[:, then], prompt, here(then), kv_cache=start._replace(text=None))
            assert torch.equal(kept, again)
        later = update_cache(net, x0[:, then], lost, here(then), kv_cache)
    assert all(a is b for old, new in zip(kv_cache.text[0], later.text[0], strict=True) for a, b in zip(old, new))
    net.requires_grad_(True)  # a pass that is trained reads it again, to learn from it
    y = net(x_t[:, then], sigma[:, then], prompt, here(then), kv_cache=kv_cache)
    y.square().sum().backward()
    weights = [net.text_embedding[0].weight, net.blocks[0].cross_attn.k.weight, net.blocks[1].cross_attn.v.weight]
    assert all(w.grad.abs().max() > 0 for w in weights)


def test_pieces_of_a_cache_are_read_as_one():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(6)
    kv_cache = None
    for start in range(0, 4, 2):
        here = slice(start, start + 2)
        kv_cache = update_cache(net, x0[:, here], prompt, camera.frames(here), kv_cache)
    joined = kv_cache._replace(layers=[[tuple(torch.cat(z, dim=2) for z in zip(*layer))] for layer in kv_cache.layers])
    assert [len(layer) for layer in kv_cache.layers] == [2] * SMALL.layers
    last = (*cut(slice(4, 6), x_t, sigma), prompt, camera.frames(slice(4, 6)))
    assert torch.equal(net(*last, kv_cache=kv_cache), net(*last, kv_cache=joined))


def test_a_rolling_cache_drops_the_middle_and_not_the_count():
    net, (_, _, prompt, camera, x0) = random_net(), inputs(6)
    for chunk, (sink, window, frames) in product((6, 4, 1), (
            (1, 2, [0, 4, 5]), (0, 3, [3, 4, 5]), (2, 0, [0, 1]), (4, 4, range(6)))):
        kv_cache = None
        for start in range(0, 6, chunk):
            here = slice(start, start + chunk)
            kv_cache = update_cache(net, x0[:, here], prompt, camera.frames(here), kv_cache)
        kept = rolling_cache(kv_cache, 4, sink, window)
        assert kept.frames == 6
        for left, pieces in zip(kept.layers, kv_cache.layers, strict=True):
            assert all(z.untyped_storage().nbytes() == z.nbytes for piece in left for z in piece)  # no part of a whole
            for parts, whole in zip(zip(*left), zip(*pieces), strict=True):
                z, w = (torch.cat(each, dim=2) for each in (parts, whole))
                assert torch.equal(z, torch.cat([w[:, :, 4 * i : 4 * i + 4] for i in frames], dim=2))


def test_samples_of_a_batch_do_not_meet():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(4, b=3)
    together, alone = net(x_t, sigma, prompt, camera, clean=x0, chunk=2), []
    for i in range(3):
        x, s, text, clean, *cam = (z[i:i + 1] for z in (x_t, sigma, prompt, x0, *camera))
        alone.append(net(x, s, text, Camera(*cam), clean=clean, chunk=2))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_frame_without_its_own_sigma_or_pose_is_refused():
    net, (x_t, sigma, prompt, (viewmats, Ks), _) = random_net(), inputs(4)
    with pytest.raises(ValueError, match="sigma"):
        net(x_t, sigma[:, 0], prompt)
    with pytest.raises(ValueError, match="viewmats"):
        net(x_t, sigma, prompt, Camera(viewmats[:, :3], Ks))


# ---------------------------------------------------------------------------------------------------------- 4. Sampling


def sample(sampler, net, noise, sigmas, prompts=(None,), camera=None, guidance=1.0, generated=None):
    """A sampler on one chunk that has no past. prompts: one, or with guidance the null prompt behind it."""
    generated = noise[0].new_ones(noise[0].shape[:2]) if generated is None else generated
    return SAMPLERS[sampler](net, noise, sigmas, prompts, camera, guidance, [None] * len(prompts), generated)


def check_one_video_is_reached(sampler, steps, start):
    """If the data is the single point x0, the exact velocity at x_t is (x_t - x0) / sigma, whatever noise led there."""
    x0, noise = torch.randn(2, 3, 4, 2, 2), [torch.randn(2, 3, 4, 2, 2) for _ in range(steps)]
    net = lambda x_t, sigma, *_, **__: (x_t - x0) / sigma[:, :, None, None, None]
    y = sample(sampler, net, noise, noise_levels(steps, 5, start))
    torch.testing.assert_close(y, x0, atol=1e-5, rtol=1e-5)


def check_given_frames_stay(sampler, start):
    net, (noise, _, prompt, camera, x0) = random_net(), inputs(4)
    generated = torch.tensor([[0.0, 1, 1, 1], [0, 0, 0, 1]])
    x_t = torch.where(generated[..., None, None, None] > 0, noise, x0)
    fresh = [torch.randn_like(noise) for _ in range(3)]
    y = sample(sampler, net, [x_t, *fresh], noise_levels(4, 5, start), [prompt], camera, generated=generated)
    assert torch.equal(y[generated == 0], x0[generated == 0]) and (y - x_t)[generated == 1].abs().mean() > 0.1


def test_euler_follows_a_linear_field():
    # dx/dsigma = a x: each step from s to s' multiplies by 1 + a (s' - s)
    levels, a, x = noise_levels(5, 3), 0.7, torch.randn(2, 3, 4, 2, 2)
    growth = 1.0
    for s, lower in zip(levels, levels[1:]):
        growth *= 1 + a * (lower - s)
    y = sample("euler", lambda x_t, *_, **__: a * x_t, [x], levels)
    torch.testing.assert_close(y, growth * x)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", ["euler", "few_step"])
def test_a_world_of_one_video_is_reached(sampler, steps):
    check_one_video_is_reached(sampler, steps, start=1.0)


@pytest.mark.parametrize("sampler", ["euler", "few_step"])
def test_given_frames_come_out_unchanged(sampler):
    check_given_frames_stay(sampler, start=1.0)


def test_one_few_step_subtracts_the_velocity():
    x_t, v = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    y = sample("few_step", lambda *_, **__: v, [x_t], [1.0, 0.0])
    assert torch.equal(y, x_t - 1 * v)


def test_few_steps_go_through_x0_with_the_given_noise():
    # v = a x_t: x0 = (1 - a) x_t at sigma 1, then (1 - 0.5) x0 + 0.5 noise, then x0 = (1 - 0.5 a) of that
    a, x_t, noise = 0.3, torch.randn(1, 2, 4, 2, 2), torch.randn(1, 2, 4, 2, 2)
    y = sample("few_step", lambda x, *_, **__: a * x, [x_t, noise], [1.0, 0.5, 0.0])
    torch.testing.assert_close(y, (1 - 0.5 * a) * (0.5 * (1 - a) * x_t + 0.5 * noise))


def test_guidance_reads_the_null_prompt_behind():
    # v is the prompt's one number
    net = lambda x_t, sigma, prompt, *_, **__: prompt[..., None, None].expand_as(x_t)
    x_t, cond, null = torch.randn(2, 3, 4, 2, 2), torch.full((2, 1, 1), 2.0), torch.full((2, 1, 1), 0.5)
    y = sample("euler", net, [x_t], noise_levels(3, 5), [cond, null], guidance=4.0)
    torch.testing.assert_close(y, x_t - (0.5 + 4.0 * (2.0 - 0.5)))


def roll(net, f=4, null=None, b=2, **changes):
    """Chunks of a rollout from fixed seeds, the first `b` videos."""
    _, _, prompt, camera, _ = inputs(f)
    rng = [torch.Generator().manual_seed(i) for i in range(b)]
    return list(rollout(net, SAMPLING | changes, rng, (f, 4, 4, 4), prompt[:b], null, Camera(*(z[:b] for z in camera))))


@pytest.mark.parametrize("chunk, frames", [(2, [2, 2, 1]), (5, [5]), (0, [5]), (1, [1] * 5)])
def test_rollout_yields_chunks(chunk, frames):
    assert [x0.shape[1] for x0 in roll(random_net(), 5, chunk=chunk)] == frames


def test_rollout_without_guidance_reads_no_null_prompt():
    nan = torch.full((2, 5, 24), float("nan"))
    for with_null, without in zip(roll(random_net(), null=nan), roll(random_net(), null=None), strict=True):
        assert torch.equal(with_null, without) and with_null.isfinite().all()


def test_a_rolled_out_video_does_not_depend_on_its_batch():
    for sampler in ("euler", "few_step"):
        both, alone = (torch.cat(roll(random_net(), b=b, sampler=sampler), dim=1) for b in (2, 1))
        torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "few_step"])
def test_rollout_is_sampler_and_cache_by_hand(guidance, sampler):
    net, (_, _, prompt, camera, _), levels = random_net(), inputs(4), noise_levels(2, 5)
    null, zero, caches = torch.zeros_like(prompt), torch.zeros(2, 2), [None, None]  # one cache per prompt
    rng = [torch.Generator().manual_seed(i) for i in range(2)]
    draw = lambda: torch.stack([torch.randn(2, 4, 4, 4, generator=g) for g in rng])
    chunks = roll(net, null=null, guidance=guidance, sampler=sampler)
    for x0, frames in zip(chunks, (slice(0, 2), slice(2, 4)), strict=True):
        x, cam = draw(), camera.frames(frames)
        fresh = draw() if sampler == "few_step" else None
        for level, lower in zip(levels, levels[1:]):
            sigma = torch.full((2, 2), level)
            cond, empty = (net(x, sigma, text, cam, kv_cache=past) for text, past in zip((prompt, null), caches))
            v = guide(cond, empty, guidance)
            if sampler == "euler":
                x = x + (lower - level) * v
            else:
                x = add_noise(velocity_to_x0(v, x, sigma), fresh, torch.full_like(sigma, lower))
        caches = [net(x, zero, text, cam, kv_cache=past, update_cache=True)
                  for text, past in zip((prompt, null), caches)]
        torch.testing.assert_close(x0, x, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- 5. Weights


def tiny_weights():
    torch.manual_seed(0)
    return {name: torch.randn_like(w) for name, w in build("tiny").state_dict().items()}


def filled(value):
    return {name: torch.full_like(w, value) for name, w in build("tiny").state_dict().items()}


def one_line(error, path):
    """The message names the file and fits on a line."""
    return str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_checkpoint_round_trip(tmp_path):
    weights = tiny_weights()
    weights["head.head.weight"] = weights["head.head.weight"].mT.contiguous().mT  # not contiguous
    save_checkpoint(tmp_path / "new" / "ar.pt", weights, META)
    loaded, meta = load_checkpoint(tmp_path / "new" / "ar.pt", "camera", "ar")
    assert meta == META | {"fingerprint": fingerprint(weights, numbers=1000)} and loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], w) for name, w in weights.items())
    assert os.listdir(tmp_path / "new") == ["ar.pt"]


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_text("hello"), lambda path: path.write_bytes(b""),
    lambda path: torch.save({"step": 3}, path), lambda path: torch.save({"model": {}, "meta": {}}, path),
    lambda path: save_checkpoint(path, {}, META | {"stage": "vae"}),
], ids=["missing", "truncated", "text", "empty", "foreign", "no stage", "another stage"])
def test_a_bad_checkpoint_is_named_in_one_line(tmp_path, damage):
    path = tmp_path / "ar.pt"
    save_checkpoint(path, filled(0), META)
    damage(path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, "ar")
    assert one_line(error, path)


@pytest.mark.parametrize("change, found", [
    ({"head.head.bias": None}, "head.head.bias: expected shape (64,), found none"),
    ({"extra": torch.zeros(3)}, "extra: expected shape none, found (3,)"),
    ({"blocks.0.norm3.bias": torch.zeros(7)}, "blocks.0.norm3.bias: expected shape (192,), found (7,)"),
])
def test_tensors_of_another_network_are_named(tmp_path, change, found):
    weights = {name: w for name, w in (filled(0) | change).items() if w is not None}
    save_checkpoint(tmp_path / "ar.pt", weights, META)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "ar.pt")
    assert one_line(error, tmp_path / "ar.pt") and str(error.value).endswith(found)


def test_an_unknown_preset_is_named(tmp_path):
    save_checkpoint(tmp_path / "ar.pt", filled(0), META | {"preset": "wan-99b"})
    with pytest.raises(ValueError, match="'wan-99b', known are tiny"):
        load_checkpoint(tmp_path / "ar.pt")


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match="python train_ar.py"):
        load_checkpoint(tmp_path / "ar.pt")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "done"),)

    for write in (lambda file: torch.save({"model": {}, "meta": Evil()}, file), lambda file: pickle.dump(Evil(), file)):
        with open(tmp_path / "ar.pt", "wb") as file:
            write(file)
        with pytest.raises(ValueError, match="ar.pt"):
            load_checkpoint(tmp_path / "ar.pt")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "ar.pt"
    save_checkpoint(path, filled(1), META)

    def fail(saved, file):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ValueError) as error:
        save_checkpoint(path, filled(0), META)
    assert one_line(error, path) and os.listdir(tmp_path) == ["ar.pt"]
    assert all((w == 1).all() for w in load_checkpoint(path)[0].values())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, Linux's disk that is always full")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "ar.pt"
    save_checkpoint(path, filled(1), META)
    (tmp_path / "ar.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError) as error:
        save_checkpoint(path, filled(0), META)
    assert one_line(error, path) and os.listdir(tmp_path) == ["ar.pt"]
    assert all((w == 1).all() for w in load_checkpoint(path)[0].values())


def test_a_path_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "ckpt").write_text("a file where a folder should be")
    with pytest.raises(ValueError) as error:
        save_checkpoint(tmp_path / "ckpt" / "ar.pt", filled(1), META)
    assert one_line(error, tmp_path / "ckpt" / "ar.pt") and os.listdir(tmp_path) == ["ckpt"]


def test_a_half_precision_copy_loads(tmp_path, capsys):
    weights = tiny_weights()
    save_checkpoint(tmp_path / "ar.pt", weights, META)
    model.main([str(tmp_path / "ar.pt"), "--half", str(tmp_path / "half.pt")])
    shown = json.loads(capsys.readouterr().out)
    known_as = {"fingerprint": fingerprint(weights, numbers=1000)}
    assert shown == META | known_as | {"parameters": sum(w.numel() for w in weights.values())}
    net, meta = load_net(tmp_path / "half.pt", torch.device("cpu"), "ar")
    assert meta_of(tmp_path / "half.pt") == META and meta["fingerprint"] != known_as["fingerprint"]
    assert all(torch.equal(w, weights[name].half().float()) for name, w in net.state_dict().items())
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "ar.pt").stat().st_size


def test_load_vae_restores_weights_and_latent_scale(tmp_path):
    vae, video = fitted_vae(), torch.rand(1, 3, 5, 8, 8)
    vae.cfg = replace(vae.cfg, mean=tuple(torch.randn(16).tolist()), std=tuple((0.5 + torch.rand(16)).tolist()))
    name = fingerprint(vae.state_dict())
    meta = {"stage": "vae", "preset": "tiny", "mean": list(vae.cfg.mean), "std": list(vae.cfg.std), "fingerprint": name}
    save_checkpoint(tmp_path / "vae.pt", vae.state_dict(), meta)
    loaded = load_vae(tmp_path / "vae.pt", torch.device("cpu"), name)
    assert torch.equal(loaded.encode(video)[0], vae.encode(video)[0]) and fingerprint(loaded.state_dict()) == name
    with pytest.raises(ValueError, match=f"expected fingerprint 0, found {name}"):
        load_vae(tmp_path / "vae.pt", torch.device("cpu"), "0")


def test_an_older_file_loads_in_todays_words(tmp_path):
    old = {"steps": 4, "prefix_prob": 0.25, "sampler": "renoise", "guidance": 1.0}
    save_checkpoint(tmp_path / "ar.pt", filled(0), META | old)
    today = {"sampling_steps": 4, "given_prob": 0.25, "sampler": "few_step", "guidance": 1.0}
    assert meta_of(tmp_path / "ar.pt") == META | today
    save_checkpoint(tmp_path / "ar.pt", filled(0), META | today)
    assert meta_of(tmp_path / "ar.pt") == META | today


@pytest.mark.parametrize("path", sorted(ROOT.glob("ckpt/*/*.pt")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_ships_describes_itself_in_todays_words(path):
    load_checkpoint(path, path.stem, preset=path.parent.name)
    meta = meta_of(path)
    if path.stem == "vae":
        assert meta.keys() == {"stage", "preset", "mean", "std", "fingerprint"}
    else:
        others = {"timed_text", "released_cache", "mean", "std", "fingerprint"}  # released networks', a VAE's
        others |= {"window", "sink", "absolute_positions"}  # without them a walk keeps all its past
        assert meta.keys() == Meta.__annotations__.keys() - others and meta["sampler"] in SAMPLERS


# ----------------------------------------------------------------------------------------------------------- 6. The VAE


def random_vae(cfg=SMALL_VAE):
    torch.manual_seed(0)
    mean, std = torch.randn(cfg.z_dim).tolist(), (0.5 + torch.rand(cfg.z_dim)).tolist()
    return WanVAE(replace(cfg, mean=tuple(mean), std=tuple(std))).requires_grad_(False)


def in_pieces(step, x, lengths, dim):
    """step(piece, feat_cache) over pieces of the given lengths -> all outputs."""
    feat_cache, outputs = None, []
    for piece in x.split(lengths, dim):
        y, feat_cache = step(piece, feat_cache)
        outputs.append(y)
    return outputs


@pytest.mark.parametrize("lengths", [[1, 2, 3], [2, 1, 3], [3, 3], [1] * 6])
def test_streamed_decode_is_the_whole_decode(lengths):
    vae, latents = random_vae(), torch.randn(2, 6, 16, 3, 4)
    whole, pieces = vae.decode(latents)[0], in_pieces(vae.decode, latents, lengths, 1)
    assert [piece.shape[2] for piece in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[5, 4, 8], [1, 4, 12], [1, 8, 8], [1, 4, 4, 4, 4], [13, 4]])
def test_streamed_encode_is_the_whole_encode(lengths):
    vae, video = random_vae(), torch.rand(2, 3, 17, 8, 12) * 2 - 1
    whole, pieces = vae.encode(video)[0], in_pieces(vae.encode, video, lengths, 2)
    assert [piece.shape[1] for piece in pieces] == [(n + 3 * (i == 0)) // 4 for i, n in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("f", [1, 2, 4])
def test_a_latent_depends_on_no_later_frame(f):
    vae, video = random_vae(), torch.rand(1, 3, 17, 8, 8) * 2 - 1
    prefix, whole = vae.encode(video[:, :, :1 + 4 * (f - 1)])[0], vae.encode(video)[0]
    torch.testing.assert_close(prefix, whole[:, :f], atol=1e-5, rtol=1e-5)


def test_a_frame_depends_on_no_later_latent():
    vae, latents = random_vae(), torch.randn(1, 5, 16, 2, 2)
    torch.testing.assert_close(vae.decode(latents[:, :3])[0], vae.decode(latents)[0][:, :, :9], atol=1e-5, rtol=1e-5)


def test_the_past_reaches_later_pieces():
    vae, latents = random_vae(), torch.randn(1, 3, 16, 2, 2)
    alone, whole = vae.decode(latents[:, 1:])[0], vae.decode(latents)[0]
    assert (alone[:, :, -4:] - whole[:, :, -4:]).abs().max() > 1e-3


def test_a_feat_cache_can_be_used_twice():
    vae, latents, video = random_vae(), torch.randn(1, 4, 16, 2, 2), torch.rand(1, 3, 9, 8, 8)
    for step, start, rest in (
            (vae.decode, latents[:, :1], latents[:, 1:]), (vae.encode, video[:, :, :1], video[:, :, 1:])):
        _, feat_cache = step(start)
        before = {layer: z.clone() for layer, z in feat_cache.items()}
        assert torch.equal(step(rest, feat_cache)[0], step(rest, feat_cache)[0])
        assert before.keys() == feat_cache.keys()
        assert all(torch.equal(z, feat_cache[layer]) for layer, z in before.items())


def test_frames_that_fill_no_latent_are_refused():
    vae, video = random_vae(), torch.zeros(1, 3, 8, 8, 8)
    with pytest.raises(ValueError, match=r"4 frames.*4k \+ 1"):
        vae.encode(video[:, :, :4])
    _, feat_cache = vae.encode(video[:, :, :1])
    with pytest.raises(ValueError, match="5 frames.*4k"):
        vae.encode(video[:, :, :5], feat_cache)


@pytest.mark.parametrize("time_down", [(False, True, True), (True, True)])
def test_strides_of_the_wan_layout(time_down):
    stages = len(time_down)
    vae = random_vae(VAEConfig(8, 4, (1, 2, 4, 4)[:stages + 1], 1, time_down, (), ()))
    for f in (1, 2, 4):
        latents, _ = vae.encode(torch.zeros(1, 3, 1 + 4 * (f - 1), 16, 32))
        assert latents.shape == (1, f, 4, 16 // 2**stages, 32 // 2**stages)
        assert vae.decode(latents)[0].shape == (1, 3, 1 + 4 * (f - 1), 16, 32)


def test_latents_are_normalised_by_the_stored_mean_and_std():
    vae, video = random_vae(), torch.rand(1, 3, 5, 8, 8)
    z = vae.compress(video, {})
    mean, std = (torch.tensor(z).view(1, -1, 1, 1, 1) for z in (vae.cfg.mean, vae.cfg.std))
    torch.testing.assert_close(rearrange(vae.encode(video)[0], "b f c h w -> b c f h w") * std + mean, z)


def test_decode_scales_latents_back_before_they_are_reconstructed():
    vae, latents = random_vae(), torch.randn(1, 6, 16, 2, 2)
    mean, std = (torch.tensor(z).view(1, -1, 1, 1, 1) for z in (vae.cfg.mean, vae.cfg.std))
    video = vae.reconstruct(rearrange(latents, "b f c h w -> b c f h w") * std + mean, {})
    torch.testing.assert_close(vae.decode(latents)[0], video, atol=1e-5, rtol=1e-5)


# The toy world's.


@pytest.mark.parametrize("lengths", [[1, 2, 3], [6], [1] * 6])
def test_toy_latents_are_those_of_any_pieces(lengths):
    vae, video = fitted_vae(), torch.rand(2, 3, 21, 16, 32) * 2 - 1
    latents, _ = vae.encode(video)
    whole, _ = vae.decode(latents)
    assert latents.shape == (2, 6, 16, 2, 4) and whole.shape == video.shape
    frames = [4 * n - 3 * (i == 0) for i, n in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(in_pieces(vae.encode, video, frames, 2), dim=1), latents)
    torch.testing.assert_close(torch.cat(in_pieces(vae.decode, latents, lengths, 1), dim=2), whole)
    with pytest.raises(ValueError, match="5 frames.*4k"):
        vae.encode(video[:, :, :5], vae.encode(video[:, :, :1])[1])


def test_toy_latents_hold_as_much_of_a_video_as_any_linear_map():
    """Of videos that 16 numbers a patch make up, all; of others what the best 16 directions do. Each has variance 1."""
    torch.manual_seed(0)
    vae = build_vae("tiny")
    for part, frames in ((vae.first, 1), (vae.later, 4)):
        few, many = (torch.randn(2, 64, 4, 4, n) @ torch.randn(n, 3 * frames * 64) for n in (16, 40))
        for x in few, many:
            video = rearrange(x, "b f h w (c t p q) -> b c (f t) (h p) (w q)", t=frames, p=8, q=8)
            part.fit(video)
            z = part.encode(video)
            torch.testing.assert_close(z.var((0, 2, 3, 4)), torch.ones(16), atol=2e-3, rtol=0)
            lost = (part.decode(z) - video).square().sum() / (len(x) * 64 * 16 - 1)
            values = torch.linalg.svdvals(x.flatten(0, 3) - x.flatten(0, 3).mean(0)).square() / (len(x) * 64 * 16 - 1)
            assert lost.item() == pytest.approx(values[16:].sum().item(), rel=1e-2, abs=1e-2)


def test_too_few_videos_to_fit_make_no_infinite_latents():
    vae, video = build_vae("tiny"), torch.rand(1, 3, 5, 16, 16)
    vae.fit(video)
    assert all(z.isfinite().all() for z in (vae.encode(video)[0], vae.decode(torch.randn(1, 2, 16, 2, 2))[0]))


# ------------------------------------------------------------------------------------------------------------ 10. UniPC


@pytest.mark.parametrize("steps", [1, 4])
def test_unipc_reaches_a_world_of_one_video(steps):
    check_one_video_is_reached("unipc", steps, start=0.999)


def test_unipc_needs_fewer_steps_than_euler():
    # data N(1, 1/4): x0 is the mean of what x_t leaves possible, and its distance in deviations never changes
    def net(x_t, sigma, *_, **__):
        sigma = sigma[:, :, None, None, None].double()
        shrink = (1 - sigma) / 4 / ((1 - sigma) ** 2 / 4 + sigma**2)
        return (x_t - 1 - shrink * (x_t - (1 - sigma))) / sigma

    x_t, levels = torch.randn(1, 1, 4, 2, 2, dtype=torch.float64), [noise_levels(n, 3, 0.999) for n in (8, 16, 32)]
    first = levels[0][0]
    truth = 1 + (x_t - (1 - first)) / ((1 - first) ** 2 + 4 * first**2) ** 0.5
    euler, multistep = ([(sample(sampler, net, [x_t], z) - truth).abs().max().item() for z in levels]
                        for sampler in ("euler", "unipc"))
    assert multistep[1] < euler[2] and multistep[2] < multistep[1] / 3 < multistep[0] / 9, (euler, multistep)


def test_unipc_leaves_given_frames_alone():
    check_given_frames_stay("unipc", start=0.999)


def test_a_rollout_by_unipc_starts_just_below_pure_noise():
    seen, net = [], random_net()

    def watched(x_t, sigma, *rest, **flags):
        seen.append(sigma.max().item())
        return net(x_t, sigma, *rest, **flags)

    x0 = torch.cat(roll(watched, sampler="unipc", chunk=0), dim=1)
    assert x0.isfinite().all() and seen == pytest.approx(noise_levels(2, 5.0, 0.999)[:-1]) and seen[0] < 1
