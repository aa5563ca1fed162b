"""Changes to a saved checkpoint that leave it intact by its manifest."""

from __future__ import annotations

from pathlib import Path

from components.checkpoint.manifest import MANIFEST, run_of, write_manifest


def rewrite_manifest(checkpoint: Path) -> None:
    """Make the manifest describe the files as they are now, as someone who sends an altered checkpoint would."""
    run = run_of(checkpoint)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, ranks=0, run=run or "")
