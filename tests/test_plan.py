"""
The bill (model.py, 12): what --plan says of a step, against real tensors, the allocator and arithmetic; and --bench.
"""
import gc
import importlib
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import stream
from conftest import call, refusal
from model import PRESETS, Meter, count, extrapolate, plan, recompute_blocks

STAGES = [("train_camera", ""), ("train_ar", ""), ("distill_ode", ""), ("distill_ode", "--generate"),
          ("distill_cd", ""), ("train_dmd", "")]
LESS = {"distill_ode": "--teacher-steps 4", "distill_cd": "--teacher-steps 4", "train_dmd": "--fake-score-updates 2"}


def short(script, flags):
    return f"--batch-size 2 {LESS.get(script, '')} {flags}"


def work_of(script, preset, flags=""):
    stage = importlib.import_module(script)
    return stage.parse_args(f"--preset {preset} --plan 8 {short(script, flags)}".split()), stage.WORK


def real_nets(args, work, layers, recompute):
    nets = {}
    for name, trained in work.nets.items():
        net = PRESETS[args.preset].net(replace(PRESETS[args.preset].dit, layers=layers))
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.02)
        nets[name] = net.train(trained).requires_grad_(trained)
        if recompute and trained:
            recompute_blocks(net)
    return nets


def rehearse(args, work, nets):
    batch = work.make_batch(args.preset, work.meta(args), args.batch_size, torch.device("cpu"))
    return work.rehearse(args, nets, batch, work.meta(args))


def meta_costs(args, work, layers, recompute, flops=False):
    return count(args, work, work.meta(args)["size"], layers, recompute, flops)


# ---------------------------------------------------------------------------------------------------------- The counts


@pytest.mark.parametrize("script, flags", STAGES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_third_block_takes_what_the_second_takes(script, flags, recompute):
    args, work = work_of(script, "tiny", flags)
    one, two, three = (meta_costs(args, work, layers, recompute) for layers in (1, 2, 3))
    for (name, found), (same, expected) in zip(three, extrapolate(one, two, 2), strict=True):
        assert name == same and found == Counter(expected)


@pytest.mark.parametrize("preset", ["tiny", "tiny-hy"])
@pytest.mark.parametrize("script", ["train_ar", "train_dmd"])
def test_flops_are_those_of_real_tensors(script, preset):
    def of_attention(q, k, v, *args, out_shape=None, **kwargs):  # that of CPUs is not in torch's table
        (b, nh, n, hd), l = q, k[2]
        return 4 * b * nh * n * l * hd

    def of_its_backward(grad, q, k, v, *args, out_shape=None, **kwargs):  # five matmuls, forward has two
        return of_attention(q, k, v) * 5 // 2

    args, work = work_of(script, preset)
    cpu = torch.ops.aten
    counter = FlopCounterMode(display=False, custom_mapping={
        cpu._scaled_dot_product_flash_attention_for_cpu: of_attention,
        cpu._scaled_dot_product_flash_attention_for_cpu_backward: of_its_backward})
    with counter:
        updates = list(rehearse(args, work, real_nets(args, work, 2, recompute=True)))
    costs = meta_costs(args, work, 2, recompute=False, flops=True)
    assert [name for name, _ in costs] == updates
    assert sum(cost["flop"] + cost["again"] for _, cost in costs) == counter.get_total_flops()


def test_attention_is_counted_as_flash_attention():
    q = torch.randn(1, 2, 64, 16, device="meta", requires_grad=True)
    meter = Meter()
    with saved_tensors_hooks(meter.watch, lambda z: z), meter.flops:
        meter.within(F.scaled_dot_product_attention, q, q, q).sum().backward()
    cost = meter.settle()
    assert cost["flop"] == 4 * 2 * 64 * 64 * 16 * 7 / 2 and cost["activations"] < 2 * 64 * 64 * 4  # not the scores


@pytest.mark.parametrize("script, flags", STAGES)
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_that_of_real_tensors(script, flags, recompute, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "bfloat16", lambda net: net)  # the CPU's networks are fp32
    args, work = work_of(script, "tiny", flags)
    meter, peaks, nets = Meter(), [], real_nets(args, work, 2, recompute=False)
    for name, net in nets.items():
        meter.attach(net, 2, recompute and work.nets[name])
    with saved_tensors_hooks(meter.watch, lambda z: z):
        for name in [*rehearse(args, work, nets), ""]:
            peaks.append(meter.settle())
            if name:
                nets[name].zero_grad()
    for kind in ("activations", "cache"):
        expected = max(cost[kind] for _, cost in meta_costs(args, work, 2, recompute))
        assert max(cost[kind] for cost in peaks) == pytest.approx(expected, rel=0.01)


def allocator_peak(args, work, layers, recompute, path):
    """Bytes above what was there before the step, gradients included, as the profiler saw the allocator."""
    nets = real_nets(args, work, layers, recompute)
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    passes = rehearse(args, work, nets)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        list(passes)
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_camera", "train_ar", "distill_ode", "distill_cd", "train_dmd"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-hy"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_plan_is_the_allocators_peak_within_5_percent(script, preset, recompute, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.nn.Module, "bfloat16", lambda net: net)
    args, work = work_of(script, preset, "--batch-size 8")
    costs = [cost for _, cost in meta_costs(args, work, 2, recompute)]
    planned = max(cost["activations"] + cost["cache"] for cost in costs)
    assert allocator_peak(args, work, 2, recompute, tmp_path / "trace.json") == pytest.approx(planned, rel=0.05)


def test_a_rollout_keeps_one_cache_at_a_time():
    args, work = work_of("train_dmd", "tiny")
    cfg, meta = PRESETS["tiny"].dit, work.meta(args)
    # k, v and PRoPE's of all chunks but the last, in bf16; 16 tokens a frame
    expected = args.batch_size * (meta["frames"] - meta["chunk"]) * 16 * cfg.layers * 4 * cfg.dim * 2
    costs = extrapolate(*(meta_costs(args, work, layers, False) for layers in (1, 2)), cfg.layers - 1)
    assert max(cost["cache"] for _, cost in costs) == expected


# ------------------------------------------------------------------------------------------------------------ The plan


@pytest.mark.parametrize("script, flags", STAGES)
def test_the_last_line_is_json_and_adds_up(script, flags, tmp_path, capsys):
    call(f"{script}.py", "--plan", "8", *short(script, flags).split(), cwd=tmp_path)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    gb = found["gb"]
    assert {"preset", "stage", "gpus", "sp", "tflop", "bytes_between_gpus", "seconds_at_limit"} <= found.keys()
    assert {"weights", "gradients", "optimizer", "ema", "other", "activations", "cache", "total"} <= gb.keys()
    assert gb["total"] == pytest.approx(sum(gb.values()) - gb["total"]) and found["tflop"] > 0
    assert not any(tmp_path.iterdir())


def test_states_are_fp32_and_cut_within_a_node():
    args, work = work_of("train_dmd", "tiny")
    parameters = sum(p.numel() for p in PRESETS["tiny"].net(PRESETS["tiny"].dit).parameters())
    for gpus, shards in ((1, 1), (8, 8), (64, 8)):
        args.plan = gpus
        found = plan(args, work)
        gb = {kind: round(size * 1e9 * shards / parameters, 3) for kind, size in found["gb"].items()}
        states = [gb[kind] for kind in ("weights", "gradients", "optimizer", "ema", "other")]
        assert states == [8, 4, 16, 4, 4] and (found["bytes_between_gpus"] > 0) == (gpus > 1)
        assert (found["bytes_between_nodes"] > 0) == (gpus > 8)


def test_gpus_that_share_a_video_hold_a_share_of_it():
    args, work = work_of("train_ar", "tiny")
    found = [plan(args, work)]
    args.sp = 2
    found.append(plan(args, work))
    halves = [found[1]["gb"]["activations"] / found[0]["gb"]["activations"], found[1]["tflop"] / found[0]["tflop"]]
    assert all(0.5 <= half < 0.6 for half in halves)  # of the text, each has all


@pytest.mark.parametrize("flags", [["--plan", "12"], ["--plan", "8", "--sp", "3"]])
def test_gpus_that_cannot_be_are_refused(flags, tmp_path):
    assert "--plan" in refusal("train_camera.py", *flags, cwd=tmp_path)


@pytest.mark.parametrize("preset", ["tiny", "tiny-hy"])
def test_plan_of_a_stream(preset, tmp_path, capsys):
    call("stream.py", "--plan", "--preset", preset, cwd=tmp_path)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["gb"]["total"] == pytest.approx(sum(found["gb"].values()) / 2)
    assert len(found["tflop"]) == len(found["tflop_decode"]) == 4 and min(found["tflop_decode"]) > 0
    chunks = [cost for _, cost in stream.count_chunks(preset, 1)]
    assert all(later["flop"] > earlier["flop"] for earlier, later in zip(chunks, chunks[1:]))


def test_a_preset_without_a_checkpoint_is_for_bills(tmp_path):
    assert "--preset" in refusal("stream.py", "--preset", "tiny", cwd=tmp_path)


# ----------------------------------------------------------------------------------------------------------- The bench


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_camera", "distill_cd", "train_dmd"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-hy"])
def test_bench_needs_no_files_and_prints_one_line(script, preset, tmp_path, capsys):
    call(f"{script}.py", "--bench", "1", "--preset", preset, *short(script, "").split(), cwd=tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["card"] == "CPU" and found["preset"] == preset and min(found["seconds"], found["peak_gb"]) > 0
    assert 0 < found["share"] < 1 and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_bench_of_a_stream_needs_no_files(tmp_path, capsys):
    call("stream.py", "--bench", "--preset", "tiny-hy", cwd=tmp_path)
    assert json.loads(capsys.readouterr().out)["frames"] == 29
