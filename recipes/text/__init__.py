"""What recipes on texts share: their options, data, Trainer, and one run from training to scores."""
