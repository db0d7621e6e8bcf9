import pytest


@pytest.fixture(scope="session", autouse=True)
def cluster():
    """One Ray cluster for all tests of this folder; `raydet.train` uses it as it finds it."""
    import ray

    ray.init(address="local", num_cpus=6, object_store_memory=512 * 2**20, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
