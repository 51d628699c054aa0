"""
The wiring of the scripts: that each flag and each setting of a checkpoint reaches the numbers it is named after, and
that each network is asked for what its stage says. Short runs of the scripts themselves are watched: every pass through
a network and every step of an optimizer, in order. And what no script shows on a CPU: bf16.

Most runs have a network of one small layer, with random weights, in place of the chain's.
"""
import json
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import imageio.v3 as imageio
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from conftest import SCRIPTS, STAGES, STEADY, call
from data import K_SQUARE, Batch, find_duplicates, get_batch, intrinsics, load_encoder, open_latents, parse_trajectory
from distill_cd import consistency_loss
from distill_ode import integrate, ode_loss
from helpers import CPU, GENERATED, fitted_vae, hy_inputs, make_batch, make_net, random_hy_dit
from model import (
    PRESETS, Camera, HYDiT, KVCache, WanDiT, add_noise, build, load_checkpoint, noise_levels, prefill, rollout,
    save_checkpoint, update_cache,
)
from stream import TOY_PROMPT, Player, stream
from train_ar import teacher_forcing_loss
from train_camera import flow_matching_loss
from train_dmd import fake_score_loss, generator_loss, predict, self_rollout

BACKBONES, SHIFT, CHUNK, LEVELS = ("wan", "hy"), 3.0, 2, noise_levels(4, 3.0)
META = {"sampler": "euler", "sampling_steps": 4, "shift": SHIFT, "guidance": 1.0, "chunk": CHUNK, "camera": True,
        "size": [32, 32], "given_prob": 0.0}

# ----------------------------------------------------------------------------------------------------- Watching scripts


class Watch:
    """While it is on, `events` fills with every pass through a network and every step of an optimizer."""

    def __init__(self, patch):
        self.events, self.trained = [], {}  # number of a network: its parameters, as its optimizer has them
        self.nets = weakref.WeakKeyDictionary()  # network: its number; FSDP's must die with their run
        for kind in (WanDiT, HYDiT):
            patch.setattr(kind, "forward", self.watched(kind.forward))
        read = model.TokenRefiner.forward

        def reads(refiner, text, mask, sigma):
            self.events.append(SimpleNamespace(kind="read", sigma=sigma))
            return read(refiner, text, mask, sigma)

        patch.setattr(model.TokenRefiner, "forward", reads)
        watch = self

        class AdamW(torch.optim.AdamW):
            def step(self, *args, **flags):
                if flags:  # a resumed run makes room for what it will read
                    return super().step(*args, **flags)
                group = self.param_groups[0]
                grads = torch.cat([p.grad.full_tensor().flatten() for p in group["params"] if p.grad is not None])
                super().step(*args)
                weights = torch.cat([p.detach().full_tensor().flatten() for p in group["params"]])
                net = next(n for net, n in watch.nets.items() if next(net.parameters()) is group["params"][0])
                watch.trained[net] = group["params"]
                about = {name: group[name] for name in ("lr", "betas", "weight_decay")}
                watch.events.append(SimpleNamespace(kind="step", net=net, norm=grads.norm().item(), weights=weights,
                                                    **about))

        patch.setattr(torch.optim, "AdamW", AdamW)

    def watched(self, forward):
        def wrapper(net, x, sigma, prompt, camera=None, **flags):
            number, updates_cache = self.nets.setdefault(net, len(self.nets)), flags.get("update_cache", False)
            event = SimpleNamespace(
                kind="cache" if updates_cache else "pass", net=number, x=x.detach(), sigma=sigma.detach(),
                prompt=prompt, camera=camera, clean=flags.get("clean"), chunk=flags.get("chunk", 0),
                streams=flags.get("kv_cache") is not None, grad=torch.is_grad_enabled(),
                weights=next(net.parameters()).detach().clone(),  # the first of them: enough to tell networks apart
                fresh=not any(p.grad is not None and p.grad.abs().max() for p in self.trained.get(number, ())))
            self.events.append(event)
            result = forward(net, x, sigma, prompt, camera, **flags)
            event.out = None if updates_cache else result.detach()
            return result
        return wrapper

    def updates(self):
        """What came before each step of an optimizer, and the step; the sheet of samples at the end is left out."""
        found, passes = [], []
        for event in self.events:
            if event.kind == "step":
                found.append((event, [z for z in passes if z.kind == "pass"]))
                passes = []
            else:
                passes.append(event)
        return found


@pytest.fixture(scope="module")
def world(chain, tmp_path_factory):
    """A folder with the chain's data, and checkpoints of its stages with a network of one small layer."""
    folder, metas = tmp_path_factory.mktemp("world"), {z: load_checkpoint(chain / f"ckpt/{z}.pt")[1] for z in STAGES}
    shutil.copytree(chain / "data/toy", folder / "data/toy")
    shutil.copytree(chain / "data/toy", folder / "other/toy")
    for path in (folder / "other/toy").glob("latents-*"):
        rewrite(path, lambda tensors: {"latents": -tensors["latents"]})
    (folder / "ckpt").mkdir()
    shutil.copy(chain / "ckpt/vae.pt", folder / "ckpt")
    with pytest.MonkeyPatch.context() as patch:
        dit = replace(PRESETS["tiny"].dit, dim=24, ffn_dim=32, heads=2, layers=1)
        patch.setitem(PRESETS, "tiny", PRESETS["tiny"]._replace(dit=dit))
        for n, (stage, meta) in enumerate(metas.items()):
            meta |= {"given_prob": 0.5}
            save_checkpoint(folder / f"ckpt/{stage}.pt", random_weights("tiny", n), meta)
            save_checkpoint(folder / f"other/{stage}.pt", random_weights("tiny", n + 10), meta)
        for pairs, init in ("data/ode", "ckpt"), ("other/ode", "other"):
            play(folder, "pairs", "--pairs", pairs, "--init", f"{init}/ar.pt")
        yield folder


def rewrite(path, change):
    """Tensors of a shard in place of others."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(tensors | change(tensors), path, about)


def random_weights(preset, seed):
    """Of a useful size everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    return {name: torch.randn(w.shape) * (0.3 if w.ndim == 1 else w[0].numel() ** -0.5)
            for name, w in build(preset).state_dict().items()}


USUAL = "--steps 2 --log-every 1 --lr 5e-3 --ema-decay 0.5 --batch-size 2".split()
SHORT = {
    "base": ("train_camera.py", *USUAL, "--no-camera", *STEADY, "--shift", "3", "--sampling-steps", "2"),
    "camera": ("train_camera.py", *USUAL, "--init", "ckpt/camera.pt", *STEADY, "--shift", "3", "--sampling-steps", "2"),
    "ar": ("train_ar.py", *USUAL, *STEADY, "--chunk", "2", "--sampling-steps", "2"),
    "pairs": ("distill_ode.py", "--generate", "--teacher-steps", "8", "--pairs-count", "16", "--batch-size", "8"),
    "ode": ("distill_ode.py", *USUAL, "--warmup", "0", "--teacher-steps", "8"),
    "cd": ("distill_cd.py", *USUAL, "--warmup", "0"),
    "dmd": ("train_dmd.py", *USUAL, "--fake-score-lr", "5e-3", "--fake-score-updates", "2"),
}
STARTS = {"camera": "camera", "ar": "camera", "pairs": "ar", "ode": "ar", "cd": "ar", "dmd": "ode"}  # stage: its --init


def play(world, stage, *flags):
    script, *short = SHORT[stage]
    call(script, *short, *flags, cwd=world)


def changed_meta(world, folder, stage, **changes):
    """The flags that start a stage from the usual weights with another meta. DMD's two checkpoints share a schedule."""
    starts = {"--init": STARTS[stage]} | ({"--scores": "camera"} if stage == "dmd" and "shift" in changes else {})
    flags = []
    for flag, start in starts.items():
        weights, meta = load_checkpoint(world / f"ckpt/{start}.pt")
        save_checkpoint(folder / f"{start}.pt", weights, meta | changes)
        flags += [flag, folder / f"{start}.pt"]
    return flags


def outcome(folder, stage):
    """What a run leaves: weights, the numbers it logged, and what its checkpoint says of itself."""
    if stage == "pairs":
        shards = sorted(folder.glob("pairs/latents-*"))
        with safe_open(shards[0], "pt") as file:
            about = file.metadata()["meta"]
        return {"weights": torch.cat([load_file(path)["states"].flatten() for path in shards]), "meta": about}
    weights, meta = load_checkpoint(folder / f"{stage}.pt")
    meta.pop("fingerprint")  # of the weights
    rows = [json.loads(line) | {"sec": 0} for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return {"weights": torch.cat([w.flatten() for w in weights.values()]), "metrics": rows, "meta": meta}


def run(world, folder, stage, *flags):
    play(world, stage, *(("--pairs", folder / "pairs") if stage == "pairs" else ("--out", folder / f"{stage}.pt")),
         *flags)
    return outcome(folder, stage)


def watch(world, folder, stage, *flags, rank=None):
    """The updates of a run, and what it leaves; rank (n, of m): as one of several, which all see one gradient."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Watch(patch)
        if rank:
            n, m = rank
            patch.setattr(model, "batch_part", lambda micro, accum: (micro * m + n, accum * m))
        play(world, stage, "--out", folder / f"{stage}.pt", "--save-every", "1000", *flags)
    return seen.updates(), outcome(folder, stage)


LONG = {"camera": ("--null-prob", "0.5", "--given-prob", "0.5"), "ar": ("--null-prob", "0.5"), "ode": (), "cd": (),
        "dmd": ("--steps", "10", "--fake-score-updates", "3")}


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    """Of a stage, the updates of a longer run, in which half of the videos have given frames, and its metrics."""
    runs = {}

    def get(stage):
        if stage not in runs:
            flags = ("--steps", "12", "--batch-size", "4", *LONG[stage])
            updates, left = watch(world, tmp_path_factory.mktemp(stage), stage, *flags)
            runs[stage] = updates, left["metrics"]
        return runs[stage]

    return get


def passes(updates, **which):
    """All passes of these updates that are as asked."""
    return [z for _, found in updates for z in found if all(getattr(z, name) == is_ for name, is_ in which.items())]


def is_null(prompt):
    """Which prompts [b] are the toy world's null prompt."""
    return ~prompt.flatten(1).any(1)


def x0_of(z):
    return z.x - z.sigma[..., None, None, None] * z.out


def mean_over_generated(error, sigma):
    """Mean square [b f c h w] over the frames that are not given."""
    return error.square().mean((2, 3, 4))[sigma > 0].mean().item()


# ------------------------------------------------------------------------------------------------------ Flags, settings

FLAGS = [  # stage, a flag at another value, and what of the outcome must change by it: no more, no less
    ("base", "--seed 1", "weights metrics"),
    ("camera", "--init other/camera.pt", "weights metrics meta"), ("camera", "--data other/toy", "weights metrics"),
    ("camera", "--shift 6", "weights metrics meta"), ("camera", "--null-prob 0.9", "weights metrics"),
    ("camera", "--given-prob 0.9", "weights metrics meta"), ("camera", "--guidance 3", "meta"),
    ("camera", "--sampling-steps 3", "meta"), ("camera", "--seed 1", "weights metrics"),
    ("ar", "--init other/camera.pt", "weights metrics meta"), ("ar", "--data other/toy", "weights metrics"),
    ("ar", "--chunk 1", "weights metrics meta"), ("ar", "--null-prob 0.9", "weights metrics"),
    ("ar", "--guidance 3", "meta"), ("ar", "--sampling-steps 3", "meta"), ("ar", "--seed 1", "weights metrics"),
    ("pairs", "--init other/ar.pt", "weights meta"), ("pairs", "--data other/toy", "weights"),
    ("pairs", "--teacher-steps 12", "weights meta"), ("pairs", "--sampling-steps 2", "weights meta"),
    ("pairs", "--pairs-count 8", "weights"), ("pairs", "--seed 1", "weights meta"),
    ("ode", "--init other/ar.pt --pairs other/ode", "weights metrics meta"),
    ("ode", "--pairs other/ode --init other/ar.pt", "weights metrics meta"),
    ("ode", "--seed 1", "weights metrics"),
    ("cd", "--init other/ar.pt", "weights metrics meta"), ("cd", "--data other/toy", "weights metrics"),
    ("cd", "--teacher-steps 12", "weights metrics"), ("cd", "--sampling-steps 3", "meta"),
    ("cd", "--seed 1", "weights metrics"),
    ("dmd", "--init other/ode.pt", "weights metrics meta"), ("dmd", "--data other/toy", "weights metrics"),
    ("dmd", "--scores other/camera.pt", "weights metrics meta"), ("dmd", "--fake-score-lr 1e-3", "weights metrics"),
    ("dmd", "--fake-score-updates 1", "weights metrics"), ("dmd", "--guidance 3", "weights metrics"),
    ("dmd", "--seed 1", "weights metrics"),
]
SETTINGS = [  # stage, a setting of the checkpoint it starts from, and what must change by it
    ("ar", {"shift": 6.0}, "weights metrics meta"), ("ar", {"given_prob": 0.0}, "weights metrics meta"),
    ("pairs", {"guidance": 3.0}, "weights meta"), ("pairs", {"shift": 6.0}, "weights meta"),
    ("pairs", {"chunk": 1}, "weights meta"), ("pairs", {"given_prob": 0.0}, "weights meta"),
    ("cd", {"guidance": 3.0}, "weights metrics"), ("cd", {"shift": 6.0}, "weights metrics meta"),
    ("cd", {"chunk": 1}, "weights metrics meta"), ("cd", {"given_prob": 0.0}, "weights metrics meta"),
    ("dmd", {"sampling_steps": 3}, "weights metrics meta"), ("dmd", {"shift": 6.0}, "weights metrics meta"),
    ("dmd", {"chunk": 1}, "weights metrics meta"), ("dmd", {"given_prob": 0.0}, "weights metrics meta"),
]
ELSEWHERE = {  # flags of which other tests see more: below, of the optimizer and of ranks, or in other files
    *"out preset resume steps log_every save_every state_every keep vae sp shard_over compile gather".split(),
    *"plan bench no_camera generate pairs".split(),
    *"batch_size accum lr betas warmup cooldown max_grad_norm ema_decay".split()}


@pytest.fixture(scope="module")
def usual(world, tmp_path_factory):
    """The outcome of a stage with its usual flags."""
    found = {}

    def get(stage):
        if stage not in found:
            found[stage] = run(world, tmp_path_factory.mktemp(stage), stage)
        return found[stage]

    return get


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("stage, flags, expected", FLAGS, ids=lambda z: z.replace(" ", "=") if "--" in z else z)
def test_a_flag_changes_what_it_should(world, usual, tmp_path, stage, flags, expected):
    before, after = usual(stage), run(world, tmp_path, stage, *flags.split())
    assert {name for name in before if not same(before[name], after[name])} == {*expected.split()}


@pytest.mark.parametrize("stage, changes, expected", SETTINGS, ids=lambda z: str(z).strip("{}"))
def test_a_checkpoints_setting_changes_what_it_should(world, usual, tmp_path, stage, changes, expected):
    before = usual(stage)
    after = run(world, tmp_path, stage, *changed_meta(world, tmp_path, stage, **changes))
    assert {name for name in before if not same(before[name], after[name])} == {*expected.split()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_has_its_test(stage):
    script = SCRIPTS[stage][0]
    known = {flags.split()[0] for name, flags, _ in FLAGS if SHORT[name][0] == script}
    flags = vars(import_module(script[:-3]).parse_args([])).keys() - ELSEWHERE
    assert {f"--{flag.replace('_', '-')}" for flag in flags} <= known


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_are_what_the_flags_say(world, tmp_path, stage):
    """Warm-up, betas, weight decay, clipping, an empty gradient at every step, and the EMA of the one that is kept."""
    asked = "--steps 4 --lr 3e-3 --max-grad-norm 1e-3 --ema-decay 0.7".split()
    asked += "--fake-score-lr 2e-3".split() if stage == "dmd" else "--warmup 3 --betas 0.3 0.8".split()
    falls = stage in ("base", "camera", "ar")
    asked += "--cooldown 0.5".split() if falls else []
    updates, left = watch(world, tmp_path, stage, *asked)
    student, ema = updates[0][0].net, load_checkpoint(world / f"ckpt/{STARTS[stage]}.pt")[0]
    ema = torch.cat([w.flatten() for w in ema.values()])
    for n, step in enumerate(step for step, _ in updates):
        lr = (3e-3 if step.net == student else 2e-3) if stage == "dmd" else 3e-3 * min(1, (n + 1) / 3)
        if falls:  # the last two of four
            lr = min(lr, 3e-3 * (4 - n) / 2)
        betas = (0.0, 0.999) if stage == "dmd" else (0.3, 0.8)
        assert (step.lr, *step.betas, step.weight_decay) == pytest.approx((lr, *betas, 0.01))
        assert step.norm == pytest.approx(1e-3, rel=1e-3)
        ema = torch.lerp(ema, step.weights, 0.3) if step.net == student else ema
    # where the generator makes its last passes again, the gradients of one join those of the others
    assert all(z.fresh or (z.streams and z.grad) for z in passes(updates))
    assert all(row["grad_norm"] > 1e-3 for row in left["metrics"])
    torch.testing.assert_close(left["weights"], ema, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_and_micro_batches_share_one_batch(world, tmp_path, stage):
    """Their samples, noise and, in DMD, exit steps are those of one large batch; the gradient is its mean."""
    flags = ("--fake-score-updates", "1") if stage == "dmd" else ()
    whole, left = watch(world, tmp_path / "whole", stage, *flags)
    micro, left_too = watch(world, tmp_path / "micro", stage, *flags, "--batch-size", "1", "--accum", "2")
    first, second = (watch(world, tmp_path / str(n), stage, *flags, "--batch-size", "1", rank=(n, 2))[0]
                     for n in range(2))
    inputs = lambda updates: [[(z.x, z.sigma) for z in found] for _, found in updates]
    for n, (all_, two, one, other) in enumerate(zip(*map(inputs, (whole, micro, first, second)), strict=True)):
        halves = [tuple(torch.cat(z) for z in zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)]
        assert len(two) == 2 * len(halves) == 2 * len(all_)
        alike = slice(1) if n else slice(None)  # later, each has its own weights: what goes in first depends on none
        torch.testing.assert_close(halves[alike], all_[alike], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(two[: len(one)][alike] + two[len(one) :][alike], one[alike] + other[alike],
                                   atol=1e-4, rtol=1e-4)
    row, row_too = left["metrics"][0], left_too["metrics"][0]
    for name in row.keys() - {"step", "sec"}:  # a mean over generated frames, and the two may have not as many
        assert row_too[name] == pytest.approx(row[name], rel=0.3)


# -------------------------------------------------------------------------------------------- What networks are asked


@pytest.mark.parametrize("stage", STAGES)
def test_every_pass_has_its_camera(watched, stage):
    updates, _ = watched(stage)
    assert all(z.camera is not None and len(z.camera.viewmats.unique(dim=0)) > 1 for z in passes(updates))
    assert all((z.clean is not None and z.chunk == CHUNK) == (stage in ("ar", "ode", "cd")) for z in passes(updates))


@pytest.mark.parametrize("stage", STAGES)
def test_networks_start_from_their_checkpoints_and_the_frozen_ones_stay(world, watched, stage):
    updates, _ = watched(stage)
    trained, given = {step.net for step, _ in updates}, [STARTS[stage], "camera"]  # the second: DMD's scores
    start, score = (next(iter(load_checkpoint(world / f"ckpt/{name}.pt")[0].values())) for name in given)
    for z in updates[0][1]:
        assert torch.equal(z.weights, score if stage == "dmd" and not z.streams else start)
    for z in updates[-1][1]:
        same_as_ever = z.net not in trained and (stage != "cd" or is_null(z.prompt).all())  # of CD's two, the teacher
        assert not same_as_ever or torch.equal(z.weights, score if stage == "dmd" else start)


@pytest.mark.parametrize("stage", STAGES)
def test_no_two_updates_see_the_same(watched, stage):
    first = [found[0].x for _, found in watched(stage)[0]]
    assert all(not torch.equal(a, b) for n, a in enumerate(first) for b in first[:n])


@pytest.mark.parametrize("stage", STAGES)
def test_prompts_are_dropped_where_they_should(watched, stage):
    """In half of the videos of the first two stages, here; in no other student's."""
    updates, _ = watched(stage)
    dropped = torch.cat([is_null(z.prompt) for z in passes(updates, grad=True)]).float().mean()
    assert 0.3 < dropped < 0.7 if stage in ("camera", "ar") else dropped == 0


@pytest.mark.parametrize("stage", STAGES)
def test_one_or_two_frames_are_given_each_as_often(watched, stage):
    updates, _ = watched(stage)
    for net in {step.net for step, _ in updates}:
        mine = [found for step, found in updates if step.net == net]  # of DMD's, the first pass is that of a chunk
        given = Counter((torch.cat([found[0].sigma[:, :3] for found in mine]) == 0).sum(1).tolist())
        total = sum(given.values())
        assert given.keys() == {0, 1, 2} and total / 4 < given[0] < 3 * total / 4
        assert min(given[1], given[2]) > total / 8
        for found in mine:  # of whole videos, after DMD's chunks
            first, last = found[0], [z for z in found if not z.streams][-1]
            assert torch.equal((last.sigma[:, :2] == 0).sum(1), (first.sigma[:, :2] == 0).sum(1))
            assert (last.sigma[:, 2:] > 0).all()


@pytest.mark.parametrize("stage", ("camera", "ar", "cd", "ode"))
def test_noise_levels_are_shifted_and_shared_by_a_video_or_by_a_chunk(watched, stage):
    updates, _ = watched(stage)
    sigma = torch.cat([z.sigma for z in passes(updates, grad=True)])
    made, (left, right) = sigma[(sigma > 0).all(1)], sigma[(sigma > 0).all(1)].split(CHUNK, dim=1)
    assert (left == left[:, :1]).all() and (right == right[:, :1]).all()
    assert (left == right).all() if stage == "camera" else (left != right).any(1).float().mean() > 0.6
    assert len(made) > 10 and 0.6 < made.mean() < 0.8 if stage != "ode" else True  # of four levels, 0.73
    grid = {"cd": noise_levels(48, SHIFT)[:-1], "ode": LEVELS[:-1]}.get(stage)
    assert grid is None or (made[..., None] - torch.tensor(grid)).abs().amin(-1).max() < 1e-6
    assert len(made.unique()) > (3 if stage == "ode" else 18)


@pytest.mark.parametrize("stage", ("camera", "ar", "ode"))
def test_the_logged_loss_is_that_of_what_went_in_and_came_out(world, watched, stage):
    updates, metrics = watched(stage)
    for n, (_, (z,)) in enumerate(updates):
        batch = get_batch(open_latents(world / ("data/ode" if stage == "ode" else "data/toy")), 0, n, (0, 1), 4, CPU)
        slope = (z.x - batch.x0) / z.sigma[..., None, None, None].clamp_min(1e-6)  # = noise - x0
        error = z.out - slope if stage != "ode" else x0_of(z) - batch.states[:, -1]
        assert metrics[n]["loss"] == pytest.approx(mean_over_generated(error, z.sigma), rel=1e-3)
        assert z.clean is None or torch.equal(z.clean, batch.x0)


def test_consistency_is_towards_the_ema_after_a_guided_step_of_the_teacher(watched):
    updates, metrics = watched("cd")
    grid = torch.tensor(noise_levels(48, SHIFT))
    for (step, (prompted, null, average, student)), row in zip(updates, metrics):
        assert len({prompted.net, average.net, student.net}) == 3 and step.net == student.net
        assert prompted.net == null.net and [z.grad for z in (prompted, null, average, student)] == [False] * 3 + [True]
        assert [is_null(z.prompt).all() for z in (prompted, null)] == [False, True]
        for z in (prompted, null):
            assert torch.equal(z.x, student.x) and torch.equal(z.sigma, student.sigma)
        lower = grid[((student.sigma[..., None] - grid).abs().argmin(-1) + 1).clamp_max(48)]
        torch.testing.assert_close(average.sigma, lower)
        v = null.out + 1.25 * (prompted.out - null.out)  # as the miniature chain's teacher is guided
        point = student.x + (average.sigma - student.sigma)[..., None, None, None] * v
        torch.testing.assert_close(average.x, point, atol=1e-5, rtol=1e-5)
        loss = mean_over_generated(x0_of(student) - x0_of(average), student.sigma)
        assert row["loss"] == pytest.approx(loss, rel=1e-3)


def rollout_of(found, net):
    """Of the passes before an update: the video that this network made, two chunks, and its exit step."""
    made = [z for z in found if z.net == net and z.streams and not z.grad]
    exit_step = len(made) // 2 - 1
    for n, z in enumerate(made):
        at = n % (exit_step + 1)
        torch.testing.assert_close(z.sigma.amax(1), torch.full([len(z.x)], LEVELS[at]) * (z.sigma > 0).any(1))
    return torch.cat([x0_of(made[exit_step]), x0_of(made[-1])], dim=1), exit_step


def test_the_generator_moves_first_and_the_fake_score_follows_on_its_rollouts(watched):
    updates, metrics = watched("dmd")
    steps = [step.net for step, _ in updates]
    generator, fake = steps[:2]
    assert generator != fake and steps == [generator, fake, fake, fake] * len(metrics)
    for n, (step, found) in enumerate(updates):
        x, _ = rollout_of(found, generator)
        if step.net == fake:
            z, = (z for z in found if not z.streams)
            assert z.net == fake and [z for z in found if z.grad] == [z]
            slope = (z.x - x) / z.sigma[..., None, None, None].clamp_min(1e-6)  # = noise - x
            loss = mean_over_generated(z.out - slope, z.sigma)
            assert n % 4 < 3 or metrics[n // 4]["fake_score_loss"] == pytest.approx(loss, rel=1e-2)


def test_the_generator_follows_a_guided_real_score_and_an_unguided_fake_one(watched):
    updates, metrics = watched("dmd")
    (generator, fake), real = (updates[n][0].net for n in (0, 1)), None
    for (_, found), row in zip(updates[::4], metrics, strict=True):
        x, _ = rollout_of(found, generator)
        v_fake, prompted, null = (z for z in found if not z.streams)
        real = prompted.net if real is None else real
        assert [v_fake.net, prompted.net, null.net] == [fake, real, real] and real not in (fake, generator)
        assert [is_null(z.prompt).all() for z in (v_fake, prompted, null)] == [False, False, True]
        assert all(torch.equal(z.x, v_fake.x) and torch.equal(z.sigma, v_fake.sigma) for z in (prompted, null))
        prompted.out = null.out + 1.25 * (prompted.out - null.out)  # --guidance
        scale = (x - x0_of(prompted)).abs().mean((1, 2, 3, 4), keepdim=True)
        step = (x0_of(v_fake) - x0_of(prompted)) / scale
        assert row["loss"] == pytest.approx(step.square().mean().item() / 2, rel=1e-3)


def test_exit_steps_are_uniform_and_change_from_update_to_update(watched):
    updates, _ = watched("dmd")
    steps = [rollout_of(found, updates[0][0].net)[1] for _, found in updates]
    assert Counter(steps).keys() == {0, 1, 2, 3} and min(Counter(steps).values()) > len(steps) / 10
    assert len({*steps[::4]}) > 2  # the generator's own
    assert sum(a != b for a, b in zip(steps, steps[1:])) > len(steps) / 2


def test_the_seed_decides_noise_and_exit_steps_and_the_weights_that_are_new(world, tmp_path):
    noise, exits, fresh = [], [], []
    for seed in "01":
        updates, _ = watch(world, tmp_path / seed, "dmd", "--seed", seed)
        noise.append([found[0].x for _, found in updates])
        exits.append([rollout_of(found, updates[0][0].net)[1] for _, found in updates])
        fresh.append(run(world, tmp_path / seed, "base", "--seed", seed, "--lr", "0")["weights"])
    assert not any(map(torch.equal, *noise)) and exits[0] != exits[1] and not torch.equal(*fresh)


def test_score_levels_are_shifted_and_one_for_a_video(watched):
    updates, _ = watched("dmd")
    for which in (updates[::4], [z for n, z in enumerate(updates) if n % 4]):
        sigma = torch.cat([[z for z in found if not z.streams][-1].sigma for _, found in which])
        assert all(len(row[row > 0].unique()) == 1 for row in sigma) and 0.6 < sigma[:, -1].mean() < 0.8


@pytest.mark.parametrize("loss", (
    fake_score_loss, lambda x, score, batch, meta: generator_loss(x, score, score, batch, meta, 2.0),
), ids=("fake_score", "generator"))
def test_scores_are_asked_between_0_02_and_0_98(loss):
    b, seen, score = 400, [], lambda x_t, sigma, *_: seen.append(sigma) or x_t
    rng = [torch.Generator().manual_seed(seed) for seed in range(b)]
    batch = Batch(torch.zeros(b, 2, 1, 1, 1), None, None, None, torch.ones(b, 2), rng, [*range(b)], None)
    loss(torch.randn(b, 2, 1, 1, 1), score, batch, META | {"shift": 1.0})
    assert seen
    for sigma in seen:
        assert (sigma == sigma[:, :1]).all() and 0.45 < sigma.mean() < 0.55
        assert sigma.min() == pytest.approx(0.02) and sigma.max() == pytest.approx(0.98)


def made_again(generator, batch, exit_step):
    """The generator's video, its last passes with gradient."""
    _, passes = self_rollout(generator, batch, META, exit_step)
    return torch.cat([predict(generator, batch, last) for last in passes], dim=1)


def test_the_generator_goes_where_the_real_score_is_and_the_fake_one_is_not():
    further = torch.zeros((), requires_grad=True)

    def constant(v):  # a smaller v: more x0
        return lambda x_t, *_, update_cache=False, **__: KVCache(0, []) if update_cache else v * torch.ones_like(x_t)

    x = made_again(constant(-further), make_batch(), 2)
    generator_loss(x, constant(-1.0), constant(0.0), make_batch(), META, 2.0).backward()
    assert further.grad < 0  # so that the step is upwards


# --------------------------------------------------------------------------------------- Rollouts of either backbone


def frozen_net(backbone, seed=0):
    return make_net(seed).requires_grad_(False) if backbone == "wan" else random_hy_dit()


def batch_of(backbone, states=None, generated=None):
    """Two videos of five small latents, the same at every call, their generators rewound. generated: of all frames."""
    generated = torch.ones(2, 5) if generated is None else generated
    if backbone == "wan":
        return make_batch(states, generated)
    _, _, prompt, camera, x0 = hy_inputs(5, b=2)
    rng = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    return Batch(x0, prompt, prompt._replace(text=-prompt.text), camera, generated, rng, [0, 1], states)


def streamed(net, batch, **changes):
    """The video that streaming makes of a batch's prompts and noise."""
    shape = batch.x0.shape[1:]
    return torch.cat([*rollout(net, META | changes, batch.rng, shape, batch.prompt, batch.null, batch.camera)], dim=1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_self_rollout_is_the_stream(backbone):
    """For HY also: it starts with `prefill`, or its text would see the video."""
    net, changes = frozen_net(backbone), {"sampling_steps": 3, "shift": 5.0}
    expected = streamed(net, batch_of(backbone), sampler="few_step", **changes)
    video, _ = self_rollout(net, batch_of(backbone), META | changes, 2)
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", (1.0, 3.0))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_pairs_are_the_teachers_stream_but_after_the_truth(backbone, guidance):
    net, meta = frozen_net(backbone), META | {"guidance": guidance}
    expected = streamed(net, batch_of(backbone), guidance=guidance)
    after_own, after_truth = (integrate(net, batch, LEVELS, meta, keep=4)[:, -1]
                              for batch in (batch_of(backbone)._replace(x0=expected), batch_of(backbone)))
    torch.testing.assert_close(after_own, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after_truth[:, :CHUNK], expected[:, :CHUNK], atol=1e-4, rtol=1e-4)
    assert (after_truth - expected)[:, CHUNK:].abs().mean() > 1e-2


# --------------------------------------------------------------------------------------------------------------- bf16


LOSSES = {  # of a network, two that are frozen, and a batch: a third of the prompts dropped
    "camera": lambda net, frozen, batch: flow_matching_loss(net, batch, META, 0.3),
    "ar": lambda net, frozen, batch: teacher_forcing_loss(net, batch, META, 0.3),
    "ode": lambda net, frozen, batch: ode_loss(net, batch, LEVELS, META),
    "cd": lambda net, frozen, batch: consistency_loss(
        net, *frozen, batch, noise_levels(48, SHIFT), META | {"guidance": 3.0}),
    "generator": lambda net, frozen, batch: generator_loss(
        made_again(net, batch, 2), *frozen, batch, META, 2.0),
    "fake_score": lambda net, frozen, batch: fake_score_loss(
        self_rollout(frozen[0], batch, META, 2)[0], net, batch, META),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_in_bf16_are_those_in_fp32(backbone, loss):
    """As FSDP computes on a GPU: weights in bf16, what goes in and comes out in fp32."""
    states = torch.randn(2, 5, *batch_of(backbone).x0.shape[1:], generator=torch.Generator().manual_seed(0))
    values, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        net, *frozen = (frozen_net(backbone, seed).to(dtype) for seed in range(3))
        if backbone == "hy":  # scores that agree would leave nothing to compare
            frozen[1].final_layer.linear.weight.mul_(0.5)
        value = LOSSES[loss](net.requires_grad_(True), frozen, batch_of(backbone, states, GENERATED))
        value.backward()
        values.append(value.item())
        gradients.append(torch.cat([p.grad.float().flatten() for p in net.parameters() if p.grad is not None]))
    assert values[1] == pytest.approx(values[0], rel=0.02) and gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.995


@pytest.mark.parametrize("backbone", BACKBONES)
def test_teacher_forcing_in_bf16_is_the_cached_rollout_in_bf16(backbone):
    net, (x0, prompt, _, camera, *_) = frozen_net(backbone).to(torch.bfloat16), batch_of(backbone)
    sigma = torch.rand(x0.shape[:2], generator=torch.Generator().manual_seed(0))
    x_t = add_noise(x0, x0.flip(0), sigma)
    whole = net(x_t, sigma, prompt, camera, clean=x0, chunk=CHUNK)
    kv_cache, pieces = prefill(net, x0, prompt, camera), []
    for start in range(0, x0.shape[1], CHUNK):
        frames = slice(start, start + CHUNK)
        here = camera.frames(frames)
        pieces.append(net(x_t[:, frames], sigma[:, frames], prompt, here, kv_cache=kv_cache))
        kv_cache = update_cache(net, x0[:, frames], prompt, here, kv_cache=kv_cache)
    pieces = torch.cat(pieces, dim=1)
    assert whole.dtype == pieces.dtype == torch.float32
    torch.testing.assert_close(pieces, whole, atol=1e-2, rtol=0)


# ------------------------------------------------------------------------------------------------ Labels, files, tables

PATHS = {  # pose string: HY-WorldPlay's labels, 9 * motion + turn
    "w,s,d": [0, 9, 18, 27], "a,u,dn": [0, 36, 0, 0], "l,j,i": [0, 1, 2, 3], "k,l+i,j+k": [0, 4, 5, 8],
    "w+d,s+a,w+l": [0, 45, 72, 10], "j+i,l+k,s+k": [0, 7, 6, 22],
}


def labels_told(net):
    """The action labels [b f] that a network of the second backbone will be told, pass after pass."""
    told = []
    net.action_in.register_forward_pre_hook(lambda _, labels: told.append(labels[0]))
    return told


def test_a_batch_has_the_labels_of_its_paths(chain, tmp_path):
    """Read whole, teacher-forced or chunk by chunk."""
    net, (viewmats, labels) = random_hy_dit(), zip(*((parse_trajectory(p), z) for p, z in PATHS.items()))
    shutil.copytree(chain / "data/toy", tmp_path / "toy")
    for path in (tmp_path / "toy").glob("latents-*"):
        rewrite(path, lambda tensors: {"viewmats": torch.stack(viewmats)[torch.arange(len(tensors["Ks"])) % 6]})
    data, told = open_latents(tmp_path / "toy"), labels_told(net)
    x_t, sigma, prompt, _, x0 = hy_inputs(4)
    for step in range(4):
        batch = get_batch(data, 0, step, (0, 1), 3, CPU)
        camera, expected = batch.camera, torch.tensor([labels[row % 6] for row in batch.ids])
        net(x_t, sigma, prompt, camera)
        net(x_t, sigma, prompt, camera, clean=x0, chunk=CHUNK)
        kv_cache = prefill(net, x0, prompt, camera)
        for frames in (slice(0, 2), slice(2, 4)):
            here = camera.frames(frames)
            net(x_t[:, frames], sigma[:, frames], prompt, here, kv_cache=kv_cache)
            kv_cache = update_cache(net, x0[:, frames], prompt, here, kv_cache=kv_cache)
        first, second = expected.split(CHUNK, dim=1)
        forced = torch.cat([expected[:, :CHUNK], expected], dim=1)  # nothing sees the last clean chunk
        wanted = [expected, forced, expected[:, :0], first, first, second, second]
        assert all(map(torch.equal, told, wanted)) and len(told) == len(wanted)
        told.clear()


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_has_the_labels_of_its_path(path):
    net = random_hy_dit(**vars(replace(PRESETS["tiny-hy"].dit, action=True)))
    player = Player(net, fitted_vae("tiny-hy"), load_encoder("tiny-hy", None, CPU), META | {"sampling_steps": 1})
    told = labels_told(net)
    camera = Camera(parse_trajectory(path)[None], intrinsics(K_SQUARE).expand(1, 4, 3, 3))
    assert len([*stream(player, [TOY_PROMPT], camera, [0])]) == 2
    labels = [z[0].tolist() for z in told]
    first, second = PATHS[path][:2], PATHS[path][2:]
    assert labels == [[], first, first, second]  # of the prompt, a chunk, its place in the cache, a chunk


@pytest.mark.parametrize("failure", (None, OSError("the disk is full")))
def test_the_older_state_goes_when_the_newer_is_complete(world, tmp_path, monkeypatch, failure):
    run(world, tmp_path, "ar")
    older, save, seen = tmp_path / "ar/state-000002/.metadata", dcp.save, []

    def watched_save(state, **where):
        seen.append(older.exists())
        if failure:
            raise failure
        return save(state, **where)

    monkeypatch.setattr(dcp, "save", watched_save)
    with pytest.raises(SystemExit) if failure else monkeypatch.context():
        run(world, tmp_path, "ar", "--resume", "--steps", "3")
    assert seen == [True] and older.exists() == bool(failure)
    assert (tmp_path / "ar/state-000003/.metadata").exists() != bool(failure)


def test_only_the_real_score_tells_its_text_the_time(world, tmp_path):
    """A quirk of released networks: that of the frozen score, not of the one that is trained, nor of the generator."""
    call("data.py", "--preset", "tiny-hy", "--count", "2", "--frames", "4", "--size", "32", cwd=tmp_path)
    about = open_latents(tmp_path / "data/toy").meta
    for n, stage in enumerate(("ode", "camera")):
        meta = load_checkpoint(world / f"ckpt/{stage}.pt")[1] | {"preset": "tiny-hy", "timed_text": stage == "camera"}
        meta["vae_fingerprint"] = about["vae_fingerprint"]
        save_checkpoint(tmp_path / f"ckpt/{stage}.pt", random_weights("tiny-hy", n), meta)
    with pytest.MonkeyPatch.context() as patch:
        seen = Watch(patch)
        play(tmp_path, "dmd", "--preset", "tiny-hy", "--steps", "1", "--fake-score-updates", "1")
    events = seen.events[: max(n for n, z in enumerate(seen.events) if z.kind == "step")]
    timed = {z.net: bool((read.sigma > 0).all()) for z, read in zip(events, events[1:]) if read.kind == "read"}
    generator, fake = [step.net for step, _ in seen.updates()]
    assert timed.pop(generator) is timed.pop(fake) is False and [*timed.values()] == [True]


def test_the_film_has_the_checkpoints_frame_rate(world, tmp_path):
    weights, meta = load_checkpoint(world / "ckpt/dmd.pt")
    save_checkpoint(tmp_path / "dmd.pt", weights, meta | {"fps": 24})
    call("stream.py", "--ckpt", tmp_path / "dmd.pt", "--vae", "ckpt/vae.pt", "--camera", "w", "--out",
         tmp_path / "walk.mp4", cwd=world)
    assert imageio.immeta(tmp_path / "walk.mp4")["fps"] == 24


def test_copies_are_dropped_and_what_is_merely_alike_is_kept():
    t = torch.arange(64) * torch.pi / 32
    a, b = t.sin(), t.cos()  # as long as each other, and at right angles
    alike = lambda r: (r * a + (1 - r * r) ** 0.5 * b).expand(3, 64)  # its correlation with a is r
    for r, found in ((0.95, {}), (0.97, {}), (0.985, {1: 0}), (0.99, {1: 0})):
        assert find_duplicates(torch.stack([a.expand(3, 64), alike(r)]).tolist()) == found


@pytest.mark.parametrize("preset, folder, guidance", [
    ("tiny", "bidirectional", 8), ("tiny", "ar_diffusion_tf", 3), ("tiny", "causal_ode", 1), ("tiny", "dmd", 1),
    ("tiny-hy", "bidirectional", 6), ("tiny-hy", "ar_diffusion_tf", 6), ("tiny-hy", "causal_cd", 1),
])
def test_released_networks_are_guided_as_their_makers_did(tmp_path, preset, folder, guidance):
    path = tmp_path / folder / "model.pt"
    path.parent.mkdir()
    torch.save({"generator": {f"model.{name}": w for name, w in random_weights(preset, 0).items()}}, path)
    assert load_checkpoint(path)[1]["guidance"] == guidance
