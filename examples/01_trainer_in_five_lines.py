"""FNGD in the Hugging Face Trainer: the one line that changes is the optimizer.

A tiny BERT with random weights learns which of four topics a sentence is about. Run it with

    python examples/01_trainer_in_five_lines.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_fngd import FNGD

TOPICS, WORDS, LENGTH = 4, 64, 12


def make_sentences(count):
    """Sentences of random word ids; half of the words of a sentence come from its topic's own 16 words."""
    sentences = []
    for _ in range(count):
        topic = int(torch.randint(TOPICS, ()))
        words = torch.randint(WORDS, (LENGTH,))
        own = topic * (WORDS // TOPICS) + torch.randint(WORDS // TOPICS, (LENGTH,))
        sentences.append({"input_ids": torch.where(torch.rand(LENGTH) < 0.5, own, words), "labels": topic})
    return sentences


set_seed(0)
train_set, test_set = make_sentences(512), make_sentences(256)

config = BertConfig(
    vocab_size=WORDS,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=LENGTH,
    num_labels=TOPICS,
)
args = TrainingArguments(
    output_dir="outputs/example_01",
    num_train_epochs=6,
    per_device_train_batch_size=32,
    logging_steps=16,
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,  # one device, so that everybody sees the same numbers
)

# The five lines. FNGD takes the model, not its parameters: it has to see the layers. None leaves the scheduler
# to Trainer, which makes the linear decay that `args` asks for; no callback is needed.
model = BertForSequenceClassification(config)
optimizer = FNGD(model, lr=1e-2)
trainer = Trainer(model=model, args=args, train_dataset=train_set, optimizers=(optimizer, None))
trainer.train()
predictions = trainer.predict(test_set)

# Trainer has printed its log above. `grad_norm` is the norm of the weighted gradient: by the time that backward
# returns, the gradient is a weighted sum over the samples.
labels = torch.tensor([sentence["labels"] for sentence in test_set])
accuracy = (torch.from_numpy(predictions.predictions).argmax(dim=1) == labels).float().mean()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"\nloss: {losses[0]:.3f} at step {args.logging_steps}, {losses[-1]:.3f} at step {trainer.state.global_step}")
print(f"accuracy on sentences that it has not seen: {accuracy:.3f} (guessing: {1 / TOPICS:.3f})")
