"""
HunyuanVideo-1.5's encoders at toy size, on disk as released and as diffusers has them: which layer is read, what is
cropped and padded, what SigLIP is shown; each beside diffusers' own functions, and each damage named in one line.

The toy tokenizer splits text by Qwen's rule and knows every word of the chat that surrounds a prompt, so that it counts
them as the real one does.
"""
import contextlib
import gc
import json
import os
import shutil
import weakref

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data as data_module
from conftest import call
from data import (
    DOUBTFUL, HY_AFTER, HY_BEFORE, HY_SYSTEM, K_SQUARE, encode_first_frame, encode_hy_prompts, from_bytes, get_batch,
    load_encoder, load_hy_text_encoders, load_siglip, open_latents, quoted,
)

CPU = torch.device("cpu")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CROP = 108  # diffusers' number
PROMPTS = ['a sign that says "open" by a door', "a quiet room", "“go” or \"stop\", then “go”", ""]
COLOURS, FONTS = {"white": 0, "black": 1}, {"en-A": 0, "cn-B": 1, "jp-C": 2}


def chat_tokenizer():
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator([HY_SYSTEM, "system\nuser\nassistant\n"], trainers.BpeTrainer(
        vocab_size=2000, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=specials[0], chat_template=CHAT)


def shake(net):
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval().requires_grad_(False)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The folder of both layouts, and the nets in them by name."""
    from transformers import (
        ByT5Tokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel,
        T5Config, T5EncoderModel,
    )
    home, chat = tmp_path_factory.mktemp("encoders"), chat_tokenizer()
    released, diffusers = home / "released", home / "diffusers"
    text = dict(vocab_size=len(chat), hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
                num_key_value_heads=2, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=2048)
    eyes = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32,
                fullatt_block_indexes=[0])
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    whole = shake(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**text, **rope, vision_config=eyes)))
    llm = whole.model.language_model

    # Qwen2.5-VL's file and config are older than the class that reads them: flat, with names of their own
    weights = {f"model.{name}": w for name, w in llm.state_dict().items()} | {"lm_head.weight": whole.lm_head.weight}
    weights |= {f"visual.{name}": w for name, w in whole.model.visual.state_dict().items()}
    config = dict(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_act="silu",
                  tie_word_embeddings=False, torch_dtype="bfloat16", use_sliding_window=False, vision_config=eyes)
    write_json(released / "text_encoder/llm/config.json", config | text | rope)
    save_file({name: w.clone() for name, w in weights.items()}, released / "text_encoder/llm/model.safetensors",
              metadata={"format": "pt"})
    chat.save_pretrained(released / "text_encoder/llm")
    llm.save_pretrained(diffusers / "text_encoder")
    chat.save_pretrained(diffusers / "tokenizer")

    size = dict(model_type="t5", vocab_size=384, d_model=24, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    write_json(released / "text_encoder/byt5-small/config.json", size)
    byt5_tokenizer = ByT5Tokenizer()
    byt5_tokenizer.save_pretrained(released / "text_encoder/byt5-small")
    colours, fonts = [f"<color-{n}>" for n in range(2)], ["<en-font-0>", "<cn-font-1>", "<jp-font-2>"]
    byt5_tokenizer.add_tokens(colours + fonts, special_tokens=True)
    byt5 = shake(T5EncoderModel(T5Config(**size | {"vocab_size": 389})))
    glyph = released / "text_encoder/Glyph-SDXL-v2"
    write_json(glyph / "assets/color_idx.json", COLOURS)
    write_json(glyph / "assets/multilingual_10-lang_idx.json", FONTS)
    (glyph / "checkpoints").mkdir()
    torch.save({f"module.text_tower.encoder.{name}": w for name, w in byt5.encoder.state_dict().items()},
               glyph / "checkpoints/byt5_model.pt")
    byt5.save_pretrained(diffusers / "text_encoder_2")
    byt5_tokenizer.save_pretrained(diffusers / "tokenizer_2")

    siglip = shake(SiglipVisionModel(SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                                        num_attention_heads=2, image_size=42, patch_size=14)))
    recipe = {"do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
              "image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.6], "size": {"height": 42, "width": 42},
              "rescale_factor": 1 / 255, "image_processor_type": "SiglipImageProcessor"}
    for place in released / "vision_encoder/siglip", diffusers:
        siglip.save_pretrained(place / "image_encoder")
        write_json(place / "feature_extractor/preprocessor_config.json", recipe)
    name = released / "vision_encoder/siglip/image_encoder/model.safetensors"  # FLUX.1-Redux's is older too
    save_file({f"vision_model.{n.removeprefix('vision_model.')}": w for n, w in load_file(name).items()}, name,
              metadata={"format": "pt"})
    return {"home": home, "llm": llm, "byt5": byt5, "siglip": siglip}


@pytest.fixture(scope="module")
def encoders(toys):
    return load_hy_text_encoders(toys["home"] / "released", CPU)


@pytest.fixture(scope="module")
def siglip(toys):
    return load_siglip(toys["home"] / "released", CPU)


@pytest.fixture(scope="module")
def pipeline():
    """diffusers' pipeline class, whose static methods encode."""
    return pytest.importorskip("diffusers").HunyuanVideo15ImageToVideoPipeline


# -------------------------------------------------------------------------------------------------------------- Prompts


def test_both_layouts_hold_the_same(toys, encoders, siglip):
    other, frame = load_hy_text_encoders(toys["home"] / "diffusers", CPU), torch.rand(1, 3, 30, 52) * 2 - 1
    a, b = encode_hy_prompts(PROMPTS, encoders), encode_hy_prompts(PROMPTS, other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    other_siglip = load_siglip(toys["home"] / "diffusers", CPU)
    assert torch.equal(encode_first_frame(frame, siglip), encode_first_frame(frame, other_siglip))
    ids = [e.byt5_tokenizer('<color-1> "<jp-font-2>').input_ids for e in (encoders, other)]
    assert ids[0] == ids[1] == [385, 35, 37, 388, 1]


def test_template():
    assert HY_SYSTEM == (
        "You are a helpful assistant. Describe the video by detailing the following aspects:"
        "         1. The main content and theme of the video."
        "         2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
        "         3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
        "         4. background environment, light, style and atmosphere."
        "         5. camera angles, movements, and transitions used in the video.")


def test_template_is_diffusers(pipeline):
    import inspect
    defaults = inspect.signature(pipeline._get_mllm_prompt_embeds).parameters
    assert defaults["system_message"].default == HY_SYSTEM and defaults["crop_start"].default == CROP


def test_the_crop_leaves_the_prompt_and_what_follows(encoders):
    tokenizer, prompt = encoders.tokenizer, "Zwölf Türen, in a row"
    ids = tokenizer(HY_BEFORE + prompt + HY_AFTER).input_ids
    assert len(tokenizer(HY_BEFORE).input_ids) == CROP and tokenizer.decode(ids[CROP:]) == prompt + HY_AFTER
    mask = encode_hy_prompts([prompt], encoders)["text_mask"]
    assert mask.shape == (1, 1000) and mask.sum() == mask[0, : len(ids) - CROP].sum() == len(ids) - CROP


def test_text_is_the_third_last_hidden_state(toys, encoders):
    ids = encoders.tokenizer(HY_BEFORE + PROMPTS[0] + HY_AFTER, return_tensors="pt").input_ids
    states = toys["llm"](ids, output_hidden_states=True).hidden_states
    text = encode_hy_prompts(PROMPTS[:1], encoders)["text"][:, : ids.shape[1] - CROP]
    assert len(states) == 6
    off = [(z[:, CROP:] - text).abs().max().item() for z in states]
    assert off[-3] < 1e-5 and min(off[-4], off[-2]) > 0.1


def test_prompts_are_read_as_diffusers_does(toys, encoders, pipeline):
    theirs, mask = pipeline._get_mllm_prompt_embeds(toys["llm"], encoders.tokenizer, PROMPTS, CPU)
    ours = encode_hy_prompts(PROMPTS, encoders)
    assert torch.equal(ours["text_mask"], mask) and ours["text"].shape == theirs.shape
    torch.testing.assert_close(ours["text"], theirs * mask[..., None], atol=1e-5, rtol=1e-5)
    theirs, mask = pipeline._get_byt5_prompt_embeds(encoders.byt5_tokenizer, toys["byt5"], PROMPTS, CPU)
    assert torch.equal(ours["byt5_mask"], mask)
    torch.testing.assert_close(ours["byt5"], theirs * mask[..., None], atol=1e-5, rtol=1e-5)


def test_a_batch_is_its_prompts(encoders):
    together = encode_hy_prompts(PROMPTS, encoders)
    for n, prompt in enumerate(PROMPTS):  # alone there is less padding
        alone = encode_hy_prompts([prompt], encoders)
        for name, z in alone.items():
            torch.testing.assert_close(together[name][n : n + 1], z, atol=1e-5, rtol=1e-5)


def test_a_long_prompt_is_cut(encoders):
    long, longer = (encode_hy_prompts([f'“{"ab" * n}” ' + "objects " * n], encoders) for n in (1100, 1200))
    assert all(z[name].all() for z in (long, longer) for name in ("text_mask", "byt5_mask"))
    assert long["byt5"].shape == (1, 256, 24) and torch.equal(long["byt5"], longer["byt5"])


def test_an_empty_prompt_is_a_space(encoders):
    a, b = encode_hy_prompts([""], encoders), encode_hy_prompts([" "], encoders)
    assert all(torch.equal(a[name], b[name]) for name in a) and a["text_mask"].sum() == 6  # with the five that follow


@pytest.mark.parametrize("prompt, glyphs", [
    ("a quiet room", ""), ("it's a dog's", ""), ('one " alone', ""), ('says "open"', 'Text "open". '),
    ("says “open”", 'Text "open". '), ('"b" and “a” and "b" and “b”', 'Text "b". Text "a". '),
    ('“say "hi" now”', 'Text "say "hi" now". '), ("“”", 'Text "". '),
])
def test_quotes(prompt, glyphs):
    assert quoted(prompt) == glyphs
    theirs = pytest.importorskip("diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video")
    assert glyphs == (theirs.extract_glyph_texts(prompt) or "")


def test_without_quotes_there_are_no_glyphs(encoders):
    z = encode_hy_prompts(PROMPTS, encoders)
    assert z["byt5_mask"].any(1).tolist() == z["byt5"].flatten(1).any(1).tolist() == [True, False, True, False]
    assert not z["text"][z["text_mask"] == 0].any() and not z["byt5"][z["byt5_mask"] == 0].any()


# --------------------------------------------------------------------------------------------------------------- Images


def shown(image, siglip):
    """The pixels that SigLIP gets to see, and its tokens."""
    got, catch = [], lambda _, args, kwargs: got.extend([*args, *kwargs.values()][:1])
    hook = siglip.net.register_forward_pre_hook(catch, with_kwargs=True)
    tokens = encode_first_frame(image, siglip)
    hook.remove()
    return got[0], tokens


def test_images_are_shown_as_diffusers_does(toys, siglip, pipeline):
    from PIL import Image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    processor = SiglipImageProcessorPil.from_pretrained(toys["home"] / "diffusers/feature_extractor")
    photo = np.random.default_rng(0).integers(0, 256, (60, 104, 3), np.uint8)
    image = torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1
    pixels, tokens = shown(image, siglip)
    theirs = processor(Image.fromarray(photo), return_tensors="pt")["pixel_values"]
    assert pixels.shape == theirs.shape == (1, 3, 42, 42) and tokens.shape == (1, 9, 16)
    assert (pixels - theirs).abs().max() < 1.5 / 255 / 0.5  # PIL rounds to whole levels, twice
    theirs = pipeline._get_image_embeds(toys["siglip"], processor, Image.fromarray(photo), CPU)
    torch.testing.assert_close(tokens, theirs, atol=0.05, rtol=0)


def test_an_image_of_siglips_size_is_only_normalised(siglip):
    image = torch.rand(2, 3, 42, 42) * 2 - 1
    mean, std = (torch.tensor(z)[:, None, None] for z in ([0.5, 0.5, 0.4], [0.5, 0.5, 0.6]))
    torch.testing.assert_close(shown(image, siglip)[0], ((image + 1) / 2 - mean) / std)


def test_the_edges_of_a_wide_image_are_seen(siglip):
    image = torch.zeros(1, 3, 48, 83)
    for edge in slice(0, 4), slice(-4, None):
        marked = image.clone()
        marked[..., edge] = 1
        assert (shown(marked, siglip)[0] != shown(image, siglip)[0])[..., [0, -1]].any()


# -------------------------------------------------------------------------------------------------------- What is wrong


def edit_weights(path, **changes):
    load, save = (load_file, lambda w, path: save_file(w, path, metadata={"format": "pt"})) if (
        path.suffix == ".safetensors") else (torch.load, torch.save)
    save({name: w for name, w in (load(path) | changes).items() if w is not None}, path)


def rename_weights(path, old, new):
    save_file({name.replace(old, new): w for name, w in load_file(path).items()}, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


LLM, BYT5, GLYPH = "text_encoder/llm", "text_encoder/byt5-small", "text_encoder/Glyph-SDXL-v2"
SIGLIP, PIXELS = "vision_encoder/siglip/image_encoder", "vision_encoder/siglip/feature_extractor"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("place, damage, found", [
    (LLM, shutil.rmtree, "no such folder; expected HunyuanVideo-1.5"),
    (LLM, lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    (LLM, lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    (LLM, lambda f: os.truncate(f / "model.safetensors", 9999), "deserializing"),
    (LLM, lambda f: rename_weights(f / "model.safetensors", "model.", "language_model."), "62 of its tensors"),
    (LLM, lambda f: edit_weights(f / "model.safetensors", **{NORM: None}), "first layers.1.input_layernorm.weight"),
    (LLM, lambda f: edit_weights(f / "model.safetensors", **{NORM: torch.ones(7)}), "first layers.1.input_layernorm"),
    (LLM, lambda f: [z.unlink() for z in f.glob("tokenizer*")], "its tokens cannot spell Qwen's chat"),
    (BYT5, shutil.rmtree, "no such folder"),
    (GLYPH, shutil.rmtree, "no such folder"),
    (GLYPH, lambda f: edit_weights(
        f / "checkpoints/byt5_model.pt", **{"module.text_tower.encoder.final_layer_norm.weight": None}),
     "1 of its tensors are missing or misshapen, first encoder.final_layer_norm.weight"),
    (GLYPH, lambda f: (f / "checkpoints/byt5_model.pt").write_bytes(b"oops"), "not the byt5 of HunyuanVideo-1.5"),
    (GLYPH, lambda f: edit_json(f / "assets/color_idx.json", red=2), "first encoder.embed_tokens.weight"),
    (GLYPH, lambda f: (f / "assets/color_idx.json").unlink(), "No such file"),
    (SIGLIP, lambda f: edit_weights(f / "model.safetensors", **{"vision_model.post_layernorm.bias": None}),
     "first post_layernorm.bias"),
    (PIXELS, lambda f: edit_json(f / "preprocessor_config.json", size={"shortest_edge": 42}), "expected size"),
    (PIXELS, lambda f: edit_json(f / "preprocessor_config.json", image_mean=None), "image_mean"),
])
def test_damage_is_named(toys, tmp_path, place, damage, found):
    home = shutil.copytree(toys["home"] / "released", tmp_path / "hy")
    damage(home / place)
    with pytest.raises(ValueError) as error:
        load_hy_text_encoders(home, CPU)
        load_siglip(home, CPU)
    message = str(error.value)
    assert message.startswith(f"{home / place}: ") and found in message and "\n" not in message


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/text_encoder/llm: no such folder"):
        load_hy_text_encoders(tmp_path, CPU)
    with pytest.raises(ValueError, match=f"{tmp_path}/vision_encoder/siglip/image_encoder: no such folder"):
        load_siglip(tmp_path, CPU)


# ------------------------------------------------------------------------------------------------- The way into a batch


def test_one_prompt_is_encoded_without_padding_and_only_when_asked(toys, encoders, tmp_path):
    shutil.copytree(toys["home"] / "released", tmp_path / "hy")
    shutil.rmtree(tmp_path / "hy/vision_encoder")  # whoever encodes text needs no SigLIP
    encoder, batch = load_encoder("hy-8b", tmp_path / "hy", CPU), encode_hy_prompts(PROMPTS, encoders)
    for n, prompt in enumerate(PROMPTS):
        row = encoder.encode_text(prompt)
        for name in "text", "byt5":
            valid = batch[f"{name}_mask"][n].bool()
            torch.testing.assert_close(row[name], batch[name][n, valid])
    with pytest.raises(ValueError, match="vision_encoder"):
        encoder.encode_image(torch.zeros(1, 3, 32, 32))


def test_networks_are_loaded_once_and_freed_with_their_encoder(toys, monkeypatch):
    loaded = []

    def load(path, device):
        encoders = load_hy_text_encoders(path, device)
        loaded.append(weakref.ref(encoders.llm))
        return encoders

    monkeypatch.setattr(data_module, "load_hy_text_encoders", load)
    encoder = load_encoder("hy-8b", toys["home"] / "released/text_encoder", CPU)
    assert not loaded  # nobody has asked yet
    first, again = encoder.encode_text("a door"), encoder.encode_text("a door")
    assert len(loaded) == 1 and all(torch.equal(first[name], again[name]) for name in first)
    del encoder
    gc.collect()
    assert loaded[0]() is None


def test_videos_become_hy_latents(toys, encoders, siglip, tmp_path):
    """Two clips with one caption, the first frame of each seen, none with --image-share 0; then a batch of them."""
    call("data.py", "--preset", "tiny-hy", "--count", "1", "--frames", "2", "--size", "32", cwd=tmp_path)
    (tmp_path / "clips").mkdir()
    clips = np.random.default_rng(0).integers(0, 255, (2, 5, 32, 32, 3), dtype=np.uint8)
    for n, clip in enumerate(clips):
        imageio.imwrite(tmp_path / f"clips/{n}.mp4", clip, fps=16, macro_block_size=2, output_params=["-crf", "1"])
    rows = [{"file": f"{n}.mp4", "caption": PROMPTS[0], "poses": "w", "K": K_SQUARE} for n in range(2)]
    (tmp_path / "clips/table.json").write_text(json.dumps(rows))
    flags = ("--videos", "clips", "--frames", "2", "--size", "32", "--keep", *DOUBTFUL, "--text-encoder",
             toys["home"] / "released")
    for share in "1", "0":
        call("data.py", *flags, "--image-share", share, "--out", f"data/{share}", cwd=tmp_path)
        with contextlib.chdir(tmp_path):
            batch = get_batch(open_latents(f"data/{share}"), 0, 0, (0, 1), 2, CPU)
        expected = encode_hy_prompts([PROMPTS[0], ""], encoders)
        n, nulls = (int(mask.sum()) for mask in expected["text_mask"])
        text, mask = batch.prompt.text[0], batch.prompt.text_mask[0]
        torch.testing.assert_close(text[mask], expected["text"][0, :n], atol=1e-2, rtol=1e-2)  # fp16 on disk
        assert batch.prompt.text_mask.sum(1).tolist() == [n, n] and batch.null.text_mask.sum(1).tolist() == [nulls] * 2
        assert batch.prompt.byt5_mask.any() and not batch.null.byt5_mask.any()
        assert batch.prompt.vision.shape == (2, 9, 16) and batch.prompt.vision.any() == (share == "1")
        assert torch.equal(batch.prompt.given_latents[:, 0, :16], batch.x0[:, 0] * int(share))
    frame = from_bytes(torch.from_numpy(imageio.imread(tmp_path / "clips/0.mp4", index=0)).permute(2, 0, 1)[None])
    with contextlib.chdir(tmp_path):
        data = open_latents("data/1")
    seen = data.shards[0].get_tensor("vision")[0].float()
    torch.testing.assert_close(seen, encode_first_frame(frame, siglip)[0], atol=0.05, rtol=0.05)
