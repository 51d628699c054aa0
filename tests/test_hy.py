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

import model
from helpers import (
    ORACLE, SMALL_HY, change_per_chunk, check_feat_cache_is_left_as_it_was, cut, dense_mask, hy_inputs, random_hy_dit,
    random_hy_vae, rigid, without_last_clean_chunk,
)
from model import (
    HY_VAE, HYVAE, PRESETS, Camera, HYConfig, HYDiT, HYPrompt, HYVAEConfig, KVCache, Preset, RMSNorm, action_labels,
    build, euler, invert_se3, noise_levels, prefill, projections, rollout, rope_table, shard, sinusoid,
    start_process_group, teacher_forcing_segments, tree_map, update_cache, use_released_cache, where_prompt,
    with_camera,
)

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
    parts = ({name.removeprefix(prefix): z for name, z in tensors.items() if name.startswith(prefix)}
             for prefix in ("w/", "in/", "out/"))
    return cfg, *parts


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


def recorded_net(cfg, weights, action=True):
    """The network of a case, its widths read from the weights: the recordings shrank some that are fixed upstream.

    action: False leaves out the embedding of action labels, if there is one.
    """
    def width(name):
        return weights[f"{name}.weight"].shape

    if not action:
        weights = {name: w for name, w in weights.items() if not name.startswith("action_in.")}
    ctor = cfg["ctor"]
    byt5 = tuple(width(f"byt5_in.fc{i}")[1] for i in (1, 2, 3))
    refiners = sum(name.endswith("self_attn_qkv.weight") for name in weights)
    assert ctor["patch_size"][0] == 1 and ctor["patch_size"][1] == ctor["patch_size"][2]
    net = HYDiT(HYConfig(
        ctor["hidden_size"], width("double_blocks.0.img_mlp.fc1")[0], ctor["heads_num"], ctor["mm_double_blocks_depth"],
        ctor["out_channels"], width("txt_in.input_embedder")[1], width("vision_in.proj.1")[1], byt5,
        tuple(ctor["rope_dim_list"]), "action_in.mlp.0.weight" in weights, refiners, ctor["patch_size"][1],
    ), camera="double_blocks.0.img_attn_prope_proj.weight" in weights)
    net.load_state_dict(weights)
    return net.requires_grad_(False)


def ours(z):
    return rearrange(z, "b c f h w -> b f c h w")


def theirs(z):
    return rearrange(z, "b f c h w -> b c f h w")


def recorded_prompt(i, given_latents, negative=""):
    text, byt5 = ([i[f"{negative}{name}_states"], i[f"{negative}{name}_mask"]] for name in ("text", "byt5"))
    vision = i["vision_states"]
    has_image = vision.flatten(1).any(1, keepdim=True).expand(vision.shape[:2])
    return HYPrompt(*text, *byt5, vision, has_image, given_latents)


@cases("case5a_hv15")
def test_hunyuanvideo_15(path):
    cfg, weights, i, out = load(path)
    net, prompt = recorded_net(cfg, weights), recorded_prompt(i, ours(i["cond"]))
    net.timed_text = True
    x_t = ours(i["latents"])
    b, f, _, h, w = x_t.shape
    sigma = repeat(i["t"] / 1000, "b -> b f", f=f)
    names = ("vision", "vision_mask", "given_latents")
    unseen = {name: torch.zeros_like(getattr(prompt, name)) for name in names}
    rope = rope_table(torch.arange(f), h // net.cfg.patch, w // net.cfg.patch, net.cfg.rope_bands, theta=256)
    cos, sin = repeat(torch.view_as_real(rope), "n 1 e part -> part n (e two)", two=2)
    check(cfg, out, {"i2v": theirs(net(x_t, sigma, prompt)), "t2v": theirs(net(x_t, sigma, prompt._replace(**unseen))),
                     "rope_cos": cos, "rope_sin": sin})


def stream(net, x_t, sigma, context, context_sigma, prompt, camera, chunk, context_net=None):
    """Denoise chunk by chunk, each after the context before it -> every chunk's velocity, and the cache at the end.

    context_net: fills the cache, if it is not the net that denoises.
    """
    def part_of_camera(frames):
        return None if camera is None else camera.frames(frames)

    context_net, nothing = context_net or net, slice(0, 0)
    with torch.no_grad():
        kv_cache = context_net(*cut(nothing, x_t, sigma), prompt, part_of_camera(nothing), update_cache=True)
    pieces = []
    for start in range(0, x_t.shape[1], chunk):
        frames = slice(start, start + chunk)
        here = part_of_camera(frames)
        pieces.append(net(*cut(frames, x_t, sigma), prompt, here, kv_cache=kv_cache))
        with torch.no_grad():
            finished = cut(frames, context, context_sigma)
            kv_cache = context_net(*finished, prompt, here, kv_cache=kv_cache, update_cache=True)
    return pieces, kv_cache


def recorded_camera(i, monkeypatch):
    """The camera of a case. Its action labels, if there are any, belong to no path: they take the place of ours."""
    def recorded_labels(viewmats, last_pose=None):
        same = (viewmats[:, :, None] == i["viewmats"][:, None]).flatten(3).all(3)  # [b f recorded f]
        assert (same.sum(2) == 1).all()
        return (same * i["action"]).sum(2)

    if "action" in i:
        monkeypatch.setattr(model, "action_labels", recorded_labels)
    return Camera(i["viewmats"], i["Ks"])


def minwm_outputs(cfg, weights, i, camera, action):
    """Everything that was recorded of minWM's causal model under one camera, and more."""
    right, released = (recorded_net(cfg, weights, action) for _ in range(2))
    use_released_cache(released, {"released_cache": True}, ORACLE)
    without_actions = recorded_net(cfg, weights, action=False)
    prompt, chunk = recorded_prompt(i, ours(i["cond"])), cfg["chunk_frames"]
    x_t, x0 = ours(i["latents"]), ours(i["clean"])
    same, each, chunked = (i[f"t_{name}"][None] / 1000 for name in ("same", "frame", "chunk"))
    zero = torch.zeros_like(chunked)
    # right: PRoPE has a cache of its own, and the clean half of teacher forcing has its actions
    good, _ = stream(right, x_t, chunked, x0, zero, prompt, camera, chunk)
    forced = right(x_t, chunked, prompt, camera, clean=x0, chunk=chunk)
    torch.testing.assert_close(forced, torch.cat(good, dim=1), atol=1e-5, rtol=1e-5)
    # as released: PRoPE reads RoPE's cache; and teacher forcing is the stream whose contexts have no actions
    mixed, kv_cache = stream(released, x_t, chunked, x0, zero, prompt, camera, chunk)
    forgetful, _ = stream(right, x_t, chunked, x0, zero, prompt, camera, chunk, without_actions)
    noisy_past, _ = stream(right, x_t, chunked, x_t, chunked, prompt, camera, chunk)
    outputs = {"bi": right(x_t, same, prompt, camera), "bi_perframe_t": right(x_t, each, prompt, camera),
               "chunkcausal": torch.cat(noisy_past, dim=1), "tf": torch.cat(forgetful, dim=1)}
    outputs |= {f"FIXEDrollout_chunk{n}": v for n, v in enumerate(good)}
    outputs |= {f"rollout_chunk{n}": v for n, v in enumerate(mixed)}
    outputs = {name: theirs(v) for name, v in outputs.items()}
    for n, (text, video) in enumerate(zip(kv_cache.text[0], kv_cache.layers, strict=True)):
        keys = torch.cat([piece[0] for piece in video], dim=2)
        outputs |= {f"rollout_k_txt_layer{n}": text[0], f"rollout_k_vision_layer{n}": keys}
    return outputs


def teacher_forcing_mask(f, chunk, tokens, l):
    """The segments as one dense mask over [text | clean | noisy]: text sees text only, and all see the text."""
    mask = F.pad(dense_mask(teacher_forcing_segments(f, chunk), tokens).to(torch.uint8), (l, 0, l, 0))
    mask[:, :l] = 1
    return mask


@cases("case5[bc]_minwm_hy")
def test_minwm(path, monkeypatch):
    cfg, weights, i, out = load(path)
    if "Ks" in i:
        camera = recorded_camera(i, monkeypatch)
        mine = {f"cam_{name}": z for name, z in minwm_outputs(cfg, weights, i, camera, action=False).items()}
        mine |= {f"cam_act_{name}": z for name, z in minwm_outputs(cfg, weights, i, camera, action=True).items()}
    else:
        mine = minwm_outputs(cfg, weights, i, None, action=False)
    f, h, w = i["latents"].shape[2:]
    l = i["vision_states"].shape[1] + int(i["byt5_mask"].sum() + i["text_mask"].sum())
    patch, chunk = cfg["ctor"]["patch_size"][1], cfg["chunk_frames"]
    tokens = h * w // patch**2
    mine["tf_token_mask"] = teacher_forcing_mask(f, chunk, tokens, l)
    out["tf_token_mask"] = without_last_clean_chunk(out["tf_token_mask"], f, chunk, tokens, l)
    for name in [name for name in out if name.endswith("chunkcausal")]:  # there, frames past the last full chunk
        out[name], mine[name] = (z[:, :, : f // chunk * chunk] for z in (out[name], mine[name]))  # see the text alone
    check(cfg, out, mine)


@cases("case12_hy_sampling")
def test_minwm_sampling(path, monkeypatch):
    cfg, weights, i, out = load(path)
    net, without_actions = recorded_net(cfg, weights), recorded_net(cfg, weights, action=False)
    for each in net, without_actions:
        use_released_cache(each, {"released_cache": True}, path)
    given_latents = F.pad(ours(i["image_cond"]), (0, 0, 0, 0, 0, 1), value=1.0)
    prompt, null = (recorded_prompt(i, given_latents, negative) for negative in ("", "neg_"))
    x_t, camera = ours(i["init_noise"]), recorded_camera(i, monkeypatch)
    meta = {"sampling_steps": cfg["steps"], "shift": cfg["shift"], "sampler": "euler", "camera": True}
    guidance, chunk = cfg["guidance_scale"], cfg["chunk"]
    mine = {}
    for name, changes, sampled in (("bidirectional", {"chunk": 0, "guidance": guidance}, net),
                                   ("rollout_UPSTREAM", {"chunk": chunk, "guidance": guidance}, net),
                                   ("rollout_nocfg_UPSTREAM", {"chunk": chunk, "guidance": 1.0}, without_actions)):
        parts = iter(x_t[0].split(changes["chunk"] or x_t.shape[1]))
        monkeypatch.setattr(torch, "randn", lambda shape, generator: next(parts))
        chunks = list(rollout(sampled, meta | changes, [None], x_t.shape[1:], prompt, null, camera))
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
                mine[f"{prefix}enc_moments_{length}"] = vae.encoder(z, {})
            else:
                mine[f"{prefix}dec_{length}"] = vae.reconstruct(z, {})
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


@pytest.mark.parametrize("camera_on, action", [(False, False), (True, False), (True, True)],
                         ids=["no camera", "camera", "camera and action"])
@pytest.mark.parametrize("f, chunk, given", [(6, 2, 1), (5, 2, 3), (3, 1, 0), (4, 3, 1), (2, 2, 2)])
def test_cached_rollout_is_the_teacher_forced_pass(f, chunk, given, camera_on, action):
    net, (x_t, sigma, prompt, camera, x0) = random_hy_dit(action=action), hy_inputs(f, given=given)
    camera = camera if camera_on else None
    whole = net(x_t, sigma, prompt, camera, clean=x0, chunk=chunk)
    pieces, kv_cache = stream(net, x_t, sigma, x0, torch.zeros_like(sigma), prompt, camera, chunk)
    assert kv_cache.frames == f
    for layer in kv_cache.layers:
        frames = [piece[0].shape[2] // 6 for piece in layer]
        assert frames == [min(chunk, f - start) for start in range(0, f, chunk)]
        assert all(z.shape == piece[0].shape for piece in layer for z in piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_cached_text_is_the_text_read_again():
    net, (x_t, sigma, prompt, camera, x0) = random_hy_dit(), hy_inputs(4)
    now, then = slice(2, 4), slice(0, 2)
    kv_cache = net(*cut(then, x0, 0 * sigma), prompt, camera.frames(then), update_cache=True)
    x_t, sigma, here = x_t[:, now], sigma[:, now], camera.frames(now)
    cached = net(x_t, sigma, prompt, here, kv_cache=kv_cache)
    again = net(x_t, sigma, prompt, here, kv_cache=kv_cache._replace(text=None))
    torch.testing.assert_close(cached, again, atol=1e-5, rtol=1e-5)
    # once it is cached, the prompt's text is not looked at
    lost = prompt._replace(text=torch.full_like(prompt.text, torch.nan))
    assert torch.equal(net(x_t, sigma, lost, here, kv_cache=kv_cache), cached)


def test_a_stream_may_start_with_an_empty_cache():
    net, (x_t, sigma, prompt, camera, _) = random_hy_dit(), hy_inputs(2)
    prefilled = prefill(net, x_t, prompt, camera)
    first = [net(x_t, sigma, prompt, camera, kv_cache=kv_cache) for kv_cache in (prefilled, KVCache(0, []))]
    torch.testing.assert_close(*first, atol=1e-5, rtol=1e-5)
    # a bidirectional pass is another function: there, text reads the video
    assert (net(x_t, sigma, prompt, camera) - first[0]).abs().max() > 1e-3


def test_modulation_per_frame_is_modulation_per_token():
    net, f, s = random_hy_dit(), 4, 6
    block, x, e = net.blocks[0], torch.randn(2, f, s, 48), torch.randn(2, f, 48)
    text, e_text = torch.randn(2, 1, 5, 48), torch.randn(2, 1, 48)
    rope = rope_table(torch.arange(f), 2, 3, SMALL_HY.rope_bands, theta=256)
    P = projections(Camera(rigid(2, f), torch.eye(3).expand(2, f, 3, 3)))
    rest = None, [], True, False
    frames = block(x, e, text, e_text, None, None, rope, P, *rest)
    x, e, P = rearrange(x, "b f s d -> b (f s) 1 d"), e.repeat_interleave(s, 1), [z.repeat_interleave(s, 1) for z in P]
    tokens = block(x, e, text, e_text, None, None, rope, P, *rest)
    torch.testing.assert_close(rearrange(frames[0], "b f s d -> b (f s) 1 d"), tokens[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frames[1], tokens[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("forced", [False, True], ids=["bidirectional", "teacher forcing"])
def test_samples_of_a_batch_do_not_meet(forced):
    net, tensors = random_hy_dit(), hy_inputs(4)

    def run(x_t, sigma, prompt, camera, x0):
        return net(x_t, sigma, prompt, camera, clean=x0 if forced else None, chunk=2)

    alone = []
    for i in range(3):
        sample = [tree_map(lambda z, i=i: z[i : i + 1], tree) for tree in tensors]
        alone.append(run(*sample))
    torch.testing.assert_close(run(*tensors), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_padding_is_not_read():
    net, (x_t, sigma, prompt, camera, x0) = random_hy_dit(), hy_inputs(4)
    other = prompt._replace(
        text=torch.where(prompt.text_mask[..., None], prompt.text, 100 * torch.randn_like(prompt.text)),
        byt5=torch.where(prompt.byt5_mask[..., None], prompt.byt5, 100 * torch.randn_like(prompt.byt5)))
    for forced in ({}, {"clean": x0, "chunk": 2}):
        same = [net(x_t, sigma, z, camera, **forced) for z in (prompt, other)]
        torch.testing.assert_close(*same, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("leaf", ["text", "byt5", "vision", "given_latents"])
def test_every_part_of_the_prompt_is_read(leaf):
    net, (x_t, sigma, prompt, camera, x0) = random_hy_dit(), hy_inputs(4)
    z = getattr(prompt, leaf)
    other = prompt._replace(**{leaf: torch.where(z != 0, z + torch.randn_like(z), z)})
    for forced in ({}, {"clean": x0, "chunk": 2}):
        assert (net(x_t, sigma, prompt, camera, **forced) - net(x_t, sigma, other, camera, **forced)).abs().max() > 1e-3


def test_an_empty_prompt_is_finite():
    net, (x_t, sigma, prompt, camera, x0) = random_hy_dit(), hy_inputs(2)
    empty = tree_map(torch.zeros_like, prompt)
    assert net(x_t, sigma, empty, camera).isfinite().all()
    assert net(x_t, sigma, empty, camera, clean=x0, chunk=1).isfinite().all()


def test_a_clean_chunk_is_seen_by_later_noisy_chunks_only():
    net, (x_t, sigma, prompt, camera, x0) = random_hy_dit(), hy_inputs(10)
    other = x0.clone()
    other[:, 4:6] += torch.randn(3, 2, 4, 2, 3)  # chunk 2 of 0 .. 4
    change = change_per_chunk(*(net(x_t, sigma, prompt, camera, clean=clean, chunk=2) for clean in (x0, other)))
    assert change[:3].max() < 1e-6 and change[3:].min() > 1e-3


def test_the_released_cache_differs_once_there_is_a_past():
    nets, (x_t, sigma, prompt, camera, x0) = [random_hy_dit(), random_hy_dit()], hy_inputs(4)
    use_released_cache(nets[1], {"released_cache": True}, ORACLE)
    (first, later), (first_too, other) = (stream(net, x_t, sigma, x0, 0 * sigma, prompt, camera, 2)[0] for net in nets)
    assert torch.equal(first, first_too) and (later - other).abs().max() > 1e-3


def test_a_new_camera_branch_and_a_new_action_leave_the_base_output_unchanged(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset(HYDiT, SMALL_HY, None, None))
    base, net, (x_t, sigma, prompt, camera, _) = random_hy_dit(camera=False), random_hy_dit(), hy_inputs(4)
    weights, added = with_camera(base.state_dict(), "small")
    assert added == 2 * SMALL_HY.layers + 4 and with_camera(weights, "small")[1] == 0
    net.load_state_dict(weights)
    assert torch.equal(net(x_t, sigma, prompt, camera), base(x_t, sigma, prompt))
    assert net.action_in.mlp[0].weight.std() > 0.01  # two zeros in a row would never learn


def test_init_weights_sets_every_parameter_and_predicts_nothing():
    with torch.device("meta"):
        net = HYDiT(SMALL_HY)
    net.to_empty(device="cpu")
    for p in net.parameters():
        torch.nn.init.constant_(p, torch.nan)
    net.init_weights()
    assert all(p.isfinite().all() for p in net.parameters())
    assert net(*hy_inputs(3)[:4]).abs().max() == 0


def test_training_reaches_every_parameter_but_the_last_text_output():
    net, (x_t, sigma, prompt, camera, x0) = random_hy_dit().requires_grad_(True), hy_inputs(4)
    net(x_t, sigma, prompt, camera, clean=x0, chunk=2).square().sum().backward()
    last = net.blocks[-1]
    unread = ("txt_attn_q", "txt_attn_q_norm", "txt_attn_proj", "txt_mlp")
    unread = {id(p) for name in unread for p in last[name].parameters()}
    for name, p in net.named_parameters():
        assert (p.grad is None) == (id(p) in unread) and (p.grad is None or p.grad.abs().max() > 0), name


def test_what_a_frame_lacks_is_named():
    net, (x_t, sigma, prompt, camera, _) = random_hy_dit(), hy_inputs(4)
    with pytest.raises(ValueError, match="sigma"):
        net(x_t, sigma[:, 0], prompt)
    with pytest.raises(ValueError, match="viewmats"):
        net(x_t, sigma, prompt, camera.frames(slice(3)))


def steps_to_path(*steps):
    """Viewmats [1 f 4 4] of a camera that makes each step (right, down, forward, yaw, pitch) in its own axes, right and
    up being positive turns, in degrees."""
    c2w = [torch.eye(4, dtype=torch.float64)]
    for right, down, forward, yaw, pitch in steps:
        yaw, pitch = torch.tensor([yaw, pitch], dtype=torch.float64).deg2rad()
        step = torch.eye(4, dtype=torch.float64)
        turn = torch.tensor([[yaw.cos(), 0, yaw.sin()], [0, 1, 0], [-yaw.sin(), 0, yaw.cos()]], dtype=torch.float64)
        tilt = torch.tensor([[1, 0, 0], [0, pitch.cos(), -pitch.sin()], [0, pitch.sin(), pitch.cos()]],
                            dtype=torch.float64)
        step[:3, :3] = turn @ tilt
        step[:3, 3] = torch.tensor([right, down, forward], dtype=torch.float64)
        c2w.append(c2w[-1] @ step)
    return invert_se3(torch.stack(c2w))[None].float()


def test_an_action_label_is_9_times_the_motion_plus_the_turn():
    steps = {(0, 0, 0.1, 0, 0): 9, (0, 0, -0.1, 0, 0): 18, (0.1, 0, 0, 0, 0): 27, (-0.1, 0, 0, 0, 0): 36,
             (0, 0, 0, 2, 0): 1, (0, 0, 0, -2, 0): 2, (0, 0, 0, 0, 2): 3, (0, 0, 0, 0, -2): 4,
             (0.1, 0, 0.1, 0, 0): 45, (0, 0, 0.1, 2, 2): 9 + 5, (0, 0.1, 0, 0, 0): 0, (0, 0, 0.009, 0.04, 0): 0}
    assert action_labels(steps_to_path(*steps)).tolist() == [[0, *steps.values()]]


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [2, 2, 2, 1], [4, 3]])
def test_labels_chunk_by_chunk_are_those_of_the_whole_path(sizes, monkeypatch):
    net, (x_t, _, prompt, camera, _) = random_hy_dit(), hy_inputs(7, b=1)
    viewmats = steps_to_path((0, 0, 0.1, 0, 0), (0, 0, 0, 2, 0), (0.1, 0, 0, 0, -2), (0, 0, 0, 0, 0),
                             (0, 0, -0.1, 0, 0), (-0.1, 0, 0.1, -2, 0))
    camera, seen = camera._replace(viewmats=viewmats), []
    monkeypatch.setattr(model, "action_labels", lambda *args: seen.append(action_labels(*args)) or seen[-1])
    kv_cache, start = prefill(net, x_t, prompt, camera), 0
    assert kv_cache.last_pose is None
    for size in sizes:
        here = slice(start, start + size)
        kv_cache = update_cache(net, x_t[:, here], prompt, camera.frames(here), kv_cache=kv_cache)
        assert torch.equal(kv_cache.last_pose, viewmats[:, here][:, -1])
        start += size
    assert torch.equal(torch.cat(seen, dim=1), action_labels(viewmats))
    unchanged = update_cache(net, x_t[:, :0], prompt, camera.frames(slice(0)), kv_cache=kv_cache)
    assert torch.equal(unchanged.last_pose, kv_cache.last_pose)


def test_labels_are_for_networks_that_were_built_with_them(monkeypatch):
    x_t, sigma, prompt, camera, _ = hy_inputs(4)
    for action in (True, False):
        net = random_hy_dit(action=action)
        with monkeypatch.context() as patch:
            right = net(x_t, sigma, prompt, camera)
            patch.setattr(model, "action_labels", lambda viewmats, last_pose: 80 - action_labels(viewmats, last_pose))
            assert torch.equal(net(x_t, sigma, prompt, camera), right) is not action
        kv_cache = update_cache(net, x_t, prompt, camera)
        assert (kv_cache.last_pose is not None) == action
        assert update_cache(net, x_t, prompt, None).last_pose is None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rollout_is_euler_and_update_cache_by_hand(guidance):
    def rng():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    net, (_, _, prompt, camera, _) = random_hy_dit(), hy_inputs(4)
    null = prompt._replace(text=torch.zeros_like(prompt.text), byt5_mask=torch.zeros_like(prompt.byt5_mask))
    meta = {"sampling_steps": 2, "shift": 5.0, "guidance": guidance, "sampler": "euler", "chunk": 2, "camera": True}
    chunks = list(rollout(net, meta, rng(), (4, 4, 2, 3), prompt, null, camera))
    noise = torch.stack([torch.randn(4, 4, 2, 3, generator=g) for g in rng()])
    prompts = [prompt] if guidance == 1 else [prompt, null]
    kv_caches = [update_cache(net, noise[:, :0], text, camera.frames(slice(0))) for text in prompts]
    for x0, frames in zip(chunks, (slice(0, 2), slice(2, 4)), strict=True):
        here = camera.frames(frames)
        expected = euler(net, [noise[:, frames]], noise_levels(2, 5.0), prompts, here, guidance, kv_caches,
                         torch.ones(3, 2))
        torch.testing.assert_close(x0, expected, atol=1e-5, rtol=1e-5)
        kv_caches = [update_cache(net, x0, text, here, past) for text, past in zip(prompts, kv_caches, strict=True)]


def test_a_prompt_is_chosen_leaf_by_leaf():
    prompt, null = hy_inputs(2)[2], hy_inputs(2)[2]._replace(text=torch.zeros(3, 7, 24))
    mixed = where_prompt(torch.tensor([False, True, False]), null, prompt)
    for z, a, b in zip(mixed, prompt, null, strict=True):
        assert torch.equal(z[[0, 2]], a[[0, 2]]) and torch.equal(z[1], b[1])


@pytest.mark.filterwarnings("error::UserWarning:torch.distributed.fsdp")
def test_sharding_changes_nothing():
    start_process_group()
    try:
        with torch.device("meta"):
            net = HYDiT(SMALL_HY)
        whole, (x_t, sigma, prompt, camera, x0) = random_hy_dit(), hy_inputs(4)
        net = shard(net, whole.state_dict(), torch.device("cpu"), train=True)
        for forced in ({}, {"clean": x0, "chunk": 2}):
            torch.testing.assert_close(*(z(x_t, sigma, prompt, camera, **forced) for z in (net, whole)))
        pieces = [stream(z, x_t, sigma, x0, 0 * sigma, prompt, camera, 2)[0] for z in (net, whole)]
        torch.testing.assert_close(*pieces)
        pieces[0][-1].square().sum().backward()
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- 3. VAE


def streamed(step, pieces, axis):
    """Each piece after the others, their outputs joined along `axis`."""
    feat_cache, outputs = None, []
    for piece in pieces:
        output, feat_cache = step(piece, feat_cache)
        outputs.append(output)
    return torch.cat(outputs, dim=axis)


@pytest.mark.parametrize("recall", [True, False])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_streamed_vae_is_the_whole_vae(sizes, recall):
    vae, video, latents = random_hy_vae(recall), torch.rand(2, 3, 13, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 2, 3)
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
              for vae in (random_hy_vae(True), random_hy_vae(False))]
    assert change[0] > 1e-4 and change[1] == 0


def test_a_latent_depends_on_no_later_frame_and_a_frame_on_no_later_latent():
    vae, video, latents = random_hy_vae(), torch.rand(1, 3, 17, 8, 8) * 2 - 1, torch.randn(1, 5, 4, 2, 2)
    encoded, decoded = vae.encode(video)[0], vae.decode(latents)[0]
    for f, t in ((1, 1), (2, 5), (4, 13)):
        torch.testing.assert_close(vae.encode(video[:, :, :t])[0], encoded[:, :f], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(latents[:, :f])[0], decoded[:, :, :t], atol=1e-5, rtol=1e-5)


def test_feat_cache_can_be_used_twice():
    check_feat_cache_is_left_as_it_was(random_hy_vae(), torch.randn(1, 4, 4, 2, 2), torch.rand(1, 3, 9, 16, 16))
