"""What is to be said about what the zoo finds: why models are skipped, and what moves besides running statistics."""

from __future__ import annotations

__all__ = ["MOVING_STATE", "REASONS"]

# A part of the reason that was recorded, and how the table words it. The first that is found counts.
REASONS = {
    "memory: ": "too large for the memory limit",
    "can't allocate memory": "too large for the memory limit",
    "timeout": "more time than the limit",
    "inplace_abn": "needs inplace_abn, which cannot be built against this torch",
    "natten": "needs natten, which is not installed",
    "detectron2": "needs detectron2, which is not on the package index",
    "pyg-lib": "needs pyg-lib, which is not on the package index",
    "squeeze_and_excitation": "needs squeeze_and_excitation, which is not installed",
    "'NoneType' object is not subscriptable": "its default configuration is incomplete",
    "has no attribute 'stage_configs'": "its default configuration is incomplete",
    "but found element of type NoneType": "its default configuration is incomplete",
    "weight of size [96, 12, 1, 1]": "its default configuration contradicts its backbone",
    "num-train-matches": "trains on known matches only",
    "URLError": "builds only with downloaded weights",
    "'NoneType' object has no attribute 'fill_'": "the library's own error: it initialises a weight that is None",
    "'NoneType' object has no attribute 'repeat'": "the library's own error: no train mode without affine",
}

# A part of "Class.buffer", and what that buffer is.
MOVING_STATE = {
    "Center.center": "the centre of a teacher's outputs (an average, of a loss): no normalisation layer",
    "DINOLoss.center": "the centre of a teacher's outputs (an average, of a loss): no normalisation layer",
    "MemoryBankModule.bank_ptr": "position in a queue of embeddings",
    "MemoryBankModule.bank": "queue of embeddings",
    "TGNMemory": "scratch index of a memory of node states",
    "GPSA.rel_indices": "cache of relative positions, made at the first forward of an image size",
    "Embedding.weight (parameter)": "the codebook itself, written in the forward",
    "ema_": "codebook learnt by moving averages (VQ-VAE)",
    "embed": "codebook learnt by moving averages (VQ-VAE)",
    "weight_u": "power iteration of spectral normalisation",
    "weight_v": "power iteration of spectral normalisation",
    "_u": "power iteration of spectral normalisation",
}
