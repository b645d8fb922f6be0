"""Noisy labels: the "robust" preset beside plain averaging and beside AdamW.

A tiny BERT learns topics from sentences of which four in ten carry a random label. It can learn what the sentences
have in common, or it can memorize them; the accuracy on rightly labelled sentences tells. Run it with

    python examples/04_bert_classifier.py

One seed of a toy task proves nothing about other tasks: change the seed, the noise and the learning rate.
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

from hf_fngd import FNGDConfig, FNGDFactory

TOPIC_WORDS = [
    ["match", "goal", "team", "coach", "season", "ball", "win", "stadium", "player", "score"],
    ["flour", "oven", "butter", "salt", "pan", "taste", "dinner", "spoon", "bake", "sauce"],
    ["train", "ticket", "hotel", "beach", "flight", "map", "city", "island", "museum", "road"],
    ["rain", "wind", "cloud", "snow", "storm", "sun", "cold", "fog", "warm", "thunder"],
]
FILLERS = ["the", "a", "of", "and", "to", "in", "it", "was", "we", "they", "had", "with", "for", "on", "then"]
VOCABULARY = ["<pad>", *FILLERS, *(word for words in TOPIC_WORDS for word in words)]
ID = {word: number for number, word in enumerate(VOCABULARY)}
LENGTH, NOISE, SEED = 12, 0.4, 0


def make_sentence():
    """A sentence as word ids and its topic: 4 words of the topic, 1 of any topic and fillers."""
    topic = random.randrange(len(TOPIC_WORDS))
    words = random.choices(TOPIC_WORDS[topic], k=4) + random.choices(random.choice(TOPIC_WORDS), k=1)
    words += random.choices(FILLERS, k=LENGTH - len(words))
    random.shuffle(words)
    return {"input_ids": torch.tensor([ID[word] for word in words]), "labels": topic}


def with_noise(sentence):
    """The same sentence; with probability NOISE its label is drawn anew (and may be right by chance)."""
    drawn = random.randrange(len(TOPIC_WORDS))
    return sentence | {"labels": drawn if random.random() < NOISE else sentence["labels"]}


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
train_set = [with_noise(make_sentence()) for _ in range(512)]
test_set = [make_sentence() for _ in range(512)]

# The control beside the preset: the same update rule, Adam's, with all weights 1, so that only the weights differ.
runs = {
    "FNGD, robust preset": (FNGDConfig.preset("robust"), 1e-3),
    "FNGD, all weights 1": (FNGDConfig.preset("robust", sharing="uniform"), 1e-3),
    "AdamW": (None, 1e-3),
}

# A low loss is no success here: who fits all the noisy labels has memorized the wrong ones too.
print(f"{'optimizer':20}  first loss  last loss  test accuracy  noisy labels fitted")
for name, (config, learning_rate) in runs.items():
    args = TrainingArguments(
        output_dir="outputs/example_04",
        num_train_epochs=16,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        learning_rate=learning_rate,
        weight_decay=0.01,
        logging_strategy="epoch",
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
        # With model_init there is no model yet, so Trainer gets a factory in place of an optimizer. From `args` it
        # takes learning rate and weight decay, which win over those of the config. None is Trainer's own AdamW.
        optimizer_cls_and_kwargs=None if config is None else (FNGDFactory, {"args": args, "config": config}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    test, fitted = (trainer.predict(data).metrics["test_accuracy"] for data in (test_set, train_set))
    print(f"{name:20} {losses[0]:11.3f} {losses[-1]:10.3f} {test:14.3f} {fitted:20.3f}")
