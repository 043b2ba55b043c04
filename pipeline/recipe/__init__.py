"""What is in a recipe: every key that pretraining, evaluations and the stages of a graph may be given."""
