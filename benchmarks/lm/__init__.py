"""Train language models, dense and block-sparse, and compare their losses over time."""
