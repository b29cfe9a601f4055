"""Twenty iterations whose losses are pinned: any change of the model's arithmetic, initial
weights, data order, schedule or optimizer shows here. Change the numbers only on purpose."""

from pathlib import Path

import pytest
from tiny_run import determined

import train
from leangpt.text.folder import write_dataset

# Shakespeare, Sonnets 18 and 116 (public domain).
SONNETS = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou owest;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou growest:
So long as men can breathe or eyes can see,
So long lives this and this gives life to thee.

Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O no! it is an ever-fixed mark
That looks on tempests and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come:
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
If this be error and upon me proved,
I never writ, nor no man ever loved.
"""

GOLDEN = {  # the losses of iterations 0, 5, 10, 15, then the validation losses before and after
    "adam": [3.841483, 3.547569, 3.271750, 3.134363, 3.819746, 3.127604],
    "adamsn": [3.841483, 3.550200, 3.268725, 3.132745, 3.819746, 3.128764],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    characters = "".join(sorted(set(SONNETS)))
    ids = [characters.index(character) for character in SONNETS]
    write_dataset(
        Path(folder) / "sonnets",
        ids[:1000],
        ids[1000:],
        {
            "tokenizer": "char",
            "vocab_size": len(characters),
            "characters": characters,
            "source": "two sonnets",
            "sha256": None,
        },
    )
    return folder


@pytest.mark.parametrize("variant", GOLDEN)
def test_losses_are_as_they_were(tmp_path, data_dir, variant):
    train.main(
        [
            "--dataset=sonnets",
            f"--data_dir={data_dir}",
            f"--out_dir={tmp_path}",
            "--device=cpu",
            "--n_layer=2",
            "--n_head=2",
            "--n_embd=32",
            "--block_size=32",
            "--batch_size=8",
            "--gradient_accumulation_steps=1",
            "--max_iters=20",
            "--warmup_iters=5",
            "--log_interval=5",
            "--eval_interval=20",
            "--eval_iters=0",
            "--learning_rate=4e-3",
            "--embedding_lr=4e-3",
            "--beta1=0.9",
            "--beta2=0.95",
            "--seed=1337",
            f"--optimizer_variant={variant}",
        ]
    )
    rows = determined(tmp_path)
    losses = [float(row[2]) for row in rows if row[2]] + [float(row[4]) for row in rows if row[4]]
    assert losses == pytest.approx(GOLDEN[variant], abs=1e-4)
