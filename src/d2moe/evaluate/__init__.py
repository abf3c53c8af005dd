"""Measuring: perplexity (here and by transformers on the unquantised checkpoint) and speed."""
