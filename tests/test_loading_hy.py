"""
Released files of the second backbone at toy size, as their projects write them: HunyuanVideo-1.5 and its VAE in
Tencent's and diffusers' names, HY-WorldPlay's and minWM's networks made of it. Each loads with its weights and a
description of itself, passes through --init and stream.py, and whatever is wrong with it is named in one line. At the
end a world model by others is adapted to new videos.
"""
import json
from dataclasses import replace

import imageio.v3 as imageio
import pytest
import torch
from safetensors.torch import save_file

import model
from conftest import MINIATURE, call, refusal
from data import encode_places, encode_words, intrinsics, load_encoder, parse_trajectory
from helpers import CPU, SMALL_HY_VAE, edit_json, loads, made_from, meta_of, refused
from model import (
    HYVAE, PRESETS, RELEASED_HY, Camera, HYDiT, HYPrompt, Preset, build, build_vae, fingerprint, load_checkpoint,
    load_net, load_vae, rollout, use_released_cache,
)
from stream import Player, stream

# as hy-8b, unlike tiny-hy, the network knows action labels; as the released one, the VAE has a scale and no shift
DIT = replace(PRESETS["tiny-hy"].dit, action=True)
VAE = replace(SMALL_HY_VAE, mean=(0.0,) * DIT.channels, std=(1 / 1.03682,) * DIT.channels)
DIT_CONFIG = {
    "_class_name": "HunyuanVideo_1_5_DiffusionTransformer", "patch_size": [1, DIT.patch, DIT.patch],
    "in_channels": DIT.channels, "out_channels": DIT.channels, "hidden_size": DIT.dim, "heads_num": DIT.heads,
    "mm_double_blocks_depth": DIT.layers, "mm_single_blocks_depth": 0, "rope_dim_list": list(DIT.rope_bands),
    "rope_theta": 256, "text_states_dim": DIT.text_dim, "text_states_dim_2": None, "vision_states_dim": DIT.vision_dim}
VAE_CONFIG = {"_class_name": "AutoencoderKLConv3D", "latent_channels": VAE.z_dim, "scaling_factor": 1.03682,
              "block_out_channels": list(VAE.widths), "layers_per_block": VAE.res_blocks, "shift_factor": None}
AR_CONFIG = DIT_CONFIG | {"_class_name": "ARHunyuanVideo_1_5_DiffusionTransformer"}
ONE, SHARD = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-{:05d}-of-00002.safetensors"
PROPE = "double_blocks.1.img_attn_prope_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def released_size():
    """The toy networks in the place of the released ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny-hy", Preset(HYDiT, DIT, HYVAE, VAE))
        patch.setattr(model, "HY_VAE", VAE)
        yield


def random_weights(camera=True, action=True, seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn_like(w) * 0.05 for name, w in build("tiny-hy", camera).state_dict().items()
            if action or not name.startswith("action_in.")}


def write(folder, weights, config=None, name=ONE, shards=1, **meta):
    folder.mkdir(parents=True, exist_ok=True)
    places = {tensor: name if shards == 1 else SHARD.format(1 + i % shards) for i, tensor in enumerate(weights)}
    for file in set(places.values()):
        save_file({tensor: weights[tensor] for tensor in places if places[tensor] == file}, folder / file)
    if shards > 1:
        (folder / f"{ONE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file, content in ("config.json", config), ("meta.json", meta):
        if content:
            (folder / file).write_text(json.dumps(content))
    return folder


def described(as_stage, **changes):
    return RELEASED_HY[as_stage] | {"stage": as_stage, "preset": "tiny-hy"} | changes


# ------------------------------------------------------------------------------------------------------- What they hold


@pytest.mark.parametrize("inside, shards", [("transformer/480p_i2v", 1), ("transformer", 2), (".", 1), (".", 2)])
def test_tencents_transformer(tmp_path, inside, shards):
    weights = random_weights(camera=False)
    write(tmp_path / inside, weights, DIT_CONFIG, shards=shards)
    assert loads(tmp_path, weights, "base") == described("base")


@pytest.mark.parametrize("home", ["transformer/480p_i2v", "transformer", "."])
def test_meta_is_read_wherever_it_lies_between(tmp_path, home):
    write(tmp_path / "transformer/480p_i2v", random_weights(camera=False), DIT_CONFIG)
    (tmp_path / home / "meta.json").write_text('{"guidance": 2.0}')
    assert meta_of(tmp_path) == described("base", guidance=2.0)


def test_a_base_is_a_base_wherever_it_lies(tmp_path):
    assert loads(write(tmp_path / "dmd/HunyuanVideo-1.5", weights := random_weights(camera=False), DIT_CONFIG), weights,
                 "base") == described("base")


@pytest.mark.parametrize("folder, config", [
    ("480p_i2v_distilled", {}), ("base", {"ideal_resolution": "720p"}), ("base", {"target_size": 960})])
def test_other_sizes_and_distilled_ones_must_say_their_settings(tmp_path, folder, config):
    weights = random_weights(camera=False)
    path = write(tmp_path / folder, weights, DIT_CONFIG | config)
    assert "expected its size, shift, sampling_steps and guidance" in refused(path)
    write(path, weights, DIT_CONFIG | config, guidance=1.0, shift=7.0)
    assert loads(path, weights, "base") == described("base", guidance=1.0, shift=7.0)


@pytest.mark.parametrize("inside, shard_size", [("transformer", "10GB"), (".", "2MB")])
def test_diffusers_transformer(tmp_path, inside, shard_size, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    cfg = replace(DIT, mlp_dim=4 * DIT.dim, byt5=(DIT.byt5[0], 2048, 2048))  # widths it does not ask for
    monkeypatch.setitem(PRESETS, "tiny-hy", Preset(HYDiT, cfg, HYVAE, VAE))
    torch.manual_seed(0)
    theirs = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * cfg.channels + 1, out_channels=cfg.channels, num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads, num_layers=cfg.layers, num_refiner_layers=cfg.refiner_layers,
        patch_size=cfg.patch, text_embed_dim=cfg.text_dim, text_embed_2_dim=cfg.byt5[0], image_embed_dim=cfg.vision_dim,
        rope_axes_dim=cfg.rope_bands)
    theirs.save_pretrained(tmp_path / inside, max_shard_size=shard_size)
    assert (len(list((tmp_path / inside).glob("*.safetensors"))) > 1) == (shard_size == "2MB")
    assert loads(tmp_path, model.from_diffusers(theirs.state_dict()), "base") == described("base")
    edit_json(tmp_path / inside / "config.json", rope_axes_dim=[2, 4, 10])
    assert "'rope_bands': (2, 4, 10)" in refused(tmp_path)


@pytest.mark.parametrize("kind, inside", [("Tencent", "vae"), ("Tencent", "."), ("diffusers", "vae")])
def test_vae(tmp_path, kind, inside, monkeypatch):
    torch.manual_seed(0)
    weights = build_vae("tiny-hy").state_dict()
    if kind == "Tencent":
        write(tmp_path / inside, weights, VAE_CONFIG)
    else:
        theirs = pytest.importorskip("diffusers").AutoencoderKLHunyuanVideo15(
            latent_channels=VAE.z_dim, block_out_channels=VAE.widths, layers_per_block=VAE.res_blocks,
            spatial_compression_ratio=VAE.stride)
        theirs.save_pretrained(tmp_path / inside)
        weights = model.from_diffusers(theirs.state_dict())
    assert loads(tmp_path, weights, "vae")["fingerprint"] == RELEASED_HY["base"]["vae_fingerprint"]
    vae = load_vae(tmp_path, CPU, "HunyuanVideo-1.5")
    assert vae.cfg == VAE and all(torch.equal(w, weights[name]) for name, w in vae.state_dict().items())
    edit_json(tmp_path / inside / "config.json", scaling_factor=0.5)  # another scale, another VAE
    ordered = {name: weights[name] for name in build_vae("tiny-hy").state_dict()}
    assert load_vae(tmp_path, CPU, fingerprint(ordered)).cfg.std == (2.0,) * VAE.z_dim


@pytest.mark.parametrize("folder, stage", model.WORLDPLAY_FOLDERS.items())
def test_worldplay(tmp_path, folder, stage):
    weights = random_weights()
    meta = described(stage, fps=24, frames=32, timed_text=stage == "camera", released_cache=False, sampler="euler")
    path = write(tmp_path / "a" / folder, weights, name="model.safetensors")
    assert loads(path, weights, stage) == loads(path / "model.safetensors", weights, stage) == meta
    path = write(tmp_path / "b" / folder, weights, DIT_CONFIG)
    assert loads(path, weights, stage) == loads(path / ONE, weights, stage) == meta
    path = tmp_path / "b" / folder / "model.pt"
    torch.save({"ema": None, "module": {f"_fsdp_wrapped_module.{name}": w for name, w in weights.items()}}, path)
    assert loads(path, weights, stage) == meta


@pytest.mark.parametrize("folder, stage", model.MINWM_FOLDERS.items())
def test_minwm(tmp_path, folder, stage, capsys):
    weights = random_weights(action=folder == "dmd")  # made from HY-WorldPlay's, which know action labels
    path = write(tmp_path / "HY15/Action2V" / folder, weights, AR_CONFIG)
    loaded, _ = load_checkpoint(path, stage)
    assert meta_of(path, stage) == described(stage)
    assert all(torch.equal(loaded[name], w) for name, w in weights.items())
    assert loaded.keys() == build("tiny-hy").state_dict().keys()
    assert ("4 tensors of them are added" in capsys.readouterr().err) == (folder != "dmd")
    net = load_net(path, CPU)[0]
    assert folder == "dmd" or net.action_in(torch.arange(81)).abs().max() == 0  # so they change nothing

    weights = random_weights(camera=False)
    path = write(tmp_path / "HY15/TI2V" / folder, weights, AR_CONFIG)
    stage = "base" if stage == "camera" else stage  # no camera as yet: where stage 0 begins
    expected = described("camera" if stage == "base" else stage, stage=stage, camera=False, released_cache=False)
    assert loads(path, weights) == expected
    if stage != "base":
        assert "expected a network with a camera" in refused(path, stage)
    assert load_net(path, CPU, "base", stage)[0].action_in is None


def test_a_training_run_of_minwms(tmp_path):
    weights = random_weights()
    write(tmp_path / "causal_cd/checkpoint-500/transformer", weights, AR_CONFIG)
    for path in "causal_cd/checkpoint-500", "causal_cd/checkpoint-500/transformer":
        assert loads(tmp_path / path, weights) == described("cd")
    path = write(tmp_path / "mine/checkpoint-500/transformer", weights, AR_CONFIG).parent
    assert "causal_cd, dmd, dmd_ourbi, bidirectional_model" in refused(path)
    (path / "meta.json").write_text('{"stage": "ar", "guidance": 2.5}')
    assert loads(path, weights, "ar") == described("ar", guidance=2.5)


def test_released_quirks(tmp_path):
    """Timed text is kept, the cache's defect only if it is asked for, and never in what was trained from it."""
    def quirks(net):
        return net.timed_text, *(block.prope_cache == slice(0, 2) for block in net.blocks)

    base = write(tmp_path / "base", random_weights(camera=False), DIT_CONFIG)
    dmd, play = (write(tmp_path / name, random_weights(), AR_CONFIG) for name in ("dmd", "ar_distilled_action_model"))
    assert quirks(load_net(base, CPU)[0]) == (True, False, False, False)
    net, meta = load_net(dmd, CPU)
    assert quirks(net) == (False, False, False, False)
    use_released_cache(net, meta, dmd)
    assert quirks(net) == (False, True, True, True)
    weights, meta = load_checkpoint(dmd)
    model.save_checkpoint(tmp_path / "dmd.pt", weights, meta | {"from": "dmd at step 0", "released_cache": False})
    ti2v = write(tmp_path / "TI2V/dmd", random_weights(camera=False), AR_CONFIG)
    for path in base, play, ti2v, tmp_path / "dmd.pt":
        net, meta = load_net(path, CPU)
        with pytest.raises(ValueError, match=f"{path}: --released-cache is for minWM's DMD"):
            use_released_cache(net, meta, path)
        assert quirks(net) == (path == base, False, False, False)


@pytest.mark.parametrize("kind", ["Tencent", "diffusers"])
def test_the_full_size_is_known_by_its_configuration(tmp_path, monkeypatch, kind):
    config = {"_class_name": "HunyuanVideo_1_5_DiffusionTransformer", "hidden_size": 2048, "heads_num": 16,
              "mm_double_blocks_depth": 54, "out_channels": 32, "text_states_dim": 3584, "vision_states_dim": 1152,
              "rope_dim_list": [16, 56, 56], "rope_theta": 256}
    with torch.device("meta"):
        net = build("hy-8b", camera=False)
        if kind == "diffusers":
            net = pytest.importorskip("diffusers").HunyuanVideo15Transformer3DModel()
            config = json.loads(net.to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(model, "read_safetensors", lambda path: net.state_dict())
    monkeypatch.setattr(model, "fingerprint", lambda weights, numbers: f"{numbers} of each")  # these have no numbers
    expected = described("base", preset="hy-8b", fingerprint="1000 of each")
    assert load_checkpoint(tmp_path, "base", preset="hy-8b")[1] == expected


# -------------------------------------------------------------------------------------------------------- What is wrong


@pytest.mark.parametrize("damage, found", [
    (lambda f: (f / SHARD.format(2)).unlink(), "00002-of-00002.safetensors: no such file"),
    (lambda f: (f / SHARD.format(2)).write_bytes((f / SHARD.format(2)).read_bytes()[:-9]), "truncated"),
    (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    (lambda f: edit_json(f / "config.json", _class_name="HunyuanVideo"), "found HunyuanVideo"),
    (lambda f: edit_json(f / "config.json", _class_name="WanModel", ffn_dim=8), "'ffn_dim': 8"),
    (lambda f: edit_json(f / "config.json", heads_num=6), "'heads': 6"),
    (lambda f: edit_json(f / "config.json", rope_theta=10000), "rope_theta 256, found 10000"),
    (lambda f: (f / "meta.json").write_text('{"colour": 3}'), "colour"),
    (lambda f: [path.unlink() for path in f.glob("diffusion*")], "no diffusion_pytorch_model*.safetensors"),
])
def test_a_broken_folder_is_named(tmp_path, damage, found):
    folder = write(tmp_path / "transformer", random_weights(camera=False), DIT_CONFIG, shards=2)
    damage(folder)
    assert found in refused(folder, "base")


@pytest.mark.parametrize("change, found", [
    ({PROPE: None}, f"1 of its tensors are not those of tiny-hy, first {PROPE}: expected shape"),
    ({name: None for name in build("tiny-hy").state_dict() if "prope" in name and name != PROPE}, "expected shape"),
    # the action labels that it lacks, all of them, are added; not the one lost tensor of its camera
    ({PROPE: None} | {f"action_in.mlp.{i}.{kind}": None for i in (0, 2) for kind in ("weight", "bias")},
     f"1 of its tensors are not those of tiny-hy, first {PROPE}: expected shape"),
    ({"action_in.mlp.0.weight": None}, f"action_in.mlp.0.weight: expected shape ({DIT.dim}, 256), found none"),
    ({"final_layer.linear.bias": torch.ones(7)}, "final_layer.linear.bias: expected shape"),
    ({"vector_in.in_layer.bias": torch.ones(2)}, "vector_in.in_layer.bias: expected shape none, found (2,)"),
    ({"img_in.proj.bias": torch.ones(7)}, f"{{'dim': 7, 'layers': {DIT.layers}}}, known presets are tiny"),
])
def test_a_broken_network_is_named(tmp_path, change, found):
    weights = {name: w for name, w in (random_weights() | change).items() if w is not None}
    path = write(tmp_path / "ar_model", weights, name="model.safetensors")
    assert found in refused(path) and found in refused(path / "model.safetensors")
    torch.save({"module": weights}, path / "weights.pt")
    assert found in refused(path / "weights.pt")


@pytest.mark.parametrize("lost", ["attn.to_k.weight", "attn.to_q.bias"])
def test_a_lost_part_of_a_joined_tensor_is_named(lost):
    parts = {f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{z}.{kind}": torch.ones(4)
             for z in "qkv" for kind in ("weight", "bias")} | {"x_embedder.proj.weight": torch.ones(4)}
    names = model.from_diffusers({name: w for name, w in parts.items() if not name.endswith(lost)})
    kinds = [name.rsplit(".", 1)[1] for name in names if "self_attn_qkv" in name]
    assert kinds == ["bias" if "weight" in lost else "weight"]


def test_a_broken_vae_is_named(tmp_path):
    weights = build_vae("tiny-hy").state_dict()
    write(tmp_path, weights | {"encoder.conv_in.conv.bias": torch.ones(5)}, VAE_CONFIG)
    assert f"of width 5 with {VAE.z_dim} channels" in refused(tmp_path, "vae")
    write(tmp_path, {name: w for name, w in weights.items() if name != "decoder.conv_out.conv.bias"}, VAE_CONFIG)
    assert "first decoder.conv_out.conv.bias" in refused(tmp_path, "vae")
    edit_json(tmp_path / "config.json", _class_name="AutoencoderKL")
    assert "found AutoencoderKL" in refused(tmp_path, "vae")


def test_a_missing_checkpoint_names_its_own_makers_and_stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    for preset in "tiny", "tiny-hy":
        (tmp_path / "ckpt" / preset).mkdir(parents=True)
        (tmp_path / "ckpt" / preset / "camera.pt").touch()
    hint = refused(tmp_path / "camera.pt", "camera")
    assert "`python train_camera.py` makes it" in hint and hint.endswith("ckpt/tiny/camera.pt could stand in")
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "camera.pt", "camera", preset="tiny-hy")
    assert "`python train_camera.py --preset tiny-hy` makes it" in str(error.value)
    assert str(error.value).endswith("ckpt/tiny-hy/camera.pt could stand in")


# -------------------------------------------------------------------------------------------- Through --init and stream

SHORT = (*MINIATURE, "--preset", "tiny-hy", "--steps", "1", "--data")


@pytest.fixture(scope="module")
def hy_world(released_size, tmp_path_factory):
    """New videos, encoded by the released VAE."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    write(folder / "vae", build_vae("tiny-hy").state_dict(), VAE_CONFIG)
    size = "--count", "4", "--frames", "4", "--size", "32"
    call("data.py", "--preset", "tiny-hy", *size, "--vae", folder / "vae", cwd=folder)
    return folder


def test_a_released_base_trains_and_streams(hy_world, tmp_path, capsys):
    weights = random_weights(camera=False)
    base = write(tmp_path / "HunyuanVideo-1.5/transformer/480p_i2v", weights, DIT_CONFIG).parents[1]
    (base / "meta.json").write_text('{"size": [32, 32]}')
    short = (*SHORT, hy_world / "data/toy", "--warmup", "0", "--sampling-steps", "2", "--out")
    call("train_camera.py", "--init", base, *short, tmp_path / "camera.pt", cwd=hy_world)
    added = 2 * DIT.layers + 4
    assert f"{base} has no camera: {added} tensors of it are added, at zero output" in capsys.readouterr().out
    meta = load_checkpoint(tmp_path / "camera.pt", "camera")[1]
    assert meta["from"] == made_from(base) and "timed_text" not in meta
    flags = "--vae", hy_world / "vae", "--camera", "w*3", "--sampling-steps", "2", "--out", tmp_path / "walk.gif"
    call("stream.py", "--ckpt", base, *flags, cwd=tmp_path)
    assert imageio.imread(tmp_path / "walk.gif", index=None).shape[0] == 13


def test_minwms_networks_go_through_every_stage(hy_world, tmp_path):
    from data import open_latents
    meta = {name: open_latents(hy_world / "data/toy").meta[name] for name in ("K", "size", "fps", "frames")}
    meta["K"] = [k + 1e-6 for k in meta["K"]]  # as far as digits were printed
    at = {folder: write(tmp_path / folder, random_weights(seed=seed), AR_CONFIG, **meta, chunk=0 if not seed else 2)
          for seed, folder in enumerate(("bidirectional", "ar_diffusion_tf", "causal_ode", "dmd"))}
    short = (*SHORT, hy_world / "data/toy", "--out")
    flags = (*short, tmp_path / "ar.pt", "--sampling-steps", "2")
    call("train_ar.py", "--init", at["bidirectional"], *flags, cwd=hy_world)
    call("distill_cd.py", "--init", at["ar_diffusion_tf"], *short, tmp_path / "cd.pt", cwd=hy_world)
    call("train_dmd.py", "--init", at["causal_ode"], "--scores", at["bidirectional"], *short, tmp_path / "dmd.pt",
         "--fake-score-updates", "1", cwd=hy_world)
    expected = f"{made_from(at['causal_ode'])}; scores {made_from(at['bidirectional'])}"
    assert load_checkpoint(tmp_path / "dmd.pt")[1]["from"] == expected
    flags = "--vae", hy_world / "vae", "--camera", "w*3", "--out", tmp_path / "walk.gif"
    videos = []
    for more in (), ("--released-cache",):
        call("stream.py", "--ckpt", at["dmd"], *flags, *more, cwd=tmp_path)
        videos.append(imageio.imread(tmp_path / "walk.gif", index=None))
    assert videos[0].shape[0] == 13 and (videos[0] != videos[1]).any()  # the second chunk has a past
    message = refusal("stream.py", "--ckpt", tmp_path / "dmd.pt", *flags, "--released-cache", cwd=tmp_path)
    assert message.startswith(f"error: {tmp_path / 'dmd.pt'}: --released-cache")


def test_a_world_model_by_others_is_adapted(hy_world, tmp_path):
    """HY-WorldPlay, taught new videos of another shape, length and camera: in smaller chunks and fewer steps through
    every stage, and its four-step student directly."""
    play = write(tmp_path / "HY-WorldPlay/bidirectional_model", random_weights())
    student = write(tmp_path / "HY-WorldPlay/ar_distilled_action_model", random_weights(seed=1),
                    name="model.safetensors", chunk=2)
    data, sampling = (*SHORT, hy_world / "data/toy", "--out"), ("--sampling-steps", "2")
    call("train_camera.py", "--init", play, *data, tmp_path / "camera.pt", "--shift", "5", *sampling, cwd=hy_world)
    call("train_ar.py", "--init", tmp_path / "camera.pt", *data, tmp_path / "ar.pt", *sampling, "--chunk", "1",
         cwd=hy_world)
    call("distill_cd.py", "--init", tmp_path / "ar.pt", *data, tmp_path / "cd.pt", *sampling, cwd=hy_world)
    released = write(tmp_path / "HY-WorldPlay/ar_model", random_weights(seed=2))
    call("train_ar.py", "--init", released, *data, tmp_path / "more.pt", *sampling, cwd=hy_world)
    assert load_checkpoint(tmp_path / "more.pt", "ar")[1]["frames"] == 4
    for init, out, chunk, steps in (tmp_path / "cd.pt", "quick.pt", 1, 2), (student, "student.pt", 2, 4):
        call("train_dmd.py", "--init", init, "--scores", tmp_path / "camera.pt", *data, tmp_path / out,
             "--fake-score-updates", "1", cwd=hy_world)
        weights, meta = load_checkpoint(tmp_path / out, "dmd", preset="tiny-hy")
        assert (meta["chunk"], meta["sampling_steps"], meta["frames"], meta["size"]) == (chunk, steps, 4, [32, 32])
        assert meta["K"] == load_checkpoint(tmp_path / "camera.pt")[1]["K"] and meta["shift"] == 5
        assert weights.keys() == random_weights().keys()
        call("stream.py", "--ckpt", tmp_path / out, "--vae", hy_world / "vae", "--camera", "w*3", "--out",
             tmp_path / "walk.gif", cwd=tmp_path)
        assert imageio.imread(tmp_path / "walk.gif", index=None).shape == (13, 256, 256, 3)
    before, after = load_checkpoint(student)[0], load_checkpoint(tmp_path / "student.pt")[0]
    assert all((before[name] != after[name]).any() for name in ("img_in.proj.weight", PROPE))


@torch.no_grad()
def test_a_stream_tells_the_network_its_image_and_its_actions(monkeypatch):
    """The same numbers as a rollout by hand, and others without the image, or with the labels of another path."""
    net, vae = build("tiny-hy"), build_vae("tiny-hy").eval()
    net.load_state_dict({name: w * 4 for name, w in random_weights().items()})
    meta = described("dmd", size=[32, 32])
    encoder, viewmats = load_encoder("tiny-hy", None, CPU), parse_trajectory("w*3")[None]
    Ks, image = intrinsics(meta["K"]).expand(1, 4, 3, 3), torch.rand(1, 3, 1, 32, 32) * 2 - 1

    def walk(given=None):
        pieces = stream(Player(net, vae, encoder, meta), ["a red room"], Camera(viewmats, Ks), [5], given)
        return torch.cat(list(pieces), dim=2)

    def by_hand(shown):
        z = vae.encode(image)[0]
        words = encode_words("a red room")[None]
        no_quotes = torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.bool)
        seen = torch.cat([z, torch.ones_like(z[:, :, :1])], dim=2)
        has_image = torch.full((1, 16), bool(shown))
        prompt = HYPrompt(words, words.any(-1), *no_quotes, encode_places(image[:, :, 0]) * shown, has_image,
                          seen * shown)
        rng = [torch.Generator().manual_seed(5)]
        x0 = rollout(net, meta, rng, (4, *z.shape[2:]), prompt, prompt, Camera(viewmats, Ks))
        return vae.decode(torch.cat(list(x0), dim=1))[0].clamp(-1, 1)

    assert model.action_labels(viewmats).tolist() == [[0, 9, 9, 9]]
    with_image, without_image = walk(image), walk()
    torch.testing.assert_close(with_image, by_hand(shown=1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(without_image, by_hand(shown=0.0), atol=1e-4, rtol=0)
    assert (with_image - without_image).abs().max() > 1e-2
    monkeypatch.setattr(model, "action_labels", lambda viewmats, _: torch.zeros(viewmats.shape[:2], dtype=torch.int64))
    assert (with_image - by_hand(shown=1.0)).abs().max() > 1e-2
