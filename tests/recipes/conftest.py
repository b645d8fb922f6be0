"""What the tests of the recipes share."""

import pytest

from baselines import BASELINES
from tests.recipes.comparison_setting import Setting


@pytest.fixture(params=BASELINES)
def name(request):
    """That of each baseline."""
    if request.param == "soap":
        pytest.importorskip("pytorch_optimizer", reason="it is in the extra 'recipes'")
    return request.param


@pytest.fixture
def toy(tmp_path):
    """A comparison of a recipe that takes no time."""
    return Setting(tmp_path)
