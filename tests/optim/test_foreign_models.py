"""build_optimizer on other models: the role of each parameter, which way round its matrix lies."""

import re
import warnings

import pytest
import torch
from torch import nn

from leangpt.optim import VARIANTS, build_optimizer, optimizer_table
from leangpt.optim.roles import place_parameters

transformers = pytest.importorskip("transformers")
OURS = [name for name in VARIANTS if name != "adam"]
SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
)


def gpt2(**more):
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=50)
    ends = dict(bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ends, **more))


def llama(tied=False):
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def qwen():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL))


def roles(model):
    """{name: Placement}, and that no parameter that trains is missing."""
    placed = place_parameters(model)
    assert len(placed) == sum(p.requires_grad for p in model.parameters())
    return {name: placement for name, _, placement in placed}


def by_role(model):
    """{role: names without the numbers of layers}"""
    found = {}
    for name, placement in roles(model).items():
        short = re.sub(r"\.\d+\.", ".", name).removesuffix(".weight")
        found.setdefault(placement.role, set()).add(short.removeprefix("transformer.h."))
    return found


# ---------------------------------------------------------------------- Conv1D of GPT-2


class Stored(nn.Module):
    """The matrices of a GPT-2 block, (out, in) or (in, out)."""

    SHAPES = {"c_attn": (96, 32), "c_proj": (32, 64), "c_fc": (64, 32)}

    def __init__(self, transposed):
        super().__init__()
        self.attn, self.transposed = nn.Module(), transposed
        for name, (rows, columns) in self.SHAPES.items():
            conv1d = transformers.pytorch_utils.Conv1D
            layer = conv1d(rows, columns) if transposed else nn.Linear(columns, rows)
            self.attn.add_module(name, layer)

    def fill(self, attribute, seed):
        """The same numbers as the weights or gradients of either, as the layer stores them."""
        source = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            shape = p.shape[::-1] if self.transposed else p.shape
            value = torch.randn(shape, generator=source)
            value = value * torch.linspace(0.1, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
            value = (value.t() if value.ndim == 2 and self.transposed else value).to(p.dtype)
            setattr(p, attribute, value.contiguous())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", OURS)
def test_a_weight_stored_in_out_moves_as_the_linear_one(variant, dtype, foreach):
    results = []
    for transposed in (False, True):
        model = Stored(transposed).to(dtype)
        model.fill("data", 0)
        optimizer = build_optimizer(model, variant, foreach=foreach)
        for seed in range(1, 4):
            model.fill("grad", seed)
            optimizer.step()
        results.append((model, optimizer))
    (linear, one), (conv1d, other) = results
    assert {g["transposed"] for g in other.param_groups} == {True, False}
    for p, q in zip(linear.parameters(), conv1d.parameters()):
        as_linear = q.t() if q.ndim == 2 else q
        # float32 sums in another order tip codes of momenta and stochastic rounding over, by a bit
        wide = 2e-3 if dtype == torch.float32 else 2e-2
        assert (p - as_linear).float().norm() <= wide * p.float().norm() * (1 if p.ndim > 1 else 2)
        exact = dtype == torch.float32 and "8" not in variant and "4" not in variant
        if exact:
            assert torch.allclose(p, as_linear, rtol=1e-4, atol=1e-5)
        for name, value in one.state[p].items():
            if torch.is_tensor(value):
                found = other.state[q][name]
                assert found.shape == value.shape and found.dtype == value.dtype
                if value.dtype == torch.float32 and exact:
                    assert torch.allclose(value, found, rtol=1e-3, atol=1e-6), name


def test_gpt2_of_hugging_face():
    model = gpt2(add_cross_attention=True)
    assert by_role(model)["qkv"] == {
        "attn.c_attn",
        "crossattention.c_attn",
        "crossattention.q_attn",
    }
    assert by_role(model)["attn_out"] == {"attn.c_proj", "crossattention.c_proj"}
    assert by_role(model)["mlp_in"] == {"mlp.c_fc"}
    assert by_role(model)["mlp_out"] == {"mlp.c_proj"}
    assert by_role(model)["embedding"] == {"transformer.wte", "transformer.wpe"}  # the head is tied
    found = roles(model)
    matrices = [name for name in found if ".h." in name and found[name].role != "vector"]
    assert all(found[name].transposed and found[name].known for name in matrices)
    assert found["transformer.h.0.attn.c_attn.weight"].row_blocks == (32, 32, 32)
    assert found["transformer.h.0.crossattention.c_attn.weight"].row_blocks == (32, 32)
    assert found["transformer.h.0.mlp.c_fc.weight"].row_blocks is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpt2_of_hugging_face_trains(variant):
    torch.manual_seed(0)
    model = gpt2()
    optimizer = build_optimizer(model, variant)
    planned = optimizer_table(model, optimizer)
    batch = torch.randint(50, (4, 16))
    losses = []
    for _ in range(12):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert optimizer_table(model, optimizer) == planned
    lines = {line.split()[0]: line for line in planned.splitlines()[1:]}
    assert set(lines) == {"qkv", "attn_out", "mlp_in", "mlp_out", "embedding", "vector", "total"}
    if variant.startswith("muonsn"):
        assert "3 blocks apart, stored (in, out)" in lines["qkv"]


# ---------------------------------------------------------------------- other architectures


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied):
    found = by_role(llama(tied))
    assert found["qkv"] == {f"model.layers.self_attn.{n}_proj" for n in "qkv"}
    assert found["attn_out"] == {"model.layers.self_attn.o_proj"}
    assert found["mlp_in"] == {"model.layers.mlp.gate_proj", "model.layers.mlp.up_proj"}
    assert found["mlp_out"] == {"model.layers.mlp.down_proj"}
    assert found["embedding"] == {"model.embed_tokens"} | (set() if tied else {"lm_head"})
    assert not any(placement.transposed for placement in roles(llama(tied)).values())


def test_qwen_has_biases_of_queries_keys_and_values():
    found = by_role(qwen())
    assert {f"model.layers.self_attn.{n}_proj.bias" for n in "qkv"} <= found["vector"]
    assert found["qkv"] == {f"model.layers.self_attn.{n}_proj" for n in "qkv"}


def test_phi_stacks_queries_keys_and_values_of_fewer_heads():
    config = transformers.Phi3Config(**SMALL, pad_token_id=0, eos_token_id=0, bos_token_id=0)
    found = roles(transformers.Phi3ForCausalLM(config))
    assert found["model.layers.0.self_attn.qkv_proj.weight"].row_blocks == (32, 16, 16)
    assert found["model.layers.0.mlp.gate_up_proj.weight"].row_blocks == (64, 64)
    assert found["model.layers.0.mlp.gate_up_proj.weight"].role == "mlp_in"


def test_torchs_own_transformer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    found = roles(nn.TransformerEncoder(layer, 2))
    assert found["layers.1.self_attn.in_proj_weight"].role == "qkv"
    assert found["layers.1.self_attn.in_proj_weight"].row_blocks == (32, 32, 32)
    assert found["layers.0.self_attn.out_proj.weight"].role == "attn_out"
    assert found["layers.0.linear1.weight"].role == "mlp_in"
    assert found["layers.0.linear2.weight"].role == "mlp_out"
    assert all(placement.known for placement in found.values())
    apart = roles(nn.MultiheadAttention(32, 4, kdim=16, vdim=8, add_bias_kv=True))
    assert {apart[f"{n}_proj_weight"].role for n in "qkv"} == {"qkv"}
    assert apart["bias_k"].role == apart["bias_v"].role == "vector"  # (1, 1, 32)


def test_a_stacked_projection_moves_as_three_of_its_own():
    """in_proj_weight of muonsn: each block in the direction that it has alone."""
    torch.manual_seed(0)
    attention, alone = nn.MultiheadAttention(32, 4), [nn.Linear(32, 32) for _ in range(3)]
    grad = torch.randn(96, 32) * torch.linspace(0.1, 2, 96).view(-1, 1)
    attention.in_proj_weight.grad = grad
    before = attention.in_proj_weight.detach().clone()
    build_optimizer(attention, "muonsn", weight_decay=0.0).step()
    moved = attention.in_proj_weight.detach() - before
    for layer, block, part in zip(alone, grad.split(32), moved.split(32)):
        layer.weight.grad, start = block.contiguous(), layer.weight.detach().clone()
        build_optimizer(layer, "muonsn", weight_decay=0.0).step()
        one = layer.weight.detach() - start
        assert torch.cosine_similarity(one.flatten(), part.flatten(), dim=0) > 0.9999


def test_convolutions_are_matrices_of_output_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 3, groups=4), nn.Conv1d(8, 4, 3))
    found = roles(model)
    assert [found[f"{i}.weight"].role for i in range(3)] == ["conv"] * 3
    assert [found[f"{i}.weight"].row_blocks for i in range(3)] == [None, (2, 2, 2, 2), None]
    matrix = nn.Linear(3 * 25, 8, bias=False)
    with torch.no_grad():
        matrix.weight.copy_(model[0].weight.flatten(1))
    model[0].weight.grad = torch.randn(8, 3, 5, 5)
    matrix.weight.grad = model[0].weight.grad.flatten(1).clone()
    for net in (model[0], matrix):
        build_optimizer(net, "muonsn", learning_rate=1e-2).step()
    assert torch.allclose(model[0].weight.flatten(1), matrix.weight, atol=1e-6)


def test_names_that_only_look_like_an_mlps():
    lenet = nn.ModuleDict({"fc1": nn.Linear(40, 30), "fc2": nn.Linear(30, 20)})
    assert {placement.role for placement in roles(lenet).values()} == {"linear", "vector"}
    mlp = nn.ModuleDict({"fc1": nn.Linear(40, 80), "fc2": nn.Linear(80, 40)})
    assert roles(mlp)["fc1.weight"].role == "mlp_in" and roles(mlp)["fc2.weight"].role == "mlp_out"


def test_output_heads_are_embeddings_whatever_their_name():
    classes = transformers.GPT2ForSequenceClassification(gpt2().config)
    assert roles(classes)["score.weight"].role == "embedding"
    shape = dict(num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    bert = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, tie_word_embeddings=False, **shape
    )
    found = by_role(transformers.BertForMaskedLM(bert))
    assert "cls.predictions.decoder" in found["embedding"]
    assert found["qkv"] == {
        f"bert.encoder.layer.attention.self.{n}" for n in ("query", "key", "value")
    }
    assert found["attn_out"] == {"bert.encoder.layer.attention.output.dense"}
    assert found["mlp_in"] == {"bert.encoder.layer.intermediate.dense"}
    assert found["mlp_out"] == {"bert.encoder.layer.output.dense"}


def test_queries_keys_and_values_that_lie_head_by_head_stay_one_matrix():
    config = transformers.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
    )
    found = roles(transformers.GPTNeoXForCausalLM(config))
    placement = found["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert placement.role == "qkv" and placement.row_blocks is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_moves_every_kind_of_weight(variant):
    torch.manual_seed(0)
    model = nn.ModuleList(
        [
            nn.TransformerEncoderLayer(32, 4, 64),
            nn.MultiheadAttention(32, 4, kdim=16, vdim=8, add_bias_kv=True),
            nn.Conv2d(3, 8, 5),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Bilinear(3, 4, 5),
        ]
    )
    optimizer = build_optimizer(model, variant)
    planned = optimizer_table(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p, q in zip(model.parameters(), before):
        assert p.isfinite().all() and (p != q).float().mean() > 0.9
    assert optimizer_table(model, optimizer) == planned


# ---------------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """A frozen layer and its low-rank adapter, named as peft names them."""

    def __init__(self, layer, rank=4):
        super().__init__()
        rows, columns = layer.weight.shape
        if isinstance(layer, transformers.pytorch_utils.Conv1D):
            rows, columns = columns, rows
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, rows, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_of_a_frozen_model(variant):
    torch.manual_seed(0)
    model = gpt2().requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = Adapted(block.attn.c_attn)
        block.mlp.c_fc = Adapted(block.mlp.c_fc)
    found = roles(model)
    assert len(found) == 8 and {placement.role for placement in found.values()} == {"lora"}
    name = "transformer.h.0.attn.c_attn.lora_{}.default.weight"
    assert found[name.format("A")].row_blocks is None
    assert found[name.format("B")].row_blocks == (32, 32, 32)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = build_optimizer(model, variant, learning_rate=1e-2)
    table = optimizer_table(model, optimizer)
    assert [line.split()[0] for line in table.splitlines()] in (
        ["role", "lora", "total"],
        ["role", "lora", "lora", "total"],  # with blocks and without
    )
    batch = torch.randint(50, (4, 16))
    losses = []
    for _ in range(12):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_the_layer_under_an_adapter_keeps_its_role():
    model = gpt2()
    block = model.transformer.h[0]
    block.attn.c_attn = Adapted(block.attn.c_attn)
    block.attn.c_attn.base_layer.requires_grad_(True)
    placement = roles(model)["transformer.h.0.attn.c_attn.base_layer.weight"]
    assert placement.role == "qkv" and placement.row_blocks == (32, 32, 32) and placement.transposed


# ---------------------------------------------------------------------- what no rule places


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixing_of_odd = nn.Parameter(torch.ones(6, 4))
        self.gain = nn.Parameter(torch.ones(1, 1, 5))
        self.layer = nn.Linear(4, 4)


def test_a_matrix_that_no_rule_places_is_an_embedding_and_said_so_once():
    model = Odd()
    found = roles(model)
    assert found["mixing_of_odd"].role == "embedding" and not found["mixing_of_odd"].known
    assert found["gain"].role == "vector"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        build_optimizer(model, "adam")  # which treats all alike
        assert not said
        optimizer = build_optimizer(model, "muonsn8")
        build_optimizer(model, "adamsn")
    assert len(said) == 1 and str(said[0].message).endswith(": mixing_of_odd")
    group = next(g for g in optimizer.param_groups if model.mixing_of_odd in set(g["params"]))
    assert group["name"] == "embedding" and not group["orthogonalize"]


def test_stacked_rows_are_said_by_the_layer_or_by_what_holds_it():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            self.row_blocks = (8, 12, 4)

    model = nn.ModuleList([Attention(), nn.Linear(8, 10)])
    model[1].row_blocks = (6, 4)
    found = roles(model)
    assert found["0.both.weight"].row_blocks == (8, 12, 4)
    assert found["0.out.weight"].row_blocks is None  # another number of rows
    assert found["1.weight"].row_blocks == (6, 4)
    assert found["0.both.weight"].role == found["1.weight"].role == "qkv"
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module"):  # torch.compile's, and another
        wrapped = nn.ModuleDict({wrapper: model})
        placements = [placement for _, _, placement in place_parameters(wrapped)]
        assert placements == list(found.values())
