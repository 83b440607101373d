"""The target onnx-genai: what it refuses, what it writes of a loaded network, and that its runner computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoders
from asking import defaults, lower_request
from edgebake.errors import ArtifactDamaged, Problem, RecipeError, StageFailed
from edgebake.metrics import sqnr_db
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.target import Asked, runners_of
from edgebake.trace import trace
from edgebake.types import Assignment, Language, Loaded, MethodSignature, Signature, TensorSpec, Traced
from edgebake_targets import onnx_genai
from edgebake_targets._genai_graph import write_graph
from edgebake_targets._genai_config import read_spec
from edgebake_targets._genai_state import StateTensors
from edgebake_targets.inspectors import onnx as inspector
from edgebake_targets.runners import onnxruntime_decoder
from test_genai_graph import NoTensors

TOKENS = torch.randint(3, decoders.WORDS, (1, 40), generator=torch.Generator().manual_seed(1))
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES = (*MODULES, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
