# `make demo`: the model of train_shakespeare_char.py in a quarter of the time. Half a minute on two
# CPU cores, any device.
#
#     python data/shakespeare_char/prepare.py
#     python train.py config/demo_shakespeare_char.py
#
# learning_rate and min_lr are the optimizer variant's own here too. To compare optimizers, use
# train_shakespeare_char.py: rates tuned for 2,000 iterations suit some variants in 500, not others.

from leangpt.system import processor

out_dir = "out-demo"
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
