"""Puts the contract into the package: the generated code into a wheel, the contract itself into an
archive of the sources. Reads the contract of the repository, or that of the archive."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CONTRACT = "fetchproxy/v1/fetch.proto"


class Contract(BuildHookInterface):  # type: ignore[type-arg]
    """The hook that hatchling calls before it packs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds files to the artifact."""
        root = Path(self.root)
        repository = root.parent.parent
        archived = (root / "proto").is_dir()
        proto = (root if archived else repository) / "proto"
        included = build_data["force_include"]
        if not archived:
            # The licence of the repository is that of the package.
            shutil.copyfile(repository / "LICENSE", root / "LICENSE")
        if self.target_name == "sdist":
            included[str(proto / CONTRACT)] = f"proto/{CONTRACT}"
            included[str(root / "LICENSE")] = "LICENSE"
            return
        for file in self.generate(proto).rglob("*.py*"):
            included[str(file)] = f"fetchproxy/v1/{file.name}"

    def generate(self, proto: Path) -> Path:
        """Runs protoc into a folder, which `finalize` removes."""
        import grpc_tools
        from grpc_tools import protoc

        self.folder = tempfile.mkdtemp()
        outputs = [f"--{kind}_out={self.folder}" for kind in ("python", "pyi", "grpc_python")]
        common = Path(grpc_tools.__file__).parent / "_proto"
        if protoc.main(["protoc", f"-I{proto}", f"-I{common}", *outputs, CONTRACT]):
            raise RuntimeError(f"protoc does not accept {proto / CONTRACT}")
        return Path(self.folder)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what `generate` made."""
        if self.target_name == "wheel":
            shutil.rmtree(self.folder)
