"""The dye: what a change of some pixels reaches, followed through the operators that a network calls."""
