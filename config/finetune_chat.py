# Teach SmolLM2-135M a lighthouse keeper's manner from 50 conversations, on a laptop's CPU.
#
#     python data/smollm2/prepare.py
#     python data/prepare_chat.py --input data/example_chat.jsonl --model data/smollm2 \
#         --name lighthouse --block_size 128
#     python train.py config/finetune_chat.py
#     python sample.py --out_dir=out-chat --chat=True --start="Do you get lonely?" --num_samples=1
#     python sample.py --out_dir=out-chat --export=lighthouse     # a folder for transformers

out_dir = "out-chat"
eval_interval = 15
eval_iters = 4  # batches that each loss is estimated on
log_interval = 1

init_from = "data/smollm2"
dataset = "lighthouse"
data_order = "random"
block_size = 128  # tokens of a row, as it was prepared

# 3 x 3 conversations an iteration, five iterations a pass over all 45
batch_size = 3
gradient_accumulation_steps = 3
max_iters = 30
warmup_iters = 5

# a CPU is faster in float32; where memory is short, three bytes per parameter for weights and sums:
# param_dtype = "bfloat16" and optimizer_options = "gradient_bits=8"
optimizer_variant = "adamsn8"
learning_rate = 1e-4
embedding_lr = 1e-5
