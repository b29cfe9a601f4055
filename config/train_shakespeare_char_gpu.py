# nanoGPT's character-level model (10.7M parameters) with nanoGPT's settings, for a GPU. nanoGPT
# reports a validation loss of 1.47 after 3 minutes on an A100.
#
#     python train.py config/train_shakespeare_char_gpu.py
#
# In 5000 iterations it overfits: the best checkpoint, not the last, is the one to sample from.

out_dir = "out-shakespeare-char-gpu"
eval_interval = 250
log_interval = 10
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99
