"""build_optimizer: roles, groups, names, rates, errors; and the accounting of bytes."""

import pytest
import torch
from torch import nn

from leangpt.optim import VARIANTS, Adafactor, AdamSN, build_optimizer, optimizer_table, state_bytes
from leangpt.optim.rates import choose_rates
from leangpt.system.errors import UserError
from model import GPT, GPTConfig


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(16, 32)  # 4 query heads, 2 key/value heads of 4
        self.row_blocks = (16, 8, 8)  # of c_attn
        self.c_proj = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.c_attn(x).split((16, 8, 8), dim=-1)
        return self.c_proj(q * torch.cat([k, v], -1))


class Net(nn.Module):
    """The parts of a GPT that a name or type gives away, and a convolution."""

    def __init__(self, tied=True):
        super().__init__()
        self.wte = nn.Embedding(11, 16)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.ln = nn.LayerNorm(16)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.lm_head = nn.Linear(16, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, idx):
        x = self.wte(idx)
        x = x + self.attn(self.ln(x))
        x = x + self.conv(x.flatten(0, 1).unsqueeze(1)).view(x.shape) + self.mlp(x)
        return self.lm_head(x)


def step(net, optimizer, seed=0):
    idx = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(net(idx).flatten(0, 1).float(), idx.roll(1, 1).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_trains_and_is_accounted_for(variant, dtype):
    torch.manual_seed(0)
    net = Net().to(dtype)
    optimizer = build_optimizer(net, variant)
    planned = optimizer_table(net, optimizer)
    losses = [step(net, optimizer) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer_table(net, optimizer) == planned  # the plan is what came to be
    total = next(line for line in planned.splitlines() if line.startswith("total"))
    assert int(total.split()[3].replace(",", "")) == state_bytes(optimizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_parameter_is_in_one_group_with_its_role(tied, variant):
    net = Net(tied)
    optimizer = build_optimizer(net, variant, learning_rate=1e-2, embedding_lr=3e-2)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(set(held)) == len(held) == len([p for p in net.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        assert group["initial_lr"] == group["lr"]
        for p in group["params"]:
            linear = any(
                p is q
                for q in (
                    net.attn.c_attn.weight,
                    net.attn.c_proj.weight,
                    net.mlp[0].weight,
                    net.mlp[2].weight,
                    net.conv.weight,
                )
            )
            assert group["lr"] == (1e-2 if linear else 3e-2)
            assert group["weight_decay"] == (0.0 if p.ndim < 2 else 0.1)
            if linear:
                assert group["name"] in ("linear", "qkv")
            else:
                assert group["name"] == ("vector" if p.ndim < 2 else "embedding")


def test_partition_by_role():
    net = Net()
    roles = {"qkv": "larger", "attn_out": "element", "linear": 8}
    optimizer = build_optimizer(net, "adamsn", partition=roles, embedding_partition="row")
    step(net, optimizer)
    sizes = {
        net.attn.c_attn.weight: 4 * 16,  # rows (16, 8, 8) are four blocks of eight
        net.attn.c_proj.weight: 256,
        net.mlp[0].weight: 128,
        net.mlp[2].weight: 128,
        net.wte.weight: 11,
    }
    for p, size in sizes.items():
        assert optimizer.state[p]["second_moment"].numel() == size
    names = {group["name"] for group in optimizer.param_groups}
    assert names == {"qkv", "attn_out", "linear", "embedding", "vector"}


def test_role_rates_multiply_the_rate_of_linear_weights():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))

    def rates(variant, **options):
        optimizer = build_optimizer(
            model, variant, learning_rate=1e-2, embedding_lr=1e-2, **options
        )
        held = {p: group for group in optimizer.param_groups for p in group["params"]}
        block = model.transformer.h[1]
        assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)
        return [
            held[m.weight]["lr"]
            for m in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        ]

    assert rates("adam") == rates("adamsn", role_rates={}) == [1e-2] * 4
    for variant in ("adamsn", "adamsn8", "adafactor"):
        assert rates(variant) == pytest.approx([1e-2, 1e-2, 2e-2, 1.25e-3])
    llama = nn.ModuleDict(
        {"q_proj": nn.Linear(8, 8), "gate_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)}
    )
    groups = build_optimizer(llama, "adamsn", 1e-2, embedding_lr=1e-2).param_groups
    assert {g["name"]: g["lr"] for g in groups if g["name"] != "vector"} == pytest.approx(
        {"qkv": 1e-2, "mlp_in": 2e-2, "mlp_out": 1.25e-3}
    )
    assert rates("adam", role_rates={"qkv": 3}) == pytest.approx([3e-2, 1e-2, 1e-2, 1e-2])
    for wrong, message in (
        ({"mlp": 2}, "no role 'mlp'"),
        (2, "must be a dict"),
        ({"qkv": 0}, "must be a positive"),
    ):
        with pytest.raises(UserError, match=message):
            rates("adam", role_rates=wrong)


def test_linear_weights_alone_have_the_quasi_hyperbolic_momentum():
    net = Net()
    for variant in ("adamsn", "adamsn8"):
        optimizer = build_optimizer(net, variant, betas=(0.97, 0.99))
        found = {g["name"]: (g["betas"], g["nu1"]) for g in optimizer.param_groups}
        assert found["vector"] == found["embedding"] == ((0.9, 0.99), 1.0)
        assert found["linear"] == ((0.97, 0.99), 0.8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rates_default_to_the_tuned_ones(variant):
    net, recipe = Net(), VARIANTS[variant]
    rates = {g["name"]: g["lr"] for g in build_optimizer(net, variant).param_groups}
    assert rates["linear"] == recipe.learning_rate
    assert rates["vector"] == recipe.embedding_lr


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rate_given_for_all_is_for_all(variant):
    """Whatever their role: fine-tuning at 3e-5 is at 3e-5."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=11))
    for options in ({}, {"role_rates": {}}):
        groups = build_optimizer(model, variant, learning_rate=3e-5, **options).param_groups
        assert {group["lr"] for group in groups} == {3e-5}
    by_role = {"mlp_in": 2.0}
    groups = build_optimizer(model, variant, learning_rate=3e-5, role_rates=by_role).param_groups
    assert {group["lr"] for group in groups} == {3e-5, 6e-5}  # as asked for


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_rates_follow_the_width(variant):
    """Adam's kind divides the rate of linear weights, Muon's that of embeddings."""
    recipe = VARIANTS[variant]
    model = GPT(GPTConfig(n_layer=1, n_head=4, n_embd=512, block_size=8, vocab_size=11))
    groups = {g["name"]: g["lr"] for g in build_optimizer(model, variant).param_groups}
    muon = variant.startswith("muon")
    linear = groups.get("linear", groups.get("qkv"))
    assert linear == pytest.approx(recipe.learning_rate / (1 if muon else 4))
    halved = muon or variant == "adamsn"
    assert groups["embedding"] == pytest.approx(recipe.embedding_lr / (4 if halved else 1))


def test_the_origin_of_rates_is_said():
    variant = VARIANTS["adamsn8"]
    assert choose_rates(variant, 128).origin == "tuned in a model 128 wide"
    assert choose_rates(variant, 512).origin.endswith("; linear weights by 128/512")
    assert choose_rates(variant, 64) == choose_rates(variant, 128)  # nothing is scaled up
    words = choose_rates(variant, 512, learning_rate=3e-5).origin
    assert words.startswith("as set, for all; its own: 0.001 / 0.008, tuned")


def test_muonsn_without_momentum_stores_none():
    net = Net()
    optimizer = build_optimizer(net, "muonsn0", betas=(0.9, 0.95))
    step(net, optimizer)
    assert all("momentum" not in state for state in optimizer.state.values())


def test_adafactor_treats_embeddings_apart():
    """Momentum and a whole second moment for what is no linear weight: as groups of one's own."""
    options = dict(beta2=0.95, decay=1.0, momentum_bits=16)
    built, plain = Net(), Net()
    plain.load_state_dict(built.state_dict())
    linear = {id(m.weight) for m in plain.modules() if isinstance(m, nn.Linear | nn.Conv1d)}
    linear.discard(id(plain.wte.weight))
    rest = [p for p in plain.parameters() if p.requires_grad and id(p) not in linear]
    matrices = [p for p in plain.parameters() if p.requires_grad and id(p) in linear]
    apart = dict(momentum=0.9, factored=False, lr=2e-2)
    reference = Adafactor(
        [
            dict(params=matrices, weight_decay=0.1),
            apart | dict(params=rest[:1], weight_decay=0.1),
            apart | dict(params=rest[1:]),
        ],
        lr=1e-2,
        **options,
    )
    assert [p.ndim for p in rest] == [2] + [1] * 7
    optimizer = build_optimizer(
        built,
        "adafactor",
        1e-2,
        0.1,
        (0.9, options.pop("beta2")),
        2e-2,
        embedding_momentum=0.9,
        embedding_factored=False,
        **options,
    )
    for net, owner in ((built, optimizer), (plain, reference)):
        for seed in range(3):
            step(net, owner, seed)
    for (name, p), q in zip(built.named_parameters(), plain.parameters()):
        assert torch.equal(p, q), name
    for p in matrices:
        assert set(reference.state[p]) == {"step", "row_mean_square", "column_mean_square"}
    table = optimizer.state[built.wte.weight]
    assert set(table) == {"step", "mean_square", "momentum"}
    assert table["mean_square"].shape == table["momentum"].shape == built.wte.weight.shape
    assert state_bytes(optimizer) == state_bytes(reference)


def test_states_from_before_adafactor_could_leave_matrices_whole_still_load():
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    optimizer = Adafactor([p])
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["factored"]
    other = Adafactor([nn.Parameter(torch.ones(4, 4))])
    other.load_state_dict(saved)
    assert other.param_groups[0]["factored"] is True


@pytest.mark.parametrize(
    "variant, options, words",
    [
        ("adamns", {}, "did you mean 'adamsn'"),
        ("sgd", {}, "one of adam"),
        ("adamsn", dict(learning_rate=0.0), "learning_rate must be positive"),
        ("adamsn", dict(embedding_lr=-1.0), "embedding_lr must be positive"),
        ("adamsn", dict(momentum_bit=8), "did you mean 'momentum_bits'"),
        ("adamsn", dict(partition="rows"), "partition must be one of"),
        ("adamsn", dict(betas=(0.9,)), "betas must be two numbers"),
        ("adamsn", dict(partition={"attention": "row"}), "no role 'attention'"),
        ("muonsn", dict(partition="row"), "no partition"),
        ("adafactor", dict(norm="sum"), "no option 'norm'"),
        ("adamsn", dict(embedding_momentum=0.9), "no option 'embedding_momentum'"),
        ("adafactor", dict(embedding_momentum=1.5), "betas"),
        ("adafactor", dict(embedding_moment=0.9), "did you mean 'embedding_momentum'"),
        ("adam", dict(partition="row"), "no partition"),
        ("adam", dict(momentum_bits=8), "no option 'momentum_bits'"),
        ("adam", dict(betas=(0.9, 1.0)), "beta"),
        ("muonsn", dict(betas=(0.9, 1.5)), "betas"),
        ("adafactor", dict(betas=(0.9, 1.5)), "betas"),
    ],
)
def test_bad_input_is_one_clear_line(variant, options, words):
    with pytest.raises(UserError, match=words) as caught:
        build_optimizer(Net(), variant, **options)
    assert "\n" not in str(caught.value)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(UserError, match="no trainable parameters"):
        build_optimizer(nn.ReLU(), "adamsn")


def test_new_groups_are_checked_too():
    optimizer = AdamSN([nn.Parameter(torch.ones(2))])
    with pytest.raises(UserError, match="partition"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], partition="rows"))
    assert len(optimizer.param_groups) == 1


def test_a_clip_that_nobody_would_apply_is_refused():
    with pytest.raises(UserError, match="grad_clip is for gradients that backward frees"):
        build_optimizer(torch.nn.Linear(4, 4), "adamsn", grad_clip=1.0)
