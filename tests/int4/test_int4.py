"""4-bit layers: packing, the three ways to multiply, storage, accuracy, files."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

from leangpt.decoding.generate import generate
from leangpt.int4 import rounding, rounding_cpu
from leangpt.int4.calibration import quantize_gpt_
from leangpt.int4.files import load_int4, save_int4
from leangpt.int4.quantize import quantize_, round_linear, storage_bits
from leangpt.int4.rounding import fit_groups, round_to_inputs
from leangpt.layers import int4_layouts, linear_cpu
from leangpt.layers.int4_linear import Int4Linear
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

SHAPES = [(128, 64), (65, 128), (16, 32), (5, 64), (144, 96), (161, 128), (4100, 32)]


def make_model(**options):
    torch.manual_seed(0)
    settings = dict(block_size=32, vocab_size=65, n_layer=2, n_head=4, n_embd=64, bias=True)
    return GPT(GPTConfig(**(settings | options))).eval()


def linear(out_features, in_features, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_pack_is_two_values_a_byte():
    codes = torch.randint(16, (7, 64), dtype=torch.uint8)
    packed = int4_layouts.pack(codes)
    assert packed.shape == (7, 32) and packed.dtype == torch.uint8
    assert packed[3, 5] == codes[3, 10] * 16 + codes[3, 11]
    assert torch.equal(int4_layouts.unpack(packed), codes)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_survive_the_kernels_order(shape):
    N, K = shape
    layer = Int4Linear(K, N)
    codes = torch.randint(16, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    layer.store(int4_layouts.pack(codes), torch.zeros(K // 32, N, 2, dtype=torch.bfloat16))
    assert torch.equal(layer.codes(), codes)
    for start, stop in ((0, 1), (N // 3, N), (N - 1, N), (N // 2, N // 2 + 2)):
        assert torch.equal(layer.codes(start, stop), codes[start:stop])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [65, 128, 5])
def test_kernel_and_plain_paths_agree(out_features, bias, group_size):
    layer = round_linear(linear(out_features, 256, bias), group_size)
    x = torch.randn(3, 2, 256, dtype=torch.bfloat16)
    weight = layer.dequantize(torch.float32)
    want = F.linear(x.float(), weight, layer.bias)
    few, many = layer(x), layer(x.repeat(5, 1, 1))[:3]
    assert few.shape == want.shape and few.dtype == x.dtype
    assert relative(few, want) < 5e-3 and relative(many, want) < 8e-3
    assert relative(layer(x.float()), want) < 5e-3 and layer(x.float()).dtype == torch.float32
    if out_features > 60:
        assert relative(layer.forward_rows(x, 20, 50), want[..., 20:50]) < 5e-3
        many = layer.forward_rows(x.repeat(5, 1, 1), 20, 50)[:3]
        assert relative(many, want[..., 20:50]) < 8e-3


@pytest.mark.skipif(int4_layouts.cpu_order() is None, reason="no CPU kernel")
@pytest.mark.parametrize("layout", ["vnni", "cpu"])
def test_the_kernel_is_what_runs_for_few_rows(layout, monkeypatch):
    if layout == "vnni" and not linear_cpu.available():
        pytest.skip("needs cc, AVX-512 and VNNI")
    monkeypatch.setattr(linear_cpu, "available", lambda: layout == "vnni")
    layer = round_linear(linear(64, 64), 32)
    monkeypatch.setattr(layer, "_dense", None)  # would fail if called
    assert layer.layout == layout
    layer(torch.randn(1, 1, 64))
    with pytest.raises(TypeError):
        layer(torch.randn(1, 100, 64))


@pytest.mark.skipif(int4_layouts.cpu_order() is None, reason="no CPU kernel")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [65, 128])
def test_pytorchs_own_cpu_kernel_agrees(out_features, bias, monkeypatch):
    """Where cpu_kernels runs it would otherwise never be tried."""
    monkeypatch.setattr(linear_cpu, "available", lambda: False)
    layer = round_linear(linear(out_features, 256, bias), 32)
    assert layer.layout == "cpu"
    x = torch.randn(3, 2, 256, dtype=torch.bfloat16)
    want = F.linear(x.float(), layer.dequantize(), layer.bias)
    assert relative(layer(x), want) < 5e-3
    codes, saved = layer.codes(), layer.state_dict()["packed"]
    assert torch.equal(int4_layouts.unpack(saved), codes)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_processors_orders(capability):
    """The kernel's byte order depends on the register width; ours is found out at run time."""
    code = (
        "import torch; from leangpt.layers.int4_layouts import unpack; torch.manual_seed(0);"
        "from leangpt.int4.quantize import round_linear;"
        "l = torch.nn.Linear(64, 112);"
        "q = round_linear(l); x = torch.randn(1, 64).bfloat16();"
        "w = q.dequantize(); e = (q(x).float() - torch.nn.functional.linear(x.float(), w, "
        "l.bias)).norm(); print(q.layout, float(e) < 0.05, torch.equal(q.codes(), "
        "unpack(q.state_dict()['packed'])))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.split()[1:] == ["True", "True"], done.stdout + done.stderr


def minmax(weight, group_size):
    x = weight.unflatten(-1, (-1, group_size))
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 15
    return (((x - low) / scale).round() * scale + low).flatten(-2)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rounding_beats_minimum_and_maximum(group_size):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    codes, scale, zero = fit_groups(weight, group_size)
    scale_zero = torch.stack([scale.T, zero.T], -1)
    ours = (int4_layouts.dequantize(codes, scale_zero, torch.float32) - weight).norm()
    assert ours < 0.995 * (minmax(weight, group_size) - weight).norm()
    assert codes.max() == 15 and codes.min() == 0


def test_rounding_to_inputs_keeps_the_outputs():
    weight = linear(96, 128).weight.detach()
    x = torch.randn(500, 24) @ torch.randn(24, 128) + 0.1 * torch.randn(500, 128)
    want = x @ weight.T
    errors = [
        (x @ back(rounded).T - want).norm().item()
        for rounded in (fit_groups(weight, 32), round_to_inputs(weight, 32, x))
    ]
    assert errors[1] < 0.3 * errors[0]


def back(rounded):
    """The float32 weights (N, K) that (codes, scale, zero) stand for."""
    codes, scale, zero = rounded
    return int4_layouts.dequantize(codes, torch.stack([scale.T, zero.T], -1), torch.float32)


def test_weights_on_a_grid_stay_there():
    """Those of a GGUF file have 16 values in a group of 32: nothing to lose."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (96, 128), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    scale, zero = torch.rand(2, 96, 4, generator=generator) * 0.01
    weight = (codes.view(96, 4, 32) * (0.01 + scale[..., None]) - zero[..., None]).flatten(1)
    x = torch.randn(500, 24) @ torch.randn(24, 128) + 0.1 * torch.randn(500, 128)
    assert relative(x @ back(round_to_inputs(weight, 32, x)).T, x @ weight.T) < 3e-3


@pytest.mark.skipif(rounding_cpu.library() is None, reason="no C compiler")
@pytest.mark.parametrize("rows,inputs,group_size", [(70, 96, 32), (33, 128, 64), (16, 256, 128)])
def test_rounding_in_c_equals_pytorchs(rows, inputs, group_size, monkeypatch):
    weight = linear(rows, inputs).weight.detach()
    weight[3] = 0.25  # all alike: no slope to fit
    x = torch.randn(600, inputs) @ torch.randn(inputs, inputs) + torch.randn(600, inputs)
    in_c = round_to_inputs(weight, group_size, x)
    monkeypatch.setattr(rounding_cpu, "library", lambda: None)
    plain = round_to_inputs(weight, group_size, x)
    for found, want in zip(in_c, plain):  # but for codes that were as near to two values
        assert found.shape == want.shape and found.dtype == want.dtype
        assert (found == want).float().mean() > 0.995
    errors = [((back(rounded) - weight) @ x.T).norm().item() for rounded in (in_c, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_each_sweep_lowers_the_error(monkeypatch):
    """Never raised by any sweep, in float64, scales and zeros as bfloat16 holds them."""
    weight = linear(70, 128).weight.detach()
    x = torch.randn(600, 128) @ torch.randn(128, 128)
    errors = []
    for sweeps in (0, 1, 2, 5, 20):
        monkeypatch.setattr(rounding, "SWEEPS", sweeps)
        lost = back(round_to_inputs(weight, 32, x)) - weight
        gram = (x.T @ x / len(x)).double()
        gram.diagonal().add_(rounding.DAMPING * gram.diagonal().mean())
        errors.append((lost.double() @ gram * lost).sum(1))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[2].sum() < 0.9 * errors[0].sum()


def test_degenerate_weights_and_inputs():
    constant = torch.full((16, 64), 0.25)
    zeros, ones = torch.zeros(10, 64), torch.ones(10, 64)
    for rounded in (
        fit_groups(constant, 32),
        fit_groups(constant * 0, 32),
        round_to_inputs(constant, 32, zeros),
        round_to_inputs(constant, 32, ones),
    ):
        found = back(rounded)
        assert torch.isfinite(found).all() and (found - found[0, 0]).abs().max() < 1e-3
        assert abs(found[0, 0].item()) in (0.0, 0.25) or abs(found[0, 0].item() - 0.25) < 2e-3


@pytest.mark.parametrize("group_size,bits", [(32, 5.0), (64, 4.5), (128, 4.25)])
def test_storage_from_the_real_tensors(group_size, bits):
    model = quantize_(make_model(n_embd=128), group_size)
    assert storage_bits(model) == bits
    float_bytes = sum(p.numel() for n, p in model.named_parameters() if "wte" not in n)
    held = sum(
        t.numel() * t.element_size()
        for m in model.modules()
        if isinstance(m, Int4Linear)
        for t in m.__dict__["_buffers"].values()
        if t is not None
    )
    weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear)
    )
    assert held == weights * bits / 8 and float_bytes < weights / 8  # no second copy, no float
    with pytest.raises(UserError, match="no int4 layers"):
        storage_bits(make_model())


def test_quantize_replaces_every_linear_and_leaves_lookup_exact():
    model = make_model()
    wte = model.transformer.wte.weight.clone()
    same = quantize_gpt_(model, 32)
    assert same is model
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert isinstance(model.lm_head, Int4Linear)
    assert torch.equal(model.transformer.wte.weight, wte)


@pytest.mark.parametrize("policy", ["cache", "recompute"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_quantised_model_decodes_what_it_forwards(policy, position):
    model = quantize_gpt_(make_model(position=position, attention_policy=policy), 32)
    idx = torch.randint(65, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = generate(model, idx, 12, temperature=0)
        logits, _ = model(text[:, :-1])
    chosen = logits[:, 8:].gather(-1, text[:, 9:, None]).squeeze(-1)
    assert (logits[:, 8:].amax(-1) - chosen).max() < 0.02  # bf16 activations may swap near ties


def test_calibration_ends_with_the_last_linear():
    """By then all is known; the logits of a whole text would be the largest thing in memory."""
    model, reached = make_model(), []
    idx = torch.randint(65, (2, 9))

    def run():
        model(idx)
        reached.append(True)

    quantize_(model, 32, run)
    assert isinstance(model.lm_head, Int4Linear) and not reached
    quantize_(model, 32, run)  # nothing left to round: runs to its end
    assert reached


def test_calibrated_rounding_moves_the_logits_less():
    model = make_model(n_embd=128, n_layer=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    idx = torch.randint(65, (40, 32), generator=torch.Generator().manual_seed(0))

    def rounded(model, calibrated):
        model = copy.deepcopy(model)
        return quantize_gpt_(model, 32) if calibrated else quantize_(model, 32)

    with torch.no_grad():
        want = model(idx)[0]
        errors = [relative(rounded(model, c)(idx)[0], want) for c in (False, True)]
    assert errors[1] < 0.8 * errors[0], errors


def test_state_dict_round_trip_and_its_errors():
    model = quantize_(make_model(), 32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = quantize_(make_model(bias=True), 32)
    for m in other.modules():
        if isinstance(m, Int4Linear):
            m.store(torch.zeros_like(m.plain_order()[0]), torch.zeros_like(m.plain_order()[1]))
    other.load_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    idx = torch.randint(65, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(idx)[0], other(idx)[0])
    name = "transformer.h.0.attn.c_attn.packed"
    with pytest.raises(RuntimeError, match=r"\(1, 2\), not \(192, 32\)"):
        other.load_state_dict(state | {name: torch.zeros(1, 2, dtype=torch.uint8)})
    missing = dict(state)
    del missing[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(missing)


def test_casts_keep_the_scales():
    layer = round_linear(linear(64, 64), 32)
    before = layer.dequantize()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double):
        cast(layer)
        assert layer.scale_zero.dtype == torch.bfloat16
        assert torch.equal(layer.dequantize(), before)
    assert layer.bias.dtype == torch.float64
    deep = copy.deepcopy(layer)
    assert torch.equal(deep.dequantize(), before)


def test_files_round_trip(tmp_path):
    model = quantize_gpt_(make_model(position="rope", attention_policy="grouped", n_kv_head=2), 64)
    path = tmp_path / "model.safetensors"
    save_int4(model, path, {"dataset": "x"})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear)
    )
    floats = sum(p.numel() * p.element_size() for p in model.parameters())
    assert path.stat().st_size < weights * 4.5 / 8 + floats + 8000
    loaded, notes = load_int4(GPT, path, dtype=torch.float32)
    assert notes == {"dataset": "x"} and not loaded.training
    assert loaded.config == model.config
    idx = torch.randint(65, (1, 20))
    with torch.no_grad():
        assert torch.equal(loaded(idx)[0], model(idx)[0])
    half, _ = load_int4(GPT, path)
    assert half.transformer.wte.weight.dtype == torch.bfloat16


def test_loading_never_makes_a_float_model(tmp_path):
    from leangpt.memory.meter import measure_peak

    model = quantize_(make_model(n_embd=256, n_layer=4, vocab_size=512), 32)
    path = tmp_path / "model.safetensors"
    save_int4(model, path)
    float_bytes = 2 * sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear)
    )  # as bfloat16
    assert measure_peak(lambda: load_int4(GPT, path)) < float_bytes


def test_damaged_files_are_one_clear_error(tmp_path):
    model = quantize_(make_model(), 32)
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="cannot read"):
        load_int4(GPT, path)
    with pytest.raises(UserError, match="not in 4 bits"):
        save_int4(make_model(), path)
    with pytest.raises(UserError, match="cannot write"):
        save_int4(model, "/dev/null/model.safetensors")
    save_int4(model, path)
    whole = path.read_bytes()
    for part in (whole[:100], whole[:-50], b"", b"x" * 500):
        path.write_bytes(part)
        with pytest.raises(UserError, match="cannot read"):
            load_int4(GPT, path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a 4-bit model"):
        load_int4(GPT, path)
    model.transformer.ln_f.weight = nn.Parameter(torch.ones(7))
    save_int4(model, path)
    with pytest.raises(UserError, match=r"ln_f.weight.*\(64,\).*\(7,\)"):
        load_int4(GPT, path)


def test_errors():
    with pytest.raises(UserError, match="group_size=48"):
        quantize_(make_model(), 48)
    model = make_model(n_embd=48)
    with pytest.raises(UserError, match="does not divide the 48 inputs of transformer.h.0.attn"):
        quantize_(model, 32)
    assert isinstance(model.lm_head, nn.Linear)  # nothing was touched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(256, 128), (65, 256), (2304, 768), (5, 128)])
def test_cuda_agrees_with_the_cpu(shape, group_size):
    layer = round_linear(linear(*shape), group_size)
    x = torch.randn(3, shape[1], dtype=torch.bfloat16)
    want, weight, codes = layer(x), layer.dequantize(), layer.codes()
    layer = layer.cuda()
    assert layer.layout == ("cuda" if shape[0] >= 16 else "plain")
    assert torch.equal(layer.codes().cpu(), codes)
    assert torch.equal(layer.dequantize().cpu(), weight)
    assert relative(layer(x.cuda()).cpu(), want) < 5e-3
    assert relative(layer(x.cuda().repeat(20, 1))[:3].cpu(), want) < 8e-3
    back = layer.cpu()
    assert torch.equal(back(x), want)
