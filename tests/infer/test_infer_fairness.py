"""The virtual token counters: worked examples."""

from __future__ import annotations

from fledge.infer.fairness import Ledger


def test_a_token_of_an_answer_costs_two_of_a_prompt() -> None:
    ledger = Ledger()
    ledger.lift("a", [])
    ledger.read("a", 10)
    ledger.wrote("a", 3)
    assert ledger["a"] == 16


def test_who_comes_starts_level_with_the_least_served_of_those_who_wait() -> None:
    ledger = Ledger()
    ledger.lift("a", [])
    ledger.read("a", 100)
    ledger.lift("b", ["a"])
    assert ledger["b"] == 100
    ledger.read("a", 50)
    ledger.lift("c", ["a", "b"])
    assert ledger["c"] == 100


def test_who_comes_while_nobody_waits_starts_level_with_the_last_who_did() -> None:
    ledger = Ledger()
    ledger.lift("a", [])
    ledger.left("a")
    ledger.wrote("a", 20)
    ledger.lift("b", [])
    assert ledger["b"] == 40


def test_a_debt_is_kept_while_the_tenant_is_away() -> None:
    ledger = Ledger()
    ledger.lift("a", [])
    ledger.lift("b", ["a"])
    ledger.wrote("b", 500)
    ledger.lift("b", ["a"])
    assert ledger["b"] == 1000


def test_counters_of_tenants_that_left_do_not_pile_up() -> None:
    ledger = Ledger()
    for index in range(10_000):
        ledger.lift(str(index), [])
        ledger.read(str(index), index)
        ledger.left(str(index))
        ledger.prune([])
    assert len(ledger) < 3000
    ledger.lift("new", [])
    assert ledger["new"] == 9999 * 10_000 // 2
