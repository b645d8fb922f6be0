"""Every mode of the Trainer, checked against the dense oracle."""
