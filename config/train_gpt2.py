# GPT-2 (124M) on OpenWebText with nanoGPT's settings. nanoGPT reports a loss of about 2.85 after
# 4 days on 8 A100s; that run has not been repeated here.
#
#     python data/openwebtext/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = "out-gpt2"
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens an iteration, over all GPUs
dataset = "openwebtext"
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

n_layer = 12
n_head = 12
n_embd = 768

learning_rate = 6e-4
min_lr = 6e-5
max_iters = 600000  # 300B tokens in all
lr_decay_iters = 600000
warmup_iters = 2000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95

eval_interval = 1000
eval_iters = 200
log_interval = 10
