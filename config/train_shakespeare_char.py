# A small character-level GPT on Shakespeare: a minute or two on a CPU, any device.
#
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char.py --optimizer_variant=adamsn
#
# learning_rate and min_lr are not set here on purpose: each optimizer variant has a default tuned
# for this very model and its 2,000 iterations, and the last learning rate is a tenth of it.

out_dir = "out-shakespeare-char"
eval_interval = 250
log_interval = 10

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

max_iters = 2000
lr_decay_iters = 2000
warmup_iters = 100
weight_decay = 1e-1
beta2 = 0.99  # few tokens an iteration: a longer memory for the second moments
grad_clip = 1.0
