# The loss of a published GPT-2 on OpenWebText's validation split. nanoGPT reports 3.11 for the
# 124M one, which was trained on other web text.
#
#     python train.py config/eval_gpt2.py --init_from=gpt2-medium

init_from = "gpt2"
dataset = "openwebtext"
eval_only = True
batch_size = 8
eval_iters = 500
