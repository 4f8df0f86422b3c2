"""Other people's models under a guard, each against an unguarded twin. See README.md."""
