"""What is in a recipe: every key that `configs/pretrain` and `configs/transfer` may hold."""
