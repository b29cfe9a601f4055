# Fine-tune a published GPT-2 on Shakespeare: 20 iterations, then it speaks verse.
#
#     python data/shakespeare/prepare.py
#     python train.py config/finetune_shakespeare.py --init_from=gpt2-xl

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # it soon overfits so small a text: keep only the best

init_from = "gpt2"
dataset = "shakespeare"

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens an iteration, 9 iterations an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# the weights are good already: a low, constant rate for all of them
learning_rate = 3e-5
decay_lr = False
