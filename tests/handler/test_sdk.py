"""The SDK is imported as it is, but for the library that would sleep meanwhile."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, time
from handler.sdk import import_sdk
slept = []
real = time.sleep
time.sleep = lambda seconds: slept.append(seconds) or real(seconds)
import_sdk()
import runpod, cpuinfo
from runpod.serverless.utils import rp_debugger
assert not slept, slept
assert hasattr(cpuinfo, "_get_cpu_info_internal") or hasattr(cpuinfo, "cpuinfo"), "the real one, from now on"
assert runpod.serverless.start
print(rp_debugger.PROCESSOR)
"""


def test_the_import_does_not_sleep_and_the_sdk_knows_the_processor() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    assert not names or done.stdout.strip() == names[0]


def test_a_library_that_is_imported_already_is_left_alone() -> None:
    program = "import cpuinfo, sys\nfrom handler.sdk import import_sdk\nimport_sdk()\nassert sys.modules['cpuinfo'] is cpuinfo"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_an_sdk_that_is_not_installed_is_an_error_that_names_it() -> None:
    program = (
        "import sys\nsys.modules['runpod'] = None\nfrom handler.sdk import import_sdk\n"
        "try:\n    import_sdk()\nexcept ModuleNotFoundError as error:\n    print(error.name, 'cpuinfo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["runpod", "False"], done.stderr
