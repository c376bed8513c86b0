import datasets
import pytest

from cabochon.evaluate import data
from cabochon.evaluate.data import Datasets, offline_if_out_of_reach


@pytest.fixture
def network(monkeypatch):
    """The state of the libraries, put back afterwards; yields the addresses that are asked."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def refuse(address, *_):
        asked.append(address)
        raise OSError("no route")

    monkeypatch.setattr(data.socket, "create_connection", refuse)
    return asked


def test_without_a_network_nothing_is_tried_again(network):
    offline_if_out_of_reach()
    assert len(network) == 1
    assert datasets.config.HF_HUB_OFFLINE is True


def test_behind_a_proxy_the_hub_is_not_asked_directly(network, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    offline_if_out_of_reach()
    assert (network, datasets.config.HF_HUB_OFFLINE) == ([], False)
    offline_if_out_of_reach(offline=True)
    assert (network, datasets.config.HF_HUB_OFFLINE) == ([], True)


def test_a_copy_is_read_in_place_of_the_hub(tmp_path):
    copy = tmp_path / "org" / "name"
    copy.mkdir(parents=True)
    (copy / "test.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    plain = datasets.load_dataset
    with Datasets(tmp_path) as redirected:
        found = datasets.load_dataset(path="org/name", name=None)
        assert found["test"]["a"] == [1, 2]
        assert redirected.failed is None
    assert datasets.load_dataset is plain


def test_what_is_not_here_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    plain = datasets.load_dataset
    with Datasets(None) as redirected:
        with pytest.raises(Exception) as caught:
            datasets.load_dataset("org/nowhere")
        error = redirected.explain("some_task", caught.value)
    assert error.exit_code == 4
    assert "org/nowhere" in error.what
    assert "hf download --repo-type dataset org/nowhere" in error.hint
    assert datasets.load_dataset is plain
