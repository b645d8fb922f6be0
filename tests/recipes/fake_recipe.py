"""Stands in for a recipe: a score from `--lr`, at once. Imports nothing that takes time."""

import json
import math
import sys
import time
from pathlib import Path

options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
out, lr, mode = Path(options["output_dir"]), float(options["lr"]), options.get("mode", "")
with (out.parent / "calls.txt").open("a") as calls:
    calls.write(f"{out.name}\n")
if mode == "interrupted" and not (out / "checkpoint-1").exists():
    (out / "checkpoint-1").mkdir()
    time.sleep(100)
if mode == "slow" and not (out.parent / "repaired").exists():
    (out / "checkpoint-4" / "shards").mkdir(parents=True)  # of a layout that is taken as it is
    events = [{"epoch": 1, "step": 4, "loss": 1, "step_seconds_mean": 0.5}, {"epoch": 1, "step": 4, "eval_score": 7.0}]
    state = {"log_history": events, "global_step": 4, "max_steps": 12}
    (out / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    time.sleep(100)
if mode == "meet":  # each waits for another one
    (out / "here").touch()
    deadline = time.monotonic() + 60
    while len(list(out.parent.glob("*/here"))) < 2:
        if time.monotonic() > deadline:
            sys.exit("nobody came")
        time.sleep(0.01)
if lr > 1 and not (out.parent / "repaired").exists():
    sys.exit(f"lr {lr} is too large")
score = math.nan if mode == "nan" and lr < 0.1 else 10 * lr + int(options["seed"])
pace = 1 if options.get("torch_compile_backend") == "aot_eager" else 2
results = {"step_seconds_median": pace, "train_loss": 0}
results |= {"eval_score": score, "test_score": -score, "test_signature": "sig", "step_seconds_mean": 0.5, "list": [1]}
if mode == "silent":
    del results["eval_score"]
history = [{"epoch": e, "step": 4 * e, "eval_score": score - abs(e - 2), "other": 0} for e in (1, 2, 3)]
(out / "trainer_state.json").write_text(json.dumps({"log_history": history}))
(out / "all_results.json").write_text(json.dumps(results))
