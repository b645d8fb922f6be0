"""What all recipes share: the optimizer and its options, checkpoints to resume from, the clock."""
