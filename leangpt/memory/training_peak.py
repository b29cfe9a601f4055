"""The memory of one forward and backward beyond what stands already: a number for callers that know
weights and state themselves."""

from leangpt.memory.formulas import moments
from leangpt.memory.run import Run

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
