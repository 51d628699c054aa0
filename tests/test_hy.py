"""
HunyuanVideo-1.5's transformer and VAE: against tensors and key lists recorded from the public code (ORACLE_DIR names
their folder), and against themselves: teacher forcing and the cached rollout, caches and recomputation, batches and
single samples, streams and whole videos.
"""
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import safe_open

from model import (
    HY_VAE, PRESETS, ChannelNorm, HYConfig, HYDiT, HYPrompt, HYVAE, HYVAEConfig, Past, Preset, RMSNorm, build,
    build_vae, choose, commit, denoise, leafwise, noise_levels, projections, rollout, rope_table, shard, sinusoid,
    start_process_group, teacher_forcing_spans, with_camera,
)
from test_model import change_per_chunk, check_memory_is_left_as_it_was, cut, rigid
from test_oracle import ORACLE

SMALL = HYConfig(48, 96, 2, 2, channels=4, text_dim=24, vision_dim=16, byt5=(20, 24, 28), rope_bands=(4, 10, 10),
                 action=True)
NO_ORACLE = f"no reference tensors of this kind in {ORACLE}; ORACLE_DIR names their folder"

# --------------------------------------------------------------------------------------- 1. Tensors of the public code


def cases(kind):
    """Every recorded case of a kind, whatever its seed and size; without any, one skipped test."""
    found = sorted(ORACLE.glob(f"{kind}_*.safetensors"))
    skip = pytest.param(None, marks=pytest.mark.skip(reason=NO_ORACLE), id=kind)
    return pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in found] or [skip])


def load(path):
    """A case: its configuration, weights, inputs and outputs."""
    with safe_open(path, "pt") as file:
        cfg, tensors = json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}
    pick = lambda prefix: {name[len(prefix):]: z for name, z in tensors.items() if name.startswith(prefix)}
    return cfg, pick("w/"), pick("in/"), pick("out/")


def check(cfg, recorded, mine):
    """Every recorded tensor is compared, each within 50 times the noise between two recordings or 2e-5 of its range."""
    assert recorded.keys() <= mine.keys()
    far = {}
    for name, expected in recorded.items():
        assert mine[name].shape == expected.shape, name
        error = (mine[name].double() - expected.double()).abs().max().item()
        noise = cfg.get("rerun_noise_max_abs", {}).get(name, 0.0)
        if not error <= max(50 * noise, 2e-5 * expected.double().abs().max().item(), 1e-7):
            far[name] = error
    assert not far


def recorded_net(cfg, weights, **habits):
    """The network of a case, its widths read from the weights: the recordings shrank some that are fixed upstream."""
    ctor, width = cfg["ctor"], lambda name: weights[f"{name}.weight"].shape
    byt5 = tuple(width(f"byt5_in.fc{i}")[1] for i in (1, 2, 3))
    refiners = sum(name.endswith("self_attn_qkv.weight") for name in weights)
    assert ctor["patch_size"][0] == 1 and ctor["patch_size"][1] == ctor["patch_size"][2]
    net = HYDiT(HYConfig(
        ctor["hidden_size"], width("double_blocks.0.img_mlp.fc1")[0], ctor["heads_num"], ctor["mm_double_blocks_depth"],
        ctor["out_channels"], width("txt_in.input_embedder")[1], width("vision_in.proj.1")[1], byt5,
        tuple(ctor["rope_dim_list"]), "action_in.mlp.0.weight" in weights, refiners, ctor["patch_size"][1], **habits,
    ), camera="double_blocks.0.img_attn_prope_proj.weight" in weights)
    net.load_state_dict(weights)
    return net.requires_grad_(False)


def ours(z):
    return rearrange(z, "b c f h w -> b f c h w")


def theirs(z):
    return rearrange(z, "b f c h w -> b c f h w")


def recorded_prompt(i, image, negative=""):
    text, byt5 = ([i[f"{negative}{name}_states"], i[f"{negative}{name}_mask"]] for name in ("text", "byt5"))
    return HYPrompt(*text, *byt5, i["vision_states"], image)


@cases("case5a_hv15")
def test_hunyuanvideo_15(path):
    cfg, weights, i, out = load(path)
    net, prompt = recorded_net(cfg, weights, timed_text=True), recorded_prompt(i, ours(i["cond"]))
    x_t = ours(i["latents"])
    b, f, _, h, w = x_t.shape
    sigma, unseen = repeat(i["t"] / 1000, "b -> b f", f=f), {"vision": 0 * prompt.vision, "image": 0 * prompt.image}
    rope = rope_table(torch.arange(f), h // net.cfg.patch, w // net.cfg.patch, net.cfg.rope_bands, theta=256)
    cos, sin = repeat(torch.view_as_real(rope), "n 1 e part -> part n (e two)", two=2)
    check(cfg, out, {"i2v": theirs(net(x_t, sigma, prompt)), "t2v": theirs(net(x_t, sigma, prompt._replace(**unseen))),
                     "rope_cos": cos, "rope_sin": sin})


def stream(net, x_t, sigma, context, context_sigma, prompt, camera, chunk, context_camera=None):
    """Denoise chunk by chunk, each after the context before it -> every chunk's velocity, and the past at the end."""
    none = camera and tuple(cut(slice(0, 0), *camera))
    with torch.no_grad():
        past, pieces = net(x_t[:, :0], sigma[:, :0], prompt, none, commit=True), []
    for start in range(0, x_t.shape[1], chunk):
        here = slice(start, start + chunk)
        cam, context_cam = (z and tuple(cut(here, *z)) for z in (camera, context_camera or camera))
        pieces.append(net(*cut(here, x_t, sigma), prompt, cam, past=past))
        with torch.no_grad():
            past = net(*cut(here, context, context_sigma), prompt, context_cam, past=past, commit=True)
    return pieces, past


def minwm_outputs(cfg, weights, i, camera):
    """Everything that was recorded of minWM's causal model under one camera, and more."""
    right, released = (recorded_net(cfg, weights, released_cache=released) for released in (False, True))
    prompt, chunk = recorded_prompt(i, ours(i["cond"])), cfg["chunk_frames"]
    x_t, x0 = ours(i["latents"]), ours(i["clean"])
    same, each, chunked = (i[f"t_{name}"][None] / 1000 for name in ("same", "frame", "chunk"))
    zero, none = torch.zeros_like(chunked), camera and camera[:2]
    # right: PRoPE has a cache of its own, and the clean half of teacher forcing has its actions
    good, _ = stream(right, x_t, chunked, x0, zero, prompt, camera, chunk)
    forced = right(x_t, chunked, prompt, camera, clean=x0, chunk=chunk)
    torch.testing.assert_close(forced, torch.cat(good, dim=1), atol=1e-5, rtol=1e-5)
    # as released: PRoPE reads RoPE's cache; and teacher forcing is the stream whose contexts have no actions
    mixed, past = stream(released, x_t, chunked, x0, zero, prompt, camera, chunk)
    forgetful, _ = stream(right, x_t, chunked, x0, zero, prompt, camera, chunk, none)
    noisy_past, _ = stream(right, x_t, chunked, x_t, chunked, prompt, camera, chunk)
    outputs = {"bi": right(x_t, same, prompt, camera), "bi_perframe_t": right(x_t, each, prompt, camera),
               "chunkcausal": torch.cat(noisy_past, dim=1), "tf": torch.cat(forgetful, dim=1)}
    outputs |= {f"FIXEDrollout_chunk{n}": v for n, v in enumerate(good)}
    outputs |= {f"rollout_chunk{n}": v for n, v in enumerate(mixed)}
    outputs = {name: theirs(v) for name, v in outputs.items()}
    for n, (text, video) in enumerate(zip(past.text[0], past.layers)):
        outputs |= {f"rollout_k_txt_layer{n}": text[0], f"rollout_k_vision_layer{n}": video[0]}
    return outputs


def teacher_forcing_mask(f, chunk, tokens, l):
    """The spans as one dense mask over [text | clean | noisy]: text sees text only, and all see the text."""
    mask = torch.zeros(l + 2 * f * tokens, l + 2 * f * tokens, dtype=torch.uint8)
    mask[:, :l] = 1
    at = lambda frames: slice(l + frames.start * tokens, l + frames.stop * tokens)
    for queries, seen in teacher_forcing_spans(f, chunk):
        for keys in seen:
            mask[at(queries), at(keys)] = 1
    return mask


@cases("case5[bc]_minwm_hy")
def test_minwm(path):
    cfg, weights, i, out = load(path)
    cameras = {"": None}
    if "Ks" in i:
        cameras = {"cam_": (i["viewmats"], i["Ks"]), "cam_act_": (i["viewmats"], i["Ks"], i["action"][None])}
    mine = {prefix + name: z for prefix, camera in cameras.items()
            for name, z in minwm_outputs(cfg, weights, i, camera).items()}
    f, h, w = i["latents"].shape[2:]
    l = i["vision_states"].shape[1] + int(i["byt5_mask"].sum() + i["text_mask"].sum())
    patch, chunk = cfg["ctor"]["patch_size"][1], cfg["chunk_frames"]
    mine["tf_token_mask"] = teacher_forcing_mask(f, chunk, h * w // patch**2, l)
    for name in [name for name in out if name.endswith("chunkcausal")]:  # there, frames past the last full chunk
        out[name], mine[name] = (z[:, :, : f // chunk * chunk] for z in (out[name], mine[name]))  # see the text alone
    check(cfg, out, mine)


@cases("case12_hy_sampling")
def test_minwm_sampling(path, monkeypatch):
    cfg, weights, i, out = load(path)
    net = recorded_net(cfg, weights, released_cache=True)
    image = F.pad(ours(i["image_cond"]), (0, 0, 0, 0, 0, 1), value=1.0)
    prompt, null = (recorded_prompt(i, image, negative) for negative in ("", "neg_"))
    x_t, camera = ours(i["init_noise"]), (i["viewmats"], i["Ks"], i["action"][None])
    monkeypatch.setattr(torch, "randn", lambda shape, generator: x_t[0])
    meta = {"steps": cfg["steps"], "shift": cfg["shift"], "sampler": "euler", "camera": True}
    guidance, chunk = cfg["guidance_scale"], cfg["chunk"]
    mine = {}
    for name, changes, seen in (("bidirectional", {"chunk": 0, "guidance": guidance}, camera),
                                ("rollout_UPSTREAM", {"chunk": chunk, "guidance": guidance}, camera),
                                ("rollout_nocfg_UPSTREAM", {"chunk": chunk, "guidance": 1.0}, camera[:2])):
        chunks = list(rollout(net, meta | changes, [None], x_t.shape[1:], prompt, null, seen))
        mine[name] = theirs(torch.cat(chunks, dim=1))
    check(cfg, out, mine)


@cases("case6_hy_vae")
def test_vae(path):
    cfg, weights, i, out = load(path)
    ctor, mine = cfg["ctor"], {}
    widths, z_dim, blocks = tuple(ctor["block_out_channels"]), ctor["latent_channels"], ctor["layers_per_block"]
    assert ctor["ffactor_temporal"] == 4
    for prefix, recall in (("", True), ("CACHED_", False)):  # the released VAE, and minWM's streamed copy of it
        vae = HYVAE(HYVAEConfig(widths, z_dim, blocks, (), (), recall)).requires_grad_(False)
        assert vae.cfg.stride == ctor["ffactor_spatial"]
        vae.load_state_dict(weights)
        for name, z in i.items():
            what, length = name.split("_")
            if what == "video":
                mine[f"{prefix}enc_moments_{length}"] = torch.cat(vae.moments(z, {}), dim=1)
            else:
                mine[f"{prefix}dec_{length}"] = vae.image(z, {})
    check(cfg, out, mine)


@cases("case13_probes")
def test_scales_at_which_eps_and_precision_show(path):
    cfg, _, i, out = load(path)
    norm = RMSNorm(len(i["weight"]))
    norm.weight.data = i["weight"]
    width = out["hy_timestep_embedding_fp32"].shape[1]
    mine = {"hy_rmsnorm_eps1e-6": norm(i["x"]), "hy_timestep_embedding_fp32": sinusoid(i["t"], width)}
    check(cfg, {name: z for name, z in out.items() if name.startswith("hy_")}, mine)  # the rest is Wan's and T5's


@pytest.mark.parametrize("make, manifest", [
    (lambda: build("hy-8b", camera=False), "hunyuanvideo15_480p_i2v_8B"),
    (lambda: build("hy-8b", camera=False), "hunyuanvideo15_480p_t2v_8B"),
    (lambda: build("hy-8b", camera=False), "minwm_hy15_ar_8B"),
    (lambda: HYDiT(replace(PRESETS["hy-8b"].dit, action=False)), "minwm_hy15_camera_8B"),
    (lambda: build("hy-8b"), "minwm_hy15_camera_action_8B"),
    (lambda: build("hy-8b"), "hyworldplay_transformer_action_8B"),
    (lambda: HYVAE(HY_VAE), "hunyuanvideo15_vae"),
])
def test_names_and_shapes_are_the_released_ones(make, manifest):
    path = ORACLE / "manifests" / f"{manifest}.json"
    if not path.exists():
        pytest.skip(f"no reference manifest {path}; ORACLE_DIR names their folder")
    with torch.device("meta"):
        shapes = {name: list(w.shape) for name, w in make().state_dict().items()}
    assert shapes == json.loads(path.read_text())["shapes"]


# -------------------------------------------------------------------------------------------------------------- 2. DiT


@torch.no_grad()
def random_net(camera=True, **changes):
    """Weights of a useful size everywhere, also where training starts from zero: nothing may hold trivially."""
    torch.manual_seed(0)
    net = HYDiT(replace(SMALL, **changes), camera)
    for name, p in net.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.3)
        if p.ndim == 1 and name.endswith("weight"):
            p += 1
    return net.requires_grad_(False)


def inputs(f, b=3, given=1):
    """x_t, a noise level for every frame, prompts with padding in other places, camera with actions, the clean video.

    The first prompt has no quotes, the second no image, the third both.
    """
    torch.manual_seed(1)
    x_t, x0 = torch.randn(2, b, f, 4, 2, 3)
    image = F.pad(x0[:, :given], (0, 0, 0, 0, 0, 1), value=1.0)
    vision, seen = torch.randn(b, 4, 16), torch.tensor([1.0, 0, 1])[:b]
    prompt = HYPrompt(
        torch.randn(b, 7, 24), torch.arange(7) < torch.tensor([[4], [7], [5]])[:b],
        torch.randn(b, 5, 20), torch.arange(5) < torch.tensor([[0], [3], [2]])[:b],
        vision * seen.view(-1, 1, 1), image * seen.view(-1, 1, 1, 1, 1))
    Ks = torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).expand(b, f, 3, 3)
    return x_t, torch.rand(b, f), prompt, (rigid(b, f), Ks, torch.randint(81, (b, f))), x0


@pytest.mark.parametrize("parts", [0, 2, 3], ids=["no camera", "camera", "camera and action"])
@pytest.mark.parametrize("f, chunk, given", [(6, 2, 1), (5, 2, 3), (3, 1, 0), (4, 3, 1), (2, 2, 2)])
def test_cached_rollout_is_the_teacher_forced_pass(f, chunk, given, parts):
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(f, given=given)
    camera = camera[:parts] or None
    whole = net(x_t, sigma, prompt, camera, clean=x0, chunk=chunk)
    pieces, past = stream(net, x_t, sigma, x0, torch.zeros_like(sigma), prompt, camera, chunk)
    assert past.frames == f and all(z.shape[2] == f * 6 for layer in past.layers for z in layer)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_cached_text_is_the_text_read_again():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(4)
    now, then = slice(2, 4), slice(0, 2)
    past = net(*cut(then, x0, 0 * sigma), prompt, cut(then, *camera), commit=True)
    cached = net(*cut(now, x_t, sigma), prompt, cut(now, *camera), past=past)
    again = net(*cut(now, x_t, sigma), prompt, cut(now, *camera), past=past._replace(text=None))
    torch.testing.assert_close(cached, again, atol=1e-5, rtol=1e-5)
    # once it is cached, the prompt's text is not looked at
    lost = prompt._replace(text=torch.full_like(prompt.text, torch.nan))
    assert torch.equal(net(*cut(now, x_t, sigma), lost, cut(now, *camera), past=past), cached)


def test_a_stream_may_start_without_a_commit_of_no_frames():
    net, (x_t, sigma, prompt, camera, _) = random_net(), inputs(2)
    nothing = slice(0)
    prefilled = net(*cut(nothing, x_t, sigma), prompt, cut(nothing, *camera), commit=True)
    first = [net(x_t, sigma, prompt, camera, past=past) for past in (prefilled, Past(0, []))]
    torch.testing.assert_close(*first, atol=1e-5, rtol=1e-5)
    # a bidirectional pass is another function: there, text reads the video
    assert (net(x_t, sigma, prompt, camera) - first[0]).abs().max() > 1e-3


def test_modulation_per_frame_is_modulation_per_token():
    net, f, s = random_net(), 4, 6
    block, x, e = net.blocks[0], torch.randn(2, f, s, 48), torch.randn(2, f, 48)
    text, e_text = torch.randn(2, 1, 5, 48), torch.randn(2, 1, 48)
    rope = rope_table(torch.arange(f), 2, 3, SMALL.rope_bands, theta=256)
    P = projections(rigid(2, f), torch.eye(3).expand(2, f, 3, 3))
    rest = None, None, True, False
    frames = block(x, e, text, e_text, None, None, rope, P, *rest)
    x, e, P = rearrange(x, "b f s d -> b (f s) 1 d"), e.repeat_interleave(s, 1), [z.repeat_interleave(s, 1) for z in P]
    tokens = block(x, e, text, e_text, None, None, rope, P, *rest)
    torch.testing.assert_close(rearrange(frames[0], "b f s d -> b (f s) 1 d"), tokens[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frames[1], tokens[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("forced", [{}, {"chunk": 2}])
def test_samples_of_a_batch_do_not_meet(forced):
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(4)
    given = lambda x: {"clean": x, **forced} if forced else {}
    together, alone = net(x_t, sigma, prompt, camera, **given(x0)), []
    for i in range(3):
        x, s, clean, *cam = (z[i : i + 1] for z in (x_t, sigma, x0, *camera))
        alone.append(net(x, s, leafwise(lambda z: z[i : i + 1], prompt), cam, **given(clean)))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_padding_is_not_read():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(4)
    noisy = lambda z, mask: torch.where(mask[..., None], z, 100 * torch.randn_like(z))
    other = prompt._replace(text=noisy(prompt.text, prompt.text_mask), byt5=noisy(prompt.byt5, prompt.byt5_mask))
    for forced in ({}, {"clean": x0, "chunk": 2}):
        same = [net(x_t, sigma, z, camera, **forced) for z in (prompt, other)]
        torch.testing.assert_close(*same, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("leaf", ["text", "byt5", "vision", "image"])
def test_every_part_of_the_prompt_is_read(leaf):
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(4)
    z = getattr(prompt, leaf)
    other = prompt._replace(**{leaf: torch.where(z != 0, z + torch.randn_like(z), z)})
    for forced in ({}, {"clean": x0, "chunk": 2}):
        assert (net(x_t, sigma, prompt, camera, **forced) - net(x_t, sigma, other, camera, **forced)).abs().max() > 1e-3


def test_an_empty_prompt_is_finite():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(2)
    empty = leafwise(torch.zeros_like, prompt)
    assert net(x_t, sigma, empty, camera).isfinite().all()
    assert net(x_t, sigma, empty, camera, clean=x0, chunk=1).isfinite().all()


def test_a_clean_chunk_is_seen_by_later_noisy_chunks_only():
    net, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(10)
    other = x0.clone()
    other[:, 4:6] += torch.randn(3, 2, 4, 2, 3)  # chunk 2 of 0 .. 4
    change = change_per_chunk(*(net(x_t, sigma, prompt, camera, clean=clean, chunk=2) for clean in (x0, other)))
    assert change[:3].max() < 1e-6 and change[3:].min() > 1e-3


def test_the_released_cache_differs_once_there_is_a_past():
    nets, (x_t, sigma, prompt, camera, x0) = [random_net(released_cache=z) for z in (False, True)], inputs(4)
    (first, later), (first_too, other) = (stream(net, x_t, sigma, x0, 0 * sigma, prompt, camera, 2)[0] for net in nets)
    assert torch.equal(first, first_too) and (later - other).abs().max() > 1e-3


def test_a_new_camera_branch_and_a_new_action_leave_the_base_output_unchanged(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset(SMALL, None))
    base, net, (x_t, sigma, prompt, camera, _) = random_net(camera=False), random_net(), inputs(4)
    weights, added = with_camera(base.state_dict(), "small")
    assert added == 2 * SMALL.layers + 4 and with_camera(weights, "small")[1] == 0
    net.load_state_dict(weights)
    assert torch.equal(net(x_t, sigma, prompt, camera), base(x_t, sigma, prompt))
    assert net.action_in.mlp[0].weight.std() > 0.01  # two zeros in a row would never learn


def test_init_weights_sets_every_parameter_and_predicts_nothing():
    with torch.device("meta"):
        net = HYDiT(SMALL)
    net.to_empty(device="cpu")
    for p in net.parameters():
        torch.nn.init.constant_(p, torch.nan)
    net.init_weights()
    assert all(p.isfinite().all() for p in net.parameters())
    assert net(*inputs(3)[:4]).abs().max() == 0


def test_training_reaches_every_parameter_but_the_last_text_output():
    net, (x_t, sigma, prompt, camera, x0) = random_net().requires_grad_(True), inputs(4)
    net(x_t, sigma, prompt, camera, clean=x0, chunk=2).square().sum().backward()
    last = net.blocks[-1]
    unread = ("txt_attn_q", "txt_attn_q_norm", "txt_attn_proj", "txt_mlp")
    unread = {id(p) for name in unread for p in last[name].parameters()}
    for name, p in net.named_parameters():
        assert (p.grad is None) == (id(p) in unread) and (p.grad is None or p.grad.abs().max() > 0), name


def test_what_a_frame_lacks_is_named():
    net, (x_t, sigma, prompt, camera, _) = random_net(), inputs(4)
    for match, *bad in (("sigma", sigma[:, 0], None), ("viewmats", sigma, cut(slice(3), *camera)),
                        (r"\[3 4\] action", sigma, (*camera[:2], camera[2][:, :3]))):
        with pytest.raises(ValueError, match=match):
            net(x_t, bad[0], prompt, bad[1])


def test_labels_are_for_networks_that_were_built_with_them():
    x_t, sigma, prompt, camera, _ = inputs(4)
    for action in (True, False):
        net = random_net(action=action)
        same = torch.equal(net(x_t, sigma, prompt, camera), net(x_t, sigma, prompt, camera[:2]))
        assert same is not action


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rollout_is_denoise_and_commit_by_hand(guidance):
    net, (_, _, prompt, camera, _) = random_net(), inputs(4)
    null = prompt._replace(text=torch.zeros_like(prompt.text), byt5_mask=torch.zeros_like(prompt.byt5_mask))
    rng = lambda: [torch.Generator().manual_seed(i) for i in range(3)]
    meta = {"steps": 2, "shift": 5.0, "guidance": guidance, "sampler": "euler", "chunk": 2, "camera": True}
    chunks = list(rollout(net, meta, rng(), (4, 4, 2, 3), prompt, null, camera))
    noise = torch.stack([torch.randn(4, 4, 2, 3, generator=g) for g in rng()])
    text = leafwise(lambda *z: torch.cat(z), prompt, null) if guidance != 1 else prompt
    past = commit(net, noise[:, :0], text, tuple(cut(slice(0), *camera)), guidance)
    for x0, here in zip(chunks, (slice(0, 2), slice(2, 4)), strict=True):
        x_t, *cam = cut(here, noise, *camera)
        expected = denoise(net, x_t, noise_levels(2, 5.0), text, tuple(cam), guidance, past)
        torch.testing.assert_close(x0, expected, atol=1e-5, rtol=1e-5)
        past = commit(net, x0, text, tuple(cam), guidance, past)


def test_a_prompt_is_chosen_leaf_by_leaf():
    prompt, null = inputs(2)[2], inputs(2)[2]._replace(text=torch.zeros(3, 7, 24))
    mixed = choose(torch.tensor([False, True, False]), null, prompt)
    for z, a, b in zip(mixed, prompt, null):
        assert torch.equal(z[[0, 2]], a[[0, 2]]) and torch.equal(z[1], b[1])


@pytest.mark.filterwarnings("error::UserWarning:torch.distributed.fsdp")
def test_sharding_changes_nothing():
    start_process_group()
    try:
        with torch.device("meta"):
            net = HYDiT(SMALL)
        whole, (x_t, sigma, prompt, camera, x0) = random_net(), inputs(4)
        net = shard(net, whole.state_dict(), torch.device("cpu"), train=True)
        for forced in ({}, {"clean": x0, "chunk": 2}):
            torch.testing.assert_close(*(z(x_t, sigma, prompt, camera, **forced) for z in (net, whole)))
        pieces = [stream(z, x_t, sigma, x0, 0 * sigma, prompt, camera, 2)[0] for z in (net, whole)]
        torch.testing.assert_close(*pieces)
        pieces[0][-1].square().sum().backward()
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- 3. VAE


@torch.no_grad()
def random_vae(recall=True):
    torch.manual_seed(0)
    vae = HYVAE(HYVAEConfig((8, 8, 16, 16), 4, 1, (0.1, -0.2, 0.3, 0.0), (1.5, 2.0, 0.5, 1.0), recall))
    for name, p in vae.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim == 5 else 0.1)
        if name.endswith("gamma"):
            p += 1
    return vae.requires_grad_(False)


def streamed(step, pieces, axis):
    """Each piece after the others, their outputs joined along `axis`."""
    memory, outputs = None, []
    for piece in pieces:
        output, memory = step(piece, memory)
        outputs.append(output)
    return torch.cat(outputs, dim=axis)


@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_streamed_vae_is_the_whole_vae(sizes, recall):
    vae, video, latents = random_vae(recall), torch.rand(2, 3, 13, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 2, 3)
    encoded, decoded = vae.encode(video)[0], vae.decode(latents)[0]
    assert encoded.shape == latents.shape and decoded.shape == video.shape
    frames = [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    for pieces, whole in ((streamed(vae.encode, video.split(frames, 2), 1), encoded),
                          (streamed(vae.decode, latents.split(sizes, 1), 2), decoded)):
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_vae_recall_reaches_a_frame_that_convolutions_forget():
    latents = torch.randn(1, 40, 4, 1, 1)  # its convolutions look about 30 latents back
    other = torch.cat([latents[:, :1] + 10, latents[:, 1:]], dim=1)
    change = [(vae.decode(latents)[0] - vae.decode(other)[0])[:, :, -4:].abs().max()
              for vae in (random_vae(True), random_vae(False))]
    assert change[0] > 1e-4 and change[1] == 0


def test_a_latent_depends_on_no_later_frame_and_a_frame_on_no_later_latent():
    vae, video, latents = random_vae(), torch.rand(1, 3, 17, 8, 8) * 2 - 1, torch.randn(1, 5, 4, 2, 2)
    encoded, decoded = vae.encode(video)[0], vae.decode(latents)[0]
    for f, t in ((1, 1), (2, 5), (4, 13)):
        torch.testing.assert_close(vae.encode(video[:, :, :t])[0], encoded[:, :f], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(latents[:, :f])[0], decoded[:, :, :t], atol=1e-5, rtol=1e-5)


def test_vae_memory_can_be_used_twice():
    check_memory_is_left_as_it_was(random_vae(), torch.randn(1, 4, 4, 2, 2), torch.rand(1, 3, 9, 16, 16))


def test_vae_init_sets_every_parameter():
    vae = build_vae(PRESETS["tiny-hy"].vae)
    for p in vae.parameters():
        torch.nn.init.constant_(p, torch.nan)
        p.requires_grad_(False)
    for layer in vae.modules():
        if isinstance(layer, ChannelNorm):
            layer.gamma.fill_(1)  # as built
    vae.init_weights()
    mu, logvar = vae.moments(torch.rand(2, 3, 5, 32, 32) * 2 - 1, {})
    assert mu.shape == (2, 8, 2, 8, 8) and 0.1 < mu.std() < 10 and logvar.mean() < -3
    assert vae.image(mu, {}).isfinite().all()
