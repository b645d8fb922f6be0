"""What the tests of the recipes share."""

import pytest

from baselines import BASELINES


@pytest.fixture(params=BASELINES)
def name(request):
    """That of each baseline."""
    if request.param == "soap":
        pytest.importorskip("pytorch_optimizer", reason="it is in the extra 'recipes'")
    return request.param
