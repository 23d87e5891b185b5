from pathlib import Path

import pytest
import torch

from convert import load_pretrained

BASE = Path(__file__).parents[1] / "data" / "base"
SHARED = Path(__file__).parents[2] / "shared" / "data"      # public files, where they are


@pytest.fixture(scope="session")
def base():
    """-> the model that ships and its tokenizer, read once: whoever changes one loads its own."""
    return load_pretrained(BASE)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Threads cost small matrices more than they give, and sum in another order on another machine;
    a seed keeps a test from flickering."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
