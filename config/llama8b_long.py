# A Llama of 8B parameters on sequences of half a million tokens, whole, on one card of 80 GB.
#
#     python train.py config/llama8b_long.py --init_from=FOLDER --dataset=long
#
# FOLDER has the model's config.json and safetensors; the data set needs a validation split of more
# than block_size tokens. Relative positions reach as far as block_size asks: whether the model
# makes sense of them that far is what the training is for. Each layer's input waits on the host:
# 8.6 GB of pinned memory for every 1,048,576 tokens and layer of 4,096 numbers.

out_dir = "out-llama8b-long"
eval_interval = 50
eval_iters = 1
log_interval = 1

batch_size = 1
gradient_accumulation_steps = 1
block_size = 524288

param_dtype = "bfloat16"
optimizer_variant = "adamsn8"
optimizer_options = "fused_backward=True"
learning_rate = 2e-5
embedding_lr = 2e-6
warmup_iters = 20
max_iters = 500

attention_policy = "recompute"
checkpoint_layers = True
offload = True
compile = False
