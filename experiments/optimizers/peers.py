"""Optimizers by others, each applied as its authors recommend: the field that is compared with.

Every function takes a cohort of stacked replicas (many_runs.py), the two learning rates and the
setup, and returns optimizers. Linear weights get `learning_rate`, embeddings, head and norm gains
`embedding_lr`; weight decay falls on matrices, as in nanoGPT. A missing package raises
ImportError, which the caller turns into a note.

Optimizers that treat elements, or blocks of consecutive elements, alone get the stacked tensors
themselves, which changes nothing but the number of kernels; the others get each replica's.
"""

import torch
import torch.nn as nn


def role(name):
    """linear | embedding | vector, from a parameter's name in GPT."""
    if name.endswith(("wte.weight", "wpe.weight")):
        return "embedding"
    return "linear" if ".c_" in name else "vector"


def groups(named, learning_rate, embedding_lr, weight_decay, roles=None, **linear_options):
    """Parameter groups by role; linear_options are added to the linear group alone."""
    settings = {
        "linear": (learning_rate, weight_decay),
        "embedding": (embedding_lr, weight_decay),
        "vector": (embedding_lr, 0.0),
    }
    result = []
    for kind in roles or settings:
        params = [parameter for name, parameter in named if role(name) == kind]
        rate, decay = settings[kind]
        options = linear_options if kind == "linear" else {}
        result.append(dict(params=params, lr=rate, initial_lr=rate, weight_decay=decay, **options))
    return result


def _arguments(run, setup):
    return run.learning_rate, run.embedding_lr, setup.weight_decay


def _adamw(named, run, setup, roles=None):
    """torch's fused AdamW on some roles."""
    return torch.optim.AdamW(
        groups(named, *_arguments(run, setup), roles=roles), betas=setup.betas, fused=True
    )


def torch_adamw(run, cohort, setup):
    """AdamW (1711.05101), fused."""
    return [_adamw(cohort.slices.items(), run, setup)]


def torch_nadam(run, cohort, setup):
    """NAdam (Dozat 2016) with decoupled decay: AdamW that looks a step ahead."""
    return [
        torch.optim.NAdam(
            groups(cohort.slices.items(), *_arguments(run, setup)),
            betas=setup.betas,
            decoupled_weight_decay=True,
        )
    ]


def torch_muon(run, cohort, setup):
    """torch.optim.Muon on linear weights, rates matched to AdamW's; AdamW for the rest."""
    linear = groups(cohort.module.named_parameters(), *_arguments(run, setup), roles=["linear"])
    return [
        torch.optim.Muon(linear, adjust_lr_fn="match_rms_adamw"),
        _adamw(cohort.slices.items(), run, setup, ["embedding", "vector"]),
    ]


def torch_adafactor(run, cohort, setup):
    """torch.optim.Adafactor; its rates are relative to each weight's RMS."""
    named = list(cohort.module.named_parameters())
    return [torch.optim.Adafactor(groups(named, *_arguments(run, setup)), foreach=True)]


def _torchao(name, run, cohort, setup):
    from torchao import optim

    # torchao quantises tensors of whole blocks and >= 4096 elements. Blocks of the stack are
    # blocks of the replicas then; what it leaves in float32 is plain AdamW.
    block = {"AdamW8bit": 256, "AdamW4bit": 128}[name]
    numel = {key: cohort.stack.weights[key][0].numel() for key in cohort.slices}
    small = {key for key, n in numel.items() if n < 4096 or n % block}
    slices = cohort.slices
    large = groups(
        [item for item in slices.items() if item[0] not in small], *_arguments(run, setup)
    )
    rest = [item for item in slices.items() if item[0] in small]
    large = [group for group in large if group["params"]]
    optimizers = [getattr(optim, name)(large, betas=setup.betas)] if large else []
    return [*optimizers, _adamw(rest, run, setup)]


def torchao_adamw8bit(run, cohort, setup):
    """torchao AdamW8bit: both moments in 8 bits, blocks of 256."""
    return _torchao("AdamW8bit", run, cohort, setup)


def torchao_adamw4bit(run, cohort, setup):
    """torchao AdamW4bit: both moments in 4 bits, blocks of 128."""
    return _torchao("AdamW4bit", run, cohort, setup)


def bitsandbytes_adamw8bit(run, cohort, setup):
    """bitsandbytes AdamW8bit (2110.02861): both moments in 8 bits, blocks of 256."""
    import bitsandbytes

    slices = cohort.slices
    whole = {key for key in slices if cohort.stack.weights[key][0].numel() % 256 == 0}
    named = [item for item in slices.items() if item[0] in whole and role(item[0]) != "vector"]
    named += [
        (key, parameter)
        for key, parameter in cohort.module.named_parameters()
        if key.partition(".")[2] not in whole
    ]  # "0.transformer..." -> "transformer..."
    large = groups(named, *_arguments(run, setup), roles=["linear", "embedding"])
    return [
        bitsandbytes.optim.AdamW8bit(large, betas=setup.betas),
        _adamw(slices.items(), run, setup, ["vector"]),
    ]  # below 4096 elements: float32


def galore_adamw(run, cohort, setup):
    """GaLore (2403.03507): Adam in a subspace of rank C/4, refreshed every 200 steps."""
    from galore_torch.adamw import AdamW

    rank = setup.model["n_embd"] // 4
    linear = groups(
        cohort.module.named_parameters(),
        *_arguments(run, setup),
        roles=["linear"],
        rank=rank,
        update_proj_gap=200,
        scale=0.25,
        proj_type="std",
    )
    return [
        AdamW(linear, betas=setup.betas, no_deprecation_warning=True),
        _adamw(cohort.slices.items(), run, setup, ["embedding", "vector"]),
    ]


def _apollo(run, cohort, setup, **options):
    from apollo_torch.apollo import AdamW

    linear = groups(
        cohort.module.named_parameters(),
        *_arguments(run, setup),
        roles=["linear"],
        update_proj_gap=200,
        proj="random",
        proj_type="std",
        **options,
    )
    return [
        AdamW(linear, betas=setup.betas),
        _adamw(cohort.slices.items(), run, setup, ["embedding", "vector"]),
    ]


def apollo_adamw(run, cohort, setup):
    """APOLLO (2412.05270): channel-wise scaling from random projections of rank C/4."""
    rank = setup.model["n_embd"] // 4
    return _apollo(run, cohort, setup, rank=rank, scale=1, scale_type="channel")


def apollo_mini(run, cohort, setup):
    """APOLLO-Mini: tensor-wise scaling from a random projection of rank 1."""
    return _apollo(run, cohort, setup, rank=1, scale=128, scale_type="tensor")


def adam_mini(run, cohort, setup):
    """Adam-mini (2406.16793): one second moment a head of q and k, a row of the rest."""
    from adam_mini import Adam_mini

    optimizers = []
    C, H = setup.model["n_embd"], setup.model["n_head"]
    for kind, rate in (("linear", run.learning_rate), ("rest", run.embedding_lr)):
        named = [
            item
            for name, parameter in cohort.module.named_parameters()
            if (role(name) == "linear") == (kind == "linear")
            for item in _adam_mini_names(name, parameter, C)
        ]
        optimizer = Adam_mini(
            named,
            lr=rate,
            betas=setup.betas,
            verbose=False,
            weight_decay=setup.weight_decay,
            dim=C,
            n_heads=H,
        )
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        optimizers.append(optimizer)
    return optimizers


def _adam_mini_names(name, parameter, C):
    """Adam-mini partitions by name: q, k and v apart, every other matrix by rows."""
    if not name.endswith("attn.c_attn.weight"):
        name = name.replace("attn.c_proj", "attn.wo").replace("wpe", "wpe.embed")
        return [(name, parameter)]
    parts = []
    for i, label in enumerate(("wq", "wk", "wv")):
        part = nn.Parameter(parameter.detach()[i * C : (i + 1) * C])
        part.grad = parameter.grad[i * C : (i + 1) * C]
        parts.append((name.replace("c_attn", label), part))
    return parts


def pytorch_optimizer_adamwsn(run, cohort, setup):
    """pytorch-optimizer's AdamWSN (2411.07120), sums over subsets of sqrt(numel) elements."""
    from pytorch_optimizer import AdamWSN

    named = list(cohort.module.named_parameters())
    linear = groups(named, *_arguments(run, setup), roles=["linear"], sn=True)
    rest = groups(named, *_arguments(run, setup), roles=["embedding", "vector"])
    rest = [{**group, "sn": False} for group in rest]
    return [AdamWSN([*linear, *rest], betas=setup.betas)]


PEERS = {
    function.__name__: function
    for function in (
        torch_adamw,
        torch_nadam,
        torch_muon,
        torch_adafactor,
        torchao_adamw8bit,
        torchao_adamw4bit,
        bitsandbytes_adamw8bit,
        galore_adamw,
        apollo_adamw,
        apollo_mini,
        adam_mini,
        pytorch_optimizer_adamwsn,
    )
}


def state_bytes_of(optimizers):
    """Bytes of every tensor reachable from the optimizers' state, subclasses and projectors too."""
    seen = {}

    def visit(thing):
        if isinstance(thing, torch.Tensor):
            if hasattr(thing, "__tensor_flatten__"):  # a subclass wrapping plain tensors
                for name in thing.__tensor_flatten__()[0]:
                    visit(getattr(thing, name))
            else:
                storage = thing.untyped_storage()
                seen[storage.data_ptr(), str(thing.device)] = storage.nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            visit(vars(thing))

    for optimizer in optimizers:
        for state in optimizer.state.values():
            visit(state)
    return sum(seen.values())
