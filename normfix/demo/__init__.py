"""The main job on a real network and a real image: show the seams, repair them, prove it, draw it."""

from __future__ import annotations

from normfix.demo.show import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
