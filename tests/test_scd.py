"""
Separable causal diffusion (examples/variants/scd.py): a stream against a teacher-forced pass, what each chunk sees, the
cases in which the split network is the plain one, what a chunk costs, and that it is a stage.
"""
import json
import shutil
import sys
from collections import Counter
from importlib import import_module

import pytest
import torch
from torch import nn

import model
import stream
from conftest import MINIATURE, ROOT, call, refusal, run
from data import get_batch, open_latents
from helpers import GENERATED, cut, made_from, make_batch
from model import (
    PRESETS, DiTConfig, WanDiT, add_noise, load_checkpoint, load_net, masked_mse, move_window, rollout, rope_table,
)
from train_ar import teacher_forcing_loss

sys.path.insert(0, str(ROOT / "examples/variants"))
scd = import_module("scd")

NEAR = dict(atol=1e-4, rtol=1e-4)
CHUNK = 2
META = {"chunk": CHUNK, "shift": 3.0, "sampler": "scd", "sampling_steps": 3, "guidance": 1.0, "camera": True}


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    """Shapes that a test registers are forgotten after it, and how their blocks are counted."""
    monkeypatch.setattr(model, "count_all_blocks", model.count_all_blocks)
    before = dict(PRESETS)
    yield
    PRESETS.clear()
    PRESETS.update(before)


def filled(net, seed=0):
    """Weights of a useful size everywhere, also where training starts at zero."""
    torch.manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.requires_grad_(False)


def make(kind, encoder=2, decoder=2):
    """A split network, and the plain one with its weights."""
    cfg = DiTConfig(32, 48, 2, encoder + decoder, channels=4, text_dim=24, freq_dim=32)
    net, plain = filled(scd.SCD(cfg, decoder=decoder, kind=kind)), WanDiT(cfg)
    plain.load_state_dict(net.state_dict())
    return net, plain


def inputs(batch):
    """What the encoder and what the decoder read of five frames, each frame's chunk at levels of its own."""
    torch.manual_seed(3)
    levels = torch.rand(2, 2, 3).repeat_interleave(CHUNK, dim=2)[:, :, :5] * batch.generated
    return [(add_noise(batch.x0, torch.randn_like(batch.x0), sigma), sigma) for sigma in levels]


def change_per_chunk(a, b):
    """Largest change in each chunk, the last of which is short."""
    return torch.stack([z.abs().amax() for z in (a - b).split(CHUNK, dim=1)])


def forced(net, batch, seen, noisy, x0=None, camera=None):
    """v [b f c h w], every chunk after its clean past."""
    clean, camera = batch.x0 if x0 is None else x0, camera or batch.camera
    context = net(*seen, batch.prompt, camera, clean=clean, chunk=CHUNK)
    return net(*noisy, batch.prompt, camera, context=context)


# -------------------------------------------------------------------------------------------------------- The network


@pytest.mark.parametrize("camera", (True, False))
@pytest.mark.parametrize("kind", scd.KINDS)
def test_a_stream_is_the_teacher_forced_pass(kind, camera):
    """Chunk by chunk, the last one short; the second video's first frames are given."""
    net, _ = make(kind)
    batch = make_batch()
    seen, noisy = inputs(batch)
    where = (lambda frames: batch.camera.frames(frames)) if camera else lambda frames: None
    whole = net(*noisy, batch.prompt, context=net(*seen, batch.prompt, where(slice(None)), clean=batch.x0, chunk=CHUNK))
    kv_cache = net(batch.x0[:, :0], GENERATED[:, :0], batch.prompt, where(slice(0)), update_cache=True)
    for start in range(0, 5, CHUNK):
        frames = slice(start, start + CHUNK)
        here = where(frames)
        context = net(*cut(frames, *seen), batch.prompt, here, kv_cache=kv_cache)
        for _ in range(2):  # the same at every step
            v = net(*cut(frames, *noisy), batch.prompt, here, context=context)
            torch.testing.assert_close(v, whole[:, frames], **NEAR)
        x0 = batch.x0[:, frames]
        kv_cache = net(x0, torch.zeros(x0.shape[:2]), batch.prompt, here, kv_cache=kv_cache, update_cache=True)
    assert kv_cache.frames == 5 and len(kv_cache.layers) == net.split == 2 and len(kv_cache.text[0]) == 4


@pytest.mark.parametrize("kind", scd.KINDS)
def test_a_window_that_moves_its_world_changes_nothing(kind):
    net, _ = make(kind)
    batch, here = make_batch(), make_batch().camera.frames(slice(2, 4))
    seen, noisy = (cut(slice(2, 4), *z) for z in inputs(batch))
    kv_cache = net(batch.x0[:, :0], GENERATED[:, :0], batch.prompt, batch.camera.frames(slice(0)), update_cache=True)
    x0, before = batch.x0[:, :2], batch.camera.frames(slice(0, 2))
    kv_cache = net(x0, torch.zeros(2, 2), batch.prompt, before, kv_cache=kv_cache, update_cache=True)
    moved = move_window(net, kv_cache, 4, 0, 2, batch.camera.viewmats[:, 1])
    vs = [net(*noisy, batch.prompt, context=net(*seen, batch.prompt, here, kv_cache=z)) for z in (kv_cache, moved)]
    torch.testing.assert_close(*vs, **NEAR)


@pytest.mark.parametrize("kind", scd.KINDS)
def test_what_a_chunk_sees(kind):
    """Of the clean video what was before, of the noisy ones and of the commands, of the decoder's level its own."""
    net, _ = make(kind)
    batch = make_batch(generated=torch.ones(2, 5))
    (x_e, sigma_e), (x_t, sigma) = seen, noisy = inputs(batch)
    v, middle = forced(net, batch, seen, noisy), slice(2, 4)

    def moved(z):
        z = z.clone()
        z[:, middle] += 0.1
        return z

    def changed(*args, **others):
        return (change_per_chunk(forced(net, batch, *args, **others), v) > 1e-5).tolist()

    assert changed(seen, noisy, x0=moved(batch.x0)) == [False, False, True]
    assert changed((moved(x_e), sigma_e), noisy) == changed((x_e, moved(sigma_e)), noisy) == [False, True, False]
    assert changed(seen, (moved(x_t), sigma)) == changed(seen, (x_t, moved(sigma))) == [False, True, False]
    commanded = batch.camera._replace(viewmats=moved(batch.camera.viewmats))
    assert changed(seen, noisy, camera=commanded) == [False, True, True]


def test_the_decoder_hears_the_past_and_the_command_from_the_encoder_alone():
    """Of a decoder that is told nothing, nothing is left of either."""
    for kind in scd.KINDS:
        net, _ = make(kind)
        batch = make_batch()
        seen, noisy = inputs(batch)
        context = net(*seen, batch.prompt, batch.camera, clean=batch.x0, chunk=CHUNK)
        other = net(*seen, batch.prompt, batch.camera, clean=-batch.x0, chunk=CHUNK)
        told = [net(*noisy, batch.prompt, context=z) for z in (context, other)]
        assert change_per_chunk(*told).gt(1e-3).tolist() == [False, True, True]
        deaf = [net(*noisy, batch.prompt, context=z._replace(tokens=0 * z.tokens)) for z in (context, other)]
        assert torch.equal(*deaf)


@pytest.mark.parametrize("clean", (True, False))
def test_the_encoder_is_a_plain_network_up_to_its_last_block(clean):
    net, plain = make("prefix")
    batch, found = make_batch(), []
    seen, _ = inputs(batch)
    how = dict(clean=batch.x0, chunk=CHUNK) if clean else {}
    plain.blocks[1].register_forward_hook(lambda block, args, output: found.append(output[0]))
    with torch.no_grad():
        plain(*seen, batch.prompt, batch.camera, **how)
    torch.testing.assert_close(net(*seen, batch.prompt, batch.camera, **how).tokens, found[0][:, -5:], **NEAR)


def test_a_prefix_is_a_cache():
    """Without blocks for the encoder, the decoder is a plain network that has cached the chunk at level one."""
    net, plain = make("prefix", encoder=0, decoder=2)
    batch, one = make_batch(), torch.ones(2, 5)
    (x_e, _), noisy = inputs(batch)
    context = net(x_e, torch.rand(2, 5), batch.prompt, batch.camera)
    with torch.no_grad():
        kv_cache = plain(x_e, one, batch.prompt, batch.camera, update_cache=True)._replace(frames=0)
        expected = plain(*noisy, batch.prompt, batch.camera, kv_cache=kv_cache)
        assert not torch.allclose(plain(*noisy, batch.prompt, batch.camera), expected, **NEAR)
    torch.testing.assert_close(net(*noisy, batch.prompt, context=context), expected, **NEAR)


def test_tokens_side_by_side_are_a_plain_network_of_two_videos(monkeypatch):
    """Both in the same place, at the same times and at one level."""
    net, plain = make("tokens", encoder=0, decoder=2)
    batch = make_batch()
    (x_e, _), (x_t, sigma) = inputs(batch)
    v = net(x_t, sigma, batch.prompt, context=net(x_e, torch.rand(2, 5), batch.prompt, batch.camera))
    monkeypatch.setattr(model, "rope_table", lambda frames, *rest: rope_table(frames % 5, *rest))
    camera = model.Camera(*(torch.cat([z, z], dim=1) for z in batch.camera))
    with torch.no_grad():
        expected = plain(torch.cat([x_e, x_t], dim=1), sigma.repeat(1, 2), batch.prompt, camera)[:, 5:]
    torch.testing.assert_close(v, expected, **NEAR)


# --------------------------------------------------------------------------------------------------- Loss and sampler


def test_the_loss_is_two_steps_of_the_decoder_after_one_of_the_encoder():
    """With three noises, and three levels that are zero where frames are given."""
    calls, batch = [], make_batch()
    scale = 50 * torch.rand(2, 5, 4, 1)  # of each token
    tokens = (scale * torch.randn(2, 5, 4, 64)).bfloat16()

    def net(x_t, sigma, prompt, camera=None, context=None, **how):
        calls.append((x_t, sigma, context, how))
        if context is None:
            return scd.Context(tokens, None, None, None, [])
        return torch.zeros_like(x_t)

    loss = scd.scd_loss(net, batch, META, null_prob=0.0)
    made, noises, losses = GENERATED > 0, [], []
    for x_t, sigma, context, how in calls:
        assert torch.equal(x_t[~made], batch.x0[~made]) and not sigma[~made].any() and (sigma[made] > 0).all()
        assert torch.equal(sigma[:, 2], sigma[:, 3] * made[:, 2])  # a level per chunk
        level = sigma[..., None, None, None]
        noises.append(((x_t - (1 - level) * batch.x0) / level)[made])
        if context is None:
            assert sigma[made].min() > 0.8 and how["clean"] is batch.x0 and how["chunk"] == CHUNK
        else:
            heard = (context.tokens.float() - tokens.float()) / scale
            assert context.tokens.dtype == torch.bfloat16 and heard.std().item() == pytest.approx(0.05, rel=0.1)
            noise = torch.zeros_like(x_t)
            noise[made] = noises[-1]
            losses.append(masked_mse(torch.zeros_like(x_t), noise - batch.x0, GENERATED))
    assert [context is None for _, _, context, _ in calls] == [True, False, False]
    assert calls[1][2] is calls[2][2] and not torch.equal(calls[1][1], calls[2][1])
    assert all(abs((a * b).mean()) < 0.15 for a, b in zip(noises, [*noises[1:], noises[0]]))
    assert loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-4)


def test_the_loss_teaches_all_of_the_network():
    for kind in scd.KINDS:
        net, _ = make(kind)
        scd.scd_loss(net.requires_grad_(True), make_batch(), META, 0.0).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("kind", scd.KINDS)
def test_a_chunk_takes_one_pass_of_the_encoder(kind):
    """And one to commit it; of the decoder one for each step, and one for a prefix. In the first pass of all, which has
    no frames, all of them read the prompt."""
    net, _ = make(kind)
    batch, count = make_batch(), Counter()
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda block, args, output, i=i: count.update({i: args[0].shape[1]}))
    list(rollout(net, META, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera))
    decoder = 5 * 3 * 2 if kind == "tokens" else 5 * 3 + 5
    assert count == {0: 5 + 4, 1: 5 + 4, 2: decoder, 3: decoder}  # frames


def test_the_sampler_is_euler_of_the_decoder():
    """With guidance, each prompt's after a context of its own."""
    net, _ = make("prefix")
    batch = make_batch()
    meta = META | {"guidance": 1.5, "sampling_steps": 1}
    chunks = rollout(net, meta, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera)
    noise, one, here = make_batch().noise(slice(0, 2)), torch.ones(2, 2), batch.camera.frames(slice(0, 2))
    cond, null = (net(noise, one, prompt, context=net(noise.flip(-1), one, prompt, here))
                  for prompt in (batch.prompt, batch.null))
    torch.testing.assert_close(next(chunks), noise - (null + 1.5 * (cond - null)), **NEAR)


def test_the_encoder_has_noise_of_its_own():
    """As in training, where frames that are given are clean for both."""
    seen, batch, given = [], make_batch(), GENERATED == 0

    def net(x_t, sigma, prompt, camera=None, context=None, **past):
        seen.append(x_t)
        return torch.zeros_like(x_t)

    noise = torch.randn(2, 5, 4, 16, 16)
    scd.scd(net, [noise], [1.0, 0.0], [batch.prompt], batch.camera, 1.0, [None], GENERATED)
    encoder, decoder = seen
    assert torch.equal(decoder, noise) and torch.equal(encoder[given], noise[given])
    a, b = encoder[~given], noise[~given]
    assert a.std().item() == pytest.approx(1, rel=0.05) and (a * b).mean().abs() < 0.05


def test_a_chunk_costs_what_its_blocks_do():
    """Passes of a block, at 4 steps: of plain AR (4 + 1) 4, prefix 2 3 + 1 + 4, tokens 2 3 + 2 4, two blocks (4 + 1) 2.
    """
    flops = {}
    for decoder, kind, blocks in ((1, "prefix", [0, 1, 2, 3]), (1, "tokens", [0, 1, 2, 3]), (0, "plain", [0, 3])):
        preset = scd.register(scd.Shape("tiny", blocks, decoder, kind))
        flops[kind], seconds = scd.cost(preset, 4, torch.device("cpu"))
        assert seconds > 0
    whole, _ = scd.cost("tiny", 4, torch.device("cpu"))
    shares = [flops[kind] / whole for kind in ("prefix", "tokens", "plain")]
    assert shares == pytest.approx([11 / 20, 14 / 20, 10 / 20], abs=0.04)


# ----------------------------------------------------------------------------------------------------------- A stage


def test_blocks_are_copies(chain):
    weights, _ = load_checkpoint(chain / "ckpt/ar.pt")
    chosen = scd.choose_blocks(weights, [0, 1, 0, 3])
    assert torch.equal(chosen["blocks.2.ffn.0.weight"], weights["blocks.0.ffn.0.weight"])
    assert torch.equal(chosen["blocks.3.ffn.0.weight"], weights["blocks.3.ffn.0.weight"])
    assert chosen.keys() == weights.keys() and chosen["head.head.weight"] is weights["head.head.weight"]


FLAGS = (*MINIATURE, "--warmup", "0", "--cooldown", "0", "--steps", "1")
RUNS = {  # name: its flags, its sampler, the blocks that it is made of
    "prefix": (("--encoder", "2", "--decoder", "0", "3"), "scd", [0, 1, 0, 3]),
    "tokens": (("--encoder", "3", "--decoder", "3", "--decoder-kind", "tokens"), "scd", [0, 1, 2, 3]),
    "plain": (("--shallow", "3"), "euler", [0, 1, 3]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_it_is_a_stage(chain, tmp_path, capsys, monkeypatch, kind):
    """It trains, goes on where it stopped, is scored, and is refused by whatever does not know its shape."""
    flags, sampler, blocks = RUNS[kind]
    script, out = "examples/variants/scd.py", tmp_path / "scd.pt"
    call(script, *FLAGS, *flags, "--out", out, cwd=chain)
    call(script, *FLAGS, *flags, "--steps", "2", "--resume", "--out", out, cwd=chain)
    call(script, *FLAGS, *flags, "--steps", "2", "--out", tmp_path / "whole.pt", cwd=chain)
    scd.load_shape(out)
    resumed, whole = (load_checkpoint(path)[0] for path in (out, tmp_path / "whole.pt"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    meta = scd.load_shape(out)
    assert meta["sampler"] == sampler and meta["shape"]["blocks"] == blocks and meta["step"] == 2
    assert meta["from"] == made_from(chain / "ckpt/ar.pt") and meta["stage"] == "ar"
    net, _ = load_net(out, torch.device("cpu"), "ar")
    start = scd.choose_blocks(load_checkpoint(chain / "ckpt/ar.pt")[0], blocks)
    assert sum((w - start[name]).square().sum() for name, w in net.state_dict().items()) > 0

    shipped = tmp_path / "shipped/tiny"  # whose VAE it has, where none lies beside
    shipped.mkdir(parents=True)
    shutil.copy(chain / "ckpt/vae.pt", shipped)
    monkeypatch.setattr(stream, "SHIPPED", shipped)
    capsys.readouterr()
    call(script, "--score", "--ckpt", out, "--scenes", "8", "--sampling-steps", "2", "--camera", "w*3", "--out",
         tmp_path / "walk.mp4", cwd=chain)
    printed = capsys.readouterr().out
    assert '"steps": 2' in printed and f"| {meta['preset']} | 48 |" in printed and '"psnr"' in printed

    other = ["--encoder", "1", "--decoder", "3"] if kind != "plain" else ["--shallow", "2"]
    assert "another run" in refusal(script, *FLAGS, *other, "--resume", "--out", out, cwd=chain)
    del PRESETS[meta["preset"]]
    assert meta["preset"] in refusal("stream.py", "--ckpt", out, "--vae", "ckpt/vae.pt", cwd=chain)


def test_two_ranks_that_share_videos_train_as_one(chain, tmp_path):
    weights = []
    for nproc in (1, 2):
        out = tmp_path / f"{nproc}.pt"
        done = run("examples/variants/scd.py", *FLAGS, "--sp", nproc, "--out", out, cwd=chain, nproc=nproc)
        assert done.returncode == 0, done.stderr
        scd.load_shape(out)
        weights.append(torch.cat([w.flatten() for w in load_checkpoint(out)[0].values()]))
    start = scd.choose_blocks(load_checkpoint(chain / "ckpt/ar.pt")[0], [0, 1, 2, 3])
    start = torch.cat([start[name].flatten() for name in load_checkpoint(out)[0]])
    assert (weights[1] - weights[0]).norm() < 0.02 * (weights[0] - start).norm()


def test_at_the_start_the_control_is_a_plain_network_of_fewer_blocks(chain):
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    cfg = PRESETS[scd.register(scd.Shape("tiny", [0, 1, 3], 0, "plain"))].dit
    net, plain = WanDiT(cfg), WanDiT(PRESETS["tiny"].dit)
    net.load_state_dict(scd.choose_blocks(weights, [0, 1, 3]))
    plain.load_state_dict(weights)
    del plain.blocks[2]
    data = open_latents(chain / "data/toy", "tiny")
    losses = [teacher_forcing_loss(z, get_batch(data, 0, 0, (0, 1), 2, torch.device("cpu"), 0.0), meta, 0.0)
              for z in (net, plain)]
    assert losses[0] == losses[1]


def test_the_bill(capsys, tmp_path):
    for flags, preset in (["--shallow", "3"], "tiny-0.1.3-plain"), ([], "tiny-0.1.2-3-prefix"):
        call("examples/variants/scd.py", "--plan", "1", *flags, cwd=tmp_path)
        assert f'"preset": "{preset}", "stage": "ar"' in capsys.readouterr().out


@pytest.mark.parametrize("kind", scd.KINDS)
def test_the_bill_is_that_of_all_blocks(capsys, tmp_path, kind):
    """Of four in the encoder and three in the decoder."""
    flags = ["--encoder", "4", "--decoder", "0", "1", "3", "--decoder-kind", kind]
    args = scd.parse_args(flags)
    args.preset = scd.register(scd.shape_of(args))
    for how in dict(recompute=True, flops=False), dict(recompute=False, flops=True):
        (_, found), = scd.count_both_kinds(args, scd.WORK, [64, 64], **how)
        (_, whole), = model.count(args, scd.WORK, [64, 64], 7, **how)
        assert [found[name] for name in found] == pytest.approx([whole[name] for name in found])
    call("examples/variants/scd.py", "--plan", "1", *flags, cwd=tmp_path)
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert planned["tflop"] == pytest.approx(whole["flop"] / 1e12)


def test_wrong_flags_are_refused(chain, capsys):
    for flags in (["--encoder", "5"], ["--decoder", "4"], ["--shallow", "5"], ["--preset", "tiny-hy"]):
        with pytest.raises(SystemExit) as stop:
            call("examples/variants/scd.py", *flags, cwd=chain)
        assert stop.value.code == 2 and flags[0] in capsys.readouterr().err
    assert "that this script made" in refusal("examples/variants/scd.py", "--score", "--ckpt", "ckpt/ar.pt", cwd=chain)
