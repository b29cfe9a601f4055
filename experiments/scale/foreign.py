"""train.py with an optimizer of others': the same data, model, loop, schedule and clipping.

    python -m experiments.scale.foreign torch_muon --learning_rate=2e-3 --embedding_lr=2e-3 ...

Flags are train.py's, and so are the groups: linear weights at learning_rate; embeddings and vectors
at embedding_lr, vectors without decay. Such a run cannot be resumed: start it again.
"""

import sys

import torch

import train
from experiments.optimizers.peers import state_bytes_of
from experiments.scale.muon_8bit import Muon8bit
from leangpt.optim.roles import LINEAR_ROLES, place_parameters
from leangpt.system.errors import UserError
from leangpt.system.runtime import run_script


class Several:
    """Optimizers of disjoint parameters as one, as far as a training loop asks."""

    def __init__(self, optimizers, tensor_rates=False):
        """tensor_rates: do they want learning rates as tensors, which compiled kernels read?"""
        self.optimizers, self.tensor_rates = optimizers, tensor_rates

    @property
    def param_groups(self):
        """Of all of them, in order."""
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self):
        """Of all of them: a dict parameter -> its state."""
        return {p: state for each in self.optimizers for p, state in each.state.items()}

    def step(self):
        """One update of every parameter."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates):
            group["lr"] = torch.tensor(rate) if self.tensor_rates else rate
        for optimizer in self.optimizers:
            optimizer.step()
        for group, rate in zip(self.param_groups, rates):
            group["lr"] = rate

    def zero_grad(self, set_to_none=True):
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        """A list of theirs."""
        return [optimizer.state_dict() for optimizer in self.optimizers]


def groups_of(settings, model):
    """(groups of linear weights, groups of the rest), each with name, lr and weight_decay."""
    if settings.learning_rate is None or settings.embedding_lr is None:
        raise UserError("give --learning_rate and --embedding_lr: these have no tuned ones here")
    linear, rest = [], []
    merged = {}
    for _, p, placement in place_parameters(model):
        kind = "linear" if placement.role in LINEAR_ROLES else placement.role
        merged.setdefault(kind, []).append(p)
    for kind, params in merged.items():
        rate = settings.learning_rate if kind == "linear" else settings.embedding_lr
        (linear if kind == "linear" else rest).append(
            {
                "name": kind,
                "params": params,
                "lr": rate,
                "initial_lr": rate,
                "weight_decay": 0.0 if kind == "vector" else settings.weight_decay,
            }
        )
    return linear, rest


def betas_of(settings):
    """AdamW's, as nanoGPT has them unless set."""
    return tuple(
        default if beta is None else beta
        for beta, default in ((settings.beta1, 0.9), (settings.beta2, 0.95))
    )


def adamw(groups, settings):
    """torch's, with its fused kernel."""
    return torch.optim.AdamW(groups, betas=betas_of(settings), fused=True)


def torch_muon(settings, model, runtime):
    """torch.optim.Muon on linear weights, its updates as large as AdamW's; AdamW for the rest."""
    linear, rest = groups_of(settings, model)
    return Several(
        [torch.optim.Muon(linear, adjust_lr_fn="match_rms_adamw"), adamw(rest, settings)]
    )


def muon_8bit(settings, model, runtime):
    """The same with Muon's momentum in 8 bits (2509.23106), and float32 AdamW for the rest."""
    linear, rest = groups_of(settings, model)
    return Several([Muon8bit(linear, adjust_lr_fn="match_rms_adamw"), adamw(rest, settings)])


def soap(settings, model, runtime):
    """SOAP (2409.11321) of the package pytorch_optimizer on linear weights; AdamW for the rest."""
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise UserError("soap needs pytorch_optimizer: pip install pytorch-optimizer") from error
    linear, rest = groups_of(settings, model)
    beta1 = 0.95 if settings.beta1 is None else settings.beta1  # its own default
    return Several([SOAP(linear, betas=(beta1, betas_of(settings)[1])), adamw(rest, settings)])


def _torchao(name, settings, model):
    try:
        from torchao import optim
    except ImportError as error:
        raise UserError(f"{name} needs the torchao package: pip install torchao") from error
    linear, rest = groups_of(settings, model)
    optimizer = getattr(optim, name)([*linear, *rest], betas=betas_of(settings))
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"])
    return Several([optimizer], tensor_rates=True)


def torchao_adamw8bit(settings, model, runtime):
    """torchao's AdamW8bit: both moments of matrices in 8 bits, blocks of 256."""
    return _torchao("AdamW8bit", settings, model)


def torchao_adamw4bit(settings, model, runtime):
    """torchao's AdamW4bit: both moments of matrices in 4 bits, blocks of 128."""
    return _torchao("AdamW4bit", settings, model)


FOREIGN = {
    function.__name__: function
    for function in (torch_muon, muon_8bit, soap, torchao_adamw8bit, torchao_adamw4bit)
}


def main():
    name, *flags = sys.argv[1:] or [""]
    if name not in FOREIGN:
        raise UserError(f"unknown optimizer {name!r}; choose from: {', '.join(FOREIGN)}")
    built = []

    def make_optimizer(settings, model, runtime):
        built.append(FOREIGN[name](settings, model, runtime))
        return built[0]

    print(f"optimizer of others: {name}", flush=True)
    train.main(flags, make_optimizer)
    print(f"state bytes {state_bytes_of(built[0].optimizers)}", flush=True)


if __name__ == "__main__":
    run_script(main)
