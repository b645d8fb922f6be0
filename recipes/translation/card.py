"""The model card: what was trained, on what, by which optimizer, and how well it translates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accelerate
import datasets
import tokenizers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

EMBEDDED = "the embedded corpus of the recipe"

_CARD = """---
{metadata}
---

# {name}

A Transformer (Vaswani et al., 2017; `MarianMTModel`, {parameters:,} parameters) that translates from `{source}`
to `{target}`, trained from scratch by hf_fngd's `recipes/translate.py`.

## Results

{scores}

## Use

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
batch = tokenizer([text], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
```

`folder` is the local folder of this card, or the name of its repository.

## Training

- data: {dataset}, {train_samples:,} training pairs{noise}
- optimizer: **{optimizer}**, with the arguments below
{settings}

```json
{optimizer_arguments}
```

![Learning curve](learning_curve.png)

Versions: {versions}.
"""


def render_card(report: dict[str, Any], args: transformers.Seq2SeqTrainingArguments) -> str:
    """Write the card of a run.

    Args:
        report: What all_results.json holds of the run so far (a card that is pushed with a checkpoint has no scores
            yet): the optimizer, the dataset's name (None: the embedded corpus), languages, sizes, scores.
        args: The run's arguments: schedule, batch sizes, seed.

    Returns:
        The text of README.md, with the metadata that the Hub reads.
    """
    scored = [
        (split, prefix) for split, prefix in (("validation", "eval"), ("test", "predict")) if f"{prefix}_bleu" in report
    ]
    dataset, name = report["dataset_name"], Path(args.output_dir).resolve().name
    metadata = ModelCardData(
        language=[report["source_lang"], report["target_lang"]],
        library_name="transformers",
        pipeline_tag="translation",
        tags=["hf_fngd", report["optimizer"].lower()],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        metrics=["bleu"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="translation",
                dataset_type=dataset if _is_hub_id(dataset) else "custom",
                dataset_name=dataset or EMBEDDED,
                dataset_split=split,
                metric_type="bleu",
                metric_name="BLEU",
                metric_value=round(report[f"{prefix}_bleu"], 2),
            )
            for split, prefix in scored
        ]
        or None,
    )
    return _CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        parameters=report["parameters"],
        source=report["source_lang"],
        target=report["target_lang"],
        scores=_scores(report, scored),
        dataset=f"`{dataset}`" if dataset else EMBEDDED,
        train_samples=report["train_samples"],
        noise=_noise(report),
        optimizer=report["optimizer"],
        settings=_settings(args),
        optimizer_arguments=json.dumps(report["optimizer_arguments"], indent=2),
        versions=", ".join(
            f"{module.__name__} {module.__version__}"
            for module in (transformers, torch, accelerate, datasets, tokenizers)
        ),
    )


def _scores(report: dict[str, Any], scored: list[tuple[str, str]]) -> str:
    if not scored:
        return "Not evaluated yet."
    rows = [
        f"| {split} | {report[f'{prefix}_bleu']:.2f} | {report[f'{prefix}_loss']:.4f} |" for split, prefix in scored
    ]
    search = "greedy search" if report["num_beams"] == 1 else f"beam search with {report['num_beams']} beams"
    signature = report[f"{scored[-1][1]}_bleu_signature"]
    return "\n".join(
        [
            "| split | BLEU | loss |",
            "|---|---|---|",
            *rows,
            "",
            f"Translations by {search}; sacreBLEU `{signature}`.",
        ]
    )


def _noise(report: dict[str, Any]) -> str:
    if "noise_seed" not in report:
        return ""
    return (
        f", {report['misaligned_pairs']:,} of them with each other's targets and {report['random_target_pairs']:,} "
        f"with random ones (noise seed {report['noise_seed']})"
    )


def _settings(args: transformers.Seq2SeqTrainingArguments) -> str:
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    warm_up = f"{args.warmup_steps:g} warm-up steps" if args.warmup_steps >= 1 else f"{args.warmup_steps:.0%} warm-up"
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return (
        f"- {length} in batches of {batch} pairs ({args.world_size} process(es), "
        f"{args.gradient_accumulation_steps} accumulation step(s))\n"
        f"- schedule {args.lr_scheduler_type.value} with {warm_up}, gradient clipped at norm {args.max_grad_norm:g}\n"
        f"- label smoothing {args.label_smoothing_factor:g}, seed {args.seed}"
    )


def _is_hub_id(dataset: str | None) -> bool:
    """Tell `user/name` from a local path, which has no page to link to."""
    return dataset is not None and dataset.count("/") == 1 and not dataset.startswith((".", "/", "~"))
