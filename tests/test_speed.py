"""
What is there for speed or size alone changes no number: to the bit where the same sums are made, else to rounding.
"""
import gc
import json
import os
import shutil
import subprocess
import weakref
from dataclasses import replace

import imageio.v3 as imageio
import pytest
import torch
import torch.distributed as dist
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from conftest import ENVIRONMENT, ROOT, call, command, refusal, run
from data import (
    K_SQUARE, Clip, Encoder, Run, encode, get_batch, intrinsics, log_prompt, look, open_latents, parse_args,
    parse_trajectory, read_prompts, save_prompts, save_shard,
)
from helpers import CPU
from model import (
    PRESETS, Camera, apply_projection, build, four_copies, fresh_weights, load_checkpoint, load_net, prefill,
    save_checkpoint, shard, start_process_group, update_cache,
)
from train_ar import teacher_forcing_loss

KIND = {"K": list(K_SQUARE), "size": [32, 32], "fps": 16.0, "frames": 4, "vae_fingerprint": "0"}
DMD = "--batch-size 1 --fake-score-updates 1 --lr 1e-3 --fake-score-lr 1e-3 --ema-decay 0.5 --log-every 1".split()


def make_world(folder, preset="tiny"):
    """A latents folder of four random videos of four frames, data/toy."""
    torch.manual_seed(0)
    dit = PRESETS[preset].dit
    camera = {"viewmats": parse_trajectory("w,w+l,l").expand(4, 4, 4, 4), "Ks": intrinsics(K_SQUARE).expand(4, 4, 3, 3)}
    tensors = camera | {"latents": torch.randn(4, 4, dit.channels, 8, 8).half(), "prompt_ids": torch.arange(4) % 2}
    widths = {"embeds": dit.text_dim}
    if preset == "tiny-hy":
        widths = {"text": dit.text_dim, "byt5": dit.byt5[0]}
        tensors["vision"] = torch.randn(4, 3, dit.vision_dim).half()
    prompts = [{name: torch.randn(length, width) for name, width in widths.items()} for length in (5, 7, 2)]
    meta = KIND | {"preset": preset, "vae": "nowhere.pt", "prompt_length": 8}
    (folder / "data/toy").mkdir(parents=True)
    save_shard(folder / "data/toy/latents-000000.safetensors", tensors, {"meta": json.dumps(meta)})
    save_prompts(folder / "data/toy/prompts.safetensors", prompts, {"prompts": '["a", "b"]'})
    return folder


def make_checkpoint(path, stage, preset="tiny", **changes):
    """A network of random weights, of a useful size everywhere."""
    weights = fresh_weights(preset, camera=True, seed=0)
    torch.manual_seed(1)
    for w in weights.values():
        nn.init.normal_(w, std=0.3 if w.ndim == 1 else w[0].numel() ** -0.5)
    meta = KIND | {"preset": preset, "stage": stage, "step": 1, "from": "nothing", "camera": True, "given_prob": 0.25,
                   "chunk": 2, "shift": 3.0, "sampler": "few_step", "sampling_steps": 4, "guidance": 1.0}
    save_checkpoint(path, weights, meta | changes)
    return path


@pytest.fixture
def world(tmp_path):
    """Latents, a student and scores: all that train_dmd.py reads."""
    make_world(tmp_path)
    make_checkpoint(tmp_path / "ckpt/ode.pt", "ode")
    make_checkpoint(tmp_path / "ckpt/camera.pt", "camera")
    return tmp_path


def run_ranks(code, folder):
    """The code on two ranks, within `folder`; what they print."""
    (folder / "worker.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    done = subprocess.run(command(folder / "worker.py", nproc=2), cwd=folder, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_weights(*paths):
    a, b = (load_checkpoint(path)[0] for path in paths)
    return all(torch.equal(w, b[name]) for name, w in a.items())


# ------------------------------------------------------------------------------------------------------------- Cameras


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])  # bf16: one step at 8
@pytest.mark.parametrize("frames, d", [(0, 32), (3, 32), (3, 56), (3, 20)])
def test_four_copies_of_a_projection_do_as_one(frames, d, dtype, atol):
    torch.manual_seed(0)
    x, P = torch.randn(2, frames, 6, d).to(dtype), torch.randn(2, frames, 4, 4)
    vectors = rearrange(x.double(), "b f s (g j) -> b f s g j 1", j=4)
    exact = rearrange(P.double()[:, :, None, None] @ vectors, "b f s g i 1 -> b f s (g i)")
    for matrix in (P, four_copies(P, d)):
        torch.testing.assert_close(apply_projection(x, matrix), exact.to(dtype), atol=atol, rtol=0)
    grads = []
    for matrix in (P, four_copies(P, d)):
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(apply_projection(leaf, matrix).float().square().sum(), leaf)
    torch.testing.assert_close(*grads, atol=10 * atol, rtol=1e-2)


# -------------------------------------------------------------------------------------------------------- Larger scores


@pytest.mark.slow
def test_scores_may_be_larger_than_the_student(world, monkeypatch):
    tiny = PRESETS["tiny"]
    monkeypatch.setitem(PRESETS, "wide", tiny._replace(dit=replace(tiny.dit, dim=96, ffn_dim=128, heads=2, layers=5)))
    scores = make_checkpoint(world / "ckpt/wide.pt", "camera", "wide")
    flags = *DMD, "--scores", scores, "--state-every", 1
    call("train_dmd.py", *flags, "--steps", 2, "--out", "ckpt/two.pt", cwd=world)
    _, meta = load_checkpoint(world / "ckpt/two.pt")
    mark = load_checkpoint(scores)[1]["fingerprint"]
    assert meta["preset"] == "tiny" and meta["from"].endswith(f"scores wide.pt at step 1, {mark}")
    call("train_dmd.py", *flags, "--steps", 1, "--out", "ckpt/one.pt", cwd=world)
    call("train_dmd.py", *flags, "--steps", 2, "--out", "ckpt/one.pt", "--resume", cwd=world)
    assert same_weights(world / "ckpt/one.pt", world / "ckpt/two.pt")
    # who points is heard: other scores, another student
    call("train_dmd.py", *DMD, "--steps", 2, "--out", "ckpt/other.pt", cwd=world)
    assert not same_weights(world / "ckpt/other.pt", world / "ckpt/two.pt")
    message = refusal("train_dmd.py", *DMD, "--steps", 3, "--out", "ckpt/one.pt", "--resume", cwd=world)
    assert "was made from other weights than --scores ckpt/camera.pt holds" in message


@pytest.mark.parametrize("change", [{"channels": 4}, {"text_dim": 64}, "tiny-hy"])
def test_scores_that_read_other_latents_or_prompts_are_refused(world, monkeypatch, change):
    tiny = PRESETS["tiny"]
    other = PRESETS[change] if isinstance(change, str) else tiny._replace(dit=replace(tiny.dit, **change))
    monkeypatch.setitem(PRESETS, "foreign", other)
    scores = make_checkpoint(world / "ckpt/foreign.pt", "camera", "foreign")
    message = refusal("train_dmd.py", *DMD, "--scores", scores, cwd=world)
    assert message == f"error: {scores}: a foreign network, but --preset is tiny"


# ------------------------------------------------------------------------------------------------------- Whole rollouts


@pytest.mark.slow
def test_gathered_rollouts_are_the_same(world):
    flags = *DMD, "--steps", 2, "--accum", 2
    for name, more in ("plain", []), ("gathered", ["--gather"]):
        done = run("train_dmd.py", *flags, *more, "--out", f"ckpt/{name}.pt", cwd=world, nproc=2)
        assert done.returncode == 0, done.stderr
    assert same_weights(world / "ckpt/plain.pt", world / "ckpt/gathered.pt")


@pytest.mark.slow
def test_pairs_of_a_gathered_teacher_are_the_same(world):
    make_checkpoint(world / "ckpt/ar.pt", "ar", sampler="euler")
    for pairs, more in ("plain", []), ("gathered", ["--gather"]):
        done = run("distill_ode.py", "--generate", "--pairs", pairs, "--pairs-count", 4, "--batch-size", 1,
                   "--teacher-steps", 4, *more, cwd=world, nproc=2)
        assert done.returncode == 0, done.stderr
    plain, gathered = (sorted((world / name).glob("latents-*")) for name in ("plain", "gathered"))
    assert len(plain) == 4 and [path.read_bytes() for path in plain] == [path.read_bytes() for path in gathered]


GATHERS = """
import gc
from collections import Counter
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from data import get_batch, open_latents
from model import build, load_checkpoint, shard, start_process_group
from train_dmd import replay, self_rollout

class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made[function._schema.name] += 1
        return function(*args, **kwargs or {})

def check():
    assert all(isinstance(p, DTensor) for p in net.parameters())
    if rank == 0:
        print(counted.made["c10d::_allgather_base_"], counted.made["c10d::_reduce_scatter_base_"])

rank, _, device = start_process_group()
data = open_latents("data/toy")
weights, meta = load_checkpoint(Path("ckpt/ode.pt"))
with torch.device("meta"):
    net = build("tiny")
shard(net, weights, device, train=True)
batch = get_batch(data, 0, 0, (rank, 2), 1, device, 0.25)
for gather in (False, True):
    with Count() as counted:
        x, passes = self_rollout(net, batch, meta, 3, gather)
    check()
    with Count() as counted:
        replay(net, batch, passes, x, gather)
    check()
del net
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_gathered_rollout_gathers_once(world):
    groups = 1 + PRESETS["tiny"].dit.layers  # one for each block and one for the rest
    passes = 1 + 2 * 4 + 1  # the prompt's, four for each of two chunks, and the first chunk joins the cache
    plain, plain_replay, gathered, gathered_replay = run_ranks(GATHERS, world).splitlines()
    assert plain == f"{passes * groups} 0" and gathered == f"{groups} 0"
    # two passes, there and back, and the reduction of their gradients
    assert plain_replay == f"{4 * groups} {2 * groups}" and gathered_replay == f"{groups} {2 * groups}"


# ------------------------------------------------------------------------------------------------------ Compiled blocks

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="on a CPU torch.compile needs a C++ compiler: apt install g++")


@pytest.fixture
def one_rank():
    yield start_process_group()[2]
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
@needs_compiler
def test_compiled_training_is_the_same(world, one_rank, monkeypatch):
    tiny = PRESETS["tiny"]  # as the large presets: sharded, and every block run again for backward
    monkeypatch.setitem(PRESETS, "tiny", tiny._replace(dit=replace(tiny.dit, recompute=True)))
    data, (weights, meta) = open_latents(world / "data/toy"), load_checkpoint(world / "ckpt/ode.pt")
    torch._dynamo.reset()
    counters.clear()
    rows = []
    for compiled in (False, True):
        with torch.device("meta"):
            net = build("tiny")
        shard(net, weights, one_rank, train=True, compiled=compiled)
        optimizer, losses = torch.optim.SGD(net.parameters(), lr=1e-2), []
        for step in range(3):
            batch = get_batch(data, 0, step, (0, 1), 2, one_rank)
            losses.append(teacher_forcing_loss(net, batch, meta, null_prob=0.0))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            made = counters["stats"]["unique_graphs"]
            assert made == compiled  # by the first block of the first step, for all blocks and steps
        rows.append(torch.stack([*losses, *(p.full_tensor().norm() for p in net.parameters())]))
    assert not counters["graph_break"]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_stream_is_the_same(world):
    torch.manual_seed(0)
    x, prompt = torch.randn(1, 10, 16, 8, 8), torch.randn(1, 8, PRESETS["tiny"].dit.text_dim)
    camera = Camera(parse_trajectory("w,w+l,l*7")[None], intrinsics(K_SQUARE).expand(1, 10, 3, 3))
    torch._dynamo.reset()
    counters.clear()
    rows, made = [], []
    for compiled in (False, True):
        net, _ = load_net(world / "ckpt/ode.pt", CPU, compiled=compiled)
        kv_cache, vs = prefill(net, x, prompt, camera), []
        for frames in (slice(start, start + 2) for start in range(0, 10, 2)):
            here = x[:, frames], prompt, camera.frames(frames)
            vs.append(net(here[0], torch.full((1, 2), 0.5), *here[1:], kv_cache=kv_cache))
            kv_cache = update_cache(net, *here, kv_cache)
            made.append(counters["stats"]["unique_graphs"])
        rows.append(torch.cat(vs))
    # the prompt; a pass without a past and its update; a pass with one, of whatever length, and its update
    assert made == [0] * 5 + [3, 5, 5, 5, 5] and not counters["graph_break"]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ A stream on two ranks


@pytest.mark.slow
def test_a_video_that_ranks_share_is_the_same(tmp_path):
    """With a window that moves, too. (What ships of tiny-hy has three heads, which no two ranks can share.)"""
    flags = "--camera", "w*3,w+l*2", "--ckpt", ROOT / "ckpt/tiny/dmd.pt", "--seed", 3
    flags += "--window", 4, "--sink", 1
    one = run("stream.py", *flags, "--out", "one.mp4", cwd=tmp_path)
    two = run("stream.py", *flags, "--out", "two.mp4", "--sp", 2, cwd=tmp_path, nproc=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout == one.stdout.replace("one", "two") and two.stderr.count("trained for") == 1
    a, b = (imageio.imread(tmp_path / f"{name}.png").astype(int) for name in ("one", "two"))
    assert a.shape == b.shape and abs(a - b).max() <= 1  # of 255: a sum in another order may round another way
    assert len(imageio.imread(tmp_path / "two.mp4")) == len(imageio.imread(tmp_path / "one.mp4")) == 21


def test_ranks_that_share_no_video_are_refused(tmp_path):
    found = refusal("stream.py", "--sp", 2, cwd=tmp_path)
    assert found.startswith("error: --sp 2: found 1 processes; torchrun --nproc_per_node 2 ")


# --------------------------------------------------------------------------------------------- Prompts, one at a time


class Killed(BaseException):
    pass


def make_encoder(kill_at=None):
    """An encoder of two columns, as HY's, the prompts that it was asked for, and references to what it made of them."""
    asked, made = [], []

    def encode_text(prompt):
        if len(asked) == kill_at:
            raise Killed
        asked.append(prompt)
        # of what was made before, the last row may still be in the caller's hands
        assert sum(z() is not None for z in made) <= 2
        generator = torch.Generator().manual_seed(len(prompt))
        row = {name: torch.randn(len(prompt) % limit, width, generator=generator).half()
               for name, limit, width in (("text", 99, 6), ("byt5", 3, 4))}
        made.extend(weakref.ref(z) for z in row.values())
        return row

    return Encoder("fake", encode_text, None, None, ""), asked


def make_run(folder, captions, encoder, device):
    args = parse_args(["--videos", str(folder), "--out", str(folder)])
    clips = [Clip(f"{n}.mp4", 0, caption, "w", None) for n, caption in enumerate(captions)]
    return Run(args, clips, None, {}, encoder, "negative", 0, 1, device, None)


def test_a_killed_run_loses_no_prompt(tmp_path, one_rank):
    captions = ["a" * n for n in (5, 1, 12, 5, 7, 30, 2)]
    encoder, asked = make_encoder(kill_at=4)
    with pytest.raises(Killed):
        look(make_run(tmp_path, captions, encoder, one_rank))
    assert asked == ["negative", *captions[:3]]
    # killed within a row: half of its numbers, half of its line
    with open(tmp_path / "prompts-0.f16", "ab") as numbers, open(tmp_path / "prompts-0.jsonl", "a") as lines:
        numbers.write(b"123")
        lines.write('\n{"encoder": "fake", "prom')
    shutil.move(tmp_path / "prompts-0.jsonl", tmp_path / "prompts-3.jsonl")  # there were more processes then
    shutil.move(tmp_path / "prompts-0.f16", tmp_path / "prompts-3.f16")

    encoder, asked = make_encoder()
    run = make_run(tmp_path, captions, encoder, one_rank)
    surveys, errors = look(run)
    assert asked == captions[4:] and len(surveys) == len(captions) and not errors
    assert encode(run, {}, [*dict.fromkeys(captions)], {}, {}) == {}  # no shard is missing: the table alone is
    assert not list(tmp_path.glob("prompts-*")) and not (tmp_path / "prompts.safetensors.unfinished").exists()
    order = [*dict.fromkeys(captions), "negative"]
    rows = [make_encoder()[0].encode_text(prompt) for prompt in order]
    columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    ends = {f"{name}_ends": torch.tensor([len(row[name]) for row in rows]).cumsum(0) for name in rows[0]}
    found, expected = load_file(tmp_path / "prompts.safetensors"), columns | ends
    assert found.keys() == expected.keys() and all(torch.equal(found[name], z) for name, z in expected.items())
    with safe_open(tmp_path / "prompts.safetensors", "pt") as table:
        assert table.metadata() == {"prompts": json.dumps(order[:-1]), "null": "negative", "encoder": "fake"}

    encoder, asked = make_encoder()
    look(make_run(tmp_path, captions, encoder, one_rank))
    assert not asked


def test_a_log_that_is_being_written_can_be_read(tmp_path):
    log, row = tmp_path / "prompts-0.jsonl", {"embeds": torch.arange(6.0).half().view(3, 2)}
    log_prompt(log, "fake", "a\nb", row)
    log_prompt(log, "another", "c", row)
    with open(log, "a") as file:
        file.write('\n{"encoder": "fake"')
    found = read_prompts([log, tmp_path / "nowhere"], "fake")
    assert set(found) == {"a\nb"} and torch.equal(found["a\nb"]["embeds"], row["embeds"])
    log_prompt(log, "fake", "d", row)
    assert set(read_prompts([log], "fake")) == {"a\nb", "d"}
