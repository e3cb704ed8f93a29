"""What the ranks say to each other when one of them is lost."""
import pytest

from pretrain.world import is_lost_peer, words_of_transport

GLOO = ("[/build/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:24788: Connection reset by peer. This is "
        "typically caused by a remote worker hanging or bugs in the application. Check the logs of the remote worker.")


@pytest.mark.parametrize(("told", "shown"), [
    (GLOO, "Read error [127.0.0.1]:24788: Connection reset by peer"),
    ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete",
     "Timed out waiting 20000ms for recv operation to complete"),
    ("NCCL error in: net.cpp, remote process exited\nncclRemoteError", "NCCL error in: net.cpp, remote process exited"),
    ("[rank1]: Socket Timeout", "[rank1]: Socket Timeout"),
])
def test_a_lost_rank_is_told_without_the_place_in_the_transport_and_its_advice(told: str, shown: str):
    error = RuntimeError(told)
    assert is_lost_peer(error)
    assert words_of_transport(error) == shown
