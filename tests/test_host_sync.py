"""What the proof of sync-free code finds out, and what it lets pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.host_sync import HostSyncError, no_host_sync

X = torch.arange(6.0)
FINDINGS = {
    "item": lambda: X[0].item(),
    "bool": lambda: bool(X.any()),
    "int": lambda: int(X.max()),
    "float": lambda: float(X.sum()),
    "if": lambda: 1 if X.any() else 0,
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 2),
    "masked_select": lambda: X.masked_select(X > 2),
    "unique": lambda: X.unique(),
    "unique_consecutive": lambda: X.unique_consecutive(),
    "boolean index": lambda: X[X > 2],
    "boolean assignment": lambda: X.clone().__setitem__(X > 2, torch.zeros(3)),
    "scalar index": lambda: X[X.argmax()],
    "slice": lambda: X[: X.argmax()],
    "arange": lambda: torch.arange(X.argmax()),
    "repeat_interleave": lambda: X.repeat_interleave(X.long()),
    "bincount": lambda: X.long().bincount(),
    "multinomial": lambda: X.multinomial(1),
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_host_syncs_are_found_out(finding: str) -> None:
    FINDINGS[finding]()
    with pytest.raises(HostSyncError), no_host_sync():
        FINDINGS[finding]()


def test_what_stays_on_the_device_passes() -> None:
    def work() -> Tensor:
        picked = X.masked_fill(X > 2, 0.0)[torch.tensor([1, 0])]  # an index made on the host
        uniforms = torch.rand(2, generator=torch.Generator().manual_seed(0)).to(X.device)
        places = torch.searchsorted(X.double().cumsum(0), uniforms.double())
        kept = torch.where(X > 2, X, 0.0).scatter(0, places, 1.0)
        return kept[places] + picked + X.repeat_interleave(2)[:2] + X.topk(2).values

    expected = work()
    with no_host_sync():
        found = work()
    assert torch.equal(found, expected)
