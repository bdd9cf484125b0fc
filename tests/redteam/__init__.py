"""Hostile submissions: `corpus` says what each attempts, `test_redteam` runs them in every sandbox tier."""
