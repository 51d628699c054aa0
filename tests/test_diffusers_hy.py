"""
HunyuanVideo-1.5 in diffusers: the same function by other hands, given the same random weights under its own names.
It knows no camera, action, chunk or cache.
"""
import pytest
import torch
from einops import rearrange, repeat

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; only this comparison needs it")

from helpers import SMALL_HY, hy_inputs, random_hy_dit, random_hy_vae
from model import from_diffusers, tree_map


def theirs(z):
    return rearrange(z, "b f c h w -> b c f h w")


def fill(net):
    """Weights of a useful size everywhere, as random_hy_dit's."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(std=p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.3)
            if p.ndim == 1 and name.endswith("weight") or name.endswith("gamma"):
                p += 1
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair():
    """Our transformer and theirs, with the one width that theirs does not ask for."""
    d = SMALL_HY.dim
    net = random_hy_dit(camera=False, action=False, mlp_dim=4 * d, byt5=(20, 2048, 2048))
    net.timed_text = True
    other = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * SMALL_HY.channels + 1, out_channels=SMALL_HY.channels, num_attention_heads=SMALL_HY.heads,
        attention_head_dim=d // SMALL_HY.heads, num_layers=SMALL_HY.layers, text_embed_dim=SMALL_HY.text_dim,
        text_embed_2_dim=20, image_embed_dim=SMALL_HY.vision_dim, rope_axes_dim=SMALL_HY.rope_bands)
    net.load_state_dict(from_diffusers(fill(other).state_dict()))
    return net, other


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # small inputs show a wrong eps
@pytest.mark.parametrize("rows", [[0, 2], [1]], ids=["image", "no image"])
def test_the_transformer_is_that_of_diffusers(pair, rows, scale):
    net, other = pair
    x_t, sigma, prompt, _, _ = hy_inputs(3)
    prompt = tree_map(lambda z: z[rows], prompt)
    prompt = prompt._replace(text=scale * prompt.text, byt5=scale * prompt.byt5, vision=scale * prompt.vision)
    x_t, sigma = x_t[rows], sigma[rows, 0]
    given = torch.cat([prompt.given_latents, torch.zeros_like(prompt.given_latents).repeat(1, 2, 1, 1, 1)], dim=1)
    expected = other(
        theirs(torch.cat([x_t, given], dim=2)), 1000 * sigma, prompt.text, prompt.text_mask, None, prompt.byt5,
        prompt.byt5_mask, prompt.vision, return_dict=False)[0]
    mine = theirs(net(x_t, repeat(sigma, "b -> b f", f=3), prompt))
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_the_vae_is_that_of_diffusers():
    vae = random_hy_vae()
    widths = vae.cfg.widths
    other = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=vae.cfg.z_dim, block_out_channels=widths, layers_per_block=vae.cfg.res_blocks,
        spatial_compression_ratio=vae.cfg.stride)
    vae.load_state_dict(from_diffusers(fill(other).state_dict()))
    video, z = torch.rand(1, 3, 9, 16, 24) * 2 - 1, torch.randn(1, 4, 3, 2, 3)  # its mask fails at b 2
    with torch.no_grad():
        moments, pixels = other.encode(video).latent_dist.parameters, other.decode(z).sample
    torch.testing.assert_close(vae.compress(video, {}), moments.chunk(2, dim=1)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.encoder(video, {}), moments, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.reconstruct(z, {}), pixels, atol=1e-5, rtol=1e-5)
