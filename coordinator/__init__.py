"""Who does what, and what happened: scheduler, ledger, store, dashboard. No torch."""
