from pathlib import Path

import pytest
import torch

from convert import load_pretrained

ROOT = Path(__file__).parents[1]
BASE = ROOT / "data" / "base"
SHARED = ROOT.parent / "shared" / "data"        # public files, where they are


@pytest.fixture(scope="session")
def base():
    """-> the model that ships and its tokenizer, read once: whoever changes one loads its own."""
    return load_pretrained(BASE)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads cost small matrices more than they give, and sum in another order on another
    machine; for the whole session, since fixtures train, too."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def a_seed():
    """Keeps a test from flickering."""
    torch.manual_seed(0)
