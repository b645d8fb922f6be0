"""Inverse-free fast natural gradient descent for the Hugging Face Trainer."""
