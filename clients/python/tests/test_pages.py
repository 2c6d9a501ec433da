"""The programs of the pages, run as they stand there."""

import asyncio
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import in_time

from fetchproxy.testing import FakeProxy, Settled

ROOT = Path(__file__).parents[3]
BARE = (ROOT / "docs/how-to/bare-contract.md").read_text()
PACKAGE = (ROOT / "clients/python/README.md").read_text()
ADDRESS = "127.0.0.1:50051"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code in this language."""
    return [block.split("```")[0] for block in page.split(f"```{language}\n")[1:]]


@in_time
async def acks_all(*program: str, folder: Path, address_of: str) -> None:
    """Runs a program, whose last argument is its source, until it has acked three messages."""
    async with FakeProxy() as fake:
        source = address_of.replace(ADDRESS, fake.address)
        records = [fake.publish(str(number)) for number in range(3)]
        process = await asyncio.create_subprocess_exec(*program, source, cwd=folder)
        try:
            await fake.settled()
        finally:
            process.kill()
            await process.wait()
    assert [record.settlements for record in records] == [[Settled("ack", attempt=1)]] * 3


def test_bare_loop_in_python_acks_all(tmp_path: Path) -> None:
    (command,) = (line for line in BARE.splitlines() if "grpc_tools.protoc" in line)
    python, arguments = command.split()[0], command.split()[1:]
    assert python == ".venv/bin/python"
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    assert (tmp_path / "fetchproxy/v1/fetch_pb2_grpc.py").exists()
    program = "handle = print\n" + blocks(BARE, "python")[0]
    acks_all(sys.executable, "-c", folder=tmp_path, address_of=program)


def test_bare_loop_in_ruby_acks_all(tmp_path: Path) -> None:
    ruby = [shutil.which("ruby") or "false", "-rgrpc", "-e", ""]
    if subprocess.run(ruby, capture_output=True, check=False).returncode:
        pytest.skip("needs Ruby (Debian: the packages of docs/how-to/bare-contract.md)")
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    (install,) = (block for block in blocks(BARE, "sh") if "apt-get" in block)
    commands = install.split("\n", 1)[1]
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True)
    program = "def handle(text) = puts(text)\n" + blocks(BARE, "ruby")[0]
    acks_all("ruby", "-e", folder=tmp_path, address_of=program)


def test_worker_of_the_page_of_the_package_acks_all(tmp_path: Path) -> None:
    program = "def work(data): print(data)\n\n" + blocks(PACKAGE, "python")[0]
    acks_all(sys.executable, "-c", folder=tmp_path, address_of=program)


def test_unit_test_of_the_page_of_the_package_passes(tmp_path: Path) -> None:
    (test,) = (block for block in blocks(PACKAGE, "python") if "FakeProxy" in block)
    program = textwrap.dedent(
        """
        from fetchproxy import Nak
        async def handle(message):
            if message.delivery_count == 1:
                raise Nak(30)
        """
    )
    file = tmp_path / "test_handle.py"
    file.write_text(program + test)
    subprocess.run([sys.executable, "-m", "pytest", "-q", file], cwd=tmp_path, check=True)
