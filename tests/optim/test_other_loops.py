"""Our optimizers in other people's loops: Hugging Face's Trainer and Accelerate, with resume."""

import copy

import pytest
import torch

from leangpt.optim import VARIANTS, build_optimizer

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
OURS = [name for name in VARIANTS if name != "adam"]


def make_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=50, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def make_data():
    tokens = torch.randint(50, (32, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def warmup(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def train(folder, variant, resume=None):
    """Trainer's run of 8 steps; the model afterwards."""
    model = make_model()
    optimizer = build_optimizer(model, variant)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        save_steps=4,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=make_data(),
        optimizers=(optimizer, warmup(optimizer)),
    )
    result = trainer.train(resume_from_checkpoint=resume)
    assert result.training_loss > 0 and trainer.state.global_step == 8
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v != "muonsn8")) for v in OURS]
)
def test_trainer_resumes_bit_by_bit(variant, tmp_path):
    start = make_model()
    whole = train(tmp_path / "whole", variant)
    resumed = train(tmp_path / "again", variant, str(tmp_path / "whole" / "checkpoint-4"))
    for (name, p), q, before in zip(
        whole.named_parameters(), resumed.parameters(), start.parameters()
    ):
        assert torch.equal(p, q), name
        assert not torch.equal(p, before), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adamsn8", "muonsn8"])
def test_accelerate_trains_as_the_plain_loop_and_resumes(variant, tmp_path):
    data = torch.stack([row["input_ids"] for row in make_data()]).split(4)

    def step(model, optimizer, scheduler, batch, backward):
        loss = model(input_ids=batch, labels=batch).loss
        backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    plain = make_model()
    optimizer = build_optimizer(plain, variant)
    scheduler = warmup(optimizer)
    for batch in data:
        step(plain, optimizer, scheduler, batch, lambda loss: loss.backward())

    accelerator = accelerate.Accelerator(cpu=True)

    def prepared():
        model = make_model()
        optimizer = build_optimizer(model, variant)
        return accelerator.prepare(model, optimizer, warmup(optimizer))

    model, optimizer, scheduler = prepared()
    for number, batch in enumerate(data):
        if number == 4:
            accelerator.save_state(str(tmp_path))
            saved = copy.deepcopy(model.state_dict())
        step(model, optimizer, scheduler, batch, accelerator.backward)
    accelerator.free_memory()
    again, optimizer, scheduler = prepared()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    for batch in data[4:]:
        step(again, optimizer, scheduler, batch, accelerator.backward)
    for p, q, r in zip(plain.parameters(), model.parameters(), again.parameters()):
        assert torch.equal(p, q) and torch.equal(q, r)
