"""What a run says of itself before it starts."""

from leangpt.attention.tile_sizes import tile_sizes
from leangpt.memory.meter import tensor_bytes
from leangpt.optim import frees_gradients, optimizer_table, planned_bytes, updates_inside_backward
from leangpt.text.dataset import describe
from leangpt.training.batches import share_of


def startup_summary(
    settings,
    dataset,
    model,
    optimizer,
    rates,
    runtime,
    *,
    parallel,
    fitted,
    compiled,
    iteration,
    changes,
):
    """What is about to run, as lines of text.

    rates: of optim/rates.py; parallel: of parallel/engine.py; fitted: of planning.py; iteration:
    the first one; changes: the settings that are not at their defaults, as text.
    """
    weights = tensor_bytes(model.parameters())
    gradients = megabytes(gradient_bytes(optimizer))
    if updates_inside_backward(optimizer):
        gradients = "freed one by one"
    elif frees_gradients(optimizer):
        gradients = f"summed in {optimizer.strategy.bits} bits {gradients}"
    sequences = settings.gradient_accumulation_steps * settings.batch_size
    lines = {
        "device": runtime.describe()
        + (", compiled (the first step takes a while)" if compiled else ""),
        "data": describe(dataset),
        "model": f"{model.num_params(non_embedding=False):,} parameters: {settings.n_layer} "
        f"layers, {settings.n_head} heads ({model.config.kv_heads} for keys and "
        f"values), {settings.n_embd} wide, block {settings.block_size}",
        "attention": describe_blocks(model.config, settings.block_size, runtime.device_type),
        "memory": f"parameters {megabytes(weights)}, gradients {gradients}, optimizer state "
        f"{megabytes(optimizer_bytes(optimizer))} ({settings.optimizer_variant})",
        "optimizer": optimizer_table(model, optimizer).replace("\n", "\n" + " " * 11),
        "rates": describe_rates(rates),
        "batch": f"{sequences * settings.block_size:,} tokens per iteration: "
        f"{settings.gradient_accumulation_steps} x {settings.batch_size} sequences "
        f"of {settings.block_size}{describe_share(settings, runtime)}",
        "changed": changes,
    }
    if fitted.plan is not None:
        lines["plan" if fitted.chosen else "predicted"] = fitted.describe()
    if runtime.world_size > 1:
        lines["parallel"] = parallel.describe()
    if iteration:
        lines["resuming"] = f"from iteration {iteration} of {settings.out_dir}"
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def describe_blocks(config, T, device_type):
    """How a block over T tokens really runs in training, in words."""
    sizes = tile_sizes(config, T, device_type, training=True)
    policy = config.attention_policy
    if sizes is None and config.policy.recomputes:
        return (
            f"{policy}, but {T:,} tokens are too few for tiles (q_chunk={T // 2 or 1} makes some): "
            "the plain block, with K and V of all rows"
        )
    if sizes is None:
        return f"{policy}: the plain block, with K and V of all rows"
    rows, keys = (min(size, T) for size in sizes)
    words = f"{policy}: tiles of {rows:,} rows, keys {keys:,} at a time"
    if config.checkpoint_layers:
        first = config.checkpoint_first
        some = f" in the first {first} of {config.n_layer} layers, all else in the others"
        some = some if first and first < config.n_layer else ""
        where = ", on the host" if config.offload else ""
        return f"{words}; each layer's input alone is kept{where}{some}"
    return words + "; a layer's input and attention's output are kept"


def describe_share(settings, runtime):
    """How several processes divide the batch, in words; nothing where there is one."""
    if runtime.world_size == 1:
        return ""
    share = share_of(settings, runtime.rank, runtime.world_size)
    rows = share.rows.stop - share.rows.start
    if rows == settings.batch_size:
        return f"; {share.count} x {rows} for each process"
    return f"; of each micro-batch {rows} or so for each process"


def describe_rates(rates):
    """Rates of linear weights and of the rest, and where they come from, in words."""
    roles = "".join(f", {role} {factor:g} times that" for role, factor in rates.role_rates.items())
    if rates.linear == rates.embedding and not roles:
        return f"{rates.linear:.3g} ({rates.origin})"
    return f"linear {rates.linear:.3g}{roles}, the rest {rates.embedding:.3g} ({rates.origin})"


def gradient_bytes(optimizer):
    """Bytes of the gradients that stand between backward and the step."""
    if updates_inside_backward(optimizer):
        return 0
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if frees_gradients(optimizer):
        return sum(map(optimizer.strategy.bytes_of, params))
    return tensor_bytes(params)


def optimizer_bytes(optimizer):
    """Bytes of state the optimizer has, or will have after its first step."""
    return sum(
        planned_bytes(optimizer, p, group)
        for group in optimizer.param_groups
        for p in group["params"]
    )


def megabytes(count):
    """Bytes as text in MB (10^6 bytes)."""
    return f"{count / 1e6:,.2f} MB"
