"""The benchmarks: peers compute what diffusers does, what is wrong gets no time, rows are whole."""

import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from temporal_layers.kernels.benchmarks import __main__ as command_line
from temporal_layers.kernels.benchmarks import cases, formulas, gate, layers, machine, measure, peers, report, run
from temporal_layers.kernels.benchmarks.workloads import Provider, build
from temporal_layers.kernels.launch import is_interpreted

# Group norms in 32 groups need a channel or two in each; odd sizes show a mixed-up axis.
CASE = cases.Case("tiny", 2, 3, 64, 3, 5, heads=2, temb_channels=24)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

pytestmark = pytest.mark.skipif(is_interpreted(), reason="no kernel runs in it")


def peer_names(op):
    return [
        provider.name
        for provider in build(op, CASE, torch.float64, "cpu").providers
        if not provider.ours
        and (not provider.gpu_only or provider.name == "eager")
        and provider.name != "torch.compile"
    ]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in cases.OPS for name in peer_names(op)])
def test_peers_compute_the_formula(op, name):
    if "diffusers" in name:
        pytest.importorskip("diffusers")
    workload = build(op, CASE, torch.float64, "cpu")
    upstream = torch.ones(workload.output_shape, dtype=torch.float64)
    expected = gate.evaluate(workload, torch.float64, upstream)
    [provider] = [provider for provider in workload.providers if provider.name == name]
    function, layout, count = provider.build(), provider.layout, workload.activations

    def on_frames(*inputs):
        to, back = (layout.to, layout.back) if layout else (nn.Identity(), nn.Identity())
        return back(function(*map(to, inputs[:count]), *inputs[count:]))

    got = gate.outcome(on_frames, list(workload.inputs), upstream)
    tolerance = TIGHT
    if name == "var_mean" or "diffusers" in name or op.startswith("alpha") or "res" in op:
        tolerance = {"rtol": 1e-5, "atol": 1e-5}  # they compute, or hold alpha, in fp32
    for actual, oracle in zip(got, expected, strict=True):
        torch.testing.assert_close(actual.double(), oracle, **tolerance)


def test_formula_of_attention_is_diffusers():
    Attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    theirs = Attention(64, heads=2, dim_head=32, bias=False).double()
    for projection in (theirs.to_q, theirs.to_k, theirs.to_v, theirs.to_out[0]):
        nn.init.eye_(projection.weight)
    nn.init.zeros_(theirs.to_out[0].bias)
    x = torch.randn(6, 15, 64, dtype=torch.float64)
    sequences = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1)
    expected = theirs(sequences).unflatten(0, (2, 15)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(formulas.attention(x, x, x, frames=3, heads=2), expected, **TIGHT)


def test_formula_of_the_block_is_diffusers():
    TemporalResnetBlock = pytest.importorskip("diffusers.models.resnet").TemporalResnetBlock
    weights = layers.res_block_weights(64, 24, torch.float64, "cpu")
    weights["mix_factor"] = torch.tensor([-math.inf])  # alpha 0: the temporal branch alone
    theirs = TemporalResnetBlock(64, temb_channels=24, eps=1e-5).double()
    theirs.load_state_dict({name: value for name, value in weights.items() if name != "mix_factor"})
    x, temb = torch.randn(6, 64, 3, 5, dtype=torch.float64), torch.randn(6, 24, dtype=torch.float64)
    expected = theirs(x.unflatten(0, (2, 3)).transpose(1, 2), temb.unflatten(0, (2, 3))).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(formulas.res_block(x, temb, weights, frames=3), expected, **TIGHT)


def test_layers_take_every_weight():
    weights = layers.res_block_weights(64, 24, torch.float32, "cpu")
    with pytest.raises(AssertionError, match=r"left over: \['stranger\.weight'\]"):
        layers.our_res_block(weights | {"stranger.weight": torch.ones(1)}, 3)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda out: out * 1.001, "error"),
        (lambda out: out.index_fill(0, torch.tensor([2]), torch.nan), "not finite"),
        (lambda out: torch.empty_like(out), "not finite"),  # memory that was never written
    ],
)
def test_wrong_results_get_no_time(monkeypatch, spoil, text):
    plan = plan_for("group_norm")
    [job] = plan.jobs

    def wrong(*arguments):
        workload = build(*arguments)
        function = workload.providers[1].build()
        spoiled = replace(workload.providers[1], build=lambda: lambda *x: spoil(function(*x)))
        return replace(workload, providers=(spoiled,))

    monkeypatch.setattr(run, "build", wrong)
    [row] = run.run_job(plan, *job)
    assert row["error"].startswith("wrong: ") and text in row["error"]
    assert "median_us" not in row


def test_wrong_gradient_turns_the_backward_pass_red_alone(monkeypatch):
    plan = replace(plan_for("alpha_blend"), modes=("forward", "backward"))
    [job] = plan.jobs

    def wrong(*arguments):
        workload = build(*arguments)
        function = workload.providers[1].build()
        spoiled = replace(workload.providers[1], build=lambda: lambda s, t, a: function(s, t.detach() + 0 * t, a))
        return replace(workload, providers=(spoiled,))

    monkeypatch.setattr(run, "build", wrong)
    forward, backward = run.run_job(plan, *job)
    assert forward["error"] is None and forward["median_us"] > 0
    assert backward["error"].startswith("wrong: AssertionError: gradient 1: error") and "median_us" not in backward


def test_a_peer_that_fails_is_a_row_with_its_text(monkeypatch):
    def fail():
        raise ImportError("No module named 'peer'\nsecond line")

    def failing(*arguments):
        workload = build(*arguments)
        return replace(workload, providers=(*workload.providers[1:2], Provider("peer", fail)))

    plan = plan_for("alpha_blend")
    monkeypatch.setattr(run, "build", failing)
    good, bad = next(run.execute(plan, {"copy": 1e10, "gemm": {"float32": 1e11}}))
    assert good["versus_ours"] == 1.0 and good["percent_of_copy"] > 0 and good["peak_mb"] is None
    assert bad["error"] == "ImportError: No module named 'peer'"


def test_time_limit_leaves_rows_that_say_so():
    rows = next(run.execute(replace(plan_for("group_norm"), limit=-1.0), {}))
    assert [(row["provider"], row["error"]) for row in rows] == [("all", "not run: time limit reached")]


def plan_for(op):
    return run.Plan(
        device="cpu", jobs=((op, CASE, torch.float32),), modes=("forward",), skip=frozenset(), compiled=False,
        seconds=0.0, rounds=1, limit=60.0,
    )  # fmt: skip


def test_flash_attention_is_not_run_where_it_would_end_the_process():
    class OnGPU(torch.Tensor):
        is_cuda = True

    def query(batch):
        return torch.empty(batch, 4, 16, 64, device="meta").as_subclass(OnGPU).requires_grad_()

    with pytest.raises(RuntimeError, match=r"would address 1\.25 x 2\*\*31 elements"):
        peers.refuse_corruption(query(81920), "flash")
    peers.refuse_corruption(query(65536), "flash")
    peers.refuse_corruption(query(81920), "efficient")


def test_summary_of_a_timing():
    timing = measure.Timing([4e-6, 1e-6, 2e-6, 3e-6, 5e-6], 2_000_000).summary()
    assert timing == pytest.approx(
        {"median_us": 3.0, "p20_us": 1.2, "p80_us": 4.8, "samples": 5, "peak_mb": 2.0}, rel=1e-12
    )


def test_costs_are_those_of_the_formulas():
    attention = build("temporal_attention", CASE, torch.bfloat16, "cpu").costs["forward"]
    elements = 2 * 3 * 64 * 15
    assert attention.bytes == 4 * elements * 2  # q, k, v and the result
    assert attention.flops == 2 * (2 * 2 * 15 * 2 * 3 * 3 * 32)  # two products of (3, 32, 3) for each head and pixel
    conv = build("temporal_conv", CASE, torch.float32, "cpu").costs["forward"]
    assert conv.flops == 2 * 3 * 64 * elements
    gated = build("geglu", CASE, torch.bfloat16, "cpu").costs["forward"]
    assert gated.flops == 2 * 8 * 64 * elements and gated.bytes == (1 + 4) * elements * 2
    assert build("geglu_norm", CASE, torch.bfloat16, "cpu").costs["forward"] == gated  # the norm is free
    product = build("linear_norm", CASE, torch.bfloat16, "cpu").costs["forward"]
    assert product.flops == 2 * 3 * 64 * elements and product.bytes == (1 + 3) * elements * 2


def test_cases_are_whole():
    for case in (*cases.GPU_CASES, *cases.CPU_CASES, *cases.SMOKE_CASES):
        assert case.channels % 32 == 0 and (not case.heads or case.channels % case.heads == 0)
    assert len({case.name for case in cases.GPU_CASES}) == len(cases.GPU_CASES)
    assert {case.frames for case in cases.GPU_CASES} == {8, 16, 32}
    assert not cases.GPU_CASES[2].suits("transformer") and not cases.GPU_CASES[2].suits("geglu")
    assert cases.GPU_CASES[2].suits("res_block")


def test_command_line_writes_what_it_measures(tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--ops", "alpha_blend", "--dtypes", "float32", "--commit", "abc1234"]
    assert command_line.main([*arguments, "--out", str(tmp_path)]) == 0
    [document] = tmp_path.glob("*.json")
    assert document.stem.endswith("-abc1234") and f"torch{torch.__version__.partition('+')[0]}" in document.stem
    found, ceilings, rows = report.load(document)
    assert found["threads"] == 1 and ceilings["copy"] > 0
    assert {row["provider"] for row in rows} == {"reference", "eager", "diffusers"}
    missing = set() if importlib.util.find_spec("diffusers") else {"diffusers"}
    assert {row["provider"] for row in rows if row["error"]} == missing  # a peer that fails is a row
    assert all(row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in rows if not row["error"])
    text = document.with_suffix(".md").read_text()
    assert text == report.markdown(found, ceilings, rows) and capsys.readouterr().out == text + "\n"
    if importlib.util.find_spec("matplotlib") is not None:
        assert document.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_wrong_results_of_this_library_fail_the_command(monkeypatch, capsys):
    rows = [run.row_of("group_norm", CASE, torch.float32, "forward", "reference", error="wrong: x | y")]
    monkeypatch.setattr(command_line, "execute", lambda plan, ceilings: iter([rows]))
    assert command_line.main(["--smoke", "--device", "cpu", "--print-only"]) == 1
    assert "wrong: x \\| y" in capsys.readouterr().out


def test_red_tests_stop_the_measurement(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "run_tests", lambda: 3)
    assert command_line.main(["--tests"]) == 3
    assert "The tests failed (status 3)" in capsys.readouterr().err


def test_broken_device_keeps_the_rows(monkeypatch, tmp_path, capsys):
    def broken(plan, ceilings):
        yield [run.row_of("group_norm", CASE, torch.float32, "forward", "reference", error="none")]
        raise run.BrokenDevice("illegal memory access")

    monkeypatch.setattr(command_line, "execute", broken)
    assert command_line.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "Stopped: illegal memory access" in capsys.readouterr().err
    assert len(json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]) == 1


def test_a_checkout_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.head() == "unknown"


def test_what_is_measured_where():
    """On a CPU without what is there the same parts in a row, unless it is asked for."""

    def ops(device, *words):
        return {op for op, *_ in command_line.plan_of(command_line.parser().parse_args(words), device).jobs}

    assert ops("cuda") == ops("cpu", "--smoke") == set(cases.OPS)
    assert ops("cpu") == set(cases.OPS) - set(cases.FUSIONS)
    assert ops("cpu", "--ops", "linear_norm") == {"linear_norm"}
