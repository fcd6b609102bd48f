"""A small LLaVA-1.6 that this package trained itself, the pictures that it was trained on, and how well it does."""
