import pytest
from ranks import Ranks


@pytest.fixture(scope="session", params=[2, 3])
def ranks(request, tmp_path_factory):
    ranks = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()
