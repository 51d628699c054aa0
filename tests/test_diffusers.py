"""
Our Wan networks against diffusers' at toy size with random weights, through the names that the loader maps: a second
implementation, written by others, of the same function.
"""
import pytest
import torch
from einops import rearrange

from model import PRESETS, WAN_VAE, DiTConfig, VAEConfig, WanDiT, WanVAE, build, from_diffusers, unipc

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; .ci/run pins the tested version")
SIZES = DiTConfig(48, 80, 4, 2, channels=4, text_dim=24, freq_dim=32)


@torch.no_grad()
def randomised(net):
    """Weights of a useful size everywhere, scales around 1."""
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 and "table" not in name and "gamma" not in name else 0.3)
        if "norm" in name and name.endswith(("weight", "gamma")):
            p += 1
    return net.eval().requires_grad_(False)


def transformer(sizes):
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=sizes.heads, attention_head_dim=sizes.dim // sizes.heads,
        in_channels=sizes.channels, out_channels=sizes.channels, text_dim=sizes.text_dim, freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim, num_layers=sizes.layers)


def autoencoder(cfg):
    return diffusers.AutoencoderKLWan(
        base_dim=cfg.dim, z_dim=cfg.z_dim, dim_mult=list(cfg.dim_mult), num_res_blocks=cfg.res_blocks,
        temperal_downsample=list(cfg.time_down), latents_mean=list(cfg.mean), latents_std=list(cfg.std))


def shapes(weights):
    return {name: tuple(w.shape) for name, w in weights.items()}


def test_transformer():
    theirs, ours = randomised(transformer(SIZES)), WanDiT(SIZES, camera=False)
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    x_t, prompt, sigma = torch.randn(2, 3, 4, 4, 6), torch.randn(2, 7, 24), torch.tensor([0.9, 0.25])
    with torch.no_grad():
        v = theirs(rearrange(x_t, "b f c h w -> b c f h w"), 1000 * sigma, prompt, return_dict=False)[0]
        torch.testing.assert_close(ours(x_t, sigma[:, None].expand(2, 3), prompt),
                                   rearrange(v, "b c f h w -> b f c h w"), atol=5e-5, rtol=0)


@pytest.mark.parametrize("res_blocks, time_down", [(1, (True, True)), (2, (False, True, True)), (1, (False, True))])
def test_vae(res_blocks, time_down):
    mult = (1, 2, 4, 4)[: len(time_down) + 1]
    cfg = VAEConfig(8, 4, mult, res_blocks, time_down, (0.1, -0.2, 0.3, 0.0), (0.5, 1.0, 2.0, 1.5))
    theirs, ours = randomised(autoencoder(cfg)), WanVAE(cfg)
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        latents, _ = ours.encode(video)
        mean, std = (torch.tensor(z).view(-1, 1, 1, 1) for z in (cfg.mean, cfg.std))
        mu = theirs.encode(video).latent_dist.mode()
        torch.testing.assert_close(rearrange(latents, "b f c h w -> b c f h w"), (mu - mean) / std, atol=5e-5, rtol=0)
        decoded = theirs.decode(mu).sample  # clamped
        torch.testing.assert_close(ours.decode(latents)[0].clamp(-1, 1), decoded, atol=5e-5, rtol=0)


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_names_of_the_full_transformer(preset):
    with torch.device("meta"):
        theirs, ours = transformer(PRESETS[preset].dit), build(preset, camera=False)
    assert shapes(from_diffusers(theirs.state_dict())) == shapes(ours.state_dict())


def test_names_and_scale_of_the_full_vae():
    with torch.device("meta"):
        theirs, ours = diffusers.AutoencoderKLWan(), WanVAE(WAN_VAE)
    assert shapes(from_diffusers(theirs.state_dict())) == shapes(ours.state_dict())
    assert (tuple(theirs.config.latents_mean), tuple(theirs.config.latents_std)) == (WAN_VAE.mean, WAN_VAE.std)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_unipc(steps):
    """Their sampler at the levels it chooses for itself, ours at the same ones."""
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=2)
    theirs.set_timesteps(steps)

    def field(x, sigma):
        return 0.7 * x - 0.4 + 0.9 * sigma * x.sin()

    torch.manual_seed(0)
    start = x = torch.randn(1, 2, 3, 4, 4)
    sigmas = theirs.sigmas.tolist()
    for t, sigma in zip(theirs.timesteps, sigmas):
        x = theirs.step(field(x, sigma), t, x, return_dict=False)[0]

    def net(x, sigma, prompt, camera, kv_cache):
        return field(x, sigma[..., None, None, None])

    ours = unipc(net, [start], sigmas, [None], None, 1.0, [None], torch.ones(1, 2))
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=1e-5)
