"""Training: a recipe, the curriculum it describes, and the stock Trainer that follows it."""
