"""The networks and their parameters: backbones, decoders, heads, flat parameter vectors, model files.

Needs only PyTorch and timm; no training loop, no messages, no Flower.
"""
