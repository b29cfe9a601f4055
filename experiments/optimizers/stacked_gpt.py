"""Many independent GPTs in one forward: every weight gets a leading replica dimension M.

A GPT of 0.8M parameters leaves a GPU idle, so a learning-rate grid costs as much as its longest
run times its size. Here M replicas share each kernel: a linear layer is one batched matrix
product, attention sees M B sequences. Replicas never mix: replica i's loss depends on weights[i]
alone, so the gradient of the summed losses is every replica's own gradient.

Each replica is also a real `GPT` whose parameters are views of the stack and whose gradients are
views of the stack's gradients. Optimizers are built on those, exactly as a user builds them.

Shapes: M replicas, B batch, T tokens, N = B T, C n_embd, H n_head, D head dim, V vocab.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from leangpt.system.errors import UserError
from model import GPT

ONE_HOT_VOCAB = 512  # up to here the embedding is a matrix product, whose gradient needs no atomics


class StackedGPT:
    """M replicas of GPT(config), replica i initialised as `torch.manual_seed(seeds[i])` does.

    weights: name -> (M, ...) leaf of `dtype` with its gradient allocated.
    replicas: the M GPTs viewing them.
    Raises UserError for what the stacked forward does not implement.
    """

    def __init__(self, config, seeds, device="cpu", dtype=torch.float32):
        plain = (
            config.position == "learned"
            and config.norm == "layernorm"
            and not config.bias
            and config.mlp == "gelu"
            and config.kv_heads == config.n_head
            and config.tie_embeddings
            and config.attention_dropout in (None, config.dropout)
        )
        if not plain:
            raise UserError(
                "StackedGPT knows nanoGPT's architecture only: learned positions, "
                "layernorm without bias, gelu, one key/value head a head, tied head, "
                "one dropout rate"
            )
        self.config = config
        self.training = True
        self.replicas = []
        for seed in seeds:
            torch.manual_seed(seed)
            self.replicas.append(GPT(config))
        states = [dict(replica.named_parameters()) for replica in self.replicas]
        self.weights = {}
        for name in states[0]:
            stack = torch.stack([state[name].detach() for state in states]).to(device, dtype)
            self.weights[name] = stack.requires_grad_()
            stack.grad = torch.zeros_like(stack)
        for i, replica in enumerate(self.replicas):
            self._view(replica, i)

    def _view(self, replica, i):
        """Turn the parameters of `replica` into views of weights[i], tied ones into one view."""
        views = {}
        for name, parameter in list(replica.named_parameters(remove_duplicate=False)):
            if parameter not in views:
                views[parameter] = nn.Parameter(self.weights[name].detach()[i])
                views[parameter].grad = self.weights[name].grad[i]
            owner, _, leaf = name.rpartition(".")
            setattr(replica.get_submodule(owner), leaf, views[parameter])

    def slices(self, start, stop):
        """name -> Parameter (stop-start, ...): the same rows of every weight, gradients too.

        For optimizers that treat each element alone, for which M tensors or one are the same.
        """
        views = {}
        for name, weight in self.weights.items():
            views[name] = nn.Parameter(weight.detach()[start:stop])
            views[name].grad = weight.grad[start:stop]
        return views

    def losses(self, idx, targets):
        """Mean cross-entropy of every replica: idx, targets (M, B, T) int64 -> (M,) float32."""
        M, B, T = idx.shape
        L, p = self.config.n_layer, self.config.dropout if self.training else 0.0
        x = self._embed(idx)  # (M, N, C)
        for i in range(L):
            block = f"transformer.h.{i}."
            y = self._attention(self._norm(x, block + "ln_1"), block + "attn.", B, T, p)
            x = x + F.dropout(y, p)
            y = F.gelu(self._linear(self._norm(x, block + "ln_2"), block + "mlp.c_fc"))
            x = x + F.dropout(self._linear(y, block + "mlp.c_proj"), p)
        logits = self._linear(self._norm(x, "transformer.ln_f"), "transformer.wte")  # (M, N, V)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses.view(M, -1).mean(1)

    def backward(self, losses, clip=1.0, before=None):
        """Fill every weight's .grad, each replica's clipped to the norm `clip` (0: unclipped).

        losses: (M,) from `losses()`; returned detached. before (M,): the norms of the step before,
        to clip by those as updates inside backward do; this step's take their place.
        Nothing here waits for the device.
        """
        weights = list(self.weights.values())
        grads = torch.autograd.grad(losses.sum(), weights)
        scale = torch.ones_like(losses)
        if clip:  # as torch.nn.utils.clip_grad_norm_ does, for each replica
            squares = torch.stack([g.flatten(1).float().square().sum(1) for g in grads])  # (n, M)
            norms = squares.sum(0).sqrt()
            scale = (clip / ((norms if before is None else before) + 1e-6)).clamp(max=1.0)
            if before is not None:
                before.copy_(norms)
        for weight, grad in zip(weights, grads):
            torch.mul(grad, scale.view(-1, *[1] * (grad.dim() - 1)), out=weight.grad)
        return losses.detach()

    def _embed(self, idx):
        M, B, T = idx.shape
        wte, wpe = self.weights["transformer.wte.weight"], self.weights["transformer.wpe.weight"]
        V, C = wte.shape[1:]
        if V <= ONE_HOT_VOCAB:
            hot = idx.reshape(M, B * T, 1) == torch.arange(V, device=idx.device)
            x = torch.bmm(hot.to(wte.dtype), wte).view(M, B, T, C)
        else:
            first_row = torch.arange(0, M * V, V, device=idx.device).view(M, 1, 1)
            x = F.embedding(idx + first_row, wte.flatten(0, 1))
        x = x.float() + wpe[:, None, :T]
        autocast = torch.is_autocast_enabled(x.device.type)  # the model's own choice: GPT.embed
        x = x.to(torch.get_autocast_dtype(x.device.type) if autocast else wte.dtype)
        return F.dropout(x.view(M, B * T, C), self.config.dropout if self.training else 0.0)

    def _norm(self, x, name):  # (M, N, C) -> (M, N, C)
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps)
        return x * self.weights[name + ".weight"][:, None]

    def _linear(self, x, name):  # (M, N, in) -> (M, N, out)
        return torch.bmm(x, self.weights[name + ".weight"].transpose(1, 2))

    def _attention(self, x, name, B, T, p):
        M, _, C = x.shape
        H = self.config.n_head
        qkv = self._linear(x, name + "c_attn").view(M * B, T, 3, H, C // H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of (M B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self._linear(y.transpose(1, 2).reshape(M, B * T, C), name + "c_proj")


class Step:
    """One forward and backward of all replicas on windows of a token stream, replayed if it can be.

    tokens: (n,) int64 on the device. `step(offsets)` with offsets (M, B) int64 leaves gradients in
    the stack and returns the losses (M,), valid until the next call. With graph=True (CUDA) the
    whole step is recorded once and replayed, so that its hundreds of kernels cost one launch;
    compile=True fuses its element-wise parts first, which pays for larger models. late=True clips
    by the norm of the step before.
    """

    def __init__(
        self,
        stack,
        tokens,
        batch_size,
        block_size,
        clip=1.0,
        dtype=torch.float32,
        graph=False,
        compile=False,
        late=False,
    ):
        self.stack, self.tokens, self.clip, self.dtype = stack, tokens, clip, dtype
        self.losses_of = torch.compile(stack.losses, dynamic=False) if compile else stack.losses
        self.window = torch.arange(block_size + 1, device=tokens.device)
        self.offsets = torch.zeros(
            len(stack.replicas), batch_size, dtype=torch.int64, device=tokens.device
        )
        self.norms = torch.zeros(len(stack.replicas), device=tokens.device) if late else None
        self.graph = self._record() if graph else None
        if late:
            self.norms.zero_()  # what recording left: the first step is not clipped

    def __call__(self, offsets):
        self.offsets.copy_(offsets, non_blocking=True)
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.losses

    def _run(self):
        text = self.tokens[self.offsets[..., None] + self.window]  # (M, B, T + 1)
        with torch.autocast(
            self.tokens.device.type,
            dtype=torch.bfloat16,
            enabled=self.dtype == torch.bfloat16,
            cache_enabled=False,
        ):
            losses = self.losses_of(text[..., :-1], text[..., 1:])
        return self.stack.backward(losses, self.clip, self.norms)

    def _record(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose kernels and take workspaces first
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.losses = self._run()
        return graph
