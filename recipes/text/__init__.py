"""What recipes on single sentences share: their data, one run from training to scores, the model card."""
