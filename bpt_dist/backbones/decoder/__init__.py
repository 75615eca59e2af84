"""Decoder-only models of the Llama shape: prompt, text and target in one causal sequence."""
