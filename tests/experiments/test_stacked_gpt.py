"""Stacked replicas must compute what the repository's GPT computes, each on its own."""

import pytest
import torch

from experiments.optimizers.stacked_gpt import StackedGPT, Step
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

CONFIG = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32)
SEEDS = (3, 4, 5)


def draw(config, B=2):
    generator = torch.Generator().manual_seed(0)
    shape = (len(SEEDS), B, config.block_size + 1)
    text = torch.randint(config.vocab_size, shape, generator=generator)
    return text[..., :-1], text[..., 1:]


@pytest.mark.parametrize("vocab_size", [65, 600])  # the embedding as a product, and as a lookup
def test_losses_and_gradients_equal_the_model(vocab_size):
    config = GPTConfig(**{**CONFIG, "vocab_size": vocab_size})
    stack = StackedGPT(config, SEEDS)
    idx, targets = draw(config)
    losses = stack.backward(stack.losses(idx, targets), clip=0)
    for i, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        model = GPT(config)
        _, loss = model(idx[i], targets[i])
        loss.backward()
        assert abs(loss.item() - losses[i].item()) < 1e-5
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stack.weights[name][i], parameter, rtol=0, atol=0)
            torch.testing.assert_close(
                stack.weights[name].grad[i], parameter.grad, rtol=1e-4, atol=1e-6
            )


def test_clipping_is_each_replicas_own():
    config = GPTConfig(**CONFIG)
    stack = StackedGPT(config, SEEDS)
    with torch.no_grad():  # a steep replica beside two flat ones
        stack.weights["transformer.wte.weight"][1].mul_(30)
    idx, targets = draw(config)
    stack.backward(stack.losses(idx, targets), clip=0)
    for replica in stack.replicas:
        torch.nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
    expected = {name: weight.grad.clone() for name, weight in stack.weights.items()}
    stack.backward(stack.losses(idx, targets), clip=1.0)
    for name, weight in stack.weights.items():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-5, atol=1e-8)


def test_replicas_are_views():
    """A step on one replica's parameters moves its row of the stack and no other."""
    config = GPTConfig(**CONFIG)
    stack = StackedGPT(config, SEEDS)
    idx, targets = draw(config)
    stack.backward(stack.losses(idx, targets))
    before = {name: weight.detach().clone() for name, weight in stack.weights.items()}
    replica = stack.replicas[1]
    assert replica.lm_head.weight is replica.transformer.wte.weight
    torch.optim.SGD(replica.parameters(), lr=0.1).step()
    for name, weight in stack.weights.items():
        moved = (weight != before[name]).flatten(1).any(1)
        assert moved.tolist() == [False, True, False], name
    torch.testing.assert_close(
        replica(idx[1], targets[1])[1], stack.losses(idx, targets)[1], rtol=1e-5, atol=1e-6
    )


def test_late_clipping_is_by_the_norm_of_the_step_before():
    config = GPTConfig(**CONFIG)
    stack = StackedGPT(config, SEEDS)
    tokens = torch.randint(config.vocab_size, (200,))
    plain = Step(stack, tokens, batch_size=2, block_size=16, clip=0)
    late = Step(stack, tokens, batch_size=2, block_size=16, clip=1e-2, late=True)
    before = None
    for start in (0, 50, 100):
        offsets = start + torch.arange(6).view(3, 2)
        plain(offsets)
        grads = {name: weight.grad.clone() for name, weight in stack.weights.items()}
        late(offsets)
        for name, weight in stack.weights.items():
            scale = 1.0 if before is None else (1e-2 / before).view(-1, *[1] * (weight.dim() - 1))
            torch.testing.assert_close(weight.grad, grads[name] * scale, rtol=1e-3, atol=1e-8)
        before = sum(grad.flatten(1).square().sum(1) for grad in grads.values()).sqrt()


def test_slices_share_memory_and_gradients():
    config = GPTConfig(**CONFIG)
    stack = StackedGPT(config, SEEDS)
    views = stack.slices(1, 3)
    idx, targets = draw(config)
    stack.backward(stack.losses(idx, targets))
    torch.optim.SGD(views.values(), lr=0.1).step()
    for name, weight in stack.weights.items():
        assert views[name].data_ptr() == weight[1].data_ptr()
        torch.testing.assert_close(views[name].grad, weight.grad[1:3])


def test_step_reads_the_windows_it_is_told():
    config = GPTConfig(**CONFIG)
    stack = StackedGPT(config, SEEDS)
    tokens = torch.randint(config.vocab_size, (200,))
    offsets = torch.tensor([[0, 7], [100, 3], [150, 183]])
    losses = Step(stack, tokens, batch_size=2, block_size=16)(offsets)
    for i, replica in enumerate(stack.replicas):
        idx = torch.stack([tokens[o : o + 16] for o in offsets[i].tolist()])
        targets = torch.stack([tokens[o + 1 : o + 17] for o in offsets[i].tolist()])
        assert abs(replica(idx, targets)[1].item() - losses[i].item()) < 1e-5


def test_dropout_is_off_in_evaluation_and_on_in_training():
    config = GPTConfig(**CONFIG, dropout=0.5)
    stack = StackedGPT(config, SEEDS)
    idx, targets = draw(config)
    assert not torch.equal(stack.losses(idx, targets), stack.losses(idx, targets))
    stack.training = False
    torch.testing.assert_close(stack.losses(idx, targets), stack.losses(idx, targets))


def test_other_architectures_are_refused():
    for other in (dict(norm="rmsnorm"), dict(attention_dropout=0.5)):
        with pytest.raises(UserError, match="nanoGPT's architecture only"):
            StackedGPT(GPTConfig(**CONFIG | other), SEEDS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_recorded_step_equals_the_eager_one():
    config = GPTConfig(**CONFIG)
    stack = StackedGPT(config, SEEDS, "cuda")
    tokens = torch.randint(config.vocab_size, (200,), device="cuda")
    eager, recorded = (Step(stack, tokens, 2, 16, graph=graph) for graph in (False, True))
    for start in (0, 50, 100):
        offsets = start + torch.arange(6).view(3, 2)
        losses = eager(offsets).clone()
        grads = {name: weight.grad.clone() for name, weight in stack.weights.items()}
        torch.testing.assert_close(recorded(offsets), losses, rtol=1e-5, atol=1e-6)
        for name, weight in stack.weights.items():
            torch.testing.assert_close(weight.grad, grads[name], rtol=1e-4, atol=1e-6)
