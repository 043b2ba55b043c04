"""`python -m cluster.ray.start_node FOLDER COMMAND…`: Ray on one node of an allocation.

Makes the folder that nobody else may enter, and becomes the command, which keeps its sockets and logs in it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.errors import UserError
from cluster.host import private_folder


def main() -> None:
    """Make the folder, and run the command in place of this process."""
    folder, *command = sys.argv[1:]
    try:
        private_folder(Path(folder))
    except (UserError, OSError) as error:
        sys.exit(f"Ray does not start here: {error}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
