"""How nodes meet and how one notices that another is gone; the whole of it is in tests/training/test_nodes.py."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks import agent, nodes
from tasks.errors import UserError
from tasks.gpus import booked
from tasks.nodes import Company, Link, meet
from tasks.stage import Order, write_order


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    one, other = socket.socketpair()
    with one, other:
        yield Link(one, "node 0"), Link(other, "node 1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_messages_arrive_whole_and_pings_are_left_out(pair: tuple[Link, Link]) -> None:
    here, there = pair
    here.tell()
    here.tell(directory="a")
    here.connection.sendall(b'{"nod')
    assert there.poll() == [{"directory": "a"}]
    here.connection.sendall(b'e_rank": 1}\n')
    assert there.poll() == [{"node_rank": 1}] and not there.lost


def test_a_closed_connection_is_a_lost_node_unless_the_stage_was_over(pair: tuple[Link, Link]) -> None:
    here, there = pair
    here.connection.close()
    there.poll()
    assert there.lost == "node 1 is gone (its connection was closed)"
    one, other = socket.socketpair()
    with one, other:
        ended = Link(other, "node 1")
        Link(one, "node 0").tell(end=True)
        one.close()
        assert ended.poll() == [{"end": True}] and ended.over and not ended.lost


def test_silence_is_a_lost_node_and_pings_are_no_silence(
    pair: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(nodes, "PING_SECONDS", 0.1)
    here, company = pair[0], Company([pair[1]], "")
    for _ in range(10):
        here.poll()
        assert company.problem() == ""
        time.sleep(0.1)
    time.sleep(0.6)
    assert "node 1 has been silent" in company.problem()


def test_an_agent_that_waits_for_a_gpu_stays_in_touch_and_goes_with_the_stage(
    pair: tuple[Link, Link], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "PING_SECONDS", 0.1)
    monkeypatch.setenv("STEEP_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    how = {"device": "cuda", "processes": 1, "nodes": 2}
    directory = write_order(Order("cpt", "train", "tiny", {}, how, {}), tmp_path)
    task = {"directory": str(directory), "node_rank": 1, "master": "127.0.0.1:1", "hub": False}
    node_0, link = pair
    with booked("tasks.training", how, "another run", print):
        share = threading.Thread(target=agent.take_part, args=(link, task))
        share.start()
        time.sleep(1)
        assert share.is_alive() and node_0.connection.recv(100), "it pings while it waits"
        node_0.tell(end=True)
        share.join(10)
    assert not share.is_alive() and link.over and not (directory / "worker-node1.log").exists()


def test_what_an_agent_refuses_is_told_to_node_0(
    pair: tuple[Link, Link], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    how = {"device": "cuda", "processes": 8, "nodes": 2}
    directory = write_order(Order("cpt", "train", "tiny", {}, how, {}), tmp_path)
    with pytest.raises(UserError, match="uses 8 GPUs"):
        agent.take_part(pair[1], {"directory": str(directory), "node_rank": 1, "master": "127.0.0.1:1", "hub": False})
    pair[1].connection.close()
    company = Company([pair[0]], "")
    assert "is gone" in company.problem() and "uses 8 GPUs" in "".join(company.tail)


def test_a_node_that_failed_takes_the_others_with_it_and_one_that_is_done_does_not(
    pair: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SECONDS_TO_FOLLOW", 0.0)
    here, company = pair[0], Company([pair[1]], "")
    here.tell(exit=0, tail=["fine"])
    assert company.problem() == "" and company.tail == []
    here.tell(exit=1, tail=["RuntimeError: no GPU"])
    company.problem()
    time.sleep(0.01)
    assert "another node's share failed" in company.problem()
    assert company.tail == ["node 1: exited with 1", "RuntimeError: no GPU"]


def test_ranks_follow_names_and_strangers_are_turned_away(tmp_path: Path) -> None:
    port = free_port()
    how = {"nodes": 3, "rendezvous": f"127.0.0.1:{port}"}
    links: list[Link] = []

    def come(said: list[bytes], connections: ExitStack) -> None:
        for words in said:
            for _ in range(100):
                try:
                    connection = connections.enter_context(socket.create_connection(("127.0.0.1", port)))
                    break
                except OSError:
                    time.sleep(0.05)
            connection.sendall(words)
            links.append(Link(connection, "node 0"))

    with ExitStack() as connections:
        said = [b"GET / HTTP/1.1\r\n", b"[]\n", b'{"agent": "b"}\n', b'{"agent": "a"}\n']
        thread = threading.Thread(target=come, args=(said, connections))
        thread.start()
        with meet(how, tmp_path, lambda line: None, hub=False) as company:
            thread.join()
            assert [link.name for link in company.links] == ["a (127.0.0.1)", "b (127.0.0.1)"]
            time.sleep(0.1)
            tasks = [link.poll()[0] for link in links[2:]]
            assert [task["node_rank"] for task in tasks] == [2, 1]
            assert {task["master"] for task in tasks} == {company.master}
        assert links[2].poll() == [{"end": True}]


def test_nodes_that_do_not_come_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "JOIN_SECONDS", 0.1)
    how = {"nodes": 2, "rendezvous": f"127.0.0.1:{free_port()}"}
    with (
        pytest.raises(UserError, match="0 of 1 other nodes came"),
        meet(how, tmp_path, lambda line: None, hub=False),
    ):
        raise AssertionError("nobody came")


def test_a_rendezvous_elsewhere_is_refused(tmp_path: Path) -> None:
    how = {"nodes": 2, "rendezvous": "192.0.2.1:29400"}  # an address of nobody
    with pytest.raises(UserError, match="cannot listen"), meet(how, tmp_path, lambda line: None, hub=False):
        raise AssertionError
