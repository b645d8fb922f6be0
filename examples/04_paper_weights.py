"""The paper's sample weights, and how a factory takes them to Trainer, beside the default and beside AdamW.

A tiny BERT learns topics from sentences. The default clips each sample's gradient at the mean norm of the step's
samples. The paper's weights come from the Fisher matrix: they are solved for in the first epoch and replayed in all
others. Run it with

    python examples/04_paper_weights.py

One seed of a toy task proves nothing about other tasks: docs/paper_claims.md says what was measured.
"""

import random

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_fngd import FNGDCallback, FNGDConfig, FNGDFactory

TOPIC_WORDS = [
    ["match", "goal", "team", "coach", "season", "ball", "win", "stadium", "player", "score"],
    ["flour", "oven", "butter", "salt", "pan", "taste", "dinner", "spoon", "bake", "sauce"],
    ["train", "ticket", "hotel", "beach", "flight", "map", "city", "island", "museum", "road"],
    ["rain", "wind", "cloud", "snow", "storm", "sun", "cold", "fog", "warm", "thunder"],
]
FILLERS = ["the", "a", "of", "and", "to", "in", "it", "was", "we", "they", "had", "with", "for", "on", "then"]
VOCABULARY = ["<pad>", *FILLERS, *(word for words in TOPIC_WORDS for word in words)]
ID = {word: number for number, word in enumerate(VOCABULARY)}
LENGTH, SEED = 12, 0


def make_sentence():
    """A sentence as word ids and its topic: 4 words of the topic, 2 of any topic and fillers."""
    topic = random.randrange(len(TOPIC_WORDS))
    words = random.choices(TOPIC_WORDS[topic], k=4) + random.choices(random.choice(TOPIC_WORDS), k=2)
    words += random.choices(FILLERS, k=LENGTH - len(words))
    random.shuffle(words)
    return {"input_ids": torch.tensor([ID[word] for word in words]), "labels": topic}


def make_model():
    """A new model; Trainer sets the seed before it asks for one, so that all runs start from the same weights."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LENGTH,
            num_labels=len(TOPIC_WORDS),
        )
    )


def accuracy(predictions):
    """The share of right answers, for Trainer's metrics."""
    return {"accuracy": (predictions.predictions.argmax(axis=1) == predictions.label_ids).mean()}


set_seed(SEED)
train_set = [make_sentence() for _ in range(512)]
test_set = [make_sentence() for _ in range(512)]

# The preset "paper" is the whole method of the paper, with SGD's plain gradient where there is nothing to weigh.
runs = {
    "FNGD, default": (FNGDConfig(), 1e-2),
    "FNGD, paper's weights, Adam's update": (FNGDConfig(sharing="replay", update="adam"), 1e-3),
    "FNGD, preset paper": (FNGDConfig.preset("paper", fallback_lr=0.1), 3e-3),
    "AdamW": (None, 1e-3),
}

rows = []
for name, (config, learning_rate) in runs.items():
    args = TrainingArguments(
        output_dir="outputs/example_04",
        num_train_epochs=6,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        learning_rate=learning_rate,
        # The paper's step is as long as the gradient says, so that nothing should clip it.
        max_grad_norm=0.0 if "preset" in name else 1.0,
        logging_steps=8,  # half an epoch
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
    )
    trainer = Trainer(
        model_init=make_model,
        args=args,
        train_dataset=train_set,
        compute_metrics=accuracy,
        callbacks=[] if config is None else [FNGDCallback()],
        # With model_init there is no model yet, so Trainer gets a factory in place of an optimizer. From `args` it
        # takes learning rate and weight decay; a config with other ones is an error. None is Trainer's own AdamW.
        optimizer_cls_and_kwargs=None if config is None else (FNGDFactory, {"args": args, "config": config}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    test = trainer.predict(test_set).metrics["test_accuracy"]
    # Phase 0: sample weights are solved for. Phase 1, from the last step of the first epoch on: they are replayed.
    phases = "".join(f"{entry['fngd_phase']:.0f}" for entry in log if "fngd_phase" in entry)
    rows.append(f"{name:36} {log[0]['loss']:11.3f} {log[-1]['loss']:10.3f} {test:14.3f}  {phases or '-'}")

print(f"\n{'optimizer':36}  first loss  last loss  test accuracy  phases")
print("\n".join(rows))
