"""The model card: what was trained, on what, by which optimizer, and how it scored."""

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

SCORES = {"bleu": "BLEU", "bleu_lc": "BLEU, lowercased", "perplexity": "perplexity", "accuracy": "accuracy"}
"""What a recipe's metrics are called."""
_SPLITS = {
    "eval": "validation",
    "predict": "test",
    "best_predict": "test, at the best epoch",
    "first_predict": "test, after one epoch",
}
_COLUMNS = SCORES | {"calibration_error": "expected calibration error, 15 bins"}
_EMBEDDED = "the embedded data of the recipe"
_CARD = """---
{metadata}
---

# {name}

A `{report[model]}` of {report[parameters]:,} trained parameters{languages}, by hf_fngd's `recipes/{report[recipe]}`.

{scores}

{start}- data: {dataset}, {report[train_samples]:,} training rows{shots}{distortion}
- optimizer: **{report[optimizer]}**, with the arguments below
- {length}{kept}{averaged}, in batches of {batch} rows ({processes} process(es), {accumulation} accumulation step(s))
- schedule {args.lr_scheduler_type.value} with {warm_up}, {clipping}
- label smoothing {args.label_smoothing_factor:g}, seed {report[seed]}
{forgetting}
```json
{optimizer_arguments}
```
{loading}
![Learning curve](learning_curve.png)

Versions: {versions}.
"""
_LANGUAGES = {
    "translation": " that translates from `{}` to `{}`",
    "sentence-similarity": " whose embeddings of sentences in `{}` and of their translations into `{}` are neighbours",
}
_FORGETTING = """- texts of another task (`{forgetting_dataset}`): their embeddings have a mean cosine similarity of
  {forgetting_cosine:.4f} with those before training; a linear probe on them had an accuracy of
  {forgetting_probe_before:.4f} before and has one of {forgetting_probe_after:.4f}
"""
_LOADING = """
```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

config = AutoConfig.from_pretrained("{name}")  # the names of the classes
base = AutoModelForSequenceClassification.from_pretrained("{base}", config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "{name}")
```
"""


def render_card(report: dict[str, Any], args: transformers.TrainingArguments) -> str:
    """Write the card of a run.

    Args:
        report: What all_results.json holds of the run so far (a card that is pushed with a checkpoint has no scores
            yet): the recipe and its task, the optimizer, the dataset's name (None: embedded data), sizes, scores.
        args: The run's arguments: schedule, batch sizes, seed.

    Returns:
        The text of README.md, with the metadata that the Hub reads.
    """
    languages = [report[name] for name in ("source_lang", "target_lang") if name in report]
    warm_up = f"{args.warmup_steps:g} warm-up steps" if args.warmup_steps >= 1 else f"{args.warmup_steps:.0%} warm-up"
    averaged = report.get("averaged_checkpoints")
    base, name, length = report.get("model_name_or_path"), Path(args.output_dir).resolve().name, _length(report, args)
    return _CARD.format(
        report=report,
        args=args,
        metadata=_metadata(report, args, languages).to_yaml(),
        name=name,
        languages=_LANGUAGES[report["task"]].format(*languages) if languages else "",
        scores=_scores(report),
        dataset=f"`{report['dataset_name']}`" if report["dataset_name"] else _EMBEDDED,
        start=f"- start: `{base}`; {report['trained']}\n" if base else "",
        shots=f", {report['shots']} of each class, drawn with the seed" if report.get("shots") else "",
        distortion=f"; {report['distortion']}" if report.get("distortion") else "",
        length=length,
        kept=f", the weights of the best {args.metric_for_best_model} kept" if args.load_best_model_at_end else "",
        averaged=f", the weights the mean of the last {averaged} checkpoints" if averaged else "",
        forgetting=_FORGETTING.format(**report) if "forgetting_cosine" in report else "",
        loading=_LOADING.format(base=base, name=name) if report.get("lora_r") else "",
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        processes=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        warm_up=warm_up,
        clipping=f"gradient clipped at norm {args.max_grad_norm:g}" if args.max_grad_norm else "no gradient clipping",
        optimizer_arguments=json.dumps(report["optimizer_arguments"], indent=2),
        versions=", ".join(
            f"{module.__name__} {module.__version__}"
            for module in (transformers, torch, accelerate, datasets, tokenizers)
        ),
    )


def _length(report: dict[str, Any], args: transformers.TrainingArguments) -> str:
    planned = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return f"{report['stopped_at']:g} epochs, stopped early ({planned} at most)" if "stopped_at" in report else planned


def _metadata(report: dict[str, Any], args: transformers.TrainingArguments, languages: list[str]) -> ModelCardData:
    dataset = report["dataset_name"]
    # A local path has no page to link to.
    on_hub, base = _on_hub(dataset), report.get("model_name_or_path")
    return ModelCardData(
        language=languages or None,
        library_name="peft" if report.get("lora_r") else report.get("library", "transformers"),
        base_model=base if _on_hub(base) else None,
        pipeline_tag=report["task"],
        tags=["hf_fngd", report["optimizer"].lower()],
        datasets=[dataset] if on_hub else None,
        model_name=Path(args.output_dir).resolve().name,
        eval_results=[
            EvalResult(
                task_type=report["task"],
                dataset_type=dataset if on_hub else "custom",
                dataset_name=dataset or _EMBEDDED,
                dataset_split=_SPLITS[prefix],
                metric_type=metric,
                metric_name=SCORES[metric],
                metric_value=round(report[f"{prefix}_{metric}"], 4),
            )
            for prefix in ("eval", "predict")
            for metric in SCORES
            if f"{prefix}_{metric}" in report
        ]
        or None,
    )


def _on_hub(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _scores(report: dict[str, Any]) -> str:
    """Return a table, a row a split that was scored."""
    splits = _SPLITS | {f"predict_{name}": f"test set `{name}`" for name in report.get("test_sets", ())}
    names = [name for name in (*_COLUMNS, "loss") if any(f"{prefix}_{name}" in report for prefix in splits)]
    rows = [
        f"| {split} | {' | '.join(_score(report, f'{prefix}_{name}') for name in names)} |"
        for prefix, split in splits.items()
        if any(f"{prefix}_{name}" in report for name in names)
    ]
    if not rows:
        return "Not evaluated yet."
    table = [f"| | {' | '.join(_COLUMNS.get(name, name) for name in names)} |", "|---" * (len(names) + 1) + "|", *rows]
    if "num_beams" in report:
        search = "greedy search" if report["num_beams"] == 1 else f"beam search with {report['num_beams']} beams"
        signatures = [
            next(f"`{report[name]}`" for name in report if name.endswith(f"{bleu}_signature"))
            for bleu in ("bleu", "bleu_lc")
        ]
        table += ["", f"Translations by {search}; sacreBLEU {', lowercased '.join(signatures)}."]
    return "\n".join(table)


def _score(report: dict[str, Any], name: str) -> str:
    return format(report[name], ".4g") if name in report else "-"
