"""
HunyuanVideo-1.5 in diffusers: the same function by other hands, given the same random weights under its own names.
It knows no camera, action, chunk or cache.
"""
import re

import pytest
import torch
from einops import repeat

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; only this comparison needs it")

from model import leafwise
from test_hy import SMALL, inputs, random_net, random_vae, theirs

DIT = [  # released name -> diffusers' name, in this order
    ("^img_in", "x_embedder"), ("^cond_type_embedding", "cond_type_embed"), ("^double_blocks", "transformer_blocks"),
    (r"^final_layer\.linear", "proj_out"), (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
    (r"^(time_in|.*t_embedder)\.mlp\.0", r"\1.linear_1"), (r"^(time_in|.*t_embedder)\.mlp\.2", r"\1.linear_2"),
    ("^time_in", "time_embed.timestep_embedder"), (r"\.t_embedder", ".time_text_embed.timestep_embedder"),
    (r"\.c_embedder", ".time_text_embed.text_embedder"), (r"\.input_embedder", ".proj_in"),
    ("^txt_in", "context_embedder"), (r"individual_token_refiner\.blocks", "token_refiner.refiner_blocks"),
    (r"adaLN_modulation\.1", "norm_out.linear"),
    ("self_attn_proj", "attn.to_out.0"), (r"^byt5_in\.fc", "context_embedder_2.linear_"),
    (r"^byt5_in\.layernorm", "context_embedder_2.norm"), (r"^vision_in\.proj\.0", "image_embedder.norm_in"),
    (r"^vision_in\.proj\.1", "image_embedder.linear_1"), (r"^vision_in\.proj\.3", "image_embedder.linear_2"),
    (r"^vision_in\.proj\.4", "image_embedder.norm_out"), ("img_mod", "norm1"), ("txt_mod", "norm1_context"),
    ("img_mlp", "ff"), ("txt_mlp", "ff_context"), (r"\.mlp\.fc", ".ff.fc"), (r"\.fc1\.", ".net.0.proj."),
    (r"\.fc2\.", ".net.2."), ("img_attn_([qk])_norm", r"attn.norm_\1"), ("txt_attn_([qk])_norm", r"attn.norm_added_\1"),
    ("img_attn_([qkv])", r"attn.to_\1"), ("txt_attn_([qkv])", r"attn.add_\1_proj"), ("img_attn_proj", "attn.to_out.0"),
    ("txt_attn_proj", "attn.to_add_out"),
]
VAE = [
    (r"\.block_1\.", ".resnets.0."), (r"\.block_2\.", ".resnets.1."), (r"\.block\.", ".resnets."),
    ("attn_1", "attentions.0"), (r"\.([qkv])\.", r".to_\1."), (r"\.(down|up)\.", r".\1_blocks."),
    (r"\.mid\.", ".mid_block."), (r"\.(down|up)sample\.", r".\1samplers.0."),
]


def renamed(weights, rules):
    out = {}
    for name, w in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = w
    return out


def split(weights):
    """Two tensors are laid out otherwise: q, k and v of the refiner are three, the final layer has its scale first."""
    for name, w in weights.items():
        if "self_attn_qkv" in name:
            yield from ((name.replace("self_attn_qkv", f"attn.to_{part}"), z) for part, z in zip("qkv", w.chunk(3)))
        else:
            yield name, torch.cat(w.chunk(2)[::-1]) if name.startswith("final_layer.adaLN") else w


@pytest.fixture(scope="module")
def pair():
    """Our transformer and theirs, with the one width that theirs does not ask for."""
    d = SMALL.dim
    net = random_net(camera=False, action=False, mlp_dim=4 * d, byt5=(20, 2048, 2048), timed_text=True)
    other = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * SMALL.channels + 1, out_channels=SMALL.channels, num_attention_heads=SMALL.heads,
        attention_head_dim=d // SMALL.heads, num_layers=SMALL.layers, text_embed_dim=SMALL.text_dim,
        text_embed_2_dim=20, image_embed_dim=SMALL.vision_dim, rope_axes_dim=SMALL.rope_bands)
    other.load_state_dict(renamed(dict(split(net.state_dict())), DIT))
    return net, other.eval().requires_grad_(False)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # small inputs show a wrong eps
@pytest.mark.parametrize("rows", [[0, 2], [1]], ids=["image", "no image"])
def test_the_transformer_is_that_of_diffusers(pair, rows, scale):
    net, other = pair
    x_t, sigma, prompt, _, _ = inputs(3)
    prompt = leafwise(lambda z: z[rows], prompt)
    prompt = prompt._replace(text=scale * prompt.text, byt5=scale * prompt.byt5, vision=scale * prompt.vision)
    x_t, sigma = x_t[rows], sigma[rows, 0]
    image = torch.cat([prompt.image, torch.zeros_like(prompt.image).repeat(1, 2, 1, 1, 1)], dim=1)
    expected = other(
        theirs(torch.cat([x_t, image], dim=2)), 1000 * sigma, prompt.text, prompt.text_mask, None, prompt.byt5,
        prompt.byt5_mask, prompt.vision, return_dict=False)[0]
    mine = theirs(net(x_t, repeat(sigma, "b -> b f", f=3), prompt))
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_the_vae_is_that_of_diffusers():
    vae = random_vae()
    widths = vae.cfg.widths
    other = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=vae.cfg.z_dim, block_out_channels=widths, layers_per_block=vae.cfg.res_blocks,
        spatial_compression_ratio=vae.cfg.stride)
    other.load_state_dict(renamed(vae.state_dict(), VAE))
    video, z = torch.rand(1, 3, 9, 16, 24) * 2 - 1, torch.randn(1, 4, 3, 2, 3)  # its mask fails at b 2
    with torch.no_grad():
        moments, image = other.encode(video).latent_dist.parameters, other.decode(z).sample
    torch.testing.assert_close(torch.cat(vae.moments(video, {}), dim=1), moments, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.image(z, {}), image, atol=1e-5, rtol=1e-5)
