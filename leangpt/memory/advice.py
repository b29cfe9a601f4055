"""What to try where a run's memory did not suffice: one sentence from the formulas."""

from dataclasses import replace

from leangpt.attention.tile_sizes import default_chunk
from leangpt.memory.formulas import moments
from leangpt.memory.run import Run

RESERVE = 0.1  # of the memory at hand, left free in advice
NOT_COUNTED = ("weights", "state", "update")  # which the caller has taken off


def predict_training_peak(
    config, B, T, element_size=4, device_type="cpu", gradient_size=4, fused_backward=False
):
    """Bytes beyond weights of one forward and backward of GPT(config) over (B, T) tokens.

    Parameter gradients are included, of gradient_size bytes a number, as weights have; with
    fused_backward each is freed as soon as it is complete. Weights and optimizer state are not,
    nor what an update needs for a moment.
    """
    options = {"fused_backward": True} if fused_backward else {}
    run = Run(
        config,
        B,
        T,
        variant="adamsn8",
        options=options,
        param_bytes=gradient_size,
        stream_bytes=element_size,
        device_type=device_type,
    )
    return max(
        sum(size for part, size in parts.items() if part not in NOT_COUNTED)
        for parts in moments(run).values()
    )


def advise_oom(config, B, T, bytes_available, element_size=4, device_type="cpu", **gradients):
    """One sentence: which policy and tile would have trained (B, T) tokens in that much memory.

    bytes_available: what there is beyond weights and optimizer state; gradients: as
    predict_training_peak's last arguments. Candidates are tried from
    the cheapest in time to the dearest; where none fits, the longest T that would is named.
    """

    def needs(candidate, length=T):
        return predict_training_peak(candidate, B, length, element_size, device_type, **gradients)

    budget = bytes_available * (1 - RESERVE)
    said = (
        f"{B} x {T:,} tokens under {_describe(config)} need about {_size(needs(config))} "
        f"beyond weights and optimizer state, of {_size(bytes_available)} at hand"
    )
    candidates = _cheapest_first(config, T, device_type)
    for candidate in candidates:
        if needs(candidate) <= budget:
            return f"{said}; {_describe(candidate)} would need {_size(needs(candidate))}"
    length = T
    while length > 1 and needs(candidates[-1], length) > budget:
        length //= 2
    if needs(candidates[-1], length) > budget:
        return f"{said}; no policy fits even one token: the model itself is too large"
    return f"{said}; no policy fits. {_describe(candidates[-1])} would fit {B} x {length:,} tokens"


def _cheapest_first(config, T, device_type):
    """Configurations worth trying instead, each slower and smaller than the one before."""
    whole = replace(config, checkpoint_layers=False, offload=False)
    tile = default_chunk(config, device_type)
    rows = [tile] + [n for n in (4096, 1024, 512) if n < tile]
    found = [replace(whole, q_chunk=tile, k_chunk=None)]
    leaner = config.policy.leaner or config.attention_policy
    recompute = replace(whole, attention_policy=leaner, k_chunk=None)
    found += [replace(recompute, q_chunk=n) for n in rows]
    found += [replace(recompute, q_chunk=n, checkpoint_layers=True) for n in rows]
    if device_type == "cuda":
        found += [replace(recompute, q_chunk=n, checkpoint_layers=True, offload=True) for n in rows]
    return [candidate for candidate in found if candidate != config]


def _describe(config):
    """The settings that decide the memory, as they are written on the command line."""
    words = [f"--attention_policy={config.attention_policy}"]
    for name in ("q_chunk", "k_chunk"):
        if getattr(config, name):
            words.append(f"--{name}={getattr(config, name)}")
    words += [
        f"--{name}=True" for name in ("checkpoint_layers", "offload") if getattr(config, name)
    ]
    return " ".join(words)


def _size(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
