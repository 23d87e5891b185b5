import os
from pathlib import Path

import pytest
import torch

from formats.checkpoint import load_pretrained

ROOT = Path(__file__).parents[1]
NEEDED = "needs public files"
BASE = ROOT / "data" / "base"
# Public files, where they are: LORA_TEST_DATA names another place.
SHARED = Path(os.environ.get("LORA_TEST_DATA", ROOT.parent / "shared" / "data"))


def needs(place: Path):
    """A mark: the test is skipped where the public files of `place` are not there."""
    return pytest.mark.skipif(not place.exists(), reason=NEEDED)


def pytest_terminal_summary(terminalreporter):
    lacking = sum(NEEDED in str(report.longrepr) for report in
                  terminalreporter.stats.get("skipped", []))
    if lacking:
        terminalreporter.write_line(f"{lacking} tests were skipped for want of public files in "
                                    f"{SHARED} (LORA_TEST_DATA)")


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
