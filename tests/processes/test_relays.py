"""Workers that nobody can dial, as far as the coordinator may tell others, train through relays, or dial who can be."""

from __future__ import annotations

from typing import Any

import pytest

SAMPLES_PER_STEP = 4


@pytest.mark.timeout(90)
def test_a_run_goes_through_the_coordinator_and_on_over_another_relay(network: Any) -> None:
    network.configure(steps=10**6, lan=False)
    coordinator = network.coordinator()
    relay, spot = network.relay()
    coordinator.interrupt()
    assert coordinator.wait(30.0) == 0

    network.configure(steps=10**6, lan=False, relays=[spot])
    coordinator = network.coordinator()
    anna, ben = network.worker("anna"), network.worker("ben")
    network.event("(anna reaches ben|ben reaches anna) through a relay")
    state = network.until(lambda s: s["round"] > 1)
    assert {link["path"] for peer in state["peers"] for link in peer["links"]} == {"relayed"}
    assert all("other workers reach this one through a relay" in p.output for p in (anna, ben))

    coordinator.kill()  # and with it the relay that they may be using
    coordinator = network.coordinator()
    rounds = state["round"]
    network.until(lambda s: s["round"] > rounds + 1, 60.0)
    coordinator.interrupt()
    assert [p.wait(40.0) for p in (coordinator, anna, ben)] == [0, 0, 0], network.story([])
    assert network.committed_samples() % SAMPLES_PER_STEP == 0
    relay.interrupt()
    assert relay.wait(20.0) == 0
    assert "MB moved" in relay.output


@pytest.mark.timeout(90)
def test_who_can_be_dialled_is(network: Any) -> None:
    """One of two has an address: both send to each other straight, and the relay moves nothing."""
    network.configure(steps=10**6)
    coordinator = network.coordinator()
    relay, spot = network.relay()
    coordinator.interrupt()
    assert coordinator.wait(30.0) == 0

    network.configure(steps=10**6, relay=False, relays=[spot])
    coordinator = network.coordinator()
    crew = [network.worker(name, hidden=name == "anna") for name in ("anna", "ben")]
    state = network.until(lambda s: s["round"] > 2 and all(peer["links"] for peer in s["peers"]), 60.0)
    assert {link["path"] for peer in state["peers"] for link in peer["links"]} == {"direct"}, network.story([state])
    said = {process.name: "other workers reach this one through a relay" in process.output for process in crew}
    assert said == {"anna": True, "ben": False}
    coordinator.interrupt()
    assert [p.wait(40.0) for p in (coordinator, *crew)] == [0, 0, 0], network.story([])
    relay.interrupt()
    assert relay.wait(20.0) == 0
    assert relay.output.splitlines()[-1].endswith(" 0.0 MB moved")


@pytest.mark.timeout(60)
def test_without_a_relay_it_is_said_who_cannot_be_reached(network: Any) -> None:
    network.configure(steps=10**6, lan=False, relay=False)
    network.coordinator()
    anna = network.worker("anna")
    network.event("anna joined")
    network.until(
        lambda s: "no other worker can reach this one: it cannot be dialled, and the run has no relay" in anna.output
    )
