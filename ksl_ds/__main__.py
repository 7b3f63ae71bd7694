"""`python -m ksl_ds` and `deepspeed --module ksl_ds`: the same entry point."""

import sys

from ksl_ds.cli import main

sys.exit(main())
