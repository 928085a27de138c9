"""What belongs to the whole process, and every call of the library must leave alone."""

import os
import random
import sys
import warnings

import numpy as np
import torch


def global_state() -> list:
    """What a call must leave as it found it: random numbers, defaults, modes, streams, warnings, the process."""
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        sys.stdout,
        sys.stderr,
        sys.excepthook,
        list(warnings.filters),
        dict(os.environ),
        os.getcwd(),
    ]
