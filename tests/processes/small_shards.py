"""The command line with shards as small as tiny models need: `python -m tests.processes.small_shards convert ...`

Real shards are at least 1 MB. Importing this module is enough.
"""

from t5g2convert.conversion import option_values

SMALLEST_FOR_USERS = option_values.SMALLEST_SHARD

option_values.SMALLEST_SHARD = 1

if __name__ == "__main__":
    from t5g2convert.__main__ import main

    main()
