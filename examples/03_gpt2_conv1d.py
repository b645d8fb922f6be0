"""A language model: GPT-2, whose Conv1D layers are weighed like Linear ones, with FNGD's values in the log.

A tiny GPT-2 with random weights learns sentences of a toy grammar and then writes some. Run it with

    python examples/03_gpt2_conv1d.py
"""

import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_fngd import FNGD, FNGDCallback

ADJECTIVES = ["small", "old", "quick", "quiet", "green"]
NOUNS = ["dog", "cat", "bird", "horse", "goat", "duck"]
VERBS = ["follow", "see", "hear", "like"]
START, END = "<s>", "."
VOCABULARY = [START, END, "this", "these", "a", "the", *ADJECTIVES]
VOCABULARY += [word + ending for word in NOUNS + VERBS for ending in ("", "s")]
ID = {word: number for number, word in enumerate(VOCABULARY)}


def make_sentence():
    """One sentence; its subject and its verb agree, which is what the model has to find out."""
    plural = random.random() < 0.5
    subject = ["these" if plural else "this", random.choice(ADJECTIVES), random.choice(NOUNS) + "s" * plural]
    verb = random.choice(VERBS) + "s" * (not plural)
    return [START, *subject, verb, random.choice(["a", "the"]), random.choice(NOUNS), END]


def encode(words):
    """Word ids, as inputs and as labels; the model shifts the labels itself."""
    ids = torch.tensor([ID[word] for word in words])
    return {"input_ids": ids, "labels": ids}


set_seed(0)
train_set = [encode(make_sentence()) for _ in range(512)]
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=16,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=ID[START],
        eos_token_id=ID[END],
    )
)
args = TrainingArguments(
    output_dir="outputs/example_03",
    num_train_epochs=6,
    per_device_train_batch_size=32,
    logging_steps=8,
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
)
optimizer = FNGD(model, lr=5e-3)

# The callback adds the fngd_ values to Trainer's log, and so to TensorBoard and the like. FNGD trains the same
# without it.
trainer = Trainer(
    model=model, args=args, train_dataset=train_set, optimizers=(optimizer, None), callbacks=[FNGDCallback()]
)
trainer.remove_callback(PrinterCallback)  # the log is printed below, as a table
trainer.train()

# The spread says how far the sample weights are apart (0 is plain averaging), skipped how many steps were left out
# because a gradient was not finite.
print("step  epoch   loss  fngd_weight_spread  fngd_skipped")
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(
            f"{entry['step']:4d} {entry['epoch']:6.2f} {entry['loss']:6.3f} {entry['fngd_weight_spread']:19.3f}"
            f" {entry['fngd_skipped']:13.0f}"
        )

# The output head shares its weight with the embedding: the report names both.
print(f"\n{optimizer.coverage()}")

# detach() gives back the plain model. Needed only to train on with another optimizer: evaluation, generation and
# saving work on the attached one.
optimizer.detach()
model.eval()
starts = torch.tensor([[ID[START], ID[word]] for word in ("this", "these", "this", "these")])
print("\nwritten by the model:")
written = model.generate(
    starts, attention_mask=torch.ones_like(starts), max_new_tokens=6, do_sample=True, pad_token_id=ID[END]
)
for row in written:
    words = [VOCABULARY[number] for number in row.tolist()]
    print("  " + " ".join(words[1 : words.index(END)] if END in words else words[1:]))
