"""A pytest plugin, `-p shuffled`: tests in an order that the environment's SHUFFLE_SEED decides.

The order of a suite that always runs alike hides what one test leaves behind for the next.
"""

import os
import random


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.nodeid)
    random.Random(int(os.environ["SHUFFLE_SEED"])).shuffle(items)


def pytest_report_header():
    return f"order: SHUFFLE_SEED={os.environ['SHUFFLE_SEED']}"
