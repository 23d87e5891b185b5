import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Threads cost small matrices more than they give, and sum in another order on another machine;
    a seed keeps a test from flickering."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
