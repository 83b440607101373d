"""While ExecuTorch lowers, copies of programs stand on the same weights; other copies do not."""

from __future__ import annotations

import copy

import torch

from edgebake_targets import _executorch


def test_copies_of_programs_share_tensors_and_parameters() -> None:
    tensor, parameter = torch.ones(3), torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with _executorch._shared_weights():
        made = copy.deepcopy({"a": tensor, "b": parameter})
        cloned = parameter.clone(memory_format=torch.preserve_format)
    assert made["a"].data_ptr() == tensor.data_ptr()
    assert made["b"].data_ptr() == parameter.data_ptr()
    assert isinstance(made["b"], torch.nn.Parameter)
    assert cloned.data_ptr() != parameter.data_ptr()
    assert copy.deepcopy(tensor).data_ptr() != tensor.data_ptr()
    assert copy.deepcopy(parameter).data_ptr() != parameter.data_ptr()
