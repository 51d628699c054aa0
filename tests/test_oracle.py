"""
Our code against numbers recorded from the public code (minWM, Wan2.1, Self-Forcing) at toy size in fp32, and our full
sizes against the names and shapes of the released networks.

A case file holds weights, inputs and outputs, and a description of the call. Each kind of case has a function below
that computes the outputs with our code; any that it leaves out must be named in UNCHECKED, with the reason. Where the
public code is wrong, the comment says so and what is compared instead.
"""
import json
import re
from fnmatch import fnmatch
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

import data
from data import K_WIDE, Batch, build_umt5, embed_tokens, intrinsics, parse_trajectory, umt5_name
from distill_cd import consistency_loss
from distill_ode import ode_loss
from helpers import ORACLE, dense_mask, without_last_clean_chunk
from model import (
    SAMPLERS, WAN_VAE, Block, Camera, ChannelNorm, DiTConfig, KVCache, RMSNorm, VAEConfig, WanDiT, WanVAE,
    action_labels, add_noise, apply_projection, build, guide, noise_levels, projections, rolling_cache, rollout,
    rope_table, shift_sigma, teacher_forcing_segments, update_ema, velocity_to_x0,
)
from train_camera import flow_matching_loss
from train_dmd import dmd_loss, fake_score_loss, generator_loss, noised, predict, self_rollout


class Case(NamedTuple):
    config: dict
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def read_case(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    part = lambda prefix: {name.removeprefix(prefix): z for name, z in tensors.items() if name.startswith(prefix)}
    return Case(config, part("w/"), part("in/"), part("out/"))


def tolerance(config, name, recorded):
    """As the recordings' README has it: 50 times their rerun noise or 2e-5 of the largest value; tables of noise levels
    1e-6 of their range; whole numbers and masks exact."""
    if not recorded.is_floating_point():
        return 0.0
    if name.endswith("_sigmas"):
        return 1e-6
    if name.endswith("_timesteps") or "_warped_" in name:
        return 1e-3
    noise = config.get("rerun_noise_max_abs", {}).get(name, 0.0)
    return max(50 * noise, 2e-5 * recorded.double().abs().max().item(), 1e-7)


def level(t):
    """Their noise levels, 0 .. 1000, as ours. In fp64: t / 1000 in fp32, times 1000, is off by half the tolerance."""
    return t.double() / 1000


def theirs(video):
    return rearrange(video, "b f c h w -> b c f h w")


def ours(video):
    return rearrange(video, "b c f h w -> b f c h w")


def network(case):
    c = case.config["ctor"]
    sizes = "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "text_dim", "freq_dim"
    net = WanDiT(DiTConfig(*(c[size] for size in sizes)), camera=any("prope_o" in name for name in case.weights))
    net.load_state_dict(case.weights)
    return net


def prompts(case):
    """Padded with zero rows to the length that the network was built for, which nothing masks: [b l d]."""
    texts = [case.inputs[f"ctx_{i}"] for i in range(sum(name.startswith("ctx_") for name in case.inputs))]
    return torch.stack([F.pad(text, (0, 0, 0, case.config["ctor"]["text_len"] - len(text))) for text in texts])


def cameras(case):
    return Camera(case.inputs["viewmats"], case.inputs["Ks"]) if "viewmats" in case.inputs else None


def part(frames, camera):
    return camera and camera.frames(frames)


def sample(sampler, net, x_t, sigmas, prompts=(None,), guidance=1.0):
    """One chunk, without camera or past, none of its frames given."""
    generated = x_t.new_ones(x_t.shape[:2])
    return SAMPLERS[sampler](net, [x_t], sigmas, prompts, None, guidance, [None] * len(prompts), generated)


# ---------------------------------------------------------------------------------------------------- 1-2. Whole videos


@torch.no_grad()
def wan_bidirectional(case, _):
    net, text, i = network(case), prompts(case), case.inputs
    run = lambda x, t, text: theirs(net(ours(x[None]), level(t).expand(1, x.shape[1]), text[None]))[0]
    mine = {"flow": torch.stack([run(x, t, c) for x, t, c in zip(i["x"], i["t"], text, strict=True)])}
    # theirs pads samples of different size to one length and masks the padding; ours takes each at its own
    for name in (name for name in i if name.startswith("ragged_x_")):
        n = int(name.removeprefix("ragged_x_"))
        mine[f"ragged_{n}"] = run(i[name], i["t"][n], text[n])
    positions, half = case.outputs["rope_freqs_re"].shape
    assert sum(net.cfg.rope_bands) == 2 * half
    table = rope_table(torch.arange(positions), positions, positions, net.cfg.rope_bands, theta=10000)
    diagonal = torch.arange(positions) * (positions**2 + positions + 1)  # frame, row and column p
    return mine | {"rope_freqs_re": table[diagonal, 0].real, "rope_freqs_im": table[diagonal, 0].imag}


@torch.no_grad()
def wan_prope(case, _):
    net, text, x = network(case), prompts(case), ours(case.inputs["x"])
    sigma = level(case.inputs["t"])[:, None].expand(x.shape[:2])
    return {"flow_cam": theirs(net(x, sigma, text, cameras(case))), "flow_nocam": theirs(net(x, sigma, text))}


# ------------------------------------------------------------------------------------------------- 3. Chunk after chunk


@torch.no_grad()
def teacher_forcing(case, _):
    net, text, i, chunk = network(case), prompts(case), case.inputs, case.config["num_frame_per_block"]
    x, clean, mine = ours(i["x"]), ours(i["clean_x"]), {}
    for name, camera in [("nocam", None)] + [("cam", cameras(case))] * ("viewmats" in i):
        mine[f"tf_{name}"] = theirs(net(x, level(i["t"]), text, camera, clean=clean, chunk=chunk))
        # our forced pass has its clean half at level 0 only; the cached pass, equal to it, can be told another level
        kv_cache, chunks = None, []
        for start in range(0, x.shape[1], chunk):
            here = slice(start, start + chunk)
            pose, sigma, cleaned = part(here, camera), level(i["t_perframe"][:, here]), level(i["aug_t"][:, here])
            chunks.append(net(x[:, here], sigma, text, pose, kv_cache=kv_cache))
            kv_cache = net(clean[:, here], cleaned, text, pose, kv_cache=kv_cache, update_cache=True)
        mine[f"tf_perframe_aug_{name}"] = theirs(torch.cat(chunks, dim=1))
    f, s = x.shape[1], x.shape[3] * x.shape[4] // 4
    case.outputs["tf_token_mask"] = without_last_clean_chunk(case.outputs["tf_token_mask"], f, chunk, s)
    return mine | {"tf_token_mask": dense_mask(teacher_forcing_segments(f, chunk), s).to(torch.uint8)}


@torch.no_grad()
def cached(case, _):
    net, text, i, c = network(case), prompts(case), case.inputs, case.config
    chunk, s, camera, kv_cache, mine = c["frames_per_chunk"], c["frame_seqlen"], cameras(case), None, {}
    frames = i["pass0_x"].shape[2]
    for n in range(frames // chunk):
        here = slice(n * chunk, (n + 1) * chunk)
        if kv_cache and c["ctor"]["local_attn_size"] != -1:  # a rolling cache; these cases set its size apart
            sink = c["ctor"]["sink_size"]
            kv_cache = rolling_cache(kv_cache, s, sink, c["kv_cache_frames"] - sink - chunk)
        for p, t in enumerate(i["pass_t"]):
            x = ours(i[f"pass{p}_x"])[:, here]
            call = x, level(t).expand(x.shape[:2]), text, part(here, camera)
            mine[f"chunk{n}_pass{p}"] = theirs(net(*call, kv_cache=kv_cache))
        kv_cache = net(*call, kv_cache=kv_cache, update_cache=True)  # the last pass is at level 0
    for name, *z in zip(("cache_k", "cache_v", "prope_cache_k", "prope_cache_v"), *kv_cache.layers[0]):
        mine[f"final_{name}_layer0"] = rearrange(torch.cat(z, dim=2), "b nh n hd -> b n nh hd")
    held, end = sum(piece[0].shape[2] for piece in kv_cache.layers[0]), kv_cache.frames * s
    return mine | {"final_local_end": torch.tensor([held]), "final_global_end": torch.tensor([end])}


def gradients(case, _):
    net, i = network(case), case.inputs
    x, clean = (ours(i[name]).requires_grad_() for name in ("x", "clean_x"))
    y = net(x, level(i["t"]), prompts(case), cameras(case), clean=clean, chunk=case.config["num_frame_per_block"])
    (theirs(y) * i["probe"]).sum().backward()
    mine = {"tf_cam": theirs(y.detach()), "grad_x": theirs(x.grad), "grad_clean_x": theirs(clean.grad)}
    return mine | {f"grad/{name}": p.grad for name, p in net.named_parameters()}


# ----------------------------------------------------------------------------------------------------------- 4. The VAE


@torch.no_grad()
def wan_vae(case, _):
    """Whole and in pieces, one latent frame at a time; both must give the recorded numbers."""
    c, i, mine = case.config["ctor"], case.inputs, {}
    vae = WanVAE(VAEConfig(c["dim"], c["z_dim"], tuple(c["dim_mult"]), c["num_res_blocks"],
                           tuple(c["temperal_downsample"]), tuple(i["mean"].tolist()), tuple(i["std"].tolist())))
    vae.load_state_dict(case.weights)
    for name, z in i.items():
        kind, _, n = name.partition("_")
        if kind == "latent":
            mine[f"dec_{n}"], feat_cache, pieces = vae.decode(ours(z))[0], None, []
            for latent in ours(z).split(1, dim=1):
                piece, feat_cache = vae.decode(latent, feat_cache)
                pieces.append(piece)
            streamed = f"dec_{n}", torch.cat(pieces, dim=2)
        elif kind == "video":
            mine[f"enc_{n}"], feat_cache, pieces = theirs(vae.encode(z)[0]), None, []
            for frames in [z[:, :, :1], *z[:, :, 1:].split(4, dim=2)] if z.shape[2] > 1 else [z]:
                piece, feat_cache = vae.encode(frames, feat_cache)
                pieces.append(theirs(piece))
            streamed = f"enc_{n}", torch.cat(pieces, dim=2)
        else:
            continue
        compare(case, dict([streamed]))
    return mine


# --------------------------------------------------------------------------------------------------------- 7. Schedules


def schedules(case, _):
    a, b, c = case.config["toy_abc"]
    toy = lambda x, sigma, *_, **__: a * x + b + c * sigma[..., None, None, None] * x.sin()
    i, mine = case.inputs, {}
    for name, recorded in case.outputs.items():
        shift = float(re.search(r"shift([\d.]+)_|$", name)[1] or 0)
        steps = int(re.search(r"(?:steps|infer)(\d+)_|$", name)[1] or 1000)
        kind, quantity = name.split("_")[0], name.split("_", 2)[-1]
        levels = noise_levels(steps, shift, 0.999 if kind == "unipc" else 1.0)
        table = torch.tensor(levels)
        if any(fnmatch(name, pattern) for pattern in UNCHECKED["case7_sched"]):
            continue
        elif quantity.endswith("_sigmas"):
            mine[name] = table[: len(recorded)]  # some tables hold the final zero
        elif quantity.endswith("_timesteps"):
            mine[name] = 1000 * table[:-1]
            if kind in ("unipc", "dpmpp"):  # truncated to whole numbers, so not the level that x is at: theirs is wrong
                mine[name] = mine[name].floor()
        elif "warped" in quantity:
            mine[name] = 1000 * shift_sigma(torch.tensor([float(n) for n in quantity.split("_")[1:]]) / 1000, shift)
        elif name.endswith("_traj"):
            # their UniPC is at sigma and tells its network int(1000 sigma); ours tells the truth, so for the comparison
            # the network truncates for itself. The states are what it is called with, and the end.
            states = []

            def net(x, sigma, *_, **__):
                states.append(x[0, 0, 0])
                return toy(x, (1000 * sigma).floor() / 1000 if kind == "unipc" else sigma)

            end = sample("unipc" if kind == "unipc" else "euler", net, i["toy_x"][None, None, None], levels)[0, 0, 0]
            mine[name] = torch.stack([*states[1:], end])
        else:
            # their levels are looked up in the table of 1000: t = 0 becomes 0.005 (and in `step`, one entry at the end
            # of the table sends all to zero). Ours are exact; here they are given the looked-up ones.
            index = (i["t_query"][:, None] - 1000 * table[:-1]).abs().argmin(1)
            index = i["hy_idx"].long() if kind == "hy" else index
            sigma, x0, noise, flow = table[index][None], *(i[name][None] for name in ("x0", "noise", "flow"))
            lower = table[index + 1] if index.max() < steps - 1 else torch.zeros(len(index))
            steps_down = [sample("euler", lambda *_, **__: v[None, None], x[None, None], [s, to])[0, 0]
                          for v, x, s, to in zip(i["flow"], i["noise"], sigma[0].tolist(), lower.tolist(), strict=True)]
            mine[name] = {
                "add_noise": add_noise(x0, noise, sigma)[0], "flow_to_x0": velocity_to_x0(flow, noise, sigma)[0],
                "pred_x0": velocity_to_x0(flow, noise, sigma)[0], "step": torch.stack(steps_down),
                "x0_to_flow": ((noise - x0) / sigma[..., None, None, None])[0],
            }[quantity]
    return mine


# ----------------------------------------------------------------------------------------------------------- 8. Cameras


def prope(case, _):
    i, mine = case.inputs, {}
    f = i["viewmats"].shape[1]
    frames = lambda z: rearrange(z, "b nh (f s) hd -> b f s (nh hd)", f=f)
    heads = lambda z: rearrange(z, "b f s (nh hd) -> b nh (f s) hd", nh=i["q"].shape[1])
    for name, Ks in ("K", i["Ks"]), ("noK", torch.eye(3).expand_as(i["Ks"])):
        P, P_inv = projections(Camera(i["viewmats"], Ks))
        for of, matrix, z in ("q", P.mT, i["q"]), ("k", P_inv, i["k"]), ("v", P_inv, i["v"]), ("o", P, i["o_in"]):
            mine[f"{name}_{of}"] = heads(apply_projection(frames(z), matrix))
    return mine


def trajectories(case, monkeypatch):
    mine = {}
    K = intrinsics(K_WIDE)
    for project in "wan", "hy":
        if project == "hy":  # u and dn move Wan's camera and, by mistake, not HY's: ours follows Wan
            for key in "u", "dn":
                monkeypatch.setitem(data.KEYS, key, (data.KEYS[key][0], (0, 0, 0), 0, 0))
        for n, text in enumerate(case.config["strings"]):
            viewmats = parse_trajectory(text)[None]
            mine |= {f"{project}_{n}_viewmats": viewmats, f"{project}_{n}_Ks": K.expand(1, viewmats.shape[1], 3, 3)}
            labels = action_labels(viewmats[0])  # their labels from keys, not those from poses, swap left and right
            swapped = torch.tensor([0, 1, 2, 4, 3, 6, 5, 8, 7])[labels // 9] * 9 + labels % 9
            mine |= {f"labels_from_poses_{n}": labels, f"labels_from_string_{n}": swapped}
    return mine | {"labels_from_random_poses": action_labels(case.inputs["random_viewmats"][0])}


# ----------------------------------------------------------------------------------------------- 9. Losses and rollouts


class RecordedBatch(Batch):
    """A batch on which `rand`, `rand_per_chunk` and `noise` can be set, to hand out what was recorded."""


def make_batch(x0, camera=None, prompt=None, null=None, states=None, noise=()):
    """No frame is given; noise: what `noise` hands out, call after call, whatever frames it is asked for."""
    rng = [torch.Generator()] * len(x0)
    batch = RecordedBatch(x0, prompt, null, camera, torch.ones(x0.shape[:2]), rng, [], states)
    supply = iter(noise)
    batch.noise = lambda *_: next(supply)
    return batch


def towards(x0):
    """A network that always predicts this video."""
    return lambda x_t, sigma, *_, **__: (x_t - x0) / sigma[..., None, None, None]


def algorithms(case, _):
    i, c = case.inputs, case.config
    clean, flow, noise, sigma = i["clean"], i["flow"], i["noise"], i["sigma"][..., 0, 0, 0]
    mine = {"apply_cfg": guide(i["v_cond"], i["v_uncond"], c["guidance_scale"]),
            "add_flow_noise": add_noise(clean, noise, sigma),
            "pred_x0_from_flow": velocity_to_x0(flow, i["latent_t"], sigma)}

    # flow matching, of stage 0 and of the critic: the target is read off the gradient by a prediction of zero
    meta, text = {"shift": 5.0, "camera": False, "chunk": 2, "guidance": 3.0}, torch.zeros(1, 1, 1)
    batch = lambda: make_batch(clean, prompt=text, null=text, noise=[noise])
    loss = lambda v: flow_matching_loss(lambda *_: v, batch(), meta, 0.0)
    zero = torch.zeros_like(flow, requires_grad=True)
    mine |= {"fm_loss": loss(flow), "flow_target": torch.autograd.grad(loss(zero), zero)[0] * -zero.numel() / 2}
    mine["critic_loss"] = fake_score_loss(clean, lambda *_: flow, batch(), meta)

    # distribution matching; of their three normalisers ours is per_sample
    def dmd(x, real):
        x = x.clone().requires_grad_()
        loss = dmd_loss(x, real, i["fake_x0"])
        return loss.detach(), torch.autograd.grad(loss, x)[0]
    mine["dmd_loss_per_sample"], mine["dmd_loss_grad_per_sample"] = dmd(i["gen_out"], i["real_x0"])
    mine["kl_grad_per_sample"] = mine["dmd_loss_grad_per_sample"] * clean.numel()
    mine["kl_grad_zero_normaliser"] = dmd(i["gen_out"], i["gen_out"])[1] * clean.numel()

    # consistency: one Euler step of the guided teacher, and student against target
    given = lambda x_t, sigma, prompt, *_, **__: i[prompt]
    step = sample("euler", given, i["latent_t"], [0.875, 0.8125], ("v_cond", "v_uncond"), c["guidance_scale"])
    mine |= {"cd_teacher_step_1000": step, "cd_teacher_step_scalar": step}
    student, ema, teacher = towards(i["fake_x0"]), towards(i["real_x0"]), towards(clean)
    mine["cd_loss"] = consistency_loss(student, ema, teacher, batch(), [1.0, 0.9, 0.8], meta)

    # ODE regression: which state of the trajectory each frame starts from is theirs to draw, the rest is ours
    levels, trajectory = [n / 1000 for n in c["denoising_steps"]], i["ode_trajectory"]
    index = torch.stack([(case.outputs["ode_timestep"] / 1000 - level).abs() for level in levels]).argmin(0)
    count, seen = trajectory.shape[1] - 2, []  # noisy states; then the end point, and the clean video

    def ode(x0, states):
        batch = make_batch(x0, states=states)
        batch.rand_per_chunk = lambda _: (index + 0.5) / count
        return ode_loss(net, batch, [*levels[:count], 0.0], {"chunk": 1})

    def net(x_t, sigma, *_, clean, chunk):
        seen.append((x_t, sigma, clean))
        return v_zero if len(seen) == 1 else towards(i["fake_x0"])(x_t, sigma)
    v_zero = torch.zeros_like(clean, requires_grad=True)
    pull, = torch.autograd.grad(ode(trajectory[:, -1], trajectory[:, :-1]), v_zero)
    mine["ode_noisy"], ode_sigma, mine["ode_clean"] = seen[0]
    spread = ode_sigma[..., None, None, None]
    mine |= {"ode_timestep": 1000 * ode_sigma, "ode_target": mine["ode_noisy"] + pull * v_zero.numel() / 2 / spread}
    mine["ode_loss"] = ode(trajectory[:, -1], torch.cat([trajectory[:, :count], i["real_x0"][:, None]], dim=1))

    ema, trained = (nn.ParameterList([i[name].clone()]) for name in ("fake_x0", "real_x0"))
    update_ema(ema, trained, 0.99)
    return mine | {"ema_0p99": ema[0]}


def dmd_and_self_rollout(case, _):
    i, c, mine = case.inputs, case.config, {}
    coefficient = re.compile(r"(\w+)(?: \(a,b,d\)=| )\((-?[\d.]+),(-?[\d.]+),(-?[\d.]+)\)")
    toys = {name: tuple(map(float, abd)) for name, *abd in coefficient.findall(c["toy"])}
    calls = []

    def toy(name):
        a, b, d = toys[name]

        def net(x_t, sigma, text, camera, kv_cache=None, update_cache=False):
            start = kv_cache.frames if kv_cache else 0
            if name == "generator" and x_t.shape[1]:  # our cache of no frames, which starts a stream, is not theirs
                calls.append((1000 * sigma[0, 0].item(), start, torch.is_grad_enabled()))
            if update_cache:
                return KVCache(start + x_t.shape[1], [])
            at, (viewmats, Ks) = lambda z: z[..., None, None, None], camera
            x0 = a * x_t + b * text + at(d * sigma + 0.1 * viewmats[:, :, 0, 3] + 0.05 * Ks[:, :, 0, 0])
            return (x_t - x0) / at(sigma)
        return net

    # the self-rollout. Their exit flags hold one draw per chunk, of which the first counts for all, as with us. Theirs
    # also caches the last chunk, to which nothing comes after: ours does not, so that call is added to the record.
    chunk, count, n = c["num_frame_per_block"], len(i["denoising_steps"]), 0
    meta = {"chunk": chunk, "sampling_steps": count, "shift": c["shift"], "camera": True}
    levels = noise_levels(count, c["shift"])
    batch = lambda *noise: make_batch(torch.zeros_like(i["sf_noise"]), cameras(case), i["c_cond"], i["c_uncond"],
                                      noise=noise)
    for steps in i["warped_steps"], 1000 * shift_sigma(i["denoising_steps"] / 1000, c["shift"]):
        torch.testing.assert_close(1000 * torch.tensor(levels[:-1]), steps, atol=1e-3, rtol=0)
    b, f = i["sf_noise"].shape[:2]
    while f"sf{n}_output" in case.outputs:
        exit_step = int(case.outputs[f"sf{n}_exit_flags"][0])
        again = lambda at: [rearrange(i[f"sf{n}_renoise_{at * exit_step + k}"], "(b f) c h w -> b f c h w", b=b)
                            for k in range(exit_step)]
        starts = i["sf_noise"].split(chunk, dim=1)
        calls.clear()
        generator = toy("generator")
        drawn = batch(*[level for at, noise in enumerate(starts) for level in (noise, *again(at))])
        mine[f"sf{n}_output"], passes = self_rollout(generator, drawn, meta, exit_step)
        made = [(t, start) for t, start, _ in calls] + [(0.0, f - chunk)]
        assert not any(grad for *_, grad in calls)
        # theirs keeps the graph of a chunk's last pass; ours makes that pass again
        calls.clear()
        x = torch.cat([predict(generator, drawn, last) for last in passes], dim=1)
        torch.testing.assert_close(x, mine[f"sf{n}_output"], atol=0, rtol=0)
        assert all(grad for *_, grad in calls)
        record = [(t, start, (t, start, True) in calls) for t, start in made]
        for quantity, of in zip(("t", "start_frame", "grad"), zip(*record)):
            mine[f"sf{n}_call_{quantity}"] = torch.tensor(of, dtype=torch.float32)
        n += 1

    # the losses on a given rollout. Their real score is guided as cond + s (cond - null): our s + 1.
    image = i["image"].clone().requires_grad_()

    def drawn():
        draw = batch(i["dmd_noise"])
        draw.rand = lambda *_: i["raw_t"] / 1000
        return draw

    loss = generator_loss(image, toy("real"), toy("fake"), drawn(), meta, c["guidance"] + 1)
    gradient, = torch.autograd.grad(loss, image)
    _, _, sigma = noised(image, drawn(), meta)
    mine |= {"dmd_loss": loss, "dmd_loss_grad": gradient, "dmd_gradient_norm": (gradient * image.numel()).abs().mean(),
             "dmd_timestep": 1000 * sigma, "critic_timestep": 1000 * sigma}
    return mine | {"critic_loss": fake_score_loss(image, toy("fake"), drawn(), meta)}


# --------------------------------------------------------------------------------------------------------- 10. The text


@torch.no_grad()
def text_encoder(case, _):
    net, ids, mask = build_umt5(case.weights), case.inputs["ids"], case.inputs["mask"]
    hidden = net(ids, attention_mask=mask).last_hidden_state
    return {"hidden": hidden, "hf_last_hidden_state": hidden, "prompt_embeds": embed_tokens(net, ids, mask)}


# ------------------------------------------------------------------------------------------------------- 11. End to end


def pipelines(case, monkeypatch):
    """Through `rollout`, fed with the recorded noise."""
    net, i, c = network(case), case.inputs, case.config
    b, f, chunk = *i["noise"].shape[:2], c.get("frames_per_block", 0)
    meta = {"shift": c["shift"], "chunk": chunk, "camera": True}
    if c["ctor"].get("local_attn_size", -1) != -1:
        meta |= {"window": c["ctor"]["local_attn_size"], "sink": c["ctor"]["sink_size"], "absolute_positions": True}
    if "denoising_step_list" in c:
        n = len(c["denoising_step_list"])
        levels = shift_sigma(torch.tensor(c["denoising_step_list"]) / 1000, c["shift"])
        torch.testing.assert_close(i["warped_steps"], 1000 * levels, atol=1e-3, rtol=0)
        torch.testing.assert_close(levels, torch.tensor(noise_levels(n, c["shift"])[:-1]))
        meta |= {"sampler": "few_step", "sampling_steps": n, "guidance": 1.0}
        again = lambda at: [rearrange(i[f"renoise_{at * (n - 1) + k}"], "(b f) c h w -> b f c h w", b=b)
                            for k in range(n - 1)]
        told = net
    else:
        meta |= {"sampler": "unipc", "sampling_steps": c["steps"], "guidance": c["guidance_scale"]}
        again = lambda _: []
        # their network is told int(1000 sigma) where the sampler is at sigma: ours tells the truth, see case 7
        told = lambda x, sigma, *rest, **past: net(x, (1000 * sigma).floor() / 1000, *rest, **past)
        told.cfg = net.cfg
    starts = i["noise"].split(chunk or f, dim=1)
    supply = iter([z for at, noise in enumerate(starts) for level in (noise, *again(at)) for z in level])
    monkeypatch.setattr(torch, "randn", lambda shape, generator: next(supply))
    text, null = (i[name].expand(b, -1, -1) if name in i else None for name in ("prompt_embeds", "negative_embeds"))
    chunks = rollout(told, meta, [None] * b, tuple(i["noise"].shape[1:]), text, null, cameras(case))
    return {"latents": torch.cat(list(chunks), dim=1)}


# ----------------------------------------------------------------------------------------------------------- 13. Layers


@torch.no_grad()
def probes(case, _):
    """Inputs so small that eps shows."""
    from transformers.models.umt5.modeling_umt5 import UMT5Attention
    i, mine = case.inputs, {}
    d, scale = i["x"].shape[-1], torch.tensor([1.0, 1e-3, 1e-5])[:, None, None]
    weight = {"weight": i["weight"]}
    rms, block = RMSNorm(d), Block(DiTConfig(d, d, 1, 1, 1, 1), camera=False)
    rms.load_state_dict(weight)
    block.norm3.load_state_dict(weight | {"bias": i["bias"]})
    mine |= {"wan_rmsnorm_eps1e-6": rms(i["x"]), "wan_layernorm_noaffine_eps1e-6": block.norm1(i["x"]),
             "wan_layernorm_affine_eps1e-6": block.norm3(i["x"])}
    torch.testing.assert_close(block.norm2(i["x"]), block.norm1(i["x"]))
    for dims, x in (3, i["x_video"]), (2, i["x_video"][:, :, 0]):
        norm = ChannelNorm(d, dims)
        norm.gamma.copy_(i["weight"].view(-1, *[1] * dims))
        mine[f"wan_vae_rmsnorm{dims}d"] = norm(x)
    net = WanDiT(DiTConfig(d, d, 1, 1, 1, 1, freq_dim=case.outputs["wan_sinusoid_fp64"].shape[1]))
    net.time_embedding = nn.Identity()
    net.time_projection = nn.Linear(net.cfg.freq_dim, 6)
    mine["wan_sinusoid_fp64"] = net.embed_time(level(i["t"])[None])[0][0]

    umt5 = build_umt5({name: torch.zeros(shape) for name, shape in {
        "token_embedding.weight": (8, d), "norm.weight": (d,), "blocks.0.norm1.weight": (d,),
        "blocks.0.norm2.weight": (d,), **{f"blocks.0.attn.{z}.weight": (d, d) for z in "qkvo"},
        "blocks.0.pos_embedding.embedding.weight": (32, 4), "blocks.0.ffn.gate.0.weight": (d, d),
        "blocks.0.ffn.fc1.weight": (d, d), "blocks.0.ffn.fc2.weight": (d, d)}.items()}).requires_grad_(False)
    norm = umt5.encoder.block[0].layer[0].layer_norm
    norm.weight.copy_(i["weight"])
    attention = umt5.encoder.block[0].layer[0].SelfAttention
    assert isinstance(attention, UMT5Attention)
    return mine | {
        "t5_layernorm_eps1e-6": norm(i["x"]),
        "t5_gelu": umt5.encoder.block[0].layer[1].DenseReluDense.act(3 * i["x"] / scale),
        "t5_rel_bucket": attention._relative_position_bucket(torch.arange(-300, 301)[None]).float()}


# ---------------------------------------------------------------------------------------------------------- All of them

HY = "case5a_hv15 case5b_minwm_hy_ar case5c_minwm_hy_prope case6_hy_vae case12_hy_sampling".split()  # in test_hy.py
OUTSIDE = {  # the recipe
    "case1b_wan_i2v": "Wan's image branch: our worlds start from text, or from given latent frames",
    "case3b_sf_blockcausal*": "block-causal without a clean context: minWM's recipe is teacher forcing, not this",
}
KINDS = {
    "case1_wan_bidir": wan_bidirectional, "case2_wan_prope_bidir": wan_prope, "case3a_*_tf*": teacher_forcing,
    "case3c_*_cache_*": cached, "case3d_*_tf_grads": gradients, "case4_wan_vae": wan_vae, "case7_sched": schedules,
    "case8_prope": prope, "case8_traj": trajectories, "case9_algorithms": algorithms,
    "case9_wan_dmd_sf": dmd_and_self_rollout, "case10_t5": text_encoder, "case11_wan_*": pipelines,
    "case13_probes": probes,
}
DRAWN = "drawn by their generators; ours come from each sample's own, and tests of the stages cover them"
UNCHECKED = {  # kind: {outputs: why they are not compared}
    "case7_sched": {
        "dpmpp_*_traj": "DPM++ is an option that no public configuration selects",
        "hy_cm_*": "HunyuanVideo's consistency sampler: not in minWM's recipe",
        "*_train_weights": "a loss weight that falls to zero at pure noise, where every sample starts: ours has none",
        "*_training_weight": "the same weight, looked up",
        "wan_default_sigma_min_*": "the class's default sigma_min; every configuration sets 0",
    },
    "case8_traj": {
        "charstr_*": "a third dialect, one character a pixel frame, that nothing in the recipe reads",
    },
    "case9_algorithms": {
        "kl_grad_global": "normalised over the batch: a video's gradient would depend on its neighbours",
        "kl_grad_none": "not normalised at all", "dmd_loss_*global*": "see kl_grad_global",
        "dmd_loss_*none*": "see kl_grad_none", "dmd_loss_*_masked": "masks of the gradient, which minWM never sets",
        "gradient_mask": "see dmd_loss_*_masked", "apply_gradient_mask*": "see dmd_loss_*_masked",
        "*_weighted": "the loss weight of case 7", "*_loss_w": "the loss weight of case 7",
        "*_w_mask": "the loss weight of case 7", "cd_loss_none": "cd_loss before its mean",
        "cd_pairs_seeded*": DRAWN, "exit_*": DRAWN,
    },
    "case9_wan_dmd_sf": {
        "sf*_exit_flags": "an input in disguise: the exit step that is rolled out to",
        "sf*_from_to": "the range of noise levels tied to the exit step, switched off in minWM's configurations",
    },
    "case13_probes": {"hy_*": "compared in test_hy.py"},
}


def compare(case, mine):
    wrong = []
    for name, z in mine.items():
        recorded = case.outputs[name]
        assert z.shape == recorded.shape, f"{name}: {list(z.shape)}, recorded {list(recorded.shape)}"
        error = (z.detach().double() - recorded.double()).abs().max().item()
        allowed = tolerance(case.config, name, recorded)
        if not error <= allowed:
            wrong.append(f"{name}: off by {error:.2g}, allowed {allowed:.2g}")
    assert not wrong, "; ".join(wrong)


def kind_of(path):
    """case1_wan_bidir_A.safetensors -> case1_wan_bidir"""
    return re.sub(r"_[A-Z0-9]+$", "", path.stem)


def check(path, monkeypatch):
    kind = kind_of(path)
    for pattern, reason in OUTSIDE.items():
        if fnmatch(kind, pattern):
            pytest.skip(reason)
    found = [pattern for pattern in KINDS if fnmatch(kind, pattern)]
    assert found, f"{path.name}: no test for cases of kind {kind}"
    case, unchecked = read_case(path), UNCHECKED.get(found[0], {})
    mine = KINDS[found[0]](case, monkeypatch)
    excused = {name for name in case.outputs if any(fnmatch(name, pattern) for pattern in unchecked)}
    assert not excused & mine.keys() and excused | mine.keys() == case.outputs.keys(), "neither compared nor excused"
    compare(case, mine)


def collect():
    """A test for each file there is; one skipped test if there is none."""
    cases = [path for path in sorted(ORACLE.glob("case*.safetensors")) if kind_of(path) not in HY]
    if not cases:
        reason = f"no reference cases in {ORACLE}; set ORACLE_DIR to the folder that holds them"
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.stem) for path in cases]


@pytest.mark.parametrize("path", collect())
def test_case(path, monkeypatch):
    check(path, monkeypatch)


# ----------------------------------------------------------------------------------------------------------- Full sizes


def manifest(name):
    path = ORACLE / "manifests" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no reference manifest {path}; set ORACLE_DIR to the folder that holds the cases")
    return json.loads(path.read_text())["shapes"]


@pytest.mark.parametrize("make, name", [
    (lambda: build("wan-1.3b", camera=False), "wan21_t2v_1.3B"),
    (lambda: build("wan-1.3b"), "minwm_wan_camera_1.3B_causal"),
    (lambda: build("wan-1.3b"), "minwm_wan_camera_1.3B_bidirectional"),
    (lambda: build("wan-14b", camera=False), "wan21_t2v_14B"),
    (lambda: WanVAE(WAN_VAE), "wan21_vae"),
])
def test_names_and_shapes_are_the_released_ones(make, name):
    with torch.device("meta"):
        shapes = {name: list(w.shape) for name, w in make().state_dict().items()}
    assert shapes == manifest(name)


def test_a_camera_adds_its_output_layers_alone():
    with torch.device("meta"):
        plain, camera = (build("wan-14b", camera=on).state_dict() for on in (False, True))
    added = {name: list(w.shape) for name, w in camera.items() if name not in plain}
    assert all(camera[name].shape == w.shape for name, w in plain.items())
    assert added == {f"blocks.{i}.self_attn.prope_o.{kind}": [5120] * (1 + (kind == "weight"))
                     for i in range(40) for kind in ("weight", "bias")}


def test_umt5_names_cover_the_released_file_exactly_once():
    shapes = manifest("umt5_xxl_encoder_wan_names")
    net = build_umt5({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})  # strict in both ways
    names = [umt5_name(name) for name in shapes]
    assert len(set(names)) == len(names) and {*names, "encoder.embed_tokens.weight"} == set(net.state_dict())
    config = net.config
    assert (config.d_model, config.d_kv, config.num_heads, config.num_layers) == (4096, 64, 64, 24)
