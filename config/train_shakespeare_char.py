# A small character-level GPT on Shakespeare: half a minute on two CPU cores, any device.
#
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char.py
#
# learning_rate and min_lr are not set here on purpose: each optimizer variant has a default tuned
# for this very model, so --optimizer_variant=adam brings its own, and the last learning rate is a
# tenth of it.

from leangpt.system import processor

out_dir = "out-shakespeare-char"
eval_interval = 250
log_interval = 10

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32  # a step's fixed costs weigh less than with 12, the loss falls faster a second
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

optimizer_variant = "muonsn"
max_iters = 500
lr_decay_iters = 500
warmup_iters = 20
weight_decay = 1e-1
beta2 = 0.99  # few tokens an iteration: a longer memory for the second moments
grad_clip = 1.0

# twice as fast where the processor multiplies bfloat16 in hardware, several times slower elsewhere
dtype = "bfloat16" if processor.fast_bfloat16() else "auto"
