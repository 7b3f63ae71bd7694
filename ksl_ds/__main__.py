"""`python -m ksl_ds` and `deepspeed --module ksl_ds`: the same front door."""

import sys

from ksl_ds.cli import main

sys.exit(main())
