"""Put `configs/` into the wheel as `bpt_dist/configs`; all else of the build is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the shipped configurations beside the package; an editable install reads those of the checkout."""

    def run(self) -> None:
        """Build the package, then add the configurations."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "bpt_dist" / "configs", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
