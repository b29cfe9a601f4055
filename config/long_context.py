# GPT-2's 124M shape on long sequences, one at a time, keys and values recomputed tile by tile.
#
#     python data/shakespeare/prepare.py
#     python train.py config/long_context.py --block_size=32768
#
# The validation split must be longer than block_size: Shakespeare has about 36,000 tokens there,
# so longer sequences need a longer text (data/prepare_text.py).

out_dir = "out-long-context"
eval_interval = 50
log_interval = 1

dataset = "shakespeare"
batch_size = 1
gradient_accumulation_steps = 1
block_size = 16384

n_layer = 12
n_head = 12
n_embd = 768
position = "rope"  # no table of learned positions to grow with block_size
attention_policy = "recompute"
q_chunk = 4096  # unasked, 24,576 tokens and fewer run plain: faster, in more memory

max_iters = 200
lr_decay_iters = 200
warmup_iters = 20
