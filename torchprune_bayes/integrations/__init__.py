"""Adapters for training frameworks; each module imports its framework, this package none.

``hf``
    ``PruningCallback`` for ``transformers.Trainer``, with metrics, distillation and LoRA merging.
``accelerate``
    Calibration data divided among processes, and the same masks in all of them.
``timm``
    Calibration from timm's loaders, averaged weights, checkpoints.
``resume``
    Checkpoints of training, pruning, shrinking and long calibration in your own loop.
``semi_structured``
    Linear layers pruned 2:4, packed for the sparse matrix products of GPUs.
"""
