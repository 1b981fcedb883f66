"""Refuse to copy ``client``, ``server`` and ``common`` into site-packages, where they could shadow others."""

from setuptools import setup
from setuptools.command.build_py import build_py


class RefuseCopies(build_py):
    """Builds editable installations only."""

    def run(self) -> None:
        """Build, or explain why not."""
        if not self.editable_mode:
            raise SystemExit(
                "Consilium runs from its checkout: use `pip install -e .`. A copy in site-packages could "
                "shadow packages of other projects that are called client, server or common"
            )
        super().run()


setup(cmdclass={"build_py": RefuseCopies})
