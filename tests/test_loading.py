"""
Released files at toy size, as their projects write them: public Wan2.1 and diffusers folders, minWM's model.pt, the VAE
and umT5. Each loads with its weights and a description of itself, passes through --init and stream.py, and whatever is
wrong with it is named in one line.
"""
import json
import os
import pickle
from dataclasses import replace

import imageio.v3 as imageio
import pytest
import torch
from safetensors.torch import save_file

import model
from conftest import MINIATURE, call, refusal
from data import (
    K_SQUARE, K_WIDE, NULL_PROMPT, UMT5_LEN, encode_prompts, get_batch, intrinsics, load_text_encoder, open_latents,
    parse_trajectory, render, sample_toy,
)
from helpers import CPU, SMALL_VAE, edit_json, loads, made_from, meta_of, refused
from model import PRESETS, RELEASED, WanVAE, build, fingerprint, load_checkpoint, load_net, load_vae

TINY = PRESETS["tiny"]._replace(vae_net=WanVAE, vae=SMALL_VAE)  # of the public form
WAN_CONFIG = {"_class_name": "WanModel", "model_type": "t2v", "dim": 192, "ffn_dim": 768, "num_heads": 4,
              "num_layers": 4, "in_dim": 16, "out_dim": 16, "freq_dim": 128, "text_len": 512, "eps": 1e-6}
SHARD = "diffusion_pytorch_model-{:05d}-of-00002.safetensors"


def random_weights(camera, seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn_like(w) * 0.05 for name, w in build("tiny", camera).state_dict().items()}


def write_wan(folder, weights, shards=1):
    """Wan2.1-T2V-1.3B has one file, 14B several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(WAN_CONFIG))
    if shards == 1:
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        return folder
    places = {name: SHARD.format(1 + i % shards) for i, name in enumerate(weights)}
    for shard in set(places.values()):
        save_file({name: weights[name] for name in places if places[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_minwm(folder, weights, key="generator", prefix="model.", **more):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: {prefix + name: w for name, w in weights.items()}, **more}, folder / "model.pt")
    return folder / "model.pt"


def diffusers_transformer():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=48, in_channels=16, out_channels=16,
        text_dim=96,
        freq_dim=128, ffn_dim=768, num_layers=4)


def diffusers_vae(mean):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[mean] * 16, latents_std=[2.0] * 16)


# ------------------------------------------------------------------------------------------------------- What they hold


@pytest.mark.parametrize("shards", (1, 2))
def test_public_wan(tmp_path, shards):
    weights = random_weights(camera=False)
    meta = loads(write_wan(tmp_path / "Wan2.1-T2V", weights, shards), weights, "base")
    assert meta == RELEASED["base"] | {"stage": "base", "preset": "tiny"}


@pytest.mark.parametrize("inside, shard_size", (("transformer", "10GB"), (".", "10GB"), ("transformer", "2MB")))
def test_diffusers_transformer(tmp_path, inside, shard_size):
    theirs = diffusers_transformer()
    theirs.save_pretrained(tmp_path / inside, max_shard_size=shard_size)
    assert (len(list((tmp_path / inside).glob("*.safetensors"))) > 1) == (shard_size == "2MB")
    meta = loads(tmp_path, model.from_diffusers(theirs.state_dict()), "base")
    assert meta == RELEASED["base"] | {"stage": "base", "preset": "tiny"}


@pytest.mark.parametrize("prefix", ("model.", "model._fsdp_wrapped_module.", "_fsdp_wrapped_module.model.",
                                    "_orig_mod.model.", "model._orig_mod._checkpoint_wrapped_module."))
def test_minwm_prefixes(tmp_path, prefix):
    weights = random_weights(camera=True)
    loads(write_minwm(tmp_path / "dmd", weights, prefix=prefix), weights, "dmd")


def test_minwm_prefixes_in_the_middle(tmp_path):
    weights = random_weights(camera=True)
    inner = {name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._fsdp_wrapped_module."): w
             for name, w in weights.items()}
    loads(write_minwm(tmp_path / "dmd", inner), weights, "dmd")


def test_minwm_prefers_the_average(tmp_path):
    weights, raw = (random_weights(camera=True, seed=seed) for seed in (0, 1))
    path = write_minwm(tmp_path / "dmd", weights, "generator_ema", generator={f"model.{n}": w for n, w in raw.items()})
    loads(path, weights)


@pytest.mark.parametrize("folder, stage", [*model.MINWM_FOLDERS.items(), ("causal_cd/checkpoint_model_001000", "cd")])
def test_minwm_stage_is_its_folder(tmp_path, folder, stage):
    weights = random_weights(camera=True)
    meta = loads(write_minwm(tmp_path / folder, weights), weights, stage)
    assert meta == RELEASED[stage] | {"stage": stage, "preset": "tiny"}


def test_meta_json_has_the_last_word(tmp_path):
    weights = random_weights(camera=True)
    path = write_minwm(tmp_path / "dmd", weights)
    (tmp_path / "dmd/meta.json").write_text('{"stage": "ar", "guidance": 2.5}')
    expected = RELEASED["ar"] | {"stage": "ar", "preset": "tiny", "guidance": 2.5}
    assert loads(path, weights, "ar") == expected
    (tmp_path / "dmd/meta.json").write_text(  # in the words of older versions of this code
        '{"stage": "ar", "guidance": 2.5, "steps": 20, "sampler": "renoise", "prefix_prob": 0.2}')
    assert loads(path, weights, "ar") == expected | {"sampling_steps": 20, "sampler": "few_step", "given_prob": 0.2}


def test_released_settings_are_minwms():
    assert all(tuple(meta["K"]) == K_WIDE for meta in RELEASED.values())
    chunk, guidance, steps, sampler = ([RELEASED[stage][name] for stage in ("base", "camera", "ar", "ode", "cd", "dmd")]
                                       for name in ("chunk", "guidance", "sampling_steps", "sampler"))
    assert chunk == [0, 0, 4, 4, 4, 4] and guidance == [5, 8, 3, 1, 1, 1]
    assert steps == [50, 50, 50, 4, 4, 4] and sampler == ["unipc"] * 3 + ["few_step"] * 3


@pytest.fixture
def small_wan_vae(monkeypatch):
    """A VAE of Wan's form in the place of the toy world's."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def test_released_vae(small_wan_vae, tmp_path, monkeypatch):
    weights = {name: torch.randn_like(w) for name, w in WanVAE(TINY.vae).state_dict().items()}
    torch.save(dict(reversed(weights.items())), tmp_path / "Wan2.1_VAE.pth")  # the order of a file means nothing
    for path in tmp_path / "Wan2.1_VAE.pth", tmp_path:
        assert loads(path, weights, "vae")["fingerprint"] == fingerprint(weights)
    assert load_vae(tmp_path, CPU, fingerprint(weights)).cfg == TINY.vae
    monkeypatch.setattr(model, "WAN_VAE", TINY.vae)  # at full size it is known by name
    assert loads(tmp_path, weights, "vae")["fingerprint"] == RELEASED["base"]["vae_fingerprint"]


@pytest.mark.parametrize("inside", ("vae", "."))
def test_diffusers_vae(small_wan_vae, tmp_path, inside):
    theirs = diffusers_vae(mean=0.25)
    theirs.save_pretrained(tmp_path / inside)
    weights = model.from_diffusers(theirs.state_dict())
    ours = {name: weights[name] for name in WanVAE(TINY.vae).state_dict()}
    vae = load_vae(tmp_path, CPU, fingerprint(ours))
    assert vae.cfg == replace(TINY.vae, mean=(0.25,) * 16, std=(2.0,) * 16)
    assert all(torch.equal(w, ours[name]) for name, w in vae.state_dict().items())


# -------------------------------------------------------------------------------------------------------- What is wrong


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("damage, found", [
    (lambda f: (f / SHARD.format(2)).unlink(), "00002-of-00002.safetensors: no such file"),
    (lambda f: (f / SHARD.format(2)).write_bytes((f / SHARD.format(2)).read_bytes()[:-9]), "truncated"),
    (lambda f: (f / SHARD.format(2)).write_bytes(b""), "truncated"),
    (lambda f: save_file({"img_emb.proj.0.weight": torch.ones(3)}, f / SHARD.format(2)), "of its tensors are not"),
    (lambda f: (f / "diffusion_pytorch_model.safetensors.index.json").write_text("{"), "not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "expected an object, found list"),
    (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    (lambda f: edit_json(f / "config.json", _class_name="HunyuanVideo"), "found HunyuanVideo"),
    (lambda f: edit_json(f / "config.json", num_heads=6), "'heads': 6"),
    (lambda f: edit_json(f / "config.json", eps=1e-5), "eps 1e-06, found 1e-05"),
    (lambda f: (f / "meta.json").write_text('{"frames": 8, "colour": 3}'), "colour"),
    (lambda f: (f / "meta.json").write_text('{"stage": "vae"}'), "found stage vae"),
    (lambda f: [path.unlink() for path in f.glob("diffusion*")], "no diffusion_pytorch_model*.safetensors"),
], ids=lambda z: z if isinstance(z, str) else "")
def test_a_broken_folder_is_named(tmp_path, damage, found):
    folder = write_wan(tmp_path / "wan", random_weights(camera=False), shards=2)
    damage(folder)
    assert found in refused(folder, "base")


@pytest.mark.parametrize("change, found", [
    ({"blocks.0.self_attn.prope_o.bias": None}, "blocks.0.self_attn.prope_o.bias: expected shape (192,), found none"),
    ({"blocks.0.norm3.bias": torch.ones(7)}, "blocks.0.norm3.bias: expected shape (192,), found (7,)"),
    ({"blocks.0.extra": torch.ones(2)}, "blocks.0.extra: expected shape none, found (2,)"),
    ({"_orig_mod.blocks.0.norm3.bias": torch.ones(192)}, "first blocks.0.norm3.bias"),  # which of the two?
    ({"patch_embedding.bias": torch.ones(7)}, "{'dim': 7, 'layers': 4}, known presets are tiny"),
    ({"patch_embedding.bias": "text"}, "not a checkpoint of ours, of minWM or Wan's VAE"),
])
def test_a_broken_minwm_file_is_named(tmp_path, change, found):
    weights = {name: w for name, w in (random_weights(camera=True) | change).items() if w is not None}
    assert found in refused(write_minwm(tmp_path / "dmd", weights))


def test_a_camera_model_without_its_camera_is_refused(tmp_path):
    path = write_minwm(tmp_path / "bidirectional", random_weights(camera=False))
    assert "8 of its tensors are not those of tiny, first blocks.0.self_attn.prope_o.weight" in refused(path)


def test_a_minwm_file_of_no_known_stage_is_refused(tmp_path):
    assert "causal_ode" in refused(write_minwm(tmp_path / "mine", random_weights(camera=True)))


def test_the_wrong_stage_is_refused(tmp_path):
    path = write_minwm(tmp_path / "dmd", random_weights(camera=True))
    assert refused(path, "camera").endswith("expected a checkpoint of stage camera, found dmd")


def test_a_released_file_cannot_run_code(tmp_path):
    evil = Evil(tmp_path / "ran")
    for name, content in ("model.pt", {"generator": evil}), ("Wan2.1_VAE.pth", evil):
        path = tmp_path / "dmd" / name
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        assert "not a checkpoint of ours" in refused(path)
        path.write_bytes(pickle.dumps(content))
        assert "not a checkpoint of ours" in refused(path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_or_foreign_vae_is_named(small_wan_vae, tmp_path):
    path = tmp_path / "Wan2.1_VAE.pth"
    weights = WanVAE(TINY.vae).state_dict()
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-99])
    assert "truncated" in refused(path, "vae")
    torch.save(weights | {"encoder.conv1.bias": torch.ones(5)}, path)
    assert "of width 5 with 16 channels" in refused(path, "vae")
    torch.save({name: w for name, w in weights.items() if name != "conv1.bias"}, path)
    assert "1 of its tensors are not those of tiny, first conv1.bias" in refused(path, "vae")


# ----------------------------------------------------------------------------------------------------------------- umT5


def umt5_weights(d=96, vocabulary=40):
    """In Wan's names; two layers, four heads."""
    torch.manual_seed(0)
    shapes = {"token_embedding.weight": (vocabulary, d), "norm.weight": (d,)}
    for i in range(2):
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in {
            "norm1": (d,), "norm2": (d,), **{f"attn.{z}": (d, d) for z in "qkvo"}, "pos_embedding.embedding": (32, 4),
            "ffn.gate.0": (64, d), "ffn.fc1": (64, d), "ffn.fc2": (d, 64)}.items()}
    return {name: torch.randn(shape) * 0.1 + (len(shape) == 1) for name, shape in shapes.items()}


def write_umt5(folder, weights):
    """Wan's file, with its tokenizer in google/umt5-xxl/ beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = "<pad> </s> <unk> a red blue green house with one tree and two doors".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
                            ).save_pretrained(folder / "google/umt5-xxl")
    torch.save(weights, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder / "models_t5_umt5-xxl-enc-bf16.pth"


def test_umt5_from_both_formats(tmp_path):
    path = write_umt5(tmp_path, umt5_weights())
    wan = load_text_encoder(path, CPU)
    wan.net.save_pretrained(tmp_path / "diffusers/text_encoder")
    wan.tokenizer.save_pretrained(tmp_path / "diffusers/tokenizer")
    prompts = ["a red house", "a  blue &amp;amp;\n house with two doors "]
    embeds = encode_prompts(prompts, wan)
    assert embeds.shape == (2, UMT5_LEN, 96) and embeds.dtype == torch.float32
    lengths = [4, 8]  # the words, and </s>
    assert all((embeds[i, :n].abs().amax(-1) > 0).all() and (embeds[i, n:] == 0).all() for i, n in enumerate(lengths))
    assert torch.equal(embeds, encode_prompts(prompts, load_text_encoder(tmp_path / "diffusers/text_encoder", CPU)))
    tidy = encode_prompts([prompts[0], "a blue & house with two doors"], wan)
    torch.testing.assert_close(embeds, tidy, atol=0, rtol=0)
    torch.testing.assert_close(encode_prompts(prompts[1:], wan), embeds[1:])
    assert (encode_prompts(["red " * 600], wan)[0, -1] != 0).any()  # cut


@pytest.mark.parametrize("damage, found", [
    (lambda f: f.unlink(), "no such file"), (lambda f: f.write_bytes(f.read_bytes()[:-99]), "not a umT5 encoder"),
    (lambda f: (f.parent / "google/umt5-xxl/tokenizer.json").unlink(), "no tokenizer in"),
    (lambda f: torch.save({"a": torch.ones(2)}, f), "not the weights of a umT5 encoder"),
    (lambda f: torch.save(umt5_weights() | {"norm.weight": torch.ones(3)}, f), "expected shape (96,), found (3,)"),
    (lambda f: torch.save(Evil(f.parent / "ran"), f), "not a umT5 encoder"),
])
def test_a_broken_umt5_is_named(tmp_path, damage, found):
    path = write_umt5(tmp_path, umt5_weights())
    damage(path)
    with pytest.raises(ValueError) as error:
        load_text_encoder(path, CPU)
    assert str(error.value).startswith(f"{path}: ") and found in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_prompts_of_videos_are_read_by_umt5(chain, tmp_path):
    path, clips = write_umt5(tmp_path, umt5_weights()), tmp_path / "clips"
    clips.mkdir()
    _, paths, scene = sample_toy(1, seed=0, steps=7, held=False)
    parts = paths[0].split("*")[0]  # the first key, for one latent frame
    room = render(scene, parse_trajectory(paths[0])[None], intrinsics(K_SQUARE), 32)[0, :, :5]
    room = ((room + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    imageio.imwrite(clips / "room.mp4", room, fps=16, macro_block_size=2, output_params=["-crf", "1"])
    (clips / "table.jsonl").write_text(json.dumps({"file": "room.mp4", "caption": "a red room", "poses": parts}))
    flags = ("--vae", "ckpt/vae.pt", "--frames", "2", "--size", "32", "--K", *K_SQUARE, "--text-encoder", path)
    call("data.py", "--videos", clips, *flags, "--out", tmp_path / "videos", cwd=chain)
    batch = get_batch(open_latents(tmp_path / "videos"), 0, 0, (0, 1), 1, CPU)
    embeds = torch.cat([batch.prompt, batch.null])
    expected = encode_prompts(["a red room", NULL_PROMPT], load_text_encoder(path, CPU))
    torch.testing.assert_close(embeds, expected, atol=1e-2, rtol=1e-2)  # fp16 on disk


def test_a_umt5_folder_that_lacks_a_tensor_is_named(tmp_path):
    net, tokenizer = load_text_encoder(write_umt5(tmp_path, umt5_weights()), CPU)
    tokenizer.save_pretrained(tmp_path / "text_encoder")
    weights = {name: w for name, w in net.state_dict().items() if "block.1.layer.0.SelfAttention.v" not in name}
    net.save_pretrained(tmp_path / "text_encoder", state_dict=weights)
    with pytest.raises(ValueError, match="SelfAttention.v"):
        load_text_encoder(tmp_path / "text_encoder", CPU)


# -------------------------------------------------------------------------------------------- Through --init and stream


@pytest.fixture(scope="module")
def toy_meta(chain):
    """What a released file of the toy world would need said, for it was neither shot nor encoded like Wan's."""
    meta = load_checkpoint(chain / "ckpt/camera.pt")[1]
    return json.dumps({name: meta[name] for name in ("K", "size", "frames", "shift", "vae_fingerprint")})


def toy_weights(chain, stage):
    return {name: w.clone() for name, w in load_checkpoint(chain / f"ckpt/{stage}.pt")[0].items()}


def test_released_meta_has_our_keys(chain):
    for stage, meta in RELEASED.items():
        assert meta.keys() | {"stage", "preset"} == meta_of(chain / f"ckpt/{stage}.pt").keys()


@pytest.mark.parametrize("kind", ("wan", "diffusers"))
def test_a_released_base_trains_and_streams(chain, tmp_path, toy_meta, kind, capsys):
    folder, weights = tmp_path / "base", toy_weights(chain, "base")
    if kind == "wan":
        write_wan(folder, weights, shards=2)
    else:
        theirs = diffusers_transformer()
        names = {ours: old for old, ours in zip(theirs.state_dict(), model.from_diffusers(theirs.state_dict()))}
        theirs.load_state_dict({names[name]: w for name, w in weights.items()})
        theirs.save_pretrained(folder / "transformer")
    (folder / "meta.json").write_text(toy_meta)
    out, other = tmp_path / "out/camera.pt", tmp_path / "other/camera.pt"
    short = (*MINIATURE, "--warmup", "0", "--sampling-steps", "2", "--steps", "1")
    call("train_camera.py", "--init", folder, "--out", out, *short, cwd=chain)
    assert f"{folder} has no camera: 8 tensors of it are added, at zero output" in capsys.readouterr().out
    call("train_camera.py", "--init", chain / "ckpt/base.pt", "--out", other, *short, cwd=chain)
    (trained, meta), (expected, _) = load_checkpoint(out), load_checkpoint(other)
    assert all(torch.equal(trained[name], w) for name, w in expected.items()) and meta["from"] == made_from(folder)

    flags = "--vae", chain / "ckpt/vae.pt", "--camera", "w*3", "--sampling-steps", "2", "--out", tmp_path / "walk.gif"
    call("stream.py", "--ckpt", folder, *flags, cwd=tmp_path)
    assert imageio.imread(tmp_path / "walk.gif", index=None).shape[0] == 13


def test_minwms_files_go_through_every_stage(chain, tmp_path, toy_meta):
    folders = {stage: folder for folder, stage in model.MINWM_FOLDERS.items()}
    files = {}
    for stage in folders:
        files[stage] = write_minwm(tmp_path / folders[stage], toy_weights(chain, stage), "generator_ema",
                                   "model._fsdp_wrapped_module.")
        (files[stage].parent / "meta.json").write_text(toy_meta)
        if stage != "camera":
            edit_json(files[stage].parent / "meta.json", chunk=2)
    short = (*MINIATURE, "--steps", "1", "--out")
    call("train_ar.py", "--init", files["camera"], *short, tmp_path / "ar.pt", cwd=chain)
    call("distill_cd.py", "--init", files["ar"], *short, tmp_path / "cd.pt", cwd=chain)
    call("distill_ode.py", "--init", files["ar"], "--generate", "--pairs", tmp_path / "ode", "--pairs-count", "2",
         "--batch-size", "2", "--teacher-steps", "4", cwd=chain)
    for stage in "ode", "cd", "dmd":
        call("train_dmd.py", "--init", files[stage], "--scores", files["camera"], *short, tmp_path / f"{stage}-dmd.pt",
             "--fake-score-updates", "1", cwd=chain)
        net, meta = load_net(tmp_path / f"{stage}-dmd.pt", CPU, "dmd")
        assert meta["from"] == f"{made_from(files[stage])}; scores {made_from(files['camera'])}"
        assert meta["chunk"] == 2 and net.cfg == TINY.dit
    for stage in folders:
        out = tmp_path / f"{stage}.gif"
        call("stream.py", "--ckpt", files[stage], "--vae", chain / "ckpt/vae.pt", "--camera", "w*3",
             "--sampling-steps", "2", "--out", out, cwd=tmp_path)
        assert imageio.imread(out, index=None).shape[0] == 13


def test_a_folder_streams_with_the_vae_and_the_text_encoder_in_it(small_wan_vae, chain, tmp_path, toy_meta, capsys):
    folder = write_wan(tmp_path / "Wan2.1-T2V", toy_weights(chain, "base"))
    (folder / "meta.json").write_text(toy_meta)
    torch.save(WanVAE(SMALL_VAE).state_dict(), folder / "Wan2.1_VAE.pth")
    write_umt5(folder, umt5_weights())
    edit_json(folder / "meta.json", vae_fingerprint=load_checkpoint(folder / "Wan2.1_VAE.pth")[1]["fingerprint"])
    flags = "--ckpt", folder, "--camera", "w*3", "--sampling-steps", "2"
    sizes = []
    for prompt in "a red house", "a blue house with two doors":
        call("stream.py", *flags, "--prompt", prompt, "--out", tmp_path / "walk.gif", cwd=tmp_path)
        sizes.append(imageio.imread(tmp_path / "walk.gif", index=None))
    assert sizes[0].shape[0] == 13 and (sizes[0] != sizes[1]).any()
    assert "--score" in refusal("stream.py", *flags, "--score", cwd=tmp_path)
    torch.save(umt5_weights(d=64), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    message = refusal("stream.py", *flags, "--prompt", "a house", cwd=tmp_path)
    assert message == f"error: {folder}: its prompts have 96 channels, found 64; see --text-encoder"
    with pytest.raises(ValueError, match="not the VAE that made the latents"):
        load_vae(folder, CPU, "Wan2.1")
