"""What every operator refuses in the same words."""

import pytest
import torch

from megavl.kernels import launch
from megavl.kernels.launch import as_rows, check_tensor


def test_a_tensor_where_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETING", False)
    with pytest.raises(ValueError, match=r"^x is on cpu; Triton kernels run on cuda \(or anywhere under"):
        check_tensor("x", torch.ones(2))


def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match=r"^weight is on meta(:0)?, the other arguments are on cpu$"):
        check_tensor("weight", torch.ones(2, device="meta"), like=torch.ones(2))


@pytest.mark.skipif(not launch.INTERPRETING, reason="compiled kernels take bf16")
def test_bf16_in_the_interpreter():
    with pytest.raises(ValueError, match="x is bfloat16, which Triton's interpreter computes wrongly; use float32"):
        check_tensor("x", torch.ones(2, dtype=torch.bfloat16))


def test_rows_are_copied_only_where_they_must():
    x = torch.randn(2, 3, 8)
    assert as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(x[..., 2:6]).stride() == (8, 1)
    assert as_rows(x.transpose(1, 2)).is_contiguous()
    assert as_rows(torch.empty(0, 4, 8)).shape == (0, 8)
