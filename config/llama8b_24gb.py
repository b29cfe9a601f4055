# A Llama of 8B parameters, every one of them trained, on a card of 24 GB: Muon with a momentum of
# 4 bits, weights in bfloat16, updated while backward runs.
#
#     python data/prepare_text.py --input book.txt --name mybook --tokenizer FOLDER
#     python train.py config/llama8b_24gb.py --init_from=FOLDER --dataset=mybook
#
# FOLDER has the model's config.json and safetensors. Smaller models go the same way.

out_dir = "out-llama8b"
eval_interval = 200
eval_iters = 20
log_interval = 1

data_order = "once"
batch_size = 1
gradient_accumulation_steps = 1  # an update each sequence; more: optimizer_options below
block_size = 8192

# 2 bytes per weight and 0.56 per momentum; no gradient outlives its update
param_dtype = "bfloat16"
optimizer_variant = "muonsn4"
optimizer_options = "fused_backward=True"  # several micro-batches: "gradient_bits=4", 0.56 more
learning_rate = 1e-4
embedding_lr = 1e-5
warmup_iters = 50
max_iters = 2000

# activations: each layer's input alone, and that on the host
attention_policy = "recompute"
checkpoint_layers = True
offload = True
compile = False
