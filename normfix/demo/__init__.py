"""The main job on a real network and a real image."""

from __future__ import annotations

from normfix.demo.show import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
