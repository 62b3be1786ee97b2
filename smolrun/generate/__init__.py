"""From logits to ids: the sampler, and the loop that asks the model for the next id. Text is the business of api.py."""
